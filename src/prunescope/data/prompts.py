"""Prompts: the shipped ones in the paper's three kinds, or a file of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from prunescope.errors import UserError

__all__ = ["Prompt", "read_prompts"]


@dataclass(frozen=True)
class Prompt:
    text: str
    id: str
    kind: str = "custom"


def read_prompts(source: str | Path | None = None) -> list[Prompt]:
    """Read JSONL with ``prompt`` and, if wanted, ``id`` and ``kind``; any other file is one prompt a line.

    Args:
        source: the file, or None for the 15 shipped prompts (multiple choice, arithmetic word problems, open-ended).
    Raises:
        UserError: no such file, no prompt in it, or a line that is not as said.
    """
    if source is None:
        return _parse_jsonl((files("prunescope.data") / "prompts.jsonl").read_text("utf-8"), "the shipped prompts")
    path = Path(source)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts file {path} cannot be read: {getattr(error, 'strerror', None) or error}; give a UTF-8 text or JSONL file"
        ) from error
    prompts = _parse_jsonl(text, str(path)) if path.suffix in (".jsonl", ".ndjson", ".json") else _parse_lines(text)
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompt; write one a line, or JSONL with a field 'prompt'")
    return prompts


def _parse_lines(text: str) -> list[Prompt]:
    return [Prompt(line, str(i)) for i, line in enumerate(filter(str.strip, text.splitlines()))]


def _parse_jsonl(text: str, where: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number}: not JSON ({error}); write one JSON object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UserError(f'{where}, line {number}: no \'prompt\' with a text; write {{"prompt": "..."}}')
        prompts.append(Prompt(row["prompt"], str(row.get("id", len(prompts))), str(row.get("kind", "custom"))))
    return prompts
