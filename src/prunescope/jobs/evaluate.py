"""`prunescope evaluate`: scores of models on tasks, each compared with the first."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from prunescope.cache import cache_folder
from prunescope.compare.context import check_pair, switched
from prunescope.compare.familiar import check_rungs, likenesses
from prunescope.data.prompts import read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, listed
from prunescope.models.loaded import LoadedModel
from prunescope.models.variants import Variant, VariantSpec, read_variant
from prunescope.progress import console
from prunescope.report.terminal.scoring import show_scores_of_tasks
from prunescope.results import EvaluateResult
from prunescope.runs.parts import begin, notes_of, read_part, with_notes, write_part
from prunescope.runs.provenance import run_record
from prunescope.runs.workers import Compute, sharing
from prunescope.sweep.comparison import DenseReference, ladder_of, write_texts
from prunescope.tasks import quick
from prunescope.tasks.evaluate import evaluate_model, expand_tasks
from prunescope.tasks.harness import check_tasks, file_name, own_files, write_harness
from prunescope.tasks.scores import ITEMS_SCHEMA, at_floor, compare_scores

__all__ = ["EvaluateOptions", "run"]

_KL_STEPS = 32  # tokens of the dense model's own after each prompt, on which KL is measured
Found = tuple[pa.Table, dict[str, Any]]  # items with their notes, and what lm-evaluation-harness returned of each task
_SCHEMA = pa.schema([("model", pa.string()), *ITEMS_SCHEMA])


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """See `prunescope.evaluate`."""

    LEAST: ClassVar[Mapping[str, int]] = {**Options.LEAST, "max_new_tokens": 1}

    models: list[Model]
    tasks: str
    limit: int | None
    shots: int | None
    max_new_tokens: int | None
    data: str | None
    allow_code_execution: bool
    seed: int
    batch_size: int
    ladder: str | None
    cache: bool
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        if not self.models:
            raise UserError("evaluate needs a model: prunescope evaluate MODEL... --tasks quick")
        if VariantSpec.names(self.models[0]):
            raise UserError(f"{self.models[0]}: the first model is the dense one; a drop: or quant: goes after it")
        for ref in self.models[1:]:
            read_variant(ref)
        super().check()
        check_rungs(self.ladder)
        if self.data is not None and not Path(self.data).expanduser().is_dir():
            raise UserError(f"--data {self.data}: no such folder")

    def scoring(self) -> dict[str, Any]:
        """The options of `evaluate_model`, but for the folder of data."""
        names = ("limit", "shots", "batch_size", "seed", "allow_code_execution", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


def run(options: EvaluateOptions) -> EvaluateResult:
    started = time.monotonic()
    options.check()
    names = expand_tasks(listed(options.tasks))
    data = None if options.data is None else Path(options.data).expanduser()
    harness = [name for name in names if name not in quick.QUICK]
    if harness:
        check_tasks(harness, data, options.allow_code_execution)
    labels = _labels(options.models)
    dense = options.loading.load(options.models[0])
    key = _key(dense, labels, names, options, own_files(harness, data))
    if done := options.output.complete(key, "other models, tasks or options"):
        options.output.say_complete()
        return EvaluateResult.of_run(done)
    units = _units(names)
    with (
        options.output.staged() as staging,
        options.spread.started(_load_first, list(options.models), options.loading, dense) as workers,
    ):
        begin(staging, key)
        scale = None if options.ladder is None else _Scale(dense, options)
        tables, described, whole = [], {}, {}
        scores: dict[str, dict[str, Any]] = {}
        for number, (ref, label) in enumerate(zip(options.models, labels, strict=True)):
            with _model(dense, ref, number, options.loading) as loaded:
                described[label] = loaded.describe()
                first = number * len(units)
                if scale is not None:
                    scale.measure(label, loaded, number)
                parts = {at: table for at in range(len(units)) if (table := read_part(staging, first + at)) is not None}
                missing = [at for at in range(len(units)) if at not in parts]

                def keep(
                    place: int, found: Found, number: int = number, label: str = label, missing: list[int] = missing, parts: dict[int, pa.Table] = parts
                ) -> None:  # fmt: skip
                    at = missing[place]
                    console.print(f"{label}: {', '.join(units[at])}", markup=False)
                    parts[at], harness_found = found
                    for task, own in harness_found.items():
                        name = f"{number}-{at}-{file_name(task)}"
                        whole[name] = own
                        if staging is not None:
                            write_harness(staging / "harness", name, label, own)
                    write_part(staging, number * len(units) + at, parts[at])

                scoring = options.scoring() | {"data": data}
                make = partial(_scoring, ref=str(ref), number=number, loading=options.loading, scoring=scoring)
                here = partial(_scored, loaded, scoring=scoring)
                sharing(workers, make)([units[at] for at in missing], here, keep)
                for at in range(len(units)):
                    said = notes_of(parts[at])
                    if said["model"] != _identity(loaded):
                        raise UserError(
                            f"{options.output.out}: {label} is not the model it was when this run was begun; start over with --overwrite"
                        )
                    scores.setdefault(label, {}).update(said["scores"])
                    column = pa.array([label] * len(parts[at]), pa.string())
                    tables.append(parts[at].replace_schema_metadata(None).add_column(0, "model", column))
        table = pa.concat_tables(tables).cast(_SCHEMA)
        info = {
            **run_record("evaluate", options.config(), dense.device, described, started, "lm_eval"),
            "key": key,
            "tasks": list(scores[labels[0]]),
            "pairs": [pair for pair in quick.PAIRS if {f"{pair}-gen", f"{pair}-mc"} <= set(names)],
            "summary": scores,
            "paired": _paired(table, labels, options.seed),
            "paired_with_previous": _paired(table, labels[1:], options.seed, previous=True),
            **({} if scale is None else scale.found()),
            "says_nothing": {t: why for t, entry in scores[labels[0]].items() if (why := at_floor(entry))},
        }
        result = EvaluateResult(info, table, harness=whole)
        if staging is not None:
            result.write(staging)
    show_scores_of_tasks(info)
    options.output.say_written()
    return result


def _scored(loaded: LoadedModel, unit: Sequence[str], *, scoring: dict[str, Any]) -> Found:
    found = evaluate_model(loaded, unit, **scoring)
    return with_notes(found.items, {"scores": found.scores, "model": _identity(loaded)}), found.harness


def _load_first(*models_and_loading: Any) -> tuple[LoadedModel]:
    """The dense model alone; `_scoring` loads the others, one at a time."""
    loading: LoadOptions = models_and_loading[-1]
    return (loading.load(models_and_loading[0]),)


def _scoring(dense: LoadedModel, *, ref: str, number: int, loading: LoadOptions, scoring: dict[str, Any]) -> Compute:
    """A unit of tasks -> what the model scores on it, for a worker."""
    spec = read_variant(ref) if number else None
    loaded = loading.load_other(ref) if number and spec is None else dense
    changed = Variant(dense, spec) if isinstance(spec, VariantSpec) else spec

    def compute(unit: Sequence[str]) -> Found:
        with switched(dense, changed if changed is not None else loaded) as model:
            return _scored(model, unit, scoring=scoring)

    return compute


def _labels(refs: Sequence[Model]) -> list[str]:
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
def _model(dense: LoadedModel, ref: Model, number: int, loading: LoadOptions) -> Iterator[LoadedModel]:
    """The dense model, the dense one with sublayers dropped, or another, which is freed when the block ends."""
    if number == 0:
        yield dense
    elif (spec := read_variant(ref)) is not None:
        with switched(dense, Variant(dense, spec) if isinstance(spec, VariantSpec) else spec):
            yield dense
    else:
        loaded = loading.load_other(ref)
        yield loaded
        del loaded
        gc.collect()


class _Scale:
    """KL(dense || model) on what the dense model writes after the shipped prompts, and its place among the dense model's own rungs there."""

    def __init__(self, dense: LoadedModel, options: EvaluateOptions) -> None:
        self._dense = dense
        self._kl: dict[str, dict[str, Any]] = {}
        texts = write_texts(dense, encode(dense, read_prompts(None), _KL_STEPS), _KL_STEPS, batch_size=8)
        self._reference = DenseReference(dense, texts, seed=options.seed)
        self._rungs = ladder_of(
            dense, texts, check_rungs(options.ladder), cache=cache_folder() if options.cache else None
        )

    def measure(self, label: str, loaded: LoadedModel, number: int) -> None:
        """Raises UserError for another vocabulary."""
        if number:
            if loaded is not self._dense:
                check_pair(self._dense, loaded)
            stats = self._reference.measure(loaded, self._dense)["p"]["kl_dense_target"]
            self._kl[label] = {"mean": stats["mean"], "ci95": stats["ci95"]}

    def found(self) -> dict[str, Any]:
        """The parts of run.json that say it."""
        return {
            "kl": self._kl,
            "ladder": [asdict(rung) for rung in self._rungs],
            "like": likenesses({label: kl["mean"] for label, kl in self._kl.items()}, self._rungs),
        }


def _identity(loaded: LoadedModel) -> dict[str, str]:
    return {**loaded.identity, "dropped": str(loaded.dropped)}


def _key(
    dense: LoadedModel, labels: list[str], names: list[str], options: EvaluateOptions, files: dict[str, str]
) -> str:
    """What a run follows from, but for batch size."""
    scoring = {name: value for name, value in options.scoring().items() if name != "batch_size"}
    parts: list[Any] = [_identity(dense), labels, names, str(dense.dtype), scoring | {"data": options.data}]
    if files:
        parts.append(files)
    if options.ladder is not None:
        parts.append(check_rungs(options.ladder))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _paired(
    table: pa.Table, labels: Sequence[str], seed: int, previous: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """Of every model but the first, task by task, against the first, or against the one before it."""
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for row in table.to_pylist():
        rows.setdefault(row["model"], []).append(row)
    bases = list(labels) if previous else list(labels[:1]) * len(labels)
    return {
        label: compare_scores(rows[base], rows[label], seed=seed)
        for base, label in zip(bases, labels[1:], strict=False)
    }
