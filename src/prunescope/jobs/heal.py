"""`prunescope heal`: load both models, let the dense one write, distil, write what healed and check what was written."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prunescope.cache import cache_folder
from prunescope.compare.context import check_pair
from prunescope.data.traces import Traces, write_traces
from prunescope.errors import UserError
from prunescope.files import replacing
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, listed
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.placing import refuse_sharded
from prunescope.models.record import RECORD
from prunescope.models.saving import checkpoint_bytes, save_changed
from prunescope.models.variants import read_variant
from prunescope.progress import console, progress
from prunescope.prune.heal import Healed, HealPlan, Text, heal, held_out_kl
from prunescope.prune.team import Team, joined
from prunescope.prune.trainable import Trainable, make_trainable
from prunescope.report.figures.healing import draw_healing
from prunescope.report.terminal.pruning import show_healed
from prunescope.results import CURVES, HealResult
from prunescope.runs.folder import remove_parts, staged, write_config, write_json
from prunescope.runs.provenance import device_name, versions

__all__ = ["HealOptions", "run"]

_FREE = ("out", "overwrite", "resume", "cache", "micro_batch")  # options that do not decide the result
_CURVES = pa.schema(
    [
        *(
            ("step", pa.int32()),
            ("stage", pa.string()),
            ("tokens", pa.int64()),
            ("loss", pa.float64()),
            ("held_out_kl", pa.float64()),
        ),
        *(("learning_rate", pa.float64()), ("gradient_norm", pa.float64())),
        *(("on_policy", pa.bool_()), ("seconds", pa.float64())),
    ]
)


@dataclass(frozen=True)
class HealOptions(Options):
    """See `prunescope.heal`."""

    target: Model
    teacher: Model
    traces: str | None
    samples: int
    new_tokens: int
    temperature: float
    held_out: int
    steps: int
    batch_size: int
    micro_batch: int | None
    learning_rate: float | None
    warmup: float
    decay: Literal["cosine", "linear", "constant"]
    weight_decay: float
    clip: float
    on_policy: float
    reconstruct: int
    lora: int | None
    embeddings: bool
    compile: bool
    check_every: int
    patience: int | None
    seed: int
    cache: bool
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        super().check()
        whole = ("new_tokens", "held_out", "steps", "micro_batch", "lora", "check_every", "patience")
        for name in whole:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        for name, least, most in (
            *(("warmup", 0, 1), ("on_policy", 0, 1), ("reconstruct", 0, None)),
            *(("weight_decay", 0, None), ("clip", 0, None)),
        ):
            value = getattr(self, name)
            if not value >= least or (most is not None and value > most):
                bounds = f"at least {least}" if most is None else f"from {least} to {most}"
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be {bounds}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate {self.learning_rate}: it must be positive")
        if self.loading.dtype in ("bfloat16", "float16"):
            raise UserError(
                f"--dtype {self.loading.dtype}: small steps are lost in its digits; leave it out, products are in bfloat16 on a GPU anyway"
            )
        if self.lora is not None and self.embeddings:
            raise UserError("--lora changes matrices of the blocks only; leave --embeddings out")
        out = self.output.out
        for role, ref in (("target", self.target), ("teacher", self.teacher)):
            if out is not None and isinstance(ref, str) and _place(out) == _place(ref):
                raise UserError(f"--out {out} is the {role} itself; choose another folder")
        if out is None and self.output.resume:
            raise UserError("--resume continues an interrupted run; say where with --out")
        read_variant(self.target)

    def plan(self, student: LoadedModel) -> HealPlan:
        """With what depends on the model and the device: the step size, and logits in memory at a time."""
        logits = 2**27 if student.device.type == "cuda" else 2**24
        return HealPlan(
            steps=self.steps, batch_size=self.batch_size, micro_batch=self.micro_batch, warmup=self.warmup, decay=self.decay,
            learning_rate=self.learning_rate or (2e-5 if self.lora is None else 1e-3), weight_decay=self.weight_decay, clip=self.clip,
            on_policy=self.on_policy, reconstruct=self.reconstruct, compile=self.compile, check_every=self.check_every, patience=self.patience, seed=self.seed,
            chunk=max(16, logits // student.anatomy.vocab_size),
        )  # fmt: skip


def run(options: HealOptions) -> HealResult:
    """As one process, or as one of those that torchrun has started: the first checks, writes and prints, all train."""
    started = time.monotonic()
    with joined(options.loading.device, None) as team:
        return _help(options, team) if team.rank else team.told(_run(options, team, started))


def _help(options: HealOptions, team: Team) -> HealResult:
    """What the processes do that torchrun started beside the first. Gives what the first does, whose folder it is."""
    console.quiet = True
    wanted: bool = team.told(None)
    if wanted:
        try:
            student, teacher = _load(options, team)
            trained = _trainable(options, student)
        except UserError:
            team.told(None)  # and no further, where the first has failed in the same way
            raise
        traces: Traces = team.told(None)
        _train(options, student, teacher, trained, traces, None, team)
    result: HealResult = team.told(None)
    return result


def _run(options: HealOptions, team: Team, started: float) -> HealResult:
    team.awaited = True
    options.check()
    if options.batch_size < team.world:
        raise UserError(
            f"--batch-size {options.batch_size}: {team.world} processes share the texts of a step; give at least as many, or torchrun fewer processes"
        )
    output = options.output
    if output.exists():
        folder = Path(str(output.out)).expanduser()
        record = _same(options, folder)
        output.say_complete()
        team.told(False)
        return HealResult(record, folder, pq.read_table(folder / CURVES))
    held = tempfile.mkdtemp(prefix="prunescope-") if output.out is None else None
    out = str(Path(held) / "checkpoint") if held is not None else str(output.out)
    try:
        with staged(out, overwrite=output.overwrite, resume=bool(output.resume)) as staging:
            team.told(True)
            record, curves = _heal(options, staging, team, started)
            remove_parts(staging)
    except BaseException:
        if held is not None:
            shutil.rmtree(held, ignore_errors=True)
        raise
    show_healed(record)
    output.say_written()
    result = HealResult(record, Path(out).expanduser(), curves)
    if held is not None:
        weakref.finalize(result, shutil.rmtree, held, ignore_errors=True)
    return result


def _heal(options: HealOptions, staging: Path, team: Team, started: float) -> tuple[dict[str, Any], pa.Table]:
    """Everything into ``staging``; gives the record and the curves that are written there."""
    student, teacher = _load(options, team)
    check_pair(teacher, student)
    _check_roles(options, student, teacher)
    trained = _trainable(options, student)
    options.output.require_space(_disk(student, trained))
    traces = write_traces(
        teacher, listed(options.traces) if options.traces else [], samples=options.samples, new_tokens=options.new_tokens,
        temperature=options.temperature, seed=options.seed, cache=cache_folder() if options.cache else None,
    )  # fmt: skip
    held_out = _apart(traces, options)[1]
    healed, more = _train(options, student, teacher, trained, team.told(traces), staging, team)
    plan = options.plan(student)
    record = _record(options, student, teacher, traces, healed) | more
    record = save_changed(student, staging, record)
    record["kl"]["written"] = _checked(staging, student, teacher, trained, held_out, plan)
    record["wall_time_s"] = round(time.monotonic() - started, 3)
    curves = pa.Table.from_pylist(healed.rows, schema=_CURVES)
    with replacing(staging / CURVES) as beside:
        pq.write_table(curves, beside)
    (staging / "figures").mkdir(exist_ok=True)
    draw_healing(curves, record, staging / "figures")
    write_config(staging, options.config())
    write_json(staging / RECORD, record)
    return record, curves


def _trainable(options: HealOptions, student: LoadedModel) -> Trainable:
    return make_trainable(student, rank=options.lora, embeddings=options.embeddings, seed=options.seed)


def _train(
    options: HealOptions,
    student: LoadedModel,
    teacher: LoadedModel,
    trained: Trainable,
    traces: Traces,
    staging: Path | None,
    team: Team,
) -> tuple[Healed, dict[str, Any]]:
    """What every process does; ``staging`` is the first one's. Gives how it went, and what the record says of it besides."""
    texts, held_out = _apart(traces, options)
    plan = options.plan(student)
    count = sum(p.numel() for p in trained.parameters.values())
    key = _key(options, plan, student, teacher, traces)
    if student.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(student.device)
    with progress("healing", plan.reconstruct + plan.steps) as advance, _blaming(options):
        healed = heal(
            student, teacher, trained, texts, held_out, plan, folder=staging, key=key, advance=advance, team=team
        )
    trained.merge()
    student.model.requires_grad_(True)
    peak = torch.cuda.max_memory_allocated() if student.device.type == "cuda" else None
    return healed, {"key": key, "trained_parameters": count, "peak_gpu_bytes": peak, "processes": team.world}


