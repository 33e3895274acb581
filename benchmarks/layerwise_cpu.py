"""Time of the layerwise metrics per decoding step on this machine, against the floor of its matrix product.

The floor is the product of the distinct streams of a step with the head: rows x 2 d V operations over the rate that a large product
of the same dtype reaches in the same run. Random streams of SmolLM2-135M's shape; says nothing about other models' shapes.

    python benchmarks/layerwise_cpu.py [--steps 8] [--layers 30] [--width 576] [--vocab 49152]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from prunescope.compare.metrics import Head, compare, compare_hidden, compare_logits


def median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    work()  # warm up
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("steps", 8), ("layers", 30), ("width", 576), ("vocab", 49152)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = 2 * options.layers + 1
    streams = torch.randn(options.steps * rows, options.width, generator=generator)
    head = Head(torch.randn(options.vocab, options.width, generator=generator) * 0.2)
    one = torch.stack([torch.arange(1, rows), torch.arange(rows - 1)], 1)
    pairs = torch.cat([one + step * rows for step in range(options.steps)])

    few = pairs[:4]
    z = streams.double() @ head.weight.double().T
    slow = compare_logits(z[few[:, 0]], z[few[:, 1]]) | compare_hidden(streams[few[:, 0]], streams[few[:, 1]])
    fast = compare(streams, few, head)
    for column in ("h_cos_dev", "z_cos_dev", "kl_dense_target", "js"):
        torch.testing.assert_close(fast[column], slow[column], rtol=1e-3, atol=1e-9)

    a, b = torch.randn(2048, 2048, dtype=torch.float64), torch.randn(2048, 2048, dtype=torch.float64)
    rate = 2 * 2048**3 / median_seconds(lambda: a @ b)
    floor = rows * 2 * options.width * options.vocab / rate
    measured = median_seconds(lambda: compare(streams, pairs, head), 3) / options.steps
    projection = median_seconds(lambda: head.logits(streams), 3) / options.steps
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{rows} streams a step, d = {options.width}, V = {options.vocab}, {options.steps} steps")
    print(f"float64 product      {rate / 1e9:8.1f} GFLOP/s")
    print(f"floor per step       {floor * 1e3:8.1f} ms (the product alone)")
    print(f"projection per step  {projection * 1e3:8.1f} ms = {projection / floor:.1f} x floor")
    print(f"all columns per step {measured * 1e3:8.1f} ms = {measured / floor:.1f} x floor")


if __name__ == "__main__":
    main()
