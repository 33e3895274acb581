"""Figures of a retrieve run: every query under both models. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from prunescope.report.figures.style import FLOOR, drawable, save, style
from prunescope.report.names import measure_name, short

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["draw_retrieval"]

_COLOUR = "#0072B2"


def draw_retrieval(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Draw nDCG@10 of every query under both models, and what became of rankings against embeddings, into ``folder``."""
    with style():
        written = save(_scores(table, info), folder / "ndcg_by_query")
        if np.isfinite(table["h_cos_dev"].to_numpy().astype(float)).any():
            written += save(_moves(table, info), folder / "rankings_and_embeddings")
    return written


def _scores(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense, target = (table[f"ndcg_10_{side}"].to_numpy() for side in ("dense", "target"))
    points, counts = np.unique(np.stack([dense, target], 1), axis=0, return_counts=True)
    left.plot([0, 1], [0, 1], color=FLOOR, linewidth=0.8)
    left.scatter(
        points[:, 0], points[:, 1], s=6 * counts, clip_on=False, zorder=3, color=_COLOUR, alpha=0.6, linewidth=0
    )
    left.set(xlabel="nDCG@10, dense", ylabel="nDCG@10, target", title="every query (area: how many)", aspect="equal")
    names = list(info["measures"])
    for place, name in enumerate(names):
        row = info["measures"][name]
        low, high = row["diff_ci95"]
        if low is not None:
            right.plot([low, high], [place, place], color=_COLOUR, linewidth=1.5)
        right.plot(row["diff"], place, "o", color=_COLOUR)
    right.axvline(0, color=FLOOR, linewidth=0.8)
    right.set_yticks(range(len(names)), [measure_name(name) for name in names])
    right.invert_yaxis()
    right.set(xlabel="target - dense, mean and 95 % interval", title="over all queries")
    figure.suptitle(_title(info), parse_math=False)
    return figure


def _moves(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    moved = table["h_cos_dev"].to_numpy().astype(float)
    floor = info["noise_floor"]["floor"]["h_cos_dev"]
    for axes, column, name in zip(
        figure.subplots(1, 2), ("kendall", "ndcg_10_diff"), ("Kendall's tau", "change of nDCG@10"), strict=True
    ):
        axes.scatter(np.maximum(moved, 1e-17), table[column].to_numpy().astype(float), s=12, color=_COLOUR, linewidth=0)
        if floor > moved[moved > 0].min(initial=np.inf) / 100:  # far from the points it would only press them together
            axes.axvline(floor, color=FLOOR, linewidth=0.8)
        axes.set(xscale="log", xlabel="1 - h-cosine of the query", ylabel=name)
    figure.suptitle(_title(info), parse_math=False)
    return figure


def _title(info: Mapping[str, Any]) -> str:
    models = " against ".join(drawable(short(str(info["config"][side]))) for side in ("target", "dense"))
    return f"{models}, {info['config']['pooling']} pooling"
