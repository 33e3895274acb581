"""Figure of a healing run: the loss of every step and the held-out divergence, over the tokens that were read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from prunescope.report.figures.style import ESTIMATE, FLOOR, TRUTH, drawable, save, style
from prunescope.report.names import short

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["draw_healing"]


def draw_healing(curves: pa.Table, record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``healing`` into ``folder``: KL of every step's text and of the held-out texts, the best check marked."""
    with style():
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axes = figure.subplots()
        tokens = np.cumsum(curves["tokens"].to_numpy()) / 1e3
        loss, own = curves["loss"].to_numpy(), curves["on_policy"].to_numpy(zero_copy_only=False)
        distils = np.array(curves["stage"].to_pylist()) == "distil"  # the loss of the first stage is no divergence
        for chosen, marker, label in (
            (distils & ~own, "-", "text of the dense model"),
            (distils & own, "--", "its own text"),
        ):
            if chosen.any():
                axes.plot(tokens[chosen], loss[chosen], marker, color=FLOOR, linewidth=0.7, label=f"loss, {label}")
        held_out = curves["held_out_kl"].to_numpy().astype(float)
        seen = np.isfinite(held_out)
        places, values = np.r_[0, tokens[seen]], np.r_[record["kl"]["before"], held_out[seen]]
        axes.plot(places, values, "o-", color=TRUTH, markersize=3, label="held-out texts")
        best = int(record["best_step"])
        axes.plot(tokens[best - 1] if best else 0, record["kl"]["best"], "D", color=ESTIMATE, label="kept")
        axes.set(xlabel="tokens trained on, thousands", ylabel="KL(teacher || student), nats a token", yscale="log")
        for way in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            way(FormatStrFormatter("%g"))
        axes.legend()
        axes.set_title(drawable(f"{short(str(record['config']['target']))}: healing"), parse_math=False)
        return save(figure, folder / "healing")
