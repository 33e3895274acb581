"""When another way to compute gives the same: bits but for single places of the dtype, or sums but for their order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["next_to", "same_sums"]

_MOVED = 2e-3  # share of the entries that may be the next number of their dtype


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
