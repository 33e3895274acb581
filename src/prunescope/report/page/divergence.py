"""What the page shows of a divergence run: llama.cpp's table, its place among the quantised types, groups of tokens, the worst passages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from prunescope.report.figures.divergence import draw_divergence
from prunescope.report.names import short
from prunescope.report.page.payload import TOKEN_CHARACTERS, clipped
from prunescope.report.page.pictures import images
from prunescope.report.terminal.divergence import kl_lines
from prunescope.runs.folder import Run

__all__ = ["divergence_section"]

CHUNKS = 200  # rows of the table by chunk; the figure has them all
_TOP_CHARACTERS, _BEFORE_CHARACTERS = 60, 800


def divergence_section(run: Run) -> dict[str, Any]:
    """What the page shows of a finished divergence run."""
    info = run.info
    config, names = info["config"], [piece["name"] for piece in info["slices"]]
    stats = info["summary"]["p"]["kl_dense_target"]
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
        "passages": [_passage(found) for found in run.samples()],
        "images": images(
            run,
            f"{short(config['dense'])} against {short(config['target'])}",
            lambda folder: draw_divergence(run.table(), info, run.samples(), folder),
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
        return clipped(short(group["slice"]), _TOP_CHARACTERS)
    if key == "chunk":
        name = f", {clipped(short(group['slice']), _TOP_CHARACTERS)}" if several else ""
        return f"{group['chunk']}{name}"
    low, high = group["from"], group["to"]
    return f"{low:g} to {high - 1:g}" if key == "position" else f"{low:g} to {high:g}"


def _passage(found: Mapping[str, Any]) -> dict[str, Any]:
    largest = max(token["kl_dense_target"] for token in found["tokens"]) or 1.0
    before = found["before"]
    return {
        "slice": clipped(short(found["slice"]), _TOP_CHARACTERS),
        "chunk": found["chunk"],
        "position": found["position"],
        "kl": found["kl_dense_target"],
        "before": before if len(before) <= _BEFORE_CHARACTERS else f"…{before[-_BEFORE_CHARACTERS:]}",
        "text": clipped(_visible(found["text"]), _TOP_CHARACTERS),
        "tokens": [
            {
                "text": clipped(_visible(token["text"]), TOKEN_CHARACTERS),
                "kl": token["kl_dense_target"],
                "dp": token["dp"],
                "strength": round(0.5 * sqrt(max(0.0, token["kl_dense_target"]) / largest), 3),
                **{
                    side: [
                        {"text": clipped(_visible(top["text"]), _TOP_CHARACTERS), "p": top["p"]}
                        for top in token[f"top_{side}"]
                    ]
                    for side in ("dense", "target")
                },
            }
            for token in found["tokens"]
        ],
    }


def _visible(text: str) -> str:
    """Blanks and ends of lines as signs, as the rest of the page shows single tokens."""
    return text.translate({ord(" "): "\u2423", ord("\n"): "\u21b5", ord("\t"): "\u21e5"}) or "(empty)"
