"""Intervals, paired tests and rank correlations. No torch; scipy is imported where it is used, since its import takes longer than most reports."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "RESAMPLES",
    "Z95",
    "kendall",
    "mcnemar",
    "newcombe",
    "normal_interval",
    "paired",
    "pareto_front",
    "spearman",
    "wilson",
    "worst_windows",
]

RESAMPLES = 2000
Z95 = NormalDist().inv_cdf(0.975)  # standard errors on each side of a normal 95 % interval


def normal_interval(mean: float, stderr: float) -> list[float]:
    """95 % interval of a mean that is normally distributed around the true one."""
    return [mean - Z95 * stderr, mean + Z95 * stderr]


def wilson(successes: int, trials: int, level: float = 0.95) -> list[float] | None:
    """Wilson's score interval of a proportion, None without trials. At none and at all of the trials the bound is exactly 0 and 1."""
    if not trials:
        return None
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return [float(found.low), float(found.high)]


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: the two-sided binomial probability that ``lost`` and ``won`` flips differ this much by chance alone."""
    if not lost + won:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue)


def newcombe(both: int, lost: int, won: int, neither: int, level: float = 0.95) -> list[float] | None:
    """Interval of the difference of two paired proportions, second minus first, None without items.

    Newcombe's method 10 (Statistics in Medicine 17, 1998, 2635-2650): the Wilson intervals of both proportions, squared and added, with
    the correlation of the pairs; its numerator is corrected for continuity where it is positive. By hand: scipy has no interval of
    paired proportions.

    Args:
        both: items that both have right.
        lost: right in the first, wrong in the second.
        won: wrong in the first, right in the second.
        neither: right in none.
    """
    trials = both + lost + won + neither
    first, second = wilson(both + lost, trials, level), wilson(both + won, trials, level)
    if first is None or second is None:
        return None
    p, q = (both + lost) / trials, (both + won) / trials
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    numerator = float(both * neither - lost * won)
    numerator = max(numerator - trials / 2, 0.0) if numerator > 0 else numerator
    phi = numerator / sqrt(product) if product else 0.0
    down = (q - second[0], first[1] - p)  # how far the difference may lie below
    up = (second[1] - q, p - first[0])
    low, high = (sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)) for a, b in (down, up))
    return [q - p - low, q - p + high]


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Difference of two means over the same items, second minus first.

    Where every item is right (1) or wrong (0): flips, McNemar's exact test and Newcombe's paired interval (``newcombe``). Else a
    bootstrap over items of the mean difference (``bootstrap``, percentiles of 2000 resamples), without a test.

    Args:
        first, second: a score an item, in the same order.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} items cannot be paired")
    a, b = np.asarray(first, float), np.asarray(second, float)
    found: dict[str, Any] = {"n": len(a), "difference": float((b - a).mean())}
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        both, neither = int((a * b).sum()), int(((1 - a) * (1 - b)).sum())
        lost, won = int((a * (1 - b)).sum()), int(((1 - a) * b).sum())
        return found | {
            "right_to_wrong": lost,
            "wrong_to_right": won,
            "mcnemar_p": mcnemar(lost, won),
            "ci95": newcombe(both, lost, won, neither),
            "interval": "newcombe",
        }
    draws = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    interval = [float(v) for v in np.quantile((b - a)[draws].mean(1), [0.025, 0.975])]
    return found | {
        "right_to_wrong": None,
        "wrong_to_right": None,
        "mcnemar_p": None,
        "ci95": interval,
        "interval": "bootstrap",
    }


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's rho, ties at their mean rank. None where one side does not vary or there are fewer than three pairs."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if _can_be_ordered(x, y) else None


def kendall(x: ArrayLike, y: ArrayLike) -> float | None:
    """Kendall's tau-b. None where one side does not vary or there are fewer than three pairs."""
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).statistic) if _can_be_ordered(x, y) else None


def _can_be_ordered(*sides: ArrayLike) -> bool:
    return all(np.size(side) > 2 and np.ptp(side) > 0 for side in sides)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points ``(cost, value)`` that no other beats, from the cheapest up: none costs no more and is worth more, or costs less and is worth
    as much. Of equal points the first one stands."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def worst_windows(values: ArrayLike, groups: ArrayLike, length: int, count: int) -> list[int]:
    """Where the windows of ``length`` neighbours with the largest means begin, none overlapping another, the worst first.

    Args:
        values: ``(rows,)``.
        groups: ``(rows,)``, equal neighbours belong together; no window reaches into another group.
        count: windows at most.
    """
    value, group = np.asarray(values, float), np.asarray(groups)
    if len(value) < length:
        return []
    sums = np.convolve(value, np.ones(length), "valid")
    within = group[: len(sums)] == group[length - 1 :]
    found: list[int] = []
    taken = np.zeros(len(value), bool)
    for start in map(int, np.argsort(-sums, kind="stable")):
        if len(found) == count:
            break
        if within[start] and not taken[start : start + length].any():
            taken[start : start + length] = True
            found.append(start)
    return found
