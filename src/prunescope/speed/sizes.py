"""What a model is made of: parameters, bytes in memory and on disk, and operations of its linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunescope.models.decoding import forward_options
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import nonzero
from prunescope.models.references import BUNDLED, bundled_file, is_drop
from prunescope.models.semistructured import inner_tensors, two_four_layers

__all__ = ["bytes_of", "cache_bytes", "linear_operations", "parameters", "tensors", "unread_bytes"]


def parameters(loaded: LoadedModel, name: str) -> dict[str, Any]:
    """The columns of a table of `speed` that follow from the weights alone; ``name`` is the model as the user wrote it."""
    record = loaded.record or {}
    return {
        "format": record.get("format"),
        "base": (record.get("base") or {}).get("source"),
        "dropped": str(loaded.dropped),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "nonzero_parameters": sum(map(nonzero, loaded.model.parameters())),
        "dropped_parameters": sum(p.numel() for module in loaded.taken_out() for p in module.parameters()),
        "zeros_in_matrices": loaded.sparsity(),
        "two_four_layers": len(two_four_layers(loaded)),
        "disk_bytes": _disk_bytes(loaded, name),
    }


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of what they hold, what they share counted once."""
    stores = {}
    for value in tensors:
        for inner in inner_tensors(value):
            store = inner.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
    return sum(stores.values())


def unread_bytes(loaded: LoadedModel) -> int:
    """Bytes of the embedding, of which a step reads single rows; 0 where it is the head as well."""
    embedding = loaded.model.get_input_embeddings().weight
    tied = embedding.data_ptr() == loaded.anatomy.head.weight.data_ptr()  # type: ignore[operator]
    return 0 if tied else embedding.numel() * embedding.element_size()


def _disk_bytes(loaded: LoadedModel, name: str) -> int | None:
    """Bytes of the files that hold this model's weights; of a recipe, which has none, of the folder. None where there are no files."""
    if is_drop(name):
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

    if name == BUNDLED:
        return bundled_file().stat().st_size
    try:
        folder = snapshot_download(name, revision=loaded.identity.get("revision"), local_files_only=True)
    except Exception:  # whatever the hub's client says: the number is left out
        return None
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) or None


def cache_bytes(layers: list[Any]) -> int:
    """Bytes that the keys and values of a cache's layers really take."""
    return sum(value.untyped_storage().nbytes() for layer in layers for value in (layer.keys, layer.values))


@torch.no_grad()
def linear_operations(loaded: LoadedModel, ids: Tensor) -> tuple[int | None, int]:
    """Operations of the linear layers in one pass over ``ids`` ``(1, tokens)``: without the head, and of the head at one position.

    What is counted are products of two matrices. Attention multiplies batches of them: it has no weights, and the floor of a prefill leaves it
    out. None for a mixture of experts, whose operations depend on the routing.
    """
    if any(p.dim() == 3 for block in loaded.anatomy.blocks for p in block.module.parameters()):
        return None, 0
    options = forward_options(loaded.model)
    with FlopCounterMode(display=False) as counter:
        loaded.model(input_ids=ids, use_cache=False, **options)
    counted = counter.get_flop_counts()["Global"]
    head = 2 * loaded.anatomy.vocab_size * loaded.anatomy.hidden_size
    products = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return products - head * (1 if options else ids.shape[1]), head
