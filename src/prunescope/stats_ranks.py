"""Rank correlations with ties: which number foretells which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["kendall", "ranked", "spearman"]


def ranked(values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their places."""
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return means


def spearman(x: Sequence[float] | NDArray[Any], y: Sequence[float] | NDArray[Any]) -> float | None:
    """Spearman's rho: Pearson's r of the ranks. None where one side does not vary or there are fewer than three pairs."""
    a, b = ranked(x), ranked(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if len(a) > 2 and scale else None


def kendall(x: Sequence[float] | NDArray[Any], y: Sequence[float] | NDArray[Any]) -> float | None:
    """Kendall's tau-b. None where one side does not vary or there are fewer than three pairs."""
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if len(a) > 2 and scale else None
