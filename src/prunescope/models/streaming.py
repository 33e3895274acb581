"""Texts on their way through a model whose weights stay on disk: how it calls its blocks, and the hidden states between two of them.

The arguments with which a model calls its blocks (masks, rotary embeddings, ...) are recorded once, by running its own forward with blocks
that pass the stream on. Blocks are then run one at a time, on all texts, with these. That this is what the model itself computes is checked on
the probe with which it was opened: see `Recorded.check`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from prunescope.errors import UserError
from prunescope.files import replacing
from prunescope.models.attending import any_length
from prunescope.models.blockwise import StreamedModel
from prunescope.models.dropping import DropSpec
from prunescope.models.finding import first_output, other_forwards, swap_first_tensor
from prunescope.models.keeping import Conditions, Keeper
from prunescope.progress import progress

__all__ = ["Carried", "Recorded", "having_read", "pass_through", "recording"]

_AT_ONCE = 2**29  # bytes of hidden states, those in front of a block, that a GPU keeps


@dataclass
class Recorded:
    """The arguments of every block for every forward pass that was recorded: ``calls[pass][block]`` is ``(args, kwargs)`` without the stream."""

    calls: list[list[tuple[Any, Any]]] = field(default_factory=list)
    pool: list[Tensor] = field(default_factory=list)

    def add(self, calls: Sequence[tuple[Any, Any, Tensor]]) -> None:
        shared: dict[int, Tensor] = {}
        self.calls.append([(self._kept(args, shared), self._kept(kwargs, shared)) for args, kwargs, _ in calls])

    def _kept(self, value: Any, shared: dict[int, Tensor]) -> Any:
        """``value`` with its tensors replaced by equal ones that are kept already: batches of one shape share masks and positions."""
        if isinstance(value, Tensor):
            if id(value) not in shared:
                same = (
                    t for t in self.pool if t.shape == value.shape and t.dtype == value.dtype and torch.equal(t, value)
                )
                found = next(same, None)
                if found is None:
                    self.pool.append(value)
                shared[id(value)] = value if found is None else found
            return shared[id(value)]
        if isinstance(value, dict):
            return {key: self._kept(item, shared) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            kept = [self._kept(item, shared) for item in value]
            return kept if isinstance(value, list) else tuple(kept)
        return value

    def run(
        self, streamed: StreamedModel, number: int, layer: int, hidden: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """What block ``layer``, whose weights are in memory, makes of ``hidden`` in pass ``number``, with ``cache`` for the recorded one."""
        args, kwargs = self.calls[number][layer]
        if cache is not None:
            args = tuple(cache if isinstance(value, Cache) else value for value in args)
            kwargs = {key: cache if isinstance(value, Cache) else value for key, value in kwargs.items()}
        args, kwargs = swap_first_tensor(args, kwargs, hidden)
        with any_length():
            return first_output(streamed.blocks[layer](*args, **kwargs))

    def check(self, streamed: StreamedModel, layer: int, conditions: Conditions) -> None:
        """Block ``layer``, run on its own in the first pass that was recorded, the probe's, must give what it gave within the model: UserError if not."""
        found, within = self.run(streamed, 0, layer, streamed.probe[layer]), streamed.probe[layer + 1]
        same = (
            (found == within).all()
            if found.shape == within.shape
            else torch.zeros((), dtype=torch.bool, device=found.device)
        )
        conditions.require(
            same,
            UserError(
                f"{streamed.loaded.ref}: block {layer} on its own gives something else than within the model, so its blocks pass on more than the stream; give --stream false"
            ),
        )


@contextmanager
def recording(streamed: StreamedModel, into: Recorded) -> Iterator[Callable[..., Tensor]]:
    """A function that takes the inputs of a forward pass, adds the pass to ``into``, and gives the stream in front of block 0."""
    model = streamed.model
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    blocks = streamed.loaded.anatomy.blocks
    calls: list[tuple[Any, Any, Tensor]] = []

    def record(**inputs: Any) -> Tensor:
        calls.clear()
        with suppress(_EndOfBlocksError):
            model(**inputs)
        into.add(calls)
        return calls[0][2]

    passers = {block.module: _passer(calls, layer, block.returns, len(blocks)) for layer, block in enumerate(blocks)}
    with other_forwards(passers), streamed.outside(skip=() if tied else (head,)):
        yield record


