"""vLLM's own classes, with sublayers that do nothing in the place of the dropped ones. Imported by vLLM alone, see `vllm_plugin.py`.

A layer of vLLM carries two tensors, the residual stream without its last branch, and that branch, which the next norm adds. So a sublayer that is left
out hands on both as they came. A dropped attention takes no part in vLLM's list of attentions, from which the key/value cache is made: it has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

__all__ = [
    "PrunedGemma2ForCausalLM",
    "PrunedGemma3ForCausalLM",
    "PrunedLlamaForCausalLM",
    "PrunedMistralForCausalLM",
    "PrunedQwen2ForCausalLM",
    "PrunedQwen3ForCausalLM",
]


class Skip(nn.Module):
    """In the place of the norm before a dropped sublayer."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """The last branch (tokens, d) and the stream (tokens, d) as they came; at the first norm of all, where the stream begins, a branch of zeros."""
        return torch.zeros_like(hidden_states) if residual is None else (hidden_states, residual)


class Pass(nn.Module):
    """In the place of a dropped sublayer and of the norm after it: hands on the last branch."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class Pruned:
    """Mixed into a class of vLLM: removes what config.json lists in `no_attention` and `no_mlp`."""

    before = ("input_layernorm", "post_attention_layernorm")  # the norm before the attention and before the MLP
    after: tuple[str, ...] = ()  # the norms after them

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        for kind, (module, layers) in enumerate((("self_attn", config.no_attention), ("mlp", config.no_mlp))):
            for i in layers:
                layer = self.model.layers[i]  # type: ignore[attr-defined]
                if not hasattr(layer, module):  # another process of a pipeline has it
                    continue
                _forget(getattr(layer, module), vllm_config)
                setattr(layer, self.before[kind], Skip())
                for name in (module, *self.after[kind : kind + 1]):
                    setattr(layer, name, Pass())


def _forget(module: nn.Module, vllm_config: VllmConfig) -> None:
    """Take the attentions of ``module`` out of the list from which vLLM makes its key/value cache."""
    context = vllm_config.compilation_config.static_forward_context
    for name in [name for name, layer in context.items() if any(layer is part for part in module.modules())]:
        del context[name]


class PrunedLlamaForCausalLM(Pruned, LlamaForCausalLM):
    pass


class PrunedMistralForCausalLM(Pruned, MistralForCausalLM):
    pass


class PrunedQwen2ForCausalLM(Pruned, Qwen2ForCausalLM):
    pass


class PrunedQwen3ForCausalLM(Pruned, Qwen3ForCausalLM):
    pass


class _Gemma(Pruned):
    """Its sublayers have a norm after them as well."""

    before = ("input_layernorm", "pre_feedforward_layernorm")
    after = ("post_attention_layernorm", "post_feedforward_layernorm")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.model_config.dtype == torch.float16:  # vLLM refuses it by the family's model type
            raise ValueError("Gemma is not stable in float16; use bfloat16 or float32")
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class PrunedGemma2ForCausalLM(_Gemma, Gemma2ForCausalLM):
    pass


class PrunedGemma3ForCausalLM(_Gemma, Gemma3ForCausalLM):
    pass
