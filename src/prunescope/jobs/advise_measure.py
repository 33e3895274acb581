"""What `advise` measures itself where it is given no runs: a sweep of the model, and the speed of the points that keep a use. Each says first
what it will cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from prunescope.data.asked import is_file_of_rows, rows_hold
from prunescope.data.prompts import read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.jobs import heal as heal_job
from prunescope.jobs import speed as speed_job
from prunescope.jobs import sweep as sweep_job
from prunescope.jobs.options import LoadOptions, OutputOptions, SpreadOptions
from prunescope.models.loaded import LoadedModel
from prunescope.progress import console
from prunescope.prune.inplace import check_prunable
from prunescope.prune.masks import Goal
from prunescope.results import SweepResult
from prunescope.sweep.advice import AGREEMENT, HEALING, Advised, advised, tasks_of, to_heal, to_join
from prunescope.sweep.comparison import DenseReference, write_texts
from prunescope.sweep.points import Point, read_points
from prunescope.tasks import quick
from prunescope.tasks.evaluate import evaluate_model, expand_tasks

__all__ = ["asked_for", "measure_speed", "measure_sweep"]

_TARGETS, _FORMATS = "attn,mlp,block,all", "int8,int4-g128"
_WEIGHTS = {"method": "wanda", "sparsity": "0.3", "pattern": "2:4"}
_SHARES = (1 / 15, 2 / 15, 4 / 15)  # of the blocks: 2, 4 and 8 of 30
_BATCH = 8
_REPEATS = 5
_CHECK_EVERY = 5  # steps of healing
_STEPS = 16  # of each prompt, on which h, z and p are compared
_OWN_STEPS = 64  # of each prompt of the user's own
_READ = 256  # tokens of a timed forward pass


@dataclass(frozen=True)
class _Asked:
    """What measures a use."""

    tasks: str
    prompts: str | None = None
    steps: int = _STEPS
    rows: int | None = None  # as many items there are at most; None: as many as are asked for


def asked_for(use: str) -> _Asked:
    """The built-in tasks that measure a use, or the user's own rows.

    Raises:
        UserError: there are none, or a file that is not as `rows_hold` says.
    """
    known = {"writing": "quick-gen", "choice": "quick-mc", "maths": "arithmetic-gen,arithmetic-mc"}
    if use in known or use in quick.QUICK:
        return _Asked(known.get(use, use))
    if is_file_of_rows(use):
        kind, count = rows_hold(use)
        return _Asked(AGREEMENT, use, _OWN_STEPS, count) if kind == "prompts" else _Asked(use, rows=count)
    raise UserError(
        f"--use {use}: no built-in task measures it; give a file of your own prompts, or sweep with tasks of lm-evaluation-harness (`prunescope sweep MODEL --tasks ...`) and give --sweep"
    )


def measure_sweep(
    model: str, use: str, limit: int, seed: int, loss: float, heal: bool, loading: LoadOptions, output: OutputOptions
) -> SweepResult:
    """Sweep the model at a few sizes of every kind: attention, MLP, blocks, both together, weights, two formats; then joined ones, see
    `to_join`, and, if asked for, healed ones, see `to_heal`. Says first how long it will take.

    Args:
        limit: items of each task.
        loss: the share that may be lost, by which joined and healed points are chosen.
        output: of the sweep; an interrupted one goes on.
    """
    asked = asked_for(use)
    loaded = loading.load(model)
    weights = _weights(loaded)
    blocks = len(loaded.anatomy)
    n = ",".join(map(str, dict.fromkeys([0, *(max(1, round(share * blocks)) for share in _SHARES)])))
    points = read_points(_TARGETS, n, quant=_FORMATS, **weights)
    _say_cost(loaded, asked, points, n, weights, limit, seed, heal, output)
    with _folder(output) as kept:
        options = sweep_job.SweepOptions(
            model=loaded, target=_TARGETS, n=n, method=weights.get("method"), sparsity=weights.get("sparsity"), pattern=weights.get("pattern"),
            quant=_FORMATS, join=None, sparse_bytes=True, ladder=None, tasks=asked.tasks, limit=limit, shots=None, data=None,
            allow_code_execution=False, prompts=asked.prompts, chat=False, max_new_tokens=asked.steps, metric_temperature=1.0, calibration="self",
            samples=None, seq_len=None, batch_size=_BATCH, seed=seed, cache=True, spread=SpreadOptions(1, None), loading=loading, output=kept,
        )  # fmt: skip
        found = sweep_job.run_points(options, points, show=False)
        of_file = [task for tasks in found.info["own_files"].values() for task in tasks]
        single = [
            one
            for one in advised(
                found.all_tables, tasks_of(use, found.table().to_pylist(), of_file), loss=loss, seed=seed
            )
            if one.change in ("drop", "sparsify", "quant")
        ]
        by_name = {point.name: point for point in points}
        pruned, quantised = to_join(single)
        joined = (
            [] if quantised is None else [by_name[name].with_quant(str(by_name[quantised].quant)) for name in pruned]
        )
        dropped = {row["point"]: row["dropped"] for row in found.table().to_pylist()}
        healed = {
            by_name[name].with_healing(): _healed(loaded, name, dropped[name], seed, loading, str(kept.out))
            for name in (to_heal(single, dropped) if heal else ())
        }
        folders = {point.name: folder for point, folder in healed.items()}
        return sweep_job.run_points(options, [*points, *joined, *healed], folders)


@contextmanager
def _folder(output: OutputOptions) -> Iterator[OutputOptions]:
    """``output``, or a folder that is gone afterwards: the second half of the sweep goes on with the first."""
    if output.out is not None:
        yield output
        return
    with TemporaryDirectory(prefix="prunescope-") as scratch:
        yield OutputOptions(str(Path(scratch) / "sweep"), overwrite=False, resume=True)


def _weights(loaded: LoadedModel) -> dict[str, str]:
    """How weights are pruned; not at all where that does not go in place."""
    try:
        for goal in (value for name, value in _WEIGHTS.items() if name != "method"):
            check_prunable(loaded, "wanda", Goal.parse(goal))
    except UserError as error:
        console.print(f"without pruned weights: {error}", markup=False)
        return {}
    return dict(_WEIGHTS)


def _healed(loaded: LoadedModel, name: str, dropped: str, seed: int, loading: LoadOptions, beside: str) -> str:
    """Heal ``dropped`` on text that the model writes itself, and give the folder; an interrupted one goes on."""
    folder = f"{beside}-healed-{name}"
    heal_job.run(
        heal_job.HealOptions(
            target=f"drop:{dropped}", teacher=loaded.ref, traces=None, temperature=1.0, micro_batch=None, warmup=0.05, decay="cosine",
            weight_decay=0.0, clip=1.0, on_policy=0.0, reconstruct=0, lora=None, embeddings=False, compile=False, check_every=_CHECK_EVERY, patience=5,
            seed=seed, cache=True, loading=replace(loading, dtype="auto"), output=OutputOptions(folder, overwrite=False, resume=True), **HEALING,
        )
    )  # fmt: skip
    return folder


def _say_cost(
    loaded: LoadedModel, asked: _Asked, points: Sequence[Point], n: str, weights: dict[str, str], limit: int, seed: int, heal: bool, output: OutputOptions
) -> None:  # fmt: skip
    names = expand_tasks(asked.tasks.split(","))
    point, read, write = _seconds(loaded, names, asked, limit, seed)
    drops, kinds = len(_TARGETS.split(",")), len({p.series for p in points if p.dropped or p.method})
    pruning = sum(p.method is not None for p in points) * 2 * 32 * read  # two passes of 32 texts of 256 tokens
    seconds = (
        point * (len(points) + kinds) + 1.5 * pruning + (_healing(read, write, drops) + drops * point if heal else 0)
    )
    what = "; ".join(
        [f"{_TARGETS} n = {n}", *([f"wanda {weights['sparsity']}, {weights['pattern']}"] if weights else []), _FORMATS]
    )
    more = f", then up to {kinds} joined with a format" + (f" and up to {drops} healed" if heal else "")
    items = limit if asked.rows is None else min(limit, asked.rows)
    kept = f"; it is kept in {output.out} and continues from there if interrupted" if output.out else "; --out keeps it"
    console.print(
        f"no sweep given, so one is run first: {len(points)} points ({what}){more}, {len(names)} task{'s' if len(names) > 1 else ''} of {items} items, "
        f"about {_duration(seconds)} on this machine{kept}",
        markup=False,
    )


def _seconds(
    loaded: LoadedModel, tasks: Sequence[str], asked: _Asked, limit: int, seed: int
) -> tuple[float, float, float]:
    """Of one point: one batch of each task, times the batches, and the comparison of h, z and p on the prompts; of reading `_READ` tokens; and of
    one step of writing a batch of texts."""
    prompts = read_prompts(asked.prompts)
    prompts = prompts[: limit if AGREEMENT in tasks else None]
    first, times = prompts[:_BATCH], -(-len(prompts) // _BATCH)
    count = limit if asked.rows is None else min(limit, asked.rows)
    started = time.monotonic()
    texts = write_texts(loaded, encode(loaded, first, asked.steps), asked.steps, batch_size=_BATCH, recall=False)
    wrote = time.monotonic() - started
    reference = DenseReference(loaded, texts)
    started = time.monotonic()
    if names := [task for task in tasks if task != AGREEMENT]:
        evaluate_model(loaded, names, limit=min(count, _BATCH), batch_size=_BATCH, seed=seed)
    scored = time.monotonic()
    reference.measure(loaded)
    measured = time.monotonic()
    length = min(_READ, loaded.context or _READ)
    with torch.no_grad():
        loaded.model(input_ids=torch.zeros((1, length), dtype=torch.int64, device=loaded.device), use_cache=False)
    read = (time.monotonic() - measured) * _READ / length
    point = (scored - started) * -(-count // _BATCH) + (measured - scored) * times
    return point, read, wrote / max(len(text.continuation) for text in texts)


def _healing(read: float, write: float, points: int) -> float:
    """Seconds of healing so many points: the teacher writes once, both models read the held-out texts at every check, and a step is three passes
    of the student and one of the teacher."""
    length = HEALING["new_tokens"] + 64  # with the prompts that it writes too
    step = 4 * HEALING["batch_size"] * length / _READ * read
    checks = (1 + HEALING["steps"] // _CHECK_EVERY) * 2 * HEALING["held_out"] * length / _READ * read
    seconds: float = points * (HEALING["steps"] * step + checks) + HEALING["samples"] / _BATCH * length * write / 2
    return seconds


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def measure_speed(
    model: str, points: Sequence[Advised], dropped: dict[str, str], loading: LoadOptions, output: OutputOptions
) -> list[dict[str, Any]]:
    """Rows of a speed run of the dense model and of the points that keep the use and drop whole sublayers.

    Zeros and rounding are imitated in memory by a sweep and run at the dense speed, so only these are timed.

    Args:
        dropped: point -> its sublayers, as after ``drop:``.
    """
    names = [
        f"drop:{dropped[one.point]}"
        for one in points
        if one.change in ("drop", "healed") and one.verdict in ("safe", "likely")
    ]
    if not names:
        return []
    console.print(
        f"no speed run given, so {len(names) + 1} models are timed first: a prompt of 128 tokens and 32 new ones, {_REPEATS} times each",
        markup=False,
    )
    found = speed_job.run(
        speed_job.SpeedOptions(
            models=[model, *dict.fromkeys(names)], batch_size="1", length=128, max_new_tokens=32, repeats=_REPEATS, sparse_kernels=False,
            seed=0, engine="transformers", engine_python=None, loading=loading, output=output,
        )
    )  # fmt: skip
    rows: list[dict[str, Any]] = found.table().to_pylist()
    return rows
