"""What keeps a step of a model on its device, so that a CUDA graph can hold it: experts and list indices that never ask or feed the host.

A captured step is a fixed list of kernels of fixed shapes. Two things that transformers' model code does are none:

- Routed experts. A loop over the experts that were hit asks the host which. One grouped product does not, but PyTorch has a kernel of it for
  bfloat16 on some GPUs only; elsewhere it copies the groups' ends to the host. `generate()` itself gathers the weights of every chosen
  expert once per token, which needs no host but moves them three times, and again for every token that chose the same expert.
- ``x[..., [-2], :]`` and ``torch.tensor(0.0, device=...)``: both make a tensor of the host, which is copied to the device.

While a step is captured both are replaced by the same numbers, and nothing else is; whether they are the same is tried for every model
(`prunescope.models.generating.static_problem`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunescope.models.agreeing import kernels_run, tried_once
from prunescope.models.finding import other_forwards

__all__ = ["all_experts", "chosen_experts", "grouped_experts", "on_the_device", "stacked_experts", "trial_rows"]

_MOVES = 3  # gathering an expert's weights reads, writes and reads them again
_READ_ONCE = 64  # texts for which the kernel reads a chosen expert once
_MARKS = (
    "num_experts",
    "has_gate",
    "has_bias",
    "is_transposed",
    "_apply_gate",
)  # of transformers' experts in one tensor


@contextmanager
def on_the_device(model: nn.Module) -> Iterator[None]:
    """Within the block, forward passes of one new token a text neither copy from the host nor wait for it, as far as is known how."""
    forwards = {module: partial(_experts, module) for module in stacked_experts(model)}
    with other_forwards(forwards), _NoConstants():
        yield


def stacked_experts(model: nn.Module) -> list[Any]:
    """The modules whose experts lie in one tensor and are called as transformers calls them: ``(tokens (n, d), their experts (n, k),
    weights (n, k)) -> (n, d)``. Packed weights are left alone."""
    found: list[Any] = [module for module in model.modules() if all(hasattr(module, mark) for mark in _MARKS)]
    return [module for module in found if all(_plain(module, name) for name in (_first(module), "down_proj"))]


def trial_rows(model: Any) -> int:
    """Texts at a time from which every expert is computed, however few a token gets (`_experts`); 0 without experts."""
    experts = stacked_experts(model)
    top_k = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", None)
    moved = _MOVES * (top_k if isinstance(top_k, int) else 1)
    found = max((module.num_experts // moved + 1 for module in experts), default=0)
    return max(found, _READ_ONCE + 1) if experts and kernels_run(model.device) else found


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _plain(module: nn.Module, name: str) -> bool:
    weight = module._parameters.get(name)
    return weight is not None and weight.dim() == 3 and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """By the kernel; where there is none, or for more texts than it reads an expert once for, the cheaper of the other two by the bytes they move."""
    few = _MOVES * top_k_index.numel() <= module.num_experts
    way = chosen_experts if few else all_experts
    if len(hidden_states) <= _READ_ONCE and kernels_run(hidden_states.device):
        way = grouped_experts if _kernel_agrees(module, hidden_states, *top_k_index.shape) else way
    return way(module, hidden_states, top_k_index, top_k_weights)


def _kernel_agrees(module: Any, like: Tensor, texts: int, k: int) -> bool:
    """Whether the kernel runs there and gives what the weights gathered give, but for rounding, for random rows that each choose other experts."""

    def tried() -> bool:
        generator = torch.Generator().manual_seed(0)
        rows = min(texts, 4)  # few are gathered
        index = torch.stack([torch.randperm(module.num_experts, generator=generator)[:k] for _ in range(rows)])
        tokens = torch.randn(rows, like.shape[1], generator=generator).to(like)
        index, weights = index.to(like.device), torch.rand(rows, k, generator=generator).to(like)
        many = (-(-texts // rows), 1)  # as many as there are in a step, which decides how the kernel is cut
        found = grouped_experts(
            module, tokens.repeat(many)[:texts], index.repeat(many)[:texts], weights.repeat(many)[:texts]
        )
        expected = chosen_experts(module, tokens, index, weights)
        off = found[:rows].double() - expected.double()
        return float(off.norm()) <= 16 * torch.finfo(like.dtype).eps * float(expected.double().norm())

    shapes = tuple(parameter.shape for parameter in module.parameters())
    return tried_once(("experts", type(module), like.dtype, like.device, texts, k, shapes), tried)


def chosen_experts(module: Any, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The sum of the chosen experts, whose weights are gathered for every token: 3 n k experts are moved.

    Args:
        tokens: ``(n, d)``.
        index, weights: ``(n, k)``.
    Returns:
        ``(n, d)``.
    """
    k, chosen = index.shape[1], index.reshape(-1)
    rows = tokens.repeat_interleave(k, 0)[:, None]  # (n k, 1, d)
    found = _branch(module, rows, lambda held: held[chosen])
    return _summed(found[:, 0].view(*index.shape, -1), weights, tokens.dtype)


