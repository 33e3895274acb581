"""Same-context comparison: one sublayer at a time is the target's, everything else stays dense (the paper, section 5).

The dense model writes its continuation once. One forward pass over prompt + continuation then holds the residual stream
after every sublayer at every decoding step, so that dropping sublayer i in the same context compares two streams that are
both there: the stream after it and the stream before it. Against a target model one more pass is needed, in which every branch of
the target reads the dense stream of its place at all positions, so its attention sees the dense history through its own
key and value projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY, compare
from prunescope.compare.context import (
    TargetModel,
    Transcript,
    at_least_float32,
    check_comparable,
    check_memory,
    largest,
    last_place,
    mark_under_floor,
    padded,
    pieces,
    run_key,
    step_index,
    switched,
)
from prunescope.compare.head import Head, on_tensor_cores
from prunescope.compare.metrics import COLUMNS, FLOOR_COLUMNS
from prunescope.compare.writing import written_texts
from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS, Kind
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling
from prunescope.models.loaded import LoadedModel
from prunescope.models.placing import plain_copy
from prunescope.models.residual import Passage, substituting, watching
from prunescope.progress import progress
from prunescope.runs.parts import computed, resume_state, save_state
from prunescope.runs.workers import Compute, Workers, sharing

__all__ = [
    "DenseRows",
    "LayerwiseRows",
    "Lens",
    "TargetRows",
    "batch_rows",
    "floor_of",
    "floor_texts",
    "layerwise_key",
    "layerwise_rows",
    "lens_head",
    "noise_floor",
    "product_error",
    "rows_table",
    "slot_pairs",
]

Lens = Literal["raw", "final-norm"]
_FLOOR_PROMPTS, _FLOOR_STEPS = 2, 16
_PRODUCT_STEPS = 2  # of which the product is taken in float64 as well


def lens_head(dense: LoadedModel, lens: Lens) -> Head:
    """The dense model's head as the lens uses it. Raises UserError for `final-norm` on a model without one."""
    anatomy = dense.anatomy
    if lens == "final-norm" and anatomy.final_norm is None:
        raise UserError(f"{dense.ref} has no final norm; use --lens raw")
    return Head(
        dense.head_weight,
        getattr(anatomy.head, "bias", None),
        anatomy.logit_scale,
        anatomy.logit_softcap,
        plain_copy(anatomy.final_norm, dense.device, at_least_float32(dense.dtype)) if lens == "final-norm" else None,  # type: ignore[arg-type]
    )


# --- one batch ---------------------------------------------------------------------------------------------------------


@dataclass
class _Streams:
    """Residual streams of the dense model at every step of a batch, and the target's stream after every sublayer.

    ``rows`` is ``(steps of all prompts, slots, d)``: slot 0 enters block 0, slots 2 l + 1 and 2 l + 2 leave its attention and MLP. The
    target's follow after these.
    """

    rows: Tensor
    pairs: Tensor  # (2 * layers, 2) slots: dense, target; the same at every step

    def flat(self) -> tuple[Tensor, Tensor]:
        """``(steps * slots, d)`` rows, and ``(steps * pairs, 2)`` the pairs of every step as rows of it."""
        steps, slots, width = self.rows.shape
        return self.rows.reshape(steps * slots, width), (self.pairs + slots * torch.arange(steps)[:, None, None]).view(
            -1, 2
        )


def _slot(layer: int, kind: Kind) -> int:
    """Where the stream after a sublayer stands."""
    return 2 * layer + 1 + KINDS.index(kind)


class Kept(NamedTuple):
    """Of one dense sublayer: the stream before it at all positions, and what its branch adds at every step."""

    before: Tensor  # (batch, tokens, d)
    added: Tensor  # (steps, d)


@dataclass
class DenseRows:
    """Takes the rows of a batch while the dense model runs; of everything else that a block computes, nothing outlives it.

    ``rows`` is ``(steps, 2 layers + 1 + spare, d)``, made by the first passage unless it is given; the last ``spare`` slots are left to
    `TargetRows`, for which ``keep`` keeps what a target needs of every sublayer.
    """

    index: tuple[Tensor, Tensor]
    slots: int
    keep: dict[tuple[int, Kind], Kept] | None = None
    made: Tensor | None = None

    def see(self, passage: Passage) -> None:
        if self.made is None:
            self.made = passage.before.new_empty(len(self.index[0]), self.slots, passage.before.shape[-1])
        if _slot(passage.layer, passage.kind) == 1:
            self.made[:, 0] = passage.before[self.index]
        self.made[:, _slot(passage.layer, passage.kind)] = passage.after[self.index]
        if self.keep is not None:
            assert passage.added is not None  # the dense model has all its branches
            self.keep[passage.layer, passage.kind] = Kept(passage.before, passage.added[self.index])

    @property
    def rows(self) -> Tensor:
        assert self.made is not None
        return self.made


