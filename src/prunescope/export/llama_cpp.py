"""A GGUF file for llama.cpp: in the family's own architecture, or in `deci` (Nemotron-NAS), where a block may have no attention.

Whole blocks are removed, and what is left is an ordinary model of the family. Where half a block is dropped, `deci` runs what it can compute:
rotary halves, RMS norms, SiLU. What llama.cpp's `deci` reads: `head_count[i] = 0` for a block without attention, which then has no key/value
cache either. A block with `feed_forward_length[i] = 0` is left as a whole, its attention with it; so a dropped MLP is written as one of a few
zero weights. Block 0 must have heads, since the head width is found there; where its attention is dropped, it is one head of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.export.gguf_tokenizer import add_tokenizer
from prunescope.export.parts import dropped_here, rope_types, unusual_yarn, whole
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel

__all__ = ["FAMILIES", "IN_DECI", "write_gguf"]

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""Model type of transformers -> llama.cpp's own architecture of it."""
IN_DECI = ("llama", "mistral", "qwen2")
"""Model types that `deci` computes as well."""
_PAIRED = ("llama", "deci")  # they rotate neighbours, transformers rotates halves
_FREQUENCIES = ("llama", "deci")  # they read a factor for each rotary frequency
_ZERO_WIDTH = 32  # neurons of an MLP of zeros: a whole block of every quantised format
_GEMMA_27B_BLOCKS = 62  # at which llama.cpp scales queries by the width of the stream over the heads
_OTHERWISE = "export it --for transformers"


