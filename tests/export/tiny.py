"""Tiny models that engines run: a byte-level BPE tokenizer of 300 tokens, and random weights large enough that every sublayer matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB = 320
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXT = [
    "The history of the city of Vienna begins with the river, and the river's name is older than the city: it was there in 15 BC.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n",
    "Question: What is 17 + 25?\nAnswer: 42. They'll say it isn't, don't they?  Two  spaces, and 12345 apples.",
]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: transformers.LlamaConfig(**_COMMON | more),
    "llama3": lambda **more: transformers.LlamaConfig(
        **_COMMON | more, rope_parameters=_LLAMA3, tie_word_embeddings=True
    ),
    "yarn": lambda **more: transformers.LlamaConfig(**_COMMON | more, rope_parameters=YARN),
    "qwen2": lambda **more: transformers.Qwen2Config(**_COMMON | {"use_sliding_window": False} | more),
    "qwen3": lambda **more: transformers.Qwen3Config(**_COMMON | {"head_dim": 16} | more),
    "mistral": lambda **more: transformers.MistralConfig(**_COMMON | {"head_dim": 16, "sliding_window": None} | more),
    "gemma2": lambda **more: transformers.Gemma2Config(**_COMMON | _GEMMA | more, query_pre_attn_scalar=25),
    "gemma3": lambda **more: transformers.Gemma3TextConfig(**_COMMON | _GEMMA | more, query_pre_attn_scalar=25),
}


def byte_tokenizer(split: str | None = QWEN_SPLIT) -> Any:
    """A byte-level BPE tokenizer; without ``split`` by GPT-2's rule."""
    inner = Tokenizer(models.BPE())
    if split is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def space_tokenizer() -> Any:
    """A BPE tokenizer as SentencePiece makes it: spaces are a sign, and what it does not know is spelt in bytes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    loaded = json.loads(inner.to_str())
    loaded["added_tokens"] = loaded["added_tokens"][:3]  # the bytes are ordinary tokens
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(loaded)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny(family: str, folder: Path, tokenizer: Any = None, seed: int = 0, **more: Any) -> str:
    """A tiny model with a tokenizer that llama.cpp has a name for, saved as a plain folder; ``more`` goes into its config."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**more), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)
