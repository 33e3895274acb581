"""Reading a GGUF file as transformers does, its header parsed once.

transformers opens a file three times, for config, weights and tokenizer, and gguf's reader makes a numpy array of every token and every merge
through a memory map's own slicing; it then makes the table of names anew for every module. For a vocabulary of 49,152 tokens that is ten seconds.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

__all__ = ["parsed_once"]


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside the block, each GGUF file that transformers opens is parsed once; what it finds is the same.

    Python does not look for unreachable objects meanwhile: a vocabulary is a million objects that stay, and each search walks over them.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    once = functools.cache(_quick_reader(gguf.GGUFReader))

    def reader(path: Any, mode: str = "r") -> Any:
        file = Path(path).stat()
        return once(str(path), mode, file.st_mtime_ns, file.st_size)

    with (
        patch.object(gguf, "GGUFReader", reader),
        patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        patch.object(reading, "_gguf_parse_value", _quick_value(reading._gguf_parse_value)),
        _uncollected(),
    ):
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _quick_reader(base: type[Any]) -> Callable[..., Any]:
    class Reader(base):
        """Slices a plain array: a memory map makes a new map of every slice, at ten times the cost."""

        plain: Any = None

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
            if self.plain is None:
                self.plain = np.asarray(self.data)
            count = int(count)
            found = self.plain[offset : offset + _size(dtype) * count].view(dtype)[:count]
            order = self.byte_order if override_order is None else override_order
            return found if order == "I" else found.view(found.dtype.newbyteorder(order))

    return lambda path, mode, *version: Reader(path, mode)


@functools.cache
def _size(dtype: Any) -> int:
    return int(np.dtype(dtype).itemsize)


def _quick_value(parse: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def value(found: Any, kinds: Any) -> Any:
        text = isinstance(kinds, list) and kinds and kinds[-1] == 8 and (len(kinds) == 1 or kinds[0] == 9)
        return found.tobytes().decode() if text and len(kinds) <= 2 else parse(found, kinds)

    return value
