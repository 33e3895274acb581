"""The Pareto picture of a sweep: what is kept, and KL, against the bytes of the weights, all kinds of points on one axis.

From the tables of a run alone. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from prunescope.report.figures.style import FLOOR
from prunescope.report.sweep_means import KINDS, Rows, mean_over_tasks, of_kind
from prunescope.stats import pareto_front

__all__ = ["CHANGES", "Panel", "draw_pareto"]

CHANGES = {  # kind of point -> colour, name, marker
    "dense": ("#000000", "dense", "D"),
    "drop": ("#D55E00", "sublayers dropped", "o"),
    "sparsify": ("#009E73", "weights pruned", "^"),
    "quant": ("#0072B2", "quantised", "s"),
    "joined": ("#CC79A7", "joined", "X"),
    "healed": ("#8C6D00", "dropped and healed", "P"),
}
_MB = 1e6


@dataclass(frozen=True)
class _Mark:
    point: str
    change: str
    bytes: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """Something else that was measured at the same points, more of it being better."""

    title: str
    label: str
    values: Mapping[str, tuple[float, float, float]]  # point -> value and 95 % interval


def draw_pareto(rows: Rows, metrics: Rows, title: str, more: Sequence[Panel] = ()) -> Figure | None:
    """A panel each for what is written, what is chosen and KL(dense || point); None where fewer than three points have known bytes.

    The line joins the points that no other is better than in both directions; bars are 95 % intervals, which the front does not look at.
    """
    weighed = [row for row in rows if row.get("bytes") is not None]
    if len({row["point"] for row in weighed}) < 3:
        return None
    only = any(row["informative"] for row in weighed)
    panels = []
    for kind, (_, word, _) in KINDS.items():
        if marks := _kept(of_kind(weighed, kind, only), "kept" if only else "score"):
            panels.append((f"what is {word}", "share kept of the score above chance" if only else "score", marks, 1))
    of_point = {row["point"]: row for row in weighed}
    for extra in more:
        marks = [
            _Mark(name, of_point[name]["change"], of_point[name]["bytes"] / _MB, *value)
            for name, value in extra.values.items()
            if name in of_point
        ]
        panels.append((extra.title, extra.label, marks, 1))
    if marks := _kl(weighed, metrics):
        panels.append(("KL(dense || point) on the dense model's texts", "nats a step", marks, -1))
    if not panels:
        return None
    figure = Figure(figsize=(0.6 + 3.3 * len(panels), 3.9), layout="constrained")
    for axes, (name, label, marks, sign) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, marks, sign)
        axes.set(title=name, ylabel=label, xlabel="weights, MB")
    handles = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{title}: what a byte buys; bars: 95 %, line: the Pareto front of the means")
    return figure


def _kept(rows: Rows, column: str) -> list[_Mark]:
    found = []
    for point in dict.fromkeys(row["point"] for row in rows):
        mine = [row for row in rows if row["point"] == point]
        if (mean := mean_over_tasks(mine, column)) is not None:
            found.append(_Mark(point, mine[0]["change"], mine[0]["bytes"] / _MB, *mean))
    return found


def _kl(rows: Rows, metrics: Rows) -> list[_Mark]:
    """Without the dense model, whose KL of 0 has no place on a logarithmic axis."""
    of_point = {row["point"]: row for row in rows}
    return [
        _Mark(
            row["point"],
            of_point[row["point"]]["change"],
            of_point[row["point"]]["bytes"] / _MB,
            row["mean"],
            _known(row["ci_low"]),
            _known(row["ci_high"]),
        )
        for row in metrics
        if row["column"] == "kl_dense_target" and row["point"] in of_point and row["mean"] and row["mean"] > 0
        if of_point[row["point"]]["change"] != "dense"
    ]


def _known(value: Any) -> float:
    return np.nan if value is None else float(value)


def _panel(axes: Any, marks: Sequence[_Mark], sign: int) -> None:
    for change, (colour, word, marker) in CHANGES.items():
        mine = [mark for mark in marks if mark.change == change]
        if not mine:
            continue
        low, high = (
            np.nan_to_num([max(0.0, (m.value - end(m)) * side) for m in mine])
            for end, side in ((lambda m: m.low, 1), (lambda m: m.high, -1))
        )
        axes.errorbar(
            [m.bytes for m in mine], [m.value for m in mine], [low, high],
            fmt=marker, color=colour, markersize=4.5, elinewidth=0.6, alpha=0.85, label=word, zorder=3,
        )  # fmt: skip
    front = [marks[i] for i in pareto_front([(m.bytes, sign * m.value) for m in marks])]
    axes.plot([m.bytes for m in front], [m.value for m in front], color=FLOOR, linewidth=1.4, zorder=2)
    if sign < 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.axhline(0, color=FLOOR, linewidth=0.7, linestyle=":")
    axes.margins(x=0.1, y=0.12)
    middle = (min(m.bytes for m in marks) + max(m.bytes for m in marks)) / 2
    for mark in front:
        if mark.change == "dense":
            continue
        left = mark.bytes > middle  # labels go towards the middle, where there is room
        axes.annotate(
            mark.point.removeprefix("quant-"), (mark.bytes, mark.value), (-5 if left else 5, 4 if sign > 0 else -4), textcoords="offset points",
            fontsize=6, ha="right" if left else "left", va="bottom" if sign > 0 else "top", zorder=4, color=CHANGES[mark.change][0],
        )  # fmt: skip
