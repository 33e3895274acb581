"""`prunescope sweep`: score once, measure point after point, keep each as soon as it is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq

from prunescope.cache import cache_folder
from prunescope.compare.familiar import Rung, check_rungs, likenesses
from prunescope.data.asked import sha256_of
from prunescope.data.calibration import Calibration, calibration_tokens
from prunescope.data.prompts import read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.files import replacing
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, listed
from prunescope.jobs.pair import load_dense
from prunescope.models import ggml
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import refuse_packed
from prunescope.progress import console
from prunescope.prune.inplace import check_prunable
from prunescope.prune.select import check_choice, drop_orders, spec_of
from prunescope.report.terminal.sweep import show_sweep
from prunescope.results import SweepResult
from prunescope.runs.folder import write_run
from prunescope.runs.parts import resume_state, save_state
from prunescope.runs.provenance import run_record, versions
from prunescope.runs.workers import Compute, sharing
from prunescope.sweep.advice import AGREEMENT
from prunescope.sweep.bench import Bench, SweepPlan
from prunescope.sweep.comparison import ladder_of, write_texts
from prunescope.sweep.points import Point, read_points
from prunescope.sweep.tables import Measured, assemble, kl_of, split
from prunescope.tasks.evaluate import expand_tasks
from prunescope.tasks.harness import own_files

__all__ = ["SweepOptions", "run"]


@dataclass(frozen=True)
class SweepOptions(Options):
    """See `prunescope.sweep`."""

    LEAST: ClassVar[Mapping[str, int]] = {**Options.LEAST, "max_new_tokens": 1}

    model: Model
    target: str | None
    n: str | None
    method: str | None
    sparsity: str | None
    pattern: str | None
    quant: str | None
    join: str | None
    sparse_bytes: bool
    ladder: str | None
    tasks: str
    limit: int | None
    shots: int | None
    data: str | None
    allow_code_execution: bool
    prompts: str | None
    chat: bool
    max_new_tokens: int
    metric_temperature: float
    calibration: str
    samples: int | None
    seq_len: int | None
    batch_size: int
    seed: int
    cache: bool
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        super().check()
        check_rungs(self.ladder)
        expand_tasks(listed(self.tasks))
        if self.output.out is None and self.output.resume:
            raise UserError("--resume continues an interrupted sweep; say where with --out")

    @property
    def cache_folder(self) -> Path | None:
        return cache_folder() if self.cache else None


def run(
    options: SweepOptions,
    points: Sequence[Point] | None = None,
    healed: Mapping[str, str] | None = None,
    show: bool = True,
) -> SweepResult:
    """
    Args:
        points: instead of those that ``options`` name, the dense one first.
        healed: folder of each healed point, by its name.
    """
    started = time.monotonic()
    options.check()
    points = points or read_points(
        options.target, options.n, options.method, options.sparsity, options.pattern, options.quant, options.join
    )
    prompts = read_prompts(options.prompts)
    tasks = expand_tasks(listed(options.tasks))
    files = own_files(tasks, None if options.data is None else Path(options.data).expanduser())
    own = {sha: [task] for task, sha in files.items()}
    if AGREEMENT in tasks:
        prompts = prompts[: options.limit]  # they are its items
        if options.prompts is not None:
            own[sha256_of(Path(options.prompts))] = [AGREEMENT]
    dense = options.loading.load(options.model)
    _check_model(dense, points)
    encoded = encode(dense, prompts, options.max_new_tokens, chat=options.chat)
    calibration = calibration_tokens(
        dense, options.calibration, samples=options.samples, seq_len=options.seq_len, seed=options.seed, cache=options.cache_folder
    )  # fmt: skip
    if calibration.counts is not None and any(point.method for point in points):
        raise UserError(
            "--calibration traces: a sweep's pruned weights take a text whose tokens all count; give self or a file, or sparsify alone"
        )
    key = _key(options, dense, encoded, calibration, files)
    done = options.output.complete(key, "another model, other tasks or options")
    earlier = None if done is None else SweepResult.of_run(done)
    if earlier is not None and {point.name for point in points} <= set(earlier.table()["point"].to_pylist()):
        if show:
            options.output.say_complete()
        return earlier
    with options.output.staged(keep_parts=True) as staging:
        kept = _Kept(staging, key, [] if earlier is None else split(earlier.all_tables))
        plan = _plan(options, dense, points, encoded, calibration, dict(healed or {}))
        bench = Bench(dense, plan)
        kept.weigh(points, bench)
        info = {
            **run_record("sweep", options.config(), dense.device, {"dense": dense.describe(), "target": None}, started),
            "key": key,
            "prompts": [{"id": prompt.id, "kind": prompt.kind} for prompt in prompts],
            "own_files": own,
            "steps": sum(len(text.continuation) for text in plan.texts),
            "calibration": calibration.describe(),
            "stored_as": str(bench.storage.dtype).removeprefix("torch."),
            "noise_floor": bench.reference.floor(dense),
            "points_asked": [point.name for point in points],
        }

        asked = None if options.ladder is None else check_rungs(options.ladder)
        ladder = ladder_of(dense, plan.texts, asked, temperature=options.metric_temperature, cache=options.cache_folder)

        def result(complete: bool) -> SweepResult:
            measured = kept.ordered(points)
            tables = assemble(measured)
            rungs = _rungs(ladder, measured)
            info["ladder"] = [asdict(rung) for rung in rungs]
            tables.summary["like"] = likenesses(tables.summary["kl"], rungs)
            state = {
                "complete": complete,
                "points_done": [point.info["point"] for point in measured],
                "wall_time_s": round(time.monotonic() - started, 3),
            }
            return SweepResult(info | state | {"summary": tables.summary}, tables)

        def add(point: Point, found: Measured) -> None:
            kept.add(point, found)
            if staging is not None and "dense" in kept:  # what is there can be opened and drawn, whatever happens next
                so_far = result(complete=False)
                write_run(staging, so_far.info, so_far.tables())

        twins = _twins(points, plan)
        todo = [point for point in points if point.name not in kept and point.name not in twins]
        _measure(options, bench, plan, todo, add, len(points) - len(twins))
        for point in points:
            if point.name in twins and point.name not in kept:
                add(point, kept.as_of(twins[point.name], point))
        found = result(complete=True)
        if staging is not None:
            found.write(staging)
    if show:
        show_sweep(found.info, found.table(), found.summary)
        options.output.say_written()
    return found


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_model(dense: LoadedModel, points: Sequence[Point]) -> None:
    if dense.dropped:
        raise UserError(f"{dense.ref} has sublayers dropped already ({dense.dropped}); give its dense model")
    if any(point.quant for point in points):
        refuse_packed(dense.ref, dense.model, "--quant")
    for point in points:
        if point.dropped:
            check_choice(dense, point.drops_of, point.n or 0, "discrete", False, "stream")  # type: ignore[arg-type]
        elif point.method is not None:
            check_prunable(dense, point.method, point.goal)  # type: ignore[arg-type]


def _rungs(ladder: Sequence[Rung], measured: Sequence[Measured]) -> list[Rung]:
    """The ladder, and the sweep's own points of GGUF's types, which cost nothing more."""
    found = {rung.name: rung for rung in ladder}
    for point in measured:
        name, kl = point.info.get("quant"), kl_of(point.info)
        if point.info.get("change") == "quant" and name in ggml.TYPES and kl is not None:
            found.setdefault(str(name), Rung(str(name), kl, math.nan, math.nan))
    return list(found.values())


# --- stages ------------------------------------------------------------------------------------------------------------


def _plan(
    options: SweepOptions,
    dense: LoadedModel,
    points: Sequence[Point],
    prompts: Sequence[list[int]],
    calibration: Calibration,
    healed: dict[str, str],
) -> SweepPlan:
    """What the points need, found once: the order in which sublayers go, the texts to compare on."""
    targets: list[Any] = list(dict.fromkeys(point.drops_of for point in points if point.dropped))
    orders = drop_orders(dense, calibration, targets, cache=options.cache_folder) if targets else {}
    specs = {p.name: spec_of(orders[str(p.drops_of)][: p.n]) if p.dropped else DropSpec() for p in points}
    return SweepPlan(
        tasks=listed(options.tasks),
        evaluation={
            **{
                name: getattr(options, name)
                for name in ("limit", "shots", "batch_size", "seed", "allow_code_execution")
            },
            "data": None if options.data is None else Path(options.data).expanduser(),
        },
        texts=write_texts(dense, prompts, options.max_new_tokens, batch_size=8),
        comparing={"temperature": options.metric_temperature, "seed": options.seed},
        specs=specs,
        healed=healed,
        calibration=calibration.tokens if any(point.method for point in points) else None,
        sparse_bytes=options.sparse_bytes,
    )


def _twins(points: Sequence[Point], plan: SweepPlan) -> dict[str, str]:
    """Points that drop the very sublayers that an earlier one drops, and its name: `all` often drops what `attn` does. They are measured once."""
    seen: dict[tuple[str, str | None], str] = {}
    found = {}
    for point in points:
        if point.dropped and not point.healed:
            first = seen.setdefault((str(plan.specs[point.name]), point.quant), point.name)
            if first != point.name:
                found[point.name] = first
    return found


def _measure(
    options: SweepOptions,
    bench: Bench,
    plan: SweepPlan,
    todo: Sequence[Point],
    done: Callable[[Point, Measured], None],
    total: int,
) -> None:
    """Measure what is not there yet, here or on workers, and say after each point how long the rest will take."""
    started, first = time.monotonic(), total - len(todo)
    count = 0

    def say(point: Point, found: Measured) -> None:
        nonlocal count
        count += 1
        done(point, found)
        left = (time.monotonic() - started) / count * (len(todo) - count)
        means = ", ".join(f"{kind} {value:.3f}" for kind, value in _means(found).items())
        after = f"; about {_duration(left)} left" if count < len(todo) else ""
        console.print(
            f"{point.title} ({first + count} of {total}): {means}, {found.info['seconds']:.1f} s{after}", markup=False
        )

    if options.spread.spread and todo:
        with options.spread.started(load_dense, [options.model], options.loading, bench.loaded) as workers:
            share = sharing(workers, partial(_measuring, plan=plan))
            share(todo, bench.measure, lambda place, found: say(todo[place], found))
        return
    for number, point in enumerate(todo):
        elapsed = time.monotonic() - started
        rest = f", about {_duration(elapsed / number * (len(todo) - number))} left for all" if number else ""
        say(point, bench.measure(point, f"{point.title} ({first + number + 1} of {total}{rest})"))


def _measuring(dense: LoadedModel, *_: Any, plan: SweepPlan) -> Compute:
    """A point -> what it gives, for a worker."""
    return Bench(dense, plan).measure


def _means(found: Measured) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for score in found.info["scores"].values():
        by_kind.setdefault(score["kind"], []).append(score["value"])
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- what is kept ------------------------------------------------------------------------------------------------------


class _Kept:
    """Finished points: in memory, and each in a file of its own in the unfinished folder."""

    def __init__(self, folder: Path | None, key: str, earlier: Sequence[Measured]) -> None:
        self._folder = folder
        self._found = {point.info["point"]: point for point in earlier}
        if folder is None:
            return
        if resume_state(folder, key) is None:
            for path in folder.glob("part-*.parquet"):  # of nobody knows what
                path.unlink()
            save_state(folder, key, [])
        for path in sorted(folder.glob("part-*.parquet")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is measured again
                point = Measured.unpacked(pq.read_table(path))
                self._found[point.info["point"]] = point
        for point in earlier:
            self._write(point)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def add(self, point: Point, found: Measured) -> None:
        self._found[point.name] = found
        self._write(found)

    def as_of(self, twin: str, point: Point) -> Measured:
        """What was measured at ``twin``, under the name of a point that is the same model."""
        found = self._found[twin]
        return Measured(found.info | point.columns(), found.items)

    def weigh(self, points: Sequence[Point], bench: Bench) -> None:
        """Give points of an earlier run their bytes, which depend on nothing that was measured."""
        for point in points:
            if point.name in self:
                self._found[point.name].info["bytes"] = bench.bytes_of(point)

    def ordered(self, points: Sequence[Point]) -> list[Measured]:
        """The dense model first, then series by series from little to much, those asked for now before those of earlier runs."""
        series = list(dict.fromkeys([*(p.series for p in points), *(f.info["series"] for f in self._found.values())]))

        def place(found: Measured) -> tuple[Any, ...]:
            info = found.info
            return (
                series.index(info["series"]),
                info["method"] or "",
                info["n"] or 0,
                info["sparsity"] or 0,
                -(info.get("bytes") or 0),
                info["point"],
            )

        return sorted(self._found.values(), key=place)

    @property
    def names(self) -> list[str]:
        return list(self._found)

    def _write(self, found: Measured) -> None:
        if self._folder is not None:
            with replacing(self._folder / f"part-{found.info['point']}.parquet") as beside:
                pq.write_table(found.packed(), beside)


def _key(
    options: SweepOptions,
    dense: LoadedModel,
    prompts: Sequence[list[int]],
    calibration: Calibration,
    files: Mapping[str, str],
) -> str:
    """Names everything that decides what a point gives. Which points are asked for is not part of it."""
    names = ("tasks", "limit", "shots", "batch_size", "seed", "data", "allow_code_execution")
    content = {
        "model": dense.identity,
        "dtype": str(dense.dtype),
        "device": dense.device.type,
        "calibration": {k: v for k, v in calibration.describe().items() if k != "source"},
        "prompts": prompts,
        "versions": versions(),
        **({"files": files} if files else {}),
        **{name: getattr(options, name) for name in (*names, "max_new_tokens", "metric_temperature")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
