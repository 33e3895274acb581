"""Two models that together are larger than a GPU, compared by it from the machine's memory: seconds against the bytes and the operations.

    python benchmarks/stream_gpu.py --folder /dev/shm/models     # Qwen3-32B's shape with 58 blocks, bfloat16: twice 60 GB of memory, kept there
    python benchmarks/stream_gpu.py --folder /dev/shm/models --blocks 24   # the same with twice 26 GB, where there is less memory
    python benchmarks/stream_gpu.py --shape small --check        # two models of 1.3 GB, also compared in GPU memory: the numbers must be the same

The floor is the larger of two: the bytes of the weights that a phase needs over the rate of copies from pinned memory, and its operations over the
rate of a matrix product, both measured in the same run. `open` is the check that every model gets: all weights once, on seven tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from layerwise_gpu import seconds
from stream_memory import WORDS, reading

import prunescope.compare.streamed as streamed_layerwise
from prunescope.compare.context import Transcript
from prunescope.compare.divergence import Slice, divergence_passes, divergence_rows
from prunescope.compare.layerwise import layerwise_rows
from prunescope.compare.streamed import streamed_layerwise_rows
from prunescope.jobs.options import LoadOptions
from prunescope.jobs.streaming import StreamedPair
from prunescope.models.loading import load_model
from prunescope.models.shards import INDEX, write_shard

SHAPES: dict[str, dict[str, Any]] = {
    "30b": {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 151936, "num_hidden_layers": 58},
    "small": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32768, "num_hidden_layers": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5120, "num_hidden_layers": 2, "head_dim": 16},
}  # fmt: skip
COMMON = {"tie_word_embeddings": False, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_BLOCKS = 5  # of a shard, which then has 5 GB at the largest shape, as published ones do
_WRITERS = 4


def make_models(folder: Path, shape: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Two folders of random weights, drawn on the device, the target's two per cent off the dense one's."""
    config = transformers.Qwen3Config(**({"head_dim": 128} | COMMON | shape), dtype=dtype, architectures=["Qwen3ForCausalLM"])  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        place = str(int(name.split(".layers.")[1].split(".")[0]) // _BLOCKS) if ".layers." in name else "outside"
        shards.setdefault(place, {})[name] = parameter.shape
    generator = torch.Generator(device).manual_seed(0)
    sides = [folder / name for name in ("dense", "target")]
    maps: list[dict[str, str]] = [{}, {}]
    with ThreadPoolExecutor(_WRITERS) as writers:
        tasks: list[Any] = []
        for side in sides:
            side.mkdir(parents=True, exist_ok=True)
        for number, shapes in enumerate(shards.values()):
            file = f"model-{number:05d}.safetensors"
            tensors: list[dict[str, torch.Tensor]] = [{}, {}]
            for name, size in shapes.items():
                dense = torch.ones(size, device=device, dtype=dtype)
                if len(size) > 1:
                    dense = torch.randn(size, generator=generator, device=device, dtype=dtype) * 0.02
                noise = torch.randn(size, generator=generator, device=device, dtype=dtype) * (0.0004 * (len(size) > 1))
                tensors[0][name], tensors[1][name] = dense.cpu(), (dense + noise).cpu()
            while len(tasks) >= _WRITERS:
                tasks.pop(0).result()
            for side, held, weight_map in zip(sides, tensors, maps, strict=True):
                tasks.append(writers.submit(write_shard, side / file, held))
                weight_map |= dict.fromkeys(held, file)
        for task in tasks:
            task.result()
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w4"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w4")
    for side, weight_map in zip(sides, maps, strict=True):
        config.save_pretrained(side)
        tokenizer.save_pretrained(side)
        (side / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def copy_rate(device: str, folder: Path) -> float:
    """Bytes a second from pinned memory to the GPU; on a CPU those at which the files are read."""
    if device == "cpu":
        return reading(folder)
    pinned = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device=device)
    return 2**30 / seconds(lambda: there.copy_(pinned, non_blocking=True), device, 9)


def product_rate(device: str, dtype: torch.dtype) -> float:
    n = 512 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, 7)


@contextmanager
def first_call_of(module: Any, name: str) -> Iterator[list[float]]:
    """When a function of a module is first called."""
    found: list[float] = []
    plain: Callable[..., Any] = getattr(module, name)

    def timed(*args: Any) -> Any:
        found.append(time.perf_counter())
        return plain(*args)

    setattr(module, name, timed)
    try:
        yield found
    finally:
        setattr(module, name, plain)


class Floors:
    """What a phase must take at least."""

    def __init__(self, pair: StreamedPair, options: argparse.Namespace, dtype: torch.dtype) -> None:
        models = [pair.dense, pair.target]
        self.sizes = [{n: p.numel() for n, p in m.model.named_parameters()} for m in models]  # type: ignore[union-attr]
        self.blocks = sum(count for names in self.sizes for name, count in names.items() if ".layers." in name)
        config = pair.dense.model.config
        self.matrix = config.vocab_size * config.hidden_size  # embedding, and head
        self.layers, self.itemsize = config.num_hidden_layers, dtype.itemsize
        self.copies = copy_rate(options.device, Path(pair.dense.folder))
        self.products = product_rate(options.device, dtype)

    def report(self, name: str, taken: float, weights: float, operations: float) -> float:
        moved, worked = weights * self.itemsize / self.copies, operations / self.products
        floor = max(moved, worked)
        print(
            f"{name:34s} {taken:8.2f} s; {weights * self.itemsize / 1e9:6.1f} GB = {moved:6.2f} s, {operations:.2e} operations = {worked:6.2f} s: {taken / floor:.2f} x the floor",
            flush=True,
        )
        return floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="30b")
    parser.add_argument("--blocks", type=int, default=None, help="other than the shape's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    for name, default in (
        ("prompts", 8), ("length", 64), ("steps", 8), ("batch-size", 8), ("chunks", 16), ("context", 512), ("memory-mb", 768), ("repeats", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default=None, help="for the models, which stay there (default: a temporary folder)")
    parser.add_argument("--no-prefetch", action="store_true")
    parser.add_argument("--check", action="store_true", help="also with both models in the GPU's memory")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.blocks} if options.blocks else {})
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as place:
        folder = Path(place) / f"{options.shape}-{shape['num_hidden_layers']}-{options.dtype}"
        if not (folder / "target" / INDEX).is_file():
            started = time.perf_counter()
            make_models(folder, shape, dtype, device)
            print(f"models made in {time.perf_counter() - started:.0f} s", flush=True)
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        measure(folder, options, dtype)


