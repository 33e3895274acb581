"""All columns for many places, in bounded memory.

No tensor of tokens x vocabulary is ever held: a few rows are projected at a time, and rows that take part in several comparisons (the
stream after sublayer i is the stream before sublayer i + 1) are projected once. Where a kernel is at hand (`sums.backend`) the columns come
from sums that one sweep over the logits gathers, else from the plain formulas of `metrics`, within the same bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from prunescope.compare.head import Head, on_tensor_cores, vocab_tile
from prunescope.compare.kernels import sums
from prunescope.compare.metrics import (
    COLUMNS,
    H_COLUMNS,
    Change,
    RowFacts,
    check_temperature,
    compare_hidden,
    describe_rows,
    hidden_columns,
    pair_columns,
    working_dtype,
)

__all__ = ["DEFAULT_MEMORY", "begin_compare", "compare", "compare_final", "least_memory"]

DEFAULT_MEMORY = 512 * 2**20
_GROUP = 2**18  # logits that the elementwise pass handles at once: small enough to stay in the cache
_PRODUCT_ROWS = 128  # rows that one tile of a GPU's matrix product covers
_GATHERED = 1500  # bytes that the kernels' sums and the columns of one pair take
_DEVICE_GROUP = 2**23  # the same where kernels do the rest
_TEMPORARIES = 20  # tensors of one group alive at the same time in `pair_columns`, rounded up


@torch.no_grad()
def compare(
    streams: Tensor,
    pairs: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    next_token: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> dict[str, Tensor]:
    """All columns for many pairs of hidden states, in bounded memory.

    Args:
        streams: ``(n, d)`` hidden states of the dense and of the target model, any float dtype.
        pairs: ``(m, 2)`` int64, rows of ``streams``: the dense one and the target one. A row may stand in any number of
            pairs; within a chunk it is projected once, so keep pairs that share rows together.
        head: from hidden state to logits, for dense and target rows alike.
        temperature: metric temperature T.
        next_token: ``(m,)`` int64, the token that follows each pair, -1 where none does.
        memory: bytes that this function may hold beyond its inputs and its result.
    Returns:
        Column name -> ``(m,)`` float64 on the CPU.
    Raises:
        ValueError: T <= 0, or a ``memory`` too small for a single pair (it says what is needed).
        FloatingPointError: a NaN or infinite logit.
    """
    return begin_compare(streams, pairs, head, temperature=temperature, next_token=next_token, memory=memory)()


@torch.no_grad()
def begin_compare(
    streams: Tensor,
    pairs: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    next_token: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Callable[[], dict[str, Tensor]]:
    """`compare` in two steps: all work is given to the device, and what is returned waits for the columns. On a CPU they are there at once."""
    check_temperature(temperature)
    dtype = working_dtype(streams, head.weight)
    backend = sums.backend(streams.device, dtype)
    if backend is not None:
        return _compare_by_sums(backend, streams, pairs, head, temperature, next_token, memory)
    parts: dict[str, list[Tensor]] = {}
    for chunk in _chunks(pairs, head, dtype, memory):
        columns = _compare_chunk(
            streams, pairs[chunk], head, temperature, None if next_token is None else next_token[chunk], dtype,
            _group(head, dtype, memory),
        )  # fmt: skip
        for name, value in columns.items():
            parts.setdefault(name, []).append(value.cpu())
    found = {name: torch.cat(value) for name, value in parts.items()}
    return lambda: found


@torch.no_grad()
def compare_final(
    h: Tensor,
    h_target: Tensor,
    head: Head,
    target_head: Head,
    index: Tensor | None = None,
    *,
    temperature: float = 1.0,
    next_token: Tensor | None = None,
    next_token_target: Tensor | None = None,
    also: Callable[[slice, Tensor, Tensor], dict[str, Tensor]] | None = None,
    tops: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> dict[str, Tensor]:
    """All columns of the final states of two models, each through its own head, in bounded memory.

    Args:
        h: ``(n, d)``, what enters the head of the dense model, any float dtype.
        h_target: ``(rows, d)``, the same of the target. If the widths differ, the h columns are NaN.
        index: ``(rows,)`` int64, the row of ``h`` that each target row is compared with; left out, its own. A dense row that stands in
            neighbouring rows is projected once.
        head, target_head: of one vocabulary.
        temperature: metric temperature T.
        next_token: ``(rows,)`` int64, the token that follows, -1 where none does. ``next_token_target`` where the target reads a
            text of its own; there is a column ``nll_target_of_dense`` then, what the target gives the dense text's token.
        also: more columns from the logits of some rows, each ``(rows of the slice, ...)``, while these are there.
        tops: how many of the most likely tokens of both sides are given, at most 10, the most likely first, ties by lower id.
        memory: bytes that this function may hold beyond its inputs and its result.
    Returns:
        Column name -> ``(rows,)`` float64 on the CPU: the spec's columns, and ``confidence_dense`` and ``confidence_target``, the
        probability of the most likely token. With ``tops``, ``(rows, tops)``: ``top_dense``, ``top_target`` int32 ids and ``top_dense_p``,
        ``top_target_p`` their probabilities at T, in the dtype of the logits.
    Raises:
        ValueError: T <= 0, a vocabulary that differs, or a ``memory`` too small for one pair.
        FloatingPointError: a NaN or infinite logit.
    """
    check_temperature(temperature)
    index = torch.arange(len(h_target)) if index is None else index
    if len(index) != len(h_target) or head.vocab_size != target_head.vocab_size:
        raise ValueError("every target row needs a dense row, and both models the same vocabulary")
    dtype = working_dtype(h, h_target, head.weight, target_head.weight)
    fixed, row = (
        max(pair) for pair in zip(_bytes(head, dtype, memory), _bytes(target_head, dtype, memory), strict=True)
    )
    if memory < fixed + 2 * row:
        raise ValueError(f"memory={memory} bytes is too little: give at least {fixed + 2 * row}")
    index = index.to(h.device)
    kernels = sums.backend(h.device, dtype)

    def of_chunk(chunk: slice) -> dict[str, Tensor]:
        used, place = torch.unique(index[chunk], return_inverse=True)
        theirs = h_target[chunk].to(h.device)
        if h.shape[1] == theirs.shape[1]:
            columns = compare_hidden(h[index[chunk]], theirs)
        else:
            columns = {name: torch.full((len(theirs),), torch.nan, dtype=torch.float64) for name in H_COLUMNS}
        z = h.new_empty(len(used) + len(theirs), sums.padded(head.vocab_size), dtype=dtype)[:, : head.vocab_size]
        z_used, z_target = z[: len(used)], z[len(used) :]
        head.logits(h[used], dtype, out=z_used)
        target_head.logits(theirs, dtype, out=z_target)

        def following(part: slice) -> list[Tensor | None]:
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            return [None if token is None else token[rows].to(z.device) for token in (next_token, next_token_target)]

        def more(part: slice) -> dict[str, Tensor]:
            if also is None:
                return {}
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            return also(rows, z_used[place[part]], z_target[part])

        def of_group(part: slice) -> dict[str, Tensor]:
            a, b = (describe_rows(side, temperature) for side in (z_used[place[part]], z_target[part]))
            found = pair_columns(z_used[place[part]], z_target[part], a, b, temperature, *following(part))
            found |= {f"confidence_{side}": torch.exp(-x.log_mass[:, 0]) for side, x in (("dense", a), ("target", b))}
            if tops:
                for side, x, logits in (("dense", a, z_used[place[part]]), ("target", b, z_target[part])):
                    top = x.top[:, :tops]
                    found |= _likely(side, top, logits.gather(-1, top), x.peak_logit, x.log_mass, temperature, dtype)
            return found | more(part)

        if kernels is None:
            columns |= _by_groups(len(theirs), _group(head, dtype, memory), of_group)
        else:
            pairs = torch.stack([place, torch.arange(len(theirs), device=z.device) + len(used)], 1)
            tokens = following(slice(0, len(theirs)))
            gathered = sums.gather(kernels, z, pairs, temperature, *tokens)
            found = sums.finish(gathered, z.shape[1], temperature, Change)
            absent = [token is None for token in (tokens[0], tokens[0], tokens[1])]
            names = ("nll_dense", "nll_target", "nll_target_of_dense")
            left_out = {name for name, gone in zip(names, absent, strict=True) if gone}
            columns |= _to_host({name: value for name, value in found.items() if name not in left_out})
            if tops:
                for side, row in zip(("dense", "target"), pairs.unbind(1), strict=True):
                    x = gathered.rows.take(row)
                    top = x.top[:, :tops]
                    peak, mass = x.peak[:, None], x.log_mass[:, None]
                    columns |= _likely(side, top, x.top_z[:, :tops], peak, mass, temperature, dtype)
            if also is not None:
                columns |= _by_groups(len(theirs), max(1, _DEVICE_GROUP // head.vocab_size), more)
        return {name: value.cpu() for name, value in columns.items()}

    return _by_groups(len(h_target), (memory - fixed) // (2 * row), of_chunk)


def _likely(
    side: str, top: Tensor, logits: Tensor, peak: Tensor, log_mass: Tensor, temperature: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The most likely tokens ``(rows, n)`` of a side, and their probabilities from its logits there."""
    p = ((logits.double() - peak) / temperature - log_mass).exp()
    return {f"top_{side}": top.int(), f"top_{side}_p": p.to(dtype)}


