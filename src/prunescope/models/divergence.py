"""The one Kullback-Leibler divergence of two rows of logits that may be almost equal, in log space: what `compare` reports and `prune` chooses by.

It stands below both, since they do not import each other. Precision is that of `prunescope.compare.metrics`, whose tests hold it to its bounds.
"""

from __future__ import annotations

from math import factorial

import torch
from torch import Tensor

__all__ = ["excess", "kl_divergence", "logits_kl", "lowered_exp"]


def excess(p: Tensor, x: Tensor, tilted: Tensor) -> Tensor:
    """``sum p (e^x - 1 - x)`` over the last dimension, given ``tilted = p e^x``; ``(rows,)`` float64.

    Every term is >= 0. Below |x| = 1/2 the power series is summed, above it ``tilted - p - p x`` loses nothing.
    """
    near = x.clamp(-0.5, 0.5)
    series = torch.full_like(x, 1 / factorial(_SERIES[x.dtype]))
    for k in range(_SERIES[x.dtype] - 1, 1, -1):
        series.mul_(near).add_(1 / factorial(k))
    series.mul_(near).mul_(near).mul_(p)
    far = (tilted - p).addcmul_(p, x, value=-1)
    is_near = (0.5 - x.abs()).sign_().clamp_(min=0)  # a float mask: comparisons and `where` are slow on a CPU
    return torch.lerp(far, series, is_near).sum(-1).double().clamp_(min=0)


_SERIES = {torch.float32: 8, torch.float64: 14}  # the last power of x that still matters at |x| = 1/2


def kl_divergence(
    p: Tensor, log_p: Tensor, shift: Tensor, peak: Tensor, log_mass_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p || q) for ``log q - log p = shift - log_mass_ratio``, all over the last dimension.

    With x = shift - E_p[shift] the identity KL = log E_p[e^x] holds, and E_p[x] = 0 turns it into
    log(1 + E_p[e^x - 1 - x]): a sum of terms that are >= 0. The mean is taken relative to the most likely token, so that it is
    exact also where p is nearly one-hot. Where KL > 1 the plain ``log_mass_ratio - E_p[shift]`` is just as good and cannot overflow.

    Args:
        p, log_p, shift: ``(rows, V)``; shift is overwritten.
        peak: ``(rows, 1)`` int64, argmax of p.
        log_mass_ratio: ``(rows, 1)`` float64, log of (normaliser of q / normaliser of p), in the units of shift.
    Returns:
        KL in nats ``(rows,)`` float64, and log q - log p ``(rows, V)``.
    """
    anchor = shift.gather(-1, peak)
    x = shift.sub_(anchor)
    mean = (p * x).sum(-1, keepdim=True)
    x = x.sub_(mean)
    plain = (log_mass_ratio - anchor.double() - mean.double())[:, 0]
    near = torch.log1p(excess(p, x, lowered_exp(log_p + x)))
    kl = torch.where(plain > 1, plain, near)
    return kl, x - kl[:, None].to(x.dtype)


def lowered_exp(x: Tensor) -> Tensor:
    """e^x, but never a denormal number, which costs a CPU ten times an ordinary one; what is added is far below any rounding."""
    return x.clamp(min=_LOWEST[x.dtype]).exp_()


_LOWEST = {torch.float32: -60.0, torch.float64: -600.0}


def logits_kl(z: Tensor, z_target: Tensor) -> Tensor:
    """KL(softmax(z) || softmax(z_target)) in nats of logits ``(rows, V)`` in float32 or float64; ``(rows,)`` float64."""
    log_p = torch.log_softmax(z, -1)
    log_mass_ratio = (z_target.logsumexp(-1, keepdim=True) - z.logsumexp(-1, keepdim=True)).double()
    kl, _ = kl_divergence(lowered_exp(log_p), log_p, z_target - z, z.argmax(-1, keepdim=True), log_mass_ratio)
    return kl
