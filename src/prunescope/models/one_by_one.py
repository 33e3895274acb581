"""Experts of a model that stays on disk, one at a time: of a block with hundreds of them, only those that a token reaches are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError
from prunescope.models.finding import other_forwards
from prunescope.models.shards import Tiles

__all__ = ["large_experts", "one_at_a_time", "slices"]


def large_experts(block: nn.Module, least: int) -> dict[str, nn.Module]:
    """By their names in ``block``, the modules whose weights hold many experts side by side and take ``least`` bytes or more."""
    found = {}
    for name, module in block.named_modules():
        held = list(module.parameters(recurse=False))
        several = {p.shape[0] for p in held if p.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)}
        if len(several) == 1 and isinstance(module.__dict__.get("num_experts"), int):
            alike = all(p.dim() and p.shape[0] in several for p in held) and several == {module.num_experts}
            if alike and sum(p.numel() * p.element_size() for p in held) >= least:
                found[name] = module
    return found


def slices(weights: Mapping[str, Tensor], name: str, parameter: Tensor) -> Iterator[Tensor]:
    """A weight of many experts, ``(1, ...)`` of each in turn, in the parameter's dtype. Raises UserError for NaN or infinite values."""
    tiles = Tiles(weights, name, parameter.shape, parameter.dtype)
    return (_checked(tiles, name, expert) for expert in range(len(parameter)))


def _checked(tiles: Tiles, name: str, expert: int) -> Tensor:
    found = tiles[expert : expert + 1].contiguous()
    if not torch.isfinite(found).all():
        raise UserError(f"{name} holds NaN or infinite weights; the checkpoint is broken")
    return found


@contextmanager
def one_at_a_time(
    module: nn.Module, prefix: str, weights: Mapping[str, Tensor], device: torch.device
) -> Iterator[None]:
    """Within the block the experts of ``module``, whose parameters are on the meta device, run one after the other, each read when its turn comes.

    What each adds is computed by the module's own ``forward``, as a module of that one expert, and summed in the order of the experts.

    Args:
        prefix: of the module's parameters in the model.
    Raises:
        UserError: the module is not called with tokens ``(n, d)``, their experts ``(n, k)`` and the weights of these ``(n, k)``.
    """
    held = dict(module._parameters)
    forward, count = module.forward, module.num_experts

    def run(*args: Any, **kwargs: Any) -> Tensor:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        chosen = [value for value in given if not value.is_floating_point()]
        floats = [value for value in given if value.is_floating_point()]
        if len(given) != 3 or len(chosen) != 1 or floats[1].shape != chosen[0].shape or floats[0].dim() != 2:
            raise UserError(f"{prefix[:-1]}: its experts are not called with tokens, their experts and weights; give --stream false")  # fmt: skip
        (states, shares), experts = floats, chosen[0]
        total = torch.zeros_like(states)
        try:
            module.num_experts = 1  # type: ignore[assignment]
            for expert in experts.unique().tolist():
                for leaf, parameter in held.items():
                    if parameter is not None:
                        tiles = Tiles(weights, prefix + leaf, parameter.shape, parameter.dtype)
                        one = _checked(tiles, prefix + leaf, expert).to(device)
                        module._parameters[leaf] = nn.Parameter(one, requires_grad=False)
                token, place = torch.where(experts == expert)
                nothing = torch.zeros(len(token), 1, dtype=experts.dtype, device=experts.device)
                total.index_add_(0, token, forward(states[token], nothing, shares[token, place, None]))
        finally:
            module._parameters.update(held)
            module.num_experts = count
        return total

    with other_forwards({module: run}):
        yield
