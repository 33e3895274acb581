"""The sums of the pairs on a GPU: what `triton_sums` gathers in its second sweep.

Two kernels gather them. `far_kernel` knows pairs whose distributions differ visibly (a KL of 0.01 and more): there every divergence follows from
p, q and the row's own normalisers with digits to spare, at some 40 operations and three special functions a logit. `near_kernel` knows all pairs: it
takes q - p and the divergences from log(q / p) by series where that is small, at twice the operations. The pilots say which pairs the first
one tries; `settle_kernel` (triton_settle.py) then looks at the sums themselves, and what would have lost digits is swept again by the other. So a
pilot that is wrong costs time, never digits.

Both leave the logits' part as three sums, about the line that the sample suggests: with x~ = x - mean and r = (y or d) - slope x - level, sum r^2,
sum r x~ and sum |d|. The sum of r is known from the rows. `settle_kernel` makes the sums of `PAIR_SUMS` of them, in float64.
"""

# mypy: ignore-errors
from __future__ import annotations

import os

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from prunescope.compare.kernels.sums import PAIR_SUMS, PILOTS, SEGMENT, Prepared, segments
from prunescope.compare.kernels.triton_settle import settle_kernel

__all__ = ["COARSE", "binary", "swept"]

COARSE = ("far", "slope", "level", "log_p", "log_q", "ratio", "coef")  # what the pilots say beyond PILOTS
_FAR_SUMS, _NEAR_SUMS = 19, 22
_FAR_BLOCK, _FAR_WARPS = 256, 2
_NEAR_BLOCK, _NEAR_WARPS = 64, 2
_FAST = (
    os.environ.get("TRITON_INTERPRET") != "1"
)  # fused multiply-adds and the hardware's logarithm, which the interpreter lacks
_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)


def binary(temperature: float) -> float:
    """1 / T in binary digits, as the kernels hold it: a float32."""
    return float(np.float32(_LOG2E / temperature))


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _line(x, factor, constant, FAST: tl.constexpr):
    """``x * factor + constant`` rounded once."""
    if FAST:
        return tl.fma(x, factor, constant)
    else:
        return (x.to(tl.float64) * factor + constant).to(tl.float32)


