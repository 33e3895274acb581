"""The tokenizer of a GGUF file: taken from the GGUF file that the model is from, or written from `tokenizer.json`.

llama.cpp splits text by rules that it has in its own code, under names. Two kinds are written: byte-level BPE whose split is one of those that
have a name, and SentencePiece's BPE with bytes as a fallback. Any other tokenizer is left out, since the engine would read other tokens in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.models.references import BUNDLED, bundled_file

__all__ = ["add_tokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # the regular expression of tokenizer.json -> llama.cpp's name of it
    _CONTRACTIONS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"|\p{N}" + _REST: "qwen2",
}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's sign for a space


def add_tokenizer(loaded: LoadedModel, writer: Any) -> str | None:
    """Write the tokenizer of ``loaded``. Returns None, or why there is none in the file."""
    source = loaded.identity.get("source", "")
    path = bundled_file() if source == BUNDLED else Path(source)
    if path.suffix == ".gguf" and path.is_file():
        _copy(path, writer)
        return None
    with TemporaryDirectory() as folder:
        loaded.tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps(_special_ids(loaded)), "utf-8")
        try:
            _write(loaded, Path(folder), writer)
        except _NotWrittenError as reason:
            writer.add_tokenizer_model("none")
            return str(reason)
    return None


class _NotWrittenError(Exception):
    """The engine would split text otherwise than this tokenizer."""


def _copy(path: Path, writer: Any) -> None:
    import gguf

    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)


def _special_ids(loaded: LoadedModel) -> dict[str, int]:
    """Ids as `config.json` has them, which the gguf package reads beside `tokenizer.json`."""
    names = ("bos", "eos", "unk", "pad")
    found = {f"{name}_token_id": getattr(loaded.tokenizer, f"{name}_token_id", None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _write(loaded: LoadedModel, folder: Path, writer: Any) -> None:
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _NotWrittenError("there is no tokenizer.json")
    values = json.loads(file.read_text("utf-8"))
    model, size = values["model"], loaded.model.config.vocab_size
    if model["type"] != "BPE":
        raise _NotWrittenError(f"its tokenizer is of type {model['type']}, and llama.cpp takes BPE")
    if len(loaded.tokenizer) > size:
        raise UserError(f"--for llama.cpp: the tokenizer has {len(loaded.tokenizer)} tokens, the model {size} rows")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    by_bytes = bool(model.get("byte_fallback"))
    if not by_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(values))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_puts_space_first(values))
    texts, kinds = _tokens(values, size, by_bytes)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    if by_bytes:  # of two merges the one of the higher score is made: scores fall in the order of the merges
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        last = len(merges)
        writer.add_token_scores([-float(ranks.get(text, last)) for text in texts])
    special = gguf.SpecialVocab(folder, load_merges=not by_bytes, n_vocab=size)
    adds_bos = loaded.tokenizer("a")["input_ids"][:1] == [loaded.tokenizer.bos_token_id]
    special.add_special_token |= {"bos": adds_bos, "eos": False}
    special.chat_template = special.chat_template or getattr(loaded.tokenizer, "chat_template", None)
    special.add_to_gguf(writer, quiet=True)


def _tokens(values: dict[str, Any], size: int, by_bytes: bool) -> tuple[list[str], list[int]]:
    """Texts and kinds of all ids; an id without a token is one that is never read."""
    from gguf import TokenType

    texts: list[str] = [f"[unused{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for text, i in values["model"]["vocab"].items():
        is_byte = by_bytes and len(text) == 6 and text.startswith("<0x")
        texts[i], kinds[i] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in values.get("added_tokens", []):
        i = token["id"]
        texts[i], kinds[i] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if by_bytes and values["model"].get("unk_token") in texts:
        kinds[texts.index(values["model"]["unk_token"])] = TokenType.UNKNOWN
    return texts, [int(kind) for kind in kinds]


def _split_name(values: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text into words."""
    if (values.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise _NotWrittenError("its tokenizer changes the text before it splits it")
    outer = values.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        by_rule = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_rule:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_rule and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_rule and steps[0].get("behavior") == "Isolated":
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name:
                return name
    raise _NotWrittenError("its tokenizer splits text by a rule that is not known here under llama.cpp's name for it")


def _puts_space_first(values: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer reads a text as if a space stood before it. Raises _NotWrittenError for any other normalisation."""
    normaliser, splitter = values.get("normalizer") or {}, values.get("pre_tokenizer") or {}
    steps = normaliser.get("normalizers", [normaliser] if normaliser else [])
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE):
            raise _NotWrittenError(f"its tokenizer changes the text by {step['type']} before it splits it")
    if splitter.get("type") == "Metaspace":
        prefix = splitter.get("prepend_scheme", "always") != "never"
    elif splitter and not (splitter.get("type") == "Split" and splitter.get("behavior") == "MergedWithPrevious"):
        raise _NotWrittenError(f"its tokenizer splits text by {splitter.get('type')}")
    return prefix
