"""One progress display for all commands: a bar with time left on a terminal, a line per stage elsewhere. Written to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["console", "progress"]

console = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show ``stage`` while the block runs; the function it gives advances by so many of ``total``."""
    if not sys.stderr.isatty():
        started = time.monotonic()
        yield lambda done: None
        console.print(f"{stage}: {time.monotonic() - started:.1f} s", markup=False)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage, total=total)
        yield lambda done: bar.update(task, advance=done)
