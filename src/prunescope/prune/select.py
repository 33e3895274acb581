"""Inter-layer pruning: score sublayers or blocks on calibration tokens, choose, drop.

A sublayer that barely turns the residual stream can go: its score is the mean over calibration tokens of cos(h before, h after)
(He et al., "What Matters in Transformers?", arXiv 2406.15786). A block's score is the mean of cos(h into, h out of) it
(ShortGPT's 1 - BI, arXiv 2403.03853); `consecutive` takes the run of n blocks whose ends are most alike (Gromov et al., 2403.17887).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunescope.cache import remembered
from prunescope.data.calibration import Calibration
from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS, Kind
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import batches
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import Passage, headless, watching
from prunescope.progress import progress

__all__ = [
    "Choice",
    "DropTarget",
    "Order",
    "Passing",
    "ScoreOn",
    "Scores",
    "check_choice",
    "choose_sublayers",
    "drop_orders",
    "score_sublayers",
    "spec_of",
]

DropTarget = Literal["attn", "mlp", "block", "all"]
Order = Literal["discrete", "consecutive"]
ScoreOn = Literal["stream", "norm"]
# given batches of tokens, lets each block run on all of them before the next; calls the first function with a batch's number before a block
# reads it, and the second when it has
Passing = Callable[[Sequence[Tensor], Callable[[int], None], Callable[[], None]], None]


@dataclass(frozen=True)
class Scores:
    """Mean cosines over calibration tokens, in the model's own layer order; NaN where a sublayer is dropped already."""

    attn: list[float]
    mlp: list[float]
    block: list[float]
    runs: list[float]  # of the run of n blocks that starts at each layer; empty unless asked for

    def of(self, target: Kind | Literal["block"]) -> list[float]:
        return {"attn": self.attn, "mlp": self.mlp, "block": self.block}[target]


@dataclass(frozen=True)
class Choice:
    """What was chosen: the spec, and for every candidate its score when it was chosen or last seen."""

    spec: DropSpec
    rows: list[dict[str, Any]] = field(repr=False)  # layer, sublayer, score, dropped


@torch.no_grad()
def score_sublayers(
    loaded: LoadedModel,
    tokens: Tensor,
    *,
    score_on: ScoreOn = "stream",
    run: int = 0,
    batch_size: int = 8,
    used: Tensor | None = None,
    passing: Passing | None = None,
) -> Scores:
    """Score every sublayer and block of ``loaded`` as it stands on ``tokens`` (samples, length), in one pass.

    Args:
        score_on: `stream` compares the residual stream before and after; `norm` compares the module's normed input with its output
            (sublayers only, block scores stay on the stream).
        run: also score each run of so many consecutive blocks.
        used: ``(samples, length)`` bool, the places that are averaged over; None for all.
        passing: how the tokens pass through a model whose weights stay on disk; then there are no runs.
    Raises:
        UserError: a score that is not a number, with its place.
    """
    blocks = len(loaded.anatomy)
    sums = {name: torch.zeros(blocks, dtype=torch.float64) for name in (*KINDS, "block", "runs")}
    seen = {name: torch.zeros(blocks, dtype=torch.bool) for name in (*KINDS, "block", "runs")}
    entering: deque[Tensor] = deque(maxlen=max(run, 1))
    now: list[Tensor] = []  # the places of the running batch that count
    count = tokens.numel() if used is None else int(used.sum())

    def add(name: str, layer: int, x: Tensor, y: Tensor) -> None:
        x, y = x.float(), y.float().view_as(x)
        cosines = (
            cosine_similarity(x, y, dim=-1).double().masked_fill((x == y).all(-1), 1.0)
        )  # not a rounding off it: silent sublayers tie
        if used is not None:
            cosines = cosines.view(now[0].shape).masked_select(now[0].to(cosines.device))
        sums[name][layer] += cosines.sum().cpu()
        seen[name][layer] = True

    def see(passage: Passage) -> None:
        if not now:
            return
        if passage.kind == "attn":
            entering.append(passage.before)
        if passage.entered is not None and passage.produced is not None:
            pair = (passage.before, passage.after) if score_on == "stream" else (passage.entered, passage.produced)
            add(passage.kind, passage.layer, *pair)
        if passage.kind == "mlp":
            add("block", passage.layer, entering[-1], passage.after)
            if run and passage.layer >= run - 1:
                add("runs", passage.layer - run + 1, entering[0], passage.after)

    with (
        progress(f"scoring {2 * blocks} sublayers on {tokens.numel()} tokens", len(tokens)) as advance,
        watching(loaded, see),
        headless(loaded),
    ):
        chunks = [list(chosen) for chosen in batches(range(len(tokens)), batch_size)]

        def begin(number: int) -> None:
            entering.clear()
            now[:] = [(tokens if used is None else used)[chunks[number]]]

        if passing is not None:
            passing([tokens[chunk] for chunk in chunks], begin, now.clear)
        for number, chunk in enumerate(chunks if passing is None else []):
            begin(number)
            loaded.model(input_ids=tokens[chunk].to(loaded.device), use_cache=False, logits_to_keep=1)
            advance(len(chunk))
    means = {name: torch.where(seen[name], total / count, torch.nan).tolist() for name, total in sums.items()}
    for layer in range(blocks):
        for name in (*KINDS, "block"):
            if seen[name][layer] and math.isnan(means[name][layer]):
                raise UserError(
                    f"{loaded.ref}: the score of {name} {layer} is not a number; the model's activations overflow in {loaded.dtype}, try --dtype float32"
                )
    return Scores(means["attn"], means["mlp"], means["block"], means["runs"][: blocks - run + 1] if run else [])


