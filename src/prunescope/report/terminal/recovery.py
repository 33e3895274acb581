"""Erased or demoted, as a table: what became of the right token of a question, or of the dense model's token where two texts part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["HEADINGS", "RULE", "recovery_rows", "show_recovery"]

HEADINGS = ("", "n", "first", "demoted", "erased", "rank", "1 draw", "10", "100 draws")
RULE = (
    "rank: median, 1 is the most likely token; demoted: 100 draws contain the token more often than not; erased: they do not. Chance of at least one in n draws: "
    "1 - (1 - p)^n, computed from p, nothing was sampled"
)


def recovery_rows(info: Mapping[str, Any]) -> list[list[str]]:
    """The cells under `HEADINGS` from run.json of ``mcq`` or ``generate``; none of a run made before this was kept."""
    if info["command"] == "mcq":
        found = info.get("right_token") or {}
        named = [("dense", "dense"), ("target", "target"), ("target, right to wrong", "right_to_wrong")]
    else:
        found = {"forks": (info.get("first_difference") or {}).get("dense_token")}
        named = [("target", "forks")]
    return [_cells(name, found[key]) for name, key in named if found.get(key)]


def _cells(name: str, found: Mapping[str, Any]) -> list[str]:
    place = "-" if found["median_place"] is None else f"{found['median_place']:,g}"
    counts = [str(found[key]) for key in ("count", "first", "demoted", "erased")]
    return [name, *counts, place, *(f"{chance:.3f}" for chance in found["chance"].values())]


def show_recovery(info: Mapping[str, Any], console: Console) -> None:
    """Print the table, if the run has one."""
    if not (rows := recovery_rows(info)):
        return
    mcq = info["command"] == "mcq"
    what = "the right option's token" if mcq else "the dense model's token where the texts part"
    temperature = 1.0 if mcq else info["config"]["metric_temperature"]
    console.print()
    console.print(Text(f"{what}, in the whole vocabulary at T = {temperature:g}", style="bold"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(RULE, style="dim"))
    console.print()
