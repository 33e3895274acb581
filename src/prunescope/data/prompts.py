"""Prompts: the shipped ones in the paper's three kinds, or a file of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from prunescope.data.jsonl import check_new, holds_rows, read_rows, read_text
from prunescope.errors import UserError

__all__ = ["Prompt", "read_prompts"]

_WHAT, _FORM = "prompts file", "give a UTF-8 text or JSONL file"


@dataclass(frozen=True)
class Prompt:
    text: str
    id: str
    kind: str = "custom"
    chat: bool = True  # put into the chat template, where one is asked for


def read_prompts(source: str | Path | None = None) -> list[Prompt]:
    """Read JSONL, or a JSON array, with ``prompt`` and, if wanted, ``id``, ``kind`` and ``chat``; any other file is one prompt a line.

    Args:
        source: the file, or None for the 15 shipped prompts (multiple choice, arithmetic word problems, open-ended).
    Raises:
        UserError: no such file, no prompt in it, or a line that is not as said.
    """
    if source is None:
        return _prompts(files("prunescope.data") / "prompts.jsonl")
    if not str(source).strip():
        raise UserError("a file of prompts has no name; is there a comma too many?")
    path = Path(source).expanduser()
    if holds_rows(path):
        prompts = _prompts(path)
    else:
        lines = filter(str.strip, read_text(path, _WHAT, _FORM).splitlines())
        prompts = [Prompt(line, str(i)) for i, line in enumerate(lines)]
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompt; write one a line, or JSONL with a field 'prompt'")
    return prompts


def _prompts(file: Traversable) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    for place, row in read_rows(file, _WHAT, _FORM):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UserError(f'{place}: no \'prompt\' with a text; write {{"prompt": "..."}}')
        name = str(row.get("id", len(found)))
        check_new(place, name, found)
        chat = row.get("chat", True)
        if not isinstance(chat, bool):
            raise UserError(
                f"{place}: 'chat' is {chat!r}; write true, or false for text that no chat template surrounds"
            )
        found[name] = Prompt(row["prompt"], name, str(row.get("kind", "custom")), chat)
    return list(found.values())
