"""A tiny random model of every causal and image-text class of transformers, made by shrinking the default config of its family.

Nothing is a table of families: fields are shrunk by their names, and `OVERRIDES` has what a config's own rules ask for beside that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from families import VOCAB, tiny_tokenizer

__all__ = ["FAMILIES", "family_config", "family_folder", "family_model"]

LAYERS = 4
MOST = 20_000_000  # parameters of a tiny model; far fewer as a rule

# name of the class by family; a family in both lists that has two classes is there twice, its image-text class as `name (image)`
FAMILIES: dict[str, tuple[str, str]] = {
    key: (kind, cls) for kind, cls in sorted(dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).items()) for key in (kind,)
}
for _kind, _cls in sorted(dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES).items()):
    if FAMILIES.get(_kind, (_kind, _cls))[1] == _cls:
        FAMILIES[_kind] = (_kind, _cls)
    else:
        FAMILIES[f"{_kind} (image)"] = (_kind, _cls)

_SIZES: list[tuple[str, Any]] = [  # the first pattern that matches the whole name of an integer field
    (r"vocab_size|.*_vocab_size", VOCAB),
    (r"num_hidden_layers|n_layers?|num_layers|num_decoder_layers|decoder_layers|encoder_layers|depth|depths", LAYERS),
    (r"(num|n)_(kv_heads|key_value_heads|head_kv)|num_global_key_value_heads|swa_num_key_value_heads", 2),
    (r".*num_attention_heads|n_heads?|num_heads|num_attn_heads|.*attention_heads|.*_num_heads|.*_n_heads", 4),
    (r"head_dim|.*_head_dim|d_head|head_size|attention_head_size|kv_channels|d_kv", 8),
    (r"rotary_dim", 8),
    (r".*lora_rank|.*_rank|.*_rank_.*|rank", 16),
    (r".*intermediate_size|ffn_dim|.*ffn_dim|ffn_hidden_size|n_inner|dim_ff|.*_ffn_size|mlp_dim|d_ff", 48),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|.*_hidden_size|.*_hidden_dim|emb_dim|hidden_dim|dim_model|lru_width|word_embed_proj_dim|embedding_size|projection_dim|model_dim|.*_embed_dim", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len", 64),
    (r"(num|n)_(local_|routed_|mlp_)?experts|moe_num_experts|num_local_experts|n_routed_experts|num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_top_k|moe_k|num_experts_per_token|top_k_experts|num_selected_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|num_groups_experts|topk_group", 1),
    (r"image_size|img_size", 16),
    (r"patch_size|vision_patch_size", 8),
    (r"sliding_window|window_size|attention_window|local_attention", 8),
    (r"mamba_d_state|ssm_state_size|state_size|d_state", 8),
    (r"pad_token_id", 0), (r"bos_token_id|decoder_start_token_id", 1), (r"eos_token_id|sep_token_id", 2),
]  # fmt: skip

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
    "n_group": 1,
    "topk_group": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"), _MROPE),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "llama4": {"vision_config": {"intermediate_size": 48, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}, "text_config": {"intermediate_size_mlp": 48}},
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}},
    "qwen4_exp_text": {"head_dim": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [2]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 4},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4},
    "nemotron_h": _NEMOTRON, "nemotron_h_omni": {"text_config": _NEMOTRON},
    "nemotron": {"num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 4, "mamba_headdim": 16, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3], "use_mem_rope": False, "chunk_size": 8},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_head_dim": 16, "attention_hidden_size": 64},
    "dbrx": {"n_heads": 4},
    "gemma3n_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "intermediate_size": 48, "num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 2]}, "vision_feature_layer": [1, 2]},
    "xlstm": {"num_heads": 4, "chunk_size": 8, "embedding_dim": 32},
}  # fmt: skip


def _shrunk(values: dict[str, Any], old_layers: int | None, extra: dict[str, Any]) -> dict[str, Any]:
    layers = next((values[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers") if isinstance(values.get(key), int)), old_layers)  # fmt: skip
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("transformers_version", "architectures", "torch_dtype", "dtype"):
            continue
        if isinstance(value, dict) and key != "rope_parameters" and not key.startswith("rope"):
            value = _shrunk(value, layers, {})
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
            if size is not None:
                value = size
            elif key.endswith(("token_id", "token_index", "_token")) and value >= VOCAB:
                value = 40 + sum(map(ord, key)) % 24
        elif isinstance(value, list) and layers and len(value) == layers and layers > LAYERS:
            value = _few(value)
        elif isinstance(value, list) and key == "eos_token_id":
            value = 2
        if key == "per_layer_config":  # follows from the other fields
            continue
        if isinstance(value, dict) and "mrope_section" in value:
            half = int(4 * value.get("partial_rotary_factor", 1.0))
            value = {
                **value,
                "mrope_section": [half - 2 * (half // 3 or 1), half // 3 or 1, half // 3 or 1]
                if half > 2
                else [1, 1, 0],
            }
        result[key] = value
    if "kv_lora_rank" in result and not isinstance(result.get("text_config"), dict):
        result |= {"num_key_value_heads": result.get("num_attention_heads", 4)}
        if "qk_head_dim" in result:
            result["qk_head_dim"] = 16
    return result | extra


def _few(values: list[Any]) -> list[Any]:
    """`LAYERS` entries of a list with one for each layer, in order, each kind of entry among them."""
    chosen: list[int] = []
    for i, value in enumerate(values):
        if value not in [values[j] for j in chosen] and len(chosen) < LAYERS:
            chosen.append(i)
    chosen += [i for i in range(len(values)) if i not in chosen][: LAYERS - len(chosen)]
    return [values[i] for i in sorted(chosen)]


def family_config(family: str) -> Any:
    """The tiny config of a family."""
    kind, _ = FAMILIES[family]
    cls = CONFIG_MAPPING[kind]
    values = cls().to_dict()
    wanted = getattr(transformers, FAMILIES[family][1]).config_class
    config = cls.from_dict(_merge(_shrunk(values, None, {}), OVERRIDES.get(family, OVERRIDES.get(kind, {}))))
    text = config.get_text_config(decoder=True)
    return text if isinstance(text, wanted) and not isinstance(config, wanted) else config


def _merge(values: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            value = _merge(dict(values[key]), value)
        values[key] = value
    return values


def family_model(family: str, seed: int = 0) -> Any:
    """A random float32 model, in eval mode, with weights so large that every sublayer matters."""
    torch.manual_seed(seed)
    cls, config = getattr(transformers, FAMILIES[family][1]), family_config(family)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls._from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size // 10**6} million parameters are left, for want of a rule that shrinks its config")
    model = cls._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name or "dt_bias" in name or "correction_bias" in name or not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.float().eval()


def family_folder(family: str, folder: Path, seed: int = 0) -> Any:
    """Write the tiny model with a tokenizer as a plain folder, and give it."""
    model = family_model(family, seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
