"""ADMM: the weights that a mask should have, for all rows with one factorisation (Boza, arXiv 2401.02938).

Minimised is ``||(W - V) X||^2`` over V that is zero where the mask says so. Inputs are scaled to a unit diagonal of H, and ``(H + I)^-1`` serves
all rows and steps: V' = (W H + Z - U)(H + I)^-1, Z = V' + U with its zeros set, U = U + V' - Z. Where it comes to rest, U is the gradient at the
zeros, so that it starts at the gradient there instead of at zero.

With a gradually fixed mask, the zeros of a step are the smallest of ``|V' + U|`` in scaled inputs, and grow with the cube of the step until they
are all there; the rest of the steps are for the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Solver"]

_GROWING = 0.75  # of the steps, in which the mask grows


class Solver:
    """The inverse that all matrices share that read the same input.

    Args:
        hessian: ``(in, in)`` float32 or float64, symmetric, positive definite but for dead inputs; left as it is.
    """

    def __init__(self, hessian: Tensor) -> None:
        diagonal = hessian.diagonal()
        self.scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
        self.hessian = hessian / self.scale / self.scale[:, None]
        shifted = self.hessian.clone()
        shifted.diagonal().add_(1)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))

    def refit(self, dense: Tensor, pruned: Tensor, steps: int) -> Tensor:
        """Weights ``(out, in)`` for the zeros of ``pruned``: after enough steps the least squares of every row."""
        return self._run(dense, pruned, steps, lambda step, values: pruned == 0)

    def prune(self, dense: Tensor, choose: Callable[[Tensor, float], Tensor], steps: int) -> Tensor:
        """A mask that grows with the weights: ``choose(scores, share)`` gives the zeros, ``share`` of those that there shall be at the end."""
        growing = max(1, round(_GROWING * steps))
        gone = dense == 0  # they go first, and stay away
        mask = torch.zeros_like(dense, dtype=torch.bool)

        def zeros(step: int, values: Tensor) -> Tensor:
            nonlocal mask
            if step < growing:
                mask = choose(values.abs().masked_fill(gone, 0.0), ((step + 1) / growing) ** 3)
            return mask | gone

        return self._run(dense, dense, steps, zeros)

    def _run(self, dense: Tensor, start: Tensor, steps: int, zeros: Callable[[int, Tensor], Tensor]) -> Tensor:
        target = dense * self.scale
        gradient = target @ self.hessian  # of V = 0, downwards
        z = start * self.scale
        u = torch.where(start == 0, gradient - z @ self.hessian, 0.0)
        for step in range(steps):
            values = (gradient + z - u) @ self.inverse
            values += u
            z = values.masked_fill(zeros(step, values), 0.0)
            u = values - z
        return z / self.scale
