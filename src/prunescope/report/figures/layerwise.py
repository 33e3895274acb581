"""The paper's figures from the rows of a run, as SVG and PNG. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from pyarrow import array as pa_array

from prunescope.report import KIND_NAMES
from prunescope.report.figures.style import ESTIMATE, FLOOR, SPACES, TRUTH, by, save, style
from prunescope.report.names import short

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes

__all__ = ["draw_layerwise"]

ESTIMATES = {  # truth -> (estimate, what it is, theorem)
    "h_cos_dev": ("h_cos_dev_est", "1 - cos(h)", "Theorem 1"),
    "z_cos_dev": ("z_cos_dev_est", "1 - cos(z)", "Theorem 1"),
    "p_cos_dev": ("p_cos_dev_est", "1 - cos(p)", "Theorem 2"),
    "kl_dense_target": ("kl_est", "KL(p || q), nats", "Theorem 3"),
}
_MULTIPLES = (
    ("p_cos_dev", "attn", 14),
    ("p_cos_dev", "mlp", 15),
    ("kl_dense_target", "attn", 16),
    ("kl_dense_target", "mlp", 17),
)


def draw_layerwise(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Draw Figs. 4, 5, 6 and 14-19 of the paper from the rows of a layerwise run into ``folder``; returns what was written.

    Sublayers that the target leaves as they are (deviation exactly zero) have nothing to show beside Fig. 4 and are left out.
    """
    written: list[Path] = []
    with style():
        for kind in KIND_NAMES:
            rows = table.filter(pc.equal(table["sublayer"], kind))
            written += save(_cosines_by_layer(rows, kind, info), folder / f"fig04_cosine_by_layer_{kind}")
            if changed := info["changed_layers"][kind]:
                layer = _layer_to_show(rows, changed)
                written += save(
                    _truth_and_estimate(rows, kind, layer, info), folder / f"fig06_truth_and_estimate_{kind}"
                )
                written += save(_parts(rows, kind, changed, info), folder / f"fig05_parallel_and_orthogonal_{kind}")
                written += save(_parts_by_step(rows, kind, layer, info), folder / f"fig18_parts_by_step_{kind}")
                written += save(_variances(rows, kind, changed, info), folder / f"fig19_variances_{kind}")
        for column, kind, number in _MULTIPLES:
            rows = table.filter(pc.equal(table["sublayer"], kind))
            if changed := info["changed_layers"][kind]:
                written += save(
                    _small_multiples(rows, kind, column, changed, info), folder / f"fig{number}_{column}_{kind}"
                )
    return written


# --- figures -----------------------------------------------------------------------------------------------------------


