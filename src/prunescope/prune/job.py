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

from prunescope import results
from prunescope.cache import cache_folder
from prunescope.commands import SparsifyResult
from prunescope.data.calibration import SELF, Calibration, calibration_tokens, perplexity_tokens
from prunescope.errors import UserError
from prunescope.models.loading import RECORD, LoadedModel, load_model
from prunescope.models.streaming import StreamedModel, stream_model
from prunescope.progress import console
from prunescope.prune.estimate import estimate
from prunescope.prune.selection import Goal
from prunescope.prune.sparsify import Plan, Pruned, has_fused_experts, make_plan, owl_sparsities, prune_model
from prunescope.report.tables import show_plan, show_sparsified

__all__ = ["run_sparsify"]

_TOKENS_AT_A_TIME = 2048
_KEY = "part-key.json"


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
    with (
        results.staged(out, overwrite=config["overwrite"], resume=config["resume"]) as staging,
        _interruptible(staging),
    ):
        streamed, batch_size = _open(config, staging / "scratch")
        results.require_space(out, sum(tensor.nbytes for tensor in streamed.stored.values()) + 2**24)
        calibration, windows = _texts(config, streamed, batch_size)
        key = _key(config, streamed, calibration, windows)
        plan = _plan(config, streamed, goal, overrides, calibration, batch_size, staging, key)
        try:
            pruned = prune_model(
                streamed, plan, None if calibration is None else calibration.tokens, staging,
                perplexity=windows, batch_size=batch_size, limit=config["memory_mb"] * 2**20,
            )  # fmt: skip
        except FloatingPointError as error:
            raise UserError(
                f"{config['model']}: {error}; the activations overflow in {streamed.model.dtype}, try --dtype float32"
            ) from error
        record = _record(config, streamed, plan, calibration, pruned, key, started)
        results.write_config(staging, config)
        results.write_json(staging / RECORD, record)
    show_sparsified(record)
    if config["out"] is not None:
        console.print(f"written: {out}", markup=False)
    result = SparsifyResult(record, Path(out))
    if held is not None:
        weakref.finalize(result, shutil.rmtree, held, ignore_errors=True)
    return result


# --- checks ------------------------------------------------------------------------------------------------------------


def _check(config: Mapping[str, Any]) -> tuple[Goal, dict[str, Goal]]:
    """Everything that can be said before the model is opened. Raises UserError."""
    for name in ("batch_size", "memory_mb", "block_size", "perplexity_windows", "samples"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {config[name]}: it must be at least 1")
    if not 0 <= config["seed"] < 2**31:
        raise UserError(f"--seed {config['seed']}: it must be from 0 to {2**31 - 1}")
    if not config["damping"] > 0:
        raise UserError(f"--damping {config['damping']}: it must be positive")
    if config["variant"] and config["method"] != "wanda":
        raise UserError(f"--variant is one of wanda, not of {config['method']}; leave it out")
    if config["calibration"] == "none" and (config["method"] != "magnitude" or config["allocation"] == "owl"):
        raise UserError("--calibration none goes with magnitude and uniform allocation only; the others need a text")
    if config["perplexity_windows"] is not None and config["perplexity"] is None:
        raise UserError("--perplexity-windows goes with --perplexity FILE; give the file")
    goal = _goal(config)
    if config["allocation"] == "owl" and goal.of:
        raise UserError(f"--allocation owl varies the share from block to block; it does not go with --pattern {goal}")
    if not 0 < config["owl_spread"] < 1 or not config["owl_threshold"] > 1:
        raise UserError("--owl-spread must lie between 0 and 1, --owl-threshold above 1")
    if config["out"] is not None:
        results.check_free(config["out"], overwrite=config["overwrite"], resume=config["resume"])
    elif config["resume"]:
        raise UserError("--resume goes on with an interrupted run; say where with --out")
    return goal, _overrides(config["sparsity_map"])


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
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"sparsity map {path} cannot be read ({first}); give a YAML file of module patterns and shares"
        ) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"sparsity map {path} holds no 'pattern: share' lines; write for example '*.down_proj: 0.4'")
    try:
        return {str(pattern): Goal.parse(_minutes(value)) for pattern, value in content.items()}
    except UserError as error:
        raise UserError(f"sparsity map {path}: {error}") from error


