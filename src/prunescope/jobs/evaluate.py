"""`prunescope evaluate` from its options to a finished run."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from prunescope.commands import EvaluateResult
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.progress import console
from prunescope.report.scores import show_scores_of_tasks
from prunescope.runs import folder as results
from prunescope.runs.parts import part, resume_state, save_state
from prunescope.runs.provenance import run_record
from prunescope.stats_paired import compare_scores
from prunescope.tasks import quick
from prunescope.tasks.evaluate import ITEMS_SCHEMA, at_floor, evaluate_model, expand_tasks

__all__ = ["run_evaluate"]

_EVALUATED = ("limit", "shots", "batch_size", "seed", "allow_code_execution", "max_new_tokens")
_SCHEMA = pa.schema([("model", pa.string()), *ITEMS_SCHEMA])


def run_evaluate(config: dict[str, Any]) -> EvaluateResult:
    """See `prunescope.evaluate`, whose options ``config`` holds."""
    started = time.monotonic()
    refs: list[Any] = list(config["models"])
    names = expand_tasks([name.strip() for name in config["tasks"].split(",")])
    _check(config, refs, names)
    data = None if config["data"] is None else Path(config["data"]).expanduser()
    harness = [name for name in names if name not in quick.QUICK]
    if harness:
        from prunescope.tasks.harness import check_tasks

        check_tasks(harness, data, config["allow_code_execution"])
    out, labels = config["out"], _labels(refs)
    options = {name: config[name] for name in ("dtype", "device", "trust_remote_code")}
    dense = load_model(refs[0], revision=config["revision"], **options)
    key = _key(dense, labels, names, config)
    if config["resume"] and out is not None and Path(out).expanduser().exists():
        return _finished(out, key)
    folder = (
        results.staged(out, overwrite=config["overwrite"], resume=config["resume"])
        if out is not None
        else nullcontext()
    )
    units = _units(names)
    with folder as staging:
        if resume_state(staging, key) is None:
            save_state(staging, key, [])
        tables, described, whole = [], {}, {}
        scores: dict[str, dict[str, Any]] = {}
        for number, (ref, label) in enumerate(zip(refs, labels, strict=True)):
            with _model(dense, ref, number, options) as loaded:
                described[label] = loaded.describe()
                for at, unit in enumerate(units):
                    console.print(f"{label}: {', '.join(unit)}", markup=False)

                    def measure(
                        unit: Sequence[str] = unit, loaded: LoadedModel = loaded, label: str = label, at: int = at, number: int = number
                    ) -> pa.Table:  # fmt: skip
                        found = evaluate_model(loaded, unit, data=data, **{name: config[name] for name in _EVALUATED})
                        for task, own in found.harness.items():
                            whole[f"{number}-{at}-{_safe(task)}"] = own
                            if staging is not None:
                                write_harness(staging / "harness", f"{number}-{at}-{_safe(task)}", label, own)
                        said = {"scores": found.scores, "model": _identity(loaded)}
                        return found.items.replace_schema_metadata({"prunescope": json.dumps(said)})

                    table = part(staging, number * len(units) + at, measure)
                    said = json.loads(table.schema.metadata[b"prunescope"])
                    if said["model"] != _identity(loaded):
                        raise UserError(
                            f"{out}: {label} is not the model it was when this run was begun; start anew with --overwrite"
                        )
                    scores.setdefault(label, {}).update(said["scores"])
                    tables.append(
                        table.replace_schema_metadata(None).add_column(0, "model", pa.array([label] * len(table), pa.string()))
                    )  # fmt: skip
        table = pa.concat_tables(tables).cast(_SCHEMA)
        info = {
            **_record(config, dense, described, started),
            "key": key,
            "tasks": list(scores[labels[0]]),
            "pairs": [pair for pair in quick.PAIRS if {f"{pair}-gen", f"{pair}-mc"} <= set(names)],
            "summary": scores,
            "paired": _paired(table, labels, config["seed"]),
            "says_nothing": {t: why for t, entry in scores[labels[0]].items() if (why := at_floor(entry))},
        }
        result = EvaluateResult(info, table, whole)
        if staging is not None:
            result._write(staging)
    show_scores_of_tasks(info)
    return result


def write_harness(folder: Path, name: str, label: str, found: dict[str, Any]) -> None:
    """The harness's own results as JSON, and its samples as JSONL, a file a task; ``label`` says which model it was."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(exist_ok=True)
    samples = found.get("samples", {})
    rest = {key: value for key, value in found.items() if key != "samples"} | {"prunescope_model": label}
    text = json.dumps(rest, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (folder / f"results_{name}.json").write_text(text + "\n", "utf-8", "backslashreplace")
    for task, rows in samples.items():
        lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"samples_{name}_{_safe(task)}.jsonl").write_text("".join(lines), "utf-8", "backslashreplace")


