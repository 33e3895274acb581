"""Which samples of a calibration text are held out, and which of its places are kept to measure an error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ONE_IN", "SAMPLED_ROWS", "held_out_samples", "picked_positions"]

ONE_IN = 4  # samples is held out
SAMPLED_ROWS = 1024  # of an input that are kept to measure a reconstruction error, where no Gram matrix is gathered


def held_out_samples(count: int) -> Tensor:
    """``(count,)`` bool, the samples of a text to judge by: one in four, of two or three the second."""
    return torch.arange(count) % ONE_IN == (ONE_IN - 1 if count >= ONE_IN else 1)


def picked_positions(samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Token positions of every sample whose rows are kept, about `SAMPLED_ROWS` in all, and how many positions each stands for.

    The first position stands for itself alone: in many models its activations are larger than all others together.
    """
    each = min(length - 1, max(1, math.ceil(SAMPLED_ROWS / samples)))
    others = (torch.arange(each) * (length - 1)) // each + 1 + (length - 1) // each // 2
    weights = torch.full((each,), (length - 1) / each)
    return torch.cat([torch.tensor([0]), others.clamp(max=length - 1)]), torch.cat([torch.ones(1), weights])
