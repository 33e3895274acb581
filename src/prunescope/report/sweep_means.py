"""Rows of a sweep, picked and averaged over tasks: what its figures, its page and its table have in common. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunescope.stats import Z95

__all__ = ["KINDS", "Rows", "mean_over_tasks", "of_kind"]

KINDS = {"generative": ("#D55E00", "written", "o"), "choice": ("#0072B2", "chosen", "s")}
Rows = list[dict[str, Any]]


def mean_over_tasks(rows: Rows, column: str) -> tuple[float, float, float] | None:
    """Mean over tasks with its 95 % interval, from the tasks' own, which are taken for independent."""
    known = [row for row in rows if row[column] is not None]
    if not known:
        return None
    mean = float(np.mean([row[column] for row in known]))
    if len(known) == 1 and column == "score" and known[0]["ci_low"] is not None:
        return mean, known[0]["ci_low"], known[0]["ci_high"]  # its own, which is not symmetric
    if column == "score":
        halves = [(Z95 * row["stderr"]) if row["stderr"] is not None else np.nan for row in known]
    else:
        halves = [
            (row[f"{column}_ci_high"] - row[f"{column}_ci_low"]) / 2 if row[f"{column}_ci_low"] is not None else np.nan
            for row in known
        ]
    half = float(np.sqrt(np.square(halves).sum()) / len(known))
    return mean, mean - half, mean + half


def of_kind(rows: Rows, kind: str, only: bool) -> Rows:
    return [row for row in rows if row["kind"] == kind and (row["informative"] or not only)]