def _minutes(value: Any) -> Any:
    """YAML 1.1 reads an unquoted 2:4 as two minutes and four seconds."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return value


# --- stages ------------------------------------------------------------------------------------------------------------


@contextmanager
def _interruptible(staging: Path) -> Iterator[None]:
    """What was converted is of use to a resumed run only with a finished block; without one nothing is left behind."""
    try:
        yield
    except BaseException:
        if not any(staging.glob("part-*.safetensors")):
            (staging / _KEY).unlink(missing_ok=True)
        raise


def _open(config: Mapping[str, Any], scratch: Path) -> tuple[StreamedModel, int]:
    streamed = stream_model(
        config["model"], scratch, dtype=config["dtype"], device=config["device"],
        revision=config["revision"], trust_remote_code=config["trust_remote_code"],
    )  # fmt: skip
    length = config["seq_len"] or (256 if config["calibration"] == SELF else min(2048, streamed.loaded.context or 2048))
    batch_size = config["batch_size"] or max(1, _TOKENS_AT_A_TIME // length)
    return streamed, 1 if has_fused_experts(streamed) else batch_size


def _texts(
    config: Mapping[str, Any], streamed: StreamedModel, batch_size: int
) -> tuple[Calibration | None, Tensor | None]:
    def sampler() -> LoadedModel:
        full = load_model(
            str(streamed.folder),
            dtype=config["dtype"],
            device=config["device"],
            trust_remote_code=config["trust_remote_code"],
        )
        full.ref, full.identity = streamed.loaded.ref, streamed.loaded.identity
        return full

    calibration = None
    if config["calibration"] != "none":
        calibration = calibration_tokens(
            streamed.loaded, config["calibration"], samples=config["samples"], seq_len=config["seq_len"], seed=config["seed"],
            cache=cache_folder() if config["cache"] else None, sampler=sampler,
        )  # fmt: skip
    windows = None
    if config["perplexity"] is not None:
        windows = perplexity_tokens(
            streamed.loaded, config["perplexity"], length=config["seq_len"], windows=config["perplexity_windows"]
        )
    return calibration, windows


def _plan(
    config: Mapping[str, Any],
    streamed: StreamedModel,
    goal: Goal,
    overrides: Mapping[str, Goal],
    calibration: Calibration | None,
    batch_size: int,
    staging: Path,
    key: str,
) -> Plan:
    """The plan of a run that is resumed (outliers are not counted again), else a new one, kept for that."""
    options: Any = {name: config[name] for name in ("block_size", "damping", "variant")} | {"overrides": overrides}
    make_plan(streamed, config["method"], goal, **options)  # complain before any work
    path = staging / _KEY
    by_layer = None
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["key"] != key:
            raise UserError(
                f"{staging} was begun with another model, text or options; go on with those, or start anew with --overwrite"
            )
        by_layer = kept["by_layer"]
    elif config["allocation"] == "owl" and calibration is not None:
        by_layer = owl_sparsities(
            streamed, calibration.tokens, goal.sparsity, threshold=config["owl_threshold"], spread=config["owl_spread"],
            batch_size=batch_size, limit=config["memory_mb"] * 2**20, file=staging / "scratch" / "outliers.bin",
        )  # fmt: skip
    results.write_json(path, {"key": key, "by_layer": by_layer})
    return make_plan(streamed, config["method"], goal, by_layer=by_layer, **options)


def _key(
    config: Mapping[str, Any], streamed: StreamedModel, calibration: Calibration | None, windows: Tensor | None
) -> str:
    """Names everything that decides the result."""
    left_out = ("out", "overwrite", "resume", "cache", "dry_run", "memory_mb", "model")
    content = {
        "config": {name: value for name, value in config.items() if name not in left_out},
        "map": {pattern: str(goal) for pattern, goal in _overrides(config["sparsity_map"]).items()},
        "model": streamed.loaded.identity,
        "dtype": str(streamed.model.dtype),
        "device": streamed.device.type,
        "calibration": None if calibration is None else calibration.describe(),
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
    """What ``--resume`` finds complete. Raises UserError if it was made of something else."""
    folder = Path(config["out"]).expanduser()
    path = folder / RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
        made_with = dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} exists and is no checkpoint of sparsify; choose another --out or give --overwrite"
        ) from error
    free = ("out", "overwrite", "resume", "cache", "memory_mb")
    if any(made_with.get(name) != value for name, value in config.items() if name not in free):
        raise UserError(
            f"{folder} is complete, but was made with other options; choose another --out or give --overwrite"
        )
    console.print(f"complete already: {folder}", markup=False)
    return SparsifyResult(record, folder)


def _dry_run(config: Mapping[str, Any], goal: Goal, overrides: Mapping[str, Goal], folder: Path) -> SparsifyResult:
    streamed, batch_size = _open(config, folder)
    options: Any = {name: config[name] for name in ("block_size", "damping", "variant")} | {"overrides": overrides}
    plan = make_plan(streamed, config["method"], goal, **options)
    default = (32, 256) if config["calibration"] == SELF else (128, min(2048, streamed.loaded.context or 2048))
    samples, length = config["samples"] or default[0], config["seq_len"] or default[1]
    tokens = 0 if config["calibration"] == "none" else samples * length
    found = estimate(streamed, plan, tokens, batch_size * length, config["memory_mb"] * 2**20)
    record = (
        {"method": plan.method, "sparsity": found["sparsity"], "perplexity": None} | found | {"config": dict(config)}
    )
    show_plan(record)
    return SparsifyResult(record, None)