@dataclass
class TargetRows:
    """The target's streams into the spare slots of the dense rows, each of its branches fed with the dense stream of its place."""

    target: LoadedModel
    dense: DenseRows
    layers: int  # of the dense model
    device: torch.device

    def slot(self, layer: int, kind: Kind) -> int:
        return 2 * self.layers + _slot(layer, kind)

    def begin(self, layer: int) -> None:
        """A sublayer that the target lacks leaves the stream as it was before."""
        for kind in KINDS:
            self.dense.rows[:, self.slot(layer, kind)] = self.dense.rows[:, _slot(layer, kind) - 1]

    def stream(self, block: int, kind: Kind) -> Tensor:
        return self._kept(block, kind).before.to(self.device, self.target.dtype)

    def see(self, block: int, kind: Kind, added: Tensor) -> None:
        layer, rows = self.target.layer_map[block], self.dense.rows
        before, dense_added = self._kept(block, kind)
        branch = added.to(before.device, before.dtype).view_as(before)[self.dense.index]
        if self.target.anatomy.blocks[block].parallel and kind == "mlp":
            # a parallel block adds both branches in an order of its own: exchange this one in its sum, so that equals give equals
            after = rows[:, _slot(layer, kind)].to(branch.device) + (branch - dense_added)
        else:
            after = before[self.dense.index] + branch
        rows[:, self.slot(layer, kind)] = after

    def _kept(self, block: int, kind: Kind) -> Kept:
        assert self.dense.keep is not None
        return self.dense.keep[self.target.layer_map[block], kind]


@torch.no_grad()
def _dense_streams(
    dense: LoadedModel, sequences: Sequence[Transcript], keep: dict[tuple[int, Kind], Kept] | None, spare: int = 0
) -> DenseRows:
    rows = DenseRows(step_index(sequences, dense.device), 2 * len(dense.anatomy) + 1 + spare, keep)
    with watching(dense, rows.see):
        dense.model(input_ids=padded(sequences, dense.device), use_cache=False, logits_to_keep=1)
    return rows


@torch.no_grad()
def _streams(dense: LoadedModel, target: TargetModel, sequences: Sequence[Transcript]) -> _Streams:
    layers = len(dense.anatomy)
    pairs = slot_pairs(target, layers)
    if target is None or isinstance(target, DropSpec):
        return _Streams(_dense_streams(dense, sequences, None).rows, pairs)
    taken = _dense_streams(dense, sequences, {}, spare=2 * layers)
    with switched(dense, target) as model:
        theirs = TargetRows(model, taken, layers, model.device)
        for layer in range(layers):
            theirs.begin(layer)
        with substituting(model, theirs.stream, theirs.see):
            model.model(input_ids=padded(sequences, model.device), use_cache=False, logits_to_keep=1)
    return _Streams(taken.rows, pairs)


def slot_pairs(target: TargetModel, layers: int) -> Tensor:
    """``(2 * layers, 2)`` slots of the rows of a step: the dense stream after every sublayer, and the target's."""
    places = [(layer, kind) for layer in range(layers) for kind in KINDS]
    if target is None or isinstance(target, DropSpec):
        # a drop leaves the stream as it was before; a sublayer that is not dropped leaves the dense stream
        found = [
            (_slot(layer, kind), _slot(layer, kind) - (target is None or (kind, layer) in target))
            for layer, kind in places
        ]
    else:
        found = [(_slot(*place), 2 * layers + _slot(*place)) for place in places]
    return torch.tensor(found)


def _columns(
    streams: _Streams, sequences: Sequence[Transcript], head: Head, temperature: float, memory: int
) -> dict[str, Tensor]:
    flat, pairs = streams.flat()
    following = torch.tensor([token for s in sequences for token in s.continuation])
    return compare(
        flat,
        pairs,
        head,
        temperature=temperature,
        next_token=following.repeat_interleave(len(streams.pairs)),
        memory=memory,
    )


