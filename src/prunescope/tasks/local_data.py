"""Data sets of lm-evaluation-harness from files of one folder (``--data DIR``), so that its tasks run with no network.

| data set | files in DIR |
|---|---|
| openai/gsm8k | ``gsm8k_test.jsonl`` and, for shots, ``gsm8k_train.jsonl`` |
| openai/openai_humaneval | ``humaneval.jsonl.gz`` or ``humaneval.jsonl`` |
| cais/mmlu, hails/mmlu_no_train | ``mmlu/test/SUBJECT_test.csv`` and, for shots, ``mmlu/dev/SUBJECT_dev.csv`` |
| any other, OWNER/NAME | ``NAME/SPLIT.jsonl``, of a configuration ``NAME/CONFIG/SPLIT.jsonl``; also .jsonl.gz, .json and .parquet |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunescope.data import jsonl
from prunescope.data.questions import read_questions
from prunescope.errors import UserError, first_line

__all__ = ["dataset_of", "read_dataset", "read_rows"]

_SPLITS = ("train", "validation", "valid", "dev", "test")
_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_MMLU = ("cais/mmlu", "hails/mmlu_no_train")


def read_dataset(folder: Path, path: str, name: str | None, task: str) -> dict[str, Any]:
    """Splits of the data set ``path`` (configuration ``name``) as `datasets.Dataset`. Raises UserError if it is not in the folder."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    found: dict[str, list[dict[str, Any]]] = {}
    if path in _MMLU and name:
        return {split: dataset_of(folder, rows) for split, rows in _mmlu(folder / "mmlu", name, task).items()}
    short = path.rpartition("/")[2]
    stem = "humaneval" if short == "openai_humaneval" else short
    for split in _SPLITS:
        places = [folder / f"{stem}_{split}", folder / stem / split]
        places = [folder / stem / name / split, *places] if name else places
        places += [folder / stem] if stem == "humaneval" and split == "test" else []
        files = [place.with_name(place.name + ending) for place in places for ending in _ENDINGS]
        for file in files:
            if file.is_file():
                found[split] = read_rows(file)
                break
    if not found:
        where = f"{stem}/{name}/" if name else f"{stem}/"
        raise UserError(
            f"task {task}: its data set {path} is not in --data {folder}; put {where}SPLIT.jsonl there, or leave --data out to fetch it"
        )
    return {split: dataset_of(f"task {task}, {split} split", rows) for split, rows in found.items()}


def dataset_of(place: str | Path, rows: list[dict[str, Any]]) -> Any:
    """Rows as a `datasets.Dataset`. Raises UserError if a field has one type here and another there."""
    import pyarrow as pa
    from datasets import Dataset

    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{place}: its rows do not make a table ({first_line(error)}); give a field one type in all of them"
        ) from error


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON or JSONL (also gzipped) or parquet file. Raises UserError with file and line."""
    form = "give JSONL, .jsonl.gz or parquet"
    rows: list[dict[str, Any]] = []
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {first_line(error)}; {form}") from error
    else:
        for place, row in jsonl.read_rows(file, "", form):
            if not isinstance(row, dict):
                raise UserError(f"{place}: not a JSON object; write an object a line")
            rows.append(row)
    if not rows:
        raise UserError(f"{file} holds no item")
    return rows


def _mmlu(folder: Path, subject: str, task: str) -> dict[str, list[dict[str, Any]]]:
    """MMLU as the hub has it: question, subject, choices, answer (an index)."""
    splits = {}
    for split in ("test", "dev"):
        file = folder / split / f"{subject}_{split}.csv"
        if split == "test" and not file.is_file():
            raise UserError(f"task {task}: no {file}; give --data a folder with mmlu/test/SUBJECT_test.csv")
        if file.is_file():
            splits[split] = [
                {"question": q.question, "subject": subject, "choices": list(q.choices), "answer": q.answer}
                for q in read_questions(file)[0]
            ]
    return splits
