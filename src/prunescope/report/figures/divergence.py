"""Figures of divergence runs: how KL is spread over tokens, over the text and over the dense model's confidence. From the rows and run.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from prunescope.report.figures.style import FLOOR, save, style
from prunescope.report.names import short

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes

__all__ = ["draw_divergence"]

_FORWARD, _BACKWARD, _JS = "#0072B2", "#D55E00", "#009E73"
_DIRECTIONS = (
    ("kl_dense_target", _FORWARD, "KL(p || q)"),
    ("kl_target_dense", _BACKWARD, "KL(q || p)"),
    ("js", _JS, "JS"),
)


def draw_divergence(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Draw the figures of one divergence run into ``folder``; returns what was written."""
    with style():
        written = save(_spread(table, info), folder / "divergence_spread")
        return written + save(_groups(info), folder / "divergence_groups")


def _title(info: Mapping[str, Any]) -> str:
    config = info["config"]
    return f"{short(config['dense'])} against {short(config['target'])}; {info['tokens']:,} tokens, T = {config['metric_temperature']:g}"


def _spread(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    """Share of tokens whose divergence is at least so large, and how the probability of the next token changes."""
    figure = Figure(figsize=(7.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, colour, label in _DIRECTIONS:
        values = np.sort(table[column].to_numpy())[::-1]
        left.plot(np.maximum(values, 1e-12), np.arange(1, len(values) + 1) / len(values), color=colour, label=label)
    left.set(
        xscale="log", yscale="log", xlabel="nats", ylabel="share of tokens", title="divergence at least this large"
    )
    floor = info["noise_floor"]["floor"]["kl_dense_target"]
    if floor > left.get_xlim()[0]:
        left.axvspan(left.get_xlim()[0], floor, color=FLOOR, alpha=0.2, linewidth=0, label="under the noise floor")
    left.legend()
    p = np.exp(-table["nll_dense"].to_numpy())
    right.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    right.scatter(p, p + table["dp"].to_numpy(), s=1.5, alpha=0.25, color=_FORWARD, linewidths=0, rasterized=True)
    right.set(xlabel="dense", ylabel="target", xlim=(0, 1), ylim=(0, 1), title="probability of the token that follows")
    figure.suptitle(_title(info))
    return figure


def _groups(info: Mapping[str, Any]) -> Figure:
    """Mean KL by chunk, position and confidence, with its standard error."""
    by = info["by"]
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    chunk, position, confidence = figure.subplots(1, 3)
    for name in dict.fromkeys(group["slice"] for group in by["chunk"]):
        groups = [group for group in by["chunk"] if group["slice"] == name]
        _means(chunk, [group["chunk"] for group in groups], groups, label=short(name))
    if len(by["slice"]) > 1:
        chunk.legend()
    chunk.set(xlabel="chunk", ylabel="KL(p || q), nats", title="over the text")
    _means(position, [(group["from"] + group["to"] - 1) / 2 for group in by["position"]], by["position"])
    position.set(xlabel="position in the chunk", title="by position")
    labels = [f"{group['from']:g}-{group['to']:g}" for group in by["confidence"]]
    _means(confidence, range(len(labels)), by["confidence"])
    confidence.set(xlabel="probability of its most likely token", title="by the dense model's confidence")
    confidence.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
    for axes in (chunk, position, confidence):
        axes.set_ylim(bottom=0)
    figure.suptitle(_title(info))
    return figure


def _means(axes: Axes, places: Any, groups: list[Mapping[str, Any]], label: str | None = None) -> None:
    means, errors = zip(*(group["kl_dense_target"] for group in groups), strict=True)
    axes.errorbar(places, means, yerr=errors, marker="o", markersize=3, capsize=2, linewidth=1, label=label)
