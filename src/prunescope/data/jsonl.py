"""The one reader of users' files: texts, and rows of JSON (one a line, or one array), each also gzipped; errors name file and line.

Text is UTF-8, with or without a byte order mark, and line ends are those of any system.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Container, Iterator
from importlib.resources.abc import Traversable
from typing import Any

from prunescope.errors import UserError
from prunescope.files import parse_json

__all__ = ["check_new", "holds_rows", "quoted", "read_rows", "read_text"]

_ROWS = re.compile(r"\.(jsonl|ndjson|json)(\.gz)?$", re.IGNORECASE)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a pair


def holds_rows(file: Traversable) -> bool:
    """Whether the name of ``file`` says that it holds rows of JSON rather than plain text."""
    return bool(_ROWS.search(file.name))


def read_text(file: Traversable, what: str, form: str) -> str:
    """The whole text of ``file``.

    Args:
        what: what the user knows the file as, for the message: "prompts file".
        form: how to fix it, for the message: "give a UTF-8 text or JSONL file".
    Raises:
        UserError: it is missing, not UTF-8, damaged, or holds null bytes.
    """
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.name.endswith(".gz") else content
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is UTF-16, not UTF-8")
        if b"\0" in content:
            raise ValueError("it holds null bytes, so it is not UTF-8 text")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {file} cannot be read: {reason}; {form}".lstrip()) from error


def read_rows(file: Traversable, what: str, form: str) -> Iterator[tuple[str, Any]]:
    """Place ("FILE, line 3") and value of each row: every line that is not empty, or every item of an array. See `read_text`.

    Raises:
        UserError: as `read_text`, and for what is not JSON (NaN is not) or holds half of a surrogate pair.
    """
    text = read_text(file, what, form)
    escapes = _SURROGATE.search(text)
    whole = _whole(text, file)
    for place, row in _lines(text, file) if whole is None else whole:
        if escapes:
            _check_characters(place, row)
        yield place, row


def _whole(text: str, file: Traversable) -> list[tuple[str, Any]] | None:
    """Rows of a file that is one JSON value, None of a file that holds one a line."""
    if not text.lstrip().startswith("[") and not (text.strip() and re.search(r"\.json(\.gz)?$", file.name)):
        return None
    try:
        value = parse_json(text, parse_constant=_refuse)
    except ValueError as error:
        if "Extra data" in str(error):
            return None
        raise _not_json(f"{file}, line {getattr(error, 'lineno', 1)}", error) from error
    return (
        [(f"{file}, item {i}", row) for i, row in enumerate(value, 1)]
        if isinstance(value, list)
        else [(str(file), value)]
    )


def _lines(text: str, file: Traversable) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                row = parse_json(line, parse_constant=_refuse)
            except ValueError as error:
                raise _not_json(place, error) from error
            yield place, row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _not_json(place: str, error: ValueError) -> UserError:
    return UserError(f"{place}: not JSON ({error}); write one JSON object a line, or one array of them")


def _check_characters(place: str, row: Any) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(
            f"{place}: \\u{ord(half):04x} is half of a surrogate pair and no character; write the character itself"
        ) from error


def check_new(place: str, name: str, seen: Container[str]) -> None:
    """Raise UserError if the id ``name`` was there before."""
    if name in seen:
        raise UserError(f"{place}: the id {quoted(name)} stands there twice; ids must differ")


def quoted(value: object) -> str:
    """A value of the user's for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
