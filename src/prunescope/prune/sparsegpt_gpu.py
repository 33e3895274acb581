"""SparseGPT on a GPU: the same choice and the same compensation, from the factor of H alone.

With H = R R^T, R upper triangular (the Cholesky factor of H reversed in both axes), what a matrix W loses, D = W - W', costs ||D R||^2. The
best that later columns can do for earlier ones is to bring their part of D R to zero, so in front of a block b of columns the weights stand
at ``W_b + (D_< R_<b) R_bb^-1``, and inside it the update is SparseGPT's with the inverse of the block on the diagonal. R is never inverted:
against the inverse's factor that is a third of n^3 operations less, one matrix less in memory, and no worse conditioned.

Per block: one product for its weights, four histograms and a count for the mask (unstructured), one kernel for all columns of all rows, one
product for the columns to come. Nothing waits for the host after the factorisation, so the whole sweep can be a graph (`repeated_shapes`).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunescope.prune.factor import factorise, split_product
from prunescope.prune.masks import Goal

__all__ = ["full_float32", "repeated_shapes", "sparsegpt_on_gpu", "supported"]

_WIDEST = 256  # columns of a block that a kernel holds
_SPAN = 1024  # columns after which those far ahead hear of what was lost
_SUB = 8  # columns in registers where a row is a thread
_FILLED = 16384  # rows, and so threads, from which that is faster for unstructured masks
_SCAN_ROWS, _SCAN_WARPS = 32, 4  # of a tile in the histograms


def supported(hessian: Tensor, goals: Sequence[Goal], block_size: int) -> bool:
    """Whether the kernels can run here: a GPU with Triton (or Triton's interpreter), float32, and blocks that fit a kernel."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fits = max(block_size, *(goal.of for goal in goals)) <= _WIDEST and math.lcm(*(g.of or 1 for g in goals)) <= _WIDEST
    somewhere = hessian.device.type == "cuda" or interpreted
    return somewhere and fits and hessian.dtype == torch.float32 and importlib.util.find_spec("triton") is not None


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the process allows elsewhere (TF32 keeps 10 bits)."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class _Loop:
    """How the column loop goes: `rows_kernel` with ``sub`` columns in registers, or `columns_kernel` where that is 0."""

    rows: int  # of a tile
    warps: int
    sub: int


def _loop(goal: Goal, rows: int) -> _Loop:
    """The faster loop for matrices of so many rows in all, pruned to one pattern; both give the same bits. A row a thread waits for nobody, and ranks
    groups of M columns in its registers; without groups to rank, few rows leave most of a GPU idle."""
    if goal.of > _SUB or (not goal.of and rows < _FILLED):
        return _Loop(rows=16, warps=4, sub=0)
    of = max(1, goal.of)
    return _Loop(rows=32, warps=1, sub=_SUB // of * of)


@dataclass
class _Part:
    """Matrices that are pruned to one pattern, by tiles of their rows."""

    goal: Goal
    loop: _Loop
    tiles: Tensor  # (tiles, 4) int32, see sparsegpt_kernels.py
    scan: Tensor  # the same for the histograms
    wanted: Tensor | None  # (blocks, matrices) int32, for an unstructured goal
    counts: Tensor | None  # (blocks, matrices, 4, 256) int32
    found: Tensor | None  # (3, tiles) int32


def sparsegpt_on_gpu(
    weights: Sequence[Tensor], hessian: Tensor, goals: Sequence[Goal], *, block_size: int = 128, damping: float = 0.01
) -> tuple[list[Tensor], float]:
    """As `sparsegpt`, which says what goes in and comes out. Needs `supported`."""
    lower, used = factorise(hessian, damping)
    group = math.lcm(*(goal.of or 1 for goal in goals))
    block_size = max(group, block_size - block_size % group)
    rows = tuple(len(weight) for weight in weights)
    key = (lower.device, lower.shape, lower.stride(), rows, tuple(goals), block_size)
    sweep = _kept.get(key) if _kept is not None else None
    if sweep is None:
        sweep = _Sweep(lower, rows, goals, block_size)
        if _kept is not None and sweep.fits():
            _kept[key] = sweep
    return sweep.prune(lower, hessian.diagonal() == 0, weights), used


_kept: dict[Any, _Sweep] | None = None


@contextmanager
def repeated_shapes() -> Iterator[None]:
    """Inside, the memory of a problem is kept for the next of the same shape, and from the second on a GPU replays the sweep over its columns as a
    graph: a dozen launches a block of columns take the host longer than the GPU, where a matrix is small. The numbers are the same bits."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


class _Sweep:
    """All columns of matrices that read the same input, from the first block to the last, in memory of its own."""

    def __init__(self, lower: Tensor, rows: Sequence[int], goals: Sequence[Goal], block_size: int) -> None:
        n, device = len(lower), lower.device
        block_size = min(block_size, n)
        self.lower = lower  # R[i, j] = lower[n - 1 - i, n - 1 - j]
        self.rows = list(rows)
        self.starts = range(0, n, block_size)
        self.span = max(1, _SPAN // block_size) * block_size
        width = max(16, 1 << (block_size - 1).bit_length())
        self.inverses, self.above = (torch.empty(len(self.starts), width, width, device=device) for _ in range(2))
        self.scale, self.weighting = (torch.empty(len(self.starts), width, device=device) for _ in range(2))
        self.stacked = torch.empty(n, sum(rows), device=device)
        self.carried = torch.empty_like(self.stacked)  # D R of the columns done
        self.lost = torch.empty(min(self.span, n), sum(rows), device=device)
        self.parts = _parts(rows, goals, n, self.starts, block_size, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.used = False

    def fits(self) -> bool:
        """Whether its memory may stay: a tenth of what is free at most."""
        if self.lower.device.type != "cuda":
            return True
        held = sum(whole.nbytes for whole in (self.lower, self.stacked, self.carried, self.lost))
        return held <= torch.cuda.mem_get_info(self.lower.device)[0] / 10

    def prune(self, lower: Tensor, dead: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The pruned matrices, float32; ``lower`` becomes the sweep's own."""
        if lower is not self.lower:
            self.lower.copy_(lower)
        self._blocks(dead)
        self.stacked.copy_(torch.cat([weight.float() for weight in weights]).T)
        with full_float32():
            if self.graph is None and self.used and lower.device.type == "cuda":
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._sweep()
            if self.graph is not None:
                self.graph.replay()
            else:
                self._sweep()
        self.used = True
        return [part.clone(memory_format=torch.contiguous_format) for part in self.stacked.T.split(self.rows)]

    def _blocks(self, dead: Tensor) -> None:
        """What the blocks on the diagonal say: their inverses, scales, and what a weight of a column counts."""
        n, size, width = len(self.lower), self.starts.step, self.above.shape[1]
        corners = torch.eye(width, device=dead.device).repeat(len(self.starts), 1, 1)
        whole = n // size  # those of full width, in one piece
        down, right = self.lower.stride()
        first = self.lower[n - whole * size :, n - whole * size :]
        tiles = first.as_strided((whole, size, size), (size * (down + right), down, right), first.storage_offset())
        corners[:whole, :size, :size] = tiles.flip(0, 1, 2)
        if n % size:
            corners[-1, : n % size, : n % size] = self.lower[: n % size, : n % size].flip(0, 1)
        unit = torch.eye(width, dtype=torch.float64, device=dead.device).expand_as(corners)
        self.inverses.copy_(torch.linalg.solve_triangular(corners.double(), unit, upper=True))
        self.above.copy_(self.inverses.triu(1))
        self.scale.copy_(corners.diagonal(dim1=1, dim2=2))
        places = torch.zeros(len(self.starts) * size, dtype=torch.bool, device=dead.device)
        places[:n] = dead
        self.weighting.copy_(self.scale.square())
        self.weighting[:, :size].masked_fill_(places.view(-1, size)[:, :width], 0.0)  # a dead input costs nothing

    def _sweep(self) -> None:
        n, lower, stacked, carried = len(self.lower), self.lower, self.stacked, self.carried
        carried.zero_()
        for part in self.parts:
            if part.counts is not None:
                part.counts.zero_()
        for b, start in enumerate(self.starts):
            here = slice(start, min(start + self.starts.step, n))
            first = start - start % self.span
            stop = min(first + self.span, n)
            count = here.stop - start
            values = torch.addmm(stacked[here], self.inverses[b, :count, :count].T, carried[here])
            dropped = self.lost[start - first : here.stop - first]
            for part in self.parts:
                _solve_block(part, b, values, stacked[here], dropped, self.above[b], self.scale[b], self.weighting[b])
            if here.stop < stop:  # R, rows here, the columns of the span that are to come
                ahead = lower[n - here.stop : n - start, n - stop : n - here.stop].flip(0, 1)
                carried[here.stop : stop].addmm_(ahead.T, dropped)
            elif stop < n:
                _carry(carried[stop:], lower[n - stop : n - first, : n - stop].flip(0, 1), self.lost[: stop - first])


def _carry(carried: Tensor, ahead: Tensor, lost: Tensor) -> None:
    """``carried += ahead^T lost``; on a GPU on its tensor cores, both sides as the sum of two bfloat16 numbers (16 bits), the product of the small
    parts left out. What that rounds moves weights that later columns choose freely; the objective does not feel it."""
    if carried.device.type != "cuda":
        carried.addmm_(ahead.T, lost)
        return
    left, right = split_product(ahead.T, lost.T, 2)
    torch.addmm(carried, left, right.T, out_dtype=torch.float32, out=carried)


def _parts(
    rows: Sequence[int], goals: Sequence[Goal], n: int, starts: Sequence[int], block_size: int, device: torch.device
) -> list[_Part]:
    """The matrices by what they shall lose; all unstructured ones together, each with its own counts."""
    firsts = torch.tensor([0, *rows]).cumsum(0).tolist()
    kinds: dict[tuple[int, int], list[int]] = {}
    for i, goal in enumerate(goals):
        kinds.setdefault((goal.keep, goal.of), []).append(i)
    stops = [min(start + block_size, n) for start in starts]
    parts = []
    for (_, of), members in kinds.items():
        spans = [(firsts[i], firsts[i + 1]) for i in members]
        loop = _loop(goals[members[0]], sum(high - low for low, high in spans))
        tiles, scan = (_tiles(spans, height).to(device) for height in (loop.rows, _SCAN_ROWS))
        wanted = counts = found = None
        if not of:
            so_far = torch.tensor(
                [[goals[i].count((high - low) * stop) for i, (low, high) in zip(members, spans, strict=True)] for stop in (0, *stops)]
            )  # fmt: skip
            wanted = so_far.diff(dim=0).to(device=device, dtype=torch.int32)
            counts = torch.zeros(len(starts), len(members), 4, 256, dtype=torch.int32, device=device)
            found = torch.empty(3, len(tiles), dtype=torch.int32, device=device)
        parts.append(_Part(goals[members[0]], loop, tiles, scan, wanted, counts, found))
    return parts


def _tiles(spans: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """The table of tiles of ``rows`` rows; see sparsegpt_kernels.py."""
    table: list[list[int]] = []
    for matrix, (low, high) in enumerate(spans):
        begin = len(table)
        table += [[matrix, first, min(first + rows, high), begin] for first in range(low, high, rows)]
    return torch.tensor(table, dtype=torch.int32)


def _solve_block(
    part: _Part, block: int, values: Tensor, weights: Tensor, dropped: Tensor, above: Tensor, scale: Tensor, weighting: Tensor
) -> None:  # fmt: skip
    """Choose and prune a block of columns ``(columns, rows)``: ``weights`` become the pruned ones, ``dropped`` what they lost,
    ``values`` scratch."""
    from prunescope.prune import sparsegpt_kernels as kernels

    count, rows = values.shape
    width, many, loop = len(above), len(part.tiles), part.loop
    if part.wanted is not None and part.counts is not None and part.found is not None:
        wanted, counts = part.wanted[block], part.counts[block]
        for step in range(4):
            kernels.histogram_kernel[(len(part.scan),)](
                values, weighting, part.scan, wanted, counts, rows, count,
                PASS=step, R=_SCAN_ROWS, C=width, BINS=256, num_warps=_SCAN_WARPS,
            )  # fmt: skip
        kernels.ties_kernel[(many,)](
            values, weighting, part.tiles, wanted, counts, part.found, rows, count, many,
            R=loop.rows, C=width, BINS=256, num_warps=loop.warps,
        )  # fmt: skip
        part.found[2].cumsum_(0)
    kernel, more = (kernels.rows_kernel, {"SUB": loop.sub}) if loop.sub else (kernels.columns_kernel, {})
    kernel[(many,)](
        values, weights, dropped, above, scale, weighting, part.tiles, part.found, rows, many,
        COUNT=count, KEEP=part.goal.keep, OF=part.goal.of, R=loop.rows, C=width, num_warps=loop.warps, **more,
    )  # fmt: skip
