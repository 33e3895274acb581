"""What `advise` prints. Numbers come from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["show_advice"]


def show_advice(rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any], console: Console | None = None) -> None:
    """Every point by series, then the advice and the command that makes it."""
    console = console or Console()
    summary = info["summary"]
    title = f"{info['models']['dense']['source']} for {summary['use']}: {', '.join(summary['tasks'])}"
    console.print(Text(title, style="bold"))
    if summary.get("judged"):
        console.print(Text(summary["judged"]))
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    timed = any(row.get("tokens_per_s") is not None for row in rows)
    for heading in (
        "point",
        "weights gone",
        "bytes saved",
        "kept",
        "fit (95 %)",
        *(["tokens/s"] if timed else []),
        "verdict",
    ):
        table.add_column(heading, justify="left" if heading in ("point", "verdict") else "right", overflow="fold")
    for row in rows:
        saved = "-" if row["saved"] is None else f"{100 * row['saved']:.1f} %"
        fit = f"{row['fitted']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
        rate = (
            [f"{row['tokens_per_s']:,.0f} {row['speedup']:.2f}x" if row["tokens_per_s"] is not None else "-"]
            if timed
            else []
        )
        cells = (row["point"], f"{100 * row['removed']:.1f} %", saved, f"{row['kept']:.2f}", fit, *rate, row["verdict"])
        table.add_row(*map(Text, cells))
    console.print(table)
    for line in summary["says"]:
        console.print(Text(line, style="bold"))
    if summary["command"]:
        console.print(Text(summary["command"]), soft_wrap=True)
