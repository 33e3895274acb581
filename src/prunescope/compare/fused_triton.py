"""The sums of `fused`, gathered on a GPU: one Triton kernel a list, each logit read once.

Every program handles one segment of one row or pair. Sums are kept lane by lane in float32 (a lane adds at most ``SEGMENT / BLOCK`` values) and
reduced as a tree at the end, so that nothing depends on how many rows there are or on the order in which programs run: results are
the same to the bit from run to run and from batch to batch.

The ten likeliest tokens need no second sweep: the row kernel leaves the maximum of every 64 tokens, the ten largest of these name
the only places where the ten largest logits can be (also with ties, which go to the lower id).
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunescope.compare.fused import PAIR_SUMS, ROW_SUMS, SEGMENT, TOP, segments

__all__ = ["pair_sums", "row_sums"]

_SUB = 64  # tokens that share a maximum
_ROW_BLOCK, _ROW_WARPS = 1024, 4
_PAIR_BLOCK, _PAIR_WARPS = 512, 4
_LOW = tl.constexpr(-1e25)  # stands for minus infinity, but 0 times it is 0


@triton.jit
def _row_kernel(
    z_ptr, stride, vocab, inv_t, sums_ptr, maxima_ptr, n_maxima,
    SEG: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = z_ptr + row * stride
    first = seg * SEG
    count = tl.minimum(vocab - first, SEG)
    lane = tl.arange(0, BLOCK)
    seen = tl.load(base + first + lane, mask=lane < count, other=0.0)
    shift = tl.sum(seen, 0) / tl.minimum(count, BLOCK)
    m = tl.full([BLOCK], _LOW, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    u = tl.zeros([BLOCK], tl.float32)
    off = tl.zeros([BLOCK], tl.float32)
    off2 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        x = tl.load(base + first + start + lane, mask=inside, other=_LOW)
        # a running softmax of every lane: one exponential whichever of the two is larger
        d = (x - m) * inv_t
        e = tl.exp(-tl.abs(d))
        up = d > 0
        u = tl.where(up, (u - s * d) * e, u + e * d)
        s = tl.where(up, s * e + 1.0, s + e)
        m = tl.maximum(m, x)
        c = tl.where(inside, x - shift, 0.0)
        off += c
        off2 += c * c
        best = tl.max(tl.reshape(x + 0.0, [BLOCK // SUB, SUB]), 1)
        place = (first + start) // SUB + tl.arange(0, BLOCK // SUB)
        tl.store(maxima_ptr + row * n_maxima + place, best, mask=place < n_maxima)
    peak = tl.max(m, 0)
    below = (m - peak) * inv_t
    w = tl.exp(below)
    out = sums_ptr + (row * tl.num_programs(1) + seg) * N
    tl.store(out, peak)
    tl.store(out + 1, tl.sum(s * w, 0))
    tl.store(out + 2, tl.sum((u + s * below) * w, 0))
    tl.store(out + 3, shift)
    tl.store(out + 4, tl.sum(off, 0))
    tl.store(out + 5, tl.sum(off2, 0))


@triton.jit
def _ordered(x, index):
    """One int64 that sorts like (value, lower index first); -0 and 0 are one value."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index.to(tl.int64))


@triton.jit
def _top_kernel(
    z_ptr, stride, vocab, maxima_ptr, n_maxima, top_ptr,
    SUB: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, WIDE)
    key = _ordered(tl.load(maxima_ptr + row * n_maxima + group, mask=group < n_maxima, other=_LOW), group)
    place = tl.arange(0, K2)
    chosen = tl.full([K2], n_maxima, tl.int32)
    lowest = tl.full([1], -(2**63), tl.int64)
    for k in range(K):
        best = tl.max(key, 0)
        chosen = tl.where(place == k, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32), chosen)
        key = tl.where(key == best, lowest, key)
    token = chosen[:, None] * SUB + tl.arange(0, SUB)[None, :]
    key2 = _ordered(tl.load(z_ptr + row * stride + token, mask=token < vocab, other=_LOW), token)
    found = tl.zeros([K2], tl.int32)
    for k in range(K):
        best = tl.max(tl.max(key2, 1), 0)
        found = tl.where(place == k, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32), found)
        key2 = tl.where(key2 == best, lowest[:, None], key2)
    tl.store(top_ptr + row * K + place, found.to(tl.int64), mask=place < K)


