"""From the sums that the kernels of `triton_pairs` gather to those of `PAIR_SUMS`, a pair a program, in float64; and which pairs keep their digits."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["settle_kernel"]

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _total(sums, k, own, N: tl.constexpr):
    return tl.sum(tl.load(sums + k * N, mask=own, other=0.0).to(tl.float64), 0)


@triton.jit
def _clear(first, second, total, ABSOLUTE: tl.constexpr):
    """Whether a variance keeps its digits: what was summed is at most thirty times as large, or all of it is little."""
    square = first / total
    second = second / total
    return second <= 30 * (second - square * square) + ABSOLUTE


@triton.jit
def settle_kernel(
    vocab, inv_t, binary_t, pairs_ptr, peak_ptr, mass_ptr, mean_ptr, spread_ptr, rows_stride, pilots_ptr, coarse_ptr, sums_ptr, n_segments,
    settled_ptr, out_ptr, WIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The sums of `PAIR_SUMS` of one pair from those of its segments, in float64.

    FAR: those of `far_kernel`; ``settled`` becomes 1 where they keep their digits. Else those of `near_kernel`, for the pairs where it is 0.
    """
    pair = tl.program_id(0).to(tl.int64)
    guess, coarse = pilots_ptr + pair * P, coarse_ptr + pair * C
    if FAR:
        mine = tl.load(coarse) > 0
        if mine == 0:
            tl.store(settled_ptr + pair, 0)
    else:
        mine = tl.load(settled_ptr + pair) == 0
    if mine:
        k = tl.arange(0, WIDE)
        own = k < n_segments
        sums = sums_ptr + pair * n_segments * N
        i = tl.load(pairs_ptr + 2 * pair) * rows_stride
        j = tl.load(pairs_ptr + 2 * pair + 1) * rows_stride
        mean, mean_y = tl.load(mean_ptr + i), tl.load(mean_ptr + j)
        spread = tl.load(spread_ptr + i)
        z_coef, z_far = tl.load(guess).to(tl.float64), tl.load(guess + 1).to(tl.float64)
        held, held_d = tl.load(guess + 2).to(tl.float64), tl.load(guess + 4).to(tl.float64)
        slope, level = tl.load(coarse + 1).to(tl.float64), tl.load(coarse + 2).to(tl.float64)

        # logits: r = base - slope x - level, base being y where z_far, else d
        rest2, rest_x = _total(sums, k, own, N), _total(sums + 1, k, own, N)
        mean_d = mean_y - mean
        mean_r = mean_d + z_far * mean - slope * mean - level
        rest_x += vocab * mean_r * (held - mean)  # about the true mean of x
        rest2 = rest2 - vocab * mean_r * mean_r
        along = slope - z_far  # d = r + along x~ + mean_d, r without its mean
        centred = rest2 + 2 * along * rest_x + along * along * spread
        covariance = rest_x + along * spread
        x2 = spread + vocab * mean * mean
        product = rest_x + slope * spread + vocab * mean * (mean_d + z_far * mean)  # sum base x
        best = product / x2
        gap, shift = slope - best, mean_d + z_far * mean - best * mean
        orth2 = rest2 + gap * gap * spread + 2 * gap * rest_x + vocab * shift * shift
        rest_coef = product - z_coef * x2
        shift_d = mean_d - held_d
        out = out_ptr + pair * M
        tl.store(out, tl.maximum(orth2, 0.0) + rest_coef * rest_coef / x2)
        tl.store(out + 1, rest_coef)
        tl.store(out + 2, _total(sums + 2, k, own, N))
        tl.store(out + 3, vocab * shift_d)
        tl.store(out + 4, tl.maximum(centred, 0.0) + vocab * shift_d * shift_d)
        tl.store(out + 5, covariance + z_far * spread)

        p_v, p_v2 = _total(sums + 3, k, own, N), _total(sums + 4, k, own, N)
        q_v, q_v2 = _total(sums + 5, k, own, N), _total(sums + 6, k, own, N)
        r_v, r_v2 = _total(sums + 7, k, own, N), _total(sums + 8, k, own, N)
        t_v, t_v2 = _total(sums + 9, k, own, N), _total(sums + 10, k, own, N)
        p2, q2 = _total(sums + 11, k, own, N), _total(sums + 12, k, own, N)
        dp1, rp2, rpp = _total(sums + 14, k, own, N), _total(sums + 15, k, own, N), _total(sums + 16, k, own, N)
        js = _total(sums + 17, k, own, N)
        if FAR:
            peak, mass = tl.load(peak_ptr + i), tl.load(mass_ptr + i)
            peak_y, mass_y = tl.load(peak_ptr + j), tl.load(mass_ptr + j)
            # the kernel's p and q are off by the rounding of one constant each, which is known
            log_p = -(peak * binary_t + mass * 1.4426950408889634)
            log_q = -(peak_y * binary_t + mass_y * 1.4426950408889634)
            off_p = (log_p - tl.load(coarse + 3).to(tl.float64)) * _LN2
            off_q = (log_q - tl.load(coarse + 4).to(tl.float64)) * _LN2
            of_p, of_q = tl.exp(off_p), tl.exp(off_q)
            p_v, p_v2, r_v, r_v2, p2 = p_v * of_p, p_v2 * of_p, r_v * of_p * of_p, r_v2 * of_p * of_p, p2 * of_p * of_p
            q_v, q_v2, t_v, t_v2, q2 = q_v * of_q, q_v2 * of_q, t_v * of_q * of_q, t_v2 * of_q * of_q, q2 * of_q * of_q
            anchor_p, anchor_q = tl.load(guess + 9).to(tl.float64), tl.load(guess + 10).to(tl.float64)
            log_ratio = (peak_y - peak) * inv_t + (mass_y - mass)
            kl = log_ratio - (p_v + anchor_p) * inv_t
            kl_back = (q_v + anchor_q) * inv_t - log_ratio
            js = 0.5 * (of_p * js + of_q * _total(sums + 18, k, own, N)) * _LN2 + 0.5 * (off_q - off_p)
            # what `finish` takes off(set): the error of the guessed ratio of normalisers
            off = log_ratio - anchor_p * inv_t - tl.load(guess + 13).to(tl.float64)
            m = tl.exp(off) - 1
            g, g_back = kl + (m - off), kl_back + (off * (1 + m) - m)
            dp1 = dp1 * of_p
            sq = dp1 * 0.0
            # r was q - coef p in the kernel's p and q, `finish` wants (q or q - p) - p_coef p
            wanted = tl.load(guess + 14).to(tl.float64) + 1 - tl.load(guess + 15).to(tl.float64)
            extra = tl.load(coarse + 6).to(tl.float64) * of_q / of_p - wanted
            rp2, rpp = rp2 * of_q * of_q, rpp * of_q * of_p
            rp2, rpp = rp2 + 2 * extra * rpp + extra * extra * p2, rpp + extra * p2
            fine = _clear(p_v, p_v2, 1.0, 3e-4) & _clear(q_v, q_v2, 1.0, 3e-4)
            fine = fine & _clear(r_v, r_v2, p2, 3e-4) & _clear(t_v, t_v2, q2, 3e-4)
            fine = fine & (rest2 + 2 * tl.abs(gap * rest_x) <= 50 * orth2)
            fine = fine & (rest2 + 2 * tl.abs(along * rest_x) <= 50 * centred)
            enough = 0.01 * tl.maximum(tl.sqrt(p_v2) * inv_t, 1.0)
            enough_back = 0.01 * tl.maximum(tl.sqrt(q_v2) * inv_t, 1.0)
            fine = fine & (kl > enough) & (kl_back > enough_back) & (js > 0.004)
            tl.store(settled_ptr + pair, fine.to(tl.int32))
        else:
            m, g, g_back = _total(sums + 18, k, own, N), _total(sums + 19, k, own, N), _total(sums + 20, k, own, N)
            sq = _total(sums + 21, k, own, N)
        tl.store(out + 6, p_v)
        tl.store(out + 7, p_v2)
        tl.store(out + 8, q_v)
        tl.store(out + 9, q_v2)
        tl.store(out + 10, r_v)
        tl.store(out + 11, r_v2)
        tl.store(out + 12, t_v)
        tl.store(out + 13, t_v2)
        tl.store(out + 14, p2)
        tl.store(out + 15, q2)
        tl.store(out + 16, m)
        tl.store(out + 17, g)
        tl.store(out + 18, g_back)
        tl.store(out + 19, js)
        tl.store(out + 20, dp1)
        tl.store(out + 21, sq)
        tl.store(out + 22, rp2)
        tl.store(out + 23, rpp)
        tl.store(out + 24, _total(sums + 13, k, own, N))