def _check(config: dict[str, Any], refs: list[Any], names: list[str]) -> None:
    """What can be said before anything is loaded. Raises UserError."""
    if not refs:
        raise UserError("evaluate needs a model: prunescope evaluate MODEL... --tasks quick")
    if isinstance(refs[0], str) and refs[0].startswith("drop:"):
        raise UserError(f"{refs[0]}: the first model is the dense one; a drop: goes behind it")
    for ref in refs[1:]:
        if isinstance(ref, str) and ref.startswith("drop:"):
            DropSpec.parse(ref.removeprefix("drop:"))
    for name, least in (("limit", 1), ("shots", 0), ("batch_size", 1), ("max_new_tokens", 1)):
        if config[name] is not None and config[name] < least:
            raise UserError(f"--{name.replace('_', '-')} {config[name]}: it must be at least {least}")
    if not 0 <= config["seed"] < 2**31:
        raise UserError(f"--seed {config['seed']}: it must be from 0 to {2**31 - 1}")
    if config["data"] is not None and not Path(config["data"]).expanduser().is_dir():
        raise UserError(f"--data {config['data']}: no such folder")
    if config["out"] is not None:
        results.check_free(config["out"], overwrite=config["overwrite"], resume=config["resume"])


def _labels(refs: Sequence[Any]) -> list[str]:
    """What each model is called in the tables: as the user wrote it, numbered where that is twice the same."""
    labels: list[str] = []
    for ref in map(str, refs):
        count = sum(label == ref or label.startswith(f"{ref} (") for label in labels)
        labels.append(f"{ref} ({count + 1})" if count else ref)
    return labels


def _units(names: Sequence[str]) -> list[list[str]]:
    """What is measured and kept together: both tasks of a quick pair, else one task."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(quick.pair_of(name) if name in quick.QUICK else f"/{name}", []).append(name)
    return list(found.values())


@contextmanager
def _model(dense: LoadedModel, ref: Any, number: int, options: dict[str, Any]) -> Iterator[LoadedModel]:
    """The dense model, the dense one with sublayers dropped, or another, which is freed when the block ends."""
    if number == 0:
        yield dense
    elif isinstance(ref, str) and ref.startswith("drop:"):
        with dense.dropping(DropSpec.parse(ref.removeprefix("drop:"))):
            yield dense
    else:
        loaded = load_model(ref, **options)
        yield loaded
        del loaded
        gc.collect()


def _identity(loaded: LoadedModel) -> dict[str, str]:
    return {**loaded.identity, "dropped": str(loaded.dropped)}


def _key(dense: LoadedModel, labels: list[str], names: list[str], config: dict[str, Any]) -> str:
    """What a run follows from, but for batch size."""
    parts = [
        _identity(dense),
        labels,
        names,
        str(dense.dtype),
        {k: config[k] for k in (*_EVALUATED, "data") if k != "batch_size"},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _finished(out: str, key: str) -> EvaluateResult:
    run = results.open_run(out)
    if run.info.get("key") != key:
        raise UserError(
            f"{out} is complete, but was made with other models, tasks or options; choose another --out or give --overwrite"
        )
    return EvaluateResult(run.info, run.table(), {})


def _record(config: dict[str, Any], dense: LoadedModel, described: dict[str, Any], started: float) -> dict[str, Any]:
    plain = config | {"models": [str(ref) for ref in config["models"]]}
    record = run_record("evaluate", plain | {"dense": None, "target": None}, dense, None, started)
    try:
        from importlib.metadata import version

        record["versions"]["lm_eval"] = version("lm_eval")
    except ImportError:
        pass
    return record | {"config": plain, "models": described}


def _paired(table: pa.Table, labels: Sequence[str], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Of every model but the first, task by task, against the first."""
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for row in table.to_pylist():
        rows[row["model"]].append(row)
    return {label: compare_scores(rows[labels[0]], rows[label], seed=seed) for label in labels[1:]}


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
