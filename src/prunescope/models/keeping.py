"""Hidden states that stay on a GPU, and the file of them from which an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.files import replacing

__all__ = ["Keeper"]


class Keeper:
    """Writes states to a file while the next blocks run, from a buffer of its own.

    A disk may take longer for them than a block takes: what is offered while the file before is being written is left out, so that an
    interrupted run may have to go some blocks further back.

    Args:
        file: where the states in front of a block are kept, by its number.
    """

    def __init__(self, file: Callable[[int], Path]) -> None:
        self.file = file
        self._pool: ThreadPoolExecutor | None = None
        self._task: Future[None] | None = None
        self._buffer: Tensor | None = None
        self._kept: int | None = None

    def offer(self, layer: int, states: Sequence[Tensor], *, must: bool = False) -> None:
        """States in front of block ``layer``; they may be written to as soon as this returns.

        Args:
            must: wait for the file before rather than leave these out.
        """
        if self._task is not None and not self._task.done() and not must:
            return
        self.finish()
        device = states[0].device
        if self._buffer is None:
            nbytes = sum(part.numel() * part.element_size() for part in states)
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        at = 0
        for part in states:
            flat = part.detach().contiguous().flatten().view(torch.uint8)
            self._buffer[at : at + len(flat)].copy_(flat, non_blocking=True)
            at += len(flat)
        copied = torch.cuda.Event() if device.type == "cuda" else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(device))
        self._pool = self._pool or ThreadPoolExecutor(1, "prunescope-keeper")
        self._task = self._pool.submit(self._write, layer, self._buffer, copied)

    def _write(self, layer: int, buffer: Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        with replacing(self.file(layer)) as beside, beside.open("wb") as file:
            file.write(memoryview(buffer.numpy()))  # type: ignore[arg-type]
        before, self._kept = self._kept, layer
        if before is not None and before != layer:
            self.file(before).unlink(missing_ok=True)

    def finish(self) -> None:
        """Wait for what is being written. Raises what writing raised."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def begin(self, layer: int) -> None:
        """There is a file of the states in front of block ``layer``, which the next one replaces."""
        self._kept = layer

    def close(self) -> None:
        """Remove the file."""
        self.finish()
        if self._kept is not None:
            self.file(self._kept).unlink(missing_ok=True)
