"""One model pruned by several processes (torch.distributed): each reads its part of the calibration text, their Gram matrices are added up,
and the matrices of a block are shared out to be solved.

The text is cut into as many pieces as ``shares`` says, at bounds of batches. What a piece gives is summed on its own, and pieces are added
pair by pair, as a tree: so the sums, masks and weights depend on the number of shares, not on how many processes there are. Every process
holds the block's weights; a solved matrix goes from the process that solved it to all others as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel
from prunescope.models.matrices import Matrix
from prunescope.prune.calibrate import InputStatistic, Text, gather

__all__ = ["ALONE", "Pieces", "Team", "joined", "mean_perplexity"]

T = TypeVar("T")
_FAILED = "the first process has failed"
_SMALL = 2**20  # numbers of a tensor below which it is sent with others
_PATIENCE = timedelta(days=1)  # with the first process, which reads and writes texts; torchrun ends all where one fails


class Team:
    """The processes that prune together; this one is number ``rank`` of ``world``. ``shares`` is a multiple of ``world``, a power of two of
    it each, or the tree of sums would have another form."""

    def __init__(self, rank: int = 0, world: int = 1, shares: int | None = None) -> None:
        self.rank, self.world, self.shares = rank, world, shares or world
        self.awaited = False  # whether the others wait for what the first process has to tell
        if self.shares % world or (each := self.shares // world) & (each - 1):
            raise UserError(
                f"--shares {self.shares}: the text cannot be shared so among {world} processes; give {world}, or {world} times 2, 4 or 8"
            )

    def own(self, count: int, batch_size: int) -> list[range]:
        """The samples of each of this process's shares; all but the last batch of a text are whole.

        Raises:
            UserError: fewer batches than shares.
        """
        batches = -(-count // batch_size)
        if batches < self.shares:
            raise UserError(
                f"{count} samples in batches of {batch_size} are {batches} batches, fewer than {self.shares} shares; give more --samples or a smaller --batch-size"
            )
        bounds = [min(count, batches * share // self.shares * batch_size) for share in range(self.shares + 1)]
        each = self.shares // self.world
        return [range(bounds[i], bounds[i + 1]) for i in range(self.rank * each, (self.rank + 1) * each)]

    def told(self, what: T | None, *, last: bool = False) -> T:
        """What the first process has; the others give None. They exit with 2 where it has failed, for it says why.

        Args:
            last: nobody waits for anything after it, until ``awaited`` is set again.
        """
        if last:
            self.awaited = False
        if self.world == 1:
            return what  # type: ignore[return-value]
        found = [what]
        distributed.broadcast_object_list(found, src=0)
        if found[0] == _FAILED and self.rank:
            self.leave()
        return found[0]  # type: ignore[return-value]

    @staticmethod
    def leave() -> NoReturn:
        """Exit, with time for the first process to say why before torchrun ends it too."""
        time.sleep(2)
        raise SystemExit(2)

    def all(self, what: T) -> list[T]:
        """What every process has, by rank."""
        if self.world == 1:
            return [what]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, what)
        return found

    def span(self, count: int) -> range:
        """This process's part of so many things in a row; empty where there are fewer than processes."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each tensor, in place; all get the same bits. Shapes, dtypes and order are those of every process."""
        if self.world == 1:
            return
        small = [t for t in tensors if t.numel() < _SMALL or not t.is_contiguous()]
        large = [t for t in tensors if t.numel() >= _SMALL and t.is_contiguous()]
        joint = [torch.cat([t.reshape(-1) for t in small])] if small else []
        for work in [distributed.all_reduce(t, async_op=True) for t in joint + large]:
            work.wait()
        if small:
            for tensor, total in zip(small, joint[0].split([t.numel() for t in small]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Copy a contiguous tensor of process ``owner`` into that of all others, byte by byte."""
        if self.world > 1:
            distributed.broadcast(tensor.view(torch.uint8), src=owner)

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Who solves what: the dearest first, each to the process that has least to do."""
        load = [0.0] * self.world
        found = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = load.index(min(load))
            load[found[name]] += costs[name]
        return found

    def add_up(
        self, mine: Mapping[str, InputStatistic], owners: Mapping[str, int], device: torch.device
    ) -> dict[str, InputStatistic]:
        """Of the statistics that this process owns: what all have gathered, added up as a tree."""
        if self.world == 1:
            return dict(mine)
        apart = {_held(name): one.held_out for name, one in mine.items() if one.held_out is not None}
        for one in mine.values():
            one.held_out = None
        mine = {**mine, **apart}
        heads = self.all({name: (one.tokens, one.rows.shape, one.gram is not None) for name, one in mine.items()})
        found: dict[str, InputStatistic] = {}
        for name, owner in [(key, owner) for first, owner in owners.items() for key in (first, _held(first))]:
            if self.rank == owner:
                parts = [
                    partial(self._part, name, rank, mine, heads, device) if name in heads[rank] else None
                    for rank in range(self.world)
                ]
                if (total := _tree(parts)) is not None:
                    found[name] = total
            elif name in mine:
                for tensor in _tensors(mine[name]):
                    distributed.send(tensor, dst=owner)
        for name in [name for name in owners if name in found]:
            found[name].held_out = found.pop(_held(name), None)
        return found

    def _part(
        self, name: str, rank: int, mine: Mapping[str, InputStatistic], heads: Sequence[Any], device: torch.device
    ) -> InputStatistic:
        """What a process has gathered of a matrix's inputs."""
        if rank == self.rank:
            return mine[name]
        tokens, shape, gram = heads[rank][name]
        one = InputStatistic.empty(tokens, shape, device, gram=gram)
        for tensor in _tensors(one):
            distributed.recv(tensor, src=rank)
        return one


def _held(name: str) -> str:
    """What the part of a statistic that is only judged by is called on its way."""
    return f"{name} held out"


def _tensors(one: InputStatistic) -> list[Tensor]:
    """What goes to another process; empty ones do not."""
    return [t for t in (one.squares, one.gram, one.rows) if t is not None and t.numel()]


def _tree(parts: Sequence[Callable[[], InputStatistic] | None]) -> InputStatistic | None:
    """The parts added pair by pair; they are asked for in order, so that few are in memory at a time."""
    if len(parts) == 1:
        return None if parts[0] is None else parts[0]()
    half = 1 << ((len(parts) - 1).bit_length() - 1)
    left, right = _tree(parts[:half]), _tree(parts[half:])
    if left is None or right is None:
        return left or right
    left.merge(right)
    return left


ALONE = Team()


class Pieces:
    """This process's shares of a text, each a `Text` of its own."""

    def __init__(
        self,
        team: Team,
        streamed: StreamedModel,
        tokens: Tensor,
        batch_size: int,
        limit: int,
        file: Path,
        used: Tensor | None = None,
    ) -> None:
        ranges = team.own(len(tokens), batch_size)
        names = [file.with_name(f"{file.stem}-{team.rank}-{i}{file.suffix}") for i in range(len(ranges))]
        self.team = team
        self.texts = [
            Text(streamed, tokens[own.start : own.stop], batch_size, limit // len(ranges), name, None if used is None else used[own.start : own.stop], len(tokens), own.start)
            for own, name in zip(ranges, names, strict=True)
        ]  # fmt: skip

    @property
    def samples(self) -> int:
        return sum(len(text.tokens) for text in self.texts)

    def run(self, layer: int, *, keep: bool, advance: Callable[[int], None]) -> None:
        for text in self.texts:
            text.run(layer, keep=keep, advance=advance)

    def gather(
        self,
        layer: int,
        matrices: Sequence[Matrix],
        *,
        gram: bool,
        advance: Callable[[int], None],
        hold_out: bool = False,
    ) -> tuple[dict[str, InputStatistic], dict[str, str]]:
        """As `prunescope.prune.calibrate.gather`, over this process's shares; the names of shared inputs are those of all processes."""
        shares: dict[str, str] = {}
        found: list[dict[str, InputStatistic]] = []
        # one share after the other, each added to the tree as soon as its sibling is there, as a binary counter does
        sizes: list[int] = []
        for text in self.texts:
            statistics, read = gather(text, layer, matrices, gram=gram, advance=advance, hold_out=hold_out)
            shares |= read
            found.append(statistics)
            sizes.append(1)
            while len(sizes) > 1 and sizes[-1] == sizes[-2]:
                right, left = found.pop(), found[-1]
                for name, statistic in right.items():
                    if name in left:
                        left[name].merge(statistic)
                    else:
                        left[name] = statistic
                sizes[-2:] = [2 * sizes[-1]]
        for other in self.team.all(shares):
            shares |= other
        return found[0], shares

    def losses(self, advance: Callable[[int], None]) -> list[list[float]]:
        return [losses for text in self.texts for losses in text.losses(advance)]

    def close(self) -> None:
        for text in self.texts:
            text.close()


def mean_perplexity(team: Team, losses: list[list[float]], tokens: Tensor) -> float:
    """Of ``tokens`` (windows, length), from the losses of this process's windows, added up in the order of the text."""
    whole = [value for of_rank in team.all(losses) for window in of_rank for value in window]
    return Text.perplexity_of(whole, tokens.shape[0] * (tokens.shape[1] - 1))


@contextmanager
def joined(device: str, shares: int | None) -> Iterator[Team]:
    """The team that torchrun has started this process in; of one, where it has not.

    Args:
        device: as the user named it; without a GPU, or with ``cpu``, processes talk through gloo, else through NCCL.
    Raises:
        UserError: shares that do not go with the number of processes, fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "MASTER_ADDR" not in os.environ:
        yield Team(shares=shares)
        return
    team = Team(int(os.environ["RANK"]), world, shares)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", team.rank))
        if local >= torch.cuda.device_count() or device not in ("auto", "cuda"):
            raise UserError(
                f"device {device!r}: process {local} of this machine takes GPU {local}, and {torch.cuda.device_count()} are here; give torchrun at most so many, and --device auto"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield team
    except BaseException:
        if not team.rank and team.awaited:
            team.told(_FAILED)
        raise
    finally:
        distributed.destroy_process_group()
