"""A file of the user's own rows, for what they want the model to do: questions with options, prompts with an answer, or prompts alone."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from prunescope.data.jsonl import check_new, holds_rows, read_rows
from prunescope.data.prompts import Prompt, read_prompts
from prunescope.data.questions import Question, question_of, read_questions
from prunescope.errors import UserError

__all__ = ["Asked", "Written", "is_file_of_rows", "read_asked", "sha256_of"]

_WHAT, _FORM = "file of rows", "give JSONL in UTF-8"
_NAMES = re.compile(r"\.(jsonl|ndjson|json|csv|txt)(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """A prompt and what the model should write next."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """Rows of a file by what they hold. Either ``prompts`` is empty, or both others are."""

    chosen: list[Question] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


def is_file_of_rows(name: str) -> bool:
    """Whether ``name`` is meant as a file, not as a task: by its ending."""
    return bool(_NAMES.search(name))


def sha256_of(source: str) -> str:
    """Of the file's bytes, to tell whether two runs were asked the same. Raises UserError where it cannot be read."""
    try:
        return hashlib.sha256(Path(source).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}; give an existing file") from error


def read_asked(source: str) -> Asked:
    """Read JSONL (or a JSON array) with ``question``, ``choices`` and ``answer``; or ``prompt`` (or ``question``) and ``answer``, a text; or
    ``prompt`` alone. CSV is MMLU's, any other file one prompt a line. Rows with and without an answer do not go together.

    Raises:
        UserError: no such file, no row in it, or a row that is not as said.
    """
    path = Path(source).expanduser()
    if path.name.lower().endswith(".csv"):
        return Asked(chosen=read_questions(path)[0])
    if not holds_rows(path):
        return Asked(prompts=read_prompts(path))
    found, alone = Asked(), 0
    seen: set[str] = set()
    for number, (place, row) in enumerate(read_rows(path, _WHAT, _FORM), 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{place}: not a JSON object; write prompt, or prompt and answer, or question, choices and answer"
            )
        name = str(row.get("id", number))
        check_new(place, name, seen)
        seen.add(name)
        if row.get("choices") is not None:
            asked = row.get("question", row.get("prompt"))
            found.chosen.append(
                question_of(place, name, asked, row["choices"], row.get("answer"), str(row.get("subject") or ""))
            )
        elif row.get("answer") is not None:
            found.written.append(_written(place, name, row))
        else:
            alone += 1
        if alone and (found.chosen or found.written):
            raise UserError(
                f"{place}: some rows of this file have an answer and some have none; put them into two files"
            )
    return Asked(prompts=read_prompts(path)) if alone or not seen else found


def _written(place: str, name: str, row: dict[str, object]) -> Written:
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("question"), str):
        prompt = f"Question: {row['question']}\nAnswer:"
    answer = row["answer"]
    answer = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place}: no 'prompt' or 'question' with a text")
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{place}: the answer is no text; write what the model should write next")
    return Written(name, prompt, answer.strip())
