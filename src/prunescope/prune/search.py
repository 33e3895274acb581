"""Which sublayers go, by what the model says without them: KL(dense || pruned) on the calibration text, or the score of a task.

`kl` drops greedily, one sublayer at a time, the one without which the divergence is least given what has gone already. `search` goes on from
there over whole sets, as EvoPress does (Sieberling et al., arXiv 2410.14649): offspring of the best set so far have a few sublayers swapped, the
worse ones are left behind after a part of the text, and the best one takes over if it is better on all of it. A task's score in place of the
divergence is the way of TALE (arXiv 2510.22767).

A set and the one it comes from agree in all blocks before the first that differs, so only the blocks from there on run again: over all
candidates of a greedy step that is half of the work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prunescope.cache import remembered
from prunescope.data.calibration import Calibration
from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS
from prunescope.models.decoding import forward_options
from prunescope.models.divergence import logits_kl
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import batches
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import block_streams, starting_at
from prunescope.progress import console, progress
from prunescope.prune.select import Choice, DropTarget, spec_of
from prunescope.runs.workers import Compute, Make, Workers, alone, gathered, sharing

__all__ = ["OFFSPRING", "Judge", "choose_jointly", "mutated"]

OFFSPRING = 8
_STAGES = ((1 / 8, 3), (1 / 2, 1), (1.0, 1))  # of a generation: share of the text, and how many are left after it
_PIECES = 4  # groups of candidates that a worker gets of a step, about
_ROWS = 256  # places whose logits are in memory at a time
_KEPT_LOGITS = 2**28  # numbers: the dense model's logits of a batch are kept if there are at most so many

Candidate = tuple[Any, int]  # sublayer or block, and its layer
Score = Callable[[DropSpec], float]  # of the model without these sublayers, higher is better


class Judge:
    """KL(dense || pruned) in nats, averaged over the calibration's places that predict a token that counts.

    Args:
        loaded: the dense model; it is left as it was.
        batch_size: samples at a time; changes nothing but speed and rounding.
        workers: who share the candidates, each with a model of its own; None is this process alone.
    """

    def __init__(
        self, loaded: LoadedModel, calibration: Calibration, batch_size: int = 8, workers: Workers | None = None
    ) -> None:
        self.workers, self.make = workers, partial(_judging, calibration=calibration, batch_size=batch_size)
        self.loaded, self.tokens, self.batch_size = loaded, calibration.tokens, batch_size
        self.places = calibration.predicting()
        self.options = {"use_cache": False, **forward_options(loaded.model)}

    @cached_property
    def _dense(self) -> list[Tensor]:
        """The dense model's last stream at each sample's places, ``(places, d)`` on the CPU."""
        found: list[Tensor] = []
        for chosen in batches(range(len(self.tokens)), self.batch_size):
            stream = self._streams(chosen, len(self.loaded.anatomy) - 1)[-1]
            found += [row[self.places[i].to(row.device)].cpu() for row, i in zip(stream, chosen, strict=True)]
        return found

    def _streams(self, chosen: Sequence[int], first: int) -> list[Tensor]:
        with block_streams(self.loaded, first) as streams:
            self.loaded.model(input_ids=self.tokens[list(chosen)].to(self.loaded.device), **self.options)
        return streams

    def divergences(
        self,
        base: DropSpec,
        specs: Sequence[DropSpec],
        samples: Sequence[int] | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[float]:
        """Of each of ``specs``: the divergence on the samples of these numbers, by default all. Blocks in which it agrees with ``base`` up
        to the first that differs are not run again.

        Raises:
            UserError: a divergence that is not a number.
        """
        chosen = list(range(len(self.tokens)) if samples is None else samples)
        if self.workers is None:
            return self.alone(base, specs, chosen, advance)
        size = max(1, len(specs) // (_PIECES * self.workers.count))
        items = [(base, list(specs[i : i + size]), chosen) for i in range(0, len(specs), size)]
        passes = -(-len(chosen) // self.batch_size)
        share = sharing(self.workers, self.make)
        found = gathered(share, items, lambda item: self.alone(*item), lambda values: advance(len(values) * passes))
        return [value for values in found for value in values]

    @torch.no_grad()
    def alone(
        self,
        base: DropSpec,
        specs: Sequence[DropSpec],
        chosen: Sequence[int],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[float]:
        """`divergences` by this process; what it gives of one candidate does not depend on the others."""
        dense = self._dense
        firsts = [min((layer for _, layer in _differing(base, spec)), default=0) for spec in specs]
        totals = [0.0] * len(specs)
        for batch in batches(chosen, self.batch_size):
            ids = self.tokens[list(batch)].to(self.loaded.device)
            places = self.places[list(batch)].to(self.loaded.device)
            expected = torch.cat([dense[i] for i in batch]).to(self.loaded.device)
            logits = self._logits(expected) if len(expected) * self.loaded.anatomy.vocab_size <= _KEPT_LOGITS else None
            start = min(firsts)
            with self.loaded.dropping(base):
                streams = self._streams(batch, start)
            for number, (spec, first) in enumerate(zip(specs, firsts, strict=True)):
                with (
                    self.loaded.dropping(spec),
                    starting_at(self.loaded, first, streams[first - start]),
                    block_streams(self.loaded, len(self.loaded.anatomy) - 1) as last,
                ):
                    self.loaded.model(input_ids=ids, **self.options)
                totals[number] += self._sum(expected, logits, last[-1][places])
                advance(1)
        count = int(self.places[chosen].sum())
        for spec, total in zip(specs, totals, strict=True):
            if math.isnan(total):
                raise UserError(
                    f"{self.loaded.ref}: the divergence without {spec} is not a number; activations overflow in {self.loaded.dtype}, try --dtype float32"
                )
        return [total / count for total in totals]

    def _logits(self, stream: Tensor) -> Tensor:
        z: Tensor = self.loaded.anatomy.logits(stream[None])[0]
        return z if z.dtype == torch.float64 else z.float()

    def _sum(self, expected: Tensor, logits: Tensor | None, found: Tensor) -> float:
        total = 0.0
        for start in range(0, len(expected), _ROWS):
            rows = slice(start, start + _ROWS)
            z = self._logits(expected[rows]) if logits is None else logits[rows]
            total += float(logits_kl(z, self._logits(found[rows])).sum())
        return total


def _judging(loaded: LoadedModel, *, calibration: Calibration, batch_size: int) -> Compute:
    """What the candidates of a group diverge by, for a worker."""
    judge = Judge(loaded, calibration, batch_size)
    return lambda item: judge.alone(*item)


def choose_jointly(
    loaded: LoadedModel,
    calibration: Calibration,
    target: DropTarget,
    n: int,
    select: Literal["kl", "search", "task"],
    *,
    score: Score | None = None,
    generations: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    cache: Path | None = None,
    what: str = "",
    workers: Workers | None = None,
    scoring: Make | None = None,
) -> Choice:
    """Choose ``n`` sublayers (or blocks) to drop, see the text at the top. What it costs is printed first.

    Ties go to the smaller divergence, then to the lower layer, attention before MLP. Every finished greedy step and generation is kept in ``cache``, so
    that an interrupted call goes on.

    Args:
        score: of a task, for ``task``.
        generations: of ``search``, each of `OFFSPRING` sets.
        seed: of the mutations.
        workers: who share the candidates; ``scoring`` gives ``score`` in their processes, of the model there.
        what: names the task and its settings, for the cache.
    Returns:
        The choice; its rows' ``score`` is the divergence (or the task's score) without the candidate, and without what had gone before it,
        when it was chosen or last seen.
    """
    judge = Judge(loaded, calibration, batch_size, workers)
    candidates: list[Candidate] = [
        (name, layer) for layer in range(len(loaded.anatomy)) for name in (KINDS if target == "all" else (target,))
    ]
    key = {
        "what": f"joint choice 1 {select if select == 'task' else 'kl'} {what}",
        "model": loaded.identity,
        "dtype": str(loaded.dtype),
        "calibration": calibration.describe()["tokens_sha256"],
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "target": target,
    }
    kept = cache if loaded.pinned else None
    _say_cost(loaded, judge, candidates, n, select, generations)
    chosen, table = _greedy(judge, candidates, n, score, key, kept, scoring)
    if select == "search":
        divergence = table[chosen[-1]]
        for generation in range(generations):
            parent = sorted(chosen, key=candidates.index)
            found, divergence = remembered(
                kept,
                {**key, "what": "generation 1", "parent": parent, "generation": generation, "seed": seed},
                lambda parent=parent, before=divergence, number=generation: _generation(  # type: ignore[misc]
                    judge, candidates, parent, before, f"{seed}/{number}"
                ),
            )
            chosen = [(name, layer) for name, layer in found]
            console.print(f"generation {generation + 1} of {generations}: KL {divergence:.5f}", markup=False)
        table |= dict.fromkeys(chosen, divergence)
    gone = set(chosen)
    rows = [
        {"layer": layer, "sublayer": name, "score": table[name, layer], "dropped": (name, layer) in gone}
        for name, layer in candidates
    ]
    return Choice(spec_of(gone), rows)


def _greedy(
    judge: Judge,
    candidates: Sequence[Candidate],
    n: int,
    score: Score | None,
    key: dict[str, Any],
    cache: Path | None,
    scoring: Make | None = None,
) -> tuple[list[Candidate], dict[Candidate, float]]:
    """Candidates in the order in which they go, and the value of each when it went or was last seen."""
    gone: list[Candidate] = []
    table: dict[Candidate, float] = {}
    for step in range(n):
        left = [candidate for candidate in candidates if candidate not in gone]
        base, specs = spec_of(gone), [spec_of([*gone, candidate]) for candidate in left]

        def values(base: DropSpec = base, specs: list[DropSpec] = specs, step: int = step) -> list[float]:
            times = -(-len(judge.tokens) // judge.batch_size) if score is None else 1
            with progress(f"drop {step + 1} of {n}: {len(specs)} candidates", len(specs) * times) as advance:
                if score is None:
                    return judge.divergences(base, specs, advance=advance)
                return _scores(specs, score, judge.workers, scoring, advance)

        found: list[float] = remembered(cache, {**key, "gone": str(base)}, values)
        best = min(found) if score is None else max(found)
        tied = [i for i, value in enumerate(found) if value == best]
        if len(tied) > 1 and score is not None:
            closest = judge.divergences(base, [specs[i] for i in tied])
            tied = [tied[closest.index(min(closest))]]
        table |= dict(zip(left, found, strict=True))
        gone.append(left[tied[0]])
    return gone, table


def _scores(
    specs: Sequence[DropSpec],
    score: Score,
    workers: Workers | None,
    scoring: Make | None,
    advance: Callable[[int], None],
) -> list[float]:
    """The task's score without each of ``specs``."""
    share = alone if scoring is None else sharing(workers, scoring)
    return gathered(share, specs, score, lambda value: advance(1))


