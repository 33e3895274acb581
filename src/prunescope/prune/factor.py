"""The factor of a damped Hessian, and of its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NotPositiveDefiniteError", "factorise", "inverse_factor"]

_PANEL = 256
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
        lower = hessian.flip(0, 1).mT  # symmetric; by columns, as LAPACK wants it, so that nothing is copied
        lower.diagonal().add_(dead.flip(0) * mean).add_(used * mean)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return lower, used
        del lower
    raise NotPositiveDefiniteError


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
