"""Figures drawn by another process while this one computes on.

The figures of a run follow from its files, so that the other process is told a folder and the name of what draws it, and nothing is pickled. It
yields to whoever computes. What it cannot do is drawn here in the end, where an error is raised as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from prunescope.runs.folder import open_run
from prunescope.runs.result import Draw

__all__ = ["Beside", "draw_folder"]

_NICE = 10


def draw_folder(name: str, folder: Path) -> None:
    """Draw the figures of a complete run folder into its ``figures``.

    Args:
        name: ``module:function`` of what draws, see `prunescope.runs.result.Draw`.
    """
    module, _, function = name.partition(":")
    run = open_run(folder)
    (folder / "figures").mkdir(exist_ok=True)
    getattr(importlib.import_module(module), function)(run.table(), run.info, run.samples(), folder / "figures")


class Beside:
    """Folders to draw. Leaving the ``with`` block stops the other process; `finish` before that waits until all are drawn."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        """Processor seconds of the other process."""
        self._waiting: deque[tuple[str, Path]] = deque()
        self._failed: list[tuple[str, Path]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._waiting.clear()
            self._close()
        if self._process is not None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join()
        if self._process is not None:
            for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process.wait()

    def start(self) -> None:
        """Start the other process now: what it imports is there by the time that there is something to draw."""
        with contextlib.suppress(OSError):  # tried again, and drawn here
            self._process = _start()

    def add(self, draw: Draw, folder: Path) -> None:
        """Draw the complete run folder with ``draw``, a function of a module."""
        with self._changed:
            self._waiting.append((f"{draw.__module__}:{draw.__qualname__}", folder))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._feed, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Draw here what the other process has not begun, the last first, and wait for it. Raises what drawing raises."""
        while (job := self._last()) is not None:
            draw_folder(*job)
        with self._changed:
            self._close()
        if self._thread is not None:
            self._thread.join()
        for job in self._failed:
            draw_folder(*job)

    def _close(self) -> None:
        self._closing = True
        self._changed.notify_all()

    def _last(self) -> tuple[str, Path] | None:
        with self._changed:
            return self._waiting.pop() if self._waiting else None

    def _feed(self) -> None:
        """In a thread: hand the folders to the other process, one after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    break
                job = self._waiting.popleft()
            if not self._drawn(*job):
                self._failed.append(job)
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.wait()

    def _drawn(self, name: str, folder: Path) -> bool:
        """Whether the other process drew this folder."""
        try:
            if self._process is None:
                self._process = _start()
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps([name, str(folder)]) + "\n")
            self._process.stdin.flush()
            told: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):  # it could not be started, or has died
            return False
        self.cpu_seconds = told["cpu_seconds"]
        return bool(told["drawn"])


def _start() -> subprocess.Popen[str]:
    package = str(Path(__file__).parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


def main(asked: IO[str], told: IO[str]) -> None:
    """The other process: a line for every folder, a line back."""
    importlib.import_module("prunescope.report.figures.style")  # matplotlib, while nothing waits for it
    importlib.import_module("pyarrow.parquet")
    for line in asked:
        name, folder = json.loads(line)
        drawn = True
        try:
            draw_folder(name, Path(folder))
        except Exception:  # drawn again by who asked, who says it
            drawn = False
        told.write(json.dumps({"drawn": drawn, "cpu_seconds": time.process_time()}) + "\n")
        told.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and stops this one
    if hasattr(os, "nice"):
        os.nice(_NICE)
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.stdin, sys.__stdout__)  # type: ignore[arg-type]
