"""The sums of `fused`, gathered on a GPU: one Triton kernel a list, each logit read once.

Every program handles one segment of one row or pair. Sums are kept lane by lane in float32 (a lane adds at most ``SEGMENT / BLOCK`` values) and
reduced as a tree at the end, so that nothing depends on how many rows there are or on the order in which programs run: results are
the same to the bit from run to run and from batch to batch.

The ten most likely tokens need no second sweep: the row kernel leaves the largest logit of every lane of a segment, with its token, and the ten
largest of these name the only lanes in which the ten largest logits can be (also with ties, which go to the lower id).
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunescope.compare.kernels.sums import PILOTS, ROW_SUMS, SEGMENT, TOP, Prepared, RowStats, segments
from prunescope.compare.kernels.triton_pairs import COARSE, binary, swept

__all__ = ["hidden_change", "prepare", "row_sums", "sweep"]

_LANES, _ROW_WARPS = 256, 2
_LOW = tl.constexpr(-1e25)  # stands for minus infinity, but 0 times it is 0


@triton.jit
def _row_kernel(
    z_ptr, stride, vocab, binary_t, sums_ptr, maxima_ptr,
    SEG: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + seg
    first = seg * SEG
    base = z_ptr + row * stride + first
    count = tl.minimum(vocab - first, SEG)
    lane = tl.arange(0, LANES)
    seen = tl.load(base + lane, mask=lane < count, other=0.0)
    shift = tl.sum(seen, 0) / tl.minimum(count, LANES)
    m = tl.full([LANES], _LOW, tl.float32)
    at = tl.zeros([LANES], tl.int32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    off = tl.zeros([LANES], tl.float32)
    off2 = tl.zeros([LANES], tl.float32)
    for start in range(0, count, LANES):
        if EVEN:
            x = tl.load(base + start + lane)
            c = x - shift
        else:
            inside = start + lane < count
            x = tl.load(base + start + lane, mask=inside, other=_LOW)
            c = tl.where(inside, x - shift, 0.0)
        # a running softmax of every lane, its largest token left out: one exponential whichever of the two is larger
        d = (x - m) * binary_t
        e = tl.exp2(-tl.abs(d))
        up = d > 0
        u = tl.where(up, (u - (s + 1.0) * d) * e, u + e * d)
        s = tl.where(up, (s + 1.0) * e, s + e)
        at = tl.where(up, start, at)
        m = tl.maximum(m, x)
        off += c
        off2 += c * c
    out = maxima_ptr + place * LANES + lane
    tl.store(out, _ordered(m, first + at + lane))
    peak = tl.max(m, 0)
    below = (m - peak) * binary_t
    w = tl.exp2(below)
    out = sums_ptr + place * N
    tl.store(out, peak)
    peaks = tl.sum(tl.where(m == peak, 1.0, 0.0), 0)
    tl.store(out + 1, tl.sum(tl.where(m == peak, s, (s + 1.0) * w), 0) + (peaks - 1.0))
    tl.store(out + 2, tl.sum((u + (s + 1.0) * below) * w, 0) * 0.6931471805599453)
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
    SEG: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lowest = tl.full([1], -(2**63), tl.int64)
    group = tl.arange(0, WIDE)
    key = tl.load(maxima_ptr + row * n_maxima + group, mask=group < n_maxima, other=-(2**63))
    place = tl.arange(0, K2)
    chosen = tl.full([K2], vocab, tl.int32)  # the largest token of a lane stands for all of the lane
    for k in range(K):
        best = tl.max(key, 0)
        chosen = tl.where(place == k, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32), chosen)
        key = tl.where(key == best, lowest, key)
    start = (chosen // SEG) * SEG
    token = (start + chosen % LANES)[:, None] + LANES * tl.arange(0, SEG // LANES)[None, :]
    own = (token < vocab) & (place < K)[:, None]
    key2 = tl.where(own, _ordered(tl.load(z_ptr + row * stride + token, mask=own, other=0.0), token), lowest[:, None])
    found = tl.zeros([K2], tl.int32)
    for k in range(K):
        best = tl.max(tl.max(key2, 1), 0)
        found = tl.where(place == k, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32), found)
        key2 = tl.where(key2 == best, lowest[:, None], key2)
    tl.store(top_ptr + row * K + place, found.to(tl.int64), mask=place < K)


@triton.jit
def _stats_kernel(
    z_ptr, stride, vocab, inv_t, sums_ptr, n_segments, top_ptr, stats_ptr, top_z_ptr,
    SEG: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """`fused.row_stats`, a row a program, in float64."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K2)
    there = (place < K) & (place < vocab)
    top = tl.load(top_ptr + row * K + place, mask=there, other=0)
    top_z = tl.load(z_ptr + row * stride + top, mask=there, other=0.0).to(tl.float64)
    tl.store(top_z_ptr + row * K + place, top_z, mask=place < K)
    peak = tl.sum(tl.where(place == 0, top_z, 0.0), 0)
    k = tl.arange(0, WIDE)
    own = k < n_segments
    at = sums_ptr + (row * n_segments + k) * N
    below = (tl.load(at, mask=own, other=0.0).to(tl.float64) - peak) * inv_t
    weight = tl.where(own, tl.exp(below), 0.0)
    rest_k = tl.load(at + 1, mask=own, other=0.0).to(tl.float64)
    lowered_k = tl.load(at + 2, mask=own, other=0.0).to(tl.float64)
    shift = tl.load(at + 3, mask=own, other=0.0).to(tl.float64)
    off = tl.load(at + 4, mask=own, other=0.0).to(tl.float64)
    off2 = tl.load(at + 5, mask=own, other=0.0).to(tl.float64)
    count = tl.where(own, tl.minimum(vocab - k * SEG, SEG), 0).to(tl.float64)
    rest_mass = tl.sum(rest_k * weight, 0) + (tl.sum(weight, 0) - 1)
    # log1p: where 1 + rest is rounded, its logarithm is scaled back
    whole = 1 + rest_mass
    log_mass = tl.where(whole == 1, rest_mass, tl.log(whole) * (rest_mass / tl.where(whole == 1, 1.0, whole - 1)))
    mean = tl.sum(off + count * shift, 0) / vocab
    rest = mean - shift
    spread = tl.sum(off2 - 2 * rest * off + count * rest * rest, 0)
    out = stats_ptr + row * S
    tl.store(out, peak)
    tl.store(out + 1, log_mass)
    tl.store(out + 2, tl.maximum(log_mass - tl.sum((lowered_k + (1 + rest_k) * below) * weight, 0) / whole, 0.0))
    tl.store(out + 3, mean)
    tl.store(out + 4, tl.sum(off2 + 2 * shift * off + count * shift * shift, 0))
    tl.store(out + 5, tl.maximum(spread, 0.0))
    tl.store(out + 6, tl.sum(off2, 0) + rest_mass)  # finite where every logit is


