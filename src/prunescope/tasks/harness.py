"""Tasks of EleutherAI's lm-evaluation-harness on a model that is loaded already (the extra ``eval``).

The harness's own `HFLM` gets our model and runs its own tasks: prompts, metrics and numbers are the harness's. Ours is only where the
data comes from (``--data``) and where generated code runs (`sandbox`).
"""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunescope.data.asked import sha256_of
from prunescope.data.jsonl import holds_rows
from prunescope.errors import UserError, first_line
from prunescope.models.hub import one_try
from prunescope.models.loaded import LoadedModel
from prunescope.stats import normal_interval
from prunescope.tasks.local_data import dataset_of, read_dataset, read_rows
from prunescope.tasks.sandbox import CodeEval
from prunescope.tasks.scores import score

__all__ = ["check_tasks", "evaluate_harness", "file_name", "own_files", "write_harness"]

_GUESSED = ("acc_norm", "acc")  # what is quoted of a task that has both


def check_tasks(tasks: Sequence[str], data: Path | None, allow_code_execution: bool) -> None:
    """Say before a model is loaded what is wrong with the names. Raises UserError."""
    for task in tasks:
        if holds_rows(Path(task)):
            _own_rows(_own_file(task, data))
            continue
        entry = _manager().task_index.get(task)
        if entry is None:
            close = get_close_matches(task, _manager().all_tasks, 4)
            hint = f"; near it are {', '.join(close)}" if close else ""
            raise UserError(f"--tasks {task}: neither a quick task nor one of lm-evaluation-harness{hint}")
        _check_code(task, entry.cfg or {}, allow_code_execution)


def own_files(tasks: Sequence[str], data: Path | None) -> dict[str, str]:
    """Of tasks that are files of the user's: name in the results -> sha256. Raises UserError where one is missing, or not as it should be."""
    files_of = {task: _own_file(task, data) for task in tasks if holds_rows(Path(task))}
    for file in files_of.values():
        _own_rows(file)
    return {_own_name(task): sha256_of(file) for task, file in files_of.items()}


def evaluate_harness(
    loaded: LoadedModel,
    task: str,
    *,
    limit: int | None,
    shots: int | None,
    batch_size: int,
    seed: int,
    data: Path | None,
    allow_code_execution: bool,
    max_new_tokens: int | None,
    advance: Callable[[int], None],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any]]:
    """One task, or group of tasks, of the harness.

    Returns:
        Rows of `ITEMS_SCHEMA`, scores by task (and group), and what the harness itself returned.
    Raises:
        UserError: an unknown task, data that cannot be had, code execution not allowed.
    """
    check_tasks([task], data, allow_code_execution)
    from lm_eval import simple_evaluate

    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeds: dict[str, int] = dict.fromkeys(names, seed) if seed else {}  # 0: the harness's own defaults
    notes: dict[str, str] = {}
    with _quiet(), _same_randomness(), _code_eval():
        objects = _load(task, data, allow_code_execution, shots, notes)
        model = _model(loaded, batch_size)
        try:
            found = simple_evaluate(
                model,
                tasks=objects,
                num_fewshot=shots,
                limit=limit,
                batch_size=batch_size,
                gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
                task_manager=_manager(),
                confirm_run_unsafe_code=allow_code_execution,
                bootstrap_iters=1000,
                **seeds,
            )
        except (AssertionError, ValueError) as error:
            raise UserError(f"task {task} on {loaded.ref}: {first_line(error)}") from error
    rows: list[dict[str, Any]] = []
    scores: dict[str, dict[str, Any]] = {}
    for name, samples in found["samples"].items():
        made, entry = _read_samples(name, samples, found)
        rows += made
        scores[name] = entry | {"note": notes.get(name)}
        advance(len(made))
    for name, members in found.get("group_subtasks", {}).items():
        inside = [scores[member] for member in _leaves(members, found) if member in scores]
        if inside and name not in scores:
            scores[name] = _group(name, found, inside) | {"members": _leaves(members, found)}
    return rows, scores, found


# --- the harness -------------------------------------------------------------------------------------------------------


@cache
def _manager() -> Any:
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager

            return TaskManager()
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error}); install it with: pip install prunescope[eval]"
        ) from error


