"""The files of a run of `sparsify`: a shard a block, and what an interrupted run needs to go on.

While a run works, its folder holds `part-NNNNN.safetensors` for every finished block and `part-reports/` with what was found for it. At the
end shards get their final names, and the reports go as a whole when everything else is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.models.blockwise import StreamedModel, is_weights
from prunescope.models.shards import DTYPES, INDEX, Stored, read_header, write_shard
from prunescope.models.written import check_written
from prunescope.runs.folder import write_json

__all__ = ["finish", "finished_blocks", "report_of_block", "reports", "shard_of_block", "write_block"]


def reports(folder: Path) -> Path:
    """What an unfinished run needs to go on: the reports of its blocks, and its plan. Gone as a whole when the checkpoint is complete."""
    return folder / "part-reports"


def shard_of_block(folder: Path, layer: int) -> Path:
    """Where the weights of a finished block are."""
    return folder / f"part-{layer:05d}.safetensors"


def report_of_block(folder: Path, layer: int) -> Path:
    """Where it says what was found for a block."""
    return reports(folder) / f"{layer:05d}.json"


def finished_blocks(folder: Path, blocks: int) -> int:
    """How many of the first blocks are written: the report goes before the weights, the weights are renamed when complete."""
    for layer in range(blocks):  # cut off while shards got their final names
        named = folder / _shard_name(layer + 1, blocks)
        if named.is_file() and not shard_of_block(folder, layer).exists():
            named.rename(shard_of_block(folder, layer))
    done = 0
    while done < blocks and shard_of_block(folder, done).is_file() and report_of_block(folder, done).is_file():
        done += 1
    return done


def _shard_name(number: int, blocks: int) -> str:
    """Shard 0 holds what lies outside the blocks."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"


def write_block(streamed: StreamedModel, folder: Path, layer: int, found: dict[str, Any]) -> None:
    """Everything that the checkpoint stores of a block: pruned weights as they are now, the rest as it was."""
    pruned = {row["name"] for row in found["rows"]}
    changed: dict[str, list[int]] = found.get("changed", {})  # they lost experts
    touched = {*changed} | {matrix.parameter for matrix in streamed.matrices(layer) if matrix.name in pruned}
    tensors: dict[str, Tensor | Stored] = {}
    block, prefix = streamed.blocks[layer], streamed.names[layer]
    buffers = [(name, buffer) for name, buffer in block.named_buffers(prefix=prefix) if name in changed]
    for name, parameter in (*block.named_parameters(prefix=prefix), *buffers):
        stored = streamed.on_disk(name, parameter.detach())
        for key, value in stored.items():
            source = streamed.stored[key]
            new = name in touched or tuple(value.shape) != source.shape
            kept = isinstance(parameter, nn.Parameter)
            tensors[key] = value.to(streamed.stored_dtype(name) if kept else DTYPES[source.dtype]) if new else source
    if changed:
        whole = [streamed.on_disk(name, torch.empty(shape, device="meta")) for name, shape in changed.items()]
        found["gone"] = sorted({key for keys in whole for key in keys} - set(tensors))
    write_json(report_of_block(folder, layer), found)
    write_shard(shard_of_block(folder, layer), dict(sorted(tensors.items())))


def finish(streamed: StreamedModel, folder: Path, sizes: Mapping[str, int]) -> None:
    """Shards under their final names, what lies outside the blocks, the index, config and tokenizer."""
    blocks = len(streamed.blocks)
    parts = [shard_of_block(folder, layer) for layer in range(blocks)]
    total = 0
    names = [_shard_name(i, blocks) for i in range(blocks + 1)]
    inside: dict[str, str] = {}
    for file, name in zip(parts, names[1:], strict=True):
        header = read_header(file, str(file))
        inside |= dict.fromkeys(header, name)
        total += sum(tensor.nbytes for tensor in header.values())
    found = [json.loads(report_of_block(folder, layer).read_text("utf-8")) for layer in range(blocks)]
    gone = {name for report in found for name in report.get("gone", ())}
    outside = {name: tensor for name, tensor in streamed.stored.items() if name not in inside and name not in gone}
    write_shard(folder / names[0], outside)
    total += sum(tensor.nbytes for tensor in outside.values())
    weight_map = dict.fromkeys(outside, names[0]) | inside
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    for path in sorted(streamed.folder.iterdir()):
        ours = path.name in ("prunescope.json", "run.json", "config.yaml")
        if path.is_file() and not is_weights(path.name) and not ours and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    if sizes:
        path = folder / "config.json"
        content = json.loads(path.read_text("utf-8"))
        inner = content["text_config"] if isinstance(content.get("text_config"), dict) else content
        earlier = getattr(streamed.model.config.get_text_config(decoder=True), "attribute_map", {})
        for name, size in sizes.items():  # a field may stand there under the name that it had before
            spelled = [key for key in (name, *(old for old, new in earlier.items() if new == name)) if key in inner]
            inner |= dict.fromkeys(spelled or [name], size)
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for file, name in zip(parts, names[1:], strict=True):
        file.rename(folder / name)
    check_written(folder, type(streamed.model))
