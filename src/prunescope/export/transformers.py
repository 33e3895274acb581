"""A folder that plain transformers runs: a short modelling file that leaves out what is dropped, beside ordinary safetensors.

The file subclasses the family's own classes, so nothing of the arithmetic is copied. Its model type is one of its own: without
`trust_remote_code` transformers refuses the folder, instead of loading a dense model with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from prunescope.errors import UserError
from prunescope.export.parts import dropped_here, whole
from prunescope.models.loaded import LoadedModel

__all__ = ["FAMILIES", "write_folder"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")  # `layer.self_attn` and `layer.mlp`
MODELLING = "modeling_pruned.py"
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
    model_type = "prunescope_{family}"


class PrunedForCausalLM({base}):
    config_class = PrunedConfig

    def __init__(self, config):
        super().__init__(config)
        for i in config.no_attention:
            self.model.layers[i].self_attn = NoAttention(i)
        for i in config.no_mlp:
            self.model.layers[i].mlp = NoMLP()
'''


def write_folder(loaded: LoadedModel, folder: Path) -> bool:
    """Write ``loaded`` into the existing, empty ``folder``. Returns whether it needs `trust_remote_code`: not where nothing is dropped.

    Raises:
        UserError: the family's layers have other names than the modelling file replaces.
    """
    config = loaded.model.config
    spec = dropped_here(loaded)
    if spec and config.model_type not in FAMILIES:
        raise UserError(
            f"--for transformers: no modelling file for {config.model_type}, only for {', '.join(FAMILIES)}; use drop --format zeroed or compact"
        )
    with whole(loaded) as model:
        gone = tuple(
            f"model.layers.{i}.{name}."
            for name, layers in (("self_attn", spec.attn), ("mlp", spec.mlp))
            for i in layers
        )
        weights = {name: value for name, value in model.state_dict().items() if not name.startswith(gone)}
        model.save_pretrained(folder, state_dict=weights)
    loaded.tokenizer.save_pretrained(folder)
    if not spec:
        return False
    base, kind = type(loaded.model), type(config)
    module = base.__module__.split(".")[-2]
    source = _SOURCE.format(base=base.__name__, module=module, config=kind.__name__, family=config.model_type)
    (folder / MODELLING).write_text(source, "utf-8")
    stem = MODELLING.removesuffix(".py")
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8")) | {
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {"AutoConfig": f"{stem}.PrunedConfig", "AutoModelForCausalLM": f"{stem}.PrunedForCausalLM"},
        "model_type": f"prunescope_{config.model_type}",
        "no_attention": list(spec.attn),
        "no_mlp": list(spec.mlp),
    }
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
    return True