def choose_sublayers(
    loaded: LoadedModel,
    calibration: Calibration,
    target: DropTarget,
    n: int,
    *,
    order: Order = "discrete",
    iterative: bool = False,
    score_on: ScoreOn = "stream",
    batch_size: int = 8,
    cache: Path | None = None,
    passing: Passing | None = None,
) -> Choice:
    """Choose ``n`` sublayers (or blocks) to drop. Ties go to the lower layer, attention before MLP.

    Args:
        target: attn, mlp, block, or all: attention and MLP sublayers ranked together.
        order: discrete, the n highest scores; consecutive, the run of n blocks whose ends are most alike (target block).
        iterative: drop one, score again, n times.
        cache: folder in which scores are kept; None keeps none.
        passing: see `score_sublayers`; with ``order="discrete"`` only.
    Raises:
        UserError: an ``n`` the model cannot give, or options that do not go together.
    """
    check_choice(loaded, target, n, order, iterative, score_on)
    blocks = len(loaded.anatomy)
    names: tuple[Any, ...] = KINDS if target == "all" else (target,)

    def scores(dropped: DropSpec, run: int = 0) -> Scores:
        with loaded.dropping(dropped):
            return _scored(loaded, calibration, score_on, run, batch_size, cache, dropped, passing)

    if order == "consecutive":
        found = scores(DropSpec(), run=n)
        first = max(range(len(found.runs)), key=lambda i: found.runs[i])
        chosen = {("block", layer) for layer in range(first, first + n)}
        table = {("block", layer): value for layer, value in enumerate(found.block)}
    else:
        chosen, table = set(), {}
        for _ in range(n if iterative else 1):
            found = scores(spec_of(chosen))
            left = {
                (name, layer): value
                for name in names
                for layer, value in enumerate(found.of(name))
                if (name, layer) not in chosen
            }
            table |= left
            chosen |= set(_least_needed_first(left)[: 1 if iterative else n])
    rows = [
        {"layer": layer, "sublayer": name, "score": table[name, layer], "dropped": (name, layer) in chosen}
        for layer in range(blocks)
        for name in names
    ]
    return Choice(spec_of(chosen), rows)


def check_choice(
    loaded: LoadedModel, target: DropTarget, n: int, order: Order, iterative: bool, score_on: ScoreOn
) -> None:
    """Raise UserError if `choose_sublayers` cannot do what is asked for, before any work is done."""
    blocks = len(loaded.anatomy)
    candidates = 2 * blocks if target == "all" else blocks
    most = blocks - 1 if target == "block" else candidates
    if not 1 <= n <= most:
        raise UserError(f"--n {n}: the model has {candidates} candidates for --target {target}; choose 1 to {most}")
    if order == "consecutive" and target != "block":
        raise UserError(
            f"--order consecutive looks for a run of whole blocks; use it with --target block, not {target}"
        )
    if order == "consecutive" and iterative:
        raise UserError("--order consecutive chooses its run at once; leave --iterative out")
    if score_on == "norm" and target == "block":
        raise UserError(
            "--score-on norm compares a sublayer's input and output; a block has none, leave it out for --target block"
        )


def drop_orders(
    loaded: LoadedModel,
    calibration: Calibration,
    targets: Sequence[DropTarget],
    *,
    batch_size: int = 8,
    cache: Path | None = None,
) -> dict[str, list[tuple[str, int]]]:
    """For each target its candidates, ``(sublayer or block, layer)``, the one needed least first, from one scoring of the whole model.

    The first n are what `choose_sublayers` takes with ``order="discrete"``, so that n sublayers are always among n + 1.
    """
    scores = _scored(loaded, calibration, "stream", 0, batch_size, cache, DropSpec())
    return {
        target: _least_needed_first(
            {
                (name, layer): value
                for name in (KINDS if target == "all" else (target,))
                for layer, value in enumerate(scores.of(name))
            }
        )
        for target in targets
    }


def _least_needed_first(scores: Mapping[tuple[Any, int], float]) -> list[tuple[Any, int]]:
    return sorted(scores, key=lambda key: (-scores[key], key[1], key[0]))


def spec_of(chosen: Iterable[Any]) -> DropSpec:
    """The sublayers of ``(sublayer or block, layer)`` pairs."""
    return DropSpec.of((kind, layer) for name, layer in chosen for kind in (KINDS if name == "block" else (name,)))


def _scored(
    loaded: LoadedModel,
    calibration: Calibration,
    score_on: ScoreOn,
    run: int,
    batch_size: int,
    cache: Path | None,
    dropped: DropSpec,
    passing: Passing | None = None,
) -> Scores:
    """`score_sublayers`, or what it gave for the same weights, tokens and settings before."""
    key = {
        "what": "drop scores 1",
        "model": loaded.identity,
        "dtype": str(loaded.dtype),
        "dropped": str(dropped),
        "calibration": {name: value for name, value in calibration.describe().items() if name != "traces"},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "score_on": score_on,
        "run": run,
    }
    return Scores(
        **remembered(
            cache if loaded.pinned else None,
            key,
            lambda: vars(
                score_sublayers(
                    loaded,
                    calibration.tokens,
                    score_on=score_on,
                    run=run,
                    batch_size=batch_size,
                    used=calibration.used(),
                    passing=passing,
                )
            ),
        )
    )
