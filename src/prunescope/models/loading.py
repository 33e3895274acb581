"""From what a user types to a checked model: hub id, local folder, `.gguf` file, the bundled model, or a prunescope checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunescope.errors import UserError, first_line
from prunescope.models.anatomy import Anatomy, find_anatomy
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.record import config_drop_lists, layers_of, read_record
from prunescope.models.references import expand_user, resolve
from prunescope.runs.folder import NO_SPACE

__all__ = [
    "choose_device",
    "choose_dtype",
    "from_pretrained",
    "load_model",
    "loading_problem",
    "missing_weights",
    "not_on_hub",
    "quiet_transformers",
]

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    ref: str | Path | LoadedModel,
    *,
    dtype: str = "auto",
    device: str = "auto",
    drop: DropSpec | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    headless: bool = False,
) -> LoadedModel:
    """Load ``ref`` in eval mode and check what was found.

    Args:
        ref: a Hugging Face id, a folder, a `.gguf` file, ``smollm2-135m``, or a prunescope or LLM-Drop checkpoint folder. A
            model that is loaded already is returned, ``drop`` applied; dtype and device stay what they are.
        dtype: float32, float64, bfloat16, float16, or auto: the checkpoint's own on an accelerator, float32 on a CPU.
        device: a torch device, or auto: cuda where there is one, else cpu.
        drop: sublayers to drop in place.
        revision: of a Hugging Face id.
        trust_remote_code: run code that comes with the model.
        headless: take weights without an output head (embedding models, written from `MistralModel` and its like), for callers that read
            no logits; the input embedding then stands where the head would.
    Raises:
        UserError: whatever is wrong with the reference, the files, the weights or the architecture, in one line.
    """
    if isinstance(ref, LoadedModel):
        if drop is not None:
            ref.drop(drop)
        return ref
    torch_device = choose_device(device)
    torch_dtype: Any = choose_dtype(dtype, torch_device)
    ref = expand_user(ref)
    record = read_record(Path(ref)) if Path(ref).is_dir() else None
    if record is not None and record.get("format") == "recipe":
        loaded = _load_recipe(Path(ref), record, torch_dtype, torch_device, trust_remote_code, headless)
    else:
        loaded = _load_weights(ref, torch_dtype, torch_device, revision, trust_remote_code, record, headless)
    if drop is not None:
        loaded.drop(drop)
    return loaded


def _load_recipe(
    folder: Path, record: dict[str, Any], dtype: Any, device: torch.device, trust_remote_code: bool, headless: bool
) -> LoadedModel:
    base = record["base"]
    loaded = _load_weights(base["source"], dtype, device, base.get("revision"), trust_remote_code, None, headless)
    for key in ("content_hash", "revision"):
        if base.get(key) and loaded.identity.get(key) and base[key] != loaded.identity[key]:
            raise UserError(
                f"{folder}: the recipe was made from {base['source']} with {key} {base[key][:24]}, which now has {loaded.identity[key][:24]}; score and drop it again"
            )
    loaded.ref, loaded.record = str(folder), record
    loaded.drop(DropSpec(tuple(record["drop_attn_list"]), tuple(record["drop_mlp_list"])))
    return loaded


# --- weights -----------------------------------------------------------------------------------------------------------


def _load_weights(
    ref: str,
    dtype: Any,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
    record: dict[str, Any] | None,
    headless: bool,
) -> LoadedModel:
    source, options, identity = resolve(ref, revision)
    options["trust_remote_code"] = trust_remote_code
    model, tokenizer, missing, stored_dtype = from_pretrained(ref, source, options, dtype)
    config_drop = config_drop_lists(ref, model.config) if record is None else DropSpec()
    if "content_hash" not in identity:
        commit = getattr(model.config, "_commit_hash", None)
        if commit:
            identity["revision"] = commit
    missing = _put_head(ref, model, missing, headless)
    model = model.to(device).eval()
    _check_weights(ref, model, missing)
    anatomy = find_anatomy(model)
    config_drop.check(len(anatomy))
    _check_missing(ref, model, anatomy, missing, config_drop)
    layer_map, dense_layers = layers_of(ref, record, len(anatomy))
    loaded = LoadedModel(ref, model, tokenizer, anatomy, identity, layer_map, dense_layers, record, stored_dtype)
    if config_drop:
        loaded.drop(config_drop)
    return loaded


def from_pretrained(
    ref: str, source: str, options: dict[str, Any], dtype: Any, placement: dict[str, Any] | None = None
) -> tuple[Any, Any, set[str], torch.dtype | None]:
    """Model, tokenizer, names of the weights that the files lack, and the dtype that the config says they have.

    Args:
        ref: as the user wrote it, for messages.
        source, options: what `resolve` gave for it.
        dtype: a torch dtype, or ``auto`` for the checkpoint's own.
        placement: where transformers puts the weights, in its own terms (``device_map`` and its like).
    Raises:
        UserError: the hub, the files or transformers refuse, in one line.
        OSError: no space is left for what is converted on disk.
    """
    import transformers
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from safetensors import SafetensorError

    model_options = options | (placement or {})
    if "gguf_file" in options:
        model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        dtype = torch.float32 if dtype == "auto" else dtype
    else:
        model_options["use_safetensors"] = True
    try:
        with quiet_transformers(Path(source).is_dir()):
            stored_dtype = (
                None if "gguf_file" in options else transformers.AutoConfig.from_pretrained(source, **options).dtype
            )
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **model_options
            )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise not_on_hub(ref, error) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number and int(number[1]) in NO_SPACE:  # while weights are converted on disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), source) from error
        raise UserError(
            f"{ref}: a weights file cannot be read ({first_line(error)}); it is truncated or not safetensors, fetch it again"
        ) from error
    except Exception as error:  # readers of foreign files fail in ways of their own
        raise UserError(f"{ref}: {loading_problem(error, source)}") from error
    try:
        with quiet_transformers(Path(source).is_dir()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(
            f"{ref}: its tokenizer cannot be loaded: {first_line(error)}; put the tokenizer's files into the folder"
        ) from error
    return model, tokenizer, set(info["missing_keys"]), stored_dtype


def not_on_hub(ref: str, error: Exception) -> UserError:
    return UserError(
        f"{ref}: not found on the Hugging Face hub, or no access to it: {first_line(error)}; check the id and the network"
    )


def missing_weights(ref: str, names: Collection[str]) -> UserError:
    return UserError(
        f"{ref}: weights are missing, first {min(names)} ({len(names)} in all); the folder is incomplete or of another architecture"
    )


def loading_problem(error: Exception, source: str) -> str:
    """What went wrong while transformers read the files of ``source``, and how to fix it."""
    text = first_line(error)
    if isinstance(error, OSError) and not Path(source).exists():
        return f"no such local folder, and the Hugging Face hub does not give it: {text}; check the id and the network"
    if "model type" in text or "Unrecognized model" in text or "Unrecognized configuration class" in text:
        return f"transformers knows no causal language model of this architecture: {text}"
    if isinstance(error, ImportError):
        return f"a package that this model needs is missing: {text}"
    return f"cannot be loaded: {type(error).__name__}: {text}"


def _check_weights(ref: str, model: nn.Module, missing: set[str]) -> None:
    """No weight of the checkpoint may be NaN or infinite; what is missing is looked at by `_check_missing`."""
    for name, parameter in model.named_parameters():
        if name not in missing and not torch.isfinite(parameter).all():
            raise UserError(f"{ref}: {name} holds NaN or infinite weights; the checkpoint is broken")


def _put_head(ref: str, model: Any, missing: set[str], headless: bool) -> set[str]:
    """Weights that were written without a head: refused, or with the input embedding for a head; returns what else is missing."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    made_up = {
        name for name, weight in model.named_parameters() if head is not None and weight is head.weight
    } & missing
    if not made_up or type(model.base_model).__name__ not in (getattr(model.config, "architectures", None) or ()):
        return missing
    if not headless or head.weight.shape != embedding.weight.shape:
        raise UserError(
            f"{ref}: {type(model.base_model).__name__} without an output head, as embedding models are written; only prunescope retrieve takes it"
        )
    head.weight = embedding.weight
    return missing - made_up


def _check_missing(ref: str, model: nn.Module, anatomy: Anatomy, missing: set[str], dropped: DropSpec) -> None:
    """No weight may be made up by transformers, except those of the very branches that the checkpoint says are dropped."""
    spare = {
        id(parameter)
        for part in anatomy.sublayers()
        if (part.kind, part.layer) in dropped
        for module in (
            *part.modules,
            *([] if part.shares_pre or part.pre is None else [part.pre]),
            *([part.post] if part.post else []),
        )
        for parameter in module.parameters()
    }
    made_up = {name for name, parameter in model.named_parameters() if name in missing and id(parameter) not in spare}
    if made_up:
        raise missing_weights(ref, made_up)


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is cuda where there is one. Raises UserError for one that cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {first_line(error)}; try --device cpu") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The dtype of that name; auto is float32 on a CPU, elsewhere the checkpoint's own. Raises UserError for an unknown one."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is unknown; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@contextmanager
def quiet_transformers(local: bool) -> Iterator[None]:
    """transformers' own reports off: what they say that matters is checked here and said in one line.

    For local files its bars are off too; downloads keep theirs. The bar of its GGUF reader knows no switch but the stream it writes to.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