def _generation(
    judge: Judge, candidates: Sequence[Candidate], parent: Sequence[Candidate], divergence: float, seed: str
) -> tuple[list[Candidate], float]:
    """The best of a set and its offspring on the whole text, with its divergence; only an offspring that is better takes over."""
    rng = random.Random(seed)
    alive: list[list[Candidate]] = []
    for _ in range(4 * OFFSPRING):  # small spaces have fewer neighbours than there are offspring
        child = mutated(candidates, parent, rng)
        if child not in alive and child != list(parent) and len(alive) < OFFSPRING:
            alive.append(child)
    order = rng.sample(range(len(judge.tokens)), len(judge.tokens))
    found: list[float] = []
    for share, left in _STAGES if alive else ():
        samples = sorted(order[: math.ceil(share * len(order))])
        samples = [i for i in samples if judge.places[i].any()] or list(range(len(order)))
        found = judge.divergences(spec_of(parent), [spec_of(child) for child in alive], samples)
        ranked = sorted(range(len(alive)), key=lambda i: found[i])[:left]
        alive, found = [alive[i] for i in ranked], [found[i] for i in ranked]
    return (alive[0], found[0]) if found and found[0] < divergence else (list(parent), divergence)


def mutated(candidates: Sequence[Candidate], parent: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """``parent`` with one to three of its members swapped for others, fewer more often; as many as before, in the order of ``candidates``."""
    inside, outside = list(parent), [candidate for candidate in candidates if candidate not in parent]
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3), len(outside), len(inside))):
        i, j = rng.randrange(len(inside)), rng.randrange(len(outside))
        inside[i], outside[j] = outside[j], inside[i]
    return sorted(inside, key=list(candidates).index)


