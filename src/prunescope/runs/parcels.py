"""What a process found, on its way to another one of the same machine. No torch."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Parcel"]

_SMALL = 2**16  # bytes of buffers that go with the rest
_ALIGNED = 64  # bytes, of buffers in a file


@dataclass
class Parcel:
    """Unpickled it is ``value`` itself.

    Its large buffers go through a file in ``outbox``: a pipe takes 64 kB at a time, each of which waits for the lock of Python that the other
    process computes with.
    """

    value: Any
    outbox: Path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        buffers: list[pickle.PickleBuffer] = []
        content = pickle.dumps(self.value, 5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        if sum(map(len, raw)) >= _SMALL:
            with suppress(OSError):  # no room there
                return _unpacked, (content, _written(self.outbox, raw), [len(buffer) for buffer in raw])
        return pickle.loads, (pickle.dumps(self.value),)


def _written(folder: Path, buffers: Sequence[memoryview]) -> Path:
    path = folder / uuid.uuid4().hex
    try:
        with path.open("xb") as file:
            for buffer in buffers:
                file.write(buffer)
                file.write(bytes(-len(buffer) % _ALIGNED))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _unpacked(content: bytes, path: Path, sizes: Sequence[int]) -> Any:
    memory, buffers, start = np.fromfile(path, np.uint8), [], 0
    path.unlink()
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += size + -size % _ALIGNED
    return pickle.loads(content, buffers=buffers)
