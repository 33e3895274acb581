"""Two models over a text, token by token: what llama.cpp's ``--kl-divergence`` measures, without its file of logits.

The text is tokenised in one piece and cut into chunks that do not overlap. Every chunk is read on its own, and its second half is scored,
so that each prediction has at least half a chunk of context: of ``context`` tokens the predictions at positions ``context // 2`` to
``context - 2`` count, each of the token that follows (llama.cpp, tools/perplexity). Where the tokenizer puts a start token in front of a
text, it takes the place of the first token of every chunk, as it does there.

Both models read a batch of chunks, their final states go through `compare_final` a few rows at a time, and only the columns are kept: about
250 bytes a token, tokens and probabilities of the five most likely included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY, compare_final
from prunescope.compare.context import (
    Changed,
    Transcript,
    check_memory,
    check_pair,
    final_head,
    read_states,
    run_key,
    switched,
)
from prunescope.compare.generation import TOP
from prunescope.data.jsonl import read_text
from prunescope.data.tokens import check_tokens
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress
from prunescope.runs.parts import begin, computed, joined, notes_of, with_notes
from prunescope.runs.workers import Compute, Workers, sharing

__all__ = [
    "COLUMNS",
    "DivergenceRows",
    "Slice",
    "divergence_key",
    "divergence_passes",
    "divergence_rows",
    "read_slices",
]

COLUMNS = (
    *("kl_dense_target", "kl_target_dense", "js", "tv", "nll_dense", "nll_target", "dp"),
    *("entropy_dense", "entropy_target", "confidence_dense", "confidence_target"),
    *("top1_agree", "same_sampled", "same_sampled_dense"),
)
_TOPS = ("top_dense", "top_dense_p", "top_target", "top_target_p")
_FLOOR = ("kl_dense_target", "kl_target_dense", "js", "tv", "dp")
_LEAST_CONTEXT = 4  # tokens; below that nothing is left to score
_FLOOR_CHUNKS = 2


@dataclass(frozen=True)
class Slice:
    """A text as chunks of tokens, ``(chunks, context)`` int64 on the CPU."""

    name: str
    chunks: Tensor
    tokens: int  # of the whole text, before what fills no chunk was left out

    @property
    def context(self) -> int:
        return self.chunks.shape[1]


@dataclass(frozen=True)
class DivergenceRows:
    """What `divergence_rows` found: a row per scored token, and the noise floor."""

    table: pa.Table
    floor: dict[str, Any]


def read_slices(loaded: LoadedModel, files: str, *, context: int = 512, chunks: int | None = None) -> list[Slice]:
    """The texts of ``files``, names of UTF-8 files with commas between them, cut into chunks of ``context`` tokens.

    Special tokens that a text spells out are read as such, so that chats can be measured; llama.cpp reads them as plain text.

    Args:
        chunks: take only the first so many of each file.
    Raises:
        UserError: a file that cannot be read, that is named twice or fills no chunk, a context that the model does not have, tokens that
            it does not know.
    """
    if context < _LEAST_CONTEXT:
        raise UserError(f"--context {context}: at least {_LEAST_CONTEXT} tokens are needed")
    if chunks is not None and chunks < 1:
        raise UserError(f"--chunks {chunks}: at least one is needed")
    if loaded.context and context > loaded.context:
        raise UserError(f"--context {context} is longer than the {loaded.context} tokens that {loaded.ref} can read")
    names = [name.strip() for name in files.split(",")]
    if len(set(names)) < len(names):
        raise UserError(f"--text {files}: a file is named twice; every file is a slice of its own")
    return [_slice(loaded, name, context, chunks) for name in names]


def _slice(loaded: LoadedModel, name: str, context: int, chunks: int | None) -> Slice:
    text = read_text(Path(name).expanduser(), "--text", "give a text file in UTF-8")
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = start_token(loaded)
    ids = ids if start is None else [start, *ids]
    if len(ids) < context:
        raise UserError(
            f"--text {name} has {len(ids)} tokens, fewer than one chunk of {context}; give a longer text or a smaller --context"
        )
    check_tokens(loaded, f"--text {name}", ids, empty=" has no tokens")
    count = min(len(ids) // context, chunks or len(ids))
    cut = torch.tensor(ids[: count * context]).view(count, context)
    if start is not None:
        cut[:, 0] = start
    return Slice(name, cut, len(ids))


def start_token(loaded: LoadedModel) -> int | None:
    """The token that the tokenizer puts in front of a text, None if it puts none there."""
    start: int | None = loaded.tokenizer.bos_token_id
    return start if start is not None and loaded.tokenizer("a")["input_ids"][:1] == [start] else None


def divergence_key(dense: LoadedModel, target: Changed, slices: Sequence[Slice], *settings: Any) -> str:
    """A hash of everything that decides the rows of a run."""
    texts = [[piece.name, piece.chunks.tolist()] for piece in slices]
    return run_key(dense, target, texts, "divergence", *settings)  # type: ignore[arg-type]


def divergence_rows(
    dense: LoadedModel,
    target: Changed,
    slices: Sequence[Slice],
    *,
    batch_size: int = 4,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    parts: Path | None = None,
    key: str = "",
    workers: Workers | None = None,
) -> DivergenceRows:
    """Compare two models at every scored token of ``slices``, each read once by both.

    Args:
        dense: the dense model, nothing dropped.
        target: a loaded model of the same vocabulary, or a variant of the dense model.
        slices: from `read_slices`, all of one context.
        batch_size: chunks at a time.
        temperature: metric temperature T.
        memory: bytes for the metrics, see `compare_final`.
        parts, key: folder for finished batches, and what they must have been made from (`divergence_key`).
        workers: who share the batches, each with both models of its own; None computes all here.
    Returns:
        Rows ``slice, chunk, position, token`` + `COLUMNS` + the five most likely tokens of both. ``chunk`` counts on over all slices,
        ``position`` is that of the last token read within the chunk, ``token`` the one that follows it.
    Raises:
        UserError: models that cannot be compared, or parts of another run.
        FloatingPointError: a NaN or infinite logit.
    """
    check_pair(dense, target)
    check_memory(memory, dense, target)
    begin(parts, key)
    names = [piece.name for piece in slices for _ in piece.chunks]
    chunks = [chunk for piece in slices for chunk in piece.chunks.tolist()]
    make = partial(_batches, names=names, chunks=chunks, temperature=temperature, memory=memory)
    with progress(f"{len(chunks)} chunks of {slices[0].context} tokens, both models", len(chunks)) as advance:
        tables = computed(
            parts, len(chunks), batch_size, make(dense, target), lambda numbers: advance(len(numbers)), sharing(workers, make)
        )  # fmt: skip
    table = joined(tables)
    return DivergenceRows(table, notes_of(tables[0]))


def _batches(
    dense: LoadedModel,
    target: Changed,
    *,
    names: Sequence[str],
    chunks: Sequence[list[int]],
    temperature: float,
    memory: int,
) -> Compute:
    """Numbers of chunks -> their table, with the noise floor in the notes of the first."""
    both = _Pair(dense, target, temperature, memory)

    def rows(numbers: Sequence[int]) -> pa.Table:
        chosen = torch.tensor([chunks[i] for i in numbers])
        table, states = both.rows(chosen, [names[i] for i in numbers], numbers[0])
        return table if numbers[0] else with_notes(table, both.noise_floor(chosen, states))

    return rows


def scored(chunks: Tensor) -> list[Transcript]:
    """Chunks ``(batch, context)`` as texts whose steps are the scored positions."""
    first = chunks.shape[1] // 2
    return [Transcript(chunk[: first + 1], chunk[first + 1 :]) for chunk in chunks.tolist()]


def divergence_passes(
    slices: Sequence[Slice], batch_size: int
) -> tuple[list[list[Transcript]], list[list[Transcript]]]:
    """The batches of texts that `divergence_rows` lets both models read, and those that the dense one reads alone, for its noise floor."""
    texts = scored(torch.cat([piece.chunks for piece in slices]))
    both = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return both, [[text] for text in both[0][:_FLOOR_CHUNKS]]


@dataclass(frozen=True)
class _Pair:
    """Both models, and how their final states are compared."""

    dense: LoadedModel
    target: Changed
    temperature: float
    memory: int

    def rows(self, chunks: Tensor, names: Sequence[str], first: int) -> tuple[pa.Table, Tensor]:
        """Rows of a batch of chunks ``(batch, context)``, the first of which is number ``first``; and the dense states."""
        texts = scored(chunks)
        states = torch.cat(read_states(self.dense, texts))
        with switched(self.dense, self.target) as target:
            theirs, head = torch.cat(read_states(target, texts)), final_head(target)
        steps = len(texts[0].continuation)
        tokens = chunks[:, -steps:].flatten()

        def more(part: slice, z: Tensor, z_target: Tensor) -> dict[str, Tensor]:
            p, q = ((side / self.temperature).softmax(-1) for side in (z, z_target))
            return {"same_sampled": (p * q).sum(-1).double(), "same_sampled_dense": (p * p).sum(-1).double()}

        columns = compare_final(
            states,
            theirs,
            final_head(self.dense),
            head,
            temperature=self.temperature,
            next_token=tokens,
            next_token_target=tokens,
            also=more,
            tops=TOP,
            memory=self.memory,
        )
        columns["dp"] = _dp(columns)
        where = {
            "chunk": torch.arange(first, first + len(chunks)).repeat_interleave(steps),
            "position": torch.arange(chunks.shape[1] - 1 - steps, chunks.shape[1] - 1).repeat(len(chunks)),
            "token": tokens,
        }
        arrays = {"slice": pa.array(np.repeat(names, steps), pa.string())}
        arrays |= {name: pa.array(values.int().numpy()) for name, values in where.items()}
        arrays |= {name: pa.array(columns[name].double().numpy()) for name in COLUMNS}
        return pa.table(arrays | {name: pa.array(list(columns[name].numpy())) for name in _TOPS}), states

    def noise_floor(self, chunks: Tensor, states: Tensor) -> dict[str, Any]:
        """The dense model against itself: chunks read one at a time, and in a batch, whose final states are ``states``.

        Returns:
            ``floor``: per deviation column the largest absolute value; beside it how much was looked at.
        """
        alone = [read_states(self.dense, [text])[0] for text in scored(chunks[:_FLOOR_CHUNKS])]
        steps = len(alone[0])
        tokens = chunks[: len(alone), -steps:].flatten()
        head = final_head(self.dense)
        columns = compare_final(
            torch.cat(alone), states[: steps * len(alone)], head, head,
            temperature=self.temperature, next_token=tokens, next_token_target=tokens, memory=self.memory,
        )  # fmt: skip
        columns["dp"] = _dp(columns)
        return {
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "chunks": len(alone),
            "tokens": len(tokens),
            "way": f"read in a batch of {len(chunks)}, against one chunk at a time",
            "floor": {name: columns[name].abs().max().item() for name in _FLOOR},
        }


def _dp(columns: dict[str, Tensor]) -> Tensor:
    """Change of the probability of the token that follows, q - p."""
    return torch.exp(-columns["nll_target"]) - torch.exp(-columns["nll_dense"])
