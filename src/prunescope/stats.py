"""Proportions of items that were answered rightly: intervals and tests. Plain Python, no torch."""

from __future__ import annotations

from math import comb, sqrt
from statistics import NormalDist

__all__ = ["mcnemar", "newcombe", "wilson"]


def wilson(successes: int, trials: int, level: float = 0.95) -> list[float] | None:
    """Wilson's score interval of a proportion, None without trials."""
    if not trials:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * sqrt(share * (1 - share) / trials + weight / (4 * trials))
    # at none and at all the bound is exactly 0 and 1; rounding must not put it inside the share
    return [middle - half if successes else 0.0, middle + half if successes < trials else 1.0]


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: the two-sided binomial probability that ``lost`` and ``won`` flips differ this much by chance alone."""
    flips = lost + won
    tail = sum(comb(flips, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def newcombe(both: int, lost: int, won: int, neither: int, level: float = 0.95) -> list[float] | None:
    """Interval of the difference of two paired proportions, second minus first, None without items.

    Newcombe's method 10 (Statistics in Medicine 17, 1998, 2635-2650): the Wilson intervals of both proportions, squared and added, with
    the correlation of the pairs; its numerator is corrected for continuity where it is positive.

    Args:
        both: items that both have right.
        lost: right in the first, wrong in the second.
        won: wrong in the first, right in the second.
        neither: right in none.
    """
    trials = both + lost + won + neither
    if not trials:
        return None
    first, second = wilson(both + lost, trials, level), wilson(both + won, trials, level)
    assert first is not None and second is not None
    p, q = (both + lost) / trials, (both + won) / trials
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    numerator = float(both * neither - lost * won)
    numerator = max(numerator - trials / 2, 0.0) if numerator > 0 else numerator
    phi = numerator / sqrt(product) if product else 0.0
    down = (q - second[0], first[1] - p)  # how far the difference may lie below
    up = (second[1] - q, p - first[0])
    low, high = (sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)) for a, b in (down, up))
    return [q - p - low, q - p + high]
