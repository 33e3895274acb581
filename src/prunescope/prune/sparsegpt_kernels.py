# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108  (Triton knows neither)
"""Triton kernels of SparseGPT's blocks of columns: selection of the lowest scores by their bits, and the column loop.

A score is a float32 that is not negative, so its bits order it as an integer. Its k-th lowest is found in four passes of 8, 8, 8 and 7 bits,
each a histogram of the scores that agree with what is known; nothing is sorted and nothing waits for the host. Sums of integers alone
meet between programs, so that results are the same bits every time.

Matrices are ``(columns, rows)``: a column's weights lie together. A *tile* is some rows of one matrix; the table of tiles has a row
``[matrix, first row, last row + 1, first tile of the matrix]`` for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns_kernel", "histogram_kernel", "rows_kernel", "ties_kernel"]


@triton.jit
def _threshold(counts, wanted, PASS: tl.constexpr, BINS: tl.constexpr):
    """The leading bits of the ``wanted``-th lowest score as far as PASS histograms tell, and which of those with these bits it is."""
    bins = tl.arange(0, BINS)
    known = wanted * 0
    left = wanted
    for step in tl.static_range(PASS):
        here = tl.load(counts + step * BINS + bins)
        below = tl.cumsum(here, 0)
        place = tl.sum((below < left).to(tl.int32), 0)
        left = left - tl.sum(tl.where(bins < place, here, 0), 0)
        known = known * (128 if step == 3 else 256) + place
    return known, left


@triton.jit
def _tile(tiles, tile):
    return (
        tl.load(tiles + tile * 4),
        tl.load(tiles + tile * 4 + 1),
        tl.load(tiles + tile * 4 + 2),
        tl.load(tiles + tile * 4 + 3),
    )


@triton.jit
def _bits(values, weighting, rows, columns, inside, stride):
    """Bits of the scores ``values^2 * weighting`` of a tile ``(rows, columns)``."""
    value = tl.load(values + columns[None, :] * stride + rows[:, None], mask=inside, other=0.0)
    score = value * value * tl.load(weighting + columns)[None, :]
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def histogram_kernel(
    values, weighting, tiles, wanted, counts, stride, count, PASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Pass PASS: how many scores that agree with what the passes before it found have which next bits.

    Args:
        values: ``(count, stride)`` float32.
        weighting: ``(C,)`` float32.
        wanted: ``(matrices,)`` int32, at least 1 where it matters.
        counts: ``(matrices, 4, BINS)`` int32; row PASS is added to.
    """
    matrix, first, last, _ = _tile(tiles, tl.program_id(0))
    counts += matrix * (4 * BINS)
    rows, columns = first + tl.arange(0, R), tl.arange(0, C)
    inside = (rows[:, None] < last) & (columns[None, :] < count)
    bits = _bits(values, weighting, rows, columns, inside, stride)
    if PASS > 0:
        known, _ = _threshold(counts, tl.load(wanted + matrix), PASS, BINS)
        inside = inside & ((bits >> (7 if PASS == 3 else 31 - 8 * PASS)) == known)
    digit = (bits & 127) if PASS == 3 else ((bits >> (23 - 8 * PASS)) & 255)
    # what does not count falls into the last bin, where it moves no rank: the mask of tl.histogram miscounts on a GPU (Triton 3.6)
    found = tl.histogram(tl.reshape(tl.where(inside, digit, BINS - 1), [R * C]), BINS)
    tl.atomic_add(counts + PASS * BINS + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def ties_kernel(
    values, weighting, tiles, wanted, counts, found, stride, count, many, R: tl.constexpr, C: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """``found`` ``(3, many)`` int32, a column a tile: the bits of the threshold, how many scores equal to it go, how many the tile has."""
    tile = tl.program_id(0)
    matrix, first, last, _ = _tile(tiles, tile)
    rows, columns = first + tl.arange(0, R), tl.arange(0, C)
    inside = (rows[:, None] < last) & (columns[None, :] < count)
    bits = _bits(values, weighting, rows, columns, inside, stride)
    goal = tl.load(wanted + matrix)
    bar, left = _threshold(counts + matrix * (4 * BINS), goal, 4, BINS)
    bar = tl.where(goal > 0, bar, -1)
    tl.store(found + tile, bar)
    tl.store(found + many + tile, left)
    tl.store(found + 2 * many + tile, tl.sum(tl.sum((inside & (bits == bar)).to(tl.int32), 1), 0))


@triton.jit
def columns_kernel(
    values, weights, dropped, upper, scale, weighting, tiles, found, stride, many,
    COUNT: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Prune a tile's columns one after the other, each making up for those before it.

    Args:
        values: ``(COUNT, stride)`` float32, the weights as earlier blocks left them.
        weights: the same shape: in, the original weights; out, the pruned ones.
        dropped: the same shape, out: original less pruned.
        upper: ``(C, C)`` float32, what column j loses for column i's error, above the diagonal; zeros elsewhere.
        scale: ``(C,)`` float32, 1 over the diagonal.
        found: see `ties_kernel`, its last row summed up to and with each tile; not read where OF is not 0.
    """
    tile = tl.program_id(0)
    _, first, last, first_tile = _tile(tiles, tile)
    rows, columns = first + tl.arange(0, R), tl.arange(0, C)
    inside = (rows[:, None] < last) & (columns[None, :] < COUNT)
    place = columns[None, :] * stride + rows[:, None]
    value = tl.load(values + place, mask=inside, other=0.0)
    weigh = tl.load(weighting + columns)
    if OF == 0:
        score = value * value * weigh[None, :]
        bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bar = tl.load(found + tile)
        sums = found + 2 * many
        before = tl.load(sums + tile - 1, mask=tile > 0, other=0) - tl.load(
            sums + first_tile - 1, mask=first_tile > 0, other=0
        )
        tied = (inside & (bits == bar)).to(tl.int32)
        in_row = tl.sum(tied, 1)
        rank = before + (tl.cumsum(in_row, 0) - in_row)[:, None] + tl.cumsum(tied, 1)  # counted from 1
        gone = inside & ((bits < bar) | ((tied > 0) & (rank <= tl.load(found + many + tile))))
        for i in range(0, COUNT):
            here = columns[None, :] == i
            error = tl.sum(tl.where(here & gone, value, 0.0), 1) * tl.load(scale + i)
            value -= error[:, None] * tl.load(upper + i * C + columns)[None, :]
    else:
        gone = inside & (columns[None, :] < 0)
        score = value
        for i in range(0, COUNT):
            start = (i // OF) * OF
            if i == start:
                score = value * value * weigh[None, :]
            here = columns[None, :] == i
            mine = tl.sum(tl.where(here, score, 0.0), 1)[:, None]
            lower = (score < mine) | ((score == mine) & (columns < i)[None, :])
            near = ((columns >= start) & (columns < start + OF))[None, :]
            rank = tl.sum((lower & near).to(tl.int32), 1)
            goes = (rank < OF - KEEP)[:, None] & here
            gone = gone | (goes & inside)
            error = tl.sum(tl.where(goes, value, 0.0), 1) * tl.load(scale + i)
            value -= error[:, None] * tl.load(upper + i * C + columns)[None, :]
    kept = tl.where(gone, 0.0, value)
    weight = tl.load(weights + place, mask=inside, other=0.0)
    tl.store(dropped + place, weight - kept, mask=inside)
    tl.store(weights + place, kept, mask=inside)


@triton.jit
def _entry(pointer, column, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """What is read for a column; 0 where a block has no such column."""
    if EVEN:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=column < COUNT, other=0.0)
    return value


@triton.jit
def rows_kernel(
    values, weights, dropped, upper, scale, weighting, tiles, found, stride, many,
    COUNT: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """As `columns_kernel`, the same bits, with a row a thread and SUB columns of it in registers, so that no thread waits for another.

    A column hears of the columns before it in their order: first of those in front of its SUB columns, whose errors are read back, then of its
    neighbours. ``values`` becomes the errors. OF divides SUB.
    """
    tile = tl.program_id(0)
    _, first, last, first_tile = _tile(tiles, tile)
    rows = first + tl.arange(0, R)
    inside = rows < last
    EVEN: tl.constexpr = COUNT % SUB == 0
    bar, left, rank = 0, 0, tl.zeros([R], tl.int32)
    if OF == 0:
        bar = tl.load(found + tile)
        left = tl.load(found + many + tile)
        sums = found + 2 * many
        before = tl.load(sums + tile - 1, mask=tile > 0, other=0) - tl.load(
            sums + first_tile - 1, mask=first_tile > 0, other=0
        )
        tied_in_row = tl.zeros([R], tl.int32)
        for column in range(0, COUNT):
            value = tl.load(values + column * stride + rows, mask=inside, other=0.0)
            score = value * value * tl.load(weighting + column)
            tied_in_row += (inside & ((score.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == bar)).to(tl.int32)
        rank = before + tl.cumsum(tied_in_row, 0) - tied_in_row  # ties in front of the row
    for start in range(0, COUNT, SUB):
        now = ()
        weigh = ()
        for j in tl.static_range(SUB):
            here = inside if EVEN else inside & (start + j < COUNT)
            now = now + (tl.load(values + (start + j) * stride + rows, mask=here, other=0.0),)
            weigh = weigh + (_entry(weighting + start + j, start + j, COUNT, EVEN),)
        gone = ()
        if OF == 0:
            for j in tl.static_range(SUB):
                bits = (now[j] * now[j] * weigh[j]).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                tied = inside & (bits == bar)
                rank += tied.to(tl.int32)
                gone = gone + ((bits < bar) | (tied & (rank <= left)),)
        for block in range(0, start, SUB):
            for step in tl.static_range(SUB):
                k = block + step
                error = tl.load(values + k * stride + rows, mask=inside, other=0.0)
                new = ()
                for j in tl.static_range(SUB):
                    new = new + (now[j] - error * _entry(upper + k * C + start + j, start + j, COUNT, EVEN),)
                now = new
        errors = ()
        for i in tl.static_range(SUB):
            if OF > 0:
                if i % OF == 0:
                    scores = ()
                    for a in tl.static_range(OF):
                        scores = scores + (now[i + a] * now[i + a] * weigh[i + a],)
                    for a in tl.static_range(OF):
                        below = tl.zeros([R], tl.int32)
                        for b in tl.static_range(OF):
                            if b < a:
                                below += (scores[b] <= scores[a]).to(tl.int32)
                            if b > a:
                                below += (scores[b] < scores[a]).to(tl.int32)
                        gone = gone + (below < OF - KEEP,)
            error = tl.where(gone[i], now[i], 0.0) * _entry(scale + start + i, start + i, COUNT, EVEN)
            errors = errors + (error,)
            new = ()
            for j in tl.static_range(SUB):
                if j > i:
                    new = new + (now[j] - error * _entry(upper + (start + i) * C + start + j, start + j, COUNT, EVEN),)
                else:
                    new = new + (now[j],)
            now = new
        tl.debug_barrier()
        for j in tl.static_range(SUB):
            here = inside if EVEN else inside & (start + j < COUNT)
            place = (start + j) * stride + rows
            kept = tl.where(gone[j], 0.0, now[j])
            weight = tl.load(weights + place, mask=here, other=0.0)
            tl.store(dropped + place, weight - kept, mask=here)
            tl.store(weights + place, kept, mask=here)
            tl.store(values + place, errors[j], mask=here)
        tl.debug_barrier()
