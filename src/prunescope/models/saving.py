"""Write a dropped model in the three formats of a checkpoint (`recipe`, `zeroed`, `compact`), or a healed one in the form that it has.

Every folder carries `prunescope.json`, which says what was done to which model. None of them loads as the dense model in
plain transformers: a recipe has no weights at all, the other two hold the dropped model itself.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prunescope.errors import UserError, first_line
from prunescope.files import system_error_number
from prunescope.models.anatomy import KINDS, Sublayer
from prunescope.models.dropping import DropSpec
from prunescope.models.finding import first_output, given_residual, hooks, layer_attribute
from prunescope.models.loaded import LoadedModel
from prunescope.models.record import RECORD
from prunescope.models.written import check_written

__all__ = ["FORMATS", "Format", "checkpoint_bytes", "last_projection", "save_changed", "save_dropped"]

Format = Literal["recipe", "zeroed", "compact"]
FORMATS: tuple[Format, ...] = ("recipe", "zeroed", "compact")


def save_dropped(
    loaded: LoadedModel, spec: DropSpec, folder: Path, form: Format, details: dict[str, Any] | None = None
) -> None:
    """Write ``loaded`` without ``spec`` into the existing, empty ``folder``. The loaded model is left as it was.

    Args:
        loaded: a dense model, nothing dropped.
        spec: sublayers to drop.
        form: `recipe` (no weights), `zeroed` (output projections set to zero) or `compact` (whole blocks removed).
        details: what `prunescope.json` should say beside the drop lists (scores, calibration, ...).
    Raises:
        UserError: `compact` where half a block is dropped or the architecture places its layers by a rule; `zeroed` where no
            output projection can be found.
    """
    if loaded.dropped:
        raise ValueError("save_dropped takes a dense model")
    spec.check(len(loaded.anatomy))
    if form == "recipe":
        config = loaded.model.config.to_dict() | {"drop_attn_list": list(spec.attn), "drop_mlp_list": list(spec.mlp)}
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", "utf-8")
        kept: list[int] = list(range(loaded.dense_layers))
    elif form == "zeroed":
        with _zeroed(loaded, spec):
            _save_plain(loaded, loaded.model.config, folder)
        kept = list(range(loaded.dense_layers))
    else:
        kept = _kept_blocks(loaded, spec)
        with _compacted(loaded, kept) as config:
            _save_plain(loaded, config, folder)
    record = {
        "schema_version": 1,
        "format": form,
        "base": loaded.identity,
        "architecture": type(loaded.model).__name__,
        "dense_layers": loaded.dense_layers,
        "kept_layers": kept,
        "drop_attn_list": list(spec.attn),
        "drop_mlp_list": list(spec.mlp),
        "versions": {name: version(name) for name in ("prunescope", "torch", "transformers")},
        **(details or {}),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def save_changed(loaded: LoadedModel, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write a model whose weights have changed since it was loaded into the existing ``folder``, in the form that it has: whole, `compact` or
    with silent branches. Sublayers that are dropped in memory become silent ones (`zeroed`).

    Args:
        record: what `prunescope.json` says beside the layers.
    Returns:
        The record that was written.
    Raises:
        UserError: no output projection to silence can be found.
    """
    gone, before = loaded.dropped, loaded.record or {}
    live = DropSpec.of((kind, layer) for drop in loaded._drops for kind in KINDS for layer in drop.spec.layers(kind))
    loaded.restore()
    try:
        with _zeroed(loaded, live):
            _save_plain(loaded, loaded.model.config, folder)
    finally:
        if live:
            loaded.drop(live)
    written = {
        "schema_version": 1,
        "format": "zeroed" if live else before.get("format", "whole"),
        "architecture": type(loaded.model).__name__,
        "dense_layers": loaded.dense_layers,
        "kept_layers": list(loaded.layer_map),
        "drop_attn_list": list(gone.attn),
        "drop_mlp_list": list(gone.mlp),
        **record,
    }
    (folder / RECORD).write_text(json.dumps(written, indent=2) + "\n", "utf-8")
    return written


def checkpoint_bytes(loaded: LoadedModel, form: Format) -> int:
    """An upper bound of what `save_dropped` writes, to look at the disk before starting."""
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    return 2**20 if form == "recipe" else weights + 2**25