def _model(loaded: LoadedModel, batch_size: int) -> Any:
    """The harness's model around ours, with a tokenizer of its own, since it sets the padding token."""
    from lm_eval.models.huggingface import HFLM

    class Shown(HFLM):
        """Shows its progress bar, with time left, on a terminal only."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=not sys.stderr.isatty())

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=not sys.stderr.isatty(), **options)

    return Shown(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=batch_size)


def _load(
    task: str, data: Path | None, allow_code_execution: bool, shots: int | None, notes: dict[str, str]
) -> list[Any]:
    """Task and group objects. Those of local data differ from the harness's own in their ``download`` alone."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._factory import TaskFactory

    def with_dataset(config: dict[str, Any], dataset: dict[str, Any]) -> Any:
        def download(self: Any, *_: Any, **__: Any) -> None:
            self.dataset = dataset

        return type("LocalTask", (ConfigurableTask,), {"download": download})(config=config)

    if holds_rows(Path(task)):
        return [_own_task(task, data, with_dataset)]

    class Factory(TaskFactory):
        def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
            _check_code(entry.name, entry.cfg or {}, allow_code_execution)
            if data is None or "class" in (entry.cfg or {}):
                return super()._build_task(entry, overrides)
            config = self._load_full_config(entry, overrides)
            for key in ("tag", "group", "task_list"):
                config.pop(key, None)
            dataset = read_dataset(data, config["dataset_path"], config.get("dataset_name"), entry.name)
            _adjust(config, dataset, shots, notes)
            return with_dataset(config, dataset)

    manager = copy.copy(_manager())
    manager._factory = Factory(meta={})
    try:
        with one_try() if data is None else nullcontext():
            built = manager.load([task])
    except UserError:
        raise
    except Exception as error:  # the hub, a script, a missing package: each fails in a way of its own
        raise UserError(
            f"task {task}: its data cannot be had: {first_line(error)}; give --data DIR, or check the network"
        ) from error
    return list(built["groups"].values())[:1] if built.get("groups") else list(built["tasks"].values())


def _adjust(config: dict[str, Any], dataset: dict[str, Any], shots: int | None, notes: dict[str, str]) -> None:
    """Leave out splits that are not there; shots then come from the test split, the item itself never among them."""
    for key in ("training_split", "validation_split"):
        if config.get(key) and config[key] not in dataset:
            config[key] = None
    test = config.get("test_split") or config.get("validation_split")
    if test not in dataset:
        raise UserError(f"task {config['task']}: no {test} split among its files; there is {', '.join(dataset)}")
    split = config.get("fewshot_split")
    if split and split not in dataset:
        config["fewshot_split"] = test
        if shots if shots is not None else config.get("num_fewshot"):
            notes[config["task"]] = f"no {split} split at hand: shots are other items of the {test} split"


def _own_file(task: str, data: Path | None) -> Path:
    for place in ([data / task] if data else []) + [Path(task)]:
        if place.is_file():
            return place
    raise UserError(f"--tasks {task}: no such file{f', nor in {data}' if data else ''}")


def _own_name(task: str) -> str:
    return Path(task.removesuffix(".gz")).stem


def _own_task(task: str, data: Path | None, with_dataset: Callable[..., Any]) -> Any:
    """A file of the user's: ``choices`` make it multiple choice, else the answer is written."""
    import yaml

    file = _own_file(task, data)
    rows = _own_rows(file)
    kind = "choices" if "choices" in rows[0] else "answers"
    config = yaml.safe_load((files("prunescope.tasks") / "yaml" / f"{kind}.yaml").read_text("utf-8"))
    return with_dataset(config | {"task": _own_name(task)}, {"test": dataset_of(file, rows)})


def _own_rows(file: Path) -> list[dict[str, Any]]:
    """Checked rows of such a file."""
    rows = read_rows(file)
    keys = ("question", "answer", *(["choices"] if "choices" in rows[0] else []))
    for number, row in enumerate(rows, 1):
        place = f"{file}, item {number}"
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            raise UserError(f"{place}: no {missing[0]!r}; write question and answer, and choices if any")
        answer, choices = row["answer"], row.get("choices")
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise UserError(f"{place}: the question is no text")
        if len(keys) == 2:
            row["answer"] = str(answer).strip()
        elif not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{place}: choices must be a list of texts")
        elif isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise UserError(f"{place}: the answer must be the index of a choice")
    return rows


