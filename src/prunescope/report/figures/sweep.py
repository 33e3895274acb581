"""Figures of a sweep: score against dropped sublayers or sparsity, what is written beside what is chosen, and which metric predicts the loss.

As SVG and PNG, from the tables of a run alone. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from prunescope.report.figures.pareto import draw_pareto
from prunescope.report.figures.style import FLOOR, save, style
from prunescope.report.names import short
from prunescope.report.sweep_means import KINDS, Rows, mean_over_tasks, of_kind

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes


__all__ = ["draw_sweep"]

_SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_NAMES = {"attn": "attention sublayers", "mlp": "MLP sublayers", "block": "blocks", "all": "sublayers of both kinds"}
_SCATTERED = (
    ("h_cos_dev", "1 - cos(h)", "log"),
    ("z_cos_dev", "1 - cos(z)", "log"),
    ("p_cos_dev", "1 - cos(p)", "log"),
    ("kl_dense_target", "KL(p || q), nats", "log"),
    ("top1_agree", "same most likely token", "linear"),
    ("weights_removed", "share of weights removed", "linear"),
)


def draw_sweep(
    sweep: pa.Table, metrics: pa.Table, correlations: pa.Table, info: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Draw a sweep into ``folder``; returns what was written. Works as well on the finished points of one that was interrupted."""
    rows: Rows = sweep.to_pylist()
    everything, rows = (
        rows,
        [row for row in rows if row.get("quant") is None],
    )  # the other figures are of lines by n or sparsity
    dropped = [name for name in _series(rows) if _at(rows, name)[0]["n"] is not None]
    pruned = list(dict.fromkeys(row["method"] for row in rows if row["method"] is not None))
    title = short(info["config"]["model"])
    written: list[Path] = []
    with style():
        figure = draw_pareto(everything, metrics.to_pylist(), title)
        written += save(figure, folder / "pareto") if figure is not None else []
        if dropped:
            written += save(_by_amount(rows, dropped, title, "n"), folder / "fig01_by_dropped")
        if pruned:
            written += save(_by_amount(rows, pruned, title, "sparsity"), folder / "fig01_by_sparsity")
        for name in dropped:
            written += save(_tasks(rows, name, title, "n"), folder / f"fig03_tasks_{name}")
        for name in pruned:
            written += save(_tasks(rows, name, title, "sparsity"), folder / f"fig03_tasks_{name}")
        if len(metrics) and len({row["point"] for row in everything}) > 2:
            figure = _scatter(everything, metrics.to_pylist(), title)
            written += save(figure, folder / "metrics_and_loss") if figure is not None else []
            figure = _predicts(correlations.to_pylist(), title)
            written += save(figure, folder / "predicts") if figure is not None else []
    return written


# --- picking rows ------------------------------------------------------------------------------------------------------


def _series(rows: Rows) -> list[str]:
    return [name for name in dict.fromkeys(row["series"] for row in rows) if name != "dense"]


def _at(rows: Rows, name: str) -> Rows:
    """Rows of a series, or of a method with its patterns."""
    return [row for row in rows if name in (row["series"], row["method"])]


def _line(rows: Rows, name: str, by: str) -> list[tuple[float, Rows]]:
    """(amount, rows of the point) of the line of a series, the dense model at 0; patterns N:M are no part of a line."""
    points: dict[str, Rows] = {}
    for row in rows:
        if row["series"] in ("dense", name):
            points.setdefault(row["point"], []).append(row)
    found = [(0.0 if mine[0]["series"] == "dense" else float(mine[0][by]), mine) for mine in points.values()]
    return sorted(found, key=lambda pair: pair[0])


def _patterns(rows: Rows, name: str) -> list[tuple[float, str, Rows]]:
    points: dict[str, Rows] = {}
    for row in rows:
        if row["method"] == name and row["pattern"] is not None:
            points.setdefault(row["pattern"], []).append(row)
    return [(float(mine[0]["sparsity"]), pattern, mine) for pattern, mine in points.items()]


# --- figures -----------------------------------------------------------------------------------------------------------