def _differing(a: DropSpec, b: DropSpec) -> Iterable[tuple[Any, int]]:
    return ((kind, layer) for kind in KINDS for layer in set(a.layers(kind)) ^ set(b.layers(kind)))


def _say_cost(
    loaded: LoadedModel, judge: Judge, candidates: Sequence[Candidate], n: int, select: str, generations: int
) -> None:
    """Forward passes of the calibration text, at most: what the cache holds costs nothing."""
    blocks, count = len(loaded.anatomy), len(candidates)
    tried = sum(count - step for step in range(n))
    if select == "task":
        console.print(f"cost: {tried} runs of the task, {count} candidates less one in each of {n} steps", markup=False)
        return
    passes = 1 + n + tried * (blocks + 1) / (2 * blocks)  # a candidate in block i runs blocks i to the last
    text = f"{tried} candidates in {n} steps"
    whole = 1.0 + tried
    if select == "search":
        alive, each = OFFSPRING, 0.0
        for share, left in _STAGES:
            each += share * (1 + alive)
            alive = left
        passes, whole = passes + generations * each, whole + generations * each
        text += f", then {generations} generations of {OFFSPRING} sets"
    console.print(
        f"cost: {text}: at most {passes:.0f} forward passes of {judge.tokens.numel()} tokens, {whole:.0f} if no prefix were shared",
        markup=False,
    )
