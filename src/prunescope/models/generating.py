"""Text from a model through its ordinary `generate()`, in batches whose results do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from prunescope.errors import UserError
from prunescope.models.loading import LoadedModel

__all__ = ["Sampling", "batches", "choose", "continue_texts", "end_tokens", "uniform_draws"]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy; it has nothing to do with the metric temperature."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: it cannot be negative; 0 is greedy")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"--top-k {self.top_k} --top-p {self.top_p}: top-k must be 0 (off) or more, top-p in (0, 1]"
            )


def uniform_draws(sampling: Sampling, prompts: Sequence[int], steps: int) -> Tensor:
    """``(prompts, steps)`` float64 uniform numbers: those of a prompt follow from the seed and its number alone."""
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + i) for i in prompts]
    return torch.stack([torch.rand(steps, generator=generator, dtype=torch.float64) for generator in generators])


def choose(scores: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The token of each row of logits ``(rows, V)``: the likeliest if greedy, else where ``draws`` (rows,) falls in the cumulated
    distribution. The same draw chooses the same token from the same distribution, whatever the batch, the device or the model."""
    if not sampling.temperature:
        return scores.argmax(-1)
    p = (scores.float() / sampling.temperature).softmax(-1, dtype=torch.float64)
    if sampling.top_k:
        p = p.where(p >= p.topk(min(sampling.top_k, p.shape[-1]), -1).values[:, -1:], 0)
    if sampling.top_p < 1:
        falling = p.sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling
        least = falling.where(before < sampling.top_p * p.sum(-1, keepdim=True), torch.inf).amin(-1, keepdim=True)
        p = p.where(p >= least, 0)
    mass = p.cumsum(-1)
    draw = draws[:, None].to(mass.device) * mass[:, -1:]
    return torch.searchsorted(mass, draw, right=True).clamp(max=mass.shape[-1] - 1)[:, 0]


class _SharedDraws(LogitsProcessor):
    """Leaves one token: that which `choose` takes with the uniform number of this prompt and step."""

    def __init__(self, sampling: Sampling, draws: Tensor) -> None:
        self.sampling, self.draws, self.step = sampling, draws, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (batch, tokens), (batch, vocab)
        token = choose(scores, self.sampling, self.draws[:, self.step])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Ids that end a text: those of the generation config (chat ends too), else of the tokenizer. May be empty."""
    ids = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    ids = loaded.tokenizer.eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def continue_texts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int,
    sampling: Sampling = Sampling(),
    stop: bool = True,
    first: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Continue each prompt with `generate()`: left-padded batches, key/value cache, no hidden settings of the model's generation config.

    Args:
        prompts: token ids, at least one a prompt.
        max_new_tokens: at most so many new tokens each.
        stop: end a text at an end-of-text token, which is kept as its last token.
        first: the number of the first prompt, from which the uniform draws of sampling follow.
        advance: told how many prompts are done, batch by batch.
    Returns:
        The new token ids of each prompt.
    """
    ends = end_tokens(loaded) if stop else []
    results: list[list[int]] = []
    for chosen in batches(range(len(prompts)), batch_size):
        batch = [list(prompts[i]) for i in chosen]
        width = max(map(len, batch))
        pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=loaded.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=loaded.device)
        draws = uniform_draws(sampling, [first + i for i in chosen], max_new_tokens)
        processors = LogitsProcessorList([_SharedDraws(sampling, draws)] if sampling.temperature else [])
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=pad
        )
        with torch.no_grad(), _only(loaded.model, config):
            out = loaded.model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=processors)
        for row in out[:, width:].tolist():
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            results.append(row[:length])
        advance(len(batch))
    return results


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate()` fills unset fields from the model's own generation config (penalties, top-p, ...): take it away for a moment."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
