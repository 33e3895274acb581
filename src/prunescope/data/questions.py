"""Multiple-choice questions: the shipped ones, JSONL, or a folder of MMLU CSV files; and the prompts made of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

from prunescope.data.jsonl import check_new, quoted, read_rows, read_text
from prunescope.errors import UserError

__all__ = ["Question", "Template", "cue_prompt", "option_strings", "question_text", "read_questions"]

Template = Literal["cue", "paper", "chat"]
_WHAT, _FORM = "questions file", "give JSONL or MMLU CSV in UTF-8"


@dataclass(frozen=True)
class Question:
    """A question with its options; ``answer`` is the index of the right one."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


# --- prompts -----------------------------------------------------------------------------------------------------------


def option_strings(template: Template, count: int) -> list[str]:
    """What the model would write for each option behind the prompt: " A" (cue), " a" (paper), "A" (chat, a turn of its own)."""
    letters = ascii_lowercase if template == "paper" else ascii_uppercase
    return [letter if template == "chat" else f" {letter}" for letter in letters[:count]]


def question_text(question: Question, template: Template) -> str:
    """Question and options as the template writes them, without shots."""
    text = question.question.strip()
    if template == "paper":
        options = "\n".join(f"{x}) {choice}" for x, choice in zip(ascii_lowercase, question.choices, strict=False))
        return f"{text}\nChoose the correct answer:\n{options}"
    options = "\n".join(f"{x}. {choice}" for x, choice in zip(ascii_uppercase, question.choices, strict=False))
    return f"{text}\n{options}\n" + ("Answer:" if template == "cue" else "Answer with the letter only.")


def cue_prompt(question: Question, shots: Sequence[Question] = ()) -> str:
    """The prompt of the template ``cue``, as lm-evaluation-harness's `mmlu` writes it: a line that names the subject where there is one,
    the shots with their answers, the question, and "Answer:"."""
    subject = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    solved = [f"{question_text(shot, 'cue')} {ascii_uppercase[shot.answer]}\n\n" for shot in shots]
    return header + "".join(solved) + question_text(question, "cue")


# --- files -------------------------------------------------------------------------------------------------------------


def read_questions(
    source: str | Path | None = None, *, shots: int = 0, subjects: Sequence[str] = ()
) -> tuple[list[Question], dict[str, list[Question]]]:
    """Questions, and of each subject the solved examples that go before them.

    Args:
        source: None for the shipped 72; a JSONL file (or a JSON array) with ``question``, ``choices``, ``answer`` (index or letter) and, if wanted, ``id`` and
            ``subject``; an MMLU CSV file; or a folder with ``test/*_test.csv`` and, for shots, ``dev/*_dev.csv``. CSV rows are
            question, choices and answer, with a header (``question,choice0,...,answer``) or without (the original files).
        shots: solved examples a question, the first ones of the subject's dev file.
        subjects: of an MMLU folder, by default all.
    Raises:
        UserError: a missing file or field, an answer out of range, duplicate options, too few examples.
    """
    if shots < 0:
        raise UserError(f"--shots {shots}: it cannot be negative")
    path = None if source is None else Path(source).expanduser()
    if path is not None and path.is_dir():
        return _read_mmlu(path, shots, subjects)
    if path is not None and path.suffix == ".csv":
        if subjects:
            raise UserError("--subjects chooses among the files of an MMLU folder; give --questions that folder")
        subject = path.stem.removesuffix("_test")
        return list(_csv_rows(path, subject)), _examples(path.parent.parent, [subject], shots)
    if shots or subjects:
        what = "--shots" if shots else "--subjects"
        raise UserError(f"{what} needs a folder of MMLU CSV files with test/ and dev/; give it with --questions")
    if path is None:
        return _json_questions(files("prunescope.data") / "questions.jsonl"), {}
    found = _json_questions(path)
    if not found:
        raise UserError(f"questions file {path} holds no question; write JSONL with question, choices and answer")
    return found, {}


