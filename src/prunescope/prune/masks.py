"""Which weights go: patterns, and exact selection of the lowest scores.

Selection finds the k-th lowest score instead of sorting all of them. Exactly the asked number is taken; ties go to the lower index.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunescope.errors import UserError

__all__ = ["Goal", "lowest", "lowest_along_first", "lowest_per_group", "lowest_per_row"]

_FEW_ROWS, _LONG_ROW = 64, 2**18
_PAIRWISE = 8  # groups up to this size are ranked by comparing pairs


@dataclass(frozen=True)
class Goal:
    """What a matrix shall lose: a share of its weights (`unstructured`), or all but ``keep`` of every ``of`` consecutive inputs."""

    sparsity: float
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, value: float | int | str) -> Goal:
        """Read ``0.5`` or ``2:4``. Raises UserError."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
        if match:
            keep, of = int(match[1]), int(match[2])
            if not 0 < keep < of:
                raise UserError(f"pattern {value}: N of M weights are kept, so 0 < N < M; write for example 2:4")
            return cls(1 - keep / of, keep, of)
        try:
            sparsity = float(value)
        except (TypeError, ValueError):
            sparsity = math.nan
        if isinstance(value, bool) or not 0 <= sparsity < 1:
            raise UserError(f"sparsity {value}: give a share from 0 up to, not including, 1, or a pattern such as 2:4")
        return cls(sparsity)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.sparsity:g}"

    def count(self, weights: int) -> int:
        """How many of ``weights`` go: floor(sparsity x weights), exactly."""
        if self.of:
            return weights // self.of * (self.of - self.keep)
        return _floor_share(self.sparsity, weights)


def _floor_share(share: float, count: int) -> int:
    """floor(share x count) for the decimal number that the user wrote: 0.7 of 10 is 7, though the float 0.7 is a little less."""
    from fractions import Fraction

    return math.floor(Fraction(repr(float(share))) * count)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` lowest of ``scores`` (any shape, finite), counted over the whole tensor in row-major order."""
    return lowest_per_row(scores.reshape(1, -1), count).view(scores.shape)


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """Mask ``(rows, n)`` bool of the ``count`` lowest scores of each row."""
    rows, n = scores.shape
    if count == 0 or count == n or rows == 0:
        return torch.full((rows, n), count > 0, device=scores.device)
    if scores.device.type == "cpu":
        values = scores.detach().to(torch.float32 if scores.dtype != torch.float64 else torch.float64).numpy()
        kth = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
        mask = torch.from_numpy(values <= kth)
        taken = torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
        bar = torch.from_numpy(kth)
    else:
        bar = _kth_on_gpu(scores, count)
        mask = scores <= bar
        taken = mask.sum(1)
    for row in (taken != count).nonzero().flatten().tolist():  # ties at the threshold: the higher indices stay
        tied = (scores[row] == bar[row]).nonzero().flatten()
        mask[row, tied[len(tied) - (int(taken[row]) - count) :]] = False
    return mask


def _kth_on_gpu(scores: Tensor, count: int) -> Tensor:
    """``(rows, 1)``: the ``count``-th lowest of each row.

    PyTorch's kthvalue works on a row with one multiprocessor; of a few long rows, only the scores that share their leading bits with the
    answer are left to it.
    """
    rows, n = scores.shape
    if rows > _FEW_ROWS or n < _LONG_ROW or scores.dtype != torch.float32:
        return torch.kthvalue(scores, count, dim=1, keepdim=True).values
    found = []
    for row in scores:
        bits = (row + 0.0).view(torch.int32)  # no negative zeros
        digits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 20  # the order of floats, in 12 bits
        below = torch.bincount(digits + 2048, minlength=4096).cumsum(0)
        place = int(torch.searchsorted(below, count))
        left = count - (int(below[place - 1]) if place else 0)
        found.append(torch.kthvalue(row[digits == place - 2048], left).values)
    return torch.stack(found)[:, None]


def lowest_per_group(scores: Tensor, keep: int, of: int) -> Tensor:
    """Mask ``(rows, n)`` bool of all but the ``keep`` highest of every ``of`` consecutive scores of a row; ``of`` divides n."""
    rows, n = scores.shape
    if of > _PAIRWISE:
        return lowest_per_row(scores.reshape(-1, of), of - keep).view(rows, n)
    return lowest_along_first(scores.reshape(rows, n // of, of).movedim(-1, 0), keep).movedim(0, -1).reshape(rows, n)


def lowest_along_first(scores: Tensor, keep: int) -> Tensor:
    """Mask of all but the ``keep`` highest along the first axis: each score's rank is counted by comparing pairs."""
    of = len(scores)
    if of > _PAIRWISE:
        rest = scores.shape[1:]
        return lowest_per_row(scores.reshape(of, -1).T.contiguous(), of - keep).T.reshape(of, *rest)
    if scores.device.type == "cpu":
        return torch.from_numpy(_ranks_numpy(np.ascontiguousarray(scores.numpy())) < of - keep)
    ranks = torch.zeros_like(scores, dtype=torch.int8)
    for i in range(1, of):
        below = scores[:i] <= scores[i]
        ranks[i] += below.sum(0, dtype=torch.int8)
        ranks[:i] += ~below
    return ranks < of - keep


def _ranks_numpy(values: np.ndarray) -> np.ndarray:
    """Rank of each value along the first axis; on a tie the lower index counts as lower."""
    of = len(values)
    ranks = np.empty(values.shape, np.int8)
    ranks[:] = np.arange(of - 1, -1, -1, dtype=np.int8).reshape(
        -1, *(1,) * (values.ndim - 1)
    )  # as if all later were lower
    for i in range(1, of):
        below = (values[:i] <= values[i]).view(np.int8)
        ranks[i] += np.add.reduce(below, 0, dtype=np.int8)
        ranks[:i] -= below
    return ranks