def _check_code(task: str, config: dict[str, Any], allowed: bool) -> None:
    if config.get("unsafe_code") and not allowed:
        raise UserError(f"task {task} runs code that the model writes; allow it with --allow-code-execution")


@contextmanager
def _code_eval() -> Iterator[None]:
    """Tasks that load the metric ``code_eval`` get the sandbox: no code of a model runs in this process, and nothing is fetched."""
    import evaluate

    real = evaluate.load
    evaluate.load = lambda name, *args, **options: CodeEval() if name == "code_eval" else real(name, *args, **options)
    try:
        yield
    finally:
        evaluate.load = real


@contextmanager
def _same_randomness() -> Iterator[None]:
    """The harness seeds the generators of the whole process: put them back."""
    state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.generation.utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- what it found -----------------------------------------------------------------------------------------------------


def _read_samples(
    task: str, samples: list[dict[str, Any]], found: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and score of a task: of its first filter, and of acc_norm where it has that, else of its first metric."""
    config = found["configs"][task]
    kind = "generative" if config["output_type"] == "generate_until" else "choice"
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    names = [name for name in first[0]["metrics"] if isinstance(first[0][name], (int, float, np.number))]
    metric = next((name for name in _GUESSED[:1] if name in names), names[0] if names else first[0]["metrics"][0])
    rows = []
    for sample in sorted(first, key=lambda one: one["doc_id"]):
        prediction, gold = _texts(sample, kind, metric)
        value = float(sample[metric]) if metric in names else float("nan")
        rows.append(
            {"task": task, "kind": kind, "item": sample["doc_id"], "key": sample["doc_hash"][:16], "metric": metric}
            | {"score": value, "prediction": prediction, "gold": gold}
        )
    results = found["results"][task]
    key = f"{metric},{samples[0]['filter']}"
    several = config["output_type"] == "multiple_choice"
    chance = float(np.mean([1 / len(one["arguments"]) for one in first])) if several else 0.0
    entry = score([row["score"] for row in rows], metric, kind, chance, found["n-shot"].get(task))
    entry["value"] = float(results.get(key, entry["value"]))
    entry["filter"] = samples[0]["filter"]
    entry["others"] = {
        name: float(value)
        for name, value in results.items()
        if "," in name and name != key and isinstance(value, (int, float)) and "_stderr" not in name
    }
    return rows, entry


def _texts(sample: dict[str, Any], kind: str, metric: str) -> tuple[str, str]:
    target = sample["target"]
    if kind == "generative":
        answer = sample["filtered_resps"][0]
        return str(answer[0] if isinstance(answer, list) and answer else answer), str(target)
    options = [argument[1] for argument in sample["arguments"]]
    scores = np.array([response[0][0] for response in sample["resps"]], float)
    if metric == "acc_norm":
        scores = scores / [max(1, len(option.lstrip())) for option in options]
    chosen = options[int(scores.argmax())].strip()
    gold = options[target].strip() if isinstance(target, int) and target < len(options) else str(target)
    return chosen, gold


def _leaves(members: Sequence[str], found: dict[str, Any]) -> list[str]:
    groups = found.get("group_subtasks", {})
    return [leaf for name in members for leaf in (_leaves(groups[name], found) if groups.get(name) else [name])]


def _group(name: str, found: dict[str, Any], inside: list[dict[str, Any]]) -> dict[str, Any]:
    """A group's score: the harness's own, else the mean over all its items."""
    metric, total = inside[0]["metric"], sum(entry["n"] for entry in inside)
    value = sum(entry["value"] * entry["n"] for entry in inside) / total
    own = found.get("groups", {}).get(name, {})
    key = next((key for key in own if key.startswith(f"{metric},")), None)
    chance = sum((entry["chance"] or 0.0) * entry["n"] for entry in inside) / total
    stderr = float(np.sqrt(sum((entry["n"] * (entry["stderr"] or 0.0)) ** 2 for entry in inside)) / total)
    value = float(own[key]) if key else value
    return {
        "metric": metric,
        "kind": inside[0]["kind"],
        "value": value,
        "stderr": stderr,
        "ci95": normal_interval(value, stderr),
        "n": total,
        "chance": chance,
        "shots": inside[0]["shots"],
        "note": None,
    }


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
        (folder / f"samples_{name}_{file_name(task)}.jsonl").write_text("".join(lines), "utf-8", "backslashreplace")


def file_name(name: str) -> str:
    """A task's name, fit for the name of a file."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
