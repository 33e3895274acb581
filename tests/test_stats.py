"""Intervals, tests and rank correlations against their definitions, written out in plain Python."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from math import comb, erf, sqrt

import numpy as np
import pytest

from prunescope.stats import Z95, kendall, mcnemar, newcombe, normal_interval, paired, pareto_front, spearman, wilson


def test_the_normal_interval_holds_95_percent() -> None:
    assert erf(Z95 / sqrt(2)) == pytest.approx(0.95, abs=1e-15)
    assert normal_interval(2.0, 0.5) == pytest.approx([2 - 0.5 * Z95, 2 + 0.5 * Z95])


@pytest.mark.parametrize("successes, trials", [(1, 2), (3, 10), (7, 9), (500, 501), (1, 100_000)])
def test_wilsons_bounds_solve_its_equation(successes: int, trials: int) -> None:
    """(share - bound)^2 = z^2 bound (1 - bound) / trials, Wilson's definition. Would catch Wald's interval, a continuity correction, another level."""
    found = wilson(successes, trials)
    assert found is not None
    share = successes / trials
    assert found[0] < share < found[1]
    for bound in found:
        assert (share - bound) ** 2 == pytest.approx(Z95**2 * bound * (1 - bound) / trials, rel=1e-9)


def test_wilson_at_the_ends_is_exact() -> None:
    for trials in (1, 7, 33, 1_000_000):
        none, every = wilson(0, trials), wilson(trials, trials)
        assert none is not None and every is not None
        assert none[0] == 0.0 and every[1] == 1.0
        assert none[1] == pytest.approx(Z95**2 / (trials + Z95**2)) == pytest.approx(1 - every[0])
    assert wilson(0, 0) is None and newcombe(0, 0, 0, 0) is None


@pytest.mark.parametrize("lost, won", [(0, 0), (0, 1), (1, 4), (4, 1), (5, 5), (2, 40), (300, 351)])
def test_mcnemar_counts_the_coin_tosses(lost: int, won: int) -> None:
    """Twice the exact tail of a fair coin, at most 1. Would catch the chi-square approximation and a one-sided test."""
    flips = lost + won
    tail = Fraction(sum(comb(flips, k) for k in range(min(lost, won) + 1)), 2**flips)
    assert mcnemar(lost, won) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def rank(values: list[float]) -> list[float]:
    """Counted: one more than the smaller ones, and half of the other equal ones."""
    return [1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


@pytest.mark.parametrize("size, levels", [(3, 100), (12, 4), (37, 3), (40, 1000)])
def test_rank_correlations_are_those_of_their_definitions(size: int, levels: int) -> None:
    """Pearson's r of counted ranks, and concordant less discordant pairs over those not tied. Would catch ties broken by order, tau-a, and
    one side taken twice."""
    rng = np.random.default_rng(size)
    x, y = ([float(v) / 7 for v in rng.integers(0, levels, size)] for _ in range(2))
    a, b = np.array(rank(x)) - (size + 1) / 2, np.array(rank(y)) - (size + 1) / 2
    assert spearman(x, y) == pytest.approx(float(a @ b / sqrt((a @ a) * (b @ b))), abs=1e-12)
    pairs = [(i, j) for i in range(size) for j in range(i)]
    sign = lambda v, i, j: (v[i] > v[j]) - (v[i] < v[j])  # noqa: E731
    excess = sum(sign(x, i, j) * sign(y, i, j) for i, j in pairs)
    untied = [sum(sign(v, i, j) != 0 for i, j in pairs) for v in (x, y)]
    assert kendall(x, y) == pytest.approx(excess / sqrt(untied[0] * untied[1]), abs=1e-12)


@pytest.mark.parametrize("x, y", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5]), ([1, 2], [1, 2]), ([], [])])
def test_nothing_to_order_is_none_without_a_warning(x: list[float], y: list[float]) -> None:
    assert spearman(x, y) is None and kendall(x, y) is None


def test_items_that_cannot_be_paired() -> None:
    for first, second in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired(first, second)


def test_statistics_are_read_without_scipy_and_torch() -> None:
    """Their import takes longer than most reports."""
    probe = "import sys, prunescope, prunescope.stats, prunescope.tasks.scores; assert not {'scipy', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_the_pareto_front_by_brute_force() -> None:
    """A point stands if no other is as cheap and as good and better in one of the two; catches a front that takes equal or dominated points."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [(float(c), float(v)) for c, v in rng.integers(0, 6, (9, 2))]
        front = {points[i] for i in pareto_front(points)}
        assert front == {
            p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        } and len(front) == len(pareto_front(points))
