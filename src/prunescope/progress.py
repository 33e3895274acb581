"""One progress display for all commands: a bar with time left on a terminal, a line per stage elsewhere. Written to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Advance", "console", "progress"]

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Advance:
    """Call it to advance by so many; ``note`` says what is worked on."""

    def __init__(self, update: Callable[..., None] | None = None) -> None:
        self._update = update

    def __call__(self, done: int) -> None:
        if self._update is not None:
            self._update(advance=done)

    def note(self, text: str) -> None:
        if self._update is not None:
            self._update(note=text)


@contextmanager
def progress(stage: str, total: int) -> Iterator[Advance]:
    """Show ``stage`` while the block runs; what it gives advances by so many of ``total``."""
    if not sys.stderr.isatty():
        started = time.monotonic()
        yield Advance()
        console.print(f"{stage}: {time.monotonic() - started:.1f} s", markup=False)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage, total=total, note="")
        yield Advance(lambda **changes: bar.update(task, **changes))