def all_experts(module: Any, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same with every expert computed for every token, each read once; what was not chosen is left out before the sum, so that
    it does not matter what it is. Arguments as in `chosen_experts`."""
    found = _branch(module, tokens.expand(module.num_experts, *tokens.shape), lambda held: held)  # (E, n, d)
    numbers = torch.arange(len(tokens), device=tokens.device)[:, None]
    return _summed(found[index, numbers], weights, tokens.dtype)


def grouped_experts(module: Any, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same with a Triton kernel that reads each chosen expert once, and no other. Arguments as in `chosen_experts`; the experts of a
    token must differ."""
    between = _grouped(module, tokens, index, _first(module), slots=False)
    between = module._apply_gate(between) if module.has_gate else module.act_fn(between)
    found = _grouped(module, between, index, "down_proj", slots=True)
    if getattr(module, "has_post_expert_norm", False):
        found = module.post_expert_norm(found)
    return _summed(found.view(*index.shape, -1), weights, tokens.dtype)


def _grouped(module: Any, x: Tensor, index: Tensor, name: str, slots: bool) -> Tensor:
    """``(n k, outs)``, of each token and choice: row n of x, with ``slots`` row n k, through the expert that was chosen."""
    from prunescope.models.step_kernels import grouped_kernel

    weight, (count, k), index = getattr(module, name), index.shape, index.contiguous()
    ins, outs = weight.shape[1:] if module.is_transposed else weight.shape[:0:-1]
    of_expert, *of = weight.stride()
    of_in, of_out = of if module.is_transposed else of[::-1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    found = x.new_empty(count * k, outs)
    tile = {"ROWS": min(_READ_ONCE, max(16, 1 << (count - 1).bit_length())), "OUTS": 64, "INS": 256 // x.element_size()}
    grouped_kernel[-(-outs // tile["OUTS"]), len(weight)](
        x, weight, found, index, count, x.stride(0), of_expert, of_out, of_in, outs, ins,
        K=k, K2=1 << (k - 1).bit_length(), SLOTS=slots, **tile, num_warps=4, num_stages=4,
    )  # fmt: skip
    return found + getattr(module, f"{name}_bias")[index.flatten()] if module.has_bias else found


def _branch(module: Any, rows: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
    """``(groups, rows, d)`` through the expert of each group, whose weights ``take`` gives."""
    between = _product(module, rows, _first(module), take)
    flat = between.reshape(-1, between.shape[-1])
    flat = module._apply_gate(flat) if module.has_gate else module.act_fn(flat)
    found = _product(module, flat.view(*between.shape[:2], -1), "down_proj", take)
    return module.post_expert_norm(found) if getattr(module, "has_post_expert_norm", False) else found


def _product(module: Any, rows: Tensor, name: str, take: Callable[[Tensor], Tensor]) -> Tensor:
    weight = take(getattr(module, name))
    found = torch.bmm(rows, weight if module.is_transposed else weight.transpose(1, 2))
    return found + take(getattr(module, f"{name}_bias"))[:, None] if module.has_bias else found


def _summed(found: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, k, d)``, ``(n, k)`` -> ``(n, d)``, in the order of transformers."""
    return (found * weights[..., None]).sum(1).to(dtype)


class _NoConstants(TorchFunctionMode):
    """``x[..., [i], :]`` as ``x[..., i : i + 1, :]`` and ``torch.tensor(number)`` as ``torch.full((), number)``: the same numbers, and no
    tensor of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            args = (args[0], _sliced(args[1]))
        elif func is torch.tensor and len(args) == 1 and type(args[0]) in (bool, int, float):
            func, args = torch.full, ((), args[0])
        return func(*args, **(kwargs or {}))


def _sliced(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, (list, Tensor))]
    if len(lists) != 1 or not isinstance(lists[0], list) or len(lists[0]) != 1 or type(lists[0][0]) is not int:
        return index
    at = lists[0][0]
    alone = slice(at, at + 1 if at != -1 else None)
    return tuple(alone if part is lists[0] else part for part in parts)