def _compare_by_sums(
    backend: sums.Backend,
    streams: Tensor,
    pairs: Tensor,
    head: Head,
    temperature: float,
    next_token: Tensor | None,
    memory: int,
) -> Callable[[], dict[str, Tensor]]:
    """`begin_compare` with the kernels of a backend. The host runs ahead of the device: nothing here waits for it."""
    device, pairs = streams.device, pairs.cpu()
    chunks = list(_chunks(pairs, head, torch.float32, memory))
    uniques = [torch.unique(pairs[chunk], return_inverse=True) for chunk in chunks]
    used = _to_device(torch.cat([rows for rows, _ in uniques]), device).split([len(rows) for rows, _ in uniques])
    index = _to_device(torch.cat([places for _, places in uniques]), device)
    following = None if next_token is None else _to_device(next_token, device)
    buffer = torch.empty(max(map(len, used)), sums.padded(head.vocab_size), device=device)[:, : head.vocab_size]
    gathered: list[sums.Gathered] = []
    hidden: list[Tensor] = []
    result: list[Callable[[], dict[str, Tensor]]] = []

    def flush() -> None:
        merged = sums.merged(gathered)
        found = sums.columns_of(merged, head.vocab_size, temperature, Change)
        found |= hidden_columns(Change(*torch.cat(hidden).unbind(1)))
        found["finite"] = merged.rows.finite.all().expand(len(merged.pairs))
        result.append(_on_the_way({name: found[name] for name in (*COLUMNS, "finite")}))
        gathered.clear()
        hidden.clear()

    for chunk, rows in zip(chunks, used, strict=True):
        own = index[chunk]
        h = streams[rows]
        z = head.logits(h, out=buffer[: len(rows)])
        gathered.append(sums.gather(backend, z, own, temperature, None if following is None else following[chunk]))
        hidden.append(backend.hidden_change(h, own))
        if sum(len(part.pairs) for part in gathered) * _GATHERED > memory // 8:
            flush()
    if gathered:
        flush()

    def columns() -> dict[str, Tensor]:
        parts = [wait() for wait in result]
        for part in parts:
            sums.check_finite(part["finite"])
        names = [name for name in COLUMNS if next_token is not None or not name.startswith("nll_")]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    return columns


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for what the device still has to do."""
    return (
        host.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and not host.is_cuda
        else host.to(device)
    )


def _on_the_way(columns: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """All columns in one copy to the host, which is begun; what is returned waits for it."""
    stacked = torch.stack([value.double() for value in columns.values()])
    host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=stacked.is_cuda)
    host.copy_(stacked, non_blocking=True)
    done = torch.cuda.current_stream(stacked.device).record_event() if stacked.is_cuda else None

    def wait() -> dict[str, Tensor]:
        if done is not None:
            done.synchronize()
        return dict(zip(columns, host.unbind(), strict=True))

    return wait


def _to_host(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return _on_the_way(columns)()


def _compare_chunk(
    streams: Tensor, pairs: Tensor, head: Head, temperature: float, next_token: Tensor | None, dtype: torch.dtype, group: int
) -> dict[str, Tensor]:  # fmt: skip
    pairs = pairs.to(streams.device)
    columns = compare_hidden(streams[pairs[:, 0]], streams[pairs[:, 1]])
    used, index = torch.unique(pairs, return_inverse=True)
    z = head.logits(streams[used], dtype)
    rows = RowFacts(
        *_by_groups(len(z), group, lambda part: dict(enumerate(describe_rows(z[part], temperature)))).values()
    )

    def of_pairs(part: slice) -> dict[str, Tensor]:
        dense, target = index[part].unbind(-1)
        following = None if next_token is None else next_token[part].to(z.device)
        return pair_columns(z[dense], z[target], rows.take(dense), rows.take(target), temperature, following)

    return columns | _by_groups(len(index), group, of_pairs)


_Key = TypeVar("_Key")


def _by_groups(count: int, group: int, work: Callable[[slice], dict[_Key, Tensor]]) -> dict[_Key, Tensor]:
    """Run ``work`` on ``group`` rows at a time, each result copied into its place at once.

    Small results kept alive between large temporaries would keep the allocator from giving memory back.
    """
    result: dict[_Key, Tensor] = {}
    for start in range(0, count, group):
        part = slice(start, min(start + group, count))
        for name, value in work(part).items():
            if start == 0:
                result[name] = value.new_empty((count, *value.shape[1:]))
            result[name][part] = value
    return result


def _chunks(pairs: Tensor, head: Head, dtype: torch.dtype, memory: int) -> Iterator[slice]:
    """Slices of ``pairs`` whose distinct rows, projected, fit into ``memory`` beside the temporaries."""
    fixed, row = _bytes(head, dtype, memory)
    rows = (memory - fixed) // row
    if head.weight.is_cuda and rows > _PRODUCT_ROWS:
        rows -= rows % _PRODUCT_ROWS  # whole tiles of the matrix product
    if rows < 2:
        need = fixed + 2 * row
        raise ValueError(
            f"memory={memory} bytes is too little for a vocabulary of {head.vocab_size}: give at least {need}"
        )
    start, pairs = 0, pairs.cpu()
    while start < len(pairs):
        # the pair that would bring one row too many begins the next chunk
        window = pairs[start : start + rows].flatten().numpy()
        first_seen = np.sort(np.unique(window, return_index=True)[1])
        stop = start + (min(rows, len(pairs) - start) if len(first_seen) <= rows else int(first_seen[rows]) // 2)
        yield slice(start, stop)
        start = stop


def least_memory(head: Head, dtype: torch.dtype = torch.float32) -> int:
    """The smallest ``memory`` in bytes that `compare` can work with."""
    fixed, row = _bytes(head, dtype, 0)
    return fixed + 2 * row


def _group(head: Head, dtype: torch.dtype, memory: int) -> int:
    """Pairs that the elementwise pass handles at once: what stays in a CPU's cache, or a quarter of the memory of a GPU, whose time goes into
    launching."""
    if not head.weight.is_cuda:
        return max(1, _GROUP // head.vocab_size)
    tile, row = _tile_and_row(head, dtype)
    return max(1, min(memory // 4, memory - tile - 2 * row) // (_TEMPORARIES * dtype.itemsize * head.vocab_size))


def _bytes(head: Head, dtype: torch.dtype, memory: int) -> tuple[int, int]:
    """What `compare` holds however few rows there are, and what each distinct row adds."""
    width, vocab = head.weight.shape[1], head.vocab_size
    if sums.backend(head.weight.device, dtype) is not None and on_tensor_cores(head.weight, head.weight):
        return 2**22, sums.padded(vocab) * 4 + 20 * width + vocab // 8 + _GATHERED  # logits, parts of h, maxima, sums
    tile, row = _tile_and_row(head, dtype)
    return _TEMPORARIES * _group(head, dtype, memory) * vocab * dtype.itemsize + tile, row


def _tile_and_row(head: Head, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a float64 tile of the head, and of a row: logits, float64 copies of h, its part of a tile."""
    tile, width = vocab_tile(head), head.weight.shape[1]
    return 8 * tile * width, head.vocab_size * dtype.itemsize + 8 * (8 * width + tile)