def _table(columns: dict[str, Tensor], sequences: Sequence[Transcript], first_prompt: int, layers: int) -> pa.Table:
    steps = [(first_prompt + i, t, position) for i, s in enumerate(sequences) for t, position in enumerate(s.positions)]
    keys = torch.tensor(steps, dtype=torch.int32).repeat_interleave(2 * layers, 0)
    layer = torch.arange(layers, dtype=torch.int32).repeat_interleave(2).repeat(len(steps))
    table = {"prompt": keys[:, 0], "step": keys[:, 1], "position": keys[:, 2], "layer": layer}
    arrays = {name: pa.array(values.numpy()) for name, values in table.items()}
    arrays["sublayer"] = pa.array(list(KINDS) * (layers * len(steps)), pa.string())
    arrays |= {name: pa.array(columns[name].numpy()) for name in COLUMNS}
    return pa.table(arrays)


def batch_rows(
    dense: LoadedModel,
    target: TargetModel,
    batch: Sequence[Transcript],
    head: Head,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    first: int = 0,
) -> pa.Table:
    """The rows of a batch of transcripts, the first of which is prompt number ``first``; a row per prompt, step and sublayer."""
    streams = _streams(dense, target, batch)
    return rows_table(streams.rows, streams.pairs, batch, head, temperature, memory, first)


