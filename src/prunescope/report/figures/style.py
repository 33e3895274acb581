"""What all figures share: the look, names that fit, SVG beside PNG. Imports neither torch nor transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import matplotlib as mpl
import matplotlib.text
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ESTIMATE", "FLOOR", "SPACES", "TRUTH", "also_pdf", "by", "drawable", "save", "style"]

SPACES = {
    "h": ("#0072B2", "hidden state h", "o"),
    "z": ("#E69F00", "logits z", "s"),
    "p": ("#009E73", "probabilities p", "^"),
}  # Okabe-Ito
TRUTH, ESTIMATE, FLOOR = "#0072B2", "#D55E00", "#888888"


def by(rows: pa.Table, key: str, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values of ``key`` with the smallest, mean and largest ``column`` of each."""
    found = rows.group_by(key).aggregate([(column, "min"), (column, "mean"), (column, "max")]).sort_by(key)
    names = (key, f"{column}_min", f"{column}_mean", f"{column}_max")
    low_to_high = tuple(found[name].to_numpy().astype(float) for name in names)
    return low_to_high


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())


def drawable(text: str) -> str:
    """With a sign for every character that DejaVu Sans Mono lacks, and for line breaks."""
    signs = {"\n": "\u21b5", "\t": " "}
    return "".join(signs.get(c, c if c.isprintable() and ord(c) in _glyphs() else "\u00b7") for c in text)


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for the length of a ``with`` block.

    matplotlib parses the powers of ten beside an axis anew for every SVG, since each has a `TextToPath` of its own.
    """
    with (
        patch.object(matplotlib.text, "TextToPath", lambda: text_to_path),
        mpl.rc_context({
            "font.size": 8, "axes.titlesize": 8.5, "axes.titley": 1.0, "figure.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 7.5, "legend.frameon": False,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#DDDDDD",
            "lines.linewidth": 1.2, "svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "prunescope", "figure.dpi": 100,
        }),
    ):  # fmt: skip
        yield


_PDF = ContextVar("_PDF", default=False)


@contextmanager
def also_pdf() -> Iterator[None]:
    """Inside this ``with`` block `save` writes PDF too."""
    token = _PDF.set(True)
    try:
        yield
    finally:
        _PDF.reset(token)


def save(figure: Figure, path: Path) -> list[Path]:
    """As SVG and as PNG, and as PDF inside `also_pdf`; returns the paths. A dot in the name is no suffix."""
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png", *(["pdf"] if _PDF.get() else []))]
    _lay_out(figure)
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=200)
    for file in files[2:]:
        figure.savefig(file, metadata={"CreationDate": None})
    return files


def _lay_out(figure: Figure) -> None:
    """Find the places as for an SVG and take the engine away: `savefig` draws the whole figure once for it to work, and would do so for every file."""
    engine = figure.get_layout_engine()
    if engine is None:
        return
    before = figure.dpi
    FigureCanvasSVG(figure)
    figure.dpi = FigureCanvasSVG.fixed_dpi
    engine.execute(figure)
    figure.dpi = before
    figure.set_layout_engine(None)
