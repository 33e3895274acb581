"""Two models on the same items: what flipped, and whether it is more than chance. Reads rows only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunescope.stats import mcnemar, newcombe

__all__ = ["RESAMPLES", "compare_scores", "paired"]

RESAMPLES = 2000


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


def compare_scores(
    dense: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """`paired` for every task of two models' rows (of `ITEMS_SCHEMA`), target minus dense. Raises ValueError if their items differ."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    theirs = {(row["task"], row["item"]): row for row in target}
    if len(theirs) != len(dense):
        raise ValueError("the two models were not asked the same items")
    for row in dense:
        other = theirs.get((row["task"], row["item"]))
        if other is None or other["key"] != row["key"] or other["metric"] != row["metric"]:
            raise ValueError(f"item {row['item']} of {row['task']} is not the same for both models")
        by_task.setdefault(row["task"], []).append((row["score"], other["score"]))
    return {task: paired([a for a, _ in both], [b for _, b in both], seed=seed) for task, both in by_task.items()}
