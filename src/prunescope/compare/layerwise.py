"""Same-context comparison: one sublayer at a time is the target's, everything else stays dense (the paper, section 5).

The dense model writes its continuation once. One forward pass over prompt + continuation then holds the residual stream
after every sublayer at every decoding step, so that dropping sublayer i in the same context compares two streams that are
both there: the stream after it and the stream before it. Against a target model one more pass is needed, in which every branch of
the target reads the dense stream of its place at all positions, so its attention sees the dense history through its own
key and value projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY, begin_compare, compare
from prunescope.compare.context import (
    TargetModel,
    Transcript,
    at_least_float32,
    check_comparable,
    check_memory,
    largest,
    last_place,
    mark_under_floor,
    pieces,
    run_key,
)
from prunescope.compare.head import Head, on_tensor_cores
from prunescope.compare.metrics import COLUMNS, FLOOR_COLUMNS
from prunescope.compare.streams import (
    Ahead,
    DenseRows,
    Streams,
    TargetRows,
    dense_streams,
    forward_stream,
    slot_pairs,
    streams_of,
)
from prunescope.compare.writing import written_texts
from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS
from prunescope.models.attending import any_length
from prunescope.models.generating import Sampling
from prunescope.models.loaded import LoadedModel
from prunescope.models.placing import plain_copy
from prunescope.models.residual import headless, watching
from prunescope.progress import progress
from prunescope.runs.parts import computed, joined, notes_of, resume_state, save_state, with_notes
from prunescope.runs.workers import Compute, Workers, sharing

__all__ = [
    "DenseRows",
    "LayerwiseRows",
    "Lens",
    "TargetRows",
    "batch_rows",
    "begin_batch",
    "floor_of",
    "floor_texts",
    "forward_stream",
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


def _columns(
    streams: Streams, sequences: Sequence[Transcript], head: Head, temperature: float, memory: int
) -> Callable[[], dict[str, Tensor]]:
    flat, pairs = streams.flat()
    following = torch.tensor([token for s in sequences for token in s.continuation])
    return begin_compare(
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
    return begin_batch(dense, target, batch, head, temperature, memory, first)()


def begin_batch(
    dense: LoadedModel,
    target: TargetModel,
    batch: Sequence[Transcript],
    head: Head,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    first: int = 0,
    forward: torch.cuda.Stream | None = None,
) -> Callable[[], pa.Table]:
    """`batch_rows` in two steps: all work is given to the device, and what is returned waits for the table.

    Args:
        forward: from `forward_stream`; the models run there, beside the columns of the batch before.
    """
    if forward is None:
        streams = streams_of(dense, target, batch)
    else:
        here = torch.cuda.current_stream(dense.device)
        with torch.cuda.stream(forward):
            streams = streams_of(dense, target, batch)
        here.wait_stream(forward)
        streams.rows.record_stream(here)
    columns = _columns(streams, batch, head, temperature, memory)
    layers = len(streams.pairs) // 2
    return lambda: _table(columns(), batch, first, layers)


def rows_table(
    rows: Tensor, pairs: Tensor, batch: Sequence[Transcript], head: Head, temperature: float, memory: int, first: int
) -> pa.Table:
    """The table of a batch from its rows ``(steps, slots, d)`` and the `slot_pairs`."""
    return _table(_columns(Streams(rows, pairs), batch, head, temperature, memory)(), batch, first, len(pairs) // 2)


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
    make = partial(
        _batches, sequences=sequences, batch_size=batch_size, lens=lens, temperature=temperature, memory=memory
    )
    steps = [len(s.continuation) for s in sequences]
    with progress(f"comparing {2 * len(dense.anatomy)} sublayers at {sum(steps)} steps", sum(steps)) as advance:
        tables = computed(
            parts, len(sequences), batch_size, make(dense, target), lambda batch: advance(sum(steps[i] for i in batch)),
            sharing(workers, make),
        )  # fmt: skip
    # parts of a run from disk have no floor
    floor = notes_of(tables[0]) or noise_floor(dense, sequences, head, temperature, memory, batch_size)
    return LayerwiseRows(mark_under_floor(joined(tables), floor["floor"]), sequences, floor, key)


def _batches(
    dense: LoadedModel, target: TargetModel, *, sequences: Sequence[Transcript], batch_size: int, lens: Lens, temperature: float, memory: int
) -> Compute:  # fmt: skip
    """Numbers of texts -> their table, with the noise floor in the notes of the first."""
    head = lens_head(dense, lens)
    forward = forward_stream(dense, target, batch_size * max(len(s.continuation) for s in sequences))

    def begin(batch: Sequence[int]) -> Callable[[], pa.Table]:
        texts = [sequences[i] for i in batch]
        if batch[0]:
            return begin_batch(dense, target, texts, head, temperature, memory, batch[0], forward)
        floor = noise_floor(dense, sequences, head, temperature, memory, batch_size)  # while nothing else needs memory
        wait = begin_batch(dense, target, texts, head, temperature, memory, 0, forward)
        return lambda: with_notes(wait(), floor)

    return Ahead(begin, forward is not None)


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
    alone = torch.cat([dense_streams(dense, [s], None).rows for s in looked_at])
    together = dense_streams(dense, few, None).rows
    cached = torch.cat([_cached_streams(dense, s) for s in looked_at])
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
    slots = 2 * layers + 1
    pairs = torch.tensor([(slot, way * slots + slot) for slot in range(1, slots) for way in (1, 2)])
    found = _columns(Streams(torch.cat([alone, together, cached], 1), pairs), looked_at, head, temperature, memory)()
    for way, name in enumerate(("batched_against_single", "cache_against_no_cache")):
        result[name] = largest({column: values[way::2] for column, values in found.items()})
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
    flat, own = Streams(rows, pairs).flat()
    found, exact = (compare(h, own, head, temperature=temperature, memory=2 * memory) for h in (flat, flat.double()))
    result: dict[str, Any] = {"pairs": len(own)}
    for column in FLOOR_COLUMNS:
        relative = ((found[column] - exact[column]).abs() / exact[column].abs()).nan_to_num(0, 0, 0)
        result[column] = {"median": relative.median().item(), "max": relative.max().item()}
    return result


@torch.no_grad()
@any_length()
def _cached_streams(dense: LoadedModel, sequence: Transcript) -> Tensor:
    """The same rows as `dense_streams` of one sequence, from a prefill and one cached forward per further token."""
    taken: list[DenseRows] = []
    cache = None
    with watching(dense, lambda passage: taken[-1].see(passage), stream_only=True), headless(dense):
        for ids in pieces(sequence):
            taken.append(DenseRows(last_place(dense.device), 2 * len(dense.anatomy) + 1))
            ids = ids.to(dense.device)
            cache = dense.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return torch.cat([step.rows for step in taken])
