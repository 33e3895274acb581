"""Which metric of a sweep predicts which loss: rank correlations over its points. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from prunescope.stats import kendall, spearman

__all__ = ["CORRELATIONS_SCHEMA", "COUNTED", "MEANS", "best_predictors", "correlations"]

COUNTED = "weights_removed"  # what a metric must beat: counting what was removed
MEANS = {
    "generative": "all generative",
    "choice": "all choice",
}  # kind -> outcome: the share lost on average over its tasks
CORRELATIONS_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("kind", pa.string()),
        ("points", pa.string()),
        ("space", pa.string()),
        ("column", pa.string()),
        ("spearman", pa.float64()),
        ("kendall", pa.float64()),
        ("count", pa.int32()),
    ]
)


def _outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(outcome, kind) -> loss by point: of every task that says something, and of the share lost on average over those of a kind."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for kind, name in MEANS.items():
        lost: dict[str, list[float]] = {}
        for row in rows:
            if row["kind"] == kind and row["kept"] is not None:
                lost.setdefault(row["point"], []).append(1 - row["kept"])
        if lost:
            found[name, kind] = {point: sum(values) / len(values) for point, values in lost.items()}
    for row in rows:
        if row["informative"]:
            found.setdefault((row["task"], row["kind"]), {})[row["point"]] = row["loss"]
    return found


def correlations(points: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlation of every metric's mean with every loss: over all points, and over those of each series with the dense model.

    Args:
        points: ``Measured.info`` of each.
        rows: those of ``sweep.parquet``.
    """
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for info in points:
        columns.setdefault(("size", COUNTED), {})[info["point"]] = info[COUNTED]
        for space, stats in info["metrics"].items():
            for column, values in stats.items():
                columns.setdefault((space, column), {})[info["point"]] = values["mean"]
    series = {info["point"]: info["series"] for info in points}
    scopes = {"all": list(series)} | {
        name: [point for point, own in series.items() if own in (name, "dense")]
        for name in dict.fromkeys(series.values())
        if name != "dense"
    }
    if len(scopes) == 2:  # one series: the same points as all
        scopes.pop("all")
    found = []
    for (outcome, kind), losses in _outcomes(rows).items():
        for scope, inside in scopes.items():
            for (space, column), values in columns.items():
                both = [p for p in inside if p in losses and p in values and math.isfinite(values[p])]
                x, y = [values[p] for p in both], [losses[p] for p in both]
                found.append(
                    {
                        "outcome": outcome,
                        "kind": kind,
                        "points": scope,
                        "space": space,
                        "column": column,
                        "spearman": spearman(x, y),
                        "kendall": kendall(x, y),
                        "count": len(both),
                    }
                )
    return found


def best_predictors(correlations: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """For the average of each kind the columns that order the points best, by |Spearman|, and what counting weights does."""
    found: dict[str, list[dict[str, Any]]] = {}
    for outcome in MEANS.values():
        mine = [dict(r) for r in correlations if r["outcome"] == outcome and r["spearman"] is not None]
        scopes = list(dict.fromkeys(r["points"] for r in mine))
        mine = [r for r in mine if r["points"] == scopes[0]] if scopes else []
        mine.sort(key=lambda r: -abs(r["spearman"]))
        if mine:
            counted = [r for r in mine if r["column"] == COUNTED]
            found[outcome] = mine[:count] + [r for r in counted if r not in mine[:count]]
    return found
