"""Round to nearest: a matrix ``(out, in)`` to what a quantised format would hold of it, back in its own dtype.

No calibration, no packed weights: what comes back is what the package that owns the format gives when it dequantises its own weights, bit
for bit. These are torchao (``intN``: `IntxWeightOnlyConfig`, symmetric; ``fp8``: `Float8WeightOnlyConfig`, e4m3), bitsandbytes (``nf4``,
without double quantisation, arXiv 2305.14314) and ggml (GGUF's types, see `prunescope.models.ggml`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunescope.models import ggml

__all__ = ["FLOATING", "INTEGERS", "bits_per_weight", "round_to_nearest"]

INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
FLOATING = {"fp8": 8, "nf4": 4}
_SCALE_BITS = {
    "fp8": 32,
    "nf4": 32,
}  # as torchao and bitsandbytes keep them; integers take 16, as in GPTQ and AWQ checkpoints
_NF4_BLOCK = 64
_NF4 = (  # quantiles of a normal distribution, QLoRA appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def round_to_nearest(weight: Tensor, scheme: str, group: int | None = None) -> Tensor:
    """``weight`` (out, in), any float dtype, as ``scheme`` would give it back; a new tensor of the same shape, dtype and device.

    Args:
        scheme: int2 to int8, fp8, nf4, or a type of GGUF in small letters.
        group: weights along the input that share a scale, the last group of a row may be shorter; left out, a row (nf4: 64 weights). The
            blocks of nf4 run on over the ends of rows, as bitsandbytes has it. GGUF's types have their own.
    Raises:
        UserError: a type of GGUF whose quantiser is not installed.
    """
    if scheme == "nf4":
        return _by_groups(weight.reshape(1, -1), group or _NF4_BLOCK, _nf4).view_as(weight)
    if scheme == "fp8":
        return _by_groups(weight, group, _fp8)
    if scheme in INTEGERS:
        bits = INTEGERS[scheme]
        return _by_groups(weight, group, lambda part: _integer(part, bits))
    return ggml.round_trip(weight, scheme)


def bits_per_weight(width: int, scheme: str, group: int | None = None) -> float:
    """Bits that ``scheme`` stores of one weight in a row of ``width``, scales included."""
    if scheme in INTEGERS or scheme in FLOATING:
        group = group or (_NF4_BLOCK if scheme == "nf4" else width)
        groups = width / group if scheme == "nf4" else -(-width // group)
        return (INTEGERS | FLOATING)[scheme] + _SCALE_BITS.get(scheme, 16) * groups / width
    return ggml.bits_per_weight(width, scheme)


def _by_groups(weight: Tensor, group: int | None, round_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of rows to every group of every row; what is left at the end of a row is a group of its own."""
    rows, width = weight.shape
    group = min(group or width, width)
    whole = width - width % group
    parts = [round_rows(weight[:, :whole].reshape(-1, group)).view(rows, whole)]
    if whole < width:
        parts.append(round_rows(weight[:, whole:]))
    return torch.cat(parts, 1)


def _integer(rows: Tensor, bits: int) -> Tensor:
    """Symmetric, a scale a row of ``rows``: the range -2^(b-1) ... 2^(b-1) - 1 is spread over twice the largest magnitude."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = rows.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    scale = scale.clamp(min=torch.finfo(rows.dtype).smallest_normal)
    steps: Tensor = (rows * (1.0 / scale)).round()
    return steps.clamp_(low, high).mul_(scale)


def _fp8(rows: Tensor) -> Tensor:
    """e4m3, the largest magnitude of a row at 448; the scale is found in the weight's dtype and applied in float32."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (rows.abs().amax(-1, keepdim=True) / largest).float()
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros, where torchao divides by zero
    scaled = (rows.float() / scale).clamp(-largest, largest)
    return (scaled.to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)


def _nf4(rows: Tensor) -> Tensor:
    """The nearest of 16 quantiles of a normal distribution, scaled to the largest magnitude of the block."""
    code = torch.tensor(_NF4, device=rows.device)
    exact = rows.float()
    largest = exact.abs().amax(-1, keepdim=True)
    scaled = (exact * (1.0 / largest.clamp(min=1e-38))).clamp(-1, 1)
    nearest = code[torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)]
    return (nearest * largest).to(rows.dtype)
