"""Whether models fit into the memory that is free, from the headers of their files: nothing is loaded."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from prunescope.errors import UserError
from prunescope.models.adapters import with_adapter
from prunescope.models.gguf_reading import parsed_once
from prunescope.models.loading import choose_device, choose_dtype
from prunescope.models.placing import placement
from prunescope.models.record import read_record
from prunescope.models.references import BUNDLED, bundled_file, expand_user
from prunescope.models.shards import DTYPES, INDEX, stored_tensors

__all__ = ["free_bytes", "machine_bytes", "unstreamable", "weight_bytes"]

_CGROUP = Path("/sys/fs/cgroup")
_LEAST_BITS = 1.5  # of a weight in a GGUF file, at the very least: IQ1_S has 1.56


def weight_bytes(
    ref: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None, adapter: str | None = None, enough: int = 0
) -> int | None:  # fmt: skip
    """Memory that the weights of ``ref`` take once they are loaded, None where that cannot be said before.

    Args:
        ref, dtype, device, revision, adapter: as `load_model` takes them.
        enough: a GGUF file that can never take more than this is not looked into, and its size on disk is given.
    """
    try:
        chosen = choose_dtype(dtype, choose_device(device))
        base = _base(expand_user(ref), adapter)
        path = bundled_file() if base == BUNDLED else Path(base)
        if path.suffix == ".gguf":
            return _gguf_bytes(path, chosen, enough)
        if path.is_dir():
            return _folder_bytes(path, chosen)
        return None if path.exists() or base.startswith((".", "/")) else _hub_bytes(base, revision, chosen)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # what is wrong with it is said where it is loaded


def _base(ref: str, adapter: str | None) -> str:
    """What holds the weights: the dense model of a recipe or of an adapter."""
    record = read_record(Path(ref)) if Path(ref).is_dir() else None
    if record is not None and record.get("format") == "recipe":
        ref, adapter = record["base"]["source"], adapter or record["base"].get("adapter")
    return with_adapter(ref, adapter)[0]


def _folder_bytes(folder: Path, dtype: torch.dtype | str) -> int:
    return sum(
        prod(tensor.shape) * dtype.itemsize
        if isinstance(dtype, torch.dtype) and tensor.dtype in DTYPES
        else tensor.nbytes
        for tensor in stored_tensors(folder, str(folder)).values()
    )


def _gguf_bytes(path: Path, dtype: torch.dtype | str, enough: int) -> int:
    import gguf

    width = dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize
    size = path.stat().st_size
    if size * 8 / _LEAST_BITS * width <= enough:
        return size
    with parsed_once():
        return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors) * width


def _hub_bytes(ref: str, revision: str | None, dtype: torch.dtype | str) -> int | None:
    """Of a Hugging Face id: from the local cache, else from the headers of its files on the hub."""
    from huggingface_hub import constants, get_safetensors_metadata, try_to_load_from_cache

    for name in (INDEX, "model.safetensors"):
        cached = try_to_load_from_cache(ref, name, revision=revision)
        if isinstance(cached, str):
            return _folder_bytes(Path(cached).parent, dtype)
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        counts = get_safetensors_metadata(ref, revision=revision).parameter_count
    except Exception:  # of whatever HTTP client the hub's library uses; what is wrong is said where the model is loaded
        return None
    return sum(_width(kind, dtype) * count for kind, count in counts.items())


def _width(kind: str, dtype: torch.dtype | str) -> int:
    """Bytes of a number that safetensors calls ``kind``."""
    if kind not in DTYPES:
        return max(1, int("".join(filter(str.isdigit, kind.partition("_")[0])) or 8) // 8)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else DTYPES[kind].itemsize


def unstreamable(ref: str, *, dequantise: bool = False) -> str | None:
    """Why `stream_model` would refuse ``ref``, where its files say so; None where they do not."""
    try:
        path = Path(expand_user(ref))
        record = read_record(path) if path.is_dir() else None
        config: Any = json.loads((path / "config.json").read_text("utf-8")) if path.is_dir() else {}
    except (UserError, OSError, ValueError):
        return None
    if record is not None and record.get("format") == "recipe":
        return f"{ref} is a recipe; write it with drop --format zeroed or compact"
    if config.get("quantization_config") and not dequantise:
        return f"the weights of {ref} are packed; give --dequantise"
    return None


# --- what is free ------------------------------------------------------------------------------------------------------


def free_bytes(device: str = "auto") -> int | None:
    """Memory of ``device`` that a model may take now; on a CPU within the limit of the container. None for devices that do not say."""
    try:
        chosen = choose_device(device)
    except UserError:
        return None
    if device == "auto" and (placed := placement(device)):  # a model may lie on all of them
        return int(sum(placed["max_memory"].values()))
    if chosen.type == "cuda":
        free: int = torch.cuda.mem_get_info(chosen)[0]
        return free + torch.cuda.memory_reserved(chosen) - torch.cuda.memory_allocated(chosen)
    if chosen.type != "cpu":
        return None
    available = int(psutil.virtual_memory().available)
    limit = _container_free()
    return available if limit is None else min(available, limit)


def machine_bytes() -> int:
    """Memory of the machine, or of the container."""
    total = int(psutil.virtual_memory().total)
    group = _container()
    return total if group is None else min(total, group[0])


def _container_free() -> int | None:
    """What the control group of the process leaves; pages of files count as free, since the system takes them back."""
    group = _container()
    return None if group is None else max(0, group[0] - group[1])


def _container() -> tuple[int, int] | None:
    """The limit of the control group of the process, and what is used of it but for pages of files."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((_CGROUP / name).read_text("ascii")) for name in (limit, used))
            rows = (_CGROUP / used).with_name("memory.stat").read_text("ascii").splitlines()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        stat = {key: int(value) for key, value in (row.split() for row in rows)}
        return most, now - stat.get("inactive_file", 0) - stat.get("active_file", 0)
    return None
