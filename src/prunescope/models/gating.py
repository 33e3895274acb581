"""The activation of a gated MLP and its product with the other branch in one kernel, where the plain code launches two; of few rows with the two
products before it.

A module is such an MLP if on random rows it gives the bits of ``down(act(gate(x)) * up(x))``, for one order of its three matrices and one of the
activations below. The kernel rounds where the plain code rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunescope.models.agreeing import next_to, tried_once
from prunescope.models.products import counters, few_rows, gated_products, is_plain

__all__ = ["Gating", "gate_forwards", "gated", "gating_of"]

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu,
    partial(functional.gelu, approximate="tanh"),
)  # as `step_kernels.gate_kernel` counts them
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDE = 1024  # entries of a program


class Gating(NamedTuple):
    """How an MLP gates: the names of its matrices, and which activation."""

    gate: str
    up: str
    down: str
    kind: int


_FOUND: WeakKeyDictionary[nn.Module, tuple[object, Gating | None]] = WeakKeyDictionary()  # with what was there then


def gate_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the gated MLPs of a model, with one kernel between their products, or with both first products in it."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in model.modules():
        if (gating := gating_of(module)) is not None:
            plain = is_plain(getattr(module, gating.gate)) and is_plain(getattr(module, gating.up))
            forwards[module] = partial(_forward, module, gating, counters(model) if plain else None)
    return forwards


def _forward(module: nn.Module, gating: Gating, counts: Tensor | None, *args: Any, **options: Any) -> Any:
    if len(args) != 1 or options:
        return type(module).forward(module, *args, **options)
    gate, up, down = (getattr(module, name) for name in gating[:3])
    x = args[0]
    if counts is not None and _together(gate, up, gating.kind, x, counts):
        return down(gated_products(x, gate, up, gating.kind, counts))
    return down(gated(gate(x), up(x), gating.kind))


def _together(gate: Any, up: Any, kind: int, x: Tensor, counts: Tensor) -> bool:
    """Whether both products and the gate are one kernel for ``x``: few rows, for which random ones give what the plain code gives."""
    if not few_rows(x, gate.weight) or (gate.bias is None) != (up.bias is None) or gate.weight.dtype != up.weight.dtype:
        return False

    def tried() -> bool:
        rows = x.numel() // x.shape[-1]
        y = torch.randn(rows, gate.in_features, generator=torch.Generator().manual_seed(0)).to(x)
        a, b = (functional.linear(y, layer.weight, layer.bias) for layer in (gate, up))
        found, expected = gated_products(y, gate, up, kind, counts).float(), (_ACTIVATIONS[kind](a) * b).float()
        # each of both may be the next number of its dtype
        bound = 8 * torch.finfo(x.dtype).eps * (1 + a.float().abs()) * (1 + b.float().abs())
        return (
            bool(((found - expected).abs() <= bound).all())
            and float((found - expected).norm() / expected.norm()) < 2 * torch.finfo(x.dtype).eps
        )

    return tried_once(("gated", kind, x.dtype, x.device, x.numel(), gate.weight.shape, gate.bias is None), tried)


# --- which modules -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def gating_of(module: nn.Module) -> Gating | None:
    """How ``module`` gates its input; None if it is no gated MLP, or another one."""
    held = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    others = [child for child in module.children() if child not in [kept for _, kept in held]]
    if any(child._forward_hooks or child._forward_pre_hooks for child in others):  # somebody looks at them
        return None
    if len(held) != 3 or module.training or "forward" in module.__dict__ or module._parameters:
        return None
    if any(not isinstance(getattr(child, "in_features", None), int) for _, child in held):
        return None
    there = (*((name, type(child)) for name, child in module.named_children()), *(id(x) for x in vars(module).values() if callable(x)))  # fmt: skip
    if module not in _FOUND or _FOUND[module][0] != there:
        _FOUND[module] = there, _tried(module, dict(held))
    return _FOUND[module][1]


def _tried(module: nn.Module, held: dict[str, Any]) -> Gating | None:
    first = next(module.parameters())
    fits = []
    for names in permutations(held, 3):
        gate, up, down = (held[name] for name in names)
        if (gate.in_features, gate.out_features) != (up.in_features, up.out_features) or gate.out_features != down.in_features:  # fmt: skip
            continue
        scales = torch.tensor([1.0, 10.0, 30.0, 1.0, 1.0])[:, None]
        x = torch.randn(5, gate.in_features, generator=torch.Generator().manual_seed(0)) * scales
        try:  # a limit of what enters the gate or leaves it shows where both are large
            seen = torch.stack([layer(x[3:].to(first)).abs().max() for layer in (gate, up)]).max().float().item()
        except Exception:
            return None
        x[3:] *= torch.tensor([100.0, 30000.0**0.5])[:, None] / max(seen, 1e-6)
        x = x.to(first)
        try:
            expected = type(module).forward(module, x)
            for kind, activation in enumerate(_ACTIVATIONS):
                if torch.equal(down(activation(gate(x)) * up(x)), expected):
                    fits.append(Gating(names[0], names[1], names[2], kind))
        except Exception:  # whatever takes something else
            return None
    return fits[0] if len(fits) == 1 and _kernel_fits(fits[0].kind, first.dtype, first.device) else None


def _kernel_fits(kind: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives what the plain operations give, but for single entries."""
    if dtype not in _DTYPES:
        return False

    def tried() -> bool:
        generator = torch.Generator().manual_seed(0)
        gate, up = ((torch.randn(5, 1000, generator=generator) * 4).to(device, dtype) for _ in range(2))
        return next_to(gated(gate, up, kind), _ACTIVATIONS[kind](gate) * up, (gate * up).abs())

    return tried_once(("gate", kind, dtype, device), tried)


# --- the kernel --------------------------------------------------------------------------------------------------------


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """``act(gate) * up`` of two tensors of one shape; in plain operations where they are laid out in another way than the kernel reads."""
    if gate.shape != up.shape or gate.dtype != up.dtype or not (gate.is_contiguous() and up.is_contiguous()) or not 0 < gate.numel() < 2**31:  # fmt: skip
        return _ACTIVATIONS[kind](gate) * up
    from prunescope.models.step_kernels import gate_kernel

    found, count = torch.empty_like(gate), gate.numel()
    gate_kernel[(-(-count // _WIDE),)](gate, up, found, count, KIND=kind, LIBRARY=gate.is_cuda, WIDE=_WIDE, num_warps=4)
    return found
