"""The routed experts of a block: where they and their router are, how few may remain, and taking some out.

What is known here holds for the form that transformers 5 gives Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek and their like: a module whose 3-D weights
hold all experts and whose ``forward`` takes tokens with their experts and weights, and beside it a router with a row for every expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunescope.errors import UserError
from prunescope.models.anatomy import Block
from prunescope.models.finding import hooks, other_forwards

__all__ = ["Experts", "count_fields", "find_experts", "remove_experts", "routed", "without"]

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # config fields
_CHOICE_BIASES = ("e_score_correction_bias", "expert_bias")  # added to the scores that choose, not to those that weigh
_COUNTERS = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")  # of modules


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block, side by side in 3-D weights, and the router that chooses among them."""

    name: str  # of the module in the model
    module: nn.Module
    router_name: str
    router: nn.Module
    inside: tuple[nn.Module, ...]  # all modules of the MLP
    biases: tuple[tuple[str, nn.Module, str], ...]  # that only choose: name of the module, module, attribute
    count: int
    top_k: int
    groups: int  # experts stand in groups of equal size, of which the router chooses some first
    chosen_groups: int
    least: int  # that must remain of a group

    def left(self, removed_of: Callable[[int], int]) -> int:
        """How many experts remain; every group loses as many as the others.

        Args:
            removed_of: how many of so many shall go.
        Raises:
            UserError: none would go, or fewer would remain than the router chooses.
        """
        size = self.count // self.groups
        left = size - removed_of(size)
        of = f"{self.count} experts" + (f" in {self.groups} groups" if self.groups > 1 else "")
        if left == size:
            raise UserError(f"{self.name}: no expert of {of} would be removed; raise --sparsity")
        if left < self.least or left * self.chosen_groups < self.top_k:
            raise UserError(
                f"{self.name}: {left * self.groups} of {of} would remain, but its router needs {max(self.least * self.groups, -(-self.top_k // self.chosen_groups) * self.groups)} to choose {self.top_k} for a token; lower --sparsity"
            )
        return left * self.groups

    @property
    def shapes(self) -> dict[str, list[int]]:
        """By its name in the model, what has a row, a slice or an entry for every expert."""
        return {f"{name}.{leaf}": list(getattr(module, leaf).shape) for name, module, leaf, _ in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, nn.Module, str, int]]:
        """What has something for every expert: name of the module, module, attribute, and the dimension of the experts."""
        for name, module in ((self.name, self.module), (self.router_name, self.router)):
            held = {**module._parameters, **module._buffers}
            for leaf, value in held.items():
                if value is not None and value.dim() and value.shape[0] == self.count and leaf not in _CHOICE_BIASES:
                    yield name, module, leaf, 0
        for name, module, leaf in self.biases:
            yield name, module, leaf, -1


