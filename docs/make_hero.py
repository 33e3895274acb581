"""The picture on top of the README: `make docs-figures`, or `python docs/make_hero.py prunescope-demo`. From the demo's run of `generate` alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

import prunescope
from prunescope.report.figures.style import SPACES, style

PANELS = {"teacher-forced": "reading the dense model's text", "free-running": "reading what it wrote itself"}


def by_step(table: pa.Table, regime: str, column: str, least: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Steps (from 1) that at least ``least`` prompts have, and the mean of a column over prompts."""
    mine = np.asarray(table["regime"].to_pylist()) == regime
    steps, values = np.asarray(table["step"])[mine], np.asarray(table[column])[mine]
    kept = [step for step in np.unique(steps) if (steps == step).sum() >= least]
    return np.asarray(kept) + 1, np.asarray([values[steps == step].mean() for step in kept])


def draw(table: pa.Table, title: str) -> Figure:
    """Cosine of the dense and the pruned model's h, z and p, step by step, in both regimes."""
    with style():
        figure = Figure(figsize=(7.2, 2.7), dpi=200, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for panel, (regime, words) in zip(axes, PANELS.items(), strict=True):
            for space, (colour, name, mark) in SPACES.items():
                panel.plot(*by_step(table, regime, f"{space}_cos"), color=colour, lw=1.6, marker=mark, ms=3, label=name)
            panel.set_title(words)
            panel.set_xlabel("token")
            panel.set_ylim(-0.05, 1.03)
        axes[0].set_ylabel("cosine, dense against pruned")
        axes[1].legend(loc="upper right")
        figure.suptitle(title, fontweight="bold")
    return figure


def main(demo: str) -> None:
    run = prunescope.open(Path(demo) / "generate-attn")
    dropped = len(run.info["models"]["target"]["drop_attn_list"])
    of, count = run.info["models"]["dense"]["blocks"], len({row["id"] for row in run.samples()})
    title = f"SmolLM2-135M without {dropped} of its {of} attention sublayers, {count} prompts"
    draw(run.table(), title).savefig(Path(__file__).with_name("hero.png"))


if __name__ == "__main__":
    main(sys.argv[1])
