"""The one reader of users' files: what was written is what is read, in every form; and whatever bytes are there, a value or one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunescope.data.asked import rows_hold
from prunescope.data.beir import read_collection
from prunescope.data.calibration import _file_texts
from prunescope.data.jsonl import holds_rows, quoted, read_rows, read_text
from prunescope.data.prompts import read_prompts
from prunescope.data.questions import read_questions
from prunescope.errors import UserError
from prunescope.tasks.local_data import read_rows as read_items

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=4), max_size=5)
KEYS = st.sampled_from(
    ["prompt", "id", "kind", "question", "choices", "answer", "subject", "_id", "text", "title", "x"]
)
NEAR_ROWS = st.lists(
    st.dictionaries(KEYS, VALUES | st.sampled_from([0, 1, "A", ["a", "b"], "w5"]), max_size=5) | VALUES, max_size=4
)
QUICK = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def lines(rows: list[Any], **options: Any) -> str:
    return "\n".join(json.dumps(row, **options) for row in rows)


FORMS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "lines": ("r.jsonl", lambda rows: lines(rows).encode()),
    "lines in UTF-8": ("r.ndjson", lambda rows: lines(rows, ensure_ascii=False).encode()),
    "lines called .json": ("r.json", lambda rows: (lines(rows) + "\n").encode()),
    "byte order mark": ("r.jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows).encode()),
    "CRLF": ("r.jsonl", lambda rows: lines(rows).replace("\n", "\r\n").encode()),
    "old Mac": ("r.jsonl", lambda rows: lines(rows).replace("\n", "\r").encode()),
    "empty lines": ("r.jsonl", lambda rows: ("\n \n\t" + lines(rows).replace("\n", "\n\n \n") + "\n\n").encode()),
    "array": ("r.json", lambda rows: json.dumps(rows).encode()),
    "array over lines": ("r.json", lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode()),
    "array called .jsonl": ("r.jsonl", lambda rows: json.dumps(rows, indent=1).encode()),
    "gzip": ("r.jsonl.gz", lambda rows: gzip.compress(lines(rows).encode())),
    "gzipped array": ("r.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
}


@pytest.mark.parametrize("form", FORMS)
@QUICK
@given(rows=ROWS)
def test_rows_of_every_form_are_what_was_written(form: str, rows: list[Any], tmp_path: Path) -> None:
    name, write = FORMS[form]
    (tmp_path / name).write_bytes(write(rows))
    assert holds_rows(tmp_path / name)
    found = list(read_rows(tmp_path / name, "", "fix it"))
    assert [row for _, row in found] == rows
    assert all(place.startswith(str(tmp_path / name)) for place, _ in found)


@QUICK
@given(text=st.text())
def test_text_is_what_was_written_but_for_its_line_ends(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(text.encode())
    unified = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    if "\0" in text:
        with pytest.raises(UserError, match="null bytes"):
            read_text(tmp_path / "t.txt", "", "fix it")
    else:
        assert read_text(tmp_path / "t.txt", "", "fix it") == unified


# --- whatever is there ---------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Any]] = {
    "prompts": lambda path: read_prompts(path),
    "questions": lambda path: read_questions(path),
    "collection": lambda path: read_collection(path, path.parent / "queries.jsonl", path.parent / "qrels.tsv"),
    "judgements": lambda path: read_collection(path.parent / "queries.jsonl", path.parent / "queries.jsonl", path),
    "calibration": lambda path: list(_file_texts(path)),
    "task": lambda path: read_items(path),
}
NAMES = ["f.jsonl", "f.json", "f.txt", "f.csv", "f.tsv", "f.jsonl.gz", "f.parquet"]


def tried(reader: str, path: Path) -> None:
    """A value that holds no half characters, or one line of bearable length."""
    (path.parent / "queries.jsonl").write_text('{"_id": "q", "text": "w4"}\n')
    (path.parent / "qrels.tsv").write_text("q\td\t1\n")
    said = ""
    try:
        repr(READERS[reader](path)).encode("utf-8")
    except UserError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1 and len(said) < 800 + 3 * len(str(path))


@pytest.mark.parametrize("reader", READERS)
@QUICK
@given(content=st.binary(max_size=200), name=st.sampled_from(NAMES))
def test_any_bytes_are_read_or_refused(reader: str, content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    tried(reader, tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
@QUICK
@given(rows=NEAR_ROWS, array=st.booleans())
def test_rows_with_anything_in_their_fields_are_read_or_refused(
    reader: str, rows: list[Any], array: bool, tmp_path: Path
) -> None:
    (tmp_path / "f.json").write_text(json.dumps(rows) if array else lines(rows), "utf-8")
    tried(reader, tmp_path / "f.json")


GOOD = {"prompt": "w5", "id": "a", "question": "w6?", "choices": ["w7", "w8"], "answer": 1, "_id": "d", "text": "w9"}


@pytest.mark.parametrize("reader", READERS)
@QUICK
@given(where=st.integers(0, 10**6), gone=st.integers(0, 12), new=st.binary(max_size=6), name=st.sampled_from(NAMES))
def test_a_damaged_file_is_read_or_refused(
    reader: str, where: int, gone: int, new: bytes, name: str, tmp_path: Path
) -> None:
    good = lines([GOOD, GOOD | {"_id": "e", "id": "b"}]).encode()
    where %= len(good)
    content = good[:where] + new + good[where + gone :]
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    tried(reader, tmp_path / name)


def test_a_message_holds_no_more_than_a_piece_of_a_long_value() -> None:
    assert quoted("x" * 10**6) == "'" + "x" * 55 + "...'"
    assert quoted("w5") == "'w5'"


def test_places_are_counted_as_editors_count_them(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for content, place in (
        ('{"prompt": "w5"}\n\n{"prompt": 6}', "line 3: no 'prompt'"),
        ('[{"prompt": "w5"},\n {"prompt": 6}]', "item 2: no 'prompt'"),
        ('[{"prompt": "w5"},\n {"prompt": }]', "line 2: not JSON"),
        ('{"prompt": "w5"}\n{"prompt": "\\ud83d"}', r"line 2: \\ud83d is half of a surrogate pair"),
        ('{"prompt": "w5", "id": 1}\n{"prompt": "w5", "id": "1"}', "line 2: the id '1' stands there twice"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=place):
            read_prompts(path)


def test_a_whole_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ud83d\\ude00 \\\\ud83d"}\n')
    assert read_prompts(tmp_path / "p.jsonl")[0].text == "\U0001f600 \\ud83d"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.jsonl", '{"question": "x", "answer": 0}\n{"question": "y", "answer": "z"}\n', ("answers", 2)),
        ("a.json", '[{"prompt": "x"}, {"prompt": "y"}, {"prompt": "z"}]', ("prompts", 3)),
        ("a.txt", "one\n\ntwo\n", ("prompts", 2)),
    ],
)
def test_what_rows_hold(name: str, text: str, found: tuple[str, int], tmp_path: Path) -> None:
    """An answer 0, an index, is an answer. Catches a truth test in place of a test for null, and empty lines counted."""
    (tmp_path / name).write_text(text, "utf-8")
    assert rows_hold(str(tmp_path / name)) == found


def test_answers_in_some_rows_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "y"}\n{"prompt": "z"}\n', "utf-8")
    with pytest.raises(UserError, match="line 2: no answer, though other rows have one"):
        rows_hold(str(tmp_path / "a.jsonl"))
