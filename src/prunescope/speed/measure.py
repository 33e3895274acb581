"""What a pruned model saves: parameters, bytes, time of reading a prompt and of writing, against the first model and against the hardware.

Two times are measured for each batch size: *prefill*, one pass over prompts of random tokens, and *decode*, a step that writes one token in
every text, in the way `generate` writes on the device. Beside each stands the time that the device cannot beat: for a step, the weights
that it reads over the measured bandwidth; for a prefill, the operations of its linear layers over the measured rate of a matrix product.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from prunescope.errors import UserError
from prunescope.models.anatomy import hooks
from prunescope.models.decoding import decode, forward_options
from prunescope.models.generating import decoding_way, static_problem
from prunescope.models.loading import LoadedModel
from prunescope.models.semistructured import inner_tensors, two_four_layers, using_kernels
from prunescope.speed.timing import Rates, Timing, timed

__all__ = ["Measured", "check_length", "forget", "measure", "notes", "rows_of", "short", "time_again"]

_FEW_ZEROS = 0.01  # a share of zeros below which a model counts as dense
_PLAIN = "one call a step, growing cache"


@dataclass
class Measured:
    """A model as it is now, and its times."""

    name: str
    facts: dict[str, Any]  # the columns that do not depend on the batch size
    times: dict[int, tuple[Timing, Timing]]  # by batch size: prefill, one step
    operations: int | None  # of a prompt's linear layers, but for the head; None where not all are linear layers
    head_operations: int


def check_length(loaded: LoadedModel, config: dict[str, Any]) -> None:
    needed = config["length"] + config["max_new_tokens"]
    if loaded.context is not None and needed > loaded.context:
        raise UserError(
            f"{loaded.ref}: --length {config['length']} and --max-new-tokens {config['max_new_tokens']} are more than its context of {loaded.context} tokens; ask for less"
        )


def forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- one model ---------------------------------------------------------------------------------------------------------


def measure(loaded: LoadedModel, name: str, config: dict[str, Any], batch_sizes: list[int]) -> Measured:
    record = loaded.record or {}
    facts = {
        "format": record.get("format"),
        "base": (record.get("base") or {}).get("source"),
        "dropped": str(loaded.dropped),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in loaded.model.parameters()),
        "dropped_parameters": sum(p.numel() for module in loaded.taken_out() for p in module.parameters()),
        "zeros_in_matrices": loaded.sparsity(),
        "two_four_layers": len(two_four_layers(loaded)),
        "disk_bytes": _disk_bytes(loaded, name),
    }
    ids = _prompts(loaded, max(batch_sizes), config["length"], config["seed"])
    kernels: Any = using_kernels(loaded) if config["sparse_kernels"] else nullcontext([])
    with torch.no_grad(), kernels as sparse:
        held = _bytes(_tensors(loaded.model))
        taken_out = _bytes(t for module in loaded.taken_out() for t in _tensors(module))
        operations, head = _operations(loaded, ids[:1])
        cache = _read(loaded, ids[:1])
        kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        facts |= {
            "sparse_layers": len(sparse),
            "memory_bytes": held + taken_out,
            "taken_out_bytes": taken_out,
            "step_bytes": held - _unread_bytes(loaded),
            "cache_bytes_per_token": _cache_bytes(kept) / ids.shape[1],
            "cached_attentions": len(kept),
            "decoding": _PLAIN if static_problem(loaded) else decoding_way(loaded),
        }
        del cache, kept
        times = {size: _times(loaded, ids[:size], config) for size in batch_sizes}
    return Measured(name, facts, times, operations, head)


def _times(loaded: LoadedModel, ids: Tensor, config: dict[str, Any]) -> tuple[Timing, Timing]:
    device, repeats, steps = loaded.device, config["repeats"], config["max_new_tokens"]
    prefill = timed(lambda: _read(loaded, ids), device, repeats, warm_up=2)
    write = _write_plain if static_problem(loaded) else _write_fixed
    write(loaded, ids, steps)
    return prefill, Timing(tuple(write(loaded, ids, steps) for _ in range(repeats)))


def time_again(loaded: LoadedModel, first: Measured, config: dict[str, Any]) -> None:
    """Time the first model once more, behind what is dropped from it: a machine that has become slower or faster in between widens its spread."""
    ids = _prompts(loaded, max(first.times), config["length"], config["seed"])
    kernels: Any = using_kernels(loaded) if config["sparse_kernels"] else nullcontext()
    with torch.no_grad(), kernels:
        for size, before in first.times.items():
            after = _times(loaded, ids[:size], config)
            first.times[size] = (before[0].and_then(after[0]), before[1].and_then(after[1]))


def _read(loaded: LoadedModel, ids: Tensor) -> Any:
    """One pass over the prompts, as `generate()` makes it; the cache that it filled."""
    cache = DynamicCache(config=loaded.model.config)
    loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, **forward_options(loaded.model))
    return cache


def _write_plain(loaded: LoadedModel, ids: Tensor, steps: int) -> float:
    """Seconds a step, with the model called once a step and the likeliest token chosen on the device."""
    cache = _read(loaded, ids)
    token, options = ids[:, -1:], forward_options(loaded.model)

    def all_steps() -> None:
        nonlocal token
        for _ in range(steps - 1):
            out = loaded.model(input_ids=token, past_key_values=cache, use_cache=True, **options)
            token = out.logits[:, -1:].argmax(-1)

    return timed(all_steps, loaded.device, 1, warm_up=0).median / (steps - 1)


def _write_fixed(loaded: LoadedModel, ids: Tensor, steps: int) -> float:
    """The same through `prunescope.models.decoding`, as `generate` writes on a CUDA device."""
    marks: list[tuple[int, float]] = []

    def mark(step: int) -> None:
        if not marks or step == steps:
            torch.cuda.synchronize(loaded.device)
            marks.append((step, time.perf_counter()))

    decode(loaded, ids, torch.ones_like(ids), steps, lambda scores, _: scores.argmax(-1), mark=mark)
    (first, began), (last, ended) = marks
    return (ended - began) / (last - first)


def _prompts(loaded: LoadedModel, batch: int, length: int, seed: int) -> Tensor:
    """``(batch, length)`` random tokens, the same for all models of a vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(loaded.anatomy.vocab_size, (batch, length), generator=generator).to(loaded.device)


