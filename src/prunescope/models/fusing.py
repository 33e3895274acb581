"""Norms and rotations of a step in one kernel each, where the plain code launches eight and ten; products of the same rows in one (`products`),
an activation and its product with the other branch in one (`gating`), keys and values written by the rotation.

What may be replaced is tried, not listed. A module with one vector of weights is a norm if it gives on random numbers, with random weights, what
one of the three ways of `step_kernels` gives; a function of the modelling code that is called ``apply_rotary_pos_emb`` must give the same bits as
the kernel. The sums of a norm are taken in another order, so that an entry in some thousands is the next number of its dtype; everything else is
rounded where the plain code rounds.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.models.agreeing import kernels_run, next_to, tried_once
from prunescope.models.deferring import Deferring, Waiting, current, take
from prunescope.models.finding import other_forwards
from prunescope.models.gating import gate_forwards
from prunescope.models.products import Siblings, sibling_forwards

__all__ = ["fused", "fused_norm", "fused_rotation", "norm_way", "rotates_plainly", "write_token"]

_ROTARY = "apply_rotary_pos_emb"
_EPSILONS = ("variance_epsilon", "eps")
_WIDEST = 2**14  # of a row that one program holds
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_Key = tuple[Any, ...]
_WAYS: dict[_Key, int | None] = {}  # what was tried in this process, by class and dtype


@contextmanager
def fused(model: nn.Module, shared: Sequence[Siblings] = ()) -> Iterator[None]:
    """Within the block the model's norms, rotations and activations are one kernel each, where that was found to be the same, and so are the
    products of the layers that were seen to share an input (`products.shared_inputs`)."""
    first = next(model.parameters())
    if not kernels_run(first.device):
        yield
        return
    norms = [(module, norm_way(module)) for module in model.modules()]
    forwards = gate_forwards(model) | sibling_forwards(model, shared)
    forwards |= {module: partial(fused_norm, module, way) for module, way in norms if way is not None}
    homes = {type(module).__module__ for module in model.modules()} & sys.modules.keys()
    places = [vars(sys.modules[name]) for name in sorted(homes) if callable(vars(sys.modules[name]).get(_ROTARY))]
    before = [(place, place[_ROTARY]) for place in places]
    try:
        for place, plain in before:
            if rotates_plainly(plain, model.dtype, first.device):  # type: ignore[arg-type]
                place[_ROTARY] = partial(fused_rotation, plain)
        widths = {len(module.weight) for module, way in norms if way is not None}  # type: ignore[arg-type]
        with other_forwards(forwards), Deferring(widths if all(map(_seen_through, model.modules())) else ()):
            yield
    finally:
        for place, plain in before:
            place[_ROTARY] = plain


def _seen_through(module: nn.Module) -> bool:
    """Whether what a module runs is seen by PyTorch's function modes: not what is scripted or compiled."""
    return not isinstance(module, torch.jit.ScriptModule) and module.__dict__.get("_compiled_call_impl") is None


# --- norms -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def norm_way(module: nn.Module) -> int | None:
    """How ``module`` norms a row, as `step_kernels.norm_kernel` counts the ways; None if it is no norm, or another one."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) + len(module._modules) != 1:
        return None
    if "forward" in module.__dict__:  # somebody else's
        return None
    if weight.dtype not in _DTYPES or len(weight) > _WIDEST or _epsilon(module) is None:
        return None
    settings = ((name, value) for name, value in vars(module).items() if type(value) in (bool, int, float, str))
    key = (type(module), weight.dtype, weight.device, len(weight), *sorted(settings, key=repr))
    if key not in _WAYS:
        _WAYS[key] = _tried(module, weight)
    return _WAYS[key]


def _epsilon(module: Any) -> float | None:
    found = [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if len(found) == 1 else None


def _tried(module: nn.Module, weight: Tensor) -> int | None:
    generator = torch.Generator().manual_seed(0)
    other = copy.copy(module)  # with weights that tell the ways apart
    other._parameters = {"weight": nn.Parameter(torch.randn(weight.shape, generator=generator).to(weight), False)}
    scales = torch.tensor([1e-3, 1.0, 30.0, 1.0])[:, None]  # at the first the epsilon decides
    x = (torch.randn(4, len(weight), generator=generator) * scales).to(weight)
    try:
        expected = type(module).forward(other, x)
        if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
            return None
        fits = [way for way in range(3) if next_to(fused_norm(other, way, x), expected)]
    except Exception:  # whatever reads something else, or a compiler that is missing
        return None
    return fits[0] if len(fits) == 1 or (x.dtype == torch.float32 and fits) else None


def fused_norm(module: Any, way: int, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """``(..., d)`` of any strides -> the same shape, contiguous. A sum that waits for it is computed too."""
    from prunescope.models.step_kernels import norm_kernel

    waiting = take(x)
    weight, width = module.weight, x.shape[-1]
    if args or options or x.dtype != weight.dtype or width != len(weight):
        if waiting is not None:
            waiting.finish()
        return type(module).forward(module, x, *args, **options)  # type: ignore[no-any-return]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if waiting is None:
        rows = x.reshape(-1, width)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        given, stride = (rows, rows, rows), rows.stride(0)
    else:
        given, stride = (*waiting.given, x), width
    wide = 1 << (width - 1).bit_length()
    norm_kernel[(x.numel() // width,)](
        *given, weight, out, stride, width, _epsilon(module),
        WAY=way, ADD=waiting is not None, WIDE=wide, num_warps=max(1, min(8, wide // 256)), enable_fp_fusion=False,
    )  # fmt: skip
    return out


# --- rotations ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rotates_plainly(plain: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a function of queries, keys, cosines and sines gives the bits of `step_kernels.rotary_kernel`."""
    if dtype not in _DTYPES:
        return False

    def tried() -> bool:
        generator = torch.Generator().manual_seed(0)
        q, k, cos, sin = (
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape in ((3, 1, 4, 16), (3, 1, 2, 16), (3, 1, 16), (3, 1, 16))
        )
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        expected = plain(q, k, cos, sin)
        cache = q.new_zeros(2, 3, 2, 3, 16)
        found = tuple(map(torch.empty_like, expected))
        _rotate((q, k, cos, sin, *found), (*cache, k, torch.ones(1, dtype=torch.long, device=device)))
        found = (*found, *cache[:, :, :, 1:2])
        return all(torch.equal(one, other) for one, other in zip(found, (*expected, expected[1], k), strict=True))

    return tried_once(("rotation", plain, dtype, device), tried)


