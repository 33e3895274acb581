"""SparseGPT: prune column by column, and let the columns to come make up for it (Frantar and Alistarh, arXiv 2301.00774).

With H = X X^T + damping, the inverse's factor H^-1 = U^T U (U upper triangular) holds every row of the optimal brain surgeon's updates.
It takes one Cholesky factorisation of H with both axes reversed and one triangular solve. Modules that read the same input share it
and are solved as one matrix. Columns are worked through in sub-blocks, so that most of the update is a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunescope.prune import sparsegpt_gpu
from prunescope.prune.factor import inverse_factor
from prunescope.prune.masks import Goal, lowest, lowest_along_first

__all__ = ["sparsegpt"]

_SUB_BLOCK = 16


def sparsegpt(
    weights: Sequence[Tensor],
    hessian: Tensor,
    goals: Sequence[Goal],
    *,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[list[Tensor], float]:
    """Prune matrices that read the same input.

    Args:
        weights: each ``(out, in)``; left as they are.
        hessian: ``(in, in)`` float32, sum of x x^T over calibration tokens (its scale does not matter); left as it is.
        goals: one a matrix. Of an unstructured share, exactly floor(share x count) go, spread evenly over blocks of columns; the weights
            of N:M are chosen when their columns are reached.
        block_size: columns of a block; rounded down to a multiple of M.
        damping: see `inverse_factor`.
    Returns:
        The pruned matrices, float32, and the damping that was used.
    Raises:
        NotPositiveDefiniteError: see `inverse_factor`.
    """
    if hessian.device.type == "cuda" and sparsegpt_gpu.supported(hessian, goals, block_size):
        return sparsegpt_gpu.sparsegpt_on_gpu(weights, hessian, goals, block_size=block_size, damping=damping)
    reverse, used = inverse_factor(hessian, damping)
    n = len(reverse)

    def factor(rows: slice, columns: slice) -> Tensor:
        """A part of U."""
        return reverse[n - rows.stop : n - rows.start, n - columns.stop : n - columns.start].flip(0, 1)

    dead = hessian.diagonal() == 0
    stacked = torch.cat(
        [weight.float() for weight in weights]
    ).T.contiguous()  # (in, rows): a column's weights lie together
    ends = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
    segments = [(end - len(weight), end, goal) for end, weight, goal in zip(ends, weights, goals, strict=True)]
    group = math.lcm(*(goal.of or 1 for goal in goals))
    block_size = max(group, block_size - block_size % group)
    sub_block = min(block_size, max(group, _SUB_BLOCK - _SUB_BLOCK % group))
    for start in range(0, n, block_size):
        here = slice(start, min(start + block_size, n))
        errors = _solve_block(stacked[here], factor(here, here), dead[here], segments, start, sub_block)
        if here.stop < n:
            stacked[here.stop :].addmm_(factor(here, slice(here.stop, n)).T, errors, alpha=-1)
    return [part.contiguous() for part in stacked.T.split([len(weight) for weight in weights])], used


def _solve_block(
    columns: Tensor, factor: Tensor, dead: Tensor, segments: list[tuple[int, int, Goal]], start: int, sub_block: int
) -> Tensor:
    """Prune the columns of one block in place; gives the errors ``(columns, rows)`` that the later blocks shall make up for."""
    count = len(columns)
    diagonal = factor.diagonal()
    weighting = torch.where(dead, 0.0, 1 / diagonal).square()  # a dead input costs nothing
    gone = torch.zeros_like(columns)  # 1 where a weight goes
    for first, last, goal in segments:
        if not goal.of:
            scores = (columns[:, first:last].square() * weighting[:, None]).T
            before, after = (goal.count((last - first) * n) for n in (start, start + count))
            gone[:, first:last] = lowest(scores.contiguous(), after - before).T
    errors = torch.empty_like(columns)
    scale = (1 / diagonal)[:, None]
    gone_scaled = gone * scale
    for low in range(0, count, sub_block):
        high = min(low + sub_block, count)
        for i in range(low, high):
            for first, last, goal in segments:
                if goal.of and i % goal.of == 0:
                    here = slice(i, i + goal.of)
                    scores = columns[here, first:last].square() * weighting[here, None]
                    gone[here, first:last] = lowest_along_first(scores, goal.keep)
                    gone_scaled[here, first:last] = gone[here, first:last] * scale[here]
            torch.mul(columns[i], gone_scaled[i], out=errors[i])
            if i + 1 < high:
                columns[i + 1 : high].addr_(factor[i, i + 1 : high], errors[i], alpha=-1)
        if high < count:
            columns[high:].addmm_(factor[low:high, high:].T, errors[low:high], alpha=-1)
    columns.mul_(1 - gone)
    return errors