# --- what is counted ---------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of what they hold, what they share counted once."""
    stores = {}
    for value in tensors:
        for inner in inner_tensors(value):
            store = inner.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
    return sum(stores.values())


def _unread_bytes(loaded: LoadedModel) -> int:
    """Bytes of the embedding, of which a step reads single rows; 0 where it is the head as well."""
    embedding = loaded.model.get_input_embeddings().weight
    tied = embedding.data_ptr() == loaded.anatomy.head.weight.data_ptr()  # type: ignore[operator]
    return 0 if tied else embedding.numel() * embedding.element_size()


def _disk_bytes(loaded: LoadedModel, name: str) -> int | None:
    """Bytes of the files that hold this model's weights; of a recipe, which has none, of the folder. None where there are no files."""
    if name.startswith("drop:"):
        return None
    path = Path(name)
    if path.is_dir():
        weights = list(path.glob("*.safetensors")) or list(path.iterdir())
        return sum(file.stat().st_size for file in weights)
    if path.suffix == ".gguf":
        return path.stat().st_size
    return _stored_elsewhere(loaded, name)


def _stored_elsewhere(loaded: LoadedModel, name: str) -> int | None:
    """Bytes of the bundled model, or of a hub model in the local cache."""
    from huggingface_hub import snapshot_download

    from prunescope.models.loading import BUNDLED, _bundled_file

    if name == BUNDLED:
        return _bundled_file().stat().st_size
    try:
        folder = snapshot_download(name, revision=loaded.identity.get("revision"), local_files_only=True)
    except Exception:  # whatever the hub's client says: the number is left out
        return None
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) or None


