"""The terminal's table and the figures of a divergence run, from rows that no model computed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_divergence import made_up

from prunescope.compare.divergence_summary import divergence_summary, worst_passages
from prunescope.report.figures.divergence import draw_divergence
from prunescope.report.terminal.divergence import kl_lines, show_divergence


@pytest.fixture(scope="module")
def info() -> dict[str, Any]:
    rows = made_up()
    chunks = {number: [0] * 300 for number in range(4)}
    return {
        "config": {"dense": "base", "target": "quant:q4_0", "context": 200, "metric_temperature": 1.0},
        "noise_floor": {"floor": {"kl_dense_target": 1e-9}},
        "like": "between q4_k and q3_k",
        "worst": worst_passages(rows, chunks, str, 2),
        **divergence_summary(rows),
    }


def test_lines_have_llama_cpps_names_and_units(info: dict[str, Any]) -> None:
    """Catches shares that are printed as percent of percent, and a row that is left out."""
    lines = {name: value for _, section in kl_lines(info["table"]) for name, value in section}
    mean, error = info["table"]["kl_dense_target"]["mean"]
    assert lines["Mean KLD"].split() == [f"{mean:.6f}", "±", f"{error:.6f}"]
    share, error = info["table"]["same_top"]
    assert lines["Same top p"].split() == [f"{100 * share:.3f}", "±", f"{100 * error:.3f}", "%"]
    assert lines["99.9% Δp"].split() == [f"{100 * info['table']['dp']['p99.9']:.3f}", "%"]
    assert {"Maximum KLD", "Median KLD", "0.1% KLD", "Minimum KLD", "75.0% Δp", "25.0% Δp", "RMS Δp"} <= set(lines)


def test_everything_is_shown(info: dict[str, Any]) -> None:
    """Slices, positions, confidence, rungs and passages. Catches a section that is skipped, and brackets in a text read as markup."""
    screen = io.StringIO()
    show_divergence(info, Console(file=screen, width=120))
    shown = screen.getvalue()
    for words in (
        "base (base) against quant:q4_0 (Q): 400 scored tokens in 4 chunks of 200", "between q4_k and q3_k of this model's own ladder",
        "resampled by chunk", "by slice", "by position in the chunk", "by the dense model's confidence", "0.99 - 1", "target at '[",
    ):  # fmt: skip
        assert words in shown, words


def test_figures_are_drawn(info: dict[str, Any], tmp_path: Path) -> None:
    written = draw_divergence(made_up(), info, [], tmp_path)
    assert {path.stem for path in written} == {"divergence_spread", "divergence_groups"}
    assert {path.suffix for path in written} == {".svg", ".png"} and all(path.stat().st_size > 5000 for path in written)