@torch.no_grad()
def measure(folder: Path, options: argparse.Namespace, dtype: torch.dtype) -> None:
    device = options.device
    loading = LoadOptions(options.dtype, device, None, False)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 5000, (options.prompts, options.length + options.steps), generator=generator).tolist()
    prompts, texts = [row[: options.length] for row in tokens], [row[options.length :] for row in tokens]
    sequences = [Transcript(p, t) for p, t in zip(prompts, texts, strict=True)]
    chunks = torch.randint(5, 5000, (options.chunks, options.context), generator=generator)
    slices = [Slice("random", chunks, chunks.numel())]
    memory = options.memory_mb * 2**20
    with tempfile.TemporaryDirectory(dir=folder) as work:
        pair = found = None
        for repeat in range(options.repeats):
            pair = None
            gc.collect()  # what was locked of its files may be locked again
            started = time.perf_counter()
            pair = StreamedPair.open(str(folder / "dense"), str(folder / "target"), loading, Path(work) / "scratch")
            opening = time.perf_counter() - started
            assert pair.target is not None and hasattr(pair.target, "ahead")
            if options.no_prefetch:
                pair.dense.ahead = pair.target.ahead = None
            floors = Floors(pair, options, dtype)
            if not repeat:
                name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
                print(
                    f"{name}, torch {torch.__version__}, {options.dtype}: copies {floors.copies / 1e9:.1f} GB/s, products {floors.products / 1e12:.1f} TFLOP/s; two models of {sum(floors.sizes[0].values()) * dtype.itemsize / 1e9:.1f} GB",
                    flush=True,
                )
            everything = sum(sum(names.values()) for names in floors.sizes)
            floors.report("open both" + (", with imports" if not repeat else ""), opening, everything, 0)
            read = sum(len(s.read) for s in sequences)
            rows = sum(len(s.continuation) for s in sequences) * (4 * floors.layers + 1)
            scored = options.chunks * (options.context // 2 - 1)
            parts = Path(work) / f"layerwise-{repeat}"
            parts.mkdir()
            started = time.perf_counter()
            with first_call_of(streamed_layerwise, "rows_table") as columns:
                found = streamed_layerwise_rows(
                    pair.dense, pair.target, sequences, "key", parts, batch_size=options.batch_size, memory=memory
                )
            taken = time.perf_counter() - started
            blocks_operations, columns_operations = 2 * floors.blocks * read, 2 * floors.matrix * rows
            outside = 3 * floors.matrix  # the embedding of each, and the head
            floors.report("layerwise", taken, floors.blocks + outside, blocks_operations + columns_operations)
            floors.report("    blocks", columns[0] - started, floors.blocks + 2 * floors.matrix, blocks_operations)
            floors.report("    columns", taken - (columns[0] - started), floors.matrix, columns_operations)
            parts = Path(work) / f"divergence-{repeat}"
            parts.mkdir()
            started = time.perf_counter()
            with pair.having_read(*divergence_passes(slices, 4), parts):
                told = divergence_rows(
                    pair.pair.dense, pair.pair.pruned, slices, batch_size=4, memory=memory, parts=parts, key="key"
                )  # fmt: skip
            taken = time.perf_counter() - started
            operations = 2 * floors.blocks * chunks.numel() + 2 * 2 * floors.matrix * scored
            floors.report("divergence", taken, floors.blocks + 4 * floors.matrix, operations)
        if device != "cpu":
            print(f"peak GPU memory {torch.cuda.max_memory_reserved() / 1e9:.1f} GB, allocated {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")  # fmt: skip
        if options.check:
            assert found is not None
            dense, target = (load_model(folder / side, device=device, dtype=options.dtype) for side in ("dense", "target"))  # fmt: skip
            held = layerwise_rows(dense, target, prompts, texts=texts, batch_size=options.batch_size, memory=memory)
            same = repr(held.table.to_pylist()) == repr(found.table.to_pylist())
            kl = [torch.tensor(table["kl_dense_target"].to_numpy()) for table in (held.table, found.table)]
            print(f"the same bits as in memory: {same}; largest difference of the KL {(kl[0] - kl[1]).abs().max():.2g} of {kl[0].max():.2g}")  # fmt: skip
            told_held = divergence_rows(dense, target, slices, batch_size=4, memory=memory).table
            print(f"divergence, the same bits: {repr(told_held.to_pylist()) == repr(told.table.to_pylist())}")
            if device == "cpu" and not same:
                sys.exit("the numbers differ")


if __name__ == "__main__":
    main()
