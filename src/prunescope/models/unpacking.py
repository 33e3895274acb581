"""Packed weights back to dense floats: what `--dequantise` does after the package that owns the format has loaded the checkpoint.

A packed linear layer becomes an `nn.Linear` that holds the numbers its packed ones stand for. Where the package has a function for them, that
is asked; else the layer itself, with the identity as its input, whose products have one term each. Activations that a format quantises as
well (W8A8, FP8 with static scales) are no longer: dense weights stand for the weights alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError, first_line
from prunescope.models.packed import is_packed

__all__ = ["unpack"]

_ROWS = 1024  # of the identity at a time


@torch.no_grad()
def unpack(ref: str, model: Any, dtype: torch.dtype) -> int:
    """Replace every packed linear layer of ``model`` in place; ``dtype`` is that of its dense weights. Returns how many there were.

    A model of compressed-tensors must have run once, which unpacks its weights; one of bitsandbytes must not, which repacks them for a CPU.

    Raises:
        UserError: a packed layer whose numbers are not to be had.
    """
    packed = [(name, module) for name, module in model.named_modules() if _holds_packed(module)]
    for name, module in packed:
        try:
            weight = _numbers(module)
        except Exception as error:  # of foreign packages, in ways of their own
            raise UserError(
                f"{ref}: {name} ({type(module).__name__}) cannot be dequantised: {first_line(error)}; give the dense model it was made from"
            ) from error
        bias = getattr(module, "bias", None)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain.train(module.training))
    for owner in (model.config, model):  # nothing is quantised any more, for transformers either
        for attribute in ("quantization_config", "hf_quantizer", "quantization_method", "_pre_quantization_dtype"):
            if attribute in vars(owner):
                delattr(owner, attribute)
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if vars(model).get(flag):
            setattr(model, flag, False)
    if packed:
        nn.Module.to(model, dtype)  # transformers' own refuses for some methods
    return len(packed)


def _holds_packed(module: nn.Module) -> bool:
    """A linear layer with a packed tensor of its own, or one whose package quantises as it runs."""
    own = [*module.parameters(recurse=False), *(b for b in module.buffers(recurse=False) if b.dim() >= 2)]
    return any(t.dim() >= 2 and is_packed(t) for t in own) or getattr(module, "quantization_scheme", None) is not None


def _numbers(module: Any) -> Tensor:
    """``(out, in)``: what the layer's packed weights stand for."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        functions: Any = importlib.import_module("bitsandbytes.functional")
        found: Tensor = functions.dequantize_4bit(weight.data, state)  # type: ignore[union-attr]
        return found.reshape(module.out_features, module.in_features)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is not None:  # LLM.int8(): the largest magnitude of a row at 127
        steps: Any = weight.data  # type: ignore[union-attr]
        numbers: Tensor = steps.float() * (scales.float() / 127)[:, None]
        return numbers
    if isinstance(weight, Tensor) and type(weight.data) is not Tensor and hasattr(weight, "dequantize"):
        dense: Tensor = weight.dequantize()
        return dense
    if isinstance(weight, Tensor) and not is_packed(weight):
        return weight
    return _asked(module)


def _asked(module: Any) -> Tensor:
    """Columns of the layer's matrix, as it answers rows of the identity; a bias is taken off by zeros."""
    width = module.in_features
    device = next(t.device for t in (*module.parameters(), *module.buffers()))
    nothing = module(torch.zeros(1, width, device=device)).float()
    rows = [
        module(torch.eye(min(_ROWS, width - start), width, device=device).roll(start, 1)).float() - nothing
        for start in range(0, width, _ROWS)
    ]
    return torch.cat(rows).T
