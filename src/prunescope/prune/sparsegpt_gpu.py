"""SparseGPT on a GPU: the same choice and the same compensation, from the factor of H alone.

With H = R R^T, R upper triangular (the Cholesky factor of H reversed in both axes), what a matrix W loses, D = W - W', costs ||D R||^2. The
best that later columns can do for earlier ones is to bring their part of D R to zero, so in front of a block b of columns the weights stand
at ``W_b + (D_< R_<b) R_bb^-1``, and inside it the update is SparseGPT's with the inverse of the block on the diagonal. R is never inverted:
against the inverse's factor that is a third of n^3 operations less, one matrix less in memory, and no worse conditioned.

Per block: one product for its weights, four histograms and a count for the mask (unstructured), one kernel for all columns of all rows, one
product for the columns to come. Nothing waits for the host after the factorisation.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prunescope.prune.factor import factorise, split_product
from prunescope.prune.masks import Goal

__all__ = ["full_float32", "sparsegpt_on_gpu", "supported"]

_WIDEST = 256  # columns of a block that a kernel holds
_SPAN = 1024  # columns after which those far ahead hear of what was lost
_LOOP_ROWS, _LOOP_WARPS = 16, 4  # of a tile in the column loop
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


@dataclass
class _Part:
    """Matrices that are pruned to one pattern, by tiles of their rows."""

    goal: Goal
    loop: Tensor  # (tiles, 4) int32, see sparsegpt_kernels.py
    scan: Tensor
    wanted: Tensor | None  # (blocks, matrices) int32, for an unstructured goal
    counts: Tensor | None  # (blocks, matrices, 4, 256) int32
    found: Tensor | None  # (3, tiles) int32


def sparsegpt_on_gpu(
    weights: Sequence[Tensor], hessian: Tensor, goals: Sequence[Goal], *, block_size: int = 128, damping: float = 0.01
) -> tuple[list[Tensor], float]:
    """As `sparsegpt`, which says what goes in and comes out. Needs `supported`."""
    lower, used = factorise(hessian, damping)  # R[i, j] = lower[n - 1 - i, n - 1 - j]
    n = len(lower)
    group = math.lcm(*(goal.of or 1 for goal in goals))
    block_size = max(group, block_size - block_size % group)
    starts = range(0, n, block_size)
    width = max(16, 1 << (min(block_size, n) - 1).bit_length())
    corners = torch.eye(width, dtype=torch.float32, device=lower.device).repeat(len(starts), 1, 1)
    for corner, start in zip(corners, starts, strict=True):
        stop = min(start + block_size, n)
        corner[: stop - start, : stop - start] = lower[n - stop : n - start, n - stop : n - start].flip(0, 1)
    unit = torch.eye(width, dtype=torch.float64, device=lower.device).expand_as(corners)
    inverses = torch.linalg.solve_triangular(corners.double(), unit, upper=True).float()
    scale = corners.diagonal(dim1=1, dim2=2).contiguous()
    dead = torch.zeros(len(starts) * block_size, dtype=torch.bool, device=lower.device)
    dead[:n] = hessian.diagonal() == 0
    weighting = scale.square()
    weighting[:, :block_size][dead.view(len(starts), block_size)[:, :width]] = 0.0  # a dead input costs nothing
    above = inverses.triu(1).contiguous()
    with full_float32():
        stacked = torch.cat([weight.float() for weight in weights]).T.contiguous()  # (in, rows)
        carried = torch.zeros_like(stacked)  # D R of the columns done
        parts = _parts(weights, goals, n, starts, block_size)
        span = max(1, _SPAN // block_size) * block_size
        lost = torch.empty(min(span, n), stacked.shape[1], dtype=torch.float32, device=lower.device)
        for b, start in enumerate(starts):
            here = slice(start, min(start + block_size, n))
            first = start - start % span
            stop = min(first + span, n)
            count = here.stop - start
            values = torch.addmm(stacked[here], inverses[b, :count, :count].T, carried[here])
            dropped = lost[start - first : here.stop - first]
            for part in parts:
                _solve_block(part, b, values, stacked[here], dropped, above[b], scale[b], weighting[b])
            if here.stop < stop:  # R, rows here, the columns of the span that are to come
                ahead = lower[n - here.stop : n - start, n - stop : n - here.stop].flip(0, 1)
                carried[here.stop : stop].addmm_(ahead.T, dropped)
            elif stop < n:
                _carry(carried[stop:], lower[n - stop : n - first, : n - stop].flip(0, 1), lost[: stop - first])
    return [part.contiguous() for part in stacked.T.split([len(weight) for weight in weights])], used


def _carry(carried: Tensor, ahead: Tensor, lost: Tensor) -> None:
    """``carried += ahead^T lost``; on a GPU on its tensor cores, both sides as the sum of two bfloat16 numbers (16 bits), the product of the small
    parts left out. What that rounds moves weights that later columns choose freely; the objective does not feel it."""
    if carried.device.type != "cuda":
        carried.addmm_(ahead.T, lost)
        return
    left, right = split_product(ahead.T, lost.T, 2)
    torch.addmm(carried, left, right.T, out_dtype=torch.float32, out=carried)


def _parts(
    weights: Sequence[Tensor], goals: Sequence[Goal], n: int, starts: Sequence[int], block_size: int
) -> list[_Part]:
    """The matrices by what they shall lose; all unstructured ones together, each with its own counts."""
    device = weights[0].device
    firsts = torch.tensor([0, *(len(weight) for weight in weights)]).cumsum(0).tolist()
    kinds: dict[tuple[int, int], list[int]] = {}
    for i, goal in enumerate(goals):
        kinds.setdefault((goal.keep, goal.of), []).append(i)
    stops = [min(start + block_size, n) for start in starts]
    parts = []
    for (_, of), members in kinds.items():
        spans = [(firsts[i], firsts[i + 1]) for i in members]
        loop, scan = (_tiles(spans, rows).to(device) for rows in (_LOOP_ROWS, _SCAN_ROWS))
        wanted = counts = found = None
        if not of:
            so_far = torch.tensor(
                [[goals[i].count((high - low) * stop) for i, (low, high) in zip(members, spans, strict=True)] for stop in (0, *stops)]
            )  # fmt: skip
            wanted = so_far.diff(dim=0).to(device=device, dtype=torch.int32)
            counts = torch.zeros(len(starts), len(members), 4, 256, dtype=torch.int32, device=device)
            found = torch.empty(3, len(loop), dtype=torch.int32, device=device)
        parts.append(_Part(goals[members[0]], loop, scan, wanted, counts, found))
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
    """Choose and prune a block of columns ``(columns, rows)``: ``weights`` become the pruned ones, ``dropped`` what they lost."""
    from prunescope.prune import sparsegpt_kernels as kernels

    count, rows = values.shape
    width = len(above)
    if part.wanted is not None and part.counts is not None and part.found is not None:
        wanted, counts = part.wanted[block], part.counts[block]
        for step in range(4):
            kernels.histogram_kernel[(len(part.scan),)](
                values, weighting, part.scan, wanted, counts, rows, count,
                PASS=step, R=_SCAN_ROWS, C=width, BINS=256, num_warps=_SCAN_WARPS,
            )  # fmt: skip
        kernels.ties_kernel[(len(part.loop),)](
            values, weighting, part.loop, wanted, counts, part.found, rows, count, len(part.loop),
            R=_LOOP_ROWS, C=width, BINS=256, num_warps=_LOOP_WARPS,
        )  # fmt: skip
        part.found[2].cumsum_(0)
    kernels.columns_kernel[(len(part.loop),)](
        values, weights, dropped, above, scale, weighting, part.loop, part.found, rows, len(part.loop),
        COUNT=count, KEEP=part.goal.keep, OF=part.goal.of, R=_LOOP_ROWS, C=width, num_warps=_LOOP_WARPS,
    )  # fmt: skip
