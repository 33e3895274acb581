"""Wanda: weight times the norm of its input, compared within an output row (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunescope.prune.masks import Goal, lowest, lowest_per_group, lowest_per_row

__all__ = ["wanda", "wanda_scores"]


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """``|W| * norm of the input``, ``(out, in)`` float32. ``input_norm`` ``(in,)`` is the root mean square over calibration tokens."""
    return weight.abs().float() * input_norm.float()


def wanda(weight: Tensor, input_norm: Tensor, goal: Goal, *, variant: bool = False) -> Tensor:
    """Mask of the weights that go.

    Args:
        weight: ``(out, in)``.
        input_norm: ``(in,)``, of each input over the calibration tokens; its scale does not matter.
        goal: share, or N:M along the inputs.
        variant: one threshold for the matrix on the share of a row's total score that is lost, instead of the same number in every
            row (the paper's variant; the search for the threshold has this selection as its limit).
    Returns:
        ``(out, in)`` bool: floor(share x in) of every row, with ``variant`` floor(share x in x out) of the matrix.
    """
    scores = wanda_scores(weight, input_norm)
    if goal.of:
        return lowest_per_group(scores, goal.keep, goal.of)
    if variant:
        return lowest(_lost_share(scores), goal.count(weight.numel()))
    return lowest_per_row(scores, goal.count(weight.shape[1]))


def _lost_share(scores: Tensor) -> Tensor:
    """For each weight: the share of its row's total score that goes if it and everything below it in the row go."""
    ordered, order = torch.sort(scores, dim=1, stable=True)
    lost = ordered.double().cumsum(1)
    lost /= lost[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
    return torch.empty_like(lost).scatter_(1, order, lost)
