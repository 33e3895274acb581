"""The factor of a damped Hessian, and of its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NotPositiveDefiniteError", "factorise", "inverse_factor", "split_product"]

_PANEL = 256
_BLOCKED = 8192  # columns from which a GPU factorises by blocks
_BLOCK, _UPDATED = 1024, 4096  # columns of a block, and of what one product updates
_DAMPING_STEPS = 3  # each ten times the one before


class NotPositiveDefiniteError(ArithmeticError):
    """The Hessian could not be factorised, not even with the highest damping."""


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """``R``, lower triangular, whose reversal in both axes is the ``U`` of ``U^T U = (H + damping * mean(diag H) * I)^-1``.

    Where an input is dead, its diagonal counts as the mean of the others.

    Args:
        hessian: ``(n, n)`` float32 or float64, symmetric; left as it is.
        damping: relative to the mean of the diagonal. Raised tenfold, at most twice, where H is not positive definite.
    Returns:
        R, and the damping that was used. One more matrix of H's size is all that is held.
    Raises:
        NotPositiveDefiniteError: no damping helped.
    """
    lower, used = factorise(hessian, damping)
    _invert_in_place(lower)
    return lower, used


def factorise(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor ``L`` of the damped H reversed in both axes, lower triangular; otherwise as `inverse_factor`, its inverse."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum() if not dead.all() else torch.ones_like(diagonal[0])
    for step in range(_DAMPING_STEPS):
        used = damping * 10**step
        shift = dead.flip(0) * mean + used * mean
        if hessian.is_cuda and hessian.dtype == torch.float32 and len(hessian) >= _BLOCKED:
            lower = hessian.flip(0, 1)
            lower.diagonal().add_(shift)
            if _factorise_by_blocks(lower):
                return lower, used
            del lower
        lower = hessian.flip(0, 1).mT  # symmetric; by columns, as LAPACK wants it, so that nothing is copied
        lower.diagonal().add_(shift)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return lower, used
        del lower
    raise NotPositiveDefiniteError


def _factorise_by_blocks(matrix: Tensor) -> bool:
    """Cholesky in place, ``_BLOCK`` columns at a time, most of it on a GPU's tensor cores; False where it failed. ``matrix`` (n, n) float32; in,
    the lower triangle counts; out, zeros are above the diagonal.

    A float32 is the sum of three bfloat16 (8 bits each), and products of these are exact. Panels take six products of the nine, which is float32;
    what they take from the columns to come takes three products of two parts each, 16 bits.
    """
    n = len(matrix)
    failed = []
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        corner, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        failed.append(info)
        matrix[start:stop, start:stop] = corner
        matrix[start:stop, stop:] = 0
        if stop == n:
            break
        unit = torch.eye(stop - start, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(corner, unit, upper=False)
        left, right = split_product(matrix[stop:, start:stop], inverse, 3)
        panel = torch.mm(left, right.T, out_dtype=torch.float32)
        matrix[stop:, start:stop] = panel
        left, right = split_product(panel, panel, 2)
        for low in range(0, n - stop, _UPDATED):
            high = min(low + _UPDATED, n - stop)
            part = matrix[stop + low :, stop + low : stop + high]
            torch.addmm(part, left[low:], right[low:high].T, alpha=-1, out_dtype=torch.float32, out=part)
    return not bool(torch.stack(failed).any()) and bool(torch.isfinite(matrix.diagonal()).all())


def split_product(left: Tensor, right: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices ``a, b`` with ``a b^T`` equal to ``left right^T`` to 8 bits a part: both are split into that many, and the products whose
    places together go beyond ``parts`` are left out. The smallest come first."""

    def split(whole: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for _ in range(parts):
            found.append(whole.bfloat16())
            whole = whole - found[-1].float()
        return found

    a, b = split(left), split(right)
    places = sorted(((i, j) for i in range(parts) for j in range(parts - i)), key=sum, reverse=True)
    return torch.cat([a[i] for i, _ in places], 1), torch.cat([b[j] for _, j in places], 1)


def _invert_in_place(lower: Tensor) -> None:
    """Invert a lower triangular matrix (zeros above the diagonal), a panel of rows at a time, most of it by matrix products."""
    n = len(lower)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        unit = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[start:stop, start:stop], unit, upper=False)
        for low in range(0, start, _PANEL):  # the inverse so far is lower triangular too
            high = low + _PANEL
            lower[start:stop, low:high] = -corner @ (lower[start:stop, low:start] @ lower[low:start, low:high])
        lower[start:stop, start:stop] = corner
