"""A norm and a rotation of queries and keys in one kernel each, with the roundings of the plain code, and products of experts with the rows that
chose them. The launch code is in `fusing` and `capturing`."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grouped_kernel", "norm_kernel", "rotary_kernel"]


@triton.jit
def norm_kernel(x_ptr, weight_ptr, out_ptr, stride, width, eps, WAY: tl.constexpr, WIDE: tl.constexpr):
    """A row a program. WAY 0: rounded, then times the weight; 1: times the weight in float32; 2: times one plus the weight in float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    own = at < width
    x = tl.load(x_ptr + row * stride + at, mask=own, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=own, other=0.0)
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
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out, k_out, q_heads, k_heads, tokens, q_batch, q_head, q_token, k_batch, k_head, k_token, angle_batch, angle_token,
    HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A head of a token a program: ``x cos + (-second half, first half) sin``, each product rounded before they are added."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text, token = token // tokens, token % tokens
    kind = q_out.dtype.element_ty
    at = tl.arange(0, WIDE)
    own = at < HALF
    angle = text * angle_batch + token * angle_token + at
    if head < q_heads:
        source = q_ptr + text * q_batch + head * q_head + token * q_token + at
        goal = q_out + ((text * q_heads + head) * tokens + token) * (2 * HALF) + at
    else:
        head -= q_heads
        source = k_ptr + text * k_batch + head * k_head + token * k_token + at
        goal = k_out + ((text * k_heads + head) * tokens + token) * (2 * HALF) + at
    first = tl.load(source, mask=own, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=own, other=0.0).to(tl.float32)
    cos, cos_2 = (tl.load(cos_ptr + angle, mask=own, other=0.0), tl.load(cos_ptr + angle + HALF, mask=own, other=0.0))
    sin, sin_2 = (tl.load(sin_ptr + angle, mask=own, other=0.0), tl.load(sin_ptr + angle + HALF, mask=own, other=0.0))
    plain = (first * cos.to(tl.float32)).to(kind).to(tl.float32)
    turned = (-second * sin.to(tl.float32)).to(kind).to(tl.float32)
    tl.store(goal, (plain + turned).to(kind), mask=own)
    plain = (second * cos_2.to(tl.float32)).to(kind).to(tl.float32)
    turned = (first * sin_2.to(tl.float32)).to(kind).to(tl.float32)
    tl.store(goal + HALF, (plain + turned).to(kind), mask=own)


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
