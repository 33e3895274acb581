"""Figures of generate runs: cosines and divergence by decoding step, survival, several targets in one picture, the two texts.

As SVG and PNG, from run folders alone. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prunescope.report.figures.style import ESTIMATE, FLOOR, SPACES, by, drawable, save, style
from prunescope.report.names import short

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes

__all__ = ["draw_generation", "draw_targets"]

LINES = {"free-running": "-", "teacher-forced": "--"}
LOCAL, HISTORY = "#56B4E9", "#CC79A7"
_BELOW: dict[str, Any] = {"fontsize": 6.5, "loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
_PANELS = (  # paper Fig. 12: the whole vocabulary above, the dense model's most likely tokens below
    ("dz_l1", "mean |Δz|, all tokens"),
    ("dz_rms", "RMS of Δz, all tokens"),
    ("var_uniform", "variance of Δz, uniform"),
    ("dz_top5_l1", "mean |Δz|, top 5"),
    ("dz_top5_rms", "RMS of Δz, top 5"),
    ("var_top5", "variance of Δz, top 5"),
)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_TEXT_PROMPTS, _TEXT_WIDTH, _TEXT_LINES, _TEXT_INCHES = 3, 58, 14, 8.0
_TEXT_SIZE = (
    0.98 * 72 * _TEXT_INCHES / (2 * _TEXT_WIDTH + 4) / 0.602
)  # points, so that a character of DejaVu Sans Mono is one unit wide


def draw_generation(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Draw paper Figs. 7 and 12, survival, confidence and the texts of one generate run into ``folder``; returns what was written."""
    with style():
        written = save(_cosines(table, info), folder / "fig07_cosine_by_step")
        written += save(_divergence(table, info), folder / "fig07_kl_by_step")
        written += save(_six_panels([(table, info)]), folder / "fig12_logit_changes_by_step")
        if "first_difference" in info or "agreement_by_confidence" in info:
            written += save(_agreement(info), folder / "agreement")
        if "first_difference" in info:
            written += save(_texts(samples, info), folder / "texts")
    return written


def draw_targets(runs: Sequence[tuple[pa.Table, Mapping[str, Any]]], folder: Path) -> list[Path]:
    """Several generate runs of one dense model in one picture each: paper Figs. 7 and 12."""
    with style():
        written = save(_six_panels(runs), folder / "fig12_targets")
        written += save(_spaces_of_targets(runs), folder / "fig07_targets")
    return written


# --- figures -----------------------------------------------------------------------------------------------------------


