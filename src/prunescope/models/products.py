"""Products of few rows with several matrices in one kernel: queries, keys and values of a step.

With one new token a text, a product costs what reading its weights costs, unless they are too few to keep the memory busy: keys and values of a model
whose query heads share them are such. Which products are taken together is seen, not listed: in the pass that reads the prompts, plain linear layers
of one parent that are given one and the same tensor. In a step the first of them computes all, and the others hand out what was found only if
they are given that tensor too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunescope.models.agreeing import same_sums, tried_once
from prunescope.models.finding import hooks

__all__ = [
    "Siblings",
    "Tile",
    "counters",
    "few_rows",
    "gated_products",
    "gated_tile_of",
    "is_plain",
    "products",
    "shared_inputs",
    "sibling_forwards",
    "tile_of",
]

Siblings = tuple[nn.Linear, ...]

_DTYPES = (torch.bfloat16, torch.float16)
_ROWS = 64  # at most; more are a matter of operations, not of bytes
_TOGETHER = 3  # matrices a kernel
_SMALL = 2**25  # bytes of a matrix that does not keep the memory busy alone
_PROGRAMS = 400
_COUNTERS = 2**13  # tiles of a launch at most
_COUNTS: WeakKeyDictionary[nn.Module, Tensor] = (
    WeakKeyDictionary()
)  # of a model, as long as it: captured steps point there


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs of a program, inputs of a step of its loop, parts of the inputs; its warps, and the steps that are loaded ahead."""

    outs: int
    ins: int
    split: int
    warps: int
    stages: int


def tile_of(ins: int, outs: int) -> Tile:
    """The cut of a product with matrices of ``outs`` outputs in all."""
    return Tile(outs=32, ins=128, split=_split(ins, outs), warps=4, stages=3)


def gated_tile_of(ins: int, outs: int) -> Tile:
    """The cut of `gated_products`, of one of its two matrices."""
    return Tile(outs=32, ins=128, split=_split(ins, outs), warps=4, stages=4)


