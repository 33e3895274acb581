"""What `stream_model` reads is a plain folder of safetensors: here others are made into one, and quantised ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from prunescope.errors import UserError
from prunescope.models.adapters import Adapter, merge_adapter
from prunescope.models.loading import from_pretrained, load_model, missing_weights
from prunescope.models.references import not_on_hub

__all__ = ["check_plain", "merged", "settings", "snapshot", "unpacked"]


def snapshot(ref: str, source: str, revision: str | None) -> Path:
    """The files of a Hugging Face id, in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*"]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise not_on_hub(ref, error) from error
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{ref}: no .safetensors weights on the hub; pickled weights are never read, convert them first"
        )
    return folder


def merged(ref: str, source: str, options: dict[str, Any], adapter: Adapter, folder: Path) -> Path:
    """A plain folder of the model with an adapter merged into it; one that is there already is left as it is."""
    if not folder.is_dir():
        model, tokenizer, missing, _ = from_pretrained(ref, source, options, "auto")
        if missing:
            raise missing_weights(ref, missing)
        check_plain(ref, model.config.to_dict())
        beside = folder.with_name(f"{folder.name}.beside")
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was cut off
        merge_adapter(ref, model, adapter).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(folder)
    return folder


def unpacked(ref: str, source: Path, device: torch.device, trust_remote_code: bool, folder: Path) -> Path:
    """A plain folder of the model with dense weights; one that is there already is left as it is."""
    if not folder.is_dir():
        loaded = load_model(source, device=str(device), trust_remote_code=trust_remote_code, dequantise=True)
        check_plain(ref, loaded.model.config.to_dict())
        beside = folder.with_name(f"{folder.name}.beside")
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was cut off
        loaded.model.save_pretrained(beside)
        loaded.tokenizer.save_pretrained(beside)
        beside.rename(folder)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError):
        return {}  # said where it is read in earnest


def check_plain(ref: str, config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        raise UserError(
            f"{ref}: its weights are quantised; give --dequantise to prune them as dense floats, or the model in float32, bfloat16 or float16"
        )
