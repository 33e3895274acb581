"""Publication figures of a set of run folders, as SVG, PNG and PDF: `prunescope report --figures`. Imports neither torch nor transformers.

Each run has a folder with the figures that its own command draws and, for layerwise runs, heatmaps by layer and step. Beside these folders
lie the figures over all runs: curves by layer, targets by step, bytes against damage; and those of checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from prunescope.errors import UserError
from prunescope.report import KIND_NAMES
from prunescope.report.figures.generation import draw_generation, draw_targets
from prunescope.report.figures.layerwise import draw_layerwise
from prunescope.report.figures.mcq import draw_mcq
from prunescope.report.figures.style import FLOOR, also_pdf, by, save, style
from prunescope.report.figures.sweep import draw_sweep
from prunescope.report.names import short
from prunescope.runs import folder as results

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["draw_publication"]

_HEAT = {
    "h_cos_dev": "1 - cos(h)",
    "z_cos_dev": "1 - cos(z)",
    "p_cos_dev": "1 - cos(p)",
    "kl_dense_target": "KL(p || q), nats",
}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def draw_publication(
    runs: Sequence[results.Run], checkpoints: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path
) -> list[Path]:
    """Draw everything that the runs and checkpoints show into ``folder``, complete or not at all; returns what was written.

    Args:
        runs: from `prunescope.open`.
        checkpoints: folder and prunescope.json of each.
        folder: files of the same name in it are replaced.
    Raises:
        UserError: a run whose files do not fit together, or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
            written = _draw(runs, checkpoints, Path(beside))
            shutil.copytree(beside, folder, dirs_exist_ok=True)
            return [folder / path.relative_to(beside) for path in written]
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --figures") from error


def _draw(
    runs: Sequence[results.Run], checkpoints: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path
) -> list[Path]:
    written: list[Path] = []
    used: set[str] = set()
    with also_pdf():
        for run in runs:
            place = folder / _unused(run.folder.name, used)
            place.mkdir(exist_ok=True)
            table, info = run.table(), run.info
            if run.command == "layerwise":
                written += draw_layerwise(table, info, [], place)
                with style():
                    for column, name in _HEAT.items():
                        written += save(_heatmap(table, info, column, name), place / f"heatmap_{column}")
            elif run.command == "generate":
                written += draw_generation(table, info, run.samples(), place)
            elif run.command == "sweep":
                written += draw_sweep(table, run.table("metrics"), run.table("correlations"), info, place)
            else:
                written += draw_mcq(table, info, run.samples(), place)
        with style():
            if layerwise := [(run.table(), run.info) for run in runs if run.command == "layerwise"]:
                for column in ("h_cos", "z_cos", "p_cos", "kl_dense_target"):
                    written += save(_by_layer(layerwise, column), folder / f"layers_{column}")
            for path, record in checkpoints:
                name = _unused(path.name, used)
                drawn = (
                    _errors(record, path.name) if record.get("command") == "sparsify" else _scores(record, path.name)
                )
                if drawn is not None:
                    written += save(drawn, folder / f"checkpoint_{name}")
        if generated := [(run.table(), run.info) for run in runs if run.command == "generate"]:
            written += draw_targets(generated, folder)
            with style():
                written += save(_pareto([info for _, info in generated]), folder / "pareto_bytes_kl")
    return written


def _unused(name: str, used: set[str]) -> str:
    number, found = 1, name
    while found in used:
        number += 1
        found = f"{name}-{number}"
    used.add(found)
    return found


def _grid(rows: pa.Table, column: str, layers: int, steps: int) -> np.ndarray:
    """Mean over prompts, ``(layers, steps)``; NaN where there is nothing."""
    grid = np.full((layers, steps), np.nan)
    found = rows.group_by(["layer", "step"]).aggregate([(column, "mean")])
    grid[found["layer"].to_numpy(), found["step"].to_numpy()] = found[f"{column}_mean"].to_numpy()
    return grid