def _by_amount(rows: Rows, names: Sequence[str], title: str, by: str) -> Figure:
    """Paper Fig. 1: mean score of what is written and of what is chosen; below, the share kept of what the dense model has above chance."""
    only = any(row["informative"] for row in rows)
    figure = Figure(figsize=(max(4.4, 1.2 + 2.6 * len(names)), 5.2), layout="constrained")
    grid = figure.subplots(2, len(names), sharex="col", sharey="row", squeeze=False)
    for axes, name in zip(grid.T, names, strict=True):
        for kind, (colour, word, marker) in KINDS.items():
            mine = of_kind(rows, kind, only)
            if not mine:
                continue
            dense = [row for row in mine if row["point"] == "dense"]
            _band(axes[0], _line(mine, name, by), "score", colour, marker, f"{word} (mean of {len(dense)} tasks)")
            _references(axes[0], dense, colour)
            _band(axes[1], _line(mine, name, by), "kept", colour, marker, word)
            for number, (x, pattern, there) in enumerate(_patterns(mine, name)):
                for axis, column in zip(axes, ("score", "kept"), strict=True):
                    if (found := mean_over_tasks(there, column)) is not None:
                        axis.errorbar(
                            [x],
                            [found[0]],
                            [[found[0] - found[1]], [found[2] - found[0]]],
                            fmt="*",
                            color=colour,
                            markersize=8,
                        )
                        axis.annotate(
                            pattern, (x, found[0]), (-6, 0) if number % 2 else (6, 0), textcoords="offset points", fontsize=6.5, va="center", ha="right" if number % 2 else "left"
                        )  # fmt: skip
        axes[0].set_title(_NAMES.get(name, name))
        axes[1].axhline(1, color=FLOOR, linewidth=0.7, linestyle="--")
        axes[1].axhline(0, color=FLOOR, linewidth=0.7, linestyle=":")
        axes[1].set_xlabel("dropped" if by == "n" else "share of weights pruned")
        if by == "n":
            axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].set(ylabel="score", ylim=(-0.03, 1.03))
    low = max(-0.6, min([-0.1, *(axis.dataLim.y0 for axis in grid[1] if np.isfinite(axis.dataLim.y0))]))
    grid[1, 0].set(ylabel="share kept of the score\nabove chance", ylim=(low, 1.25))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, max(1, len(labels))))
    left_out = sorted({row["task"] for row in rows if not row["informative"]}) if only else []
    note = f"\nat floor and left out: {', '.join(left_out)}" if left_out else ""
    if not only:
        note = "\nthe dense model is at chance in every task: these scores say nothing"
    figure.suptitle(f"{title}: what is written and what is chosen, bands: 95 %{note}")
    return figure


def _band(
    axes: Axes, line: Sequence[tuple[float, Rows]], column: str, colour: str, marker: str, label: str, **how: Any
) -> None:
    found = [(x, mean) for x, mine in line if (mean := mean_over_tasks(mine, column)) is not None]
    if not found:
        return
    x = np.array([point for point, _ in found])
    mean, low, high = np.array([values for _, values in found]).T
    if np.isfinite(low).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=colour, marker=marker, markersize=3.5, label=label, **how)


def _references(axes: Axes, dense: Rows, colour: str) -> None:
    """The dense score and chance, means over the same tasks."""
    axes.axhline(float(np.mean([row["score"] for row in dense])), color=colour, linewidth=0.7, linestyle="--")
    chance = float(np.mean([row["chance"] or 0.0 for row in dense]))
    axes.axhline(chance, color=colour, linewidth=0.7, linestyle=":")


def _tasks(rows: Rows, name: str, title: str, by: str) -> Figure:
    """Task by task, the two ways of a matched pair in one panel; dashed the dense score, dotted chance."""
    panels: dict[str, Rows] = {}
    for row in rows:
        panels.setdefault(row["pair"] or row["task"], []).append(row)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1.0 + 2.5 * across, 0.9 + 2.1 * down), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, (panel, mine) in zip(grid, panels.items(), strict=False):
        says = all(row["informative"] for row in mine)
        for kind, (colour, word, marker) in KINDS.items():
            chosen = of_kind(mine, kind, False)
            if not chosen:
                continue
            shown = colour if says else "#999999"
            _band(axes, _line(chosen, name, by), "score", shown, marker, word)
            _references(axes, [row for row in chosen if row["point"] == "dense"], shown)
            for x, pattern, there in _patterns(chosen, name):
                axes.plot([x], [there[0]["score"]], "*", color=shown, markersize=7)
                axes.annotate(pattern, (x, there[0]["score"]), (4, 3), textcoords="offset points", fontsize=6)
        axes.set_title(panel if says else f"{panel}: at floor, says nothing", color="black" if says else "#777777")
        if by == "n":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    figure.axes[0].set_ylim(-0.03, 1.03)
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)
    what = f"{_NAMES.get(name, name)} dropped" if by == "n" else f"{name}, share of weights pruned"
    head = f"{title}: score by number of {what}" if by == "n" else f"{title}: score by {what}"
    figure.suptitle(f"{head}\ndashed: dense, dotted: chance, bands: 95 %")
    return figure