@triton.jit
def far_kernel(
    z_ptr, stride, vocab, binary_t, pairs_ptr, pilots_ptr, coarse_ptr, sums_ptr,
    SEG: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, C: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    pair, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    coarse = coarse_ptr + pair * C
    if tl.load(coarse) > 0:
        x_ptr = z_ptr + tl.load(pairs_ptr + 2 * pair) * stride
        y_ptr = z_ptr + tl.load(pairs_ptr + 2 * pair + 1) * stride
        first = seg * SEG
        count = tl.minimum(vocab - first, SEG)
        slope, level = -tl.load(coarse + 1), tl.load(coarse + 2)
        log_p, log_q, ratio, coef = (
            tl.load(coarse + 3),
            tl.load(coarse + 4),
            tl.load(coarse + 5),
            -tl.load(coarse + 6),
        )
        guess = pilots_ptr + pair * P
        mean, anchor_p, anchor_q = tl.load(guess + 2), tl.load(guess + 9), tl.load(guess + 10)
        best_y = tl.load(guess + 16)

        rest2 = tl.zeros([BLOCK], tl.float32)
        rest_x = tl.zeros([BLOCK], tl.float32)
        dz1 = tl.zeros([BLOCK], tl.float32)
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
        js_p = tl.zeros([BLOCK], tl.float32)
        js_q = tl.zeros([BLOCK], tl.float32)
        dp1 = tl.zeros([BLOCK], tl.float32)
        rp2 = tl.zeros([BLOCK], tl.float32)
        rpp = tl.zeros([BLOCK], tl.float32)
        rank = tl.zeros([BLOCK], tl.float32)
        lane = tl.arange(0, BLOCK)
        half_ratio = ratio * 0.5
        for start in range(0, count, BLOCK):
            if EVEN:
                x = tl.load(x_ptr + first + start + lane)
                y = tl.load(y_ptr + first + start + lane)
                d = y - x
                r = tl.fma(x, slope, d) - level
                a = _line(x, binary_t, log_p, FAST)
                b = _line(y, binary_t, log_q, FAST)
                p = tl.exp2(a)
                q = tl.exp2(b)
                rank += tl.where(y > best_y, 1.0, 0.0)
            else:  # a lane outside has r = d = p = q = 0
                inside = start + lane < count
                x = tl.load(x_ptr + first + start + lane, mask=inside, other=0.0)
                y = tl.load(y_ptr + first + start + lane, mask=inside, other=0.0)
                d = y - x
                r = tl.where(inside, tl.fma(x, slope, d) - level, 0.0)
                a = _line(x, binary_t, log_p, FAST)
                b = _line(y, binary_t, log_q, FAST)
                p = tl.where(inside, tl.exp2(a), 0.0)
                q = tl.where(inside, tl.exp2(b), 0.0)
                rank += tl.where(inside & (y > best_y), 1.0, 0.0)
            rest2 += r * r
            rest_x += r * (x - mean)
            dz1 += tl.abs(d)
            v = d - anchor_p
            w = d - anchor_q
            v2 = v * v
            w2 = w * w
            pp = p * p
            qq = q * q
            p_v += p * v
            p_v2 += p * v2
            q_v += q * w
            q_v2 += q * w2
            r_v += pp * v
            r_v2 += pp * v2
            t_v += qq * w
            t_v2 += qq * w2
            p2 += pp
            q2 += qq
            middle = _log2(tl.maximum(q * half_ratio + p * 0.5, 1e-37), FAST)
            js_p += p * (a - middle)
            js_q += q * (b - middle)
            dp1 += tl.abs(q * ratio - p)
            r = p * coef + q
            rp2 += r * r
            rpp += r * p
        out = sums_ptr + (pair * tl.num_programs(1) + seg) * N
        tl.store(out, tl.sum(rest2, 0))
        tl.store(out + 1, tl.sum(rest_x, 0))
        tl.store(out + 2, tl.sum(dz1, 0))
        tl.store(out + 3, tl.sum(p_v, 0))
        tl.store(out + 4, tl.sum(p_v2, 0))
        tl.store(out + 5, tl.sum(q_v, 0))
        tl.store(out + 6, tl.sum(q_v2, 0))
        tl.store(out + 7, tl.sum(r_v, 0))
        tl.store(out + 8, tl.sum(r_v2, 0))
        tl.store(out + 9, tl.sum(t_v, 0))
        tl.store(out + 10, tl.sum(t_v2, 0))
        tl.store(out + 11, tl.sum(p2, 0))
        tl.store(out + 12, tl.sum(q2, 0))
        tl.store(out + 13, tl.sum(rank, 0))
        tl.store(out + 14, tl.sum(dp1, 0))
        tl.store(out + 15, tl.sum(rp2, 0))
        tl.store(out + 16, tl.sum(rpp, 0))
        tl.store(out + 17, tl.sum(js_p, 0))
        tl.store(out + 18, tl.sum(js_q, 0))


@triton.jit
def near_kernel(
    z_ptr, stride, vocab, inv_t, binary_t, pairs_ptr, pilots_ptr, coarse_ptr, settled_ptr, sums_ptr,
    SEG: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, C: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    pair, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settled_ptr + pair) == 0:
        x_ptr = z_ptr + tl.load(pairs_ptr + 2 * pair) * stride
        y_ptr = z_ptr + tl.load(pairs_ptr + 2 * pair + 1) * stride
        first = seg * SEG
        count = tl.minimum(vocab - first, SEG)
        guess, coarse = pilots_ptr + pair * P, coarse_ptr + pair * C
        slope, level = -tl.load(coarse + 1), tl.load(coarse + 2)
        z_far, mean = tl.load(guess + 1) > 0, tl.load(guess + 2)
        peak, mass, peak_y, mass_y = (
            tl.load(guess + 5),
            tl.load(guess + 6) * -1.4426950408889634,
            tl.load(guess + 7),
            tl.load(guess + 8) * -1.4426950408889634,
        )
        anchor_p, anchor_q = tl.load(guess + 9), tl.load(guess + 10)
        anchor_r, anchor_t, offset = tl.load(guess + 11), tl.load(guess + 12), -tl.load(guess + 13)
        p_coef, p_far, best_y = -tl.load(guess + 14), tl.load(guess + 15) > 0, tl.load(guess + 16)

        rest2 = tl.zeros([BLOCK], tl.float32)
        rest_x = tl.zeros([BLOCK], tl.float32)
        dz1 = tl.zeros([BLOCK], tl.float32)
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
        g_back = tl.zeros([BLOCK], tl.float32)
        js = tl.zeros([BLOCK], tl.float32)
        dp1 = tl.zeros([BLOCK], tl.float32)
        sq = tl.zeros([BLOCK], tl.float32)
        rp2 = tl.zeros([BLOCK], tl.float32)
        rpp = tl.zeros([BLOCK], tl.float32)
        rank = tl.zeros([BLOCK], tl.float32)
        lane = tl.arange(0, BLOCK)
        for start in range(0, count, BLOCK):
            if EVEN:
                x = tl.load(x_ptr + first + start + lane)
                y = tl.load(y_ptr + first + start + lane)
                d = y - x
                r = tl.fma(x, slope, tl.where(z_far, y, d)) - level
                a = (x - peak) * binary_t + mass
                b = (y - peak_y) * binary_t + mass_y
                p = tl.exp2(a)
                q = tl.exp2(b)
                rank += tl.where(y > best_y, 1.0, 0.0)
            else:  # a lane outside has r = d = p = q = 0
                inside = start + lane < count
                x = tl.load(x_ptr + first + start + lane, mask=inside, other=0.0)
                y = tl.load(y_ptr + first + start + lane, mask=inside, other=0.0)
                d = y - x
                r = tl.where(inside, tl.fma(x, slope, tl.where(z_far, y, d)) - level, 0.0)
                a = (x - peak) * binary_t + mass
                b = (y - peak_y) * binary_t + mass_y
                p = tl.where(inside, tl.exp2(a), 0.0)
                q = tl.where(inside, tl.exp2(b), 0.0)
                rank += tl.where(inside & (y > best_y), 1.0, 0.0)

            # logits
            rest2 += r * r
            rest_x += r * (x - mean)
            dz1 += tl.abs(d)

            # variances
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

            # L = log(q / p), and e^L - 1 = L + L^2 phi where it is near 0
            n = v * inv_t + offset
            near = tl.abs(n) < 0.5
            phi = n * (1 / 40320) + 1 / 5040
            phi = phi * n + 1 / 720
            phi = phi * n + 1 / 120
            phi = phi * n + 1 / 24
            phi = phi * n + 1 / 6
            phi = phi * n + 1 / 2
            n2 = n * n
            pn = p * n
            pn2 = p * n2
            dp = tl.where(near, pn2 * phi + pn, q - p)
            m += dp
            term = tl.where(near, pn2 * phi, dp - pn)
            g += term
            change = dp * n
            g_back += change - term
            # log cosh(n / 2) where near, else the binary logarithm of the middle
            h2 = n2 * 0.25
            cosh = h2 * (0.5 + h2 * (-1 / 12 + h2 * (1 / 45 - h2 * (17 / 2520))))
            total = p + q
            middle = _log2(tl.maximum(total, 1e-37), FAST)
            plain = (p * (a - middle) + (q * (b - middle) + total)) * (_LN2 * 0.5)
            js += tl.where(near, change * 0.25 - (dp * 0.5 + p) * cosh, plain)
            dp1 += tl.abs(dp)
            sq += tl.where(dp < 0, -q, q)
            r = p * p_coef + tl.where(p_far, q, dp)
            rp2 += r * r
            rpp += r * p
        out = sums_ptr + (pair * tl.num_programs(1) + seg) * N
        tl.store(out, tl.sum(rest2, 0))
        tl.store(out + 1, tl.sum(rest_x, 0))
        tl.store(out + 2, tl.sum(dz1, 0))
        tl.store(out + 3, tl.sum(p_v, 0))
        tl.store(out + 4, tl.sum(p_v2, 0))
        tl.store(out + 5, tl.sum(q_v, 0))
        tl.store(out + 6, tl.sum(q_v2, 0))
        tl.store(out + 7, tl.sum(r_v, 0))
        tl.store(out + 8, tl.sum(r_v2, 0))
        tl.store(out + 9, tl.sum(t_v, 0))
        tl.store(out + 10, tl.sum(t_v2, 0))
        tl.store(out + 11, tl.sum(p2, 0))
        tl.store(out + 12, tl.sum(q2, 0))
        tl.store(out + 13, tl.sum(rank, 0))
        tl.store(out + 14, tl.sum(dp1, 0))
        tl.store(out + 15, tl.sum(rp2, 0))
        tl.store(out + 16, tl.sum(rpp, 0))
        tl.store(out + 17, tl.sum(js, 0))
        tl.store(out + 18, tl.sum(m, 0))
        tl.store(out + 19, tl.sum(g, 0))
        tl.store(out + 20, tl.sum(g_back, 0))
        tl.store(out + 21, tl.sum(sq, 0))


def swept(z: Tensor, pairs: Tensor, known: Prepared, temperature: float) -> Tensor:
    """See `sums.Backend`."""
    vocab, count, n = z.shape[1], len(pairs), segments(z.shape[1])
    pairs, rows = pairs.contiguous(), known.rows
    out = torch.empty(count, len(PAIR_SUMS), dtype=torch.float64, device=z.device)
    settled = torch.empty(count, dtype=torch.int32, device=z.device)
    far, near = z.new_empty(count, n, _FAR_SUMS), z.new_empty(count, n, _NEAR_SUMS)
    wide, inv_t, binary_t = triton.next_power_of_2(n), 1 / temperature, binary(temperature)
    sizes = {"SEG": SEGMENT, "P": len(PILOTS), "C": len(COARSE), "FAST": _FAST}

    def settle(sums: Tensor, is_far: bool) -> None:
        settle_kernel[(count,)](
            vocab, inv_t, binary_t, pairs, rows.peak, rows.log_mass, rows.mean, rows.spread, rows.peak.stride(0), known.guess, known.coarse, sums, n,
            settled, out, WIDE=wide, P=len(PILOTS), C=len(COARSE), N=sums.shape[2], M=len(PAIR_SUMS), FAR=is_far, num_warps=1,
        )  # fmt: skip

    far_kernel[(count, n)](
        z, z.stride(0), vocab, binary_t, pairs, known.guess, known.coarse, far,
        BLOCK=_FAR_BLOCK, N=_FAR_SUMS, EVEN=vocab % _FAR_BLOCK == 0, num_warps=_FAR_WARPS, **sizes,
    )  # fmt: skip
    settle(far, True)
    near_kernel[(count, n)](
        z, z.stride(0), vocab, inv_t, binary_t, pairs, known.guess, known.coarse, settled, near,
        BLOCK=_NEAR_BLOCK, N=_NEAR_SUMS, EVEN=vocab % _NEAR_BLOCK == 0, num_warps=_NEAR_WARPS, **sizes,
    )  # fmt: skip
    settle(near, False)
    return out
