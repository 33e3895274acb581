"""Prompts with what a model has written after them, by whatever engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunescope.data.jsonl import check_new, read_rows
from prunescope.data.prompts import Prompt
from prunescope.data.tokens import check_tokens, encode
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel

__all__ = ["Continued", "encode_continued", "read_continuations"]

_FORM = "give JSONL with prompt and continuation"


@dataclass(frozen=True)
class Continued:
    """A prompt and its continuation, as text or as token ids of the dense model."""

    prompt: Prompt
    continuation: str | list[int]


def read_continuations(source: str | Path) -> list[Continued]:
    """Read JSONL, or a JSON array, with ``prompt``, ``continuation`` and, if wanted, ``id`` and ``kind``.

    Raises:
        UserError: no such file, no row in it, or a row that is not as said.
    """
    path = Path(source).expanduser()
    found: dict[str, Continued] = {}
    for place, row in read_rows(path, "continuations file", _FORM):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UserError(f'{place}: no \'prompt\' with a text; write {{"prompt": "...", "continuation": "..."}}')
        text = row.get("continuation")
        ids = isinstance(text, list) and all(type(token) is int and token >= 0 for token in text)
        if not (isinstance(text, str) or ids) or not text:
            raise UserError(
                f"{place}: no 'continuation' with a text or token ids; write what the dense model wrote after the prompt"
            )
        name = str(row.get("id", len(found)))
        check_new(place, name, found)
        found[name] = Continued(Prompt(row["prompt"], name, str(row.get("kind", "custom"))), text)
    if not found:
        raise UserError(f"continuations file {path} holds no row; {_FORM}")
    return list(found.values())


def encode_continued(
    loaded: LoadedModel, rows: Sequence[Continued], max_new_tokens: int, *, chat: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of their continuations the first ``max_new_tokens``.

    The tokens of a text that was continued are its prompt's and then its continuation's own, as a model writes them.

    Raises:
        UserError: as `encode`, and for a continuation without tokens or with tokens that the model does not know.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: at least one step is needed")
    prompts = encode(loaded, [row.prompt for row in rows], 1, chat=chat)
    texts = []
    for row, prompt in zip(rows, prompts, strict=True):
        ids = row.continuation
        if isinstance(ids, str):
            ids = loaded.tokenizer(ids, add_special_tokens=False)["input_ids"]
        check_tokens(loaded, f"continuation of prompt {row.prompt.id!r}", ids, empty=" has no tokens; write some text")
        texts.append(list(ids[:max_new_tokens]))
        if loaded.context and len(prompt) + len(texts[-1]) > loaded.context:
            raise UserError(
                f"prompt {row.prompt.id!r} has {len(prompt)} tokens and its continuation {len(texts[-1])}; that is past the model's context of {loaded.context}; shorten it or lower --max-new-tokens"
            )
    return prompts, texts