def _load(options: HealOptions, team: Team) -> tuple[LoadedModel, LoadedModel]:
    """Student and teacher. The student's weights are float32 or better; on a GPU the teacher's are bfloat16, as its products are."""
    spec = read_variant(options.target)
    loading = options.loading
    if spec is not None and not isinstance(spec, DropSpec):
        raise UserError(f"target {options.target}: quantised weights cannot be trained; heal first, then quantise")
    if isinstance(options.target, LoadedModel):
        raise UserError("heal changes the weights of its target; give its folder or drop: and a list of sublayers")
    dtype = "float64" if loading.dtype == "float64" else "float32"
    of_teacher: dict[str, Any] = {"revision": loading.revision, "adapter": loading.adapter}
    device = loading.device
    if team.world > 1 and device == "auto" and torch.cuda.is_available():
        device = "cuda"  # this process's own, where auto might spread a model over all
    common: dict[str, Any] = {"device": device, "trust_remote_code": loading.trust_remote_code}
    if spec is None:
        student = load_model(options.target, dtype=dtype, **common)
    else:
        source = options.teacher.ref if isinstance(options.teacher, LoadedModel) else options.teacher
        student = load_model(source, dtype=dtype, drop=spec, **of_teacher, **common)
        student.ref = str(options.target)
    refuse_sharded(student.ref, student.model, "training", "heal on a GPU that holds the model, or on the CPU")
    if isinstance(options.teacher, LoadedModel):
        return student, options.teacher
    half = student.device.type == "cuda" and loading.dtype == "auto"
    return student, load_model(options.teacher, dtype="bfloat16" if half else dtype, **of_teacher, **common)


