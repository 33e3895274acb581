"""The rows of a batch: the residual streams of the dense model at every step, and the target's stream after every sublayer.

Compared by `layerwise`, which says what the streams are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunescope.compare.context import TargetModel, Transcript, padded, step_index, switched
from prunescope.models.anatomy import KINDS, Kind
from prunescope.models.attending import any_length
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.placing import is_sharded
from prunescope.models.residual import Passage, headless, substituting, watching
from prunescope.models.variants import Variant

__all__ = [
    "Ahead",
    "DenseRows",
    "Kept",
    "Streams",
    "TargetRows",
    "dense_streams",
    "forward_stream",
    "slot_pairs",
    "streams_of",
]


@dataclass
class Streams:
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
@any_length()
def dense_streams(
    dense: LoadedModel, sequences: Sequence[Transcript], keep: dict[tuple[int, Kind], Kept] | None, spare: int = 0
) -> DenseRows:
    rows = DenseRows(step_index(sequences, dense.device), 2 * len(dense.anatomy) + 1 + spare, keep)
    with watching(dense, rows.see, stream_only=keep is None), headless(dense):
        dense.model(input_ids=padded(sequences, dense.device), use_cache=False, logits_to_keep=1)
    return rows


@torch.no_grad()
@any_length()
def streams_of(dense: LoadedModel, target: TargetModel, sequences: Sequence[Transcript]) -> Streams:
    layers = len(dense.anatomy)
    pairs = slot_pairs(target, layers)
    if target is None or isinstance(target, DropSpec):
        return Streams(dense_streams(dense, sequences, None).rows, pairs)
    taken = dense_streams(dense, sequences, {}, spare=2 * layers)
    with switched(dense, target) as model:
        theirs = TargetRows(model, taken, layers, model.device)
        for layer in range(layers):
            theirs.begin(layer)
        with substituting(model, theirs.stream, theirs.see), headless(model):
            model.model(input_ids=padded(sequences, model.device), use_cache=False, logits_to_keep=1)
    return Streams(taken.rows, pairs)


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


def forward_stream(dense: LoadedModel, target: TargetModel, steps: int) -> torch.cuda.Stream | None:
    """A stream for the forward passes of batches of ``steps`` steps, so that the host can launch one while the columns of the batch before are
    computed; None on a CPU and on several GPUs, where the memory is short of a second set of streams, and for a target that changes the dense
    model's weights."""
    if dense.device.type != "cuda" or isinstance(target, Variant) or is_sharded(dense.model):
        return None
    slots = (4 if isinstance(target, LoadedModel) else 2) * len(dense.anatomy) + 1
    needed = 4 * steps * slots * dense.anatomy.hidden_size * dense.dtype.itemsize
    free = torch.cuda.mem_get_info(dense.device)[0] + torch.cuda.memory_reserved(dense.device)
    if free - torch.cuda.memory_allocated(dense.device) < needed:
        return None
    forward = torch.cuda.Stream(dense.device, priority=-1)
    forward.wait_stream(torch.cuda.current_stream(dense.device))
    return forward


class Ahead:
    """Numbers of texts -> their table, with the next batch begun before this one is waited for, where there is a `forward_stream`.

    Args:
        begin: numbers of texts -> what waits for their table.
    """

    def __init__(self, begin: Callable[[Sequence[int]], Callable[[], Any]], ahead: bool) -> None:
        self.begin, self.ahead = begin, ahead
        self.following: Sequence[int] | None = None
        self.begun: dict[int, Callable[[], Any]] = {}

    def expect(self, batch: Sequence[int]) -> None:
        """Hear which batch is asked for after the next one."""
        self.following = batch

    def __call__(self, batch: Sequence[int]) -> Any:
        wait = self.begun.pop(batch[0], None) or self.begin(batch)
        following, self.following = self.following, None
        if self.ahead and following is not None and following[0] not in self.begun:
            self.begun[following[0]] = self.begin(following)
        return wait()
