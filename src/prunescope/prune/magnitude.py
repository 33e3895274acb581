"""Magnitude pruning: the smallest weights of each matrix go (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from torch import Tensor

from prunescope.prune.masks import Goal, lowest, lowest_per_group

__all__ = ["magnitude"]


def magnitude(weight: Tensor, goal: Goal) -> Tensor:
    """Mask of the weights that go.

    Args:
        weight: ``(out, in)``.
        goal: share of the whole matrix, or N:M along the inputs.
    Returns:
        ``(out, in)`` bool.
    """
    scores = weight.abs().float()
    return lowest_per_group(scores, goal.keep, goal.of) if goal.of else lowest(scores, goal.count(weight.numel()))
