"""A folder for vLLM and SGLang: the class that they have for Nemotron-NAS, `DeciLMForCausalLM`, leaves out what `block_configs` marks `no_op`.

What their code asks for (vllm 0.33.0 `nemotron_nas.py`, sglang 0.5.23 `nemotron_nas.py`):

- `block_configs[i].attention.no_op`, `.n_heads_in_group` (query heads for each key/value head), `ffn.no_op`, read as attributes;
- vLLM takes `ffn.intermediate_size`; SGLang takes `ffn.ffn_mult` and rounds the width up to a multiple of 256, so MLPs are filled up with zeros;
- block 0 begins the residual stream with the norm of its attention, so there a dropped attention is one of zeros;
- no weights of what is left out, norms included;
- SGLang gives the output projection a bias wherever queries have one: one of zeros.

The same folder loads in plain transformers through its modelling file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunescope.errors import UserError
from prunescope.export.parts import Needs, dropped_here, rope_types, unusual_yarn, whole
from prunescope.export.transformers import lacking, write_class, write_plain, write_pruned
from prunescope.export.vllm_names import IN_PLUGIN
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel

__all__ = ["FAMILIES", "write_no_ops"]

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
)  # what the engines' class computes: rotary halves, RMS norms, SiLU, no norm of queries and keys
_OTHERWISE = "drop whole blocks (--target block), which its own class runs, or export it --for transformers"
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_MULTIPLE = 256  # of SGLang's MLP width
_BODY = """
    model_type = "nemotron-nas"

    class Part(dict):
        def __init__(self, values):
            super().__init__({name: type(self)(v) if isinstance(v, dict) else v for name, v in values.items()})

        def __getattr__(self, name):
            if name in self:
                return self[name]
            raise AttributeError(name)

    def __setattr__(self, name, value):
        super().__setattr__(name, [self.Part(v) for v in value] if name == "block_configs" else value)

    @property
    def no_attention(self):
        return [i for i, block in enumerate(self.block_configs) if block.attention.no_op]

    @property
    def no_mlp(self):
        return [i for i, block in enumerate(self.block_configs) if block.ffn.no_op]
"""


def write_no_ops(loaded: LoadedModel, folder: Path, engine: Literal["vllm", "sglang"]) -> Needs:
    """Write ``loaded`` into the existing, empty ``folder``: as the family's own class where that fits, else as the class of no-op layers, else for vLLM
    as the class of our plugin.

    Raises:
        UserError: no class of the engine computes this family, or one of its settings.
    """
    config, spec = loaded.model.config, dropped_here(loaded)
    if write_plain(loaded, folder, spec):
        return Needs()
    lacks = _lacks(config, engine)
    if lacks is not None and engine == "vllm":
        _check_plugin(loaded)
        write_pruned(loaded, folder)
        return Needs(plugin=True)
    if lacks is not None:
        raise UserError(f"--for {engine}: {lacks}; {_OTHERWISE}")
    gone = spec.whole_blocks()
    kept = [layer for layer in range(len(loaded.anatomy)) if layer not in gone]
    if not kept:
        raise UserError(f"--for {engine}: every block is dropped, and it needs one; drop fewer")
    place_of = {layer: place for place, layer in enumerate(kept)}
    silent = kept[0] if kept[0] in spec.attn else None  # block 0, whose attention is one of zeros
    attn = tuple(place_of[layer] for layer in spec.attn if layer in place_of and layer != silent)
    mlp = tuple(place_of[layer] for layer in spec.mlp if layer in place_of)
    neurons = config.intermediate_size
    if engine == "sglang":
        neurons = -(-neurons // _MULTIPLE) * _MULTIPLE
    with whole(loaded) as model:
        weights = _renumbered(model.state_dict(), place_of)
        if silent is not None:
            weights |= {
                n: v.new_zeros(v.shape) for n, v in weights.items() if n.startswith("model.layers.0.self_attn.")
            }
        if engine == "sglang":
            weights = _for_sglang(weights, neurons)
        skip = lacking(config.model_type, DropSpec(attn, mlp))
        model.save_pretrained(folder, state_dict={n: v for n, v in weights.items() if not n.startswith(skip)})
    loaded.tokenizer.save_pretrained(folder)
    group = config.num_attention_heads // config.num_key_value_heads
    width = {"ffn_mult": 3 * (neurons - 0.5) / (2 * config.hidden_size)} if engine == "sglang" else {"intermediate_size": neurons}  # fmt: skip
    blocks = [
        {
            "attention": {"no_op": i in attn, "n_heads_in_group": None if i in attn else group},
            "ffn": {"no_op": True} if i in mlp else {"no_op": False, **width},
        }
        for i in range(len(kept))
    ]
    values: dict[str, Any] = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "intermediate_size": neurons,
        "num_hidden_layers": len(kept),
    }
    if getattr(config, "layer_types", None):
        values["layer_types"] = [config.layer_types[layer] for layer in kept]
    if config.model_type == "qwen2":  # queries, keys and values have biases, the output has none
        values |= {"attention_bias": False, "qkv_bias": True}
    write_class(loaded, folder, values, _BODY)
    return Needs(code=True)


def _lacks(config: Any, engine: str) -> str | None:
    """What the engine's class of no-op layers does not compute, in words; None if it computes this model."""
    family = config.model_type
    if family not in FAMILIES:
        return f"half a block can be dropped for {', '.join(FAMILIES)} only, not for {family}"
    found = {
        "sliding window": bool(_windows(config)),
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        "bias of MLPs": engine == "sglang" and getattr(config, "mlp_bias", False),
    }
    found |= {f"rope_type {kind}": kind not in _ROPE_TYPES for kind in rope_types(config)}
    found |= dict.fromkeys(unusual_yarn(config) if engine == "sglang" else (), True)
    return next((f"its class of no-op layers has no {what}" for what, is_there in found.items() if is_there), None)


