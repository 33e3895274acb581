"""Work that waits for what comes next, so that one kernel can do both: a residual sum for its norm, a rotation for the cache.

Whoever defers hands out tensors that hold nothing yet. Any function of PyTorch, and any look at any tensor, first does the waiting work, unless it is
the one that was waited for and takes it. So nobody sees an empty tensor, and what nobody takes is done as it would have been.
"""

from __future__ import annotations

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
        global _current
        self.outer, _current = _current, self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global _current
        super().__exit__(*error)
        _current = self.outer
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


_current: Deferring | None = None


def current() -> Deferring | None:
    """The innermost block that is being run."""
    return _current


def take(result: Tensor) -> Waiting | None:
    """What is to make ``result``, if that waits; it is the caller's now. To be called before anything looks at a tensor."""
    if _current is None or _current.waiting is None or all(result is not held for held in _current.waiting.results):
        return None
    waiting, _current.waiting = _current.waiting, None
    return waiting
