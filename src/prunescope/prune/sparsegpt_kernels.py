# mypy: ignore-errors
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

__all__ = ["columns_kernel", "histogram_kernel", "ties_kernel"]


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
