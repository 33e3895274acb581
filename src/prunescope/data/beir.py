"""Passages, queries and judgements in the form of BEIR: a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, or the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from prunescope.data.jsonl import check_new, quoted, read_rows, read_text
from prunescope.errors import UserError

__all__ = ["Collection", "read_collection"]

_FORM = "corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, as BEIR's"


@dataclass(frozen=True)
class Collection:
    """What is searched, what is asked, and what is right."""

    passages: dict[str, str]  # id -> title and text, one blank between them
    queries: dict[str, str]  # id -> text; those that have judgements
    qrels: dict[str, dict[str, int]]  # query id -> passage id -> grade; 0 is judged and not relevant

    def relevant(self, query: str) -> int:
        """How many passages are relevant to a query."""
        return sum(grade > 0 for grade in self.qrels[query].values())


def read_collection(
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    *,
    split: str = "test",
) -> Collection:
    """Read and check a collection. Queries without a judgement are left out, as BEIR does.

    Args:
        corpus: a BEIR folder, or the file with ``_id``, ``text`` and, if wanted, ``title`` in every line; None for the shipped one.
        queries: the file with ``_id`` and ``text``; may be left out where ``corpus`` is a folder.
        qrels: tab-separated ``query-id``, ``corpus-id``, ``score`` with a header line; may be left out where ``corpus`` is a folder.
        split: which qrels of a folder.
    Raises:
        UserError: a missing file or field, an id twice, a judgement of something that is not there.
    """
    if corpus is None:
        if queries is not None or qrels is not None:
            raise UserError("--queries and --qrels go with --corpus; give all three, or a BEIR folder as --corpus")
        shipped = files("prunescope.data") / "retrieval"
        return _read(shipped / "corpus.jsonl", shipped / "queries.jsonl", shipped / "qrels" / "test.tsv")
    folder = Path(corpus).expanduser()
    if folder.is_dir():
        corpus_file = folder / "corpus.jsonl"
        queries = folder / "queries.jsonl" if queries is None else queries
        qrels = folder / "qrels" / f"{split}.tsv" if qrels is None else qrels
    else:
        corpus_file = folder
        if queries is None or qrels is None:
            raise UserError(f"--corpus {corpus} is no folder; give a folder with {_FORM}, or --queries and --qrels too")
    paths = [Path(queries).expanduser(), Path(qrels).expanduser()]
    paths = [
        path / name if path.is_dir() else path
        for path, name in zip(paths, ("queries.jsonl", f"{split}.tsv"), strict=True)
    ]
    for path in (corpus_file, *paths):
        if not path.is_file():
            there = sorted(p.stem for p in path.parent.glob("*.tsv")) if path.suffix == ".tsv" else []
            mend = f"--split can be {', '.join(there)}" if there else f"a collection has {_FORM}"
            raise UserError(f"{path}: no such file; {mend}")
    return _read(corpus_file, *paths)


def _read(corpus: Traversable, queries: Traversable, qrels: Traversable) -> Collection:
    passages = {}
    for place, name, row in _rows(corpus):
        title = row.get("title") or ""
        text = f"{title} {row['text']}".strip() if isinstance(title, str) else ""
        if not text:
            raise UserError(f"{place}: passage {quoted(name)} has no text; take it out of the corpus")
        passages[name] = text
    asked: dict[str, str] = {}
    for place, name, row in _rows(queries):
        if not row["text"].strip():
            raise UserError(f"{place}: query {quoted(name)} has no text; take it out")
        asked[name] = row["text"]
    judged = _judgements(qrels, passages, asked)
    return Collection(passages, {name: text for name, text in asked.items() if name in judged}, judged)


def _rows(path: Traversable) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, id and content of every row."""
    found: set[str] = set()
    for place, row in read_rows(path, "", f"a collection has {_FORM}"):
        if not isinstance(row, dict) or row.get("_id") is None or not isinstance(row.get("text"), str):
            raise UserError(f'{place}: no \'_id\' and \'text\'; write {{"_id": "...", "text": "..."}}')
        name = _name(place, row["_id"])
        check_new(place, name, found)
        found.add(name)
        yield place, name, row
    if not found:
        raise UserError(f"{path} is empty; a collection has {_FORM}")


def _judgements(path: Traversable, passages: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for number, line in enumerate(read_text(path, "", f"a collection has {_FORM}").splitlines(), 1):
        row = line.split("\t")
        if not line or (number == 1 and row[-1] == "score"):
            continue
        place = f"{path}, line {number}"
        try:
            query, passage, grade = row[0], row[1], int(row[2])
            if abs(grade) >= 2**31:
                raise ValueError("trec_eval has grades of 32 bits")
        except (IndexError, ValueError) as error:
            raise UserError(f"{place}: not query-id, corpus-id and a whole score with tabs between them") from error
        if query not in queries:
            raise UserError(
                f"{place}: query {quoted(query)} is not among the queries; take the line out or add the query"
            )
        if passage not in passages:
            raise UserError(
                f"{place}: passage {quoted(passage)} is not in the corpus; take the line out or add the passage"
            )
        if passage in judged.setdefault(query, {}):
            raise UserError(f"{place}: passage {quoted(passage)} is judged twice for query {quoted(query)}; keep one")
        judged[query][passage] = grade
    if not any(grade > 0 for grades in judged.values() for grade in grades.values()):
        raise UserError(f"{path} names no relevant passage; a line is query-id, corpus-id and a score above 0")
    return judged


def _name(place: str, value: object) -> str:
    name = str(value)
    if not name or name.split() != [name]:
        raise UserError(
            f"{place}: the id {quoted(name)} is empty or has a blank in it, which run files cannot hold; rename it"
        )
    return name