def _split(ins: int, outs: int) -> int:
    """As many parts as make several programs for every processor of a large GPU, of two steps each at least."""
    enough = next((split for split in (1, 2, 4) if outs // 32 * split >= _PROGRAMS), 8)
    return min(enough, max(split for split in (1, 2, 4, 8) if split == 1 or 2 * split * 128 <= ins))


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], counts: Tensor, tile: Tile | None = None
) -> list[Tensor]:
    """``x weight^T + bias`` of each matrix, the sums in float32, rounded once.

    Args:
        x: ``(..., ins)``, at most 64 rows.
        weights: one to three ``(outs, ins)`` whose rows are contiguous; ins and every outs are multiples of 16.
        biases: ``(outs,)`` or None of each.
        counts: int32 zeros, at least as many as tiles; zeros again afterwards.
    Returns:
        ``(..., outs)`` of each, contiguous.
    """
    from prunescope.models.step_kernels import product_kernel

    ins = x.shape[-1]
    flat = x.reshape(-1, ins)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, outs = len(flat), [len(weight) for weight in weights]
    tile = tile_of(ins, sum(outs)) if tile is None else tile
    tiles, wide = sum(-(-count // tile.outs) for count in outs), max(16, 1 << (rows - 1).bit_length())
    _enough(counts, tiles, tile)
    found = torch.empty(rows * sum(outs), dtype=x.dtype, device=x.device)
    parts = torch.empty(tiles * tile.split * tile.outs * wide if tile.split > 1 else 0, dtype=torch.float32, device=x.device)  # fmt: skip
    absent = _TOGETHER - len(weights)
    padded = [*weights, *[weights[0]] * absent]
    given = [*biases, *[None] * absent]
    product_kernel[tiles, tile.split](
        flat, *padded, *(padded[0] if bias is None else bias for bias in given), found, parts, counts, rows, ins, flat.stride(0),
        *(weight.stride(0) for weight in padded), *outs, *[0] * absent, *(bias is not None for bias in given),
        SPLIT=tile.split, EVEN=ins % tile.ins == 0, ROWS=wide, OUTS=tile.outs, INS=tile.ins, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    split = found.split([rows * count for count in outs])
    return [part.view(*x.shape[:-1], count) for part, count in zip(split, outs, strict=True)]


def _enough(counts: Tensor, tiles: int, tile: Tile) -> None:
    if tile.split > 1 and tiles > len(counts):
        raise ValueError(f"{tiles} tiles need as many counters, not {len(counts)}")


def gated_products(
    x: Tensor, gate: nn.Linear, up: nn.Linear, kind: int, counts: Tensor, tile: Tile | None = None
) -> Tensor:
    """``act(gate(x)) * up(x)`` in one kernel, activations as `gating` counts them; else as `products`, with tiles of both."""
    from prunescope.models.step_kernels import gated_product_kernel

    outs, ins = gate.weight.shape
    flat = x.reshape(-1, ins)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = len(flat)
    tile = gated_tile_of(ins, outs) if tile is None else tile
    tiles, wide = -(-outs // tile.outs), max(16, 1 << (rows - 1).bit_length())
    _enough(counts, tiles, tile)
    found = torch.empty(*x.shape[:-1], outs, dtype=x.dtype, device=x.device)
    parts = torch.empty(2 * tiles * tile.split * tile.outs * wide if tile.split > 1 else 0, dtype=torch.float32, device=x.device)  # fmt: skip
    biases = [gate.weight if linear.bias is None else linear.bias for linear in (gate, up)]
    gated_product_kernel[tiles, tile.split](
        flat, gate.weight, up.weight, *biases, found, parts, counts, rows, ins, outs, flat.stride(0), gate.weight.stride(0), up.weight.stride(0),
        BIAS=gate.bias is not None, KIND=kind, LIBRARY=x.is_cuda, SPLIT=tile.split, EVEN=ins % tile.ins == 0, ROWS=wide, OUTS=tile.outs, INS=tile.ins,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return found


# --- who is given the same ---------------------------------------------------------------------------------------------


@contextmanager
def shared_inputs(model: nn.Module) -> Iterator[list[Siblings]]:
    """A list that is filled with the plain linear layers of one parent that are called, one right after another, with the same tensor."""
    parents = {child: module for module in model.modules() for child in module.children() if is_plain(child)}
    runs: dict[Siblings, None] = {}
    found: list[Siblings] = []
    given: tuple[nn.Module, Tensor] | None = None
    members: list[nn.Linear] = []

    def close() -> None:
        nonlocal members
        if len(set(members)) > 1:
            runs[tuple(dict.fromkeys(members))] = None
        members = []

    def saw(parent: nn.Module, module: Any, args: tuple[Any, ...]) -> None:
        nonlocal given
        if given is None or not args or given[0] is not parent or given[1] is not args[0]:
            close()
            given = (parent, args[0]) if args else None
        members.append(module)

    with hooks() as handles:
        for child, parent in parents.items():
            handles.append(child.register_forward_pre_hook(partial(saw, parent)))
        yield found
    close()
    found.extend(runs)


def is_plain(module: nn.Module) -> bool:
    """A linear layer and nothing else: no hooks, no forward of somebody else's, no parametrised or packed weights."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    weight, bias = module.weight, module.bias
    return (
        type(weight) is nn.Parameter
        and weight.dtype in _DTYPES
        and weight.stride(1) == 1
        and not any(number % 16 for number in (*weight.shape, weight.stride(0)))
        and not weight.data_ptr() % 16
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
    )


def sibling_forwards(model: nn.Module, shared: Sequence[Siblings]) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of linear layers that compute together what `shared_inputs` saw, where one of them is small."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for run in shared:
        if any(module in forwards or not is_plain(module) for module in run):
            continue
        if min(module.weight.nbytes for module in run) > _SMALL:
            continue
        if len({module.weight.dtype for module in run}) > 1:
            continue
        for first in range(0, len(run), _TOGETHER):
            members = run[first : first + _TOGETHER]
            group = _Group(members, counters(model))
            forwards |= {module: partial(group, module) for module in members}
    return forwards


def counters(model: nn.Module) -> Tensor:
    """The zeros of a model's products."""
    device = next(model.parameters()).device
    if model not in _COUNTS or _COUNTS[model].device != device:
        _COUNTS[model] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _COUNTS[model]


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels read ``x``, ``(..., ins)``, against ``weight``."""
    rows = x.numel() // max(1, x.shape[-1])
    if x.dtype != weight.dtype or x.device != weight.device or x.shape[-1] != weight.shape[1]:
        return False
    if not 0 < rows <= _ROWS or x.is_inference() or x.data_ptr() % 16:
        return False
    return x.stride(-1) != 1 or x.dim() == 1 or not x.reshape(-1, x.shape[-1]).stride(0) % 16


class _Group:
    """Linear layers of which the first computes all."""

    def __init__(self, members: Siblings, counts: Tensor) -> None:
        self.members, self.counts = members, counts
        self.given: tuple[Tensor, int] | None = None
        self.found: dict[nn.Module, Tensor] = {}

    @property
    def weights(self) -> list[Tensor]:
        return [member.weight for member in self.members]

    @property
    def biases(self) -> list[Tensor | None]:
        return [member.bias for member in self.members]

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        if self.given is not None and x is self.given[0] and x._version == self.given[1] and module in self.found:
            found = self.found.pop(module)
        elif module is self.members[0] and self._fits(x):
            together = products(x, self.weights, self.biases, self.counts)
            self.given, self.found = (x, x._version), dict(zip(self.members[1:], together[1:], strict=True))
            found = together[0]
        else:
            return functional.linear(x, module.weight, module.bias)
        if not self.found:
            self.given = None
        return found

    def _fits(self, x: Tensor) -> bool:
        if not few_rows(x, self.weights[0]):
            return False
        rows = x.numel() // x.shape[-1]
        shapes = tuple((len(w), b is None) for w, b in zip(self.weights, self.biases, strict=True))
        return tried_once(("products", x.dtype, x.device, x.shape[-1], rows, shapes), partial(self._tried, rows))

    def _tried(self, rows: int) -> bool:
        """Whether random rows give what the plain products give, but for the order of the sums."""
        first = self.weights[0]
        x = torch.randn(rows, first.shape[1], generator=torch.Generator().manual_seed(0)).to(first)
        found = products(x, self.weights, self.biases, self.counts)
        plain = [functional.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]
        sizes = [functional.linear(x.float().abs(), weight.float().abs()) for weight in self.weights]
        return all(map(same_sums, found, plain, sizes))