def _heatmap(table: pa.Table, info: Mapping[str, Any], column: str, name: str) -> Figure:
    """A deviation by layer and step, mean over prompts, on a logarithmic scale that both panels share; exact zeros are blank."""
    layers, steps = int(info["models"]["dense"]["blocks"]), int(pc.max(table["step"]).as_py()) + 1
    grids = [_grid(table.filter(pc.equal(table["sublayer"], kind)), column, layers, steps) for kind in KIND_NAMES]
    grids = [np.where(grid > 0, grid, np.nan) for grid in grids]
    known = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    figure = Figure(figsize=(7.2, min(6.0, 1.6 + 0.085 * layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    low = (
        float(np.quantile(known, 0.01)) if len(known) else 0.0
    )  # a few tiny cells would take the colours from all others
    norm = LogNorm(low, max(known.max(), low * 1.01)) if len(known) else None
    image = None
    for axes, grid, kind in zip(panels, grids, KIND_NAMES.values(), strict=True):
        image = axes.imshow(grid, origin="lower", aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
        axes.set(title=f"{kind} sublayers", xlabel="decoding step")
        axes.grid(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    panels[0].set_ylabel("layer")
    if len(known) and image is not None:
        bar = figure.colorbar(image, ax=panels, label=name, pad=0.01, extend="min" if known.min() < low else "neither")
        if known.max() > 10 * known.min():
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
    config = info["config"]
    against = f"against {short(config['target'])}" if config["target"] else "each dropped in turn"
    figure.suptitle(
        f"{name}: {short(config['dense'])}, {against}; lens {config['lens']}, T = {config['metric_temperature']:g}"
    )
    return figure


def _labels(infos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Targets by name, with the lens where the command has one."""
    names = [short(info["config"]["target"]) if info["config"]["target"] else "each in turn" for info in infos]
    return [
        f"{name}, lens {info['config']['lens']}" if info["command"] == "layerwise" else name
        for name, info in zip(names, infos, strict=True)
    ]


def _by_layer(runs: Sequence[tuple[pa.Table, Mapping[str, Any]]], column: str) -> Figure:
    """A column by layer, mean over prompts and steps, of all layerwise runs; sublayers that a target leaves alone have no point."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = _labels([info for _, info in runs])
    for axes, (kind, name) in zip(panels, KIND_NAMES.items(), strict=True):
        for number, (table, info) in enumerate(runs):
            layers, _, mean, _ = by(table.filter(pc.equal(table["sublayer"], kind)), "layer", column)
            shown = np.where(np.isin(layers, info["changed_layers"][kind]), mean, np.nan)
            if column == "kl_dense_target":
                shown = np.where(shown > 0, shown, np.nan)
            axes.plot(
                layers, shown, marker="o", markersize=3, color=_COLOURS[number % len(_COLOURS)], label=labels[number]
            )
        axes.set(title=f"{name} sublayers", xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if column == "kl_dense_target":
        panels[0].set(yscale="log", ylabel="KL(p || q), nats")
    else:
        panels[0].set_ylabel(f"cosine of {column[0]}")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)))
    figure.suptitle(f"{short(runs[0][1]['config']['dense'])}: mean over prompts and steps, same context")
    return figure


def _pareto(infos: Sequence[Mapping[str, Any]]) -> Figure:
    """Bytes of each target as loaded against its mean KL a step, teacher-forced where there is that."""
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    labels, damage = _labels(infos), []
    dense = _bytes(infos[0]["models"]["dense"])
    sizes = [dense, *(_bytes(info["models"]["target"]) for info in infos)]
    middle = (min(sizes) + max(sizes)) / 2
    for number, info in enumerate(infos):
        regime = "teacher-forced" if "teacher-forced" in info["regimes"] else info["regimes"][0]
        kl = info["summary_by_regime"][regime]["p"]["kl_dense_target"]["mean"]
        damage.append(kl)
        x = _bytes(info["models"]["target"])
        axes.plot([x], [kl], "o", color=_COLOURS[number % len(_COLOURS)])
        side = -1 if x > middle else 1  # towards the middle, where there is room
        axes.annotate(
            f"{labels[number]}\n({regime})", (x, kl), (6 * side, 0), textcoords="offset points", fontsize=6.5, va="center", ha="right" if side < 0 else "left"
        )  # fmt: skip
    axes.axvline(dense, color=FLOOR, linestyle=":", linewidth=1, label="bytes of the dense model")
    axes.set(xlabel="bytes as loaded, MB", ylabel="mean KL(p || q) a step, nats")
    if min(damage) > 0:
        axes.set_yscale("log")
    axes.margins(0.12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    figure.suptitle(f"{short(infos[0]['config']['dense'])}: size and damage")
    return figure


def _bytes(model: Mapping[str, Any]) -> float:
    return float(model["parameters"]) * _BYTES.get(model["dtype"], 4) / 1e6


def _scores(record: Mapping[str, Any], name: str) -> Figure | None:
    """Drop score by layer, what was dropped crossed; None without scores."""
    rows = record.get("scores") or []
    if not rows:
        return None
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(sorted({row["sublayer"] for row in rows})):
        for dropped in (False, True):
            mine = [row for row in rows if row["sublayer"] == kind and row["dropped"] == dropped]
            if mine:
                marker, colour = ("x", _COLOURS[1]) if dropped else ("os^"[number % 3], _COLOURS[(0, 2, 4)[number % 3]])
                axes.plot([r["layer"] for r in mine], [r["score"] for r in mine], marker, color=colour, markersize=4, label=f"{kind}, {'dropped' if dropped else 'kept'}")  # fmt: skip
    axes.set(xlabel="layer", ylabel="score")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{short(name)}: drop scores (mean cosine before and after), the highest are needed least")
    return figure


def _errors(record: Mapping[str, Any], name: str) -> Figure | None:
    """Relative reconstruction error by block and kind of matrix, mean over experts; None if none was measured."""
    cells: dict[tuple[int, str], list[float]] = {}
    for row in record["modules"]:
        if row["error"] is not None:
            kind = row["name"].partition("[")[0].removesuffix(".weight").rpartition(".")[2]
            cells.setdefault((row["layer"], kind), []).append(row["error"])
    if not cells:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = list(range(max(layer for layer, _ in cells) + 1))
    grid = np.array([[np.mean(cells[i, kind]) if (i, kind) in cells else np.nan for i in layers] for kind in kinds])
    figure = Figure(figsize=(7.2, 1.6 + 0.25 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="|(W - W\u2032)X| / |WX|", pad=0.01)
    figure.suptitle(f"{short(name)}: {record['method']}, relative error of every kind of matrix")
    return figure
