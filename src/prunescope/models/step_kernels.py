"""The kernels of a step: a norm with the sum before it, a rotation with the write of keys and values, an activation with its product, with the
roundings of the plain code; products of few rows with several matrices, and of experts with the rows that chose them. The launch code is in `fusing`,
`gating`, `products` and `capturing`."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

__all__ = [
    "gate_kernel",
    "gated_product_kernel",
    "grouped_kernel",
    "norm_kernel",
    "product_kernel",
    "rotary_kernel",
]


@triton.jit
def norm_kernel(
    x_ptr, other_ptr, sum_ptr, weight_ptr, out_ptr, stride, width, eps, WAY: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """A row a program. WAY 0: rounded, then times the weight; 1: times the weight in float32; 2: times one plus the weight in float32.
    ADD: of the sum of two rows, which is rounded and kept."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    own = at < width
    x = tl.load(x_ptr + row * stride + at, mask=own, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=own, other=0.0)
    if ADD:
        total = (x + tl.load(other_ptr + row * stride + at, mask=own, other=0.0).to(tl.float32)).to(
            sum_ptr.dtype.element_ty
        )
        tl.store(sum_ptr + row * stride + at, total, mask=own)
        x = total.to(tl.float32)
    x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps))
    kind = out_ptr.dtype.element_ty
    if WAY == 0:
        found = weight.to(tl.float32) * x.to(kind).to(tl.float32)
    elif WAY == 1:
        found = weight.to(tl.float32) * x
    else:
        found = x * (1.0 + weight.to(tl.float32))
    tl.store(out_ptr + row * width + at, found.to(kind), mask=own)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out, k_out, v_ptr, keys_ptr, values_ptr, position_ptr, q_heads, k_heads, tokens, length,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, angle_batch, angle_token,
    HALF: tl.constexpr, WIDE: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDE: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """A head of a token a program: ``x cos + (-second half, first half) sin``, each product rounded before they are added. CACHED: the keys of one token
    go to the cache too, and so do its values, each a program more."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text, token = token // tokens, token % tokens
    if CACHED:
        if head >= q_heads + k_heads:
            head -= q_heads + k_heads
            place = (text * k_heads + head) * length + tl.load(position_ptr)
            at = tl.arange(0, VALUE_WIDE)
            value = tl.load(v_ptr + text * v_batch + head * v_head + at, mask=at < VALUE)
            tl.store(values_ptr + place * VALUE + at, value, mask=at < VALUE)
            return
    kind = q_out.dtype.element_ty
    at = tl.arange(0, WIDE)
    own = at < HALF
    angle = text * angle_batch + token * angle_token + at
    kept = 0
    if head < q_heads:
        source = q_ptr + text * q_batch + head * q_head + token * q_token + at
        goal = q_out + ((text * q_heads + head) * tokens + token) * (2 * HALF) + at
    else:
        head -= q_heads
        source = k_ptr + text * k_batch + head * k_head + token * k_token + at
        goal = k_out + ((text * k_heads + head) * tokens + token) * (2 * HALF) + at
        kept = 1
    first = tl.load(source, mask=own, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=own, other=0.0).to(tl.float32)
    cos, cos_2 = (tl.load(cos_ptr + angle, mask=own, other=0.0), tl.load(cos_ptr + angle + HALF, mask=own, other=0.0))
    sin, sin_2 = (tl.load(sin_ptr + angle, mask=own, other=0.0), tl.load(sin_ptr + angle + HALF, mask=own, other=0.0))
    plain = (first * cos.to(tl.float32)).to(kind).to(tl.float32)
    turned = (-second * sin.to(tl.float32)).to(kind).to(tl.float32)
    first_out = (plain + turned).to(kind)
    plain = (second * cos_2.to(tl.float32)).to(kind).to(tl.float32)
    turned = (first * sin_2.to(tl.float32)).to(kind).to(tl.float32)
    second_out = (plain + turned).to(kind)
    tl.store(goal, first_out, mask=own)
    tl.store(goal + HALF, second_out, mask=own)
    if CACHED:
        if kept == 1:
            keys = keys_ptr + ((text * k_heads + head) * length + tl.load(position_ptr)) * (2 * HALF) + at
            tl.store(keys, first_out, mask=own)
            tl.store(keys + HALF, second_out, mask=own)


@triton.jit
def _gated(gate, up, kind: tl.constexpr, KIND: tl.constexpr, LIBRARY: tl.constexpr):
    """``act(gate) * up`` of float32, both rounded, as PyTorch computes them. KIND 0: SiLU; 1: GELU by tanh. LIBRARY: by CUDA's functions, which
    the interpreter lacks."""
    if KIND == 0:
        power = libdevice.exp(-gate) if LIBRARY else tl.exp(-gate)
        found = tl.div_rn(gate, 1.0 + power)
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * (gate * gate * gate))
        turned = (
            libdevice.tanh(inner)
            if LIBRARY
            else (1.0 - 2.0 / (tl.exp(2.0 * inner.to(tl.float64)) + 1.0)).to(tl.float32)
        )
        found = 0.5 * gate * (1.0 + turned)
    return (found.to(kind).to(tl.float32) * up).to(kind)


@triton.jit
def gate_kernel(gate_ptr, up_ptr, out_ptr, count, KIND: tl.constexpr, LIBRARY: tl.constexpr, WIDE: tl.constexpr):
    """`_gated` of ``count`` entries."""
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    own = at < count
    gate = tl.load(gate_ptr + at, mask=own, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=own, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, _gated(gate, up, out_ptr.dtype.element_ty, KIND, LIBRARY), mask=own)


@triton.jit
def gated_product_kernel(
    x_ptr, gate_weight, up_weight, gate_bias, up_bias, out_ptr, part_ptr, count_ptr, rows, ins, outs, x_stride, gate_stride, up_stride,
    BIAS: tl.constexpr, KIND: tl.constexpr, LIBRARY: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """`_gated` of two products of the same ``(rows, ins)``, each rounded first; else as `product_kernel`."""
    tile, part = tl.program_id(0), tl.program_id(1)
    at, row, inner = tl.arange(0, OUTS), tl.arange(0, ROWS), tl.arange(0, INS)
    outer = tile * OUTS + at
    within = tl.minimum(outer, outs - 1)[:, None].to(tl.int64)
    gates = gate_weight + within * gate_stride + inner[None, :]
    ups = up_weight + within * up_stride + inner[None, :]
    inputs = x_ptr + tl.minimum(row, rows - 1)[None, :] * x_stride + inner[:, None]
    steps = tl.cdiv(ins, INS)
    each = tl.cdiv(steps, SPLIT)
    gate, up = tl.zeros((OUTS, ROWS), tl.float32), tl.zeros((OUTS, ROWS), tl.float32)
    for step in range(part * each, tl.minimum(part * each + each, steps)):
        begin = step * INS
        if EVEN:
            left = tl.load(gates + begin, eviction_policy="evict_first")
            other = tl.load(ups + begin, eviction_policy="evict_first")
            right = tl.load(inputs + begin)
        else:
            own = inner[None, :] < ins - begin
            left = tl.load(gates + begin, mask=own, other=0.0, eviction_policy="evict_first")
            other = tl.load(ups + begin, mask=own, other=0.0, eviction_policy="evict_first")
            right = tl.load(inputs + begin, mask=inner[:, None] < ins - begin, other=0.0)
        gate = tl.dot(left, right, gate)
        up = tl.dot(other, right, up)
    last = True
    if SPLIT > 1:
        parts = part_ptr + tile.to(tl.int64) * (2 * SPLIT * OUTS * ROWS) + at[:, None] * ROWS + row[None, :]
        tl.store(parts + 2 * part * (OUTS * ROWS), gate)
        tl.store(parts + (2 * part + 1) * (OUTS * ROWS), up)
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            gate = tl.load(parts, cache_modifier=".cg")
            up = tl.load(parts + OUTS * ROWS, cache_modifier=".cg")
            for k in tl.static_range(1, SPLIT):
                gate += tl.load(parts + 2 * k * (OUTS * ROWS), cache_modifier=".cg")
                up += tl.load(parts + (2 * k + 1) * (OUTS * ROWS), cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
    if last:
        if BIAS:
            gate += tl.load(gate_bias + outer, mask=outer < outs, other=0.0).to(tl.float32)[:, None]
            up += tl.load(up_bias + outer, mask=outer < outs, other=0.0).to(tl.float32)[:, None]
        kind = out_ptr.dtype.element_ty
        found = _gated(gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32), kind, KIND, LIBRARY)
        tl.store(
            out_ptr + row[None, :] * outs + outer[:, None], found, mask=(row < rows)[None, :] & (outer < outs)[:, None]
        )


@triton.jit
def product_kernel(
    x_ptr, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_ptr, part_ptr, count_ptr, rows, ins, x_stride, stride_0, stride_1, stride_2,
    outs_0, outs_1, outs_2, BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, BIAS_2: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """``x weight^T + bias`` of one to three matrices that are given the same ``(rows, ins)``; some outputs of one of them a program, which reads one
    of ``SPLIT`` parts of their inputs. The outputs lie one matrix after another, each ``(rows, outs)``.

    The parts of a tile go to memory in float32, and the program that is the last to finish adds them from the first to the last: which one that is
    changes nothing. The counters must be zero before, and are zero after.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_0, tiles_1 = tl.cdiv(outs_0, OUTS), tl.cdiv(outs_1, OUTS)
    at = tl.arange(0, OUTS)
    bias = tl.zeros((OUTS,), tl.float32)
    if tile < tiles_0:
        weight, stride, outs, goal = weight_0, stride_0, outs_0, out_ptr
        outer = tile * OUTS + at
        if BIAS_0:
            bias = tl.load(bias_0 + outer, mask=outer < outs, other=0.0).to(tl.float32)
    elif tile < tiles_0 + tiles_1:
        weight, stride, outs, goal = weight_1, stride_1, outs_1, out_ptr + rows * outs_0
        outer = (tile - tiles_0) * OUTS + at
        if BIAS_1:
            bias = tl.load(bias_1 + outer, mask=outer < outs, other=0.0).to(tl.float32)
    else:
        weight, stride, outs, goal = weight_2, stride_2, outs_2, out_ptr + rows * (outs_0 + outs_1)
        outer = (tile - tiles_0 - tiles_1) * OUTS + at
        if BIAS_2:
            bias = tl.load(bias_2 + outer, mask=outer < outs, other=0.0).to(tl.float32)
    row, inner = tl.arange(0, ROWS), tl.arange(0, INS)
    # what lies outside is read from the last row: its results are not stored
    weights = weight + tl.minimum(outer, outs - 1)[:, None].to(tl.int64) * stride + inner[None, :]
    inputs = x_ptr + tl.minimum(row, rows - 1)[None, :] * x_stride + inner[:, None]
    steps = tl.cdiv(ins, INS)
    each = tl.cdiv(steps, SPLIT)
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for step in range(part * each, tl.minimum(part * each + each, steps)):
        begin = step * INS
        if EVEN:
            left = tl.load(weights + begin, eviction_policy="evict_first")
            right = tl.load(inputs + begin)
        else:
            left = tl.load(weights + begin, mask=inner[None, :] < ins - begin, other=0.0, eviction_policy="evict_first")
            right = tl.load(inputs + begin, mask=inner[:, None] < ins - begin, other=0.0)
        total = tl.dot(left, right, total)
    last = True
    if SPLIT > 1:
        place = at[:, None] * ROWS + row[None, :]
        parts = part_ptr + tile.to(tl.int64) * (SPLIT * OUTS * ROWS) + place
        tl.store(parts + part * (OUTS * ROWS), total)
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            total = tl.load(parts, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(parts + other * (OUTS * ROWS), cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
    if last:
        found = (total + bias[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(
            goal + row[None, :] * outs + outer[:, None], found, mask=(row < rows)[None, :] & (outer < outs)[:, None]
        )


@triton.jit
def grouped_kernel(
    x_ptr, weight_ptr, out_ptr, index_ptr, tokens, x_stride, of_expert, of_out, of_in, outs, ins,
    K: tl.constexpr, K2: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Some outputs of one expert a program, for the tokens that chose it: ``out[t K + k] = weight[index[t, k]] x``, x being row t, or with SLOTS
    row t K + k.

    Its weights are read once for every ``ROWS`` tokens, and not at all where none of them chose it.
    """
    expert = tl.program_id(1)
    outer = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    within = outer < outs
    weights = weight_ptr + expert.to(tl.int64) * of_expert + outer[None, :].to(tl.int64) * of_out
    k = tl.arange(0, K2)
    for first in range(0, tokens, ROWS):
        token = first + tl.arange(0, ROWS)
        known = (token < tokens)[:, None] & (k < K)[None, :]
        chosen = tl.load(index_ptr + token[:, None] * K + k[None, :], mask=known, other=-1)
        slot = tl.max(tl.where(chosen == expert, k[None, :], -1), 1)
        there = slot >= 0
        if tl.max(slot, 0) >= 0:
            row = (token * K + slot if SLOTS else token).to(tl.int64)
            x = x_ptr + tl.where(there, row, 0)[:, None] * x_stride
            total = tl.zeros((ROWS, OUTS), tl.float32)
            for begin in range(0, ins, INS):
                inner = begin + tl.arange(0, INS)
                own = inner < ins
                left = tl.load(x + inner[None, :], mask=there[:, None] & own[None, :], other=0.0)
                right = tl.load(weights + inner[:, None] * of_in, mask=own[:, None] & within[None, :], other=0.0)
                total = tl.dot(left, right, total, input_precision="ieee")
            goal = out_ptr + (token * K + slot)[:, None].to(tl.int64) * outs + outer[None, :]
            tl.store(goal, total.to(out_ptr.dtype.element_ty), mask=there[:, None] & within[None, :])
