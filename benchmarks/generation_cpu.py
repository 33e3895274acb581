"""`generate` against two plain `generate()` calls of the same length, in one run; the claim is at most 1.5 times.

What is measured: both models writing the same prompts with transformers alone, then the whole comparison (both regimes, all columns,
noise floor). The floor of what is added is operations: the teacher-forced pass over the dense texts, and the projections of every state in
float64, over the rates measured beside them. Run: python benchmarks/generation_cpu.py [--steps 64] [--prompts 8] [--model smollm2-135m]
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from statistics import median

import torch

from prunescope.compare.context import final_head
from prunescope.compare.generation import generation_rows
from prunescope.data.prompts import read_prompts
from prunescope.data.tokens import encode
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import continue_texts
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model


def spec_of(model: LoadedModel) -> DropSpec:
    """About a quarter of the attention sublayers."""
    return DropSpec(attn=tuple(range(1, len(model.anatomy), 4)))


def seconds_of_plain(model: LoadedModel, prompts: list[list[int]], steps: int, batch_size: int) -> float:
    started = time.perf_counter()
    continue_texts(model, prompts, steps, batch_size=batch_size, stop=False)
    with model.dropping(spec_of(model)):
        continue_texts(model, prompts, steps, batch_size=batch_size, stop=False)
    return time.perf_counter() - started


def seconds_of_ours(model: LoadedModel, prompts: list[list[int]], steps: int, batch_size: int) -> tuple[float, int]:
    started = time.perf_counter()
    found = generation_rows(model, spec_of(model), prompts, max_new_tokens=steps, stop=False, batch_size=batch_size)
    return time.perf_counter() - started, len(found.table)


def floor(model: LoadedModel, prompts: list[list[int]], steps: int) -> float:
    """Seconds of one pass over all tokens, and of three float64 projections a step: dense, free-running and teacher-forced."""
    ids = torch.tensor([(prompt * 40)[: len(prompt) + steps] for prompt in prompts[:1]])
    started = time.perf_counter()
    with torch.no_grad():
        model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    reading = (time.perf_counter() - started) / ids.numel() * sum(len(prompt) + steps for prompt in prompts)
    head = final_head(model)
    states = torch.randn(256, head.weight.shape[1])
    started = time.perf_counter()
    head.logits(states)
    return reading + (time.perf_counter() - started) / len(states) * 3 * steps * len(prompts)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    model = load_model(args.model, device="cpu")
    encoded = encode(model, read_prompts()[: args.prompts], args.steps)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps} steps, median of {args.rounds} rounds"
    )
    for batch_size, prompts in ((1, encoded[:1]), (len(encoded), encoded)):
        seconds_of_ours(model, prompts, 4, batch_size)  # warm
        plain, ours, rows = [], [], 0
        for _ in range(args.rounds):
            plain.append(seconds_of_plain(model, prompts, args.steps, batch_size))
            took, rows = seconds_of_ours(model, prompts, args.steps, batch_size)
            ours.append(took)
        ratios = sorted(b / a for a, b in zip(plain, ours, strict=True))
        least = floor(model, prompts, args.steps)
        print(
            f"batch {batch_size}: two plain generate() {median(plain):.2f} s, compared {median(ours):.2f} s ({rows} rows), "
            f"ratio {median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}); added {median(ours) - median(plain):.2f} s, its floor {least:.2f} s"
        )


if __name__ == "__main__":
    main()
