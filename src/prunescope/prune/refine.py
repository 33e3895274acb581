"""Refinement: what a method pruned, made to lose less of its layer's output, from the Gram matrix of the layer's inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from prunescope.prune.admm import Solver
from prunescope.prune.masks import Goal, lowest, lowest_per_group, lowest_per_row
from prunescope.prune.swaps import swap

__all__ = ["GRADUAL_STEPS", "SCANS", "STEPS", "Refine", "refine"]

Refine = Literal["swaps", "admm", "swaps-admm", "admm-gradual"]
SCANS, STEPS, GRADUAL_STEPS = 5, 20, 50


def refine(
    how: Refine,
    dense: Sequence[Tensor],
    pruned: Sequence[Tensor],
    gram: Tensor,
    goals: Sequence[Goal],
    *,
    damping: float,
    fit: bool,
    per_row: bool,
    steps: int | None = None,
    rounded: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> list[Tensor]:
    """Refine matrices that read the same input. As many weights of a row or group are zero as before; with ``admm-gradual``, of a matrix.

    No row's error ``(w - v) G (w - v)^T`` rises: a row that would lose by it stays as it was.

    Args:
        dense, pruned: each ``(out, in)``, before and after the method.
        gram: ``(in, in)``, sum of x x^T over calibration tokens; left as it is.
        goals: what each matrix was to lose.
        damping: of the mean of G's diagonal, added to it where the refined weights are found; the rows' errors are without it.
        fit: of swaps, whether a weight that comes back gets the value that fits best; else its dense one.
        per_row: of ``admm-gradual``, whether every row loses the same number.
        steps: scans of swaps, or steps of ADMM; None for 5 scans, 20 steps, or 50 where the mask grows.
        rounded: how the weights will be stored, so that errors are compared as they will be.
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    new = list(pruned)
    if how in ("swaps", "swaps-admm"):
        for i, (old, goal) in enumerate(zip(dense, goals, strict=True)):
            new[i], _ = swap(old, new[i], damped, of=goal.of, fit=fit, scans=steps or SCANS)
    if how != "swaps":
        solver = Solver(damped)
        for i, (old, goal) in enumerate(zip(dense, goals, strict=True)):
            if how == "admm-gradual":
                new[i] = solver.prune(old, _chooser(goal, per_row), steps or GRADUAL_STEPS)
            else:
                new[i] = solver.refit(old, new[i], steps or STEPS)
    if how == "admm-gradual" and not per_row:  # rows trade zeros with each other, so that a matrix stays or goes as one
        return [
            found if float(_errors(old, rounded(found), gram).sum()) < float(_errors(old, rounded(was), gram).sum()) else was
            for old, was, found in zip(dense, pruned, new, strict=True)
        ]  # fmt: skip
    return [
        torch.where((_errors(old, rounded(found), gram) < _errors(old, rounded(was), gram))[:, None], found, was)
        for old, was, found in zip(dense, pruned, new, strict=True)
    ]


def _errors(dense: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """``(out,)`` float64, squared error of each row."""
    lost = dense - new
    return ((lost @ gram) * lost).sum(1, dtype=torch.float64)


def _chooser(goal: Goal, per_row: bool) -> Callable[[Tensor, float], Tensor]:
    """The lowest scores, ``share`` of those that the goal names: of a group, a row or the matrix."""

    def choose(scores: Tensor, share: float) -> Tensor:
        if goal.of:
            going = lowest_per_group(scores, goal.keep, goal.of)
            count = round(share * goal.count(scores.numel()))
            return going & lowest(scores.masked_fill(~going, torch.inf), count)
        if per_row:
            return lowest_per_row(scores, round(share * goal.count(scores.shape[1])))
        return lowest(scores, round(share * goal.count(scores.numel())))

    return choose
