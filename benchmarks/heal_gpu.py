"""Time and memory of healing per million tokens, against the floor: the products of three forward passes of the student and one of the teacher.

Two models of Qwen2.5-0.5B's shape with random weights; the student is the teacher with some blocks dropped. A step is a whole one: both
passes, the divergence over the full vocabulary, backward, clipping, AdamW on float32 weights. The floor is those operations over the rate of a
large bfloat16 product measured in the same run. Embedding and head are not trained by default, so the head's third product is not made; it is in
the floor all the same.

    python benchmarks/heal_gpu.py [--batch 32] [--length 384] [--steps 8] [--drop mlp=10,12;attn=15] [--embeddings] [--lora 16]
    python benchmarks/heal_gpu.py --device cpu --layers 2 --width 32 --inner 48 --heads 2 --kv-heads 2 --vocab 256 --batch 2 --length 8 --steps 1
"""

from __future__ import annotations

import argparse
import time

import torch
from layerwise_gpu import build

import prunescope.prune.heal as engine
from prunescope.data.traces import padded
from prunescope.models.loaded import LoadedModel
from prunescope.prune.heal import HealPlan, Text
from prunescope.prune.trainable import make_trainable
from prunescope.speed.timing import measure_rates, timed


def operations(model: LoadedModel, length: int) -> float:
    """Of a forward pass, a token: two a weight of blocks and head, and the products of attention with the tokens before."""
    weights = sum(p.numel() for block in model.anatomy.blocks for p in block.module.parameters())
    weights += model.anatomy.head.weight.numel()
    attentions = sum(block.attn.layer not in model.dropped.attn for block in model.anatomy.blocks)
    heads = model.model.config.num_attention_heads * (
        model.anatomy.hidden_size // model.model.config.num_attention_heads
    )
    return 2 * weights + attentions * 4 * heads * length / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 24, "width": 896, "inner": 4864, "heads": 14, "kv_heads": 2, "vocab": 151936}
    for name, default in {**shape, "batch": 32, "length": 384, "steps": 8}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--lora", type=int)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--drop", default="mlp=1")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    gpu = options.device != "cpu"
    options.dtype = "bfloat16" if gpu else "float32"
    teacher = build(options, 0)
    options.dtype = "float32"
    student = build(options, 0)
    student.drop(options.drop)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    device = student.device
    rate = measure_rates(device, torch.bfloat16 if gpu else torch.float32).operations_per_s
    generator = torch.Generator().manual_seed(0)
    texts: list[Text] = [
        (row[:1], row[1:])
        for row in torch.randint(0, options.vocab, (2 * options.batch, options.length), generator=generator).tolist()
    ]
    plan = HealPlan(steps=10**6, batch_size=options.batch, compile=options.compile, micro_batch=options.micro_batch, warmup=0, learning_rate=1e-5,
                    chunk=max(16, (2**27 if gpu else 2**24) // options.vocab))  # fmt: skip
    trained = make_trainable(student, rank=options.lora, embeddings=options.embeddings)
    optimiser = torch.optim.AdamW(list(trained.parameters.values()), fused=gpu)
    if options.compile:
        print("blocks through torch.compile")
    tokens = options.batch * options.length
    counter = iter(range(10**6))

    def step() -> None:
        engine._step(student, teacher, trained, optimiser, texts[: options.batch], plan, next(counter))

    def passes(model: LoadedModel) -> None:
        with torch.no_grad(), engine._mixed(student):
            for part in engine._micro(texts[: options.batch], plan.micro_batch or plan.batch_size):
                engine._states(model, *(found.to(device) for found in padded(part)), plan.compile)

    name = torch.cuda.get_device_name() if gpu else "cpu"
    print(
        f"{name}, torch {torch.__version__}: {options.batch} texts of {options.length} tokens a step, {rate / 1e12:.3g} TFLOP/s measured"
    )
    held = torch.cuda.memory_allocated() if gpu else 0
    started = time.perf_counter()
    whole = timed(step, device, options.steps, warm_up=3 if gpu else 1)
    if gpu:
        print(
            f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, of which both models are {held / 2**30:.2f}"
        )
    for what, model in (("teacher", teacher), ("student", student)):
        found = timed(lambda model=model: passes(model), device, options.steps)
        print(f"forward of the {what} without its head: {found.median / tokens * 1e6:.2f} s a million tokens")
    needed = (3 * operations(student, options.length) + operations(teacher, options.length)) / rate
    seconds = whole.median / tokens
    print(
        f"healing: {seconds * 1e6:.2f} s a million tokens (spread {whole.spread / whole.median:.0%}), floor {needed * 1e6:.2f} s: {seconds / needed:.2f} x the floor"
    )
    print(f"all of it took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
