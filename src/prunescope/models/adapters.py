"""Adapters (LoRA and its like): what lies in an adapter's folder, and merging it into the model that it was trained on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunescope.errors import UserError, first_line
from prunescope.files import parse_json
from prunescope.models.record import read_record
from prunescope.models.references import ADAPTER_CONFIG, content_hash, expand_user, is_adapter, not_on_hub
from prunescope.progress import console

__all__ = ["Adapter", "merge_adapter", "with_adapter"]

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, and the model that they say it was trained on."""

    ref: str  # as the user wrote it
    folder: Path
    base: str | None

    @property
    def identity(self) -> dict[str, str]:
        """What a model's identity says of an adapter that was merged into it."""
        source = str(self.folder.resolve()) if Path(self.ref).exists() else self.ref
        return {
            "adapter": source,
            "adapter_hash": content_hash([self.folder / ADAPTER_CONFIG, self.folder / _WEIGHTS]),
        }


def with_adapter(ref: str, adapter: str | Path | None) -> tuple[str, Adapter | None]:
    """The model to load for ``ref``, and the adapter to merge into it: the one that is given, or ``ref`` itself where it is one.

    Raises:
        UserError: two adapters, one that cannot be read, or a checkpoint with sublayers dropped, which was made without it.
    """
    if is_adapter(ref):
        if adapter is not None:
            raise UserError(f"{ref} is an adapter itself, and --adapter {adapter} another; give one of them")
        found = _read(ref)
        if not found.base:
            raise UserError(f"{ref}: {ADAPTER_CONFIG} names no base model; give the base model and --adapter {ref}")
        beside = found.folder / found.base
        base = str(beside) if beside.is_dir() and not Path(found.base).is_dir() else found.base
        if Path(base).is_absolute() and not Path(base).exists():
            raise UserError(f"{ref}: its base model {base} is not there; give the base model and --adapter {ref}")
        if is_adapter(base):
            raise UserError(f"{ref}: its base {base} is an adapter too; merge that into its own base first")
    elif adapter is None:
        return ref, None
    else:
        base, found = ref, _read(expand_user(adapter))
    record = read_record(Path(base)) if Path(base).is_dir() else None
    if record is not None and record.get("format") != "recipe":
        raise UserError(
            f"{base} was pruned without the adapter {found.ref}; merge it into the dense model, then prune that"
        )
    return base, found


def _read(ref: str) -> Adapter:
    folder = Path(ref)
    if not folder.exists() and ref.count("/") == 1 and not ref.startswith((".", "/", "~")):
        folder = _fetched(ref)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{ref}: no {ADAPTER_CONFIG} there; give the folder of an adapter, as peft writes it")
    if not (folder / _WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        fix = "pickled weights are never read, convert them to safetensors" if pickled else "fetch it again"
        raise UserError(f"{ref}: no {_WEIGHTS} in this adapter's folder; {fix}")
    try:
        base = parse_json((folder / ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read ({first_line(error)}); fetch it again") from error
    return Adapter(ref, folder, base if isinstance(base, str) else None)


def _fetched(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=[ADAPTER_CONFIG, "adapter_model.*"]))
    except Exception as error:  # the hub's client has exceptions of many kinds
        raise not_on_hub(ref, error) from error


def merge_adapter(ref: str, model: Any, adapter: Adapter) -> Any:
    """``model`` with the adapter's change added to its weights, in their own dtype; nothing of the adapter is left beside them.

    Raises:
        UserError: peft is not installed, or the adapter does not fit the model or is of a kind that cannot be merged.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UserError(
            f"{adapter.ref}: peft merges adapters, and it is not installed; pip install 'prunescope[adapters]'"
        ) from error

    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say that matters is checked here
            config = PeftConfig.from_pretrained(str(adapter.folder))
            if config.is_prompt_learning:
                raise UserError(
                    f"{adapter.ref}: an adapter of kind {config.peft_type.value} adds tokens, not weights, and cannot be merged"
                )
            wrapped = PeftModel(model, config)
            found = wrapped.load_adapter(str(adapter.folder), "default")
            strange = [*found.missing_keys, *found.unexpected_keys]
            if strange:
                raise ValueError(f"{len(strange)} weights have no counterpart, first {strange[0]}")
            merged = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise UserError(
            f"{adapter.ref}: the adapter cannot be merged into {ref}: {first_line(error)}; give the model that it was trained on"
        ) from error
    console.print(f"adapter {adapter.ref} merged into {ref}", markup=False)
    return merged.requires_grad_(True)  # as every model is loaded
