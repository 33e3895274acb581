"""Figures of a run as the page holds them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from prunescope.runs.folder import Run

__all__ = ["images"]


def images(run: Run, name: str, draw: Callable[[Path], Iterable[Path]]) -> list[dict[str, str]]:
    """SVG in base64, each with what it shows: those of the run's folder, or drawn now where it was not finished or has none.

    Args:
        name: what the figures are of.
        draw: draws them into a folder, and gives the files.
    """
    there = sorted((run.folder / "figures").glob("*.svg")) if run.info.get("complete", True) else []
    with TemporaryDirectory(prefix="prunescope-") as folder:
        return [
            {
                "data": base64.b64encode(path.read_bytes()).decode("ascii"),
                "alt": f"{name}: {path.stem.replace('_', ' ')}",
            }
            for path in there or draw(Path(folder))
            if path.suffix == ".svg"
        ]
