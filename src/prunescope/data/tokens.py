"""Texts -> token ids that the model knows: chat templates, prompts with options, checks."""

from __future__ import annotations

from collections.abc import Sequence

from prunescope.data.prompts import Prompt
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel

__all__ = ["chat_text", "check_tokens", "encode", "tokens_with_options"]


def encode(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int, *, chat: bool = False
) -> list[list[int]]:
    """Token ids of the prompts. Raises UserError where one is empty, or with its continuation past the model's context."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: at least one step is needed")
    encoded = []
    for prompt in prompts:
        as_turn = chat and prompt.chat
        text = chat_text(loaded, prompt.text, "leave --chat out") if as_turn else prompt.text
        ids: list[int] = loaded.tokenizer(text, add_special_tokens=not as_turn)["input_ids"]
        check_tokens(loaded, f"prompt {prompt.id!r}", ids, empty=" has no tokens; write some text")
        if loaded.context and len(ids) + max_new_tokens > loaded.context:
            raise UserError(
                f"prompt {prompt.id!r} has {len(ids)} tokens; with {max_new_tokens} new ones that is past the model's context of {loaded.context}; shorten it or ask for fewer new tokens"
            )
        encoded.append(ids)
    return encoded


def chat_text(loaded: LoadedModel, text: str, instead: str) -> str:
    """``text`` as a user's turn in the model's chat template. Raises UserError where it has none, with what to do ``instead``."""
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{loaded.ref} has no chat template; {instead}")
    turn = [{"role": "user", "content": text}]
    found: str = loaded.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return found


def tokens_with_options(
    loaded: LoadedModel, text: str, options: Sequence[str], *, special: bool = True
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, and of each option those that the tokenizer makes of prompt + option after the prompt's.

    Args:
        special: whether the tokenizer adds its start token; a chat template has it already.
    """
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=special)["input_ids"]
    both = (loaded.tokenizer(text + option, add_special_tokens=special)["input_ids"] for option in options)
    return ids, [tokens[len(ids) :] for tokens in both]


def check_tokens(loaded: LoadedModel, where: str, *sequences: Sequence[int], empty: str) -> None:
    """Raise UserError if a sequence is empty (``empty`` completes the sentence that begins with ``where``) or the model does not know a
    token."""
    if not all(sequences):
        raise UserError(f"{where}{empty}")
    largest, known = max(map(max, sequences)), loaded.anatomy.vocab_size
    if largest >= known:
        raise UserError(
            f"{where}: its tokenizer gives token {largest}, but the model knows {known}; tokenizer and model do not belong together"
        )
