"""Peak memory and time of commands with `--stream` on two models of random weights that together are larger than what may be held.

    python benchmarks/stream_memory.py                       # Llama-3.2-1B's shape with 21 blocks, float32: twice 6 GB on disk
    python benchmarks/stream_memory.py --check               # also without --stream: the numbers must be the same bits
    python benchmarks/stream_memory.py --commands layerwise  # one of them; --blocks 42 for models twice as deep

The floor of memory is what must be held at once: the process with its libraries, the embedding (read whole once) and a block of each model. The
floor of time is the bytes of the blocks that a command reads over the rate at which this machine reads these files, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from sparsify_memory import COMMON, bare_process, make_model, run

from prunescope.models.shards import INDEX

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5120},
}  # fmt: skip
WORDS = ["A", "B", "C", "D", *(f"w{i}" for i in range(4, 5000))]


def make_texts(folder: Path, prompts: int, steps: int, context: int, chunks: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(4, 5000, (count,), generator=generator).tolist())

    rows = [{"prompt": words(16 + 3 * i), "continuation": words(steps)} for i in range(prompts)]
    (folder / "continuations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(words(context * chunks + 1))
    asked = [{"question": words(20 + i), "choices": [words(2) for _ in range(4)], "answer": i % 4} for i in range(8)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def reading(folder: Path) -> float:
    """Bytes a second at which the blocks of a model are read, as a command finds them: in the page cache or not."""
    started, total, buffer = time.perf_counter(), 0, bytearray(2**24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started)


def timed(argv: list[str]) -> tuple[float, str]:
    """Peak bytes of a command in a process of its own, and what to say of its time."""
    started, before = time.perf_counter(), os.times()
    peak, _ = run(argv)
    seconds, after = time.perf_counter() - started, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return peak, f"{seconds:.0f} s, {busy:.0f} s of a core"


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same numbers: every table, or the scores of a checkpoint."""
    import pyarrow.parquet as pq

    tables = [path.name for path in one.glob("*.parquet")]
    if tables:
        return all(pq.read_table(one / name).equals(pq.read_table(other / name)) for name in tables)
    records = [json.loads((folder / "prunescope.json").read_text())["scores"] for folder in (one, other)]
    return bool(records[0] == records[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=21)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--commands", nargs="+", default=["layerwise", "mcq", "divergence", "drop"])
    parser.add_argument("--check", action="store_true", help="run each without --stream too, and compare")
    parser.add_argument(
        "--folder",
        default=None,
        help="where to put the models, which stay there and are used again (default: a temporary folder)",
    )
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as place:
        folder = Path(place)
        for seed, name in enumerate(("dense", "target")):
            if not (folder / name / INDEX).is_file():
                (folder / name).mkdir(parents=True)
                config = transformers.LlamaConfig(
                    **shape, **COMMON, num_hidden_layers=options.blocks, architectures=["LlamaForCausalLM"]
                )
                make_model(folder / name, config, torch.Generator().manual_seed(seed), WORDS, "w4")
        make_texts(folder, options.prompts, options.steps, options.context, options.chunks)
        os.sync()
        total = sum(path.stat().st_size for path in (folder / "dense").glob("*.safetensors"))
        d, hidden = shape["hidden_size"], shape["intermediate_size"]
        keys = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
        block = 4 * (2 * d * d + 2 * keys * d + 3 * d * hidden)
        bare, rate = bare_process("LlamaForCausalLM", "layerwise"), reading(folder / "dense")
        floor = bare + 4 * shape["vocab_size"] * d + 2 * block
        print(
            f"each model: {total / 1e9:.2f} GB, {options.blocks} blocks of {block / 1e6:.0f} MB; process with its libraries: {bare / 1e6:.0f} MB; files read at {rate / 1e9:.2f} GB/s",
            flush=True,
        )
        pair = [str(folder / "dense"), str(folder / "target")]
        commands = {
            "layerwise": ["layerwise", *pair, "--continuations", str(folder / "continuations.jsonl")],
            "mcq": ["mcq", *pair, "--questions", str(folder / "questions.jsonl")],
            "divergence": ["divergence", *pair, "--text", str(folder / "text.txt"), "--context", str(options.context), "--scale", "false"],
            "drop": [
                *("drop", pair[0], "--n", "2", "--target", "all", "--cache", "false", "--calibration", str(folder / "text.txt")),
                *("--samples", str(options.chunks), "--seq-len", str(options.context)),
            ],
        }  # fmt: skip
        for name in options.commands:
            argv = [*commands[name], "--device", "cpu", "--out"]
            shutil.rmtree(folder / name, ignore_errors=True)
            peak, seconds = timed([*argv, str(folder / name), "--stream", "true"])
            # each block is read once to be checked when a model is opened, and once in earnest
            models = 1 if name == "drop" else 2
            least = 2 * models * options.blocks * block / rate
            print(
                f"{name} --stream: peak {peak / 1e9:.2f} GB, {peak / floor:.2f} x the floor of {floor / 1e9:.2f} GB; {seconds}, the floor of reading is {least:.0f} s",
                flush=True,
            )
            if options.check:
                peak, seconds = timed([*argv, str(folder / f"{name}-held"), "--stream", "false"])
                equal = same(folder / name, folder / f"{name}-held")
                print(f"{name} in memory: peak {peak / 1e9:.2f} GB, {seconds}; the same bits: {equal}", flush=True)
                shutil.rmtree(folder / f"{name}-held")


if __name__ == "__main__":
    main()
