"""The picture of where the demo's time goes, in docs/speed.md: `python docs/make_demo.py prunescope-demo`, from its `demo.json` alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prunescope.report.figures.style import TRUTH, style


def draw(stages: list[dict[str, Any]]) -> Figure:
    """A bar a stage, in the order of the run: processor seconds of all threads, which a busy machine moves less than the clock's."""
    with style():
        figure = Figure(figsize=(7.2, 2.6), dpi=200, layout="constrained")
        axes = figure.subplots()
        names, seconds = [row["stage"] for row in stages], [row["cpu_seconds"] for row in stages]
        bars = axes.barh(names, seconds, color=TRUTH, height=0.7)
        axes.bar_label(bars, [f"{value:.0f} s" for value in seconds], padding=3, fontsize=7.5)
        axes.margins(x=0.08)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("processor seconds")
        axes.set_title(f"Where the demo's {sum(seconds):.0f} processor seconds go")
    return figure


def main(demo: str) -> None:
    stages = json.loads((Path(demo) / "demo.json").read_text("utf-8"))["stages"]
    draw(stages).savefig(Path(__file__).with_name("demo-stages.png"))


if __name__ == "__main__":
    main(sys.argv[1])
