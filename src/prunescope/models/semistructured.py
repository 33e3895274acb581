"""2:4 weights: find them, and let PyTorch's semi-structured kernels multiply with them.

A kernel of this kind stores the two kept weights of every four and where they are, 9/16 of the dense bytes, and leaves the zeros out of the
product. It needs a CUDA device of compute capability 8.0 or more and half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunescope.errors import UserError, first_line
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import is_packed
from prunescope.models.placing import refuse_sharded

__all__ = ["check_kernels", "inner_tensors", "is_two_four", "two_four_layers", "using_kernels"]

_HALF = (torch.float16, torch.bfloat16)


def is_two_four(weight: Tensor) -> bool:
    """Whether of every four consecutive weights of a row, ``(out, in)``, at most two are not zero. A dense weight is not, nor a packed one, which does not say."""
    if weight.dim() != 2 or weight.shape[1] % 4 or is_packed(weight):
        return False
    kept = (weight != 0).view(weight.shape[0], -1, 4).sum(-1)
    return bool((kept <= 2).all())


def two_four_layers(loaded: LoadedModel) -> list[tuple[str, nn.Linear]]:
    """The linear layers of the blocks whose weights are 2:4, with their names in the model. A matrix of zeros alone is left out."""
    inside = {id(module) for block in loaded.anatomy.blocks for module in block.module.modules()}
    return [
        (name, module)
        for name, module in loaded.model.named_modules()
        if id(module) in inside
        and isinstance(module, nn.Linear)
        and is_two_four(module.weight)
        and module.weight.count_nonzero()
    ]


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where there are no semi-structured kernels."""
    if device.type != "cuda" or dtype not in _HALF:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"--sparse-kernels needs a CUDA device and --dtype bfloat16 or float16, this is {device.type} and {kind}; leave it out"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(
            f"--sparse-kernels: {torch.cuda.get_device_name(device)} has no 2:4 units (compute capability 8.0 is needed); leave it out"
        )


@contextmanager
def using_kernels(loaded: LoadedModel) -> Iterator[list[str]]:
    """Within the block the 2:4 weights of ``loaded`` are in semi-structured form; the dense ones wait in the host's memory.

    Gives the names of the layers; none where no weight is 2:4.

    Raises:
        UserError: no such kernels here, or a shape that they refuse.
    """
    refuse_sharded(loaded.ref, loaded.model, "--sparse-kernels", "leave it out")
    check_kernels(loaded.device, loaded.dtype)
    waiting: list[tuple[nn.Linear, Any, Tensor]] = []
    names = []
    try:
        for name, module in two_four_layers(loaded):
            dense = module.weight
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the interface is a prototype, says PyTorch once
                try:
                    sparse = torch.sparse.to_sparse_semi_structured(dense.detach())
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    raise UserError(
                        f"--sparse-kernels: PyTorch refuses {name} ({first_line(error)}); leave it out"
                    ) from error
            module.weight = nn.Parameter(sparse, requires_grad=False)
            module.forward = partial(_in_rows, module)  # type: ignore[method-assign]
            waiting.append((module, dense, dense.detach().cpu()))
            dense.data = dense.data.new_empty(0)
            names.append(name)
        loaded.decoding.clear()  # the kernels must pass the trial of their own
        yield names
    finally:
        loaded.decoding.clear()
        for module, dense, values in waiting:
            dense.data = values.to(loaded.device)
            module.weight = dense
            del module.forward  # the class's own again


def _in_rows(module: nn.Linear, states: Tensor) -> Tensor:
    """The layer on a matrix of rows: the kernels know products of matrices only, while PyTorch may expand a weight for three dimensions."""
    rows = functional.linear(states.reshape(-1, states.shape[-1]), module.weight, module.bias)
    return rows.view(*states.shape[:-1], rows.shape[-1])


def inner_tensors(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold ``value``: itself, or the parts of one that is made of others, such as a semi-structured or a packed one."""
    if hasattr(value.data, "__tensor_flatten__"):
        names, _ = value.data.__tensor_flatten__()
        for name in names:
            yield from inner_tensors(getattr(value.data, name))
    else:
        yield value
