"""A GGUF file for llama.cpp, of the architecture `deci` (Nemotron-NAS): a block may have no attention.

What llama.cpp's `deci` reads: `head_count[i] = 0` for a block without attention, which then has no key/value cache either. A block with
`feed_forward_length[i] = 0` is left as a whole, its attention with it; so a dropped MLP is written as one of a few zero weights. Block 0
must have heads, since the head width is found there; where its attention is dropped, it is one head of zeros. Whole blocks are removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.export.parts import dropped_here, whole
from prunescope.models.loaded import LoadedModel
from prunescope.models.references import BUNDLED, bundled_file

__all__ = ["FAMILIES", "write_gguf"]

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
)  # rotary halves, RMS norms, SiLU: what `deci` computes, with biases where there are some
_ZERO_WIDTH = 32  # neurons of an MLP of zeros: a whole block of every quantised format
_MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(loaded: LoadedModel, path: Path) -> bool:
    """Write ``loaded``, without what is dropped, to ``path``. Returns whether the file has a tokenizer: without one it takes token ids.

    Raises:
        UserError: `deci` does not compute this family or one of its settings.
    """
    import gguf

    config = loaded.model.config
    _check(loaded)
    spec = dropped_here(loaded)
    gone = spec.whole_blocks()
    kept = [layer for layer in range(len(loaded.anatomy)) if layer not in gone]
    if not kept:
        raise UserError("every block is dropped; llama.cpp needs one")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shapes = []  # (heads, key/value heads, neurons) of each block that is written
    for place, layer in enumerate(kept):
        no_heads = (1, 1) if place == 0 else (0, 0)
        neurons = _ZERO_WIDTH if layer in spec.mlp else config.intermediate_size
        shapes.append((*(no_heads if layer in spec.attn else (heads, kv_heads)), neurons))
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_name(loaded.ref)
    writer.add_block_count(len(kept))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count([shape[0] for shape in shapes])
    writer.add_head_count_kv([shape[1] for shape in shapes])
    writer.add_feed_forward_length([shape[2] for shape in shapes])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    has_tokenizer = _add_tokenizer(loaded, writer)
    half = loaded.dtype == torch.float16

    def add(name: str, value: Tensor) -> None:
        array = value.detach().to("cpu", torch.float32).numpy()
        writer.add_tensor(name, np.ascontiguousarray(array.astype(np.float16) if half and array.ndim == 2 else array))

    with whole(loaded) as model:
        weights: dict[str, Tensor] = model.state_dict()
        add("token_embd.weight", weights["model.embed_tokens.weight"])
        add("output_norm.weight", weights["model.norm.weight"])
        if not config.tie_word_embeddings:
            add("output.weight", weights["lm_head.weight"])
        for place, layer in enumerate(kept):
            for ours, theirs in _MATRICES.items():
                is_attention = theirs.startswith("attn")
                dropped = layer in (spec.attn if is_attention else spec.mlp)
                if dropped and is_attention and place > 0:
                    continue
                for part in ("weight", "bias"):
                    value = weights.get(f"model.layers.{layer}.{ours}.{part}")
                    if value is None:
                        continue
                    if theirs in ("attn_q", "attn_k"):
                        value = _paired(value, heads if theirs == "attn_q" else kv_heads)
                    if dropped and not theirs.endswith("norm"):
                        value = _zeros(value, theirs, width)
                    add(f"blk.{place}.{theirs}.{part}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return has_tokenizer


def _check(loaded: LoadedModel) -> None:
    config, family = loaded.model.config, loaded.model.config.model_type
    otherwise = "export it --for transformers, or drop whole blocks and use --format compact"
    if family not in FAMILIES:
        raise UserError(
            f"--for llama.cpp: dropped sublayers run there for {', '.join(FAMILIES)}, not for {family}; {otherwise}"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    found = {
        "sliding window": window and window < config.max_position_embeddings,
        f"rope_type {config.rope_parameters.get('rope_type')}": config.rope_parameters.get("rope_type") != "default",
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
    }
    for what, is_there in found.items():
        if is_there:
            raise UserError(f"--for llama.cpp: its architecture deci has no {what}; {otherwise}")


def _paired(value: Tensor, heads: int) -> Tensor:
    """(heads * width, ...) with the two halves of each head interleaved: llama.cpp rotates neighbours, transformers halves."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _zeros(value: Tensor, name: str, width: int) -> Tensor:
    """Zeros of the smallest shape in the place of a dropped weight: one head, or a few neurons."""
    small = width if name.startswith("attn") else _ZERO_WIDTH
    if value.dim() == 1:
        return value.new_zeros(len(value) if name in ("attn_output", "ffn_down") else small)
    rows, columns = value.shape
    return value.new_zeros((rows, small) if name in ("attn_output", "ffn_down") else (small, columns))


def _add_tokenizer(loaded: LoadedModel, writer: Any) -> bool:
    """That of the GGUF file which the model is from; a file without one is read and written by token ids."""
    import gguf

    source = loaded.identity.get("source", "")
    path = bundled_file() if source == BUNDLED else Path(source)
    if path.suffix != ".gguf" or not path.is_file():
        writer.add_tokenizer_model("none")
        return False
    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    return True