def _place(ref: str) -> Path:
    return Path(ref).expanduser().resolve()


def _check_roles(options: HealOptions, student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise UserError where nothing was pruned, where the target is of another model than the teacher in memory, or where the first stage cannot
    compare the streams."""
    if student.pinned and student.identity == teacher.identity and not student.dropped:
        raise UserError(
            f"{student.ref} is the teacher itself, nothing of it was pruned; give the folder of drop or sparsify"
        )
    taken = isinstance(options.teacher, LoadedModel) and read_variant(options.target) is not None
    if taken and student.identity != teacher.identity:
        raise UserError(
            f"{options.target} would be taken from {teacher.ref} as it lies on the disk, and the teacher in memory is another model; save what was pruned, and give its folder"
        )
    shapes = [(model.dense_layers, model.anatomy.hidden_size) for model in (student, teacher)]
    if options.reconstruct and shapes[0] != shapes[1]:
        raise UserError(
            f"--reconstruct {options.reconstruct}: {student.ref} has {shapes[0][0]} blocks of width {shapes[0][1]}, {teacher.ref} {shapes[1][0]} of {shapes[1][1]}, so that their streams cannot be compared; leave it out, or give the model that was pruned as --teacher"
        )


def _disk(student: LoadedModel, trained: Trainable) -> int:
    """Bytes on the disk at the most: the best weights, the state (weights and AdamW's two means) and the next one beside it; then the checkpoint in
    place of that."""
    held = sum(parameter.nbytes for parameter in trained.parameters.values())
    return max(7 * held, 4 * held + checkpoint_bytes(student, "zeroed"))


def _apart(traces: Traces, options: HealOptions) -> tuple[list[Text], list[Text]]:
    """Texts to train on, and texts of other prompts to check on, drawn by the seed."""
    rows = [row for row in traces.rows if row.continuation]
    groups: dict[tuple[int, ...], list[Text]] = {}
    for number, row in enumerate(rows):  # a lone start token is no prompt that two texts could have in common
        name = row.prompt if len(row.prompt) > 1 else (-1, number)
        groups.setdefault(name, []).append((row.prompt, row.continuation))
    shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(options.seed)).tolist()
    together = list(groups.values())
    held_out: list[Text] = []
    train: list[Text] = []
    for place in shuffled:
        (held_out if len(held_out) < options.held_out else train).extend(together[place])
    if not train:
        raise UserError(
            f"{len(rows)} texts of {len(groups)} prompts, and --held-out {options.held_out} of them to check on: none is left to train on; give more --samples, or more prompts"
        )
    return train, held_out


@contextmanager
def _blaming(options: HealOptions) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"healing {options.target} does not fit into the GPU's memory; give a smaller --micro-batch, or --lora 16"
        ) from error


def _checked(
    folder: Path, student: LoadedModel, teacher: LoadedModel, trained: Trainable, held_out: list[Text], plan: HealPlan
) -> float:
    """Load what was written: every zero of the target must be there, and what is dropped be dropped. Gives its held-out divergence."""
    written = load_model(folder, dtype=str(student.dtype).removeprefix("torch."), device=str(student.device))
    if written.dropped != student.dropped:
        raise RuntimeError(f"{folder}: {written.dropped} is dropped of what was written, not {student.dropped}")
    weights = dict(written.model.named_parameters())
    for name, zeros in trained.pruned.items():
        if bool(weights[name][zeros].any()):
            raise RuntimeError(f"{folder}: {name} lost zeros of {student.ref}")
    return held_out_kl(written, teacher, held_out, plan)


# --- record --------------------------------------------------------------------------------------------------------------


def _key(options: HealOptions, plan: HealPlan, student: LoadedModel, teacher: LoadedModel, traces: Traces) -> str:
    """Names everything that decides the result."""
    free = (*_FREE, "target", "teacher", "traces")  # what is in them decides, not what they are called
    content = {
        "config": {name: value for name, value in options.config().items() if name not in free},
        "models": [student.identity, str(student.dropped), teacher.identity],
        "dtypes": [str(student.dtype), str(teacher.dtype)],
        "device": student.device.type,
        "chunk": plan.chunk,
        "traces": {name: value for name, value in traces.describe().items() if "sha256" in name},
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _record(
    options: HealOptions, student: LoadedModel, teacher: LoadedModel, traces: Traces, healed: Healed
) -> dict[str, Any]:
    before = student.record or {}
    earlier = list(before.get("pruned_before", []))
    if before.get("command"):
        earlier.append(
            {name: before[name] for name in ("command", "base", "method", "asked", "sparsity") if name in before}
        )
    return {
        "command": "heal",
        "base": student.identity,
        "teacher": teacher.identity,
        "pruned_before": earlier,
        "traces": traces.describe(),
        "kl": {"before": healed.kl_before, "best": healed.kl_best},
        "best_step": healed.best_step,
        "checks": _checks(healed),
        "steps": len(healed.rows),
        "tokens": healed.tokens,
        "seconds": round(healed.seconds, 3),
        "config": options.config(),
        "versions": versions(),
        "device": device_name(student.device),
    }


def _checks(healed: Healed) -> list[dict[str, Any]]:
    """The held-out divergence of every measurement, over the tokens that were trained on; the first before any."""
    found: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "loss": None, "held_out_kl": healed.kl_before}]
    tokens = 0
    for row in healed.rows:
        tokens += row["tokens"]
        if row["held_out_kl"] is not None:
            found.append({"step": row["step"], "tokens": tokens, **{k: row[k] for k in ("loss", "held_out_kl")}})
    return found


def _same(options: HealOptions, folder: Path) -> dict[str, Any]:
    """The record of a complete folder. Raises UserError if it was made of something else."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
        made_with = dict(record["config"])
        if record["command"] != "heal" or not (folder / CURVES).is_file():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} exists and is no checkpoint of heal; choose another --out or give --overwrite"
        ) from error
    if any(made_with.get(name) != value for name, value in options.config().items() if name not in _FREE):
        raise UserError(
            f"{folder} is complete, but was made with other options; choose another --out or give --overwrite"
        )
    return record