def _lost(rows: Rows, kind: str) -> dict[str, float]:
    kept: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == kind and row["kept"] is not None:
            kept.setdefault(row["point"], []).append(row["kept"])
    return {point: 1 - float(np.mean(values)) for point, values in kept.items()}


def _scatter(rows: Rows, metrics: Rows, title: str) -> Figure | None:
    """Share lost against the mean of a metric, a mark a point of the sweep: a metric that predicts puts all marks on one curve."""
    values = {(row["point"], row["column"]): row["mean"] for row in metrics}
    values |= {(row["point"], "weights_removed"): row["weights_removed"] for row in rows}
    lost = {kind: _lost(rows, kind) for kind in KINDS}
    kinds = [kind for kind in KINDS if lost[kind]]
    columns = [one for one in _SCATTERED if any((row["point"], one[0]) in values for row in rows)]
    if not kinds or not columns:
        return None
    figure = Figure(figsize=(1.0 + 1.75 * len(columns), 0.9 + 2.0 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(columns), sharex="col", sharey=True, squeeze=False)
    names = _series(rows)
    of_series = {row["point"]: row["series"] for row in rows}
    for line, kind in zip(grid, kinds, strict=True):
        for axes, (column, _, scale) in zip(line, columns, strict=True):
            for number, name in enumerate(names):
                mine = [p for p in lost[kind] if of_series[p] == name and (p, column) in values]
                axes.plot(
                    [values[p, column] for p in mine],
                    [lost[kind][p] for p in mine],
                    "os^Dv*"[number % 6],
                    color=_SERIES_COLOURS[number % len(_SERIES_COLOURS)],
                    markersize=3.5,
                    label=name,
                )
            axes.axhline(0, color=FLOOR, linewidth=0.6)
            axes.axhline(1, color=FLOOR, linewidth=0.6, linestyle=":")
            if scale == "log" and all(values[p, column] > 0 for p in lost[kind] if of_series[p] != "dense"):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
        line[0].set_ylabel(f"share lost, {KINDS[kind][1]}")
    for axes, (_, label, _) in zip(grid[-1], columns, strict=True):
        axes.set_xlabel(label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))))
    figure.suptitle(f"{title}: what a metric says on a few texts, and what tasks lost")
    return figure


def _predicts(correlations: Rows, title: str) -> Figure | None:
    """Spearman's correlation of every column with every loss, over all points."""
    scopes = list(dict.fromkeys(row["points"] for row in correlations))
    mine = [row for row in correlations if row["points"] == scopes[0] and row["spearman"] is not None] if scopes else []
    outcomes = list(dict.fromkeys(row["outcome"] for row in mine))
    if not outcomes:
        return None
    columns = list(dict.fromkeys(row["column"] for row in mine))
    cells = {(row["column"], row["outcome"]): row["spearman"] for row in mine}
    grid = np.array([[cells.get((column, outcome), np.nan) for outcome in outcomes] for column in columns])
    order = np.argsort(-np.abs(np.nan_to_num(grid[:, 0])), kind="stable")
    grid, columns = grid[order], [columns[i] for i in order]
    figure = Figure(figsize=(2.4 + 0.52 * len(outcomes), 1.9 + 0.17 * len(columns)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(columns)), columns, fontsize=6)
    axes.set_xticks(range(len(outcomes)), outcomes, rotation=60, ha="right", fontsize=6.5, rotation_mode="anchor")
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(
                j,
                i,
                f"{value:+.2f}",
                ha="center",
                va="center",
                fontsize=5,
                color="white" if abs(value) > 0.6 else "black",
            )
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="Spearman's rank correlation with the loss", pad=0.02)
    figure.suptitle(f"{title}: which metric predicts which loss\n{mine[0]['count']} points ({scopes[0]})", fontsize=8)
    return figure
