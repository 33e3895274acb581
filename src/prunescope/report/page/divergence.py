"""What the page shows of a divergence run: llama.cpp's table, its place among the quantised types, groups of tokens, the worst passages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunescope.report.figures.divergence import draw_divergence
from prunescope.report.names import short
from prunescope.report.page.passages import shown, worst_of_passages
from prunescope.report.page.payload import clipped
from prunescope.report.page.pictures import images
from prunescope.report.terminal.divergence import kl_lines
from prunescope.runs.folder import Run

__all__ = ["divergence_section"]

CHUNKS = 200  # rows of the table by chunk; the figure has them all
_NAME_CHARACTERS = 60


def divergence_section(run: Run) -> dict[str, Any]:
    """What the page shows of a finished divergence run."""
    info = run.info
    config, names = info["config"], [piece["name"] for piece in info["slices"]]
    stats, samples = info["summary"]["p"]["kl_dense_target"], run.samples()
    return {
        "dense": short(config["dense"]),
        "target": short(config["target"]),
        "folder": run.folder.name,
        "tokens": info["tokens"],
        "chunks": info["chunks"],
        "context": config["context"],
        "temperature": config["metric_temperature"],
        "names": [short(name) for name in names],
        "lines": kl_lines(info["table"]),
        "mean": stats["mean"],
        "ci95": stats["ci95"],
        "floor": info["noise_floor"]["floor"]["kl_dense_target"],
        "like": info.get("like"),
        "ladder": _ladder(info),
        "groups": list(_groups(info["by"], len(names) > 1)),
        "more_chunks": max(0, len(info["by"]["chunk"]) - CHUNKS),
        "passages": [shown(found) for found in samples],
        "worst": worst_of_passages(samples),
        "images": images(
            run,
            f"{short(config['dense'])} against {short(config['target'])}",
            lambda folder: draw_divergence(run.table(), info, samples, folder),
        ),
    }


def _ladder(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rungs and the target itself, from the smallest KL to the largest."""
    mean, error = info["table"]["kl_dense_target"]["mean"]
    rows = [
        {"name": rung["name"], "bits": rung["bits_per_weight"], "kl": rung["kl"], "error": rung["error"], "own": False}
        for rung in info.get("ladder") or []
    ]
    if rows:
        rows.append({"name": short(info["config"]["target"]), "bits": None, "kl": mean, "error": error, "own": True})
    return sorted(rows, key=lambda row: row["kl"])


def _groups(by: Mapping[str, Any], several: bool) -> Iterator[dict[str, Any]]:
    """Tables of the main rows by group, each row with its name and the length of its bar in percent."""
    titles = {
        "slice": ("by text", "text"),
        "confidence": ("by the dense model's confidence", "its top p"),
        "position": ("by position in the chunk", "positions"),
        "chunk": ("by chunk", "chunk"),
    }
    for key, (title, heading) in titles.items():
        found = by[key][:CHUNKS] if key == "chunk" else by[key]
        if key == "slice" and not several:
            continue
        largest = max((group["kl_dense_target"][0] for group in found), default=0.0) or 1.0
        rows = [
            group | {"label": _label(key, group, several), "bar": 100 * max(0.0, group["kl_dense_target"][0]) / largest}
            for group in found
        ]
        yield {"key": key, "title": title, "heading": heading, "rows": rows, "folded": len(rows) > 12}


def _label(key: str, group: Mapping[str, Any], several: bool) -> str:
    if key == "slice":
        return clipped(short(group["slice"]), _NAME_CHARACTERS)
    if key == "chunk":
        name = f", {clipped(short(group['slice']), _NAME_CHARACTERS)}" if several else ""
        return f"{group['chunk']}{name}"
    low, high = group["from"], group["to"]
    return f"{low:g} to {high - 1:g}" if key == "position" else f"{low:g} to {high:g}"