def rows_table(
    rows: Tensor, pairs: Tensor, batch: Sequence[Transcript], head: Head, temperature: float, memory: int, first: int
) -> pa.Table:
    """The table of a batch from its rows ``(steps, slots, d)`` and the `slot_pairs`."""
    return _table(_columns(_Streams(rows, pairs), batch, head, temperature, memory), batch, first, len(pairs) // 2)


# --- the whole run -----------------------------------------------------------------------------------------------------


@dataclass
class LayerwiseRows:
    """What `layerwise_rows` found."""

    table: pa.Table
    sequences: list[Transcript]
    floor: dict[str, Any] = field(repr=False)
    key: str


def layerwise_key(
    dense: LoadedModel, target: TargetModel, prompts: Sequence[list[int]], texts: list[list[int]] | None, *settings: Any
) -> str:
    """A hash of everything that decides the rows of a run."""
    return run_key(dense, target, prompts, *settings, *([] if texts is None else [texts]))


def layerwise_rows(
    dense: LoadedModel,
    target: TargetModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: bool = True,
    batch_size: int = 8,
    lens: Lens = "raw",
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    parts: Path | None = None,
    texts: list[list[int]] | None = None,
    workers: Workers | None = None,
) -> LayerwiseRows:
    """Compare every sublayer at every step in the same context.

    Args:
        dense: the dense model, nothing dropped.
        target: a loaded model; the dense model changed (a `DropSpec` or a `Variant`); or None, every sublayer dropped in turn (paper Fig. 4).
        prompts: token ids, from `encode`.
        max_new_tokens: steps at most; a text ends earlier at an end-of-text token if ``stop``.
        batch_size: prompts at a time; changes nothing but speed and memory (the noise floor says by how much).
        temperature: metric temperature T.
        memory: bytes for the metrics, see `compare`.
        parts: folder for finished batches; those that are there already, from the same settings, are not computed again.
        texts: continuations of the prompts, token ids; None where the dense model is to write them.
        workers: who share the batches, each with both models of its own; None computes all here.
    Raises:
        UserError: models that cannot be compared.
        FloatingPointError: a NaN or infinite logit.
    """
    check_comparable(dense, target)
    head = lens_head(dense, lens)
    check_memory(memory, dense)
    settings = (max_new_tokens, sampling, stop, batch_size, lens, temperature)
    key = layerwise_key(dense, target, prompts, texts, *settings)
    found = resume_state(parts, key) or texts
    if found is None:
        found = written_texts(dense, prompts, max_new_tokens, sampling, stop, batch_size, workers)
    save_state(parts, key, found)
    sequences = [Transcript(list(p), t) for p, t in zip(prompts, found, strict=True)]
    make = partial(_batches, sequences=sequences, lens=lens, temperature=temperature, memory=memory)
    steps = [len(s.continuation) for s in sequences]
    with progress(f"comparing {2 * len(dense.anatomy)} sublayers at {sum(steps)} steps", sum(steps)) as advance:
        tables = computed(
            parts, len(sequences), batch_size, make(dense, target), lambda batch: advance(sum(steps[i] for i in batch)),
            sharing(workers, make),
        )  # fmt: skip
    floor = noise_floor(dense, sequences, head, temperature, memory, batch_size)
    return LayerwiseRows(mark_under_floor(pa.concat_tables(tables), floor["floor"]), sequences, floor, key)


def _batches(
    dense: LoadedModel, target: TargetModel, *, sequences: Sequence[Transcript], lens: Lens, temperature: float, memory: int
) -> Compute:  # fmt: skip
    """Numbers of texts -> their table."""
    head = lens_head(dense, lens)
    return lambda batch: batch_rows(dense, target, [sequences[i] for i in batch], head, temperature, memory, batch[0])


# --- noise floor -------------------------------------------------------------------------------------------------------


def noise_floor(
    dense: LoadedModel,
    sequences: Sequence[Transcript],
    head: Head,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    batch_size: int = 8,
) -> dict[str, Any]:
    """The dense model against itself, computed in other ways: in a padded batch instead of alone, and token by token with a cache.

    Rounding differs between these, and nothing else: a deviation that is not larger than this says nothing about a target.

    Returns:
        ``floor``: per deviation column the largest absolute value over both ways, all sublayers and steps; beside it the two
        ways apart, and how much was looked at.
    """
    few, looked_at = floor_texts(sequences, batch_size)
    with progress("measuring the noise floor", 3) as advance:
        alone = torch.cat([_dense_streams(dense, [s], None).rows for s in looked_at])
        advance(1)
        together = _dense_streams(dense, few, None).rows
        advance(1)
        cached = torch.cat([_cached_streams(dense, s) for s in looked_at])
        advance(1)
    return floor_of(alone, together, cached, looked_at, head, temperature, memory, dense.dtype)


def floor_texts(sequences: Sequence[Transcript], batch_size: int) -> tuple[list[Transcript], list[Transcript]]:
    """The short texts that the floor reads in one batch, and those of them that it also reads alone and with a cache."""
    few = [Transcript(s.prompt, s.continuation[:_FLOOR_STEPS]) for s in sequences[: max(2, batch_size)]]
    few = few * 2 if len(few) == 1 else few
    return few, few[:_FLOOR_PROMPTS]


def floor_of(
    alone: Tensor, together: Tensor, cached: Tensor, looked_at: Sequence[Transcript], head: Head, temperature: float, memory: int,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """The floor, see `noise_floor`, from the dense rows ``(steps, 2 layers + 1, d)`` of each way; ``together`` may go on."""
    together = together[: len(alone)]
    layers = alone.shape[1] // 2
    result: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": len(looked_at),
        "steps": len(alone),
    }
    for name, other in (("batched_against_single", together), ("cache_against_no_cache", cached)):
        pairs = torch.tensor([(slot, 2 * layers + 1 + slot) for slot in range(1, 2 * layers + 1)])
        columns = _columns(_Streams(torch.cat([alone, other], 1), pairs), looked_at, head, temperature, memory)
        result[name] = largest(columns)
    if on_tensor_cores(alone, head.weight):
        pairs = torch.tensor([(slot, slot - 1) for slot in range(1, 2 * layers + 1)])
        result["product_error"] = product_error(alone[:_PRODUCT_STEPS], pairs, head, temperature, memory)
    result["floor"] = {
        column: max(result[name][column] for name in ("batched_against_single", "cache_against_no_cache"))
        for column in FLOOR_COLUMNS
    }
    return result


def product_error(
    rows: Tensor, pairs: Tensor, head: Head, temperature: float = 1.0, memory: int = DEFAULT_MEMORY
) -> dict[str, Any]:
    """What the columns owe to the float32 sums of the product W h: the same pairs from a float64 product, per column.

    Args:
        rows: ``(steps, slots, d)``; pairs ``(m, 2)`` slots.
    Returns:
        Per column the median and the largest relative difference over the pairs.
    """
    flat, own = _Streams(rows, pairs).flat()
    found, exact = (compare(h, own, head, temperature=temperature, memory=2 * memory) for h in (flat, flat.double()))
    result: dict[str, Any] = {"pairs": len(own)}
    for column in FLOOR_COLUMNS:
        relative = ((found[column] - exact[column]).abs() / exact[column].abs()).nan_to_num(0, 0, 0)
        result[column] = {"median": relative.median().item(), "max": relative.max().item()}
    return result


@torch.no_grad()
def _cached_streams(dense: LoadedModel, sequence: Transcript) -> Tensor:
    """The same rows as `_dense_streams` of one sequence, from a prefill and one cached forward per further token."""
    taken: list[DenseRows] = []
    cache = None
    with watching(dense, lambda passage: taken[-1].see(passage)):
        for ids in pieces(sequence):
            taken.append(DenseRows(last_place(dense.device), 2 * len(dense.anatomy) + 1))
            ids = ids.to(dense.device)
            cache = dense.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return torch.cat([step.rows for step in taken])