def _cosines(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 7, left: cosines of the final h, z and p by step, mean over prompts."""
    regimes = info["regimes"]
    figure = Figure(figsize=(3.9 * len(regimes), 3.2), layout="constrained")
    grid = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, regime in zip(grid, regimes, strict=True):
        rows = table.filter(pc.equal(table["regime"], regime))
        for space, (colour, label, marker) in SPACES.items():
            if rows[f"{space}_cos"].null_count or not np.isfinite(rows[f"{space}_cos"].to_numpy()).all():
                continue  # widths differ: there is no cosine of h
            steps, low, mean, high = by(rows, "step", f"{space}_cos")
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(steps, mean, color=colour, marker=marker, markersize=2.5, label=label)
        _steps(axes)
        axes.set_title(regime)
    lowest = float(np.min([0.0, *(axes.dataLim.y0 for axes in grid)]))
    grid[0].set(ylabel="cosine similarity", ylim=(lowest - 0.03, 1.04))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{_title(info)}\nline: mean over the prompts that have the step; band: smallest to largest")
    return figure


def _divergence(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 7, right: KL of the step with its second-order estimate; beside it its local and its history part (Eq. 67)."""
    parts = info.get("divergence")
    figure = Figure(figsize=(7.8 if parts else 4.2, 3.6), layout="constrained")
    grid = figure.subplots(1, 2 if parts else 1, squeeze=False)[0]
    for regime in info["regimes"]:
        rows = table.filter(pc.equal(table["regime"], regime))
        for column, colour, what in (("kl_dense_target", "#0072B2", "KL(p || q)"), ("kl_est", ESTIMATE, "estimate")):
            steps, _, mean, _ = by(rows, "step", column)
            positive = np.where(mean > 0, mean, np.nan)
            grid[0].plot(steps, positive, LINES[regime], color=colour, label=f"{what}, {regime}")
    grid[0].set(yscale="log", ylabel="nats", title="KL and the estimate of Theorem 3")
    floor = info["noise_floor"]["floor"]["kl_dense_target"]
    if floor > grid[0].get_ylim()[0]:
        grid[0].axhspan(
            grid[0].get_ylim()[0], floor, color=FLOOR, alpha=0.2, linewidth=0, label="under the noise floor"
        )
    _steps(grid[0])
    grid[0].legend(**_BELOW)
    if parts:
        rows = parts["by_step"]
        steps = np.array([row["step"] for row in rows])
        local, total = (np.array([row[name] for row in rows]) for name in ("local", "total"))
        grid[1].fill_between(
            steps, 0, local, color=LOCAL, alpha=0.6, linewidth=0, label="local: wrong in the dense context"
        )
        grid[1].fill_between(
            steps, local, total, where=total >= local, interpolate=True, color=HISTORY, alpha=0.6, linewidth=0, label="history: its own text adds"
        )  # fmt: skip
        grid[1].plot(steps, total, color="#333333", label="total, free-running")
        grid[1].set(ylabel="mean KL(p || q), nats", title="What its own history adds (Eq. 67)", ylim=(0, None))
        _steps(grid[1])
        grid[1].legend(**_BELOW)
    figure.suptitle(_title(info))
    return figure


def _six_panels(runs: Sequence[tuple[pa.Table, Mapping[str, Any]]]) -> Figure:
    """Paper Fig. 12: how far the logits move, over the whole vocabulary and among the most likely tokens, by step."""
    figure = Figure(figsize=(7.8, 4.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    for axes, (column, name) in zip(grid.flat, _PANELS, strict=True):
        for number, (table, info) in enumerate(runs):
            for regime in info["regimes"]:
                rows = table.filter(pc.equal(table["regime"], regime))
                steps, _, mean, _ = by(rows, "step", column)
                label = regime if len(runs) == 1 else f"{short(info['config']['target'])}, {regime}"
                axes.plot(steps, mean, LINES[regime], color=_COLOURS[number % len(_COLOURS)], linewidth=1, label=label)
        axes.set_title(name)
        axes.set_ylim(bottom=0)
    for axes in grid[1]:
        _steps(axes)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    title = (
        _title(runs[0][1]) if len(runs) == 1 else f"{short(runs[0][1]['config']['dense'])} against {len(runs)} targets"
    )
    figure.suptitle(title)
    return figure


def _spaces_of_targets(runs: Sequence[tuple[pa.Table, Mapping[str, Any]]]) -> Figure:
    """Paper Fig. 7 for several targets: one panel a space, free-running."""
    figure = Figure(figsize=(7.8, 3.2), layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (space, (_, label, _)) in zip(grid, SPACES.items(), strict=True):
        for number, (table, info) in enumerate(runs):
            rows = table.filter(pc.equal(table["regime"], info["regimes"][0]))
            steps, _, mean, _ = by(rows, "step", f"{space}_cos")
            axes.plot(steps, mean, color=_COLOURS[number % len(_COLOURS)], label=short(info["config"]["target"]))
        axes.set_title(f"cosine of {label}")
        _steps(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(f"{short(runs[0][1]['config']['dense'])}, {runs[0][1]['regimes'][0]}: mean over prompts")
    return figure


def _agreement(info: Mapping[str, Any]) -> Figure:
    """Survival of the common text, and agreement of the most likely token by the dense model's confidence."""
    first, bins = info.get("first_difference"), info.get("agreement_by_confidence")
    panels = [part for part in (first, bins) if part]
    figure = Figure(figsize=(3.9 * len(panels), 3.0), layout="constrained")
    grid = list(figure.subplots(1, len(panels), squeeze=False)[0])
    if first:
        axes = grid.pop(0)
        axes.step(range(len(first["survival"])), first["survival"], where="post", color="#0072B2")
        axes.set(ylim=(-0.03, 1.03), ylabel="share of prompts", title="Texts that are still the same")
        _steps(axes)
    if bins:
        axes = grid.pop(0)
        for place, row in enumerate(bins):
            if row["steps"]:
                low, high = row["ci95"]
                share = row["agreement"]
                axes.errorbar(
                    place, share, [[share - low], [high - share]], fmt="o", markersize=4, capsize=2, color="#0072B2"
                )
                axes.annotate(str(row["steps"]), (place, 1.06), ha="center", fontsize=6, color="#555555")
        axes.set_xticks(range(len(bins)), [f"{row['from']:g}-{row['to']:g}" for row in bins], rotation=30, fontsize=6.5)
        axes.set(
            ylim=(-0.03, 1.14),
            xlabel="dense model's confidence (number of steps above)",
            title="Same most likely token, teacher-forced",
        )
    figure.suptitle(_title(info))
    return figure


def _texts(samples: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> Figure:
    """The two texts of the first prompts, token by token; what follows the first difference is coloured."""
    longest = sorted(samples, key=lambda row: -min(len(row["dense_tokens"]), len(row["target_tokens"])))[:_TEXT_PROMPTS]
    shown = sorted(longest, key=lambda row: int(row["prompt"]))
    blocks = []
    for row in shown:
        lines = {side: _wrapped(row[f"{side}_pieces"]) for side in ("dense", "target")}
        blocks.append((row, lines, max(len(found) for found in lines.values())))
    height = sum(lines + 3 for _, _, lines in blocks)
    figure = Figure(figsize=(_TEXT_INCHES, 0.13 * height + 0.65))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.97 - 0.4 / figure.get_figheight()))
    axes.set(xlim=(0, 2 * _TEXT_WIDTH + 4), ylim=(height, 0))
    axes.axis("off")
    y = 1.0
    for row, lines, used in blocks:
        prompt = " ".join(str(row["text"]).split())
        _put(axes, 0, y, drawable(f"prompt {row['id']}: {prompt}")[: 2 * _TEXT_WIDTH], "#555555")
        for x, side in ((0, "dense"), (_TEXT_WIDTH + 3, "target")):
            _put(axes, x, y + 1, side, "#000000", weight="bold")
            _put_lines(
                axes, x, y + 2, lines[side], row["first_difference"], "#0072B2" if side == "dense" else "#D55E00"
            )
        y += used + 3
    title = f"Coloured from the first token that differs\n{_title(info)}"  # two lines: one is wider than the figure
    figure.suptitle(title, y=1 - 0.06 / figure.get_figheight(), va="top")
    return figure


def _wrapped(pieces: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Tokens with their step, in lines of a fixed width; a line break shows as a sign."""
    lines: list[list[tuple[int, str]]] = [[]]
    used = 0
    for step, piece in enumerate(pieces):
        shown = drawable(piece)[:_TEXT_WIDTH]
        if used + len(shown) > _TEXT_WIDTH:
            lines.append([])
            used = 0
        lines[-1].append((step, shown))
        used += len(shown)
    if len(lines) > _TEXT_LINES:
        lines = [*lines[: _TEXT_LINES - 1], [(0, f"... {len(pieces)} tokens")]]
    return lines


def _put_lines(
    axes: Axes, x: float, y: float, lines: list[list[tuple[int, str]]], first: int | None, colour: str
) -> None:
    for number, line in enumerate(lines):
        column = x
        for same in (True, False):
            text = "".join(piece for step, piece in line if (first is None or step < first) == same)
            if text:
                _put(axes, column, y + number, text, "#222222" if same else colour)
                column += len(text)


def _put(axes: Axes, x: float, y: float, text: str, colour: str, **how: Any) -> None:
    axes.text(x, y, text, family="monospace", fontsize=_TEXT_SIZE, color=colour, va="center", parse_math=False, **how)


# --- parts -------------------------------------------------------------------------------------------------------------


def _steps(axes: Axes) -> None:
    axes.set_xlabel("decoding step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _title(info: Mapping[str, Any]) -> str:
    config = info["config"]
    how = "greedy" if not config["temperature"] else f"sampled at {config['temperature']:g}"
    return f"{short(config['dense'])} against {short(config['target'])}; {how}, {len(info['prompts'])} prompts, metric T = {config['metric_temperature']:g}"
