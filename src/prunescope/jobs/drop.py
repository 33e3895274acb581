"""`prunescope drop`: score sublayers, drop the least needed, save a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor

from prunescope.cache import cache_folder
from prunescope.data.calibration import Calibration, calibration_tokens, is_sampled
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, Stream
from prunescope.jobs.pair import load_dense
from prunescope.jobs.streaming import Placement, place, refuse_stream
from prunescope.models.anatomy import KINDS
from prunescope.models.blockwise import stream_model
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.streaming import pass_through
from prunescope.prune.compensate import check_format, fit_maps
from prunescope.prune.search import choose_jointly
from prunescope.prune.select import Choice, DropTarget, Order, Passing, ScoreOn, check_choice, choose_sublayers
from prunescope.report.terminal.pruning import show_scores
from prunescope.results import DropResult
from prunescope.tasks.evaluate import evaluate_model
from prunescope.tasks.quick import QUICK

__all__ = ["DropOptions", "run"]


@dataclass(frozen=True)
class DropOptions(Options):
    """See `prunescope.drop`."""

    model: Model
    target: DropTarget
    n: int
    format: Literal["recipe", "zeroed", "compact"]
    order: Order
    iterative: bool
    score_on: ScoreOn
    select: str
    generations: int
    compensate: bool
    calibration: str
    samples: int | None
    seq_len: int | None
    batch_size: int | None
    seed: int
    cache: bool
    stream: Stream
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions


def run(options: DropOptions) -> DropResult:
    options.check()
    select, task = _select(options)
    if options.output.out is not None:
        check_format(options.compensate, options.format)
    hindrance = _hindrance(options)
    refuse_stream(options.stream, hindrance)
    placement = place(options.stream, options.model, None, options.loading, 0, hindrance)
    if not placement.streamed:
        return _drop(options, options.loading.load(options.model), placement, select, task)
    with ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory(prefix="prunescope-"))
        streamed = stream_model(
            str(options.model), Path(scratch) / "scratch", experts=None, prefetch=True, **options.loading.config()
        )
        stack.enter_context(closing(streamed))

        def passing(batches: Sequence[Tensor], before: Callable[[int], None], after: Callable[[], None]) -> None:
            pass_through(streamed, batches, Path(scratch), before, after, check=not streamed.loaded.dropped)

        return _drop(options, streamed.loaded, placement, select, task, passing)


def _task_score(dense: LoadedModel, *, task: str, batch_size: int, seed: int) -> Callable[[DropSpec], float]:
    """What the model scores on a quick task without the sublayers it is given."""

    def score(spec: DropSpec) -> float:
        with dense.dropping(spec):
            found = evaluate_model(dense, [task], batch_size=batch_size, seed=seed, advance=lambda done: None)
        return float(found.scores[task]["value"])

    return score


def _hindrance(options: DropOptions) -> str | None:
    """Why the model cannot stay on disk."""
    if not isinstance(options.model, str):
        return f"{options.model} is in memory; give its folder, or --stream false"
    if options.spread.spread:
        return options.spread.hindrance
    if options.select != "cosine" or options.compensate:
        return "the whole model runs for all but --select cosine without --compensate"
    if options.order == "consecutive":
        return "--order consecutive compares blocks that are far apart; use --order discrete"
    if options.output.out is not None and options.format != "recipe":
        return f"--format {options.format} writes weights; use --format recipe"
    if is_sampled(options.calibration):
        return f"--calibration {options.calibration} is written by the model, read again for every token; give a text or a data set"
    return None


def _drop(
    options: DropOptions,
    dense: LoadedModel,
    placement: Placement,
    select: Literal["cosine", "kl", "search", "task"],
    task: str,
    passing: Passing | None = None,
) -> DropResult:
    if dense.dropped:
        raise UserError(f"{options.model} has sublayers dropped already ({dense.dropped}); give its dense model")
    target, n = options.target, options.n
    check_choice(dense, target, n, options.order, options.iterative, options.score_on)
    cache = cache_folder() if options.cache else None
    calibration = calibration_tokens(
        dense, options.calibration, samples=options.samples, seq_len=options.seq_len, seed=options.seed,
        batch_size=options.batch_size, cache=cache,
    )  # fmt: skip
    choice = _choose(options, dense, calibration, select, task, cache, passing)
    folds = fit_maps(dense, choice.spec, calibration, options.batch_size or 8) if options.compensate else []
    before = sum(p.numel() for p in dense.model.parameters())
    with dense.dropping(choice.spec):
        after = sum(p.numel() for p in dense.model.parameters())
    record: dict[str, Any] = {
        "command": "drop",
        "config": options.config(),
        "placement": placement.describe(),
        "target": target,
        "select": options.select,
        **({"compensated": [fold.row() for fold in folds]} if options.compensate else {}),
        "calibration": calibration.describe(),
        "parameters": {"dense": before, "dropped": after},
        **{f"drop_{kind}_list": list(choice.spec.layers(kind)) for kind in KINDS},
    }
    result = DropResult(record, choice.rows, choice.spec, dense, folds)
    show_scores(
        result.rows, f"{options.model}: {n} of {target} dropped, {before / 1e6:.1f} M -> {after / 1e6:.1f} M parameters"
    )
    if options.output.out is not None:
        result.save(options.output.out, format=options.format, overwrite=options.output.overwrite)
    options.output.say_written(f" ({options.format})")
    return result


def _select(options: DropOptions) -> tuple[Literal["cosine", "kl", "search", "task"], str]:
    """How to choose, and the task's name. Raises UserError."""
    kind, _, task = options.select.partition(":")
    if kind == "task" and task not in QUICK:
        raise UserError(f"--select {options.select}: no such quick task; give task:NAME with one of {', '.join(QUICK)}")
    if kind not in ("cosine", "kl", "search", "task") or (task and kind != "task"):
        raise UserError(
            f"--select {options.select}: give cosine, kl, search or task:NAME, for example task:arithmetic-gen"
        )
    if kind == "cosine":
        options.spread.refuse(
            "--select cosine", "one process reads the text once; candidates are shared of kl, search and task:NAME"
        )
    if kind != "cosine" and (options.order != "discrete" or options.iterative or options.score_on != "stream"):
        raise UserError(
            f"--select {kind} goes by what the model says; --order, --iterative and --score-on are those of cosine, leave them out"
        )
    return kind, task  # type: ignore[return-value]


def _choose(
    options: DropOptions,
    dense: LoadedModel,
    calibration: Calibration,
    select: Literal["cosine", "kl", "search", "task"],
    task: str,
    cache: Path | None,
    passing: Passing | None,
) -> Choice:
    batch_size = options.batch_size or 8
    if select == "cosine":
        return choose_sublayers(
            dense, calibration, options.target, options.n, order=options.order, iterative=options.iterative, score_on=options.score_on,
            batch_size=batch_size, cache=cache, passing=passing,
        )  # fmt: skip

    scoring = partial(_task_score, task=task, batch_size=batch_size, seed=options.seed) if select == "task" else None
    with options.spread.started(load_dense, [options.model], options.loading, dense) as workers:
        return choose_jointly(
            dense, calibration, options.target, options.n, select, score=None if scoring is None else scoring(dense),
            generations=options.generations, seed=options.seed, batch_size=batch_size, cache=cache,
            what=f"{task} {options.seed}" if task else "", workers=workers, scoring=scoring,
        )  # fmt: skip
