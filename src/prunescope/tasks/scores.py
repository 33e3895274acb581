"""Scores of a task: from items to a mean with its interval, whether the dense model has anything to lose, and two models item by item. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa

from prunescope.stats import normal_interval, paired, wilson
from prunescope.tasks import quick

__all__ = ["FLOOR", "ITEMS_SCHEMA", "at_floor", "compare_scores", "score", "tasks_at_floor"]

FLOOR = 0.05  # a generative task is at its floor if the dense model gets less
ITEMS_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("kind", pa.string()),  # generative or choice
        ("item", pa.int32()),
        ("key", pa.string()),  # of the document, the same in every run
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("prediction", pa.string()),
        ("gold", pa.string()),
    ]
)


def score(
    values: Sequence[float], metric: str, kind: str, chance: float | None, shots: int | None, note: str | None = None
) -> dict[str, Any]:
    """Mean, its standard error and 95 % interval: Wilson's where every item is right or wrong, else the normal one."""
    x = np.asarray(values, float)
    mean, stderr = float(x.mean()), float(x.std(ddof=1) / sqrt(len(x))) if len(x) > 1 else None
    if set(np.unique(x)) <= {0.0, 1.0}:
        interval = wilson(int(x.sum()), len(x))
    else:
        interval = None if stderr is None else normal_interval(mean, stderr)
    return {
        "metric": metric,
        "kind": kind,
        "value": mean,
        "stderr": stderr,
        "ci95": interval,
        "n": len(x),
        "chance": chance,
        "shots": shots,
        "note": note,
    }


def at_floor(dense: Mapping[str, Any]) -> str | None:
    """Why the dense model's score says nothing about pruning, None if it does say something."""
    if dense["kind"] == "generative":
        return f"the dense model gets {dense['value']:.2f}, nothing to lose" if dense["value"] < FLOOR else None
    low = dense["ci95"][0] if dense["ci95"] else None
    if dense["chance"] is not None and low is not None and low <= dense["chance"]:
        return f"the dense model's interval reaches down to chance ({dense['chance']:.2f})"
    return None


def tasks_at_floor(reasons: Mapping[str, str | None]) -> set[str]:
    """Tasks that say nothing about pruning: those with a reason of their own (`at_floor`), and the other half of a matched pair of which one is."""
    alone = {task for task, reason in reasons.items() if reason is not None}
    pairs = {quick.pair_of(task) for task in alone if task in quick.QUICK}
    return alone | {task for task in reasons if task in quick.QUICK and quick.pair_of(task) in pairs}


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