def _read_mmlu(folder: Path, shots: int, subjects: Sequence[str]) -> tuple[list[Question], dict[str, list[Question]]]:
    tests = {path.stem.removesuffix("_test"): path for path in sorted((folder / "test").glob("*_test.csv"))}
    if not tests:
        raise UserError(f"{folder}: no test/*_test.csv in this folder; give a folder of MMLU CSV files")
    unknown = [subject for subject in subjects if subject not in tests]
    if unknown:
        raise UserError(
            f"--subjects {unknown[0]}: no test/{unknown[0]}_test.csv in {folder}; there is {', '.join(list(tests)[:4])}, ..."
        )
    chosen = list(subjects or tests)
    questions = [question for subject in chosen for question in _csv_rows(tests[subject], subject)]
    return questions, _examples(folder, chosen, shots)


def _examples(folder: Path, subjects: Sequence[str], shots: int) -> dict[str, list[Question]]:
    if not shots:
        return {}
    found = {}
    for subject in subjects:
        path = folder / "dev" / f"{subject}_dev.csv"
        solved = list(_csv_rows(path, subject))
        if len(solved) < shots:
            raise UserError(f"--shots {shots}: {path} holds {len(solved)} examples; lower --shots")
        found[subject] = solved[:shots]
    return found


def _csv_rows(path: Path, subject: str) -> Iterator[Question]:
    try:
        rows = list(filter(None, csv.reader(read_text(path, _WHAT, _FORM).splitlines(keepends=True))))
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error}); give an MMLU CSV file") from error
    header = bool(rows) and rows[0][0] == "question" and rows[0][-1] == "answer"
    if len(rows) <= header:
        raise UserError(f"{path} holds no question; give an MMLU CSV file")
    for number, row in enumerate(rows[header:]):
        where = f"{path}, row {number + 1}"
        if len(row) < 4:
            raise UserError(f"{where}: {len(row)} columns; write question, at least two choices and the answer")
        yield _question(where, f"{subject}-{number}", row[0], row[1:-1], row[-1], subject, published=True)


def _json_questions(file: Traversable) -> list[Question]:
    found: dict[str, Question] = {}
    for number, (place, row) in enumerate(read_rows(file, _WHAT, _FORM), 1):
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; write question, choices and answer")
        missing = [key for key in ("question", "choices", "answer") if row.get(key) is None]
        if missing:
            raise UserError(f"{place}: no {missing[0]!r}; write question, choices and answer")
        name, subject = str(row.get("id", number)), str(row.get("subject") or "")
        check_new(place, name, found)
        found[name] = _question(place, name, row["question"], row["choices"], row["answer"], subject)
    return list(found.values())


def _question(
    where: str, name: str, text: object, choices: object, answer: object, subject: str, published: bool = False
) -> Question:
    """Checked. MMLU, as published, has questions with an option twice; they are asked as they stand, as everybody does."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the question is no text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where}: choices must be a list of texts, none of them empty")
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise UserError(f"{where}: {len(choices)} choices; give 2 to {len(ascii_uppercase)}")
    if len({choice.strip() for choice in choices}) < len(choices) and not published:
        twice = next(choice for choice in choices if [other.strip() for other in choices].count(choice.strip()) > 1)
        raise UserError(f"{where}: the option {quoted(twice.strip())} stands there twice; options must differ")
    return Question(name, text, tuple(choices), _answer(where, answer, len(choices)), subject)


def _answer(where: str, answer: object, count: int) -> int:
    """An index, as a number or a text, or a letter."""
    text = str(answer).strip()
    index = (
        ascii_uppercase.find(text.upper())
        if len(text) == 1 and text.isalpha()
        else int(text)
        if text.isdecimal() and len(text) < 4
        else -1
    )
    if isinstance(answer, bool) or not 0 <= index < count:
        last = ascii_uppercase[count - 1]
        raise UserError(f"{where}: the answer {text[:20]!r} is out of range; give 0 to {count - 1} or A to {last}")
    return index
