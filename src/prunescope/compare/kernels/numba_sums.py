"""The sums of `sums.py` on a CPU, by kernels that numba compiles on the user's machine. Importing this needs numba.

Every row, and every pair of rows, is swept once, in blocks that stay in the first-level cache: float32 sums over `_BLOCK` tokens, added in
float64. LLVM turns the loops into vector instructions, for which two things are done by hand. A sum may be taken in lanes only where the
addition itself says so (`_add`): no other operation may be reordered, so that ``y - x - anchor`` is never taken apart, and NaN and infinity
reach the sums. And exp and log1p are polynomials, since LLVM has no vector form of the library's.

Work is shared among threads by whole rows and pairs, so that a result does not depend on how many there are, nor on what else is in
the batch. The threads are plain ones that live for one call (the kernels release the interpreter's lock): no threading layer, and nothing
that a fork could break. The compiled kernels are kept in the cache folder, or where that cannot be written beside
this file; where that cannot be either, every process compiles them anew, in some seconds.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from prunescope.cache import cache_folder
from prunescope.compare.kernels.sums import PAIR_SUMS, PILOTS, ROW_SUMS, SEGMENT, TOP, Prepared, prepare, segments

__all__ = ["hidden_change", "pair_sums", "prepare", "row_sums", "sweep"]

_BLOCK = 1024  # tokens of one float32 accumulation
_GLANCE = 128  # tokens of which only the largest is looked at, to see whether one is among the most likely
_HIDDEN = 2**17  # entries of hidden states that are handled at once
_SHARES = 4  # pieces of work for each thread

_Function = TypeVar("_Function", bound=Callable[..., Any])


# --- the instructions that the kernels are made of -----------------------------------------------------------------------

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_EXP2 = (  # 2^f for |f| <= 1/2, lowest power first: relative error 2e-9, exactly 1 at 0
    *(1.0, 0.693147206, 0.240226469, 0.0555032878),
    *(0.00961848898, 0.00133999316, 0.000153458079),
)
_LOG1P = (  # log(1 + e) / e for 0 <= e <= exp(-1/2): relative error 1e-8
    *(0.999999991, -0.499997997, 0.333261267, -0.248996166),
    *(0.192954749, -0.138574448, 0.0750419615, -0.0209061452),
)
_PHI = (  # (exp(n) - 1 - n) / n^2 for |n| <= 1/2: relative error 2e-9
    *(0.5, 0.166666671, 0.0416666643, 0.00833318276),
    *(0.00138890402, 0.000199619575, 2.4841671e-05),
)
_LOG_COSH = (
    1 / 2,
    -1 / 12,
    1 / 45,
    -17 / 2520,
)  # log(cosh(n / 2)) / w in w = n^2 / 4: relative error 2e-8 for |n| <= 1/2
_X86 = platform.machine().lower() in ("x86_64", "amd64")


def _intrinsic(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = builder.module.declare_intrinsic("llvm.fmuladd", [_F32], ir.FunctionType(_F32, [_F32] * 3))
    return builder.call(function, [a, b, c])


def _horner(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = _F32(float(np.float32(coefficients[-1])))
    for c in coefficients[-2::-1]:
        value = _multiply_add(builder, value, x, _F32(float(np.float32(c))))
    return value


@_intrinsic
def _add(typing: Any, total: Any, x: Any) -> Any:
    """total + x, where the order of a sum may be changed."""
    return types.float32(types.float32, types.float32), lambda context, builder, signature, values: builder.fadd(
        *values, flags=("reassoc",)
    )


@_intrinsic
def _lost(typing: Any, b: Any, a: Any, d: Any) -> Any:
    """What rounding took from d = b - a: (b - a) - d, exactly (Knuth's two-sum)."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        b, a, d = values
        minus_a = builder.fsub(d, b)
        return builder.fsub(builder.fsub(b, builder.fsub(d, minus_a)), builder.fadd(a, minus_a))

    return types.float32(types.float32, types.float32, types.float32), code


@_intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the machine can."""
    return types.float32(types.float32, types.float32, types.float32), (
        lambda context, builder, signature, values: _multiply_add(builder, *values)
    )


@_intrinsic
def _exp2(typing: Any, t: Any) -> Any:
    """2^t for t <= 1, never a denormal number: 2^-126 below that. 2^-126 also of NaN."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lowest = _F32(-126.0)
        t = builder.select(builder.fcmp_ordered(">", values[0], lowest), values[0], lowest)
        whole = builder.fptosi(builder.fsub(t, _F32(0.5)), _I32)  # rounds towards zero, and t - 1/2 is not above 1/2
        part = _horner(builder, builder.fsub(t, builder.sitofp(whole, _F32)), _EXP2)
        return builder.bitcast(builder.add(builder.bitcast(part, _I32), builder.shl(whole, _I32(23))), _F32)

    return types.float32(types.float32), code


@_intrinsic
def _log1p(typing: Any, e: Any) -> Any:
    """log(1 + e) for 0 <= e <= exp(-1/2)."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fmul(values[0], _horner(builder, values[0], _LOG1P))

    return types.float32(types.float32), code


@_intrinsic
def _phi(typing: Any, n: Any) -> Any:
    """(exp(n) - 1 - n) / n^2 for |n| <= 1/2."""
    return types.float32(types.float32), lambda context, builder, signature, values: _horner(builder, values[0], _PHI)


@_intrinsic
def _log_cosh(typing: Any, w: Any) -> Any:
    """log(cosh(n / 2)) / w of w = n^2 / 4, |n| <= 1/2."""
    return types.float32(types.float32), lambda context, builder, signature, values: _horner(
        builder, values[0], _LOG_COSH
    )


def _ordered(builder: Any, bits: Any) -> Any:
    return builder.xor(bits, builder.and_(builder.ashr(bits, _I32(31)), _I32(0x7FFFFFFF)))


@_intrinsic
def _key(typing: Any, x: Any) -> Any:
    """An int32 in the order of the floats: the largest of many is found in lanes, whatever the order of looking."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _ordered(builder, builder.bitcast(values[0], _I32))

    return types.int32(types.float32), code


@_intrinsic
def _of_key(typing: Any, key: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(_ordered(builder, values[0]), _F32)

    return types.float32(types.int32), code


@_intrinsic
def _wide(typing: Any) -> Any:
    """Let LLVM use the widest vectors of the machine in this function: on Intel's AVX-512 it takes half as wide ones by itself, with which the sums took
    1.3 to 1.5 times as long. llvmlite knows the names of attributes without a value alone."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return _I32(0)

    return types.int32(), code


@_intrinsic
def _no_denormals(typing: Any) -> Any:
    """Let this thread take denormal numbers for zero, which are far below any rounding and cost some CPUs a hundred cycles; returns what was set."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not _X86:
            return _I32(0)
        place = builder.alloca(_I32)
        _mxcsr(builder, "st", place)
        before = builder.load(place)
        builder.store(builder.or_(before, _I32(0x8040)), place)
        _mxcsr(builder, "ld", place)
        return before

    return types.int32(), code


@_intrinsic
def _denormals_as(typing: Any, before: Any) -> Any:
    """Undo `_no_denormals`."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if _X86:
            place = builder.alloca(_I32)
            builder.store(values[0], place)
            _mxcsr(builder, "ld", place)
        return _I32(0)

    return types.int32(types.int32), code


def _mxcsr(builder: Any, what: str, place: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(
        f"llvm.x86.sse.{what}mxcsr", fnty=ir.FunctionType(ir.VoidType(), [pointer])
    )
    builder.call(function, [builder.bitcast(place, pointer)])


# --- the kernels ---------------------------------------------------------------------------------------------------------


def _kernel(function: _Function) -> _Function:
    """Compiled at its first call, for this CPU, and kept in the cache folder."""
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    configured = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = configured or str(cache_folder() / "numba")
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to write
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    finally:
        numba.config.CACHE_DIR = configured


_ZERO, _HALF, _QUARTER, _ONE, _TWO = (np.float32(x) for x in (0, 0.5, 0.25, 1, 2))
_LOG2_E, _LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_LEAST = np.int32(-(2**31))
# where the pilots stand, and where the sums of each loop begin
_Z_COEF, _Z_FAR, _MEAN, _MEAN_TARGET, _MEAN_D, *_SOFTMAX, _P_COEF, _P_FAR, _BEST = range(len(PILOTS))
_PEAK, _LOG_MASS, _PEAK_TARGET, _LOG_MASS_TARGET, _ANCHOR_P, _ANCHOR_Q, _ANCHOR_R, _ANCHOR_T, _OFFSET = _SOFTMAX
_GEOMETRY, _MOMENTS, _DIVERGENCES, _RANK = (PAIR_SUMS.index(name) for name in ("rz2", "p_v", "m", "rank"))


@_kernel
def _largest(x: Any) -> Any:
    """The largest number of a piece, as a key."""
    _wide()
    largest = _LEAST
    for k in range(len(x)):
        key = _key(x[k])
        largest = key if key > largest else largest
    return largest


@_kernel
def _mean(x: Any) -> Any:
    _wide()
    total = _ZERO
    for k in range(len(x)):
        total = _add(total, x[k])
    return total / np.float32(len(x))


@_kernel
def _row_block(x: Any, peak: Any, shift: Any, scale: Any, sums: Any) -> None:
    """Add the mass below the peak, lowered / log 2, off, off2 and the number of peaks of a block to ``sums`` (5)."""
    _wide()
    mass = lowered = off = off2 = peaks = _ZERO
    for k in range(len(x)):
        t = (x[k] - peak) * scale
        at_peak = x[k] == peak
        e = _ZERO if at_peak else _exp2(t)
        peaks = _add(peaks, _ONE if at_peak else _ZERO)
        o = x[k] - shift
        mass = _add(mass, e)
        lowered = _add(lowered, e * t)
        off = _add(off, o)
        off2 = _add(off2, o * o)
    sums[0] += mass
    sums[1] += lowered
    sums[2] += off
    sums[3] += off2
    sums[4] += peaks


@_kernel
def _rows(flat: Any, stride: int, vocab: int, start: int, stop: int, scale: Any, out: Any, top: Any) -> None:
    """Rows ``start`` to ``stop``; each begins at a multiple of ``stride`` in ``flat``."""
    _wide()
    before = _no_denormals()
    keep = top.shape[1]
    best = np.empty(keep, np.float32)
    sums = np.empty(5, np.float64)
    for row in range(start, stop):
        z = flat[row * stride : row * stride + vocab]
        ids = top[row]
        for k in range(keep):
            best[k] = -np.inf
            ids[k] = k
        found = 0
        for segment in range(out.shape[1]):
            first, last = segment * SEGMENT, min(segment * SEGMENT + SEGMENT, vocab)
            peak_key = _LEAST
            for begin in range(first, last, _GLANCE):
                piece = z[begin : min(begin + _GLANCE, last)]
                key = _largest(piece)
                peak_key = max(key, peak_key)
                if found == keep and key <= _key(best[keep - 1]):
                    continue
                for k in range(len(piece)):
                    x = piece[k]
                    if found < keep or x > best[keep - 1]:
                        place = min(found, keep - 1)
                        while place > 0 and x > best[place - 1]:
                            best[place] = best[place - 1]
                            ids[place] = ids[place - 1]
                            place -= 1
                        best[place] = x
                        ids[place] = begin + k
                        found = min(found + 1, keep)
            peak = _of_key(peak_key)
            shift = _mean(z[first : min(first + _GLANCE, last)])
            sums[:] = 0
            for begin in range(first, last, _BLOCK):
                _row_block(z[begin : min(begin + _BLOCK, last)], peak, shift, scale, sums)
            out[row, segment, 0] = peak
            out[row, segment, 1] = sums[0] + (sums[4] - 1)
            out[row, segment, 2] = sums[1] * 0.6931471805599453
            out[row, segment, 3] = shift
            out[row, segment, 4] = sums[2]
            out[row, segment, 5] = sums[3]
    _denormals_as(before)


@_kernel
def _geometry(x: Any, y: Any, p: Any, q: Any, g: Any, scale: Any, sums: Any) -> None:
    """The sums of the logits, and p and q for the loops that follow. ``g`` are the pilots."""
    _wide()
    coef, far, mean, mean_d, best = g[_Z_COEF], g[_Z_FAR] > _ZERO, g[_MEAN], g[_MEAN_D], g[_BEST]
    of_target = g[_MEAN_TARGET] if far else mean_d
    peak, log_mass = g[_PEAK], g[_LOG_MASS] * _LOG2_E
    peak_target, log_mass_target = g[_PEAK_TARGET], g[_LOG_MASS_TARGET] * _LOG2_E
    rz2 = rzz = dz1 = dc = dc2 = zc = rank = _ZERO
    for k in range(len(x)):
        a, b = x[k], y[k]
        p[k] = _exp2(_fma(a - peak, scale, -log_mass))
        q[k] = _exp2(_fma(b - peak_target, scale, -log_mass_target))
        d = b - a
        base = b if far else d
        r = _fma(-coef, a, base)
        c = d - mean_d
        rz2 = _add(rz2, r * r)
        rzz = _add(rzz, r * a)
        dz1 = _add(dz1, abs(d))
        dc = _add(dc, c)
        dc2 = _add(dc2, c * c)
        zc = _add(zc, (a - mean) * (base - of_target))
        rank = _add(rank, _ONE if b > best else _ZERO)
    sums[_GEOMETRY + 0] += rz2
    sums[_GEOMETRY + 1] += rzz
    sums[_GEOMETRY + 2] += dz1
    sums[_GEOMETRY + 3] += dc
    sums[_GEOMETRY + 4] += dc2
    sums[_GEOMETRY + 5] += zc
    sums[_RANK] += rank


@_kernel
def _moments(x: Any, y: Any, p: Any, q: Any, g: Any, sums: Any) -> None:
    """The moments of the change under p, q, p^2 and q^2."""
    _wide()
    anchor_p, anchor_q, anchor_r, anchor_t = g[_ANCHOR_P], g[_ANCHOR_Q], g[_ANCHOR_R], g[_ANCHOR_T]
    p_v = p_v2 = q_v = q_v2 = r_v = r_v2 = t_v = t_v2 = p2 = q2 = _ZERO
    for k in range(len(x)):
        a, b = x[k], y[k]
        d = b - a
        lost = _lost(b, a, d)  # matters where two tokens share all of p, and their large d are almost the same
        v = (d - anchor_p) + lost
        pv = p[k] * v
        p_v = _add(p_v, pv)
        p_v2 = _add(p_v2, pv * v)
        v = (d - anchor_q) + lost
        qv = q[k] * v
        q_v = _add(q_v, qv)
        q_v2 = _add(q_v2, qv * v)
        pp = p[k] * p[k]
        v = (d - anchor_r) + lost
        rv = pp * v
        r_v = _add(r_v, rv)
        r_v2 = _add(r_v2, rv * v)
        p2 = _add(p2, pp)
        qq = q[k] * q[k]
        v = (d - anchor_t) + lost
        tv = qq * v
        t_v = _add(t_v, tv)
        t_v2 = _add(t_v2, tv * v)
        q2 = _add(q2, qq)
    sums[_MOMENTS + 0] += p_v
    sums[_MOMENTS + 1] += p_v2
    sums[_MOMENTS + 2] += q_v
    sums[_MOMENTS + 3] += q_v2
    sums[_MOMENTS + 4] += r_v
    sums[_MOMENTS + 5] += r_v2
    sums[_MOMENTS + 6] += t_v
    sums[_MOMENTS + 7] += t_v2
    sums[_MOMENTS + 8] += p2
    sums[_MOMENTS + 9] += q2


@_kernel
def _divergences(x: Any, y: Any, p: Any, q: Any, g: Any, inverse: Any, sums: Any) -> None:
    """The sums of the divergences; ``inverse`` is 1 / T."""
    _wide()
    anchor, offset, coef, far = g[_ANCHOR_P], g[_OFFSET], g[_P_COEF], g[_P_FAR] > _ZERO
    m = total_g = g_rev = js = dp1 = sq = rp2 = rpp = _ZERO
    for k in range(len(x)):
        pk, qk = p[k], q[k]
        ratio = _fma((y[k] - x[k]) - anchor, inverse, -offset)
        size = abs(ratio)
        near = size < _HALF
        n = ratio if near else _ZERO
        n2 = n * n
        phi = _phi(n)
        pn2 = pk * n2
        near_dp = _fma(pn2, phi, pk * n)
        far_dp = qk - pk
        dp = near_dp if near else far_dp
        near_g = pn2 * phi
        far_g = _fma(-pk, ratio, far_dp)
        near_rev = pn2 * (_ONE - phi * (_ONE - n))
        far_rev = _fma(qk, ratio, -far_dp)
        w = n2 * _QUARTER
        near_js = _fma(near_dp, n * _HALF, -(_fma(_TWO, pk, near_dp) * (w * _log_cosh(w))))
        least = pk if pk < qk else qk
        far_js = _fma(pk + qk, _LN_2 - _log1p(_exp2(-size * _LOG2_E)), -(least * size))
        signed = pk + near_dp
        signed = signed if near_dp > _ZERO else (-signed if near_dp < _ZERO else _ZERO)
        base = qk if far else dp
        r = _fma(-coef, pk, base)
        m = _add(m, dp)
        total_g = _add(total_g, near_g if near else far_g)
        g_rev = _add(g_rev, near_rev if near else far_rev)
        js = _add(js, near_js if near else far_js)
        dp1 = _add(dp1, abs(dp))
        sq = _add(sq, signed if near else _ZERO)
        rp2 = _add(rp2, r * r)
        rpp = _add(rpp, r * pk)
    sums[_DIVERGENCES + 0] += m
    sums[_DIVERGENCES + 1] += total_g
    sums[_DIVERGENCES + 2] += g_rev
    sums[_DIVERGENCES + 3] += _HALF * js
    sums[_DIVERGENCES + 4] += dp1
    sums[_DIVERGENCES + 5] += sq
    sums[_DIVERGENCES + 6] += rp2
    sums[_DIVERGENCES + 7] += rpp


@_kernel
def _pairs(
    flat: Any, stride: int, vocab: int, pairs: Any, pilots: Any, start: int, stop: int, inverse: Any, out: Any
) -> None:
    """Pairs ``start`` to ``stop``; row i begins at ``i * stride`` in ``flat``."""
    _wide()
    before = _no_denormals()
    p, q = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    scale = inverse * _LOG2_E
    for pair in range(start, stop):
        dense = flat[pairs[pair, 0] * stride : pairs[pair, 0] * stride + vocab]
        target = flat[pairs[pair, 1] * stride : pairs[pair, 1] * stride + vocab]
        g = pilots[pair]
        for segment in range(out.shape[1]):
            last = min(segment * SEGMENT + SEGMENT, vocab)
            sums = out[pair, segment]
            for begin in range(segment * SEGMENT, last, _BLOCK):
                end = min(begin + _BLOCK, last)
                x, y = dense[begin:end], target[begin:end]
                _geometry(x, y, p, q, g, scale, sums)
                _moments(x, y, p, q, g, sums)
                _divergences(x, y, p, q, g, inverse, sums)
    _denormals_as(before)


# --- the two functions of a backend --------------------------------------------------------------------------------------


def _flat(z: Tensor) -> Any:
    """All rows in one vector; row i begins at ``i * z.stride(0)``."""
    if z.dtype != torch.float32 or z.device.type != "cpu" or z.stride(1) != 1:
        raise ValueError("logits must be float32 on the CPU, the numbers of a row side by side")
    return z.as_strided(((len(z) - 1) * z.stride(0) + z.shape[1],), (1,)).numpy()


def _share(count: int, work: Callable[[int, int], None]) -> None:
    """``work(start, stop)`` over ``range(count)``, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        work(0, count)
        return
    pieces = min(count, threads * _SHARES)
    bounds = [count * k // pieces for k in range(pieces + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def row_sums(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `fused.Backend`; the sums are float64."""
    rows, vocab = z.shape
    out = np.empty((rows, segments(vocab), len(ROW_SUMS)))
    top = np.empty((rows, min(TOP, vocab)), np.int64)
    if rows:
        flat, scale = _flat(z), np.float32(1 / temperature) * _LOG2_E
        _share(rows, lambda start, stop: _rows(flat, z.stride(0), vocab, start, stop, scale, out, top))
    return torch.from_numpy(out), torch.from_numpy(top)


def sweep(z: Tensor, pairs: Tensor, known: Prepared, temperature: float) -> Tensor:
    """See `sums.Backend`."""
    return pair_sums(z, pairs, known.guess, temperature).sum(1, dtype=torch.float64)


def pair_sums(z: Tensor, pairs: Tensor, pilots: Tensor, temperature: float) -> Tensor:
    """See `fused.Backend`; the sums are float64."""
    vocab = z.shape[1]
    out = np.zeros((len(pairs), segments(vocab), len(PAIR_SUMS)))
    if len(pairs):
        flat, inverse = _flat(z), np.float32(1 / temperature)
        places, guesses = pairs.contiguous().numpy(), pilots.contiguous().numpy()
        _share(
            len(pairs),
            lambda start, stop: _pairs(flat, z.stride(0), vocab, places, guesses, start, stop, inverse, out),
        )
    return torch.from_numpy(out)


def hidden_change(h: Tensor, pairs: Tensor) -> Tensor:
    """See `fused.Backend`."""
    from prunescope.compare.metrics import relative_change

    out = torch.empty(len(pairs), 3, dtype=torch.float64)
    group = max(1, _HIDDEN // h.shape[1])
    for start in range(0, len(pairs), group):
        x, y = (h[rows].double() for rows in pairs[start : start + group].unbind(1))
        out[start : start + group] = torch.stack(relative_change(x, y, y - x), 1)
    return out