def _cache_bytes(layers: list[Any]) -> int:
    """Bytes that the keys and values of a cache's layers really take."""
    return sum(value.untyped_storage().nbytes() for layer in layers for value in (layer.keys, layer.values))


def _operations(loaded: LoadedModel, ids: Tensor) -> tuple[int | None, int]:
    """Operations of the linear layers in one pass over ``ids``: without the head, and of the head at one position. None for a mixture of
    experts, where they depend on the routing."""
    counted, head = 0, loaded.anatomy.head
    if any(p.dim() == 3 for block in loaded.anatomy.blocks for p in block.module.parameters()):
        return None, 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal counted
        rows = args[0].numel() // args[0].shape[-1]
        counted += 2 * rows * args[0].shape[-1] * output.shape[-1]

    with hooks() as handles:
        for module in loaded.model.modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
                handles.append(module.register_forward_hook(count))
        _read(loaded, ids)
    return counted, 2 * loaded.anatomy.vocab_size * loaded.anatomy.hidden_size


# --- rows --------------------------------------------------------------------------------------------------------------


def rows_of(one: Measured, base: Measured, rates: Rates, config: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for size, (prefill, step) in one.times.items():
        operations = None if one.operations is None else size * (one.operations + one.head_operations)
        floors = {
            "prefill": None if operations is None else operations / rates.operations_per_s,
            "decode": None if operations is None else one.facts["step_bytes"] / rates.bytes_per_s,
        }
        row = {
            "model": one.name,
            "batch_size": size,
            "length": config["length"],
            "new_tokens": config["max_new_tokens"],
            **{key: value for key, value in one.facts.items() if key != "base"},
        }
        tokens = {"prefill": size * config["length"], "decode": size}
        for kind, timing, other in zip(("prefill", "decode"), (prefill, step), base.times[size], strict=True):
            floor = floors[kind]
            row |= {
                f"{kind}_s": timing.median,
                f"{kind}_s_min": min(timing.seconds),
                f"{kind}_s_max": max(timing.seconds),
                f"{kind}_tokens_per_s": tokens[kind] / timing.median,
                f"{kind}_floor_s": floor,
                f"{kind}_over_floor": None if floor is None else timing.median / floor,
                f"{kind}_speedup": other.median / timing.median,
                f"{kind}_within_spread": one is base or timing.same_as(other),
            }
        rows.append(row)
    return rows


def short(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("memory_bytes", "prefill_tokens_per_s", "prefill_speedup", "decode_tokens_per_s", "decode_speedup")
    return {key: row[key] for key in (*keys, "prefill_within_spread", "decode_within_spread")}


def notes(facts: dict[str, Any]) -> list[str]:
    """Where a format saves nothing, in plain words."""
    notes = []
    if facts["format"] == "zeroed":
        notes.append(
            "zeroed saves nothing: silent sublayers are stored, computed and cached like any other; compact saves all, recipe time and cache"
        )
    if facts["format"] == "recipe":
        notes.append(f"a recipe saves nothing on disk: it has no weights and needs those of {facts['base']}")
    if facts["taken_out_bytes"]:
        notes.append(
            "dropping saves time and cache, but no memory: the weights stay loaded, so that they can be put back"
        )
    zeros = f"{100 * facts['zeros_in_matrices']:.0f} % zeros"
    if facts["sparse_layers"]:
        notes.append(
            f"{facts['sparse_layers']} layers multiply with 2:4 kernels, which saves memory (time only where the gains say so); on disk their zeros are stored like any number"
        )
    elif facts["two_four_layers"]:
        notes.append(
            f"2:4 as dense tensors saves nothing: {zeros}, stored and multiplied like any number; --sparse-kernels uses them (CUDA, half precision)"
        )
    elif facts["zeros_in_matrices"] > _FEW_ZEROS and facts["format"] != "zeroed":
        notes.append(f"unstructured zeros save nothing: {zeros}, stored and multiplied like any number")
    return notes
