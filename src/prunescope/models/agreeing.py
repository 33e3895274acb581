"""When another way to compute gives the same: bits but for single places of the dtype, or sums but for their order; and where kernels are tried for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["kernels_run", "next_to", "same_sums", "tried_once"]

_MOVED = 2e-3  # share of the entries that may be the next number of their dtype
_TRIED: dict[tuple[Any, ...], bool] = {}  # in this process


def kernels_run(device: torch.device) -> bool:
    """Whether Triton's kernels can be tried there."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def next_to(found: Tensor, expected: Tensor, size: Tensor | None = None) -> bool:
    """The same bits but for a few entries, which are off by one place; in float32 all may be off by some. ``size``, if given, is the magnitude of
    what was added up to the entries: what is off by its rounding in float32 is the same."""
    off = (found.double() - expected.double()).abs()
    if size is not None:
        off = (off - 4 * torch.finfo(torch.float32).eps * size.double()).clamp(min=0)
    eps = torch.finfo(expected.dtype).eps
    if expected.dtype == torch.float32:
        return bool((off <= 4 * eps * expected.double().abs()).all())
    few = max(1.0, _MOVED * expected.numel())
    return bool((off <= 2 * eps * expected.double().abs()).all()) and int((off > 0).sum()) <= few


def same_sums(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Rounded once, from sums in float32 that may have another order; ``size`` is the sum of the terms' magnitudes."""
    bound = 2 * torch.finfo(expected.dtype).eps * expected.float().abs() + 2e-6 * size
    return bool(((found.float() - expected.float()).abs() <= bound).all())


@torch.no_grad()
def tried_once(key: tuple[Any, ...], tried: Callable[[], bool]) -> bool:
    """What ``tried`` says, asked once for a key, and not while a graph is captured."""
    if key not in _TRIED:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        try:
            _TRIED[key] = tried()
        except Exception:  # a compiler that is missing, or a kernel that does not fit there
            _TRIED[key] = False
    return _TRIED[key]