class _EndOfBlocksError(Exception):
    pass


def _passer(calls: list[tuple[Any, Any, Tensor]], layer: int, returns: int, blocks: int) -> Callable[..., Any]:
    """A block's forward that only records its arguments and passes the stream on; behind the last one the forward pass ends."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append(((None, *args[1:]) if args else (), others, hidden))
        cache = _cache_in(args, kwargs)
        if cache is not None:
            _fill(cache, layer, hidden.shape[1])
        if len(calls) == blocks:
            raise _EndOfBlocksError
        return (hidden, *(None for _ in range(returns - 1))) if returns else hidden

    return forward


def _cache_in(args: Any, kwargs: Any) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _fill(cache: Cache, layer: int, tokens: int) -> None:
    """Let a layer of a cache have seen ``tokens`` more: lengths and masks follow from it, its keys are nothing."""
    nothing = torch.zeros(1, 1, tokens, 1)
    cache.update(nothing, nothing, layer)


# --- texts between two blocks ------------------------------------------------------------------------------------------


class Carried:
    """Forward passes on their way through a streamed model, all of them in front of the same block.

    Their hidden states are a file of ``folder``, ``part-NAME-LAYER.bin``, read a pass at a time and written anew beside it while a block runs;
    so memory holds one pass, and an interrupted run goes on in front of the block that it had reached, with the same bytes. A GPU keeps them if
    they are few (`_AT_ONCE`), and the file is written behind the run's back, see `Keeper`.

    Args:
        inputs: token ids of each pass, ``(batch, tokens)``.
        name: of this model's files among others.
        stepped: texts read token by token with a key/value cache: the pieces ``(1, tokens)`` of each, which are passes after ``inputs``.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        inputs: Sequence[Tensor],
        folder: Path,
        name: str = "dense",
        stepped: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        self.streamed, self.folder, self.name = streamed, folder, name
        self.recorded = Recorded()
        self.count = len(inputs)
        self._shapes: list[tuple[int, ...]] = []
        self._dtype = torch.float32
        self._texts: list[tuple[Cache, list[int]]] = []  # of each stepped text an empty cache, and its passes
        self._caches: dict[int, Cache] = {}  # by pass, with nothing in them but their lengths
        found = sorted(folder.glob(f"part-{name}-*.bin"))
        self.layer = int(found[-1].stem.rpartition("-")[2]) if found else 0  # the block that is next
        for older in found[:-1]:  # of a run that was cut off between two blocks
            older.unlink()
        self._held: list[Tensor] | None = None  # where the device keeps the states
        self.conditions = Conditions()
        self._keeper = Keeper(self._file)
        self._keeper.begin(self.layer)
        self._embed(inputs, stepped, write=not found)

    @torch.no_grad()
    def _embed(self, inputs: Sequence[Tensor], stepped: Sequence[Sequence[Tensor]], write: bool) -> None:
        device = self.streamed.device
        with (
            recording(self.streamed, self.recorded) as record,
            replacing(self._file(0)) if write else nullcontext(Path(os.devnull)) as beside,
            beside.open("wb") as file,
        ):

            def keep(stream: Tensor) -> None:
                self._shapes.append(tuple(stream.shape))
                self._dtype = stream.dtype
                _write(file, stream)

            record(input_ids=self.streamed.probe_ids, use_cache=False)
            for ids in inputs:
                keep(record(input_ids=ids.to(device), use_cache=False))
            for pieces in stepped:
                cache: Cache | None = None
                numbers = []
                for ids in pieces:
                    numbers.append(len(self._shapes))
                    keep(record(input_ids=ids.to(device), past_key_values=cache, use_cache=True))
                    cache = _cache_in(*self.recorded.calls[-1][0])
                    if cache is None or type(cache).__name__ != "DynamicCache":
                        raise UserError(
                            f"{self.streamed.loaded.ref}: its blocks are given no plain key/value cache; give --stream false"
                        )
                assert cache is not None
                self._texts.append((_emptied(cache), numbers))

    def _file(self, layer: int) -> Path:
        return self.folder / f"part-{self.name}-{layer:05d}.bin"

    @property
    def nbytes(self) -> int:
        """Of the hidden states in front of a block."""
        return sum(map(prod, self._shapes)) * self._dtype.itemsize

    @torch.no_grad()
    def run(self, before: Callable[[int], None], after: Callable[[int, Tensor], None], *, check: bool = True) -> None:
        """Run block ``layer``, whose weights are in memory, on all passes, and go on to the next.

        Args:
            before: called with the number of each pass before it runs; ``after`` with the number and the stream into the block.
            check: that the block is the one with which the model was opened, see `Recorded.check`.
        Raises:
            UserError: see `Recorded.check`.
            FloatingPointError: the block's output holds NaN or infinite values. Both errors come a block later, or from `settle`, `close` and `conditions`, where a GPU keeps the
                states; of a block that does not pass nothing is written.
        """
        layer, streamed = self.layer, self.streamed
        held = _at_once(self)
        if check:
            self.recorded.check(streamed, layer, self.conditions)
        if not held:
            self.conditions.look()
        entering = self._held or (self._read_all() if held else None)
        leaving: list[Tensor] = []
        largest: list[Tensor] = []
        with ExitStack() as files:
            file = None if held else files.enter_context(self._file(layer).open("rb"))
            beside = None if held else files.enter_context(replacing(self._file(layer + 1)))
            out = None if beside is None else files.enter_context(beside.open("wb"))

            def one(number: int, cache: Cache | None = None) -> None:
                hidden = self._read(file, number) if entering is None else entering[number]
                before(number)
                found = self.recorded.run(streamed, number + 1, layer, hidden, cache)
                if found.numel():
                    largest.append(torch.linalg.vector_norm(found, torch.inf))  # NaN and infinity come through
                if held:
                    leaving.append(found.detach())
                else:
                    self._require_finite(largest, layer)
                    self.conditions.look()
                    _write(out, found)
                after(number, hidden)

            for number in range(self.count):
                one(number)
            for empty, numbers in self._texts:
                seen = copy.deepcopy(empty.layers[layer])
                for number in numbers:
                    cache = self._cache(empty, numbers, number)
                    others, cache.layers[layer] = cache.layers[layer], seen
                    one(number, cache)
                    cache.layers[layer] = others
                    _fill(cache, layer, self._shapes[number][1])
        self.layer += 1
        if held:
            self._held = leaving
            self._require_finite(largest, layer)
            good = self.conditions.ask()
            self.conditions.look(left=1)  # the host is a block ahead of the device, no more
            self._keeper.offer(self.layer, leaving, good=good, must=self.layer == len(streamed.blocks))
        else:
            self._file(layer).unlink()
            self._keeper.begin(self.layer)

    def _require_finite(self, largest: list[Tensor], layer: int) -> None:
        """The outputs of some passes must be finite; ``largest`` has the greatest magnitude of each, and is emptied."""
        if not largest:
            return
        finite = torch.isfinite(torch.stack(largest)).all()
        self.conditions.require(finite, FloatingPointError(f"the output of block {layer} holds NaN or infinite values"))
        largest.clear()

    def _cache(self, empty: Cache, numbers: Sequence[int], number: int) -> Cache:
        """The cache of a pass of a stepped text: the blocks before the next one have seen the pass, the others what came before it."""
        if number not in self._caches:
            cache = self._caches[number] = copy.deepcopy(empty)
            earlier = sum(self._shapes[other][1] for other in numbers if other < number)
            for layer in range(len(self.streamed.blocks)):
                tokens = earlier + (self._shapes[number][1] if layer < self.layer else 0)
                if tokens:
                    _fill(cache, layer, tokens)
        return self._caches[number]

    def settle(self) -> None:
        """Wait until the states are in their file. Raises as `run`."""
        self.conditions.look()
        self._keeper.finish()

    def close(self) -> None:
        """Remove the file of the hidden states. Raises as `run`."""
        self.conditions.look()
        self._keeper.close()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """If this is left by an error, nothing is being written any more."""
        try:
            yield
        except BaseException:
            self._keeper.leave()
            raise

    def keep_after(self, ready: Callable[[], None]) -> None:
        """Write no states before ``ready`` has returned, which a thread of its own calls: of what must be on the disk when a run goes on from them."""
        self._keeper.before = ready

    def stream(self, number: int) -> Tensor:
        """The stream of a pass in front of the block that is next, or after the last, ``(batch, tokens, d)``."""
        if self._held is not None:
            return self._held[number]
        with self._file(self.layer).open("rb") as file:
            file.seek(sum(map(prod, self._shapes[:number])) * self._dtype.itemsize)
            return self._read(file, number)

    def _read_all(self) -> list[Tensor]:
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        with self._file(self.layer).open("rb") as file:
            file.readinto(memoryview(buffer.numpy()))  # type: ignore[arg-type]
        every = buffer.view(self._dtype).to(self.streamed.device).split([prod(shape) for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(every, self._shapes, strict=True)]

    def _read(self, file: Any, number: int) -> Tensor:
        shape = self._shapes[number]
        buffer = torch.empty(prod(shape) * self._dtype.itemsize, dtype=torch.uint8)
        file.readinto(memoryview(buffer.numpy()))  # type: ignore[arg-type]
        return buffer.view(self._dtype).view(shape).to(self.streamed.device)


def pass_through(
    streamed: StreamedModel,
    texts: Sequence[Tensor],
    folder: Path,
    before: Callable[[int], None],
    after: Callable[[], None],
    *,
    check: bool = True,
) -> None:
    """Let every block read batches of texts ``(batch, tokens)``, all of them before the next block does.

    Args:
        before: called with the number of a batch before a block reads it, ``after`` when it has: what runs outside these is a check.
        check: see `Carried.run`.
    """
    carried = Carried(streamed, texts, folder)
    with carried.at_work(), progress(f"{len(streamed.blocks)} blocks from disk", len(streamed.blocks)) as advance:
        while carried.layer < len(streamed.blocks):
            with streamed.block(carried.layer, mapped=True):
                carried.run(before, lambda number, hidden: after(), check=check)
            advance(1)
    carried.close()


@contextmanager
def having_read(
    streamed: StreamedModel,
    texts: Sequence[Tensor],
    folder: Path,
    name: str,
    advance: Callable[[int], None],
    drop: DropSpec | None = None,
) -> Iterator[None]:
    """Let a model read batches of texts ``(batch, tokens)``, block by block; within the ``with`` block `StreamedModel.states` knows them.

    Args:
        folder, name: see `Carried`.
        advance: told of every block that is done.
        drop: sublayers to leave out; it knows them while the same are dropped.
    """
    numbers: dict[tuple[tuple[int, ...], bytes], int] = {}
    for ids in texts:
        numbers.setdefault(_key(ids), len(numbers))
    distinct = {_key(ids): ids for ids in texts}
    with ExitStack() as stack:
        with streamed.loaded.dropping(drop or DropSpec()):
            dropped = str(streamed.loaded.dropped)
            carried = Carried(streamed, list(distinct.values()), folder, name)
            stack.enter_context(carried.at_work())
            advance(carried.layer)
            while carried.layer < len(streamed.blocks):
                with streamed.block(carried.layer, mapped=True):
                    carried.run(lambda number: None, lambda number, hidden: None, check=drop is None)
                advance(1)
            carried.conditions.look()
        norm = streamed.loaded.anatomy.final_norm

        def read(ids: Tensor) -> Tensor:
            stream = carried.stream(numbers[_key(ids)])
            return stream if norm is None else norm(stream)

        stack.enter_context(streamed.ending())
        streamed.read[dropped] = read
        try:
            yield
        finally:
            del streamed.read[dropped]
    carried.settle()


def _key(ids: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(ids.shape), ids.cpu().numpy().tobytes()


def _at_once(carried: Carried) -> bool:
    """Whether the hidden states stay on the device: each copy that is waited for costs a GPU more than it moves."""
    return carried.streamed.device.type != "cpu" and carried.nbytes <= _AT_ONCE


def _write(file: Any, tensor: Tensor) -> None:
    file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _emptied(cache: Cache) -> Cache:
    """A cache as the model makes it: layers of the same kinds, which have seen nothing."""
    fresh = copy.deepcopy(cache)
    for layer in fresh.layers:  # before 5.23 `reset` leaves zeros where keys were, and on the device of `_fill`
        layer.keys = layer.values = None
        layer.is_initialized = False
    fresh.reset()
    return fresh
