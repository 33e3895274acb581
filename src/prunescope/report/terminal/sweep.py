"""A sweep in the terminal. Numbers come from its rows and run.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["show_sweep"]

_SHORT = {"generative": "writing", "choice": "choosing"}


def show_sweep(
    info: Mapping[str, Any], sweep: pa.Table, summary: Mapping[str, Any], console: Console | None = None
) -> None:
    """Mean scores by point and kind, then which metrics order the points as the losses do.

    Args:
        info, sweep, summary: ``run.json``, the rows of ``sweep.parquet`` and the summary of a sweep.
    """
    console = console or Console()
    rows = sweep.to_pylist()
    says = [row for row in rows if row["informative"]] or rows
    kinds = [kind for kind in ("generative", "choice") if any(row["kind"] == kind for row in says)]
    console.print(Text(str(info["config"]["model"]), style="bold"))
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shown.add_column("point", overflow="fold")
    sizes = {row["point"]: row["bytes"] for row in rows if row.get("bytes") is not None}
    kls, like = summary.get("kl", {}), summary.get("like", {})
    shown.add_column("gone", justify="right", no_wrap=True)
    if sizes:
        shown.add_column("MB", justify="right", no_wrap=True)
    for kind in kinds:
        shown.add_column(_SHORT[kind], justify="right", no_wrap=True)
        shown.add_column("kept", justify="right", no_wrap=True)
    more = {row["point"]: row for row in summary["discrepancy"]}
    if more:
        shown.add_column("more", justify="right", no_wrap=True)
    if kls:
        shown.add_column("KL", justify="right", no_wrap=True)
    for point in dict.fromkeys(row["point"] for row in rows):
        cells = []
        for kind in kinds:
            mine = [row for row in says if (row["point"], row["kind"]) == (point, kind)]
            kept = [row["kept"] for row in mine if row["kept"] is not None]
            cells.append(f"{sum(row['score'] for row in mine) / len(mine):.3f}")
            cells.append(f"{sum(kept) / len(kept):.3f}" if kept else "-")
        if more:
            cells.append(_more(more.get(point)))
        if kls:
            cells.append(f"{kls[point]:.3g}" if point in kls else "-")
        size = [f"{sizes[point] / 1e6:.1f}" if point in sizes else "-"] if sizes else []
        removed = next(row["weights_removed"] for row in rows if row["point"] == point)
        shown.add_row(point, f"{100 * removed:.1f} %", *size, *cells)
    console.print(shown)
    counts = {kind: len({row["task"] for row in says if row["kind"] == kind}) for kind in kinds}
    means = " and ".join(f"{_SHORT[kind]}, of {count} task{'s' * (count > 1)}" for kind, count in counts.items())
    differs = "; more: how much more of it choosing keeps than writing" if more else ""
    note = f"gone: share of the weights; mean scores: {means}; kept: share of the dense model's score above chance{differs}"
    console.print(Text(note, style="dim"))
    left_out = list(dict.fromkeys(row["task"] for row in rows if not row["informative"]))
    if left_out:
        console.print(Text(f"at floor in the dense model, alone or as a pair, so left out here: {', '.join(left_out)}"))
    for point, words in like.items():
        console.print(Text(f"KL of {point}, {kls[point]:.3g}: {words}"))
    for name, points in summary.get("front", {}).items():
        what = {"generative": "writing", "choice": "choosing", "kl": "KL"}[name]
        console.print(Text(f"Pareto front of bytes and {what}: {', '.join(points)}"))
    for outcome, best in summary["predicts"].items():
        names = ", ".join(f"{row['column']} {row['spearman']:+.3f}" for row in best)
        console.print(Text(f"ranks of the loss, {outcome}, by Spearman over {best[0]['count']} points: {names}"))


def _more(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    half = "" if row["ci95"] is None else f"\u00b1{(row['ci95'][1] - row['ci95'][0]) / 2:.2f}"
    return f"{row['choice_keeps_more']:+.2f}{half}"
