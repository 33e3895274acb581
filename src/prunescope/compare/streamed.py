"""Same-context comparison of models that stay on disk: one block of each in memory at a time, all texts carried from block to block.

What `layerwise` computes, in another order. Each block of the dense model runs on all batches, then the target's block of the same layer on
each, fed with the dense streams; the rows at the steps go to files. The columns follow once every block has run, a batch at a time, from the
same rows in the same order as those of models in memory, so that they are the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY
from prunescope.compare.context import (
    Transcript,
    check_comparable,
    check_memory,
    last_place,
    mark_under_floor,
    padded,
    pieces,
    step_index,
)
from prunescope.compare.layerwise import (
    DenseRows,
    LayerwiseRows,
    Lens,
    TargetRows,
    floor_of,
    floor_texts,
    lens_head,
    rows_table,
    slot_pairs,
)
from prunescope.errors import UserError
from prunescope.files import replacing
from prunescope.models.blockwise import StreamedModel
from prunescope.models.dropping import DropSpec
from prunescope.models.keeping import Away, Conditions
from prunescope.models.residual import Passage, substituting, watching
from prunescope.models.streaming import Carried, Recorded, recording
from prunescope.progress import progress
from prunescope.runs.parts import computed, joined, save_state

__all__ = ["StreamedTarget", "rows_bytes", "streamed_layerwise_rows"]

StreamedTarget = StreamedModel | DropSpec | None
_AT_ONCE = 2**33  # bytes of rows that a GPU keeps until they are compared


def rows_bytes(dense: StreamedModel, target: StreamedTarget, sequences: Sequence[Transcript]) -> int:
    """What `streamed_layerwise_rows` keeps on disk while it runs."""
    slots = (4 if isinstance(target, StreamedModel) else 2) * len(dense.blocks) + 1
    steps = sum(len(s.continuation) for s in sequences)
    read = sum(len(s.read) for s in sequences)
    width: int = dense.loaded.anatomy.hidden_size * dense.model.dtype.itemsize
    return (steps * slots + 2 * read) * width


@torch.no_grad()
def streamed_layerwise_rows(
    dense: StreamedModel,
    target: StreamedTarget,
    sequences: Sequence[Transcript],
    key: str,
    folder: Path,
    *,
    batch_size: int = 8,
    lens: Lens = "raw",
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
) -> LayerwiseRows:
    """`layerwise_rows` of models on disk, bit for bit; the texts are given.

    Args:
        sequences: prompts with their continuations.
        key: of the run, from `layerwise_key`.
        folder: for rows, hidden states and finished batches, all ``part-*``; what is there of the same run is not computed again.
    Raises:
        UserError: models that cannot be compared, or whose blocks pass on more than the stream.
        FloatingPointError: a NaN or infinite value.
    """
    check_comparable(dense.loaded, target.loaded if isinstance(target, StreamedModel) else target)
    with dense.ending():
        lens_head(dense.loaded, lens)
        check_memory(memory, dense.loaded)
    save_state(folder, key, [s.continuation for s in sequences])
    batches = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    few, looked_at = floor_texts(sequences, batch_size)
    passes = [*batches, *([s] for s in looked_at), few]
    layers, blocks = len(dense.blocks), f"{len(dense.blocks)} blocks from disk, {sum(map(len, passes))} texts"
    theirs = target if isinstance(target, StreamedModel) else None
    rows = _Rows(dense, theirs, passes, looked_at, len(batches), folder)
    rows.forget_others()
    carried = Carried(
        dense, [padded(texts, torch.device("cpu")) for texts in passes], folder, stepped=[pieces(s) for s in looked_at]
    )
    carried.keep_after(rows.settle)
    rows.begin(carried.layer)
    with carried.at_work(), rows.watched(), progress(blocks, layers) as advance:
        advance(carried.layer)
        while carried.layer < layers:
            rows.layer = carried.layer
            with dense.block(rows.layer, mapped=True), rows.target_block(carried.conditions):
                carried.run(rows.before, rows.after)
            advance(1)
        carried.settle()
    steps = [len(s.continuation) for s in sequences]
    with dense.ending():
        head = lens_head(dense.loaded, lens)

        def table(batch: Sequence[int]) -> pa.Table:
            number = batch[0] // batch_size
            made = rows.made(number).to(dense.device)
            return rows_table(made, rows.pairs(target), passes[number], head, temperature, memory, batch[0])

        with progress(f"comparing {2 * layers} sublayers at {sum(steps)} steps", sum(steps)) as advance:
            tables = computed(
                folder, len(sequences), batch_size, table, lambda batch: advance(sum(steps[i] for i in batch))
            )
        first = len(batches)
        alone, cached = (
            torch.cat([rows.made(number) for number in numbers])[:, : 2 * layers + 1].to(dense.device)
            for numbers in (range(first, first + len(looked_at)), range(len(passes), len(passes) + len(looked_at)))
        )
        together = rows.made(first + len(looked_at))[:, : 2 * layers + 1].to(dense.device)
        floor = floor_of(alone, together, cached, looked_at, head, temperature, memory, dense.model.dtype)
    return LayerwiseRows(mark_under_floor(joined(tables), floor["floor"]), list(sequences), floor, key)


class _Rows:
    """The rows of every pass, those of the batches with room for the target's, then those of the noise floor: on a GPU and in a file a layer, or, where
    they are too many or there is none, in a file a pass."""

    def __init__(
        self,
        dense: StreamedModel,
        target: StreamedModel | None,
        passes: Sequence[Sequence[Transcript]],
        looked_at: Sequence[Transcript],
        batches: int,
        folder: Path,
    ) -> None:
        self.dense, self.target, self.passes, self.batches, self.folder = dense, target, passes, batches, folder
        self.layers, self.layer = len(dense.blocks), 0
        self.index = [step_index(texts, dense.device) for texts in passes]
        # (file, row) of the steps that come after the passes: the cached ones, a pass a step
        self.cached = [(len(passes) + i, t) for i, text in enumerate(looked_at) for t in range(len(text.continuation))]
        self.steps = [*(len(index[0]) for index in self.index), *(len(text.continuation) for text in looked_at)]
        self.calls = Recorded()
        self.taken: DenseRows | None = None
        self.watching, self.seen = ExitStack(), (-1, False)
        self.held: list[Tensor] | None = None
        self.away, self.writer = Away(), ThreadPoolExecutor(1, "prunescope-rows")
        self.writing: Future[None] | None = None
        if _at_once(self):
            self.held = [torch.empty(self.shape(i), dtype=dense.model.dtype, device=dense.device) for i in range(len(self.steps))]  # fmt: skip
        if target is not None:
            with recording(target, self.calls) as record:
                record(input_ids=target.probe_ids, use_cache=False)
                for texts in passes[:batches]:
                    record(input_ids=padded(texts, target.device), use_cache=False)

    def pairs(self, target: StreamedTarget) -> Tensor:
        return slot_pairs(target.loaded if isinstance(target, StreamedModel) else target, self.layers)

    def shape(self, number: int) -> tuple[int, int, int]:
        slots = 2 * self.layers + 1 + (2 * self.layers if self.target is not None and number < self.batches else 0)
        return self.steps[number], slots, self.dense.loaded.anatomy.hidden_size

    @property
    def nbytes(self) -> int:
        itemsize: int = self.dense.model.dtype.itemsize
        return sum(prod(self.shape(number)) for number in range(len(self.steps))) * itemsize

    def made(self, number: int) -> Tensor:
        """``(steps, slots, d)`` of a pass, where its rows are written first."""
        return self.read(number) if self.held is None else self.held[number]

    def places(self, layer: int) -> list[tuple[int, slice]]:
        """Where the rows of a layer are: the numbers of passes, and slots of each."""
        low, their_low = 2 * layer + 1, 2 * (self.layers + layer) + 1
        own = slice(low - (layer == 0), low + 2)  # with what enters block 0
        every = range(len(self.steps))
        with_target = [number for number in every if self.shape(number)[1] > 2 * self.layers + 1]
        return [(i, own) for i in every] + [(i, slice(their_low, their_low + 2)) for i in with_target]

    def _require(self, path: Path, count: int) -> None:
        """Rows that a run goes on from must be there."""
        if not path.is_file() or path.stat().st_size != count * self.dense.model.dtype.itemsize:
            raise UserError(f"{self.folder} holds states without the rows in front of them; give --overwrite")

    def pass_file(self, number: int) -> Path:
        return self.folder / f"part-rows-{number:05d}.bin"

    def layer_file(self, layer: int) -> Path:
        return self.folder / f"part-layer-{layer:05d}.bin"

    def keep(self) -> None:
        """Bring the rows of the layer from the device to a file, in one copy and behind the run's back."""
        if self.held is None:
            return
        self.settle()
        pieces = [self.held[number][:, slots].flatten() for number, slots in self.places(self.layer)]
        arrived = self.away.start(torch.cat(pieces))
        self.writing = self.writer.submit(self._write, self.layer, arrived)

    def _write(self, layer: int, arrived: Callable[[], Tensor]) -> None:
        whole = arrived().view(torch.uint8)
        with replacing(self.layer_file(layer)) as beside, beside.open("wb") as file:
            file.write(memoryview(whole.numpy()))  # type: ignore[arg-type]

    def begin(self, layer: int) -> None:
        """The blocks before ``layer`` have run, in this run or in one that was interrupted, whose rows the device gets back."""
        if self.held is None:
            if layer:
                for number in range(len(self.steps)):
                    self._require(self.pass_file(number), prod(self.shape(number)))
            return
        for done in range(layer):
            pieces = [self.held[number][:, slots] for number, slots in self.places(done)]
            sizes = [piece.numel() for piece in pieces]
            dtype = self.dense.model.dtype
            self._require(self.layer_file(done), sum(sizes))
            whole = torch.from_file(str(self.layer_file(done)), shared=False, size=sum(sizes), dtype=dtype)
            for piece, found in zip(pieces, whole.to(self.dense.device).split(sizes), strict=True):
                piece.copy_(found.view(piece.shape))

    def forget_others(self) -> None:
        """Let a run that was interrupted begin anew if it kept its rows in the other way, as on another device. To be called before its states are looked for."""
        others = "part-rows-*.bin" if self.held is not None else "part-layer-*.bin"
        if any(self.folder.glob(others)):
            for pattern in (
                "part-dense-*.bin",
                "part-rows-*.bin",
                "part-layer-*.bin",
            ):  # the states first: rows of none are not used
                for path in self.folder.glob(pattern):
                    path.unlink()

    def settle(self) -> None:
        """Wait until rows are in their files. Raises what writing raised."""
        if self.writing is not None:
            self.writing.result()

    def read(self, number: int) -> Tensor:
        """The rows of a pass, mapped: what is written to them is in their file."""
        shape = self.shape(number)
        size = prod(shape)
        path, dtype = self.pass_file(number), self.dense.model.dtype
        if not path.is_file() or path.stat().st_size < size * dtype.itemsize:
            with path.open("wb") as file:  # its space now: a write to a mapped file on a full disk kills the process
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Every block that runs a pass is seen; at the end nothing is being written."""
        with self.writer, self.watching:
            yield

    def watch(self, number: int) -> None:
        """See the block that runs pass ``number`` next: its branches only where a target needs them."""
        wanted = self.layer, self.target is None or number >= self.batches
        if wanted != self.seen:
            self.watching.close()
            self.seen = wanted
            self.watching.enter_context(watching(self.dense.loaded, self.see, stream_only=wanted[1], only=self.layer))

    def see(self, passage: Passage) -> None:
        assert self.taken is not None
        self.taken.see(passage)

    @contextmanager
    def target_block(self, conditions: Conditions) -> Iterator[None]:
        """The target's block of the layer, where it has one, with its weights and checked as the dense one is."""
        if self.target is None or self.layer not in self.target.loaded.layer_map:
            yield
            return
        block = self.target.loaded.layer_map.index(self.layer)
        with self.target.block(block, mapped=True):
            self.calls.check(self.target, block, conditions)
            yield

    def before(self, number: int) -> None:
        self.watch(number)
        slots = 2 * self.layers + 1
        if number >= len(self.passes):
            file, step = self.cached[number - len(self.passes)]
            self.taken = DenseRows(last_place(self.dense.device), slots, made=self.made(file)[step : step + 1])
        else:
            keep: dict[Any, Any] | None = {} if self.target is not None and number < self.batches else None
            self.taken = DenseRows(self.index[number], slots, keep, self.made(number))

    def after(self, number: int, hidden: Tensor) -> None:
        """The target's block, on what the dense one has just read; rows of the layer are kept before its states are, from which a run goes on."""
        assert self.taken is not None
        taken, self.taken = self.taken, None
        if self.target is not None and number < self.batches:
            self._target(number, taken, hidden, self.target)
        if number == len(self.passes) + len(self.cached) - 1:
            self.keep()

    def _target(self, number: int, taken: DenseRows, hidden: Tensor, target: StreamedModel) -> None:
        theirs = TargetRows(target.loaded, taken, self.layers, target.device)
        theirs.begin(self.layer)
        if self.layer in target.loaded.layer_map:
            block = target.loaded.layer_map.index(self.layer)
            with substituting(target.loaded, theirs.stream, theirs.see, block):
                self.calls.run(target, number + 1, block, hidden.to(target.model.dtype))


def _at_once(rows: _Rows) -> bool:
    """Whether rows stay on the device: each copy that is waited for costs a GPU more than it moves."""
    return rows.dense.device.type != "cpu" and rows.nbytes <= _AT_ONCE
