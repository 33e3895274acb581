"""`prunescope sparsify` from its options to a finished folder: checks, calibration text, plan, pruning, record."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from prunescope.cache import cache_folder
from prunescope.commands import SparsifyResult
from prunescope.data.calibration import SELF, Calibration, calibration_tokens, perplexity_tokens
from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel, stream_model
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.record import RECORD
from prunescope.progress import console
from prunescope.prune.blocks import (
    Plan,
    Pruned,
    has_fused_experts,
    make_plan,
    owl_sparsities,
    prune_model,
)
from prunescope.prune.calibrate import overflow
from prunescope.prune.checkpoint import reports
from prunescope.prune.estimate import estimate
from prunescope.prune.masks import Goal
from prunescope.report.terminal import show_plan, show_sparsified
from prunescope.runs import folder as results

__all__ = ["run_sparsify"]

_TOKENS_AT_A_TIME, _TOKENS_ON_GPU = 2048, 8192
_FREE = ("out", "overwrite", "resume", "cache", "dry_run", "memory_mb")  # options that do not decide the result
_BY_CONTENT = ("model", "calibration", "perplexity", "sparsity_map")  # what is in them does, not what they are called


def run_sparsify(config: dict[str, Any]) -> SparsifyResult:
    """See `prunescope.sparsify`, whose options ``config`` holds."""
    started = time.monotonic()
    goal, overrides = _check(config)
    if config["dry_run"]:
        with tempfile.TemporaryDirectory(prefix="prunescope-") as folder:
            return _dry_run(config, goal, overrides, Path(folder))
    held = None
    out = config["out"]
    if out is None:
        held = tempfile.mkdtemp(prefix="prunescope-")
        out = str(Path(held) / "checkpoint")
    elif config["resume"] and Path(out).expanduser().exists():
        return _finished(config)
    try:
        with (
            results.staged(out, overwrite=config["overwrite"], resume=config["resume"]) as staging,
            _leaving_nothing_useless(staging),
        ):
            if (staging / RECORD).is_file() and not reports(staging).is_dir():  # cut off behind the last block
                record = _same(config, staging)
            else:
                record = _prune(config, goal, overrides, out, staging, started)
            for name in ("scratch", "finished"):
                shutil.rmtree(staging / name, ignore_errors=True)
    except BaseException:
        if held is not None:
            shutil.rmtree(held, ignore_errors=True)
        raise
    show_sparsified(record)
    if config["out"] is not None:
        console.print(f"written: {out}", markup=False)
    result = SparsifyResult(record, Path(out))
    if held is not None:
        weakref.finalize(result, shutil.rmtree, held, ignore_errors=True)
    return result


def _prune(
    config: dict[str, Any], goal: Goal, overrides: Mapping[str, Goal], out: str, staging: Path, started: float
) -> dict[str, Any]:
    """Everything into ``staging``; gives the record that is written there."""
    streamed = _open(config, staging / "scratch")
    batch_size = _batch(config, streamed, _length(config, streamed))
    options: Any = {name: config[name] for name in ("block_size", "damping", "variant")} | {"overrides": overrides}
    make_plan(streamed, config["method"], goal, **options)  # complains before any work
    calibration, windows = _texts(config, streamed)
    hidden = sum(t.numel() for t in (windows, windows, calibration.tokens if calibration else None) if t is not None)
    hidden *= streamed.loaded.anatomy.hidden_size * streamed.model.dtype.itemsize
    spilled = hidden if hidden > config["memory_mb"] * 2**20 else 0
    results.require_space(out, sum(tensor.nbytes for tensor in streamed.stored.values()) + spilled + 2**24)
    key = _key(config, streamed, calibration, windows, overrides)
    try:
        by_layer = _allocation(config, streamed, goal, calibration, batch_size, staging, key)
        plan = make_plan(streamed, config["method"], goal, by_layer=by_layer, **options)
        pruned = prune_model(
            streamed,
            plan,
            None if calibration is None else calibration.tokens,
            staging,
            perplexity=windows,
            batch_size=batch_size,
            perplexity_batch_size=1 if windows is None else _batch(config, streamed, windows.shape[1]),
            limit=config["memory_mb"] * 2**20,
        )
    except FloatingPointError as error:
        raise UserError(f"{config['model']}: {error}; {overflow(streamed.model.dtype)}") from error
    record = _record(config, streamed, plan, calibration, pruned, key, started)
    results.write_config(staging, config)
    results.write_json(staging / RECORD, record)
    reports(staging).rename(staging / "finished")
    return record


# --- checks ------------------------------------------------------------------------------------------------------------


def _check(config: Mapping[str, Any]) -> tuple[Goal, dict[str, Goal]]:
    """Everything that can be said before the model is opened. Raises UserError."""
    for name in ("batch_size", "memory_mb", "block_size", "perplexity_windows", "samples"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {config[name]}: it must be at least 1")
    if config["seq_len"] is not None and config["seq_len"] < 2:
        raise UserError(f"--seq-len {config['seq_len']}: at least two tokens are needed")
    if not 0 <= config["seed"] < 2**31:
        raise UserError(f"--seed {config['seed']}: it must be from 0 to {2**31 - 1}")
    if not config["damping"] > 0:
        raise UserError(f"--damping {config['damping']}: it must be positive")
    if config["perplexity"] is not None and not Path(config["perplexity"]).is_file():
        raise UserError(f"perplexity file {config['perplexity']}: no such file; give a text, JSON or JSONL file")
    if config["perplexity_windows"] is not None and config["perplexity"] is None:
        raise UserError("--perplexity-windows goes with --perplexity FILE; give the file")
    goal = _goal(config)
    _check_together(config, goal)
    if config["out"] is not None:
        out = Path(config["out"]).expanduser().absolute()
        if out == Path(config["model"]).expanduser().absolute():
            raise UserError(f"--out {config['out']} is the model itself; choose another folder")
        results.check_free(out, overwrite=config["overwrite"], resume=config["resume"])
    elif config["resume"]:
        raise UserError("--resume goes on with an interrupted run; say where with --out")
    return goal, _overrides(config["sparsity_map"])


def _check_together(config: Mapping[str, Any], goal: Goal) -> None:
    """Options that do not go together. Raises UserError."""
    method, owl = config["method"], config["allocation"] == "owl"
    if config["variant"] and method != "wanda":
        raise UserError(f"--variant is one of wanda, not of {method}; leave it out")
    if config["variant"] and goal.of:
        raise UserError(f"--variant moves weights between rows; it does not go with --pattern {goal}")
    if method == "structured" and (goal.of or config["sparsity_map"] or owl):
        raise UserError(
            "structured removes the same share of whole neurons in every layer, since config.json holds one size; leave --pattern, --sparsity-map and --allocation out"
        )
    if owl and goal.of:
        raise UserError(f"--allocation owl varies the share from block to block; it does not go with --pattern {goal}")
    if config["calibration"] == "none" and (method != "magnitude" or owl):
        raise UserError("--calibration none goes with magnitude and uniform allocation only; the others need a text")
    if not 0 < config["owl_spread"] < 1 or not config["owl_threshold"] > 1:
        raise UserError("--owl-spread must lie between 0 and 1, --owl-threshold above 1")


def _goal(config: Mapping[str, Any]) -> Goal:
    sparsity, pattern = config["sparsity"], config["pattern"]
    if pattern in (None, "unstructured"):
        if sparsity is None:
            raise UserError("say how much to prune: --sparsity 0.5, or --pattern 2:4")
        return Goal.parse(sparsity)
    if ":" not in pattern:
        raise UserError(f"pattern {pattern!r} is unknown; write unstructured, or N:M such as 2:4")
    goal = Goal.parse(pattern)
    if sparsity is not None and abs(sparsity - goal.sparsity) > 1e-9:
        raise UserError(
            f"--pattern {pattern} removes {goal.sparsity:g} of the weights, not {sparsity:g}; leave --sparsity out"
        )
    return goal


def _overrides(path: str | None) -> dict[str, Goal]:
    if path is None:
        return {}
    try:
        # scalars as they are written: YAML would read 2:4 as a time of day
        content = yaml.load(Path(path).read_text("utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"sparsity map {path} cannot be read ({first}); give a YAML file of module patterns and shares"
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


def _open(config: Mapping[str, Any], scratch: Path) -> StreamedModel:
    streamed = stream_model(
        config["model"],
        scratch,
        dtype=config["dtype"],
        device=config["device"],
        revision=config["revision"],
        trust_remote_code=config["trust_remote_code"],
    )
    if config["calibration"] == "none" and ":" in (config["pattern"] or "") and has_fused_experts(streamed):
        raise UserError(
            "--calibration none: which way the experts of this model lie is seen only when a text runs; give a text with --pattern"
        )
    return streamed


def _length(config: Mapping[str, Any], streamed: StreamedModel) -> int:
    """Tokens of a calibration sample."""
    return int(
        config["seq_len"] or min(256 if config["calibration"] == SELF else 2048, streamed.loaded.context or 2048)
    )


def _batch(config: Mapping[str, Any], streamed: StreamedModel, length: int) -> int:
    """Samples at a time; one where experts are fused, since which rows an expert gets must not depend on the batch."""
    tokens = _TOKENS_ON_GPU if streamed.device.type == "cuda" else _TOKENS_AT_A_TIME
    return 1 if has_fused_experts(streamed) else int(config["batch_size"] or max(1, tokens // length))


def _texts(config: Mapping[str, Any], streamed: StreamedModel) -> tuple[Calibration | None, Tensor | None]:
    def sampler() -> LoadedModel:
        options = {name: config[name] for name in ("dtype", "device", "trust_remote_code")}
        full = load_model(str(streamed.folder), **options)
        full.ref, full.identity = streamed.loaded.ref, streamed.loaded.identity
        return full

    windows = None
    if config["perplexity"] is not None:
        windows = perplexity_tokens(
            streamed.loaded, config["perplexity"], length=config["seq_len"], windows=config["perplexity_windows"]
        )
    calibration = None
    if config["calibration"] != "none":
        calibration = calibration_tokens(
            streamed.loaded,
            config["calibration"],
            samples=config["samples"],
            seq_len=config["seq_len"],
            seed=config["seed"],
            cache=cache_folder() if config["cache"] else None,
            sampler=sampler,
        )
    return calibration, windows


def _allocation(
    config: Mapping[str, Any],
    streamed: StreamedModel,
    goal: Goal,
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
                f"{staging} was begun with another model, text or options; go on with those, or start anew with --overwrite"
            )
        found: list[float] | None = kept["by_layer"]
        return found
    for part in staging.glob("*.safetensors"):  # of nobody knows what
        part.unlink()
    by_layer = None
    if config["allocation"] == "owl" and calibration is not None:
        by_layer = owl_sparsities(
            streamed,
            calibration.tokens,
            goal.sparsity,
            threshold=config["owl_threshold"],
            spread=config["owl_spread"],
            batch_size=batch_size,
            limit=config["memory_mb"] * 2**20,
            file=staging / "scratch" / "outliers.bin",
        )
    path.parent.mkdir(exist_ok=True)
    results.write_json(path, {"key": key, "by_layer": by_layer})
    return by_layer


def _key(
    config: Mapping[str, Any],
    streamed: StreamedModel,
    calibration: Calibration | None,
    windows: Tensor | None,
    overrides: Mapping[str, Goal],
) -> str:
    """Names everything that decides the result."""
    text = None if calibration is None else {k: v for k, v in calibration.describe().items() if k != "source"}
    content = {
        "config": {name: value for name, value in config.items() if name not in (*_FREE, *_BY_CONTENT)},
        "map": {pattern: str(goal) for pattern, goal in overrides.items()},
        "model": streamed.loaded.identity,
        "dtype": str(streamed.model.dtype),
        "device": streamed.device.type,
        "calibration": text,
        "windows": None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "versions": {name: version(name) for name in ("prunescope", "torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _record(
    config: Mapping[str, Any],
    streamed: StreamedModel,
    plan: Plan,
    calibration: Calibration | None,
    pruned: Pruned,
    key: str,
    started: float,
) -> dict[str, Any]:
    loaded = streamed.loaded
    before = loaded.record or {}
    earlier = list(before.get("pruned_before", []))
    if before.get("command") == "sparsify":
        earlier.append({name: before.get(name) for name in ("base", "method", "asked", "sparsity")})
    return {
        "schema_version": 1,
        "command": "sparsify",
        "format": before.get("format", "sparsified"),
        "base": loaded.identity,
        "architecture": type(loaded.model).__name__,
        "dense_layers": loaded.dense_layers,
        "kept_layers": list(loaded.layer_map),
        "drop_attn_list": before.get("drop_attn_list", []),
        "drop_mlp_list": before.get("drop_mlp_list", []),
        "pruned_before": earlier,
        "method": plan.method,
        "asked": config["pattern"] if config["pattern"] not in (None, "unstructured") else config["sparsity"],
        "sparsity": _overall(plan, pruned.rows),
        "perplexity": pruned.perplexity or None,
        "calibration": None if calibration is None else calibration.describe(),
        "config_changes": pruned.config,
        "modules": pruned.rows,
        "config": dict(config),
        "key": key,
        "versions": {name: version(name) for name in ("prunescope", "torch", "transformers")},
        "device": torch.cuda.get_device_name(streamed.device)
        if streamed.device.type == "cuda"
        else str(streamed.device),
        "wall_time_s": round(time.monotonic() - started, 3),
    }


def _overall(plan: Plan, rows: list[dict[str, Any]]) -> float:
    """Share of zero weights in the pruned matrices; of neurons removed for `structured`."""
    if plan.method == "structured":
        return float(sum(row["removed"] for row in rows) / sum(row["neurons"] for row in rows))
    return float(sum(row["zeros"] for row in rows) / sum(row["outputs"] * row["inputs"] for row in rows))


def _finished(config: Mapping[str, Any]) -> SparsifyResult:
    """What ``--resume`` finds complete."""
    folder = Path(config["out"]).expanduser()
    record = _same(config, folder)
    console.print(f"complete already: {folder}", markup=False)
    return SparsifyResult(record, folder)


def _same(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The record of a complete folder. Raises UserError if it was made of something else."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
        made_with = dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} exists and is no checkpoint of sparsify; choose another --out or give --overwrite"
        ) from error
    if any(made_with.get(name) != value for name, value in config.items() if name not in _FREE):
        raise UserError(
            f"{folder} is complete, but was made with other options; choose another --out or give --overwrite"
        )
    return record


def _dry_run(config: Mapping[str, Any], goal: Goal, overrides: Mapping[str, Goal], folder: Path) -> SparsifyResult:
    streamed = _open(config, folder)
    options: Any = {name: config[name] for name in ("block_size", "damping", "variant")} | {"overrides": overrides}
    plan = make_plan(streamed, config["method"], goal, **options)
    length = _length(config, streamed)
    default = 32 if config["calibration"] == SELF else 128
    samples = 0 if config["calibration"] == "none" else config["samples"] or default
    tokens_at_a_time = _batch(config, streamed, length) * length
    found = estimate(streamed, plan, samples * length, tokens_at_a_time, config["memory_mb"] * 2**20)
    record = {"method": plan.method, "perplexity": None} | found | {"config": dict(config)}
    show_plan(record)
    return SparsifyResult(record, None)
