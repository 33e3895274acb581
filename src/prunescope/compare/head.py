"""The map from a residual stream to logits, ``z = W h``: exact products, a tile of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Head", "on_tensor_cores", "vocab_tile"]


@dataclass(frozen=True)
class Head:
    """The map from a residual stream to logits: ``z = cap(scale * (W norm(h) + bias))``.

    ``norm`` is the final norm, in float32 or better, for the `final-norm` lens and None for the `raw` lens; scale and soft-capping belong to
    the architecture and apply in both.
    """

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, h: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Logits ``(rows, V)`` in ``dtype`` of ``h`` (rows, d), a tile of the vocabulary at a time.

        Residual streams hold a few huge entries, and logits are small sums of large terms: a float32 product of SmolLM2's streams is
        off by 1e-3, and a KL of 0.1 by 1e-3 of itself. So the product is taken in float64 wherever that costs at most twice as
        much (`_product_dtype`), and rounded once. A head in half precision on a GPU is multiplied on its tensor cores: the
        products are exact there, and summed in float32.

        Args:
            out: where to write, ``(rows, V)`` of ``dtype``.
        """
        h = self.norm(h.to(dtype)) if self.norm else h
        z = h.new_empty(h.shape[0], self.vocab_size, dtype=dtype) if out is None else out
        if dtype == torch.float32 and on_tensor_cores(h, self.weight):
            _half_product(h, self.weight, z)
            self._finish(z, self.bias)
            return z
        product = torch.float64 if dtype == torch.float64 else _product_dtype(h.device)
        h = h.to(product)
        tile = vocab_tile(self)
        for start in range(0, self.vocab_size, tile):
            part = h @ self.weight[start : start + tile].to(product).T
            self._finish(part, None if self.bias is None else self.bias[start : start + tile])
            z[:, start : start + tile] = part
        return z

    def _finish(self, z: Tensor, bias: Tensor | None) -> None:
        """Bias, scale and soft-capping, in place."""
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)


def on_tensor_cores(h: Tensor, weight: Tensor) -> bool:
    """Whether W h can be had from exact products of half-precision numbers: h has W's dtype, or can be split into three bfloat16 parts."""
    return weight.is_cuda and (
        weight.dtype == torch.bfloat16 or (weight.dtype == torch.float16 and h.dtype == torch.float16)
    )


def _half_product(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = h W^T`` in float32 from half-precision operands; a wider h as the sum of three parts of 8 bits, the smallest first."""
    parts = [h]
    if h.dtype != weight.dtype:
        rest = h.float()
        parts = []
        for _ in range(3):
            parts.insert(0, rest.to(weight.dtype))
            rest = rest - parts[0].float()
    torch.mm(parts[0], weight.T, out_dtype=torch.float32, out=out)
    for part in parts[1:]:
        torch.addmm(out, part, weight.T, out_dtype=torch.float32, out=out)


def _product_dtype(device: torch.device) -> torch.dtype:
    """float64 on a CPU and on GPUs with full-rate float64 (A100, H100 and their kin), float32 elsewhere."""
    full_rate = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
    )
    return torch.float64 if full_rate else torch.float32


def vocab_tile(head: Head) -> int:
    """Tokens of the vocabulary projected at a time: as many as fit into 16 MB of float64 weights; on a CPU at most 1536, so that the float64
    product is still in the cache when it is rounded (3640 of SmolLM2's took 1.35 times as long)."""
    tile = max(256, 2**21 // head.weight.shape[1])
    return min(head.vocab_size, tile if head.weight.is_cuda else min(tile, 1536))
