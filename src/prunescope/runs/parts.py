"""Finished batches of a run, kept in its unfinished folder, so that `--resume` need not compute them again. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prunescope.errors import UserError
from prunescope.files import replacing
from prunescope.runs.workers import Share, alone

__all__ = [
    "begin",
    "computed",
    "joined",
    "notes_of",
    "read_part",
    "resume_state",
    "save_state",
    "with_notes",
    "write_part",
]


def with_notes(table: pa.Table, notes: Any) -> pa.Table:
    """The table of a batch with what must be known of it beside its rows; ``notes`` is JSON."""
    return table.replace_schema_metadata({"prunescope": json.dumps(notes)})


def notes_of(table: pa.Table) -> Any:
    """The notes of a table from `with_notes`, None for another one."""
    return json.loads((table.schema.metadata or {}).get(b"prunescope", b"null"))


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all batches, without their notes."""
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def computed(
    parts: Path | None,
    count: int,
    batch_size: int,
    compute: Callable[[Sequence[int]], pa.Table],
    advance: Callable[[Sequence[int]], None],
    share: Share = alone,
) -> list[pa.Table]:
    """The tables of ``count`` items, ``batch_size`` at a time; batches that ``parts`` holds already are read.

    Args:
        compute: the numbers of a batch's items -> its table.
        advance: told the numbers of every batch that is done.
        share: who computes them, see `prunescope.runs.workers.sharing`.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    tables: dict[int, pa.Table] = {}

    def have(number: int, table: pa.Table) -> None:
        tables[number] = table
        advance(batches[number])

    for number in range(len(batches)):
        if (table := read_part(parts, number)) is not None:
            have(number, table)
    missing = [number for number in range(len(batches)) if number not in tables]

    def done(place: int, table: pa.Table) -> None:
        write_part(parts, missing[place], table)
        have(missing[place], table)

    share([batches[number] for number in missing], compute, done)
    return [tables[number] for number in range(len(batches))]


def read_part(parts: Path | None, number: int) -> pa.Table | None:
    """The table of a batch if it is there; a damaged one is computed again."""
    path = _part(parts, number)
    if path is not None and path.is_file():
        with contextlib.suppress(OSError, ValueError):
            return pq.read_table(path)
    return None


def write_part(parts: Path | None, number: int, table: pa.Table) -> None:
    """Keep the table of a batch, written beside and renamed; plainly, since it is soon removed, and doubles hardly compress."""
    path = _part(parts, number)
    if path is not None:
        with replacing(path) as beside:
            pq.write_table(table, beside, use_dictionary=False, compression="none", write_statistics=False)


def _part(parts: Path | None, number: int) -> Path | None:
    return parts / f"part-{number:05d}.parquet" if parts else None


def resume_state(parts: Path | None, key: str) -> list[list[int]] | None:
    """The texts that an interrupted run with this key had written, None where there are none. Raises UserError for another key."""
    path = parts / "part-state.json" if parts else None
    if path is None or not path.is_file():
        return None
    try:
        state = json.loads(path.read_text("utf-8"))
        texts: list[list[int]] = state["texts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state["key"] != key:
        raise UserError(
            f"{parts} was started with other models, prompts or options; --resume needs the same ones, --overwrite starts over"
        )
    return texts


def begin(parts: Path | None, key: str) -> None:
    """Keep the key of a run that starts from no texts. Raises UserError for parts of another run."""
    if resume_state(parts, key) is None:
        save_state(parts, key, [])


def save_state(parts: Path | None, key: str, texts: list[list[int]]) -> None:
    """Keep the key of a run and the texts it starts from."""
    if parts:
        with replacing(parts / "part-state.json") as beside:
            beside.write_text(json.dumps({"key": key, "texts": texts}), "utf-8")
