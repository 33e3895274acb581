"""A folder that plain transformers runs: a short modelling file that leaves out what is dropped, beside ordinary safetensors.

The file subclasses the family's own classes, so nothing of the arithmetic is copied. Its model type is one of its own: without
`trust_remote_code` transformers refuses the folder, instead of loading a dense model with random weights. Where whole blocks alone are dropped,
a plain class fits: the folder is that of `drop --format compact`, and needs no file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunescope.errors import UserError
from prunescope.export.parts import dropped_here, whole
from prunescope.export.vllm_names import IN_PLUGIN, own_type
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import is_packed
from prunescope.models.record import RECORD
from prunescope.models.saving import save_dropped

__all__ = ["FAMILIES", "lacking", "write_class", "write_folder", "write_plain", "write_pruned"]

_LLAMA_NORMS = ({"input_layernorm"}, {"post_attention_layernorm"})
_GEMMA_NORMS = (
    {"input_layernorm", "post_attention_layernorm"},
    {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
)
FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_NORMS) | dict.fromkeys(
    ("gemma2", "gemma3_text"), _GEMMA_NORMS
)
"""Families of `layer.self_attn` and `layer.mlp`, with the norms that serve the one and the other."""
MODELLING = "modeling_pruned.py"
LISTS = """
    model_type = "{own_type}"
"""
_SOURCE = '''"""{base} without the attentions and MLPs that config.json lists. Written by prunescope."""

import torch
from torch import nn
from transformers import {base}
from transformers.models.{module} import {config}


class NoAttention(nn.Module):
    """Adds nothing to the residual stream. Keys of width 0 keep the cache's count of tokens right and take no memory."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            empty = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
            past_key_values.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class PrunedConfig({config}):
{body}

class PrunedForCausalLM({base}):
    config_class = PrunedConfig

    def __init__(self, config):
        super().__init__(config)
        for i in config.no_attention:
            self.model.layers[i].self_attn = NoAttention(i)
            for name in {attn_norms}:
                setattr(self.model.layers[i], name, nn.Identity())
        for i in config.no_mlp:
            self.model.layers[i].mlp = NoMLP()
            for name in {mlp_norms}:
                setattr(self.model.layers[i], name, nn.Identity())
'''


def write_folder(loaded: LoadedModel, folder: Path) -> bool:
    """Write ``loaded`` into the existing, empty ``folder``. Returns whether it needs `trust_remote_code`: not where a plain class fits.

    Raises:
        UserError: the family's layers have other names than the modelling file replaces.
    """
    if write_plain(loaded, folder, dropped_here(loaded)):
        return False
    family = loaded.model.config.model_type
    if family not in FAMILIES:
        raise UserError(
            f"--for transformers: no modelling file for {family}, only for {', '.join(FAMILIES)}; use drop --format zeroed or compact"
        )
    write_pruned(loaded, folder)
    return True


def write_pruned(loaded: LoadedModel, folder: Path) -> None:
    """Write ``loaded``, of one of `FAMILIES`, as a class of its own: that of the modelling file in plain transformers, that of the plugin in vLLM."""
    config, spec = loaded.model.config, dropped_here(loaded)
    with whole(loaded) as model:
        gone = lacking(config.model_type, spec)
        model.save_pretrained(
            folder, state_dict={n: v for n, v in model.state_dict().items() if not n.startswith(gone)}
        )
    loaded.tokenizer.save_pretrained(folder)
    values = {
        "architectures": [IN_PLUGIN[config.model_type]],
        "model_type": own_type(config.model_type),
        "no_attention": list(spec.attn),
        "no_mlp": list(spec.mlp),
    }
    write_class(loaded, folder, values, LISTS.format(own_type=own_type(config.model_type)))


def write_plain(loaded: LoadedModel, folder: Path, spec: DropSpec) -> bool:
    """Write what the family's own class computes: nothing dropped, or whole blocks removed. Returns False where it does not fit, and writes nothing."""
    if spec.attn != spec.mlp or spec.whole_blocks() == tuple(range(len(loaded.anatomy))):
        return False
    with whole(loaded) as model:
        if not spec:
            model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            _change_config(loaded, folder, {})
            return True
        blocks = tuple(range(len(loaded.anatomy)))
        here = replace(loaded, record=None, stored_dtype=loaded.dtype, layer_map=blocks, dense_layers=len(blocks), _drops=[])  # fmt: skip
        try:
            save_dropped(here, spec, folder, "compact")
        except UserError:  # the family places its blocks by a rule
            return False
    if len(blocks) != loaded.dense_layers:  # blocks were gone before: its numbers are not those of the dense model
        (folder / RECORD).unlink()
    return True


def lacking(family: str, spec: DropSpec) -> tuple[str, ...]:
    """How the names of the weights begin that are not written."""
    attn, mlp = FAMILIES[family]
    parts = ((spec.attn, {"self_attn", *attn}), (spec.mlp, {"mlp", *mlp}))
    return tuple(f"model.layers.{i}.{name}." for layers, names in parts for i in layers for name in names)


def write_class(loaded: LoadedModel, folder: Path, values: dict[str, Any], body: str) -> None:
    """Write the modelling file, whose config has ``body``, and put ``values`` into config.json."""
    base, kind = type(loaded.model), type(loaded.model.config)
    attn, mlp = FAMILIES[loaded.model.config.model_type]
    source = _SOURCE.format(
        base=base.__name__, module=base.__module__.split(".")[-2], config=kind.__name__, body=body.lstrip("\n"),
        attn_norms=tuple(sorted(attn)), mlp_norms=tuple(sorted(mlp)),
    )  # fmt: skip
    (folder / MODELLING).write_text(source, "utf-8")
    stem = MODELLING.removesuffix(".py")
    auto = {"AutoConfig": f"{stem}.PrunedConfig", "AutoModelForCausalLM": f"{stem}.PrunedForCausalLM"}
    _change_config(loaded, folder, {"auto_map": auto, **values})


def _change_config(loaded: LoadedModel, folder: Path, values: dict[str, Any]) -> None:
    """Put ``values`` into config.json; the format of a quantised checkpoint goes where its weights are floats by now."""
    path = folder / "config.json"
    found = json.loads(path.read_text("utf-8")) | values
    if not any(is_packed(parameter) for parameter in loaded.model.parameters()):
        found.pop("quantization_config", None)
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", "utf-8")
