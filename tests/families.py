"""Tiny random models of every family that prunescope promises to support; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SHORT_WINDOW = {"sliding_window": 4}
_MIXED = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
    "full_attention",
    "sliding_attention",
]


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in _COMMON.items() if key not in names}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, use_sliding_window=True, max_window_layers=3, **_SHORT_WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, **_SHORT_WINDOW),
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1, 4]
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **_without("num_key_value_heads"), num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1,
        routed_scaling_factor=1.0, topk_method="greedy",
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_without("num_key_value_heads"), num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, n_group=2, topk_group=1,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON, head_dim=8, layer_types=_MIXED, final_logit_softcapping=5.0, attn_logit_softcapping=8.0, query_pre_attn_scalar=8, **_SHORT_WINDOW
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_COMMON, head_dim=8, layer_types=_MIXED, **_SHORT_WINDOW),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, resid_pdrop=0.1),
    "olmo2": lambda: transformers.Olmo2Config(**_COMMON),
    "granite": lambda: transformers.GraniteConfig(**_COMMON, residual_multiplier=0.4, logits_scaling=3.0, embedding_multiplier=2.0, attention_multiplier=0.3),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=6, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_without("num_key_value_heads"), use_parallel_residual=True),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**_without("num_key_value_heads"), use_parallel_residual=False),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=6, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "falcon": lambda: transformers.FalconConfig(
        **_without("intermediate_size", "num_key_value_heads", "max_position_embeddings"), max_position_embeddings=64, parallel_attn=True, bias=True
    ),
    "falcon_new": lambda: transformers.FalconConfig(
        **_without("intermediate_size", "num_key_value_heads"), num_kv_heads=2, new_decoder_architecture=True, parallel_attn=True
    ),
    "falcon_alibi": lambda: transformers.FalconConfig(
        **_without("intermediate_size", "num_key_value_heads"), alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
_EXPERTS: dict[str, Any] = {**_COMMON, "num_experts_per_tok": 2, "intermediate_size": 24}
EXPERTS: dict[str, Callable[[], Any]] = {  # in other forms: transposed with biases and a gate of their own, a shared one, many, fused inputs
    "gpt_oss": lambda: transformers.GptOssConfig(**_EXPERTS, head_dim=8, num_local_experts=4, sliding_window=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "olmoe": lambda: transformers.OlmoeConfig(**_EXPERTS, num_experts=24),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_EXPERTS, num_local_experts=4),
}  # fmt: skip


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model with weights large enough that every sublayer matters, norms and biases included."""
    torch.manual_seed(seed)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        (CONFIGS | EXPERTS)[family](), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "correction_bias" in name:
                parameter.zero_()
    return model.eval()


def tiny_tokenizer() -> Any:
    """A word-level tokenizer over w4 ... w63, with the special ids of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """A tiny model with a tokenizer, saved as a plain folder."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def characters_folder(folder: Path, seed: int = 0) -> Path:
    """A tiny random Llama that reads single characters, so that it can be asked the built-in tasks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    signs = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(signs), hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