def _save_plain(loaded: LoadedModel, config: Any, folder: Path) -> None:
    """`save_pretrained` with ``config``, in the dtype that the weights have on disk, whatever they were loaded in."""
    model = loaded.model
    dtype = loaded.stored_dtype or loaded.dtype
    dense_config, config = model.config, copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    cast: dict[int, Tensor] = {}  # by storage, so that tied weights stay tied
    weights = {
        name: cast.setdefault(value.data_ptr(), value.to(dtype) if value.is_floating_point() else value)
        for name, value in model.state_dict().items()
    }
    try:
        model.config = config
        model.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:  # carries the system's error only in its text
        number = system_error_number(error)
        raise OSError(number, os.strerror(number), str(folder)) if number else error from error
    finally:
        model.config = dense_config
    path = folder / "config.json"  # transformers writes the dtype that the model has in memory
    saved = json.loads(path.read_text("utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", "utf-8")
    loaded.tokenizer.save_pretrained(folder)
    check_written(folder, type(model))


# --- zeroed ------------------------------------------------------------------------------------------------------------

_EXPERT_OUTPUTS = (
    "down_proj",
    "w2",
    "output_linear",
    "dense_4h_to_h",
    "c_proj",
    "fc2",
    "dense",
)  # last projections of an expert


@contextmanager
def _zeroed(loaded: LoadedModel, spec: DropSpec) -> Iterator[None]:
    parameters: dict[int, Tensor] = {}
    for part in loaded.anatomy.sublayers():
        if (part.kind, part.layer) in spec:
            for parameter in _output_parameters(loaded, part):
                parameters[id(parameter)] = parameter
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    try:
        with torch.no_grad():
            for parameter, _ in saved:
                parameter.zero_()
        _check_silent(loaded, spec)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _output_parameters(loaded: LoadedModel, part: Sublayer) -> list[Tensor]:
    """Weights and biases whose zeros silence the branch: those of its last projection, or of every expert's, and a post-norm's bias."""
    ends = part.modules if part.summed else part.modules[-1:]
    leaves = [leaf for end in ends if (leaf := last_projection(loaded, end)) is not None]
    found = [parameter for leaf in leaves for parameter in leaf.parameters(recurse=False)]
    if not found or part.summed:
        found += [
            p
            for module in part.modules
            for name, p in module.named_parameters()
            if any(key in name.split(".") for key in _EXPERT_OUTPUTS)
        ]
    if not found:
        raise UserError(f"no output projection was found in the {part.name}; use --format recipe")
    bias = getattr(part.post, "bias", None)
    return [*found, *([bias] if bias is not None else [])]


def last_projection(loaded: LoadedModel, end: nn.Module) -> nn.Module | None:
    """The leaf whose output is the output of ``end``, the last module of a branch: followed by storage in one small forward pass."""
    leaves: list[tuple[nn.Module, Tensor]] = []
    result: list[Tensor] = []
    with hooks() as handles, torch.no_grad():
        for module in end.modules():
            if not list(module.children()) and list(module.parameters(recurse=False)):
                handles.append(module.register_forward_hook(lambda m, _, out: leaves.append((m, first_output(out)))))
        handles.append(end.register_forward_hook(lambda _, __, out: result.append(first_output(out))))
        loaded.model(input_ids=_probe(loaded), use_cache=False)
    last = [module for module, out in leaves if out.data_ptr() == result[0].data_ptr()]
    return last[-1] if last else None


def _check_silent(loaded: LoadedModel, spec: DropSpec) -> None:
    loud: list[str] = []
    with hooks() as handles, torch.no_grad():
        for part in loaded.anatomy.sublayers():
            if (part.kind, part.layer) in spec:

                def check(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = part.name) -> None:
                    residual = given_residual(module, args, kwargs)
                    if (first_output(out) if residual is None else first_output(out) - residual).count_nonzero():
                        loud.append(name)

                for module in part.exits:
                    handles.append(module.register_forward_hook(check, with_kwargs=True))
        loaded.model(input_ids=_probe(loaded), use_cache=False)
    if loud:
        raise UserError(f"zeroing its output projection does not silence the {loud[0]}; use --format recipe")


def _probe(loaded: LoadedModel) -> Tensor:
    return torch.arange(min(8, loaded.anatomy.vocab_size), device=loaded.device)[None]


# --- compact -----------------------------------------------------------------------------------------------------------


def _kept_blocks(loaded: LoadedModel, spec: DropSpec) -> list[int]:
    gone = spec.whole_blocks()
    half = [f"{kind} of layer {layer}" for kind in KINDS for layer in spec.layers(kind) if layer not in gone]
    if half:
        raise UserError(
            f"--format compact removes whole blocks, but only the {half[0]} is dropped of its block; use --format zeroed or recipe, or --target block"
        )
    kept = [layer for layer in range(len(loaded.anatomy)) if layer not in gone]
    if not kept:
        raise UserError("--format compact would leave no block at all; drop fewer")
    return kept


@contextmanager
def _compacted(loaded: LoadedModel, kept: list[int]) -> Iterator[Any]:
    """The live model with only the kept blocks, renumbered, for the length of the block; gives the config to save with it."""
    anatomy, model = loaded.anatomy, loaded.model
    config = _cut_config(model.config, kept, len(anatomy))
    name = next(name for name, child in anatomy.decoder.named_children() if child is anatomy.block_list)
    renumbered: list[tuple[nn.Module, str, int]] = []
    try:
        setattr(anatomy.decoder, name, nn.ModuleList(anatomy.block_list[layer] for layer in kept))
        for position, layer in enumerate(kept):
            for module in anatomy.block_list[layer].modules():
                number = layer_attribute(module)
                if number and getattr(module, number) == layer:
                    renumbered.append((module, number, layer))
                    setattr(module, number, position)
        _check_same_modules(model, config)
        yield config
    finally:
        setattr(anatomy.decoder, name, anatomy.block_list)
        for module, number, layer in renumbered:
            setattr(module, number, layer)


def _cut_config(config: Any, kept: list[int], blocks: int) -> Any:
    """A copy of ``config`` for the kept blocks: per-layer lists cut, layer numbers inside it translated."""
    text = config.get_text_config(decoder=True)
    if text is not config:  # images and text: only the text decoder's own config is cut
        inner = [key for key in type(config).sub_configs if getattr(config, key, None) is text]
        if len(inner) != 1:
            raise UserError(
                f"--format compact does not find the text decoder in the config of {config.model_type}; use --format zeroed"
            )
        outer = copy.deepcopy(config)
        setattr(outer, inner[0], _cut_config(text, kept, blocks))
        return outer
    values = copy.deepcopy(config.to_dict())
    for key, value in values.items():
        if isinstance(value, list) and len(value) == blocks and not key.endswith(("token_id", "token_ids")):
            values[key] = [value[layer] for layer in kept]
        if isinstance(value, dict) and value and all(str(number).isdigit() for number in value):  # by layer number
            by_layer = {int(number): entry for number, entry in value.items()}
            values[key] = {i: by_layer[layer] for i, layer in enumerate(kept) if layer in by_layer}
    if values.get("mlp_only_layers") is not None:  # Qwen MoE: dense layers by number, or every so many
        step = values.get("decoder_sparse_step") or 1
        dense = {layer for layer in range(blocks) if layer in config.mlp_only_layers or (layer + 1) % step}
        values |= {"mlp_only_layers": [i for i, layer in enumerate(kept) if layer in dense], "decoder_sparse_step": 1}
    if values.get("first_k_dense_replace") is not None:  # DeepSeek: the first so many layers are dense
        values["first_k_dense_replace"] = sum(layer < config.first_k_dense_replace for layer in kept)
    count_key = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[count_key] = len(kept)
    try:
        cut = type(config).from_dict(values)
    except Exception as error:  # the config's own check, of whatever kind
        raise UserError(f"--format compact: {type(config).__name__} does not allow {len(kept)} of {blocks} blocks ({first_line(error)}); use --format zeroed") from error  # fmt: skip
    cut._attn_implementation = config._attn_implementation
    return cut


def _check_same_modules(model: nn.Module, config: Any) -> None:
    """What transformers will build from ``config`` must be what is saved: the same parameters and the same settings in every module."""
    with torch.device("meta"):
        rebuilt = type(model)(config)
    ours, theirs = dict(model.named_modules()), dict(rebuilt.named_modules())
    for name, module in ours.items():
        other = theirs.get(name)
        if other is None or type(other) is not type(module):
            raise _not_compactable(name, "its kind")
        for key, tensor in module.named_parameters(recurse=False):
            if getattr(other, key, None) is None or getattr(other, key).shape != tensor.shape:
                raise _not_compactable(f"{name}.{key}", "its shape")
        for key, value in vars(module).items():
            if (
                isinstance(value, (int, float, str))
                and not key.startswith("_")
                and key not in ("training", "gradient_checkpointing")
            ):
                if getattr(other, key, value) != value:
                    raise _not_compactable(name, f"{key} = {value}")
    if len(ours) != len(theirs):
        raise _not_compactable(type(model).__name__, "its number of modules")


def _not_compactable(where: str, what: str) -> UserError:
    return UserError(
        f"--format compact is not possible: with blocks removed, {where} would lose {what}, which follows from its layer number; use --format zeroed"
    )
