"""What a checkpoint says of the sublayers that it lacks: `prunescope.json`, or the drop lists of a published LLM-Drop model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunescope.errors import UserError
from prunescope.files import parse_json
from prunescope.models.anatomy import KINDS
from prunescope.models.dropping import DropSpec

__all__ = ["RECORD", "config_drop_lists", "layer_list", "layers_of", "read_record"]

RECORD = "prunescope.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `prunescope.json` of a checkpoint folder, None where there is none. Raises UserError if it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = parse_json(path.read_text("utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("schema_version"), int):
            raise ValueError("no schema_version")
        if record["schema_version"] > 1:
            raise UserError(
                f"{path} has schema version {record['schema_version']}, newer than this prunescope knows; upgrade prunescope"
            )
        if not isinstance(record.get("base"), dict) or not isinstance(record["base"].get("source"), str):
            raise ValueError("no base model")
        if not isinstance(record.get("dense_layers"), int) or not isinstance(record.get("kept_layers"), list):
            raise ValueError("no layers")
        for key in ("drop_attn_list", "drop_mlp_list", "kept_layers"):
            record[key] = list(layer_list(f"{path}: {key}", record.get(key)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a prunescope record ({error}); write the checkpoint again") from error
    return record


def layers_of(ref: str, record: dict[str, Any] | None, blocks: int) -> tuple[tuple[int, ...], int]:
    """Which layer of the dense model each of ``blocks`` blocks is, and how many layers the dense model has.

    Raises:
        UserError: the record names another number of blocks.
    """
    layers = tuple(record["kept_layers"] if record else range(blocks))
    if len(layers) != blocks:
        raise UserError(
            f"{ref}: {RECORD} names {len(layers)} kept layers but the weights have {blocks} blocks; write the checkpoint again"
        )
    return layers, record["dense_layers"] if record else blocks


def config_drop_lists(ref: str, config: Any) -> DropSpec:
    """Drop lists that a published LLM-Drop model keeps in its `config.json`: layer indices, one boolean per layer, or null."""
    return DropSpec(
        *(
            layer_list(f"{ref}: drop_{kind}_list in config.json", getattr(config, f"drop_{kind}_list", None))
            for kind in KINDS
        )
    )


def layer_list(where: str, value: Any) -> tuple[int, ...]:
    value = [] if value is None else value
    if isinstance(value, list) and any(isinstance(item, bool) for item in value):
        if all(item is None or isinstance(item, bool) for item in value):
            return tuple(layer for layer, dropped in enumerate(value) if dropped)
    elif isinstance(value, list) and all(isinstance(item, int) and item >= 0 for item in value):
        return tuple(sorted(set(value)))
    raise UserError(f"{where} is {str(value)[:60]}, not a list of layer indices; fix or remove it")
