"""Structured pruning: whole MLP neurons by mean |W_down| x input norm, as the paper's code ranks them (arXiv 2603.24652)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunescope.prune.masks import lowest

__all__ = ["neuron_scores", "structured"]


def neuron_scores(down: Tensor, input_norm: Tensor) -> Tensor:
    """``(neurons,)`` float32: mean over outputs of |W_down|, times the norm of the neuron's activation.

    Args:
        down: ``(out, neurons)``, the projection that reads the neurons.
        input_norm: ``(neurons,)``, root mean square of each neuron's activation over calibration tokens.
    """
    return down.float().abs().mean(0) * input_norm.float()


def structured(down: Tensor, input_norm: Tensor, count: int) -> Tensor:
    """Indices of the neurons that stay, in order: all but the ``count`` with the lowest `neuron_scores`."""
    return torch.nonzero(~lowest(neuron_scores(down, input_norm), count)).flatten()