def _cosines_by_layer(rows: pa.Table, kind: str, info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 4: cosine of dense and target by layer, mean over prompts and steps, band from smallest to largest."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    lowest = 1.0
    for space, (colour, label, marker) in SPACES.items():
        layers, low, mean, high = by(rows, "layer", f"{space}_cos")
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(layers, mean, color=colour, marker=marker, markersize=3.5, label=label)
        lowest = min(lowest, float(np.nanmin(low)))
    axes.axhline(1.0, color=FLOOR, linewidth=0.6, linestyle=":")
    axes.set(
        xlabel="layer",
        ylabel="cosine similarity",
        title=_title(info, kind),
        ylim=(min(0.0, lowest) - 0.03, 1.04),
        xlim=(layers[0] - 0.5, layers[-1] + 0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1.10), borderaxespad=0)
    figure.supxlabel("line: mean over prompts and steps; band: smallest to largest", fontsize=7, color="#555555")
    return figure


def _truth_and_estimate(rows: pa.Table, kind: str, layer: int, info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 6: what happened against what the theorems say, by step, at one layer."""
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    rows = rows.filter(pc.equal(rows["layer"], layer))
    floor = info["noise_floor"]["floor"]
    for axes, (truth, (estimate, name, theorem)) in zip(grid.flat, ESTIMATES.items(), strict=True):
        _draw_pair(axes, rows, truth, estimate, floor.get(truth))
        axes.set_title(f"{name}  ({theorem})")
    for axes in grid[1]:
        axes.set_xlabel("decoding step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.suptitle(f"Layer {layer}: what happened and what the theorems say\n{_title(info, kind)}")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


_PARTS = (("para_rel", "parallel", "-", "o"), ("orth_rel", "orthogonal", "--", "s"))


def _parts(rows: pa.Table, kind: str, layers: list[int], info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 5: lengths of the change along and across the dense vector, relative to it, by layer, in h and in z."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    rows = rows.filter(pc.is_in(rows["layer"], pa_array(layers, "int32")))
    for axes, space in zip(figure.subplots(1, 2, sharey=True), "hz", strict=True):
        colour, label, _ = SPACES[space]
        for name, what, line, marker in _PARTS:
            found, low, mean, high = by(rows, "layer", f"{space}_{name}")
            axes.fill_between(found, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(found, mean, line, color=colour, marker=marker, markersize=3, label=what)
        axes.set(yscale="log", xlabel="layer", title=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.axes[0].set_ylabel("length relative to the dense vector")
    figure.suptitle(f"The change along and across the dense vector\n{_title(info, kind)}")
    return figure


def _parts_by_step(rows: pa.Table, kind: str, layer: int, info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 18: the same by decoding step, at one layer."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    rows = rows.filter(pc.equal(rows["layer"], layer))
    for axes, space in zip(figure.subplots(1, 2, sharey=True), "hz", strict=True):
        colour, label, _ = SPACES[space]
        for name, what, line, marker in _PARTS:
            steps, _, mean, _ = by(rows, "step", f"{space}_{name}")
            axes.plot(steps, mean, line, color=colour, marker=marker, markersize=2.5, label=what)
        axes.set(yscale="log", xlabel="decoding step", title=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.axes[0].set_ylabel("length relative to the dense vector")
    figure.suptitle(f"Layer {layer}: the change along and across the dense vector\n{_title(info, kind)}")
    return figure


def _variances(rows: pa.Table, kind: str, layers: list[int], info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 19: variance of the change of the logits under uniform weights, under p (Theorem 3) and under r (Theorem 2), by layer."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    rows = rows.filter(pc.is_in(rows["layer"], pa_array(layers, "int32")))
    weights = (
        ("var_uniform", "uniform", "#999999", "o"),
        ("var_p", "p", TRUTH, "s"),
        ("var_r", "r = p\u00b2 / \u03a3p\u00b2", ESTIMATE, "^"),
    )
    for column, label, colour, marker in weights:
        found, _, mean, _ = by(rows, "layer", column)
        axes.plot(found, np.where(mean > 0, mean, np.nan), color=colour, marker=marker, markersize=3, label=label)
    axes.set(yscale="log", xlabel="layer", ylabel="variance of \u0394z")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="weights", ncols=3)
    figure.suptitle(f"Variance of the change of the logits\n{_title(info, kind)}")
    return figure


def _small_multiples(rows: pa.Table, kind: str, column: str, layers: list[int], info: Mapping[str, Any]) -> Figure:
    """Paper Figs. 14-17: the same over all layers, one small panel each, on one scale."""
    estimate, name, theorem = ESTIMATES[column]
    columns = min(6, len(layers))
    lines = -(-len(layers) // columns)
    size = (max(1.35 * columns, 6.4), 1.15 * lines + 1.1)
    figure = Figure(figsize=size)
    grid = figure.subplots(lines, columns, squeeze=False)
    floor = info["noise_floor"]["floor"].get(column)
    panels = list(grid.flat)[: len(layers)]
    for axes, layer in zip(panels, layers, strict=True):
        _draw_pair(axes, rows.filter(pc.equal(rows["layer"], layer)), column, estimate, floor, size=1.5)
        axes.set_title(f"layer {layer}", fontsize=7, pad=2)
    # Axes that matplotlib keeps alike ask one another at every step, and a layout that it looks for draws them all: of 30 panels most of the time.
    low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
    first, last = zip(*(axes.get_xlim() for axes in panels), strict=True)
    for i, axes in enumerate(panels):
        axes.set(ylim=(min(low), max(high)), xlim=(min(first), max(last)))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_label_coords(0, 0)  # of no label: matplotlib would look for its place, past all ticks
        axes.tick_params(labelsize=6, labelleft=i % columns == 0, labelbottom=i + columns >= len(layers))
    for axes in list(grid.flat)[len(layers) :]:
        axes.remove()
    _place(figure, size, lines, columns)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle(f"{name} by decoding step ({theorem})\n{_title(info, kind)}", y=1 - 0.06 / size[1], va="top")
    figure.legend(handles, labels, loc="lower center", ncols=len(labels))
    return figure


def _place(figure: Figure, size: tuple[float, float], lines: int, columns: int) -> None:
    """Put small panels between title and legend: margins and gaps in inches."""
    width, height = size
    left, right, bottom, top, beside, above = 0.45, 0.08, 0.47, 0.52, 0.1, 0.24
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=beside * columns / (width - left - right - beside * (columns - 1)),
        hspace=above * lines / (height - bottom - top - above * (lines - 1)),
    )  # fmt: skip


def _draw_pair(axes: Axes, rows: pa.Table, truth: str, estimate: str, floor: float | None, size: float = 2.5) -> None:
    """Truth and estimate by step, mean over prompts, on a logarithmic scale; what lies under the noise floor is shaded."""
    for column, colour, label, line, marker in (
        (truth, TRUTH, "measured", "-", "o"),
        (estimate, ESTIMATE, "second-order estimate", "--", "x"),
    ):
        steps, _, mean, _ = by(rows, "step", column)
        positive = np.where(mean > 0, mean, np.nan)  # a logarithmic axis has no place for an exact zero
        axes.plot(steps, positive, line, color=colour, marker=marker, markersize=size, label=label)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlim(-0.5, max(axes.get_xlim()[1], steps[-1] + 0.5))
    if floor:
        bottom, top = axes.get_ylim()
        if floor > bottom:
            axes.axhspan(
                min(bottom, floor / 10), floor, color=FLOOR, alpha=0.2, linewidth=0, label="under the noise floor"
            )
            axes.set_ylim(min(bottom, floor / 10), max(top, floor * 10))


def _layer_to_show(rows: pa.Table, changed: list[int]) -> int:
    """The changed layer whose KL is the median one: neither the mildest nor the worst."""
    layers, _, mean, _ = by(rows, "layer", "kl_dense_target")
    ranked = [int(layers[i]) for i in np.argsort(mean, kind="stable") if int(layers[i]) in changed]
    return ranked[len(ranked) // 2]


def _title(info: Mapping[str, Any], kind: str) -> str:
    config = info["config"]
    against = f"against {short(config['target'])}" if config["target"] else "dropped one at a time"
    return f"{short(config['dense'])}: {KIND_NAMES[kind]} sublayers {against}; lens {config['lens']}, T = {config['metric_temperature']:g}"
