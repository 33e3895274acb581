"""Checkpoints whose weights are packed: GPTQ, AWQ, bitsandbytes, torchao, compressed-tensors, FP8, MXFP4.

transformers and the package that owns the format load them; here is what they have in common. A tensor counts as packed if it is not a plain
one of floating point numbers of 16 bits or more; packages keep packed tensors as parameters or as buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError

__all__ = ["check_head", "format_of", "is_finite", "is_packed", "named_tensors", "nonzero", "refuse_packed"]

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_packed(weight: Tensor) -> bool:
    """Whether ``weight`` is held in a quantised format, so that its numbers are not those that it stands for."""
    return weight.dtype not in _PLAIN or type(weight.data) is not Tensor or hasattr(weight, "quant_state")


def is_finite(weight: Tensor) -> bool:
    """Whether no number is NaN or infinite; packed integers are finite, and what a subclass of tensors stands for is looked at."""
    if type(weight.data) is not Tensor and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        weight = weight.float()
    if not weight.is_floating_point() or not weight.numel():
        return True
    # one read of the numbers, which a NaN goes through; `isfinite(weight).all()` makes two tensors as large first, and takes six times as long
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def nonzero(weight: Tensor) -> int:
    """How many numbers are not zero; of a packed tensor, which does not say, all that it holds."""
    return weight.numel() if is_packed(weight) else int(weight.count_nonzero())


def check_head(ref: str, head: nn.Module) -> None:
    """Raise UserError if an output head is packed: logits are compared through its plain matrix."""
    weight = getattr(head, "weight", None)
    if weight is None or is_packed(weight):
        raise UserError(f"{ref}: its output head is quantised too; give a checkpoint whose head is not, as is usual")


def format_of(model: Any) -> dict[str, Any] | None:
    """What a run records of a quantised checkpoint: the method, and whether its weights are still packed; None for any other model."""
    config = getattr(model.config, "quantization_config", None)
    if not config:
        return None
    settings = config if isinstance(config, dict) else config.to_dict()
    method = settings.get("quant_method")
    return {"method": str(getattr(method, "value", method)), "packed": any(map(is_packed, _held(model)))}


def refuse_packed(ref: str, model: nn.Module, what: str) -> None:
    """Raise UserError if any weight of the model is packed: ``what`` cannot be done with it."""
    names = [name for name, tensor in named_tensors(model) if tensor.dim() >= 2 and is_packed(tensor)]
    if names:
        raise UserError(
            f"{ref}: {names[0]} is quantised already, which {what} cannot work on; give --dequantise to load it as dense floats, or the dense model it was made from"
        )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model holds: parameters, tied ones once, and buffers that are kept."""
    # not state_dict(): bitsandbytes repacks its weights for a CPU in there, and computes something else afterwards
    yield from model.named_parameters()
    for name, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}", tensor


def _held(model: nn.Module) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(model) if tensor.dim() >= 2]
