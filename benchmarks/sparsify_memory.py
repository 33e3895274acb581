"""Peak memory of `prunescope sparsify` on a model of random weights, and its time a block as the calibration text doubles.

    python benchmarks/sparsify_memory.py                            # Qwen2.5-1.5B's shape, float32, 6 GB on disk
    python benchmarks/sparsify_memory.py --blocks 2 --tokens 1024 2048 4096 8192   # the time a block, on two of its blocks

The floor of memory is what must be held at once: the process itself with its libraries, and the largest of embeddings and of one block
with its largest Hessian and that Hessian's factor. The floor of time is the operations of the text's two passes, of the Hessians, their
factors and the updates at the rate of a matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from prunescope.models.shards import INDEX, write_shard

COMMON = {
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES = {
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5120},
}  # fmt: skip
RUN = """
import json, sys
from pathlib import Path
from prunescope.cli import main
code = main(json.loads(sys.argv[1]))
print("PEAK", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
sys.exit(code)
"""  # VmHWM, in KiB: it counts pages of mapped files too; getrusage's figure would start from the memory of the process that starts this one


def make_model(
    folder: Path, config: transformers.PretrainedConfig, generator: torch.Generator, words: list[str], unknown: str
) -> int:
    """Write a model of random float32 weights, a block at a time, with a tokenizer of whole words; gives its bytes."""
    config.dtype = torch.float32
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        place = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "outside"
        shards.setdefault(place, {})[name] = parameter.shape
    weight_map, total = {}, 0
    for i, shapes in enumerate(shards.values()):
        tensors = {
            name: torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            for name, shape in shapes.items()
        }
        file = f"model-{i:05d}.safetensors"
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(4 * tensor.numel() for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(folder)
    return total


def make_text(file: Path, generator: torch.Generator) -> None:
    words = torch.randint(0, 5000, (40000,), generator=generator)
    file.write_text(" ".join(f"w{i}" for i in words.tolist()))


def run(argv: list[str]) -> tuple[float, str]:
    """Peak bytes of a command in a process of its own, and what it said."""
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(argv)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return 1024 * float(done.stderr.split("PEAK")[1]), done.stderr


def rate() -> float:
    """Float32 operations a second of a large matrix product."""
    a = torch.randn(3000, 3000)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 3000**3 / best


def bare_process(family: str, job: str) -> float:
    """Peak bytes of a process that has loaded its libraries and nothing else."""
    code = f"from transformers import {family}; import prunescope.jobs.{job}; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    return 1024 * float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--memory-mb", type=int, default=16, help="hidden states past this go to disk")
    parser.add_argument("--folder", default=None, help="where to put the model (default: a temporary folder)")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        config = transformers.Qwen2Config(
            **shape, **COMMON, num_hidden_layers=options.blocks, architectures=["Qwen2ForCausalLM"]
        )
        generator = torch.Generator().manual_seed(0)
        total = make_model(folder / "model", config, generator, [f"w{i}" for i in range(5000)], "w3")
        make_text(folder / "text.txt", generator)
        d, hidden, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
        keys = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
        block = 4 * (2 * d * d + 2 * keys * d + 3 * d * hidden)
        bare = bare_process("Qwen2ForCausalLM", "sparsify")
        floor = bare + max(4 * vocabulary * d, block + 8 * hidden**2)
        print(
            f"model: {total / 2**30:.2f} GiB, {options.blocks} blocks; process with its libraries: {bare / 2**20:.0f} MiB"
        )
        for tokens in options.tokens:
            length, speed = 512, rate()
            argv = [
                "sparsify", str(folder / "model"), "--method", options.method, "--sparsity", "0.5", "--calibration", str(folder / "text.txt"),
                "--samples", str(tokens // length), "--seq-len", str(length), "--memory-mb", str(options.memory_mb), "--overwrite",
                "--out", str(folder / "out"), "--device", "cpu",
            ]  # fmt: skip
            started = time.perf_counter()
            peak, said = run(argv)
            seconds = [float(line.split(",")[-1].split()[0]) for line in said.splitlines() if line.startswith("block ")]
            middle = sorted(seconds)[len(seconds) // 2]
            operations = 4 * block / 4 * tokens
            if options.method == "sparsegpt":  # half of each Gram matrix; a factorisation and an inverse; updates
                widths = {d: 2 * d + 2 * keys + 2 * hidden, hidden: d}  # inputs -> outputs that read them
                operations += tokens * (3 * d**2 + hidden**2) + 2 / 3 * (3 * d**3 + hidden**3)
                operations += sum(outputs * inputs**2 for inputs, outputs in widths.items())
            print(
                f"{options.method}, {tokens} tokens: peak {peak / 2**30:.2f} GiB ({peak / 1e9:.2f} GB), {peak / floor:.2f} x the floor of {floor / 1e9:.2f} GB; "
                f"{middle:.2f} s a block, {middle / (operations / speed):.2f} x the floor of {operations / speed:.2f} s at {speed / 1e9:.0f} GFLOP/s; {time.perf_counter() - started:.0f} s in all",
                flush=True,
            )


if __name__ == "__main__":
    main()