def _check_plugin(loaded: LoadedModel) -> None:
    """Raises UserError for what vLLM's own class of the family does not compute, or computes otherwise."""
    config = loaded.model.config
    family = config.model_type
    if family not in IN_PLUGIN:
        raise UserError(
            f"--for vllm: half a block can be dropped for {', '.join(IN_PLUGIN)} only, not for {family}; {_OTHERWISE}"
        )
    gemma = family.startswith("gemma")
    act = config.hidden_activation if gemma else config.hidden_act
    if gemma and loaded.dtype == torch.float16:
        raise UserError("--for vllm: Gemma is not stable in float16, and vLLM refuses it; give --dtype bfloat16")
    windows = len(_windows(config))
    found = {
        f"activation {act}": not gemma and act != "silu",
        "windows in some of its blocks only": family.startswith("qwen") and 0 < windows < config.num_hidden_layers,
    }
    found |= {f"rope_type {kind}": kind not in _ROPE_TYPES for kind in rope_types(config)}
    for what, is_there in found.items():
        if is_there:
            raise UserError(f"--for vllm: its class of {family} has no {what}; export it --for transformers")


def _windows(config: Any) -> list[int]:
    """Blocks whose attention sees a window only."""
    types = getattr(config, "layer_types", None)
    if types is None and config.model_type == "mistral" and config.sliding_window is not None:
        types = ["sliding_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(types or ()) if kind == "sliding_attention"]


def _renumbered(weights: dict[str, Tensor], place_of: dict[int, int]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        if name.startswith("model.layers."):
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            if int(layer) not in place_of:
                continue
            name = f"model.layers.{place_of[int(layer)]}.{rest}"
        found[name] = value
    return found


def _for_sglang(weights: dict[str, Tensor], neurons: int) -> dict[str, Tensor]:
    """MLPs filled up to ``neurons`` with zeros, and an output bias of zeros beside the bias of queries."""
    found = {}
    for name, value in weights.items():
        if ".mlp." in name:
            missing = neurons - value.shape[1 if "down_proj" in name else 0]
            value = pad(value, (0, missing) if "down_proj" in name else (0, 0, 0, missing))
        found[name] = value
        output = name.replace("q_proj.bias", "o_proj.bias")
        if output != name and output not in weights:
            found[output] = value.new_zeros(weights[output.replace("bias", "weight")].shape[0])
    return found
