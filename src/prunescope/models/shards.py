"""Safetensors files piece by piece: where each tensor of a checkpoint lies, and writing one without holding it.

The library writes a file from tensors that are all in memory. Here a tensor may also be a range of bytes in another file, so that
embeddings of any size pass from one checkpoint to the next in small pieces. The format: 8 bytes of header length (little endian),
a JSON header padded with spaces, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.files import parse_json, replacing

__all__ = ["DTYPES", "INDEX", "Stored", "Tiles", "read_header", "stored_tensors", "write_shard"]

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor on disk. ``dtype`` is the name that safetensors gives it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Tiles:
    """A matrix that stays on disk, for what looks at a few of its rows at a time: as much of a tensor on the CPU as that needs.

    ``weights`` is accelerate's map of weights on disk; its own look-up would convert the whole matrix for every slice.
    """

    weights: Mapping[str, Tensor]
    name: str
    shape: torch.Size
    dtype: torch.dtype
    is_cuda: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __getitem__(self, rows: slice) -> Tensor:
        entry = getattr(self.weights, "index", {}).get(self.name, {})
        if "safetensors_file" not in entry:
            return self.weights[self.name][rows].to(self.dtype)
        from safetensors import safe_open

        with safe_open(entry["safetensors_file"], framework="pt") as file:
            found: Tensor = file.get_slice(entry["weight_name"])[rows].to(self.dtype)
        return found


def stored_tensors(folder: Path, ref: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder. Raises UserError for a shard that is missing, truncated or not safetensors."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    try:
        if index.is_file() and not single.is_file():
            weight_map = parse_json(index.read_text("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        else:
            weight_map, names = None, [single.name]
        found = {name: tensor for file in names for name, tensor in read_header(folder / file, ref).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{ref}: {index.name} cannot be read ({type(error).__name__}: {error}); fetch it again"
        ) from error
    absent = sorted(set(weight_map or ()) - set(found))
    if absent:
        raise UserError(
            f"{ref}: {absent[0]} is in {index.name} but in no shard ({len(absent)} in all); fetch the model again"
        )
    return found if weight_map is None else {name: found[name] for name in weight_map}


def read_header(file: Path, ref: str) -> dict[str, Stored]:
    """Every tensor of one safetensors file. Raises UserError if it cannot be read."""
    if not file.is_file():
        raise UserError(f"{ref}: the weights file {file.name} is missing; fetch it again")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                raise ValueError("it ends within its header")
            header = parse_json(stream.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        found = {}
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            if start + high > size:
                raise ValueError("it is truncated")
            found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start + low, high - low)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{ref}: the weights file {file.name} cannot be read ({error}); fetch it again") from error
    return found


def write_shard(path: Path, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Write a safetensors file beside ``path``, then rename it. Stored tensors are copied byte by byte, in pieces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, Stored):
            dtype, shape, nbytes = tensor.dtype, tensor.shape, tensor.nbytes
        else:
            dtype, shape, nbytes = _NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as beside, beside.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for tensor in tensors.values():
            if isinstance(tensor, Stored):
                _copy(tensor, out)
            elif tensor.numel():
                out.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        out.flush()
        os.fsync(out.fileno())


def _copy(tensor: Stored, out: Any) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = source.read(min(left, _CHUNK))
            if not piece:
                raise UserError(f"{tensor.file} is truncated; fetch it again")
            out.write(piece)
            left -= len(piece)
