"""What a retrieve run says: the table in the terminal, and figures of every query under both models. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunescope.report.figures.layerwise import FLOOR, drawable, save, short, style

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["draw_retrieval", "show_retrieval"]

_COLOUR = "#0072B2"


def show_retrieval(info: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the measures of both models with the interval of their difference, and how alike rankings and embeddings are."""
    console = console or Console()
    target = short(str(info["config"]["target"]))
    title = f"{target} against {short(str(info['config']['dense']))}: {info['queries']} queries, {info['passages']} passages"
    console.print(Text(title, style="bold"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("mean", no_wrap=True)
    for name in ("dense", "target", "change (95 % interval)", "up / down", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in info["measures"].items():
        table.add_row(
            label(name),
            *(f"{row[side]:.3f}" for side in ("dense", "target")),
            f"{row['diff']:+.3f} {_interval(row['diff_ci95'])}",
            f"{row['better']} / {row['worse']}",
            f"{row['sign_test_p']:.2g}",
        )
    console.print(table)
    console.print("up / down: queries; p: sign test of them", markup=False)
    alike = info["summary"]["retrieval"]
    console.print(
        f"rankings: Kendall's tau {_mean(alike, 'kendall')}, shared top 10 {_mean(alike, 'overlap_10')}, same first passage "
        f"{_mean(alike, 'top1_same')}",
        markup=False,
        highlight=False,
    )
    moved, floor = info["summary"]["h"].get("h_cos_dev"), info["noise_floor"]["floor"]["h_cos_dev"]
    if moved:
        passages = info["passages_moved"]["h_cos_dev"]["mean"]
        console.print(
            f"embeddings: 1 - h-cosine {moved['mean']:.3g} of queries, {passages:.3g} of passages (noise floor {floor:.1g})",
            markup=False,
            highlight=False,
        )
    else:
        console.print("embeddings: the models differ in width, so there is no h-cosine between them", markup=False)


def _mean(columns: Mapping[str, Any], name: str) -> str:
    return f"{columns[name]['mean']:.3f} {_interval(columns[name]['ci95'])}" if name in columns else "not defined"


def _interval(pair: Sequence[float | None]) -> str:
    return "" if pair[0] is None else f"({pair[0]:.3f} to {pair[1]:.3f})"


def label(name: str) -> str:
    """``ndcg_10`` -> ``nDCG@10``."""
    kind, _, cut = name.partition("_")
    word = {"ndcg": "nDCG", "ap": "MAP", "rr": "MRR"}.get(kind, kind)
    return f"{word}@{cut}" if cut else word


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
    right.set_yticks(range(len(names)), [label(name) for name in names])
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