@triton.jit
def _pilot_kernel(
    z_ptr, stride, vocab, inv_t, binary_t, pairs_ptr, stats_ptr, top_ptr, top_z_ptr, next_ptr, pilots_ptr, coarse_ptr, other_z_ptr, next_z_ptr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, S: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`fused.prepare`, a pair a program, and `triton_pairs.COARSE`; the sample of the vocabulary is PIECES runs of PIECE tokens."""
    pair = tl.program_id(0).to(tl.int64)
    i, j = tl.load(pairs_ptr + 2 * pair), tl.load(pairs_ptr + 2 * pair + 1)
    x_ptr, y_ptr = z_ptr + i * stride, z_ptr + j * stride
    peak, mass, mean = tl.load(stats_ptr + i * S), tl.load(stats_ptr + i * S + 1), tl.load(stats_ptr + i * S + 3)
    peak_y, mass_y, mean_y = tl.load(stats_ptr + j * S), tl.load(stats_ptr + j * S + 1), tl.load(stats_ptr + j * S + 3)
    mean_d = mean_y - mean

    # the change at the most likely tokens of either side
    place = tl.arange(0, K2)
    there = (place < K) & (place < vocab)
    z_at = tl.load(top_z_ptr + i * K + place, mask=there, other=0.0)
    other = tl.load(y_ptr + tl.load(top_ptr + i * K + place, mask=there, other=0), mask=there, other=0.0)
    tl.store(other_z_ptr + pair * K + place, other.to(tl.float64), mask=place < K)
    best_y = tl.sum(tl.where(place == 0, other, 0.0), 0)
    delta = other.to(tl.float64) - z_at
    p = tl.where(there, tl.exp((z_at - peak) * inv_t - mass), 0.0)
    y_at = tl.load(top_z_ptr + j * K + place, mask=there, other=0.0)
    back = tl.load(x_ptr + tl.load(top_ptr + j * K + place, mask=there, other=0), mask=there, other=0.0)
    delta_y = y_at - back.to(tl.float64)
    q = tl.where(there, tl.exp((y_at - peak_y) * inv_t - mass_y), 0.0)
    anchor_p = (tl.sum(p * delta, 0) + (1 - tl.sum(p, 0)) * mean_d).to(tl.float32)
    anchor_q = tl.sum(q * delta_y, 0) + (1 - tl.sum(q, 0)) * mean_d
    p2, q2 = tl.sum(p * p, 0), tl.sum(q * q, 0)
    log_ratio = (peak_y - peak) * inv_t + (mass_y - mass)
    p_alpha = tl.sum(p * p * (tl.exp(tl.minimum(delta * inv_t - log_ratio, 80.0)) - 1), 0) / p2

    # the factor along the dense vector, from a sample
    lane = tl.arange(0, PIECE * PIECES)
    token = (lane // PIECE) * (vocab // PIECES) + lane % PIECE
    x = tl.load(x_ptr + token, mask=token < vocab, other=0.0)
    y = tl.load(y_ptr + token, mask=token < vocab, other=0.0)
    x2 = tl.sum(x * x, 0)
    z_alpha = tl.where(x2 > 0, tl.sum(x * (y - x), 0) / tl.where(x2 > 0, x2, 1.0), 0.0)
    z_alpha = tl.where(tl.abs(z_alpha) < 1e30, z_alpha, 0.0)  # also of NaN

    z_far = tl.where(tl.abs(z_alpha) > 0.5, 1.0, 0.0)
    p_far = tl.where(tl.abs(p_alpha) > 0.5, 1.0, 0.0)
    out = pilots_ptr + pair * P
    tl.store(out, z_alpha + z_far)
    tl.store(out + 1, z_far)
    tl.store(out + 2, mean.to(tl.float32))
    tl.store(out + 3, mean_y.to(tl.float32))
    tl.store(out + 4, mean_d.to(tl.float32))
    tl.store(out + 5, peak.to(tl.float32))
    tl.store(out + 6, mass.to(tl.float32))
    tl.store(out + 7, peak_y.to(tl.float32))
    tl.store(out + 8, mass_y.to(tl.float32))
    tl.store(out + 9, anchor_p)
    tl.store(out + 10, anchor_q.to(tl.float32))
    tl.store(out + 11, (tl.sum(p * p * delta, 0) / p2).to(tl.float32))
    tl.store(out + 12, (tl.sum(q * q * delta_y, 0) / q2).to(tl.float32))
    tl.store(out + 13, (log_ratio - anchor_p.to(tl.float64) * inv_t).to(tl.float32))
    tl.store(out + 14, (p_alpha + p_far).to(tl.float32))
    tl.store(out + 15, p_far.to(tl.float32))
    tl.store(out + 16, best_y)

    # for the coarse kernel: the slope of d along z without means, constants of p and q in binary digits, and whether to try it
    own = token < vocab
    x_off = tl.where(own, x - mean.to(tl.float32), 0.0)
    d_off = tl.where(own, (y - x) - mean_d.to(tl.float32), 0.0)
    x_off2 = tl.sum(x_off * x_off, 0)
    slope = tl.where(x_off2 > 0, tl.sum(x_off * d_off, 0) / tl.where(x_off2 > 0, x_off2, 1.0), 0.0)
    slope = tl.where(tl.abs(slope) < 1e30, slope, 0.0) + z_far
    d_off2 = (tl.sum(d_off * d_off, 0) / tl.sum(tl.where(own, 1.0, 0.0), 0)).to(tl.float64)
    rest_p, rest_q = tl.maximum(1 - tl.sum(p, 0), 0.0), tl.maximum(1 - tl.sum(q, 0), 0.0)
    miss, miss_q = delta - anchor_p.to(tl.float64), delta_y - anchor_q
    spread = tl.sum(p * miss * miss, 0) + rest_p * (d_off2 + (mean_d - anchor_p) * (mean_d - anchor_p))
    spread_q = tl.sum(q * miss_q * miss_q, 0) + rest_q * (d_off2 + (mean_d - anchor_q) * (mean_d - anchor_q))
    far = (tl.minimum(spread, spread_q) * inv_t * inv_t > 0.04) & (z_far == 0)
    log_p, log_q = -(peak * binary_t + mass * 1.4426950408889634), -(peak_y * binary_t + mass_y * 1.4426950408889634)
    held_p, held_q = log_p.to(tl.float32), log_q.to(tl.float32)
    ratio = tl.exp(((log_q - held_q.to(tl.float64)) - (log_p - held_p.to(tl.float64))) * 0.6931471805599453)
    out = coarse_ptr + pair * C
    tl.store(out, tl.where(far, 1.0, 0.0))
    tl.store(out + 1, slope)
    tl.store(out + 2, (mean_d + z_far * mean - slope.to(tl.float64) * mean).to(tl.float32))
    tl.store(out + 3, held_p)
    tl.store(out + 4, held_q)
    tl.store(out + 5, ratio.to(tl.float32))
    tl.store(out + 6, ((p_alpha + 1) / ratio).to(tl.float32))

    # logits of the tokens that follow
    ours, theirs = tl.load(next_ptr + 2 * pair), tl.load(next_ptr + 2 * pair + 1)
    nan = float("nan")
    tl.store(next_z_ptr + 3 * pair, tl.load(x_ptr + ours, mask=ours >= 0, other=nan).to(tl.float64))
    tl.store(next_z_ptr + 3 * pair + 1, tl.load(y_ptr + theirs, mask=theirs >= 0, other=nan).to(tl.float64))
    tl.store(next_z_ptr + 3 * pair + 2, tl.load(y_ptr + ours, mask=ours >= 0, other=nan).to(tl.float64))


@triton.jit
def _hidden_kernel(h_ptr, stride, width, pairs_ptr, out_ptr, BLOCK: tl.constexpr):
    """`metrics.relative_change` of a pair of hidden states a program, in float64."""
    pair = tl.program_id(0).to(tl.int64)
    x_ptr = h_ptr + tl.load(pairs_ptr + 2 * pair) * stride
    y_ptr = h_ptr + tl.load(pairs_ptr + 2 * pair + 1) * stride
    lane = tl.arange(0, BLOCK)
    xx = tl.zeros([BLOCK], tl.float64)
    xd = tl.zeros([BLOCK], tl.float64)
    xy = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < width, other=0.0).to(tl.float64)
        y = tl.load(y_ptr + start + lane, mask=start + lane < width, other=0.0).to(tl.float64)
        xx += x * x
        xd += x * (y - x)
        xy += x * y
    length2 = tl.sum(xx, 0)
    alpha = tl.sum(xd, 0) / length2
    along = tl.sum(xy, 0) / length2
    far = tl.abs(alpha) > 0.5
    rest2 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < width, other=0.0).to(tl.float64)
        y = tl.load(y_ptr + start + lane, mask=start + lane < width, other=0.0).to(tl.float64)
        rest = tl.where(far, y - along * x, (y - x) - alpha * x)
        rest2 += rest * rest
    tl.store(out_ptr + 3 * pair, alpha)
    tl.store(out_ptr + 3 * pair + 1, tl.where(far, along, 1 + alpha))
    tl.store(out_ptr + 3 * pair + 2, tl.sqrt(tl.sum(rest2, 0) / length2))


def row_sums(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `fused.Backend`."""
    rows, vocab = z.shape
    _check(z)
    n = segments(vocab)
    sums = z.new_empty(rows, n, len(ROW_SUMS))
    maxima = torch.empty(rows, n * _LANES, dtype=torch.int64, device=z.device)
    top = torch.empty(rows, TOP, dtype=torch.int64, device=z.device)
    _row_kernel[(rows, n)](
        z, z.stride(0), vocab, binary(temperature), sums, maxima,
        SEG=SEGMENT, LANES=_LANES, N=len(ROW_SUMS), EVEN=vocab % _LANES == 0, num_warps=_ROW_WARPS,
    )  # fmt: skip
    wide = triton.next_power_of_2(n * _LANES)
    _top_kernel[(rows,)](
        z, z.stride(0), vocab, maxima, n * _LANES, top,
        SEG=SEGMENT, LANES=_LANES, WIDE=wide, K=TOP, K2=16, num_warps=4,
    )  # fmt: skip
    return sums, top


def prepare(
    z: Tensor,
    pairs: Tensor,
    sums: Tensor,
    top: Tensor,
    temperature: float,
    next_token: Tensor | None,
    next_token_target: Tensor | None,
) -> Prepared:
    """See `fused.Backend`."""
    rows, vocab = z.shape
    stats = torch.empty(rows, 7, dtype=torch.float64, device=z.device)
    top_z = torch.empty(rows, TOP, dtype=torch.float64, device=z.device)
    n = segments(vocab)
    wide = triton.next_power_of_2(n)
    _stats_kernel[(rows,)](
        z, z.stride(0), vocab, 1 / temperature, sums, n, top, stats, top_z,
        SEG=SEGMENT, WIDE=wide, N=len(ROW_SUMS), K=TOP, K2=16, S=7, num_warps=1,
    )  # fmt: skip
    count = len(pairs)
    guess, coarse = z.new_empty(count, len(PILOTS)), z.new_empty(count, len(COARSE))
    other_z = torch.empty(count, TOP, dtype=torch.float64, device=z.device)
    next_z = torch.empty(count, 3, dtype=torch.float64, device=z.device)
    if next_token is None:
        following = torch.full((count, 2), -1, dtype=torch.int64, device=z.device)
    else:
        following = torch.stack([next_token, next_token if next_token_target is None else next_token_target], 1)
    _pilot_kernel[(count,)](
        z, z.stride(0), vocab, 1 / temperature, binary(temperature), pairs.contiguous(), stats, top, top_z, following, guess, coarse, other_z, next_z,
        PIECE=128, PIECES=16, K=TOP, K2=16, S=7, P=len(PILOTS), C=len(COARSE), num_warps=4,
    )  # fmt: skip
    k = min(TOP, vocab)
    found = RowStats(*stats[:, :6].unbind(1), top[:, :k], top_z[:, :k], torch.isfinite(stats[:, 6]))
    return Prepared(found, guess, other_z[:, :k], next_z, coarse)


def sweep(z: Tensor, pairs: Tensor, known: Prepared, temperature: float) -> Tensor:
    """See `fused.Backend`."""
    _check(z)
    return swept(z, pairs, known, temperature)


def hidden_change(h: Tensor, pairs: Tensor) -> Tensor:
    """See `fused.Backend`."""
    out = torch.empty(len(pairs), 3, dtype=torch.float64, device=h.device)
    h = h if h.stride(1) == 1 else h.contiguous()
    _hidden_kernel[(len(pairs),)](h, h.stride(0), h.shape[1], pairs.contiguous(), out, BLOCK=1024, num_warps=4)
    return out


def _check(z: Tensor) -> None:
    if z.dtype != torch.float32 or z.stride(1) != 1:
        raise ValueError(f"logits must be float32 with unit stride, not {z.dtype} with strides {z.stride()}")
