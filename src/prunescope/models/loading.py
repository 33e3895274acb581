"""From what a user types to a checked model: hub id, local folder, `.gguf` file, the bundled model, or a prunescope checkpoint."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from prunescope.errors import UserError, first_line
from prunescope.files import system_error_number
from prunescope.models.adapters import Adapter, merge_adapter, with_adapter
from prunescope.models.anatomy import Anatomy, find_anatomy
from prunescope.models.dropping import DropSpec
from prunescope.models.gguf_reading import parsed_once
from prunescope.models.hub import one_try
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import check_head, format_of, is_finite
from prunescope.models.placing import ALL_GPUS, check_placed, is_sharded, placement
from prunescope.models.record import config_drop_lists, layers_of, read_record
from prunescope.models.references import BUNDLED, expand_user, not_on_hub, resolve
from prunescope.models.unpacking import unpack
from prunescope.runs.folder import NO_SPACE

__all__ = [
    "choose_device",
    "choose_dtype",
    "from_pretrained",
    "load_model",
    "loading_problem",
    "missing_weights",
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
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    headless: bool = False,
    dequantise: bool = False,
) -> LoadedModel:
    """Load ``ref`` in eval mode and check what was found.

    Args:
        ref: a Hugging Face id, a folder, a `.gguf` file, ``smollm2-135m``, a prunescope or LLM-Drop checkpoint folder, or the folder of an
            adapter, which names its base model. A model that is loaded already is returned, ``drop`` applied; the rest stays what it is.
        dtype: float32, float64, bfloat16, float16, or auto: the checkpoint's own on an accelerator, float32 on a CPU.
        device: a torch device, gpus (the blocks spread over all of this machine), or auto: the first GPU, more where it does not fit there, else cpu.
        drop: sublayers to drop in place.
        revision: of a Hugging Face id.
        adapter: folder or Hugging Face id of an adapter (LoRA and its like) to merge into the weights, before anything is dropped.
        trust_remote_code: run code that comes with the model.
        headless: take weights without an output head (embedding models, written from `MistralModel` and its like), for callers that read
            no logits; the input embedding then stands where the head would.
        dequantise: load packed weights as the dense floats that they stand for, see `prunescope.models.unpacking`; others stay what they are.
    Raises:
        UserError: whatever is wrong with the reference, the files, the weights or the architecture, in one line.
    """
    if isinstance(ref, LoadedModel):
        if drop is not None:
            ref.drop(drop)
        return ref
    of_gguf = str(ref) == BUNDLED or str(ref).endswith(".gguf")
    if of_gguf and device == ALL_GPUS:
        raise UserError(f"{ref}: a GGUF file is read to one device; give --device auto, or a safetensors folder")
    placed = {} if of_gguf else placement(device)
    torch_device = choose_device("auto" if device == ALL_GPUS else device)
    torch_dtype: Any = choose_dtype(dtype, torch_device)
    ref = expand_user(ref)
    options = _Options(torch_dtype, torch_device, placed, trust_remote_code, headless, dequantise)
    record = read_record(Path(ref)) if Path(ref).is_dir() else None
    if record is not None and record.get("format") == "recipe":
        loaded = _load_recipe(Path(ref), record, adapter, options)
    else:
        base, found = with_adapter(ref, adapter)
        loaded = _load_weights(base, revision, record, found, options)
        loaded.ref = ref
    if drop is not None:
        loaded.drop(drop)
    return loaded


class _Options(NamedTuple):
    """How a model is loaded, whatever it is loaded from."""

    dtype: Any
    device: torch.device
    placement: dict[str, Any]  # see `prunescope.models.placing.placement`
    trust_remote_code: bool
    headless: bool
    dequantise: bool


def _load_recipe(folder: Path, record: dict[str, Any], adapter: str | Path | None, options: _Options) -> LoadedModel:
    recorded = record["base"]
    if adapter is not None and recorded.get("adapter"):
        raise UserError(f"{folder}: the recipe has the adapter {recorded['adapter']} already; leave --adapter out")
    base, found = with_adapter(recorded["source"], adapter or recorded.get("adapter"))
    loaded = _load_weights(base, recorded.get("revision"), None, found, options)
    for key in ("content_hash", "revision", "adapter_hash"):
        if recorded.get(key) and loaded.identity.get(key) and recorded[key] != loaded.identity[key]:
            raise UserError(
                f"{folder}: the recipe was made from {recorded['source']} with {key} {recorded[key][:24]}, which now has {loaded.identity[key][:24]}; score and drop it again"
            )
    loaded.ref, loaded.record = str(folder), record
    loaded.drop(DropSpec(tuple(record["drop_attn_list"]), tuple(record["drop_mlp_list"])))
    return loaded


# --- weights -----------------------------------------------------------------------------------------------------------


def _load_weights(
    ref: str, revision: str | None, record: dict[str, Any] | None, adapter: Adapter | None, options: _Options
) -> LoadedModel:
    source, model_options, identity = resolve(ref, revision)
    model_options["trust_remote_code"] = options.trust_remote_code
    model, tokenizer, missing, stored_dtype = from_pretrained(
        ref, source, model_options, options.dtype, device=options.device, placement=options.placement
    )
    config_drop = config_drop_lists(ref, model.config) if record is None else DropSpec()
    if "content_hash" not in identity:
        commit = getattr(model.config, "_commit_hash", None)
        if commit:
            identity["revision"] = commit
    missing = _put_head(ref, model, missing, options.headless)
    check_placed(ref, model)
    model = (model if is_sharded(model) else model.to(options.device)).eval()
    _check_weights(ref, model, missing)
    if adapter is not None:
        model = merge_adapter(ref, model, adapter)
        identity |= adapter.identity
    packed = format_of(model) if options.dequantise else None
    if packed is not None:
        if (
            packed["method"] == "compressed-tensors"
        ):  # it unpacks when the model first runs; bitsandbytes repacks for a CPU then
            find_anatomy(model)
        if unpack(ref, model, options.dtype if isinstance(options.dtype, torch.dtype) else model.dtype):
            identity["dequantised"] = "true"
            if getattr(model, "_weight_conversions", None):
                _forget_quantiser(model)
    anatomy = find_anatomy(model)
    check_head(ref, anatomy.head)
    if options.device.type == "cuda":
        torch.cuda.set_device(anatomy.head.weight.device)  # type: ignore[arg-type]  # kernels of ours run where the head is
    config_drop.check(len(anatomy))
    _check_missing(ref, model, anatomy, missing, config_drop)
    layer_map, dense_layers = layers_of(ref, record, len(anatomy))
    loaded = LoadedModel(ref, model, tokenizer, anatomy, identity, layer_map, dense_layers, record, stored_dtype)
    if config_drop:
        loaded.drop(config_drop)
    return loaded


def from_pretrained(
    ref: str,
    source: str,
    options: dict[str, Any],
    dtype: Any,
    *,
    device: torch.device | None = None,
    placement: dict[str, Any] | None = None,
) -> tuple[Any, Any, set[str], torch.dtype | None]:
    """Model, tokenizer, names of the weights that the files lack, and the dtype that the config says they have.

    Args:
        ref: as the user wrote it, for messages.
        source, options: what `resolve` gave for it.
        dtype: a torch dtype, or ``auto`` for the checkpoint's own.
        device: what the model will run on, where it will; FP8 weights are dequantised if it cannot multiply them.
        placement: where transformers puts the weights, in its own terms (``device_map`` and its like).
    Raises:
        UserError: the hub, the files or transformers refuse, in one line.
        OSError: no space is left for what is converted on disk.
    """
    local = Path(source).is_dir()
    once = parsed_once() if "gguf_file" in options else nullcontext()
    with quiet_transformers(local), nullcontext() if local else one_try(), once:
        model, missing, stored_dtype = _read_model(ref, source, options, dtype, device, placement or {})
        tokenizer = _read_tokenizer(ref, source, options)
    return model, tokenizer, missing, stored_dtype


def _read_model(
    ref: str, source: str, options: dict[str, Any], dtype: Any, device: torch.device | None, placement: dict[str, Any]
) -> tuple[Any, set[str], torch.dtype | None]:
    import transformers
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from safetensors import SafetensorError

    model_options = options | placement
    config, stored_dtype, quantised = None, None, None
    try:
        if "gguf_file" in options:
            model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            dtype = torch.float32 if dtype == "auto" else dtype
        else:
            config = transformers.AutoConfig.from_pretrained(source, **options)
            stored_dtype, quantised = config.dtype, getattr(config, "quantization_config", None)
            if (
                quantised and placement.get("device_map") == "sequential"
            ):  # nothing was asked for, and formats have rules of their own
                model_options = dict(options)
            model_options |= {"use_safetensors": True, **_dequantising(quantised, device)}
        model, info = _auto_class(config).from_pretrained(
            source, dtype=dtype, output_loading_info=True, **model_options
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise not_on_hub(ref, error) from error
    except SafetensorError as error:
        number = system_error_number(error)
        if number in NO_SPACE:  # while weights are converted on disk
            raise OSError(number, os.strerror(number), source) from error
        raise UserError(
            f"{ref}: a weights file cannot be read ({first_line(error)}); it is truncated or not safetensors, fetch it again"
        ) from error
    except Exception as error:  # readers of foreign files fail in ways of their own
        raise UserError(f"{ref}: {loading_problem(error, source)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers found it on the hub, and has not merged it
        base = next(iter(model.peft_config.values())).base_model_name_or_path
        raise UserError(f"{ref} holds an adapter of {base}; give that model, and --adapter {ref} to merge it")
    if quantised and not hasattr(model.config, "quantization_config"):  # dequantised while it was read
        _forget_quantiser(model)
        if dtype != "auto":  # what was not quantised has the dtype that it has on disk
            model = model.to(dtype)
    return model, set(info["missing_keys"]), stored_dtype


def _auto_class(config: Any) -> Any:
    """The auto class that gives what was saved: a model of images and text keeps its towers, though its text alone could be read."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind, saved = getattr(config, "model_type", None), getattr(config, "architectures", None) or ()
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    wrapper = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if wrapper is not None and not own_code and (causal is None or (wrapper in saved and causal not in saved)):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _read_tokenizer(ref: str, source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        absent = "backend tokenizer" in str(error)
        reason = "no tokenizer.json, tokenizer.model or the like is there" if absent else first_line(error)
        raise UserError(
            f"{ref}: its tokenizer cannot be loaded: {reason}; put the tokenizer's files into the folder"
        ) from error


def _dequantising(quantised: dict[str, Any] | None, device: torch.device | None) -> dict[str, Any]:
    """Options that make transformers dequantise FP8 weights where ``device`` has no kernels for them."""
    from transformers.quantizers import AutoQuantizationConfig
    from transformers.utils import is_kernels_available

    kernels = device is None or (device.type == "cuda" and is_kernels_available())
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "fp8" or kernels:
        return {}
    return {"quantization_config": AutoQuantizationConfig.from_dict({**quantised, "dequantize": True})}


def _forget_quantiser(model: Any) -> None:
    """Let `save_pretrained` write dequantised weights as they are: transformers would quantise them again, under a config without it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    used = {tuple(conversion.target_patterns) for conversion in model._weight_conversions}
    fresh = get_model_conversion_mapping(model)
    model._weight_conversions = [conversion for conversion in fresh if tuple(conversion.target_patterns) in used]


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
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says; the folder is not that of one model"
    if isinstance(error, ImportError):
        return f"a package that this model needs is missing: {text}"
    return f"cannot be loaded: {type(error).__name__}: {text}"


def _check_weights(ref: str, model: nn.Module, missing: set[str]) -> None:
    """No weight of the checkpoint may be NaN or infinite; what is missing is looked at by `_check_missing`."""
    for name, parameter in model.named_parameters():
        if name not in missing and not is_finite(parameter):
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
    if name == ALL_GPUS:
        raise UserError(f"device {name!r}: this command works on one device; give cuda, or cuda:1")
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
        with redirect_stderr(io.StringIO()) if local else nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