@triton.jit
def _pair_kernel(
    z_ptr, stride, vocab, inv_t, pairs_ptr, pilots_ptr, sums_ptr,
    SEG: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    pair, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr = z_ptr + tl.load(pairs_ptr + 2 * pair) * stride
    y_ptr = z_ptr + tl.load(pairs_ptr + 2 * pair + 1) * stride
    first = seg * SEG
    count = tl.minimum(vocab - first, SEG)
    guess = pilots_ptr + pair * P
    z_coef, z_far = tl.load(guess), tl.load(guess + 1) > 0
    mean, mean_y, mean_d = tl.load(guess + 2), tl.load(guess + 3), tl.load(guess + 4)
    peak, mass, peak_y, mass_y = tl.load(guess + 5), tl.load(guess + 6), tl.load(guess + 7), tl.load(guess + 8)
    anchor_p, anchor_q = tl.load(guess + 9), tl.load(guess + 10)
    anchor_r, anchor_t, offset = tl.load(guess + 11), tl.load(guess + 12), tl.load(guess + 13)
    p_coef, p_far, best_y = tl.load(guess + 14), tl.load(guess + 15) > 0, tl.load(guess + 16)

    rz2 = tl.zeros([BLOCK], tl.float32)
    rzz = tl.zeros([BLOCK], tl.float32)
    dz1 = tl.zeros([BLOCK], tl.float32)
    dc1 = tl.zeros([BLOCK], tl.float32)
    dc2 = tl.zeros([BLOCK], tl.float32)
    zc = tl.zeros([BLOCK], tl.float32)
    p_v = tl.zeros([BLOCK], tl.float32)
    p_v2 = tl.zeros([BLOCK], tl.float32)
    q_v = tl.zeros([BLOCK], tl.float32)
    q_v2 = tl.zeros([BLOCK], tl.float32)
    r_v = tl.zeros([BLOCK], tl.float32)
    r_v2 = tl.zeros([BLOCK], tl.float32)
    t_v = tl.zeros([BLOCK], tl.float32)
    t_v2 = tl.zeros([BLOCK], tl.float32)
    p2 = tl.zeros([BLOCK], tl.float32)
    q2 = tl.zeros([BLOCK], tl.float32)
    m = tl.zeros([BLOCK], tl.float32)
    g = tl.zeros([BLOCK], tl.float32)
    g_rev = tl.zeros([BLOCK], tl.float32)
    js = tl.zeros([BLOCK], tl.float32)
    dp1 = tl.zeros([BLOCK], tl.float32)
    sq = tl.zeros([BLOCK], tl.float32)
    rp2 = tl.zeros([BLOCK], tl.float32)
    rpp = tl.zeros([BLOCK], tl.float32)
    rank = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        x = tl.load(x_ptr + first + start + lane, mask=inside, other=0.0)
        y = tl.load(y_ptr + first + start + lane, mask=inside, other=0.0)
        keep = tl.where(inside, 1.0, 0.0)

        # logits; a lane outside has x = y = d = 0
        d = y - x
        r = tl.where(z_far, y, d) - z_coef * x
        rz2 += r * r
        rzz += r * x
        dz1 += tl.abs(d)
        c = (d - mean_d) * keep
        dc1 += c
        dc2 += c * c
        zc += (x - mean) * tl.where(z_far, (y - mean_y) * keep, c)
        rank += tl.where((y > best_y) & inside, 1.0, 0.0)

        # probabilities; 0 outside
        p = tl.exp((x - peak) * inv_t - mass) * keep
        q = tl.exp((y - peak_y) * inv_t - mass_y) * keep
        pp = p * p
        qq = q * q
        p2 += pp
        q2 += qq
        v = d - anchor_p
        f = p * v
        p_v += f
        p_v2 += f * v
        w = d - anchor_q
        f = q * w
        q_v += f
        q_v2 += f * w
        w = d - anchor_r
        f = pp * w
        r_v += f
        r_v2 += f * w
        w = d - anchor_t
        f = qq * w
        t_v += f
        t_v2 += f * w

        # log(q / p), and e^L - 1 = L + L^2 phi where it is near 0
        ratio = v * inv_t - offset
        size = tl.abs(ratio)
        near = size < 0.5
        n = tl.where(near, ratio, 0.0)
        phi = n * (1 / 40320) + 1 / 5040
        phi = phi * n + 1 / 720
        phi = phi * n + 1 / 120
        phi = phi * n + 1 / 24
        phi = phi * n + 1 / 6
        phi = phi * n + 1 / 2
        n2 = n * n
        pn2 = p * n2
        dp = tl.where(near, p * (n + n2 * phi), q - p)
        m += dp
        g += tl.where(near, pn2 * phi, dp - p * ratio)
        g_rev += tl.where(near, pn2 * (1.0 - phi * (1.0 - n)), q * ratio - dp)
        h2 = n2 * 0.25
        cosh = h2 * (0.5 + h2 * (-1 / 12 + h2 * (1 / 45 - h2 * (17 / 2520))))
        apart = (p + q) * (0.6931471805599453 - tl.log(1.0 + tl.exp(-size))) - tl.minimum(p, q) * size
        js += tl.where(near, dp * n * 0.5 - (p + p + dp) * cosh, apart)
        dp1 += tl.abs(dp)
        sq += tl.where(near, tl.where(dp > 0, p + dp, tl.where(dp < 0, -(p + dp), 0.0)), 0.0)
        rp = tl.where(p_far, q, dp) - p_coef * p
        rp2 += rp * rp
        rpp += rp * p
    out = sums_ptr + (pair * tl.num_programs(1) + seg) * N
    tl.store(out, tl.sum(rz2, 0))
    tl.store(out + 1, tl.sum(rzz, 0))
    tl.store(out + 2, tl.sum(dz1, 0))
    tl.store(out + 3, tl.sum(dc1, 0))
    tl.store(out + 4, tl.sum(dc2, 0))
    tl.store(out + 5, tl.sum(zc, 0))
    tl.store(out + 6, tl.sum(p_v, 0))
    tl.store(out + 7, tl.sum(p_v2, 0))
    tl.store(out + 8, tl.sum(q_v, 0))
    tl.store(out + 9, tl.sum(q_v2, 0))
    tl.store(out + 10, tl.sum(r_v, 0))
    tl.store(out + 11, tl.sum(r_v2, 0))
    tl.store(out + 12, tl.sum(t_v, 0))
    tl.store(out + 13, tl.sum(t_v2, 0))
    tl.store(out + 14, tl.sum(p2, 0))
    tl.store(out + 15, tl.sum(q2, 0))
    tl.store(out + 16, tl.sum(m, 0))
    tl.store(out + 17, tl.sum(g, 0))
    tl.store(out + 18, tl.sum(g_rev, 0))
    tl.store(out + 19, tl.sum(js, 0) * 0.5)
    tl.store(out + 20, tl.sum(dp1, 0))
    tl.store(out + 21, tl.sum(sq, 0))
    tl.store(out + 22, tl.sum(rp2, 0))
    tl.store(out + 23, tl.sum(rpp, 0))
    tl.store(out + 24, tl.sum(rank, 0))


def row_sums(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `fused.Backend`."""
    rows, vocab = z.shape
    _check(z)
    n_maxima = -(-vocab // _SUB)
    sums = z.new_empty(rows, segments(vocab), len(ROW_SUMS))
    maxima = z.new_empty(rows, n_maxima)
    top = torch.empty(rows, TOP, dtype=torch.int64, device=z.device)
    _row_kernel[(rows, segments(vocab))](
        z, z.stride(0), vocab, 1 / temperature, sums, maxima, n_maxima,
        SEG=SEGMENT, BLOCK=_ROW_BLOCK, SUB=_SUB, N=len(ROW_SUMS), num_warps=_ROW_WARPS,
    )  # fmt: skip
    wide = max(16, triton.next_power_of_2(n_maxima))  # at least TOP, so that none is chosen twice
    _top_kernel[(rows,)](
        z, z.stride(0), vocab, maxima, n_maxima, top,
        SUB=_SUB, WIDE=wide, K=TOP, K2=16, num_warps=4 if wide <= 2048 else 8,
    )  # fmt: skip
    return sums, top[:, : min(TOP, vocab)]


def pair_sums(z: Tensor, pairs: Tensor, pilots: Tensor, temperature: float) -> Tensor:
    """See `fused.Backend`."""
    vocab = z.shape[1]
    _check(z)
    sums = z.new_empty(len(pairs), segments(vocab), len(PAIR_SUMS))
    _pair_kernel[(len(pairs), segments(vocab))](
        z, z.stride(0), vocab, 1 / temperature, pairs.contiguous(), pilots.contiguous(), sums,
        SEG=SEGMENT, BLOCK=_PAIR_BLOCK, P=pilots.shape[1], N=len(PAIR_SUMS), num_warps=_PAIR_WARPS,
    )  # fmt: skip
    return sums


def _check(z: Tensor) -> None:
    if z.dtype != torch.float32 or z.stride(1) != 1:
        raise ValueError(f"logits must be float32 with unit stride, not {z.dtype} with strides {z.stride()}")
