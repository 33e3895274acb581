"""Work that waits for what comes next, so that one kernel can do both: a residual sum for its norm, a rotation for the cache.

Whoever defers hands out tensors that hold nothing yet. Any function of PyTorch that its function modes see, and any look at any tensor in the same thread,
first does the waiting work, unless it is the one that was waited for and takes it. So nobody sees an empty tensor, and what nobody takes is done as it
would have been. Scripted and compiled code is not seen, nor another thread: a model of such modules defers nothing (`fusing.fused`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Deferring", "Waiting", "current", "take"]

_SUMS = (Tensor.__add__, Tensor.add, torch.add)


class Waiting(NamedTuple):
    """Tensors that were handed out, what they are to be made of, and what makes them."""

    results: tuple[Tensor, ...]
    given: Any
    finish: Callable[[], None]


class Deferring(TorchFunctionMode):
    """Within the block sums of two equal shapes wait, if their rows are as wide as one of the norms that could take them."""

    def __init__(self, widths: Collection[int]) -> None:
        super().__init__()
        self.widths = widths
        self.waiting: Waiting | None = None

    def __enter__(self) -> Deferring:
        self.outer, _HERE.current = current(), self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _HERE.current = self.outer
        self.finish()

    def finish(self) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.finish()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.finish()
        if func in _SUMS and len(args) == 2 and not kwargs and self._waits(*args):
            total = torch.empty_like(args[0])
            self.waiting = Waiting((total,), args, partial(_add, args[0], args[1], total))
            return total
        return func(*args, **(kwargs or {}))

    def _waits(self, one: Any, other: Any) -> bool:
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.shape == other.shape
            and one.dim() == 3
            and one.shape[-1] in self.widths
            and one.dtype == other.dtype
            and one.device == other.device
            and one.is_contiguous()
            and other.is_contiguous()
            and not torch.is_grad_enabled()
        )


def _add(one: Tensor, other: Tensor, total: Tensor) -> None:
    torch.add(one, other, out=total)


_HERE = threading.local()


def current() -> Deferring | None:
    """The innermost block that this thread runs."""
    return getattr(_HERE, "current", None)


def take(result: Tensor) -> Waiting | None:
    """What is to make ``result``, if that waits; it is the caller's now. To be called before anything looks at a tensor."""
    block = current()
    if block is None or block.waiting is None or all(result is not held for held in block.waiting.results):
        return None
    waiting, block.waiting = block.waiting, None
    return waiting
