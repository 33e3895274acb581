"""Models whose weights lie on several GPUs of one machine: transformers and accelerate place them and move what flows between them.

A hook of ours sees a tensor where the module before left it; what is watched is brought to where the head is (`LoadedModel.device`), so that
everything behind a forward pass works on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError

if TYPE_CHECKING:
    from prunescope.models.loaded import LoadedModel

__all__ = ["ALL_GPUS", "check_placed", "homeward", "is_sharded", "placement", "plain_copy", "refuse_sharded"]

ALL_GPUS = "gpus"  # as --device
_SHARE = 0.85  # of a GPU's free memory that weights may take; the rest is for what is computed


def placement(device: str) -> dict[str, Any]:
    """Where transformers shall put the weights, in its terms; empty where they go to one device, which the caller knows.

    ``gpus`` spreads the blocks over all GPUs; with ``auto`` the first is filled first, so that a model that fits on it lies there alone.

    Raises:
        UserError: ``gpus`` with fewer than two of them.
    """
    count = torch.cuda.device_count()
    if device == ALL_GPUS and count < 2:
        raise UserError(
            f"device {ALL_GPUS!r}: {count} GPU{'s' * (count != 1)} here, and it takes two; give --device auto"
        )
    if device not in (ALL_GPUS, "auto") or count < 2:
        return {}
    free = {i: int(_SHARE * torch.cuda.mem_get_info(i)[0]) for i in range(count)}
    return {"device_map": "balanced" if device == ALL_GPUS else "sequential", "max_memory": free}


def is_sharded(model: Any) -> bool:
    """Whether its weights lie on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def check_placed(ref: str, model: Any) -> None:
    """Raise UserError if weights found no place on the GPUs."""
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
        raise UserError(
            f"{ref} does not fit on the {torch.cuda.device_count()} GPUs of this machine together; give --stream where the command has it, or --device cpu"
        )


def homeward(loaded: LoadedModel) -> Callable[[Tensor], Tensor]:
    """What brings a tensor to where the head is; it leaves all as they are in a model on one device."""
    if not is_sharded(loaded.model):
        return lambda tensor: tensor
    device = loaded.device
    return lambda tensor: tensor.to(device)


def refuse_sharded(ref: str, model: Any, what: str, fix: str) -> None:
    """Raise UserError if the model lies on several GPUs: ``what`` cannot be done with it."""
    if is_sharded(model):
        raise UserError(f"{ref} lies on several GPUs, where {what} does not work; {fix}")


def plain_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a module on one device, without what accelerate has put around its forward."""
    from accelerate.hooks import remove_hook_from_module

    return remove_hook_from_module(copy.deepcopy(module), recurse=True).to(device, dtype)  # type: ignore[no-any-return]