def find_experts(block: Block, prefix: str, top_k: int | None = None) -> Experts | None:
    """The routed experts of ``block``, None where it has none. ``prefix`` is the block's name in the model.

    Args:
        top_k: experts a token, by the config, where the router does not say.
    Raises:
        UserError: it has experts in another form.
    """
    where = {id(module): name for name, module in block.module.named_modules()}
    inside = list({id(m): m for outer in block.mlp.modules for m in outer.modules()}.values())
    homes = [m for m in inside if any(p.dim() == 3 for p in m.parameters(recurse=False))]
    homes = [m for m in homes if not isinstance(m, nn.modules.conv._ConvNd)]
    if not homes:
        for module in inside:
            if isinstance(module, nn.ModuleList) and len(module) > 1:
                raise UserError(f"{prefix}.{where[id(module)]}: these experts are modules of their own, not one weight; --method experts does not know this form")  # fmt: skip
        return None
    counts = {p.shape[0] for home in homes for p in home.parameters(recurse=False) if p.dim() == 3}
    count = counts.pop()
    routers = [
        m
        for m in inside
        if m not in homes
        and isinstance(m._parameters.get("weight"), nn.Parameter)
        and m.weight.dim() == 2  # type: ignore[operator]
        and len(m.weight) == count  # type: ignore[arg-type]
    ]
    routers = [m for m in routers if type(m) is not nn.Linear] or routers
    biases = tuple(
        (".".join(filter(None, (prefix, where[id(m)]))), m, leaf)
        for m in inside
        for leaf in _CHOICE_BIASES
        if isinstance(bias := {**m._parameters, **m._buffers}.get(leaf), Tensor) and bias.shape[-1:] == (count,)
    )
    name = ".".join(filter(None, (prefix, where[id(homes[0])])))
    if len(homes) > 1 or counts or len(routers) != 1 or count < 2:
        raise UserError(
            f"{name}: no router with a row for each of its experts was found beside them; --method experts does not know this form"
        )
    router = routers[0]
    chosen = getattr(router, "top_k", top_k)
    if not isinstance(chosen, int):
        raise UserError(f"{name}: its router does not say how many experts a token gets; --method experts does not know this form")  # fmt: skip
    groups = int(getattr(router, "num_group", None) or 1)
    if getattr(router, "topk_method", None) == "greedy":
        groups = 1
    least = 2 if hasattr(router, "num_group") and biases else 1  # a group is as good as its two best
    some = int(getattr(router, "topk_group", None) or 1) if groups > 1 else 1
    router_name = ".".join(filter(None, (prefix, where[id(router)])))
    return Experts(name, homes[0], router_name, router, tuple(inside), biases, count, chosen, groups, some, least)


def count_fields(config: Any, count: int) -> list[str]:
    """The fields of a config that give the number of routed experts."""
    held = config.to_dict()
    return [name for name in _COUNTS if held.get(name) == count]


def remove_experts(experts: Experts, kept: Tensor) -> None:
    """Keep only the experts ``kept`` (indices in ascending order) in the live weights: slices, biases, rows of the router."""
    for _, module, leaf, dimension in list(experts.tensors()):
        value = getattr(module, leaf)
        new = value.detach().index_select(dimension, kept.to(value.device))
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        else:
            module._buffers[leaf] = new
    for module in experts.inside:
        for counter in _COUNTERS:
            if module.__dict__.get(counter) == experts.count:
                setattr(module, counter, len(kept))


@contextmanager
def routed(experts: Experts, see: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see`` whenever the experts run: tokens ``(n, d)``, the experts of each ``(n, k)``, and their weights ``(n, k)``.

    Raises:
        UserError: they are called otherwise.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        chosen = [value for value in given if not value.is_floating_point() and value.dim() == 2]
        floats = [value for value in given if value.is_floating_point()]
        if len(given) != 3 or len(chosen) != 1 or floats[-1].shape != chosen[0].shape:
            raise UserError(f"{experts.name}: its experts are not called with tokens, their experts and weights; --method experts does not know this form")  # fmt: skip
        see(floats[0].reshape(-1, floats[0].shape[-1]), chosen[0], floats[-1])

    with hooks() as handles:
        handles.append(experts.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextmanager
def without(experts: Experts, removed: Sequence[int]) -> Iterator[None]:
    """Within the block the router cannot choose these experts: their logits are minus infinity. Nothing is removed."""
    router = experts.router
    forward = router.forward
    held = [(module, leaf, getattr(module, leaf).detach().clone()) for _, module, leaf in experts.biases]

    def masked(*args: Any, **kwargs: Any) -> Any:
        with _Masked(experts.count, removed):
            return forward(*args, **kwargs)

    try:
        for module, leaf, value in held:
            getattr(module, leaf).data.index_fill_(-1, torch.tensor(removed, device=value.device), -torch.inf)
        with other_forwards({router: masked}):
            yield
    finally:
        for module, leaf, value in held:
            getattr(module, leaf).data.copy_(value)


class _Masked(TorchFunctionMode):
    """Sets columns of the product with as many outputs as there are experts to minus infinity."""

    def __init__(self, count: int, removed: Sequence[int]) -> None:
        super().__init__()
        self.count, self.removed = count, list(removed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and found.shape[-1] == self.count:
            found = found.index_fill(-1, torch.tensor(self.removed, device=found.device), -torch.inf)
        return found
