"""`prunescope sparsify`: checks, calibration text, plan, pruning, record."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from prunescope.cache import cache_folder
from prunescope.data.calibration import Calibration, calibration_tokens, is_sampled, perplexity_tokens
from prunescope.errors import UserError, first_line
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions
from prunescope.jobs.sparsify_record import WHOLE, sparsify_record
from prunescope.models.blockwise import StreamedModel, stream_model
from prunescope.models.loaded import LoadedModel
from prunescope.models.record import RECORD
from prunescope.progress import console
from prunescope.prune.blocks import Pruned, prune_model
from prunescope.prune.calibrate import overflow
from prunescope.prune.checkpoint import reports
from prunescope.prune.estimate import estimate
from prunescope.prune.masks import Goal
from prunescope.prune.owl import owl_sparsities
from prunescope.prune.plan import RESHAPING, Method, PruningPlan, has_fused_experts, make_plan, samples_at_a_time
from prunescope.prune.refine import Refine
from prunescope.prune.team import Team, joined
from prunescope.report.terminal.pruning import show_plan, show_sparsified
from prunescope.results import SparsifyResult
from prunescope.runs.folder import require_space, staged, write_config, write_json
from prunescope.runs.provenance import versions

__all__ = ["SparsifyOptions", "run"]

_FREE = ("out", "overwrite", "resume", "cache", "dry_run", "memory_mb")  # options that do not decide the result
_NEWER = (
    "refine",
    "refine_steps",
    "shares",
)  # left out of the key where they are not given, so that older unfinished runs go on
_BY_CONTENT = ("model", "calibration", "perplexity", "sparsity_map")  # what is in them does, not what they are called


@dataclass(frozen=True)
class SparsifyOptions(Options):
    """See `prunescope.sparsify`."""

    model: Model
    method: Method
    sparsity: float | None
    pattern: str | None
    variant: bool
    sparsity_map: str | None
    allocation: Literal["uniform", "owl"]
    owl_spread: float
    owl_threshold: float
    block_size: int
    damping: float
    refine: Refine | None
    refine_steps: int | None
    calibration: str
    samples: int | None
    seq_len: int | None
    batch_size: int | None
    seed: int
    perplexity: str | None
    perplexity_windows: int | None
    shares: int | None
    memory_mb: int
    cache: bool
    dry_run: bool
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        if self.seq_len is not None and self.seq_len < 2:
            raise UserError(f"--seq-len {self.seq_len}: at least two tokens are needed")
        if not self.damping > 0:
            raise UserError(f"--damping {self.damping}: it must be positive")
        if self.refine_steps is not None and (self.refine is None or self.refine_steps < 1):
            raise UserError(f"--refine-steps {self.refine_steps}: it goes with --refine, and must be at least 1")
        if self.perplexity is not None and not Path(self.perplexity).is_file():
            raise UserError(f"perplexity file {self.perplexity}: no such file; give a text, JSON or JSONL file")
        if self.perplexity_windows is not None and self.perplexity is None:
            raise UserError("--perplexity-windows goes with --perplexity FILE; give the file")
        _check_together(self, self.goal)
        out = self.output.out
        if out is not None and Path(out).expanduser().absolute() == Path(str(self.model)).expanduser().absolute():
            raise UserError(f"--out {out} is the model itself; choose another folder")
        if out is None and self.output.resume:
            raise UserError("--resume continues an interrupted run; say where with --out")
        super().check()

    @property
    def goal(self) -> Goal:
        """What every matrix shall lose that the sparsity map does not name. Raises UserError."""
        if self.pattern in (None, "unstructured"):
            if self.sparsity is None:
                raise UserError("say how much to prune: --sparsity 0.5, or --pattern 2:4")
            return Goal.parse(self.sparsity)
        assert self.pattern is not None
        if ":" not in self.pattern:
            raise UserError(f"pattern {self.pattern!r} is unknown; write unstructured, or N:M such as 2:4")
        goal = Goal.parse(self.pattern)
        if self.sparsity is not None and abs(self.sparsity - goal.sparsity) > 1e-9:
            raise UserError(
                f"--pattern {self.pattern} removes {goal.sparsity:g} of the weights, not {self.sparsity:g}; leave --sparsity out"
            )
        return goal

    @property
    def asked(self) -> str | float | None:
        """The goal as the user wrote it."""
        return self.sparsity if self.pattern in (None, "unstructured") else self.pattern

    def planning(self) -> dict[str, Any]:
        """The options of `make_plan`."""
        names = ("block_size", "damping", "variant", "refine", "refine_steps")
        return {name: getattr(self, name) for name in names}


def run(options: SparsifyOptions) -> SparsifyResult:
    started = time.monotonic()
    with joined(options.loading.device, options.shares) as team:
        if team.shares > 1:
            options = replace(options, shares=team.shares)
        if team.rank:
            return _help(replace(options, output=OutputOptions(None, False, False)), team)
        return _run(options, team, started)


def _help(options: SparsifyOptions, team: Team) -> SparsifyResult:
    """What the processes do that torchrun started beside the first, which writes: prune with it, if it does."""
    console.quiet = True
    with tempfile.TemporaryDirectory(prefix="prunescope-") as scratch:
        told: _Told | None = team.told(None)
        if told is not None:
            _together(options, _overrides(options.sparsity_map), _open(options, Path(scratch)), team, told)
    return SparsifyResult({"method": options.method, "config": options.config()}, None)


def _run(options: SparsifyOptions, team: Team, started: float) -> SparsifyResult:
    team.awaited = True
    options.check()
    overrides = _overrides(options.sparsity_map)
    if options.dry_run:
        team.told(None, last=True)
        with tempfile.TemporaryDirectory(prefix="prunescope-") as folder:
            return _dry_run(options, overrides, Path(folder))
    output = options.output
    if output.exists():
        team.told(None, last=True)
        record = _same(options, Path(str(output.out)).expanduser())
        output.say_complete()
        return SparsifyResult(record, Path(str(output.out)).expanduser())
    held = tempfile.mkdtemp(prefix="prunescope-") if output.out is None else None
    out = str(Path(held) / "checkpoint") if held is not None else str(output.out)
    try:
        with (
            staged(out, overwrite=output.overwrite, resume=bool(output.resume)) as staging,
            _leaving_nothing_useless(staging),
        ):
            if (staging / RECORD).is_file() and not reports(staging).is_dir():  # cut off after the last block
                team.told(None, last=True)
                record = _same(options, staging)
            else:
                record = _prune(options, overrides, out, staging, team, started)
            for name in ("scratch", "finished"):
                shutil.rmtree(staging / name, ignore_errors=True)
    except BaseException:
        if held is not None:
            shutil.rmtree(held, ignore_errors=True)
        raise
    show_sparsified(record)
    output.say_written()
    result = SparsifyResult(record, Path(out).expanduser())
    if held is not None:
        weakref.finalize(result, shutil.rmtree, held, ignore_errors=True)
    return result


def _prune(
    options: SparsifyOptions, overrides: Mapping[str, Goal], out: str, staging: Path, team: Team, started: float
) -> dict[str, Any]:
    """Everything into ``staging``; gives the record that is written there."""
    streamed = _open(options, staging / "scratch")
    batch_size = samples_at_a_time(streamed, _length(options, streamed), options.batch_size)
    make_plan(
        streamed, options.method, options.goal, overrides=overrides, **options.planning()
    )  # complains before any work
    calibration, windows = _texts(options, streamed)
    hidden = sum(t.numel() for t in (windows, windows, calibration.tokens if calibration else None) if t is not None)
    hidden *= streamed.loaded.anatomy.hidden_size * streamed.model.dtype.itemsize
    spilled = hidden if hidden > options.memory_mb * 2**20 else 0
    require_space(out, sum(tensor.nbytes for tensor in streamed.stored.values()) + spilled + 2**24)
    key = _key(options, streamed, calibration, windows, overrides)
    by_layer = _allocation(options, streamed, calibration, batch_size, staging, key)
    told = _Told(calibration, windows, batch_size, by_layer, staging)
    team.told(told, last=True)
    plan, pruned = _together(options, overrides, streamed, team, told)
    record = sparsify_record(options.asked, options.config(), streamed, plan, calibration, pruned, key, started)
    write_config(staging, options.config())
    write_json(staging / RECORD, record)
    reports(staging).rename(staging / "finished")
    return record


@dataclass(frozen=True)
class _Told:
    """What the first process has found, for all."""

    calibration: Calibration | None
    windows: Tensor | None
    batch_size: int
    by_layer: list[float] | None
    folder: Path


def _together(
    options: SparsifyOptions, overrides: Mapping[str, Goal], streamed: StreamedModel, team: Team, told: _Told
) -> tuple[PruningPlan, Pruned]:
    """What every process does. Raises UserError."""
    plan = make_plan(
        streamed, options.method, options.goal, overrides=overrides, by_layer=told.by_layer, **options.planning()
    )
    text, windows = told.calibration, told.windows
    windows_at_a_time = 1 if windows is None else samples_at_a_time(streamed, windows.shape[1], options.batch_size)
    try:
        return plan, prune_model(
            streamed, plan, None if text is None else text.tokens, told.folder, perplexity=windows, batch_size=told.batch_size,
            perplexity_batch_size=windows_at_a_time, limit=options.memory_mb * 2**20, used=None if text is None else text.gathered(), team=team,
        )  # fmt: skip
    except FloatingPointError as error:
        raise UserError(f"{options.model}: {error}; {overflow(streamed.model.dtype)}") from error


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_together(options: SparsifyOptions, goal: Goal) -> None:
    """Options that do not go together. Raises UserError."""
    method, owl = options.method, options.allocation == "owl"
    if method in RESHAPING and options.shares not in (None, 1):
        raise UserError(f"{method} removes whole {WHOLE[method]} in one process; leave torchrun and --shares out")
    if options.variant and method != "wanda":
        raise UserError(f"--variant is one of wanda, not of {method}; leave it out")
    if options.variant and goal.of:
        raise UserError(f"--variant moves weights between rows; it does not go with --pattern {goal}")
    if method in RESHAPING:
        whole = f"{method} removes whole {WHOLE[method]}"
        if goal.of or options.sparsity_map or owl:
            raise UserError(
                f"{whole}, the same share in every layer, since config.json holds one size; leave --pattern, --sparsity-map and --allocation out"
            )
        if options.refine:
            raise UserError(f"--refine changes which weights are zero; {whole}, so leave it out")
    if options.refine and options.calibration == "none":
        raise UserError("--refine lowers the error on a text; give one with --calibration")
    if owl and goal.of:
        raise UserError(f"--allocation owl varies the share from block to block; it does not go with --pattern {goal}")
    if options.calibration == "none" and (method != "magnitude" or owl):
        raise UserError("--calibration none goes with magnitude and uniform allocation only; the others need a text")
    if not 0 < options.owl_spread < 1 or not options.owl_threshold > 1:
        raise UserError("--owl-spread must lie between 0 and 1, --owl-threshold above 1")


def _overrides(path: str | None) -> dict[str, Goal]:
    if path is None:
        return {}
    try:
        # scalars as they are written: YAML would read 2:4 as a time of day
        content = yaml.load(Path(path).read_text("utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"sparsity map {path} cannot be read ({first_line(error)}); give a YAML file of module patterns and shares"
        ) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"sparsity map {path} holds no 'pattern: share' lines; write for example '*.down_proj': 0.4")
    try:
        return {str(pattern): Goal.parse(value) for pattern, value in content.items()}
    except UserError as error:
        raise UserError(f"sparsity map {path}: {error}") from error


# --- stages ------------------------------------------------------------------------------------------------------------


@contextmanager
def _leaving_nothing_useless(staging: Path) -> Iterator[None]:
    """What was begun is of use to a resumed run only with a finished block; without one nothing is left behind."""
    try:
        yield
    except BaseException:
        if not any(staging.glob("*.safetensors")):
            shutil.rmtree(reports(staging), ignore_errors=True)
        raise


def _open(options: SparsifyOptions, scratch: Path) -> StreamedModel:
    streamed = stream_model(str(options.model), scratch, **options.loading.config())
    if options.calibration == "none" and ":" in (options.pattern or "") and has_fused_experts(streamed):
        raise UserError(
            "--calibration none: which way the experts of this model lie is seen only when a text runs; give a text with --pattern"
        )
    return streamed


def _length(options: SparsifyOptions, streamed: StreamedModel) -> int:
    """Tokens of a calibration sample."""
    return int(
        options.seq_len or min(256 if is_sampled(options.calibration) else 2048, streamed.loaded.context or 2048)
    )


def _texts(options: SparsifyOptions, streamed: StreamedModel) -> tuple[Calibration | None, Tensor | None]:
    def sampler() -> LoadedModel:
        full = options.loading.load_other(str(streamed.folder))
        full.ref, full.identity = streamed.loaded.ref, streamed.loaded.identity
        return full

    windows = None
    if options.perplexity is not None:
        windows = perplexity_tokens(
            streamed.loaded, options.perplexity, length=options.seq_len, windows=options.perplexity_windows
        )
    calibration = None
    if options.calibration != "none":
        calibration = calibration_tokens(
            streamed.loaded,
            options.calibration,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=options.seed,
            cache=cache_folder() if options.cache else None,
            sampler=sampler,
        )
    return calibration, windows


def _allocation(
    options: SparsifyOptions,
    streamed: StreamedModel,
    calibration: Calibration | None,
    batch_size: int,
    staging: Path,
    key: str,
) -> list[float] | None:
    """Sparsity by block where it is not uniform: that of the run that is resumed, else found now and kept for one.

    Raises:
        UserError: the run that is resumed was begun with something else.
    """
    path = reports(staging) / "plan.json"
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["key"] != key:
            raise UserError(
                f"{staging} was begun with another model, text or options; continue with those, or start over with --overwrite"
            )
        found: list[float] | None = kept["by_layer"]
        return found
    for part in staging.glob("*.safetensors"):  # of nobody knows what
        part.unlink()
    by_layer = None
    if options.allocation == "owl" and calibration is not None:
        by_layer = owl_sparsities(
            streamed,
            calibration.tokens,
            options.goal.sparsity,
            threshold=options.owl_threshold,
            spread=options.owl_spread,
            batch_size=batch_size,
            limit=options.memory_mb * 2**20,
            file=staging / "scratch" / "outliers.bin",
            used=calibration.used(),
        )
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"key": key, "by_layer": by_layer})
    return by_layer


def _key(
    options: SparsifyOptions,
    streamed: StreamedModel,
    calibration: Calibration | None,
    windows: Tensor | None,
    overrides: Mapping[str, Goal],
) -> str:
    """Names everything that decides the result."""
    text = (
        None
        if calibration is None
        else {k: v for k, v in calibration.describe().items() if k not in ("source", "traces")}
    )
    content = {
        "config": {
            name: value
            for name, value in options.config().items()
            if name not in (*_FREE, *_BY_CONTENT) and not (name in _NEWER and value is None)
        },
        "map": {pattern: str(goal) for pattern, goal in overrides.items()},
        "model": streamed.loaded.identity,
        "dtype": str(streamed.model.dtype),
        "device": streamed.device.type,
        "calibration": text,
        "windows": None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _same(options: SparsifyOptions, folder: Path) -> dict[str, Any]:
    """The record of a complete folder. Raises UserError if it was made of something else."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
        made_with = dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} exists and is no checkpoint of sparsify; choose another --out or give --overwrite"
        ) from error
    if any(made_with.get(name) != value for name, value in options.config().items() if name not in _FREE):
        raise UserError(
            f"{folder} is complete, but was made with other options; choose another --out or give --overwrite"
        )
    return record


def _dry_run(options: SparsifyOptions, overrides: Mapping[str, Goal], folder: Path) -> SparsifyResult:
    streamed = _open(options, folder)
    plan = make_plan(streamed, options.method, options.goal, overrides=overrides, **options.planning())
    length = _length(options, streamed)
    default = 32 if is_sampled(options.calibration) else 128
    samples = 0 if options.calibration == "none" else options.samples or default
    tokens_at_a_time = samples_at_a_time(streamed, length, options.batch_size) * length
    found = estimate(streamed, plan, samples * length, tokens_at_a_time, options.memory_mb * 2**20)
    record = {"method": plan.method, "perplexity": None} | found | {"config": options.config()}
    show_plan(record)
    return SparsifyResult(record, None)
