"""Hidden states that stay on a GPU, and the file of them from which an interrupted run goes on, written in the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.files import replacing

__all__ = ["Away", "Conditions", "Keeper"]


class Away:
    """Brings tensors to the host, one after the other, into one pinned buffer and on a stream of their own."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._side: Any = None

    def start(self, value: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor that nobody changes; what was begun before must have been used.

        Returns:
            A function that waits for the copy and gives it.
        """
        if self._buffer.shape != value.shape or self._buffer.dtype != value.dtype:
            self._buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        buffer = self._buffer
        if not value.is_cuda:
            buffer.copy_(value)
            return lambda: buffer
        self._side = self._side or torch.cuda.Stream(value.device)
        self._side.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._side):
            buffer.copy_(value, non_blocking=True)
        value.record_stream(self._side)
        copied = torch.cuda.Event()
        copied.record(self._side)

        def arrived() -> Tensor:
            copied.synchronize()
            return buffer

        return arrived


class Conditions:
    """What must hold of tensors on one device, looked at when it is known: a GPU that is asked at once is waited for."""

    def __init__(self) -> None:
        self._new: list[tuple[Tensor, Exception]] = []
        self._asked: list[tuple[Tensor, Any, list[Exception]]] = []

    def require(self, flag: Tensor, error: Exception) -> None:
        """``flag`` ``()`` must be true, or ``error`` is raised by `look`."""
        self._new.append((flag, error))

    def ask(self) -> Tensor | None:
        """Close a group of what was required since the last. Returns whether all of it holds, ``()``, or None if there is nothing."""
        if not self._new:
            return None
        flags = torch.stack([flag for flag, _ in self._new])
        told = torch.cuda.Event() if flags.is_cuda else None
        host = flags.to("cpu", non_blocking=flags.is_cuda)
        if told is not None:
            told.record(torch.cuda.current_stream(flags.device))
        self._asked.append((host, told, [error for _, error in self._new]))
        self._new = []
        return flags.all()

    def look(self, left: int = 0) -> None:
        """Wait for all groups but the last ``left``. Raises the error of the first condition that does not hold."""
        if not left:
            self.ask()
        while len(self._asked) > left:
            host, told, errors = self._asked.pop(0)
            if told is not None:
                told.synchronize()
            for holds, error in zip(host.tolist(), errors, strict=True):
                if not holds:
                    raise error


class Keeper:
    """Writes states to a file while the next blocks run, from a buffer of its own.

    A disk may take longer for them than a block takes: what is offered while the file before is being written is left out, so that an
    interrupted run may have to go some blocks further back.

    Args:
        file: where the states in front of a block are kept, by its number.
    """

    def __init__(self, file: Callable[[int], Path]) -> None:
        self.file = file
        self.before: Callable[[], None] | None = None  # called by the thread that writes, before it does
        self._pool: ThreadPoolExecutor | None = None
        self._task: Future[None] | None = None
        self._away = Away()
        self._kept: int | None = None

    def offer(self, layer: int, states: Sequence[Tensor], *, good: Tensor | None = None, must: bool = False) -> None:
        """States of one dtype in front of block ``layer``; they may be written to as soon as this returns.

        Args:
            good: whether they may be kept, ``()``, if that is to be known first.
            must: wait for the file before rather than leave these out.
        """
        if self._task is not None and not self._task.done() and not must:
            return
        self.finish()
        flag = torch.ones((), dtype=torch.bool, device=states[0].device) if good is None else good
        parts = [part.detach().flatten().view(torch.uint8) for part in states]
        arrived = self._away.start(torch.cat([*parts, flag.view(1).view(torch.uint8)]))
        self._pool = self._pool or ThreadPoolExecutor(1, "prunescope-keeper")
        self._task = self._pool.submit(self._write, layer, arrived)

    def _write(self, layer: int, arrived: Callable[[], Tensor]) -> None:
        whole = arrived()
        if not whole[-1]:
            return
        if self.before is not None:
            self.before()
        with replacing(self.file(layer)) as beside, beside.open("wb") as file:
            file.write(memoryview(whole[:-1].numpy()))  # type: ignore[arg-type]
        before, self._kept = self._kept, layer
        if before is not None and before != layer:
            self.file(before).unlink(missing_ok=True)

    def finish(self) -> None:
        """Wait for what is being written. Raises what writing raised."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def leave(self) -> None:
        """Wait until nothing is being written, whatever writing raised: for a run that ends by another error."""
        if self._task is not None:
            wait([self._task])

    def begin(self, layer: int) -> None:
        """There is a file of the states in front of block ``layer``, which the next one replaces."""
        self._kept = layer

    def close(self) -> None:
        """Remove the file."""
        self.finish()
        if self._kept is not None:
            self.file(self._kept).unlink(missing_ok=True)