def fused_rotation(
    plain: Callable[..., Any], q: Tensor, k: Tensor, cos: Any = None, sin: Any = None, *args: Any, **options: Any
) -> Any:
    """Queries and keys ``(batch, heads, tokens, width)`` turned by ``(batch or 1, tokens, width)``; anything else goes to ``plain``."""
    tensors = (q, k, cos, sin)
    if (
        args
        or options
        or any(not isinstance(x, Tensor) or x.dtype != q.dtype or x.stride(-1) != 1 for x in tensors)
        or (q.dim(), k.dim(), cos.dim(), sin.dim()) != (4, 4, 3, 3)
        or not q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
        or q.shape[-1] % 2
        or cos.shape != sin.shape
        or cos.stride() != sin.stride()
        or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2])
        or cos.shape[1] != q.shape[2]
        or cos.shape[0] not in (1, q.shape[0])
    ):
        return plain(q, k, cos, sin, *args, **options)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    given = (q, k, cos, sin, q_out, k_out)
    deferring = current()
    if deferring is None:
        _rotate(given)
    else:  # until the keys are written
        deferring.waiting = Waiting((q_out, k_out), given, partial(_rotate, given))
    return q_out, k_out


def _rotate(given: tuple[Tensor, ...], cache: tuple[Tensor, ...] | None = None) -> None:
    """``cache``: keys, values, new values and position of `write_token`; the turned keys and these values go there too."""
    from prunescope.models.step_kernels import rotary_kernel

    q, k, cos, sin, q_out, k_out = given
    (batch, heads, tokens, width), of_keys = q.shape, k.shape[1]
    keys, values, new, position = cache or (q, q, q, q)
    angles = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    value = values.shape[-1]
    rotary_kernel[(batch * tokens, heads + of_keys + (of_keys if cache else 0))](
        q, k, cos, sin, q_out, k_out, new, keys, values, position, heads, of_keys, tokens, keys.shape[2],
        *q.stride()[:3], *k.stride()[:3], *new.stride()[:2], *angles, HALF=width // 2, WIDE=1 << (width // 2 - 1).bit_length(),
        VALUE=value, VALUE_WIDE=1 << (value - 1).bit_length(), CACHED=cache is not None, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


# --- keys and values ---------------------------------------------------------------------------------------------------


def write_token(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, position: Tensor) -> None:
    """Keys and values ``(batch, heads, 1, width)`` of one token into buffers ``(batch, heads, length, width)`` at ``position (1,)``, by the rotation
    that waits for it where there is one."""
    waiting = take(new_keys)
    pairs = ((keys, new_keys), (values, new_values))
    alike = keys.shape[:3] == values.shape[:3] and all(
        new.shape == (*held.shape[:2], 1, held.shape[3]) and new.stride(-1) == 1 and new.dtype == held.dtype and held.is_contiguous()
        for held, new in pairs
    )  # fmt: skip
    if waiting is not None and alike:
        _rotate(waiting.given, (keys, values, new_values, position))
        return
    if waiting is not None:
        waiting.finish()
    for held, new in pairs:
        held.index_copy_(2, position, new)
