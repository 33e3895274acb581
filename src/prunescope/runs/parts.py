"""Finished batches of a run, kept in its unfinished folder, so that `--resume` need not compute them again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prunescope.errors import UserError

__all__ = ["part", "resume_state", "save_state"]


def part(parts: Path | None, number: int, compute: Callable[[], pa.Table]) -> pa.Table:
    """The table of a batch: read if it is there, else computed and written beside and renamed."""
    path = parts / f"part-{number:05d}.parquet" if parts else None
    if path is not None and path.is_file():
        with contextlib.suppress(OSError, ValueError):  # a damaged part is computed again
            return pq.read_table(path)
    table = compute()
    if path is not None:
        beside = path.with_suffix(".tmp")
        pq.write_table(table, beside)
        beside.replace(path)
    return table


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
            f"{parts} was started with other models, prompts or options; --resume needs the same ones, --overwrite starts anew"
        )
    return texts


def save_state(parts: Path | None, key: str, texts: list[list[int]]) -> None:
    """Keep the key of a run and the texts it starts from."""
    if parts:
        beside = parts / "part-state.tmp"
        beside.write_text(json.dumps({"key": key, "texts": texts}), "utf-8")
        beside.replace(parts / "part-state.json")
