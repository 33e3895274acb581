"""Traces: text that the dense model writes itself, after prompts of the user or after prompts that it writes too. Only what it wrote counts.

Text of the web is a poor guide to what a model needs when it answers; its own answers to the uses at hand are a better one (arXiv 2509.12464).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunescope.cache import remembered
from prunescope.data.prompts import Prompt, read_prompts
from prunescope.data.tokens import chat_text, encode
from prunescope.errors import UserError
from prunescope.models.generating import Sampling, batches, by_length, continue_texts, texts_at_a_time
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress

__all__ = ["SELF", "Trace", "Traces", "padded", "write_traces"]

SELF = "self"
_USER_TOKENS = 64  # of a user's turn that the model writes


class Trace(NamedTuple):
    """A prompt and what the dense model wrote after it, as token ids; ``source`` is the prompt's file, or ``self``."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Traces:
    """What a model wrote, and how."""

    rows: tuple[Trace, ...]
    new_tokens: int
    temperature: float
    seed: int

    def describe(self) -> dict[str, Any]:
        """What a run or a checkpoint records of them."""
        content = json.dumps([[row.prompt, row.continuation] for row in self.rows])
        return {
            "sources": list(dict.fromkeys(row.source for row in self.rows)),
            "samples": len(self.rows),
            "tokens": sum(len(row.continuation) for row in self.rows),
            "new_tokens": self.new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "tokens_sha256": hashlib.sha256(content.encode()).hexdigest(),
        }

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and which of them count, both ``(rows, length)``, see `padded`."""
        for chosen in batches(range(len(self.rows)), batch_size):
            yield padded([self.rows[i][:2] for i in chosen])


def padded(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Of prompts and continuations: token ids ``(texts, length)`` int64, right-padded, and bool of the same shape, True for tokens of a
    continuation. No real token of a causal model sees the padding. What predicts a token are the logits of the place before it."""
    width = max(len(prompt) + len(continuation) for prompt, continuation in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    counts = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (prompt, continuation) in enumerate(texts):
        ids = [*prompt, *continuation]
        tokens[row, : len(ids)] = torch.tensor(ids)
        counts[row, max(1, len(prompt)) : len(ids)] = True  # nothing predicts the first token of all
    return tokens, counts


def write_traces(
    dense: LoadedModel,
    files: Sequence[str],
    *,
    samples: int,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
) -> Traces:
    """Let ``dense`` write: prompts of about the same length together, the longest first; each text's draws follow from its number in the mix.

    Prompts of several files are mixed evenly, each file's in an order of its own; a file that is too short is gone through again, with other draws.
    Where the tokenizer has a chat template a prompt is the user's turn in it, unless its row says ``"chat": false``. With no file, and for ``self``
    among the files, the model writes the user's turn too (as Magpie, arXiv 2406.08464), or, without a chat template, everything after its start token.

    Args:
        files: see `read_prompts`; or ``self``.
        samples, new_tokens: so many texts, of at most so many new tokens each.
        batch_size: texts at a time, by default as many as `texts_at_a_time` says.
        cache: folder in which texts are kept, batch by batch, so that an interrupted call continues; None keeps none.
    Raises:
        UserError: a file that cannot be read, a prompt too long for the model, or a model with no start token.
    """
    if samples < 1 or new_tokens < 1:
        raise UserError(f"--samples {samples} --new-tokens {new_tokens}: at least one text of one token is needed")
    sampling = Sampling(temperature, seed=seed)
    sampling.check()
    model = {"model": dense.identity, "dtype": str(dense.dtype), "dropped": str(dense.dropped)}
    kept = cache if dense.pinned else None
    sources = list(files) or [SELF]
    own = sum(sources[i % len(sources)] == SELF for i in range(samples))
    its = iter(_own_prompts(dense, own, new_tokens, seed, batch_size, kept, model) if own else [])
    given = iter(_from_files(dense, [file for file in sources if file != SELF], samples - own, new_tokens, seed))
    prompts = [next(its if sources[i % len(sources)] == SELF else given) for i in range(samples)]
    rows: list[Trace | None] = [None] * samples
    fitting = texts_at_a_time(dense, new_tokens, batch_size)
    with progress(f"writing {len(prompts)} traces of {new_tokens} tokens", len(prompts)) as advance:
        for chosen in by_length([len(ids) for ids, _ in prompts], fitting):
            asked = [prompts[i][0] for i in chosen]
            key = {"what": "traces 2", **model, "prompts": asked, "numbers": chosen, "new": new_tokens, "t": temperature, "seed": seed}  # fmt: skip
            written = remembered(
                kept,
                key,
                lambda asked=asked, numbers=chosen: continue_texts(  # type: ignore[misc]
                    dense, asked, new_tokens, batch_size=len(asked), sampling=sampling, numbers=numbers
                ),
            )
            for i, text in zip(chosen, written, strict=True):
                rows[i] = Trace(tuple(prompts[i][0]), tuple(text), prompts[i][1])
            advance(len(chosen))
    return Traces(tuple(row for row in rows if row is not None), new_tokens, temperature, seed)


_Prompts = list[tuple[list[int], str]]  # token ids, where they come from


def _from_files(dense: LoadedModel, files: Sequence[str], samples: int, new_tokens: int, seed: int) -> _Prompts:
    if not samples:
        return []
    orders = []
    for number, file in enumerate(files):
        prompts = read_prompts(file)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        orders.append([prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()])
    chosen: list[tuple[Prompt, str]] = []
    for i in range(samples):
        own = orders[i % len(files)]
        chosen.append((own[i // len(files) % len(own)], files[i % len(files)]))
    chat = bool(dense.tokenizer.chat_template)
    encoded = encode(dense, [prompt for prompt, _ in chosen], new_tokens, chat=chat)
    return [(ids, file) for ids, (_, file) in zip(encoded, chosen, strict=True)]


def _own_prompts(
    dense: LoadedModel, samples: int, new_tokens: int, seed: int, batch_size: int | None, cache: Path | None, model: dict[str, Any]
) -> _Prompts:  # fmt: skip
    tokenizer = dense.tokenizer
    if not tokenizer.chat_template:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        start = next((token for token in known if token is not None), None)
        if start is None:
            raise UserError(f"{dense.ref} has no start token to write from; give prompts with --traces FILE")
        return [([start], SELF)] * samples
    mark = "\ue000"  # a sign of no language stands where the user's words would
    before = chat_text(dense, mark, "give prompts with --traces FILE").partition(mark)[0]
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    key = {"what": "user turns 1", **model, "ids": ids, "samples": samples, "seed": seed}

    def write() -> list[list[int]]:
        with progress(f"writing {samples} prompts", samples) as advance:
            turn = Sampling(1.0, seed=seed + 1)
            return continue_texts(
                dense, [ids] * samples, _USER_TOKENS, batch_size=batch_size, sampling=turn, advance=advance
            )

    turns = [tokenizer.decode(text, skip_special_tokens=True).strip() for text in remembered(cache, key, write)]
    said = [Prompt(text or "Hello!", str(i)) for i, text in enumerate(turns)]
    return [(prompt, SELF) for prompt in encode(dense, said, new_tokens, chat=True)]
