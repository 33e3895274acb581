"""Names that an exported folder and the vLLM plugin share."""

from __future__ import annotations

__all__ = ["IN_PLUGIN", "own_type"]

IN_PLUGIN = {
    "llama": "PrunedLlamaForCausalLM",
    "mistral": "PrunedMistralForCausalLM",
    "qwen2": "PrunedQwen2ForCausalLM",
    "qwen3": "PrunedQwen3ForCausalLM",
    "gemma2": "PrunedGemma2ForCausalLM",
    "gemma3_text": "PrunedGemma3ForCausalLM",
}
"""Model type of transformers -> class in `export/vllm_models.py`, by which vLLM finds it in `architectures` of config.json."""


def own_type(family: str) -> str:
    """The model type in config.json: one of its own, so that nothing loads the folder as the dense model."""
    return f"prunescope_{family}"
