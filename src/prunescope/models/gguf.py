"""A `.gguf` file as a plain folder of float32 safetensors, dequantised a tensor at a time.

transformers reads GGUF files too, but holds the whole model in float32 while it does; its own tables of names and layouts are used here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.gguf_reading import parsed_once
from prunescope.models.loading import loading_problem, quiet_transformers
from prunescope.models.shards import INDEX, write_shard
from prunescope.progress import progress
from prunescope.runs.folder import write_json

__all__ = ["dequantise"]

_SHARD = 2**28  # bytes that are gathered before they are written


def dequantise(ref: str, path: Path, folder: Path) -> Path:
    """Write ``path`` as a model folder in float32; a folder that is complete already is left as it is.

    Fused expert weights of MoE models are the exception to a tensor at a time: their halves come apart, and are held to the end.

    Raises:
        UserError: the file cannot be read, or transformers does not know its architecture.
    """
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
        if all((folder / shard).is_file() for shard in shards):
            return folder
        (folder / INDEX).unlink()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_transformers(True), parsed_once():
            _write(path, folder)
    except (UserError, OSError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the reader of foreign files fails in ways of its own
        raise UserError(f"{ref}: {loading_problem(error, str(path.parent))}") from error
    return folder


def _write(path: Path, folder: Path) -> None:
    import gguf
    import transformers
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    options: Any = {"gguf_file": path.name}
    config = transformers.AutoConfig.from_pretrained(path.parent, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    parsed = load_gguf_checkpoint(str(path), return_tensors=False)
    parsed["tensors"] = {}
    reader = gguf.GGUFReader(path)
    architecture = read_field(reader, "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed.get("config", {}))
    names = get_gguf_hf_weights_map(model, processor)
    shards: list[dict[str, Tensor]] = [{}]
    written: dict[str, int] = {}

    def add(name: str, tensor: Tensor) -> None:
        shards[-1][name] = tensor
        written[name] = len(shards)
        if sum(4 * t.numel() for t in shards[-1].values()) >= _SHARD:
            flush()

    def flush() -> None:
        if shards[-1]:
            write_shard(folder / _shard_name(len(shards)), shards[-1])
            shards[-1].clear()
            shards.append({})

    with progress(f"dequantising {path.name}", len(reader.tensors)) as advance:
        for tensor in reader.tensors:
            result = processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters=parsed,
            )
            if result.name in names:
                values = np.ascontiguousarray(result.weights, dtype=np.float32)
                add(names[result.name], torch.from_numpy(values if values.flags.writeable else values.copy()))
            advance(1)
    for name, value in parsed["tensors"].items():
        add(name, value.float())
    flush()
    config.dtype = torch.float32
    config.architectures = [type(model).__name__]
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": {name: _shard_name(shard) for name, shard in written.items()}}
    write_json(folder / INDEX, index)


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"
