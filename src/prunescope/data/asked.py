"""A file of the user's own rows, for what they want a model to do: with answers, or prompts alone."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from prunescope.data.jsonl import holds_rows, read_rows
from prunescope.data.prompts import read_prompts
from prunescope.errors import UserError

__all__ = ["is_file_of_rows", "rows_hold", "sha256_of"]

_NAMES = re.compile(r"\.(jsonl|ndjson|json|txt)(\.gz)?$", re.IGNORECASE)


def is_file_of_rows(name: str) -> bool:
    """Whether ``name`` is meant as a file, not as a task: by its ending."""
    return bool(_NAMES.search(name))


def sha256_of(file: Path) -> str:
    """Of the file's bytes, to tell whether two runs were asked the same. Raises UserError where it cannot be read."""
    try:
        return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; give an existing file") from error


def rows_hold(source: str) -> tuple[Literal["answers", "prompts"], int]:
    """Whether rows have answers, and so make a task of `prunescope.tasks.harness`, or are prompts alone, see `read_prompts`;
    and how many there are.

    Raises:
        UserError: no such file, no row in it, or some rows with an answer and some without.
    """
    path = Path(source).expanduser()
    if holds_rows(path):
        places: dict[bool, str] = {}
        count = 0
        for place, row in read_rows(path, "file of rows", "give JSONL in UTF-8"):
            count += 1
            places.setdefault(isinstance(row, dict) and row.get("answer") is not None, place)
        if len(places) > 1:
            raise UserError(f"{places[False]}: no answer, though other rows have one; put them into two files")
        if True in places:
            return "answers", count
    return "prompts", len(read_prompts(path))
