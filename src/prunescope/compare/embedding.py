"""Texts -> vectors: the states that the head of a decoder would read, pooled over a text.

``mean`` is the plain mean over all tokens. ``last`` takes the last token, as E5-Mistral does, whose queries begin with ``Instruct: ...``
and whose texts end in an end-of-text token (arXiv 2401.00368). ``weighted-mean`` weighs token i of n with i / (1 + ... + n), as SGPT
does, since a decoder's later tokens have seen more (arXiv 2202.08904).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunescope.compare.context import at_least_float32
from prunescope.data.tokens import check_tokens
from prunescope.errors import UserError
from prunescope.models.attending import any_length
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import final_states

__all__ = ["Pooling", "Reading", "embed", "pool", "tokens_of"]

Pooling = Literal["mean", "last", "weighted-mean"]


@dataclass(frozen=True)
class Reading:
    """How a text becomes tokens, and tokens a vector."""

    pooling: Pooling = "mean"
    instruction: str | None = None  # what a query is for; passages have none
    append_eos: bool = False
    max_length: int = 512  # tokens; what is longer is cut, its end-of-text token kept

    def query(self, text: str) -> str:
        """The query as it is read: ``Instruct: {instruction}\\nQuery: {text}`` where there is an instruction."""
        return f"Instruct: {self.instruction}\nQuery: {text}" if self.instruction else text


def tokens_of(model: LoadedModel, texts: dict[str, str], reading: Reading, what: str) -> tuple[list[list[int]], int]:
    """Token ids of every text, with the special tokens that the tokenizer puts around it, and how many texts were cut.

    Args:
        texts: id -> text.
        what: "query" or "passage", for messages.
    Raises:
        UserError: a text of no tokens, tokens that the model does not know, no end-of-text token to append.
    """
    tokenizer = model.tokenizer
    eos: int | None = tokenizer.eos_token_id
    if reading.append_eos and eos is None:
        raise UserError(f"{model.ref}: --append-eos, but its tokenizer has no end-of-text token")
    if not texts:
        return [], 0
    words = list(texts.values())
    found: list[list[int]] = tokenizer(words, verbose=False)["input_ids"]
    cut = 0
    for i, (name, text) in enumerate(texts.items()):
        ends = reading.append_eos and (not found[i] or found[i][-1] != eos)
        if len(found[i]) + ends > reading.max_length:
            cut += 1
            found[i] = tokenizer(text, truncation=True, max_length=reading.max_length - ends)["input_ids"]
        if ends and eos is not None:
            found[i] = [*found[i], eos]
        check_tokens(
            model, f"{what} {name!r}", found[i], empty=": the tokenizer gives no tokens for its text; remove it"
        )
    return found, cut


def pool(states: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, ``(batch, d)`` float64, from ``states`` (batch, tokens, d) of which the first ``lengths`` (batch,) are real."""
    place = torch.arange(states.shape[1], device=states.device)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1].double()
    real = place < lengths[:, None]
    weight = real.double() if pooling == "mean" else real * (place + 1.0).double()
    weight = weight / weight.sum(-1, keepdim=True)
    # padding may hold anything, also what times zero is not zero
    return (weight[:, None] @ states.double().masked_fill(~real[..., None], 0.0))[:, 0]


@torch.no_grad()
def embed(
    model: LoadedModel,
    sequences: Sequence[Sequence[int]],
    pooling: Pooling,
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Vectors ``(texts, d)`` of token sequences, on the model's device, in float32 (float64 for a float64 model).

    Texts of like length share a batch; padding is on the right, where no token of a decoder looks, and masked. So the batch size changes
    rounding and nothing else.

    Raises:
        FloatingPointError: a vector that is NaN, infinite or zero.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    pooled: list[Tensor] = []
    caught: list[Tensor] = []
    with final_states(model, caught.append), any_length():
        for start in range(0, len(order), batch_size):
            chosen = [sequences[i] for i in order[start : start + batch_size]]
            lengths = torch.tensor([len(tokens) for tokens in chosen], device=model.device)
            longest = len(chosen[0])
            ids = torch.tensor([[*tokens, *[tokens[-1]] * (longest - len(tokens))] for tokens in chosen])
            mask = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
            model.model(input_ids=ids.to(model.device), attention_mask=mask, use_cache=False, logits_to_keep=1)
            pooled.append(pool(caught.pop(), lengths, pooling))
            advance(len(chosen))
    vectors = torch.cat(pooled)
    if not torch.isfinite(vectors).all() or not vectors.any(-1).all():
        raise FloatingPointError("an embedding is NaN, infinite or zero")
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return vectors[back.to(vectors.device)].to(at_least_float32(model.dtype))