def write_gguf(loaded: LoadedModel, path: Path) -> str | None:
    """Write ``loaded``, without what is dropped, to ``path``.

    Returns:
        None, or why the file has no tokenizer and takes token ids alone.
    Raises:
        UserError: llama.cpp does not compute this family, one of its settings, or what is left of it.
    """
    import gguf

    plan = _plan(loaded)
    config = loaded.model.config
    writer = gguf.GGUFWriter(path, plan.arch)
    writer.add_name(loaded.ref)
    writer.add_block_count(len(plan.kept))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    heads, kv_heads, neurons = (list(column) for column in zip(*plan.shapes, strict=True))
    for add_shape, values in (
        (writer.add_head_count, heads), (writer.add_head_count_kv, kv_heads), (writer.add_feed_forward_length, neurons)
    ):  # fmt: skip
        add_shape(values if plan.arch == "deci" else values[0])
    writer.add_key_length(plan.width)
    writer.add_value_length(plan.width)
    writer.add_rope_dimension_count(plan.width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    factors = _add_positions(loaded, plan, writer)
    without = add_tokenizer(loaded, writer)

    def add(name: str, value: Tensor) -> None:
        kind = _kind(loaded.dtype) if value.dim() == 2 else gguf.GGMLQuantizationType.F32
        array = np.ascontiguousarray(value.detach().to("cpu", torch.float32).numpy())
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    if factors is not None:
        add("rope_freqs.weight", factors)
    with whole(loaded) as model:
        for name, value in _tensors(model.state_dict(), plan, config):
            add(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return without


def _kind(dtype: torch.dtype) -> Any:
    from gguf import GGMLQuantizationType as Kind

    return {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}.get(dtype, Kind.F32)


# --- what the engine can run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The architecture of the file, and which blocks it has."""

    arch: str
    spec: DropSpec  # what is left out, in the numbers of the blocks that are loaded
    kept: tuple[int, ...]  # blocks that are written
    shapes: tuple[tuple[int, int, int], ...]  # heads, key/value heads and neurons of each of them
    width: int  # of a head
    sliding: tuple[bool, ...]  # which of them see a window only


def _plan(loaded: LoadedModel) -> _Plan:
    """Raises UserError for what llama.cpp would not load, or load and compute otherwise."""
    config, family = loaded.model.config, loaded.model.config.model_type
    if family not in FAMILIES:
        raise UserError(f"--for llama.cpp: {family} is not written, only {', '.join(FAMILIES)}; {_OTHERWISE}")
    spec = dropped_here(loaded)
    silent = (loaded.record or {}).get("format") == "zeroed" and not loaded._drops
    if silent and family not in IN_DECI:  # its zeros are in the weights, and run anywhere
        spec = DropSpec()
    gone = spec.whole_blocks()
    halves = set(spec.attn) ^ set(spec.mlp)
    if halves and family not in IN_DECI:
        raise UserError(
            f"--for llama.cpp: half a block can be dropped for {', '.join(IN_DECI)} only, not for {family}; drop whole blocks (--target block), "
            f"export a drop --format zeroed, which saves nothing, or {_OTHERWISE}"
        )
    kept = tuple(layer for layer in range(len(loaded.anatomy)) if layer not in gone)
    if not kept:
        raise UserError("--for llama.cpp: every block is dropped, and it needs one; drop fewer")
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(loaded.anatomy)
    sliding = tuple(types[layer] == "sliding_attention" for layer in kept)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    shapes = []
    for place, layer in enumerate(kept):
        no_heads = (1, 1) if place == 0 else (0, 0)
        neurons = _ZERO_WIDTH if layer in spec.mlp else config.intermediate_size
        shapes.append((*(no_heads if layer in spec.attn else (heads, kv_heads)), neurons))
    plan = _Plan(
        arch="deci" if halves else FAMILIES[family], spec=spec, kept=kept, shapes=tuple(shapes),
        width=getattr(config, "head_dim", None) or config.hidden_size // heads, sliding=sliding,
    )  # fmt: skip
    _check(config, plan)
    return plan


def _check(config: Any, plan: _Plan) -> None:
    gemma = plan.arch == "gemma3"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    by_window = any(plan.sliding) or not getattr(config, "layer_types", None)
    act = getattr(config, "hidden_activation" if gemma else "hidden_act", None)
    kinds = ("default", "linear", *(("llama3",) if plan.arch in _FREQUENCIES else ()), *(() if gemma else ("yarn",)))
    found = {f"rope_type {kind}": kind not in kinds for kind in rope_types(config)}
    found |= dict.fromkeys(unusual_yarn(config), True)
    found |= {
        "sliding window": bool(not gemma and by_window and window and window < config.max_position_embeddings),
        "pattern of sliding windows but every n-th block without one": gemma and _period(plan.sliding) is None,
        f"activation {act}": act != ("gelu_pytorch_tanh" if gemma else "silu"),
        "soft cap of logits": bool(gemma and (config.final_logit_softcapping or config.attn_logit_softcapping)),
    }
    for what, is_there in found.items():
        if is_there:
            raise UserError(f"--for llama.cpp: its architecture {plan.arch} has no {what}; {_OTHERWISE}")


def _period(sliding: tuple[bool, ...]) -> int | None:
    """n where every n-th block, and no other, has no window; 0 where all have one. None where there is no such n."""
    for period in range(len(sliding) + 1):
        if sliding == tuple(period == 0 or (i + 1) % period != 0 for i in range(len(sliding))):
            return period
    return None


# --- what is written ---------------------------------------------------------------------------------------------------


def _add_positions(loaded: LoadedModel, plan: _Plan, writer: Any) -> Tensor | None:
    """Write rotary bases and windows. Returns what each rotary frequency is divided by, where it is not the same for all."""
    import gguf

    config = loaded.model.config
    rope = config.rope_parameters
    if plan.arch == "gemma3":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise UserError(f"--for llama.cpp: gemma3 has no scaled positions inside a sliding window; {_OTHERWISE}")
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_period(plan.sliding))
    base = float(rope["rope_theta"])
    writer.add_rope_freq_base(base)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        original = int(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_factor(float(rope["factor"] or config.max_position_embeddings / original))
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind != "llama3":
        return None
    plain = base ** -(torch.arange(0, plan.width, 2, dtype=torch.float64) / plan.width)
    scaled: Tensor = loaded.model.model.rotary_emb.inv_freq
    return plain / scaled.to("cpu", torch.float64)


def _tensors(weights: dict[str, Tensor], plan: _Plan, config: Any) -> list[tuple[str, Tensor]]:
    """llama.cpp's names and tensors, in the order of the blocks. Raises UserError for a weight that the architecture has no place for."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == plan.arch)
    names = gguf.get_tensor_name_map(arch, len(plan.kept))
    place_of = {layer: place for place, layer in enumerate(plan.kept)}
    found = []
    for ours, value in weights.items():
        head, *rest = ours.removeprefix("model.layers.").split(".")
        if not ours.startswith("model.layers."):
            if ours == "lm_head.weight" and config.tie_word_embeddings:
                continue
            theirs, part = names.get_name(ours, (".weight", ".bias")), ""
        elif int(head) not in place_of:
            continue
        else:
            layer, part = int(head), rest[0]
            place = place_of[layer]
            theirs = names.get_name(f"model.layers.{place}.{'.'.join(rest)}", (".weight", ".bias"))
        if theirs is None or (ours.endswith("bias") and plan.arch in ("qwen3", "gemma3")):
            raise UserError(f"--for llama.cpp: its architecture {plan.arch} has no place for {ours}; {_OTHERWISE}")
        if part == "input_layernorm" and layer in plan.spec.attn and place > 0:
            continue
        if part in ("self_attn", "mlp") and layer in (plan.spec.attn if part == "self_attn" else plan.spec.mlp):
            if part == "self_attn" and place > 0:
                continue
            value = _zeros(value, rest[1], plan.width)
        elif part == "self_attn" and rest[1] in ("q_proj", "k_proj") and plan.arch in _PAIRED:
            value = _paired(value, plan.shapes[place][0 if rest[1] == "q_proj" else 1])
        if plan.arch == "gemma3" and "norm" in ours:
            value = (value.float() + 1) * (_query_scale(config, plan) if ours.endswith("q_norm.weight") else 1)
        found.append((theirs, value))
    return found


def _query_scale(config: Any, plan: _Plan) -> float:
    """Gemma's own scale of the queries over the one that llama.cpp takes; the norm of the queries carries it."""
    taken = config.hidden_size / config.num_attention_heads if len(plan.kept) == _GEMMA_27B_BLOCKS else plan.width
    return float((taken / config.query_pre_attn_scalar) ** 0.5)


def _paired(value: Tensor, heads: int) -> Tensor:
    """(heads * width, ...) with the two halves of each head interleaved: llama.cpp rotates neighbours, transformers halves."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _zeros(value: Tensor, name: str, width: int) -> Tensor:
    """Zeros of the smallest shape in the place of a dropped weight: one head, or a few neurons."""
    small, is_output = width if name[0] in "qkvo" else _ZERO_WIDTH, name in ("o_proj", "down_proj")
    if value.dim() == 1:
        return value.new_zeros(len(value) if is_output else small)
    rows, columns = value.shape
    return value.new_zeros((rows, small) if is_output else (small, columns))
