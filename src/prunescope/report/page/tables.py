"""Runs that the page shows as tables: `retrieve`, `speed` and `advise`. Numbers come from run.json and rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunescope.report.names import measure_name, short
from prunescope.report.terminal.scoring import gain
from prunescope.runs.folder import Run

__all__ = ["TABLES", "table_section"]

_SIZES = {  # heading -> column, of transformers or of llama.cpp
    "parameters": "parameters",
    "bytes on disk": "disk_bytes",
    "bytes in memory": "memory_bytes",
    "cache bytes a token": "cache_bytes_per_token",
    "bytes of the file": "file_bytes",
    "bytes of weights": "weight_bytes",
    "cache bytes": "cache_bytes",
}


def table_section(run: Run) -> dict[str, Any]:
    """What the template needs: models, tables (headings, how many of them are words, rows) and remarks."""
    return {"folder": run.folder.name} | TABLES[run.command](run)


def _retrieve(run: Run) -> dict[str, Any]:
    info = run.info
    rows = [
        [
            measure_name(name),
            f"{row['dense']:.3f}",
            f"{row['target']:.3f}",
            f"{row['diff']:+.3f}",
            _between(row["diff_ci95"]),
            str(row["worse"]),
            str(row["better"]),
            f"{row['sign_test_p']:.2g}",
        ]
        for name, row in info["measures"].items()
    ]
    alike = info["summary"]["retrieval"]
    moved = info["summary"]["h"].get("h_cos")
    remarks = [
        f"{info['queries']} queries, {info['passages']} passages. Rankings: Kendall's tau {_mean(alike['kendall'])}, shared top 10 {_mean(alike['overlap_10'])}, "
        f"same first passage {_mean(alike['top1_same'])}."
    ]
    if moved:
        remarks.append(f"Cosine of the queries' embeddings, dense against target: {_mean(moved)}.")
    headings = ("measure", "dense", "target", "change", "95 % of it", "queries worse", "better", "sign test p")
    return {
        "models": [short(str(info["config"]["dense"])), short(str(info["config"]["target"]))],
        "tables": [{"name": "Retrieval", "headings": headings, "words": 1, "rows": rows}],
        "remarks": remarks,
    }


def _speed(run: Run) -> dict[str, Any]:
    rows = run.table().to_pylist()
    names = list(dict.fromkeys(str(row["model"]) for row in rows))
    sizes = {heading: key for heading, key in _SIZES.items() if key in rows[0]}
    times = [
        [
            short(str(row["model"])),
            str(row.get("batch_size", 1)),
            *(f"{row[f'{kind}_tokens_per_s']:,.0f}" for kind in ("prefill", "decode")),
            *("" if row["model"] == names[0] else gain(row, kind) for kind in ("prefill", "decode")),
        ]
        for row in rows
    ]
    return {
        "models": [short(name) for name in names],
        "tables": [
            {
                "name": "Size",
                "headings": ("model", *sizes),
                "words": 1,
                "rows": [
                    [short(name), *(_count(row[key]) for key in sizes.values())]
                    for name in names
                    for row in [next(row for row in rows if row["model"] == name)]
                ],
            },
            {
                "name": "Tokens a second, and gain over the first model",
                "headings": ("model", "batch", "prefill", "decode", "gain, prefill", "gain, decode"),
                "words": 1,
                "rows": times,
            },
        ],
        "remarks": [f"{name}: {note}" for name, notes in run.info.get("notes", {}).items() for note in notes]
        + ["~ is a difference within the spread of the repeats, that is, noise."],
    }


def _advise(run: Run) -> dict[str, Any]:
    summary, table = run.info["summary"], run.table().to_pylist()
    rows = [
        [
            row["point"],
            row["series"],
            row["verdict"],
            f"{100 * row['removed']:.1f} %",
            "-" if row["saved"] is None else f"{100 * row['saved']:.1f} %",
            f"{row['kept']:.2f}",
            f"{row['fitted']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
        ]
        for row in table
    ]
    timed = any(row.get("tokens_per_s") is not None for row in table)
    if timed:
        for cells, row in zip(rows, table, strict=True):
            cells.append("-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f} ({row['speedup']:.2f}x)")
    headings = (
        "point",
        "series",
        "verdict",
        "weights gone",
        "bytes saved",
        "kept",
        "fit",
        "95 % of it",
        *(["tokens a second"] if timed else []),
    )
    made = [f"To make it: {summary['command']}"] if summary["command"] else []
    return {
        "models": [short(str(run.info["models"]["dense"]["source"]))],
        "tables": [
            {
                "name": f"Advice for {summary['use']}: {', '.join(summary['tasks'])}",
                "headings": headings,
                "words": 3,
                "rows": rows,
            }
        ],
        "remarks": [*summary["says"], *made],
    }


TABLES: Mapping[str, Callable[[Run], dict[str, Any]]] = {"retrieve": _retrieve, "speed": _speed, "advise": _advise}


def _between(bounds: Any) -> str:
    return "" if not bounds or bounds[0] is None else f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"


def _mean(stats: Mapping[str, Any]) -> str:
    low, high = stats["ci95"]
    return f"{stats['mean']:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
