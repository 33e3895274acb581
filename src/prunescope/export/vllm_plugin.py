"""What vLLM calls as it starts (entry point group `vllm.general_plugins`): it makes the pruned form of a family's own class known, and its config.

vLLM imports this in its own environment, which needs torch, transformers and vLLM, and nothing of prunescope's other dependencies.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from prunescope.export.vllm_names import IN_PLUGIN, own_type

__all__ = ["CONFIGS", "register"]


class PrunedLlamaConfig(LlamaConfig):
    """Llama's, with the blocks whose attention (`no_attention`) or MLP (`no_mlp`) is dropped; so are the others."""

    model_type = own_type("llama")


class PrunedMistralConfig(MistralConfig):
    model_type = own_type("mistral")


class PrunedQwen2Config(Qwen2Config):
    model_type = own_type("qwen2")


class PrunedQwen3Config(Qwen3Config):
    model_type = own_type("qwen3")


class PrunedGemma2Config(Gemma2Config):
    model_type = own_type("gemma2")


class PrunedGemma3Config(Gemma3TextConfig):
    model_type = own_type("gemma3_text")


CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": PrunedLlamaConfig,
    "mistral": PrunedMistralConfig,
    "qwen2": PrunedQwen2Config,
    "qwen3": PrunedQwen3Config,
    "gemma2": PrunedGemma2Config,
    "gemma3_text": PrunedGemma3Config,
}
"""By the family's own model type. Classes of a module, since vLLM pickles them for its engine's process."""


def register() -> None:
    """Register every family. vLLM calls it once in each of its processes; a second call changes nothing."""
    from vllm import ModelRegistry

    for family, config in CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        name = IN_PLUGIN[family]
        ModelRegistry.register_model(name, f"prunescope.export.vllm_models:{name}")  # by name: imported when asked for
