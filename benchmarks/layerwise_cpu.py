"""Time of the layerwise metrics per decoding step on this machine, part by part, against its two floors.

Operations: the product of the distinct streams of a step with the head, rows x 2 d V, over the rate that a large product of the same dtype
reaches in the same run. Bytes: the logits, written once by the product, read once by the sums of the rows and twice by those of the pairs, over
the measured rate of reading. Random streams of SmolLM2-135M's shape, checked against float64; with --real also the whole job on the real
model, 12 prompts x 64 steps, nothing cached: writing the continuations, the forward pass, all columns, the noise floor.

    python benchmarks/layerwise_cpu.py [--steps 8] [--layers 30] [--width 576] [--vocab 49152] [--real]

Times are the least of several runs, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from prunescope.compare.columns import compare
from prunescope.compare.head import Head
from prunescope.compare.kernels import sums as fused
from prunescope.compare.metrics import Change, compare_hidden, compare_logits


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    work()  # warm up
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def parts(z: Tensor, pairs: Tensor, steps: int) -> None:
    """Times of the fused sums per step, and what is done with them."""
    try:
        started = time.perf_counter()
        from prunescope.compare.kernels import numba_sums as fused_numba

        fused_numba.pair_sums(z[:2], torch.tensor([[0, 1]]), torch.zeros(1, len(fused.PILOTS)), 1.0)
        fused_numba.row_sums(z[:1], 1.0)
    except ImportError:
        print("no numba: no fused sums")
        return
    print(f"kernels ready after  {time.perf_counter() - started:8.1f} s (import, compiling or loading)")
    sums, top = fused_numba.row_sums(z, 1.0)
    rows = fused.row_stats(z, sums, top, 1.0)
    guessed = fused.pilots(z, pairs, rows, 1.0)
    gathered = fused.gather(fused_numba, z, pairs, 1.0)
    for name, work in {
        "sums of rows": lambda: fused_numba.row_sums(z, 1.0),
        "row statistics": lambda: fused.row_stats(z, sums, top, 1.0),
        "pilots": lambda: fused.pilots(z, pairs, rows, 1.0),
        "sums of pairs": lambda: fused_numba.pair_sums(z, pairs, guessed, 1.0),
        "columns": lambda: fused.finish(gathered, z.shape[1], 1.0, Change),
    }.items():
        print(f"{name:20} {seconds(work) / steps * 1e3:8.2f} ms")


def real() -> None:
    """The whole job on the bundled model."""
    import prunescope
    from prunescope.compare.layerwise import layerwise_rows
    from prunescope.data.prompts import read_prompts
    from prunescope.data.tokens import encode

    dense = prunescope.load("smollm2-135m")
    prompts = encode(dense, read_prompts()[:12], 64)
    layerwise_rows(dense, None, prompts[:1], max_new_tokens=2, stop=False)  # warm up
    started = time.perf_counter()
    found = layerwise_rows(dense, None, prompts, max_new_tokens=64, stop=False)
    steps = sum(len(s.continuation) for s in found.sequences)
    print(
        f"real model           {(time.perf_counter() - started) / steps * 1e3:8.1f} ms a step, the whole job ({len(prompts)} prompts, {steps} steps)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 8), ("layers", 30), ("width", 576), ("vocab", 49152)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--real", action="store_true")
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
    z = z.float()
    fast = compare(streams, few, head)
    for column in ("h_cos_dev", "z_cos_dev", "kl_dense_target", "js"):
        torch.testing.assert_close(fast[column], slow[column], rtol=1e-3, atol=1e-9)

    a, b = torch.randn(2048, 2048, dtype=torch.float64), torch.randn(2048, 2048, dtype=torch.float64)
    rate = 2 * 2048**3 / seconds(lambda: a @ b)
    reading = 4 * z.numel() / seconds(lambda: z.sum())
    floor = rows * 2 * options.width * options.vocab / rate
    moved = 4 * options.vocab * (2 * rows + 2 * len(one))
    measured = seconds(lambda: compare(streams, pairs, head), 3) / options.steps
    projection = seconds(lambda: head.logits(streams), 3) / options.steps
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{rows} streams a step, d = {options.width}, V = {options.vocab}, {options.steps} steps; times per step")
    print(f"float64 product      {rate / 1e9:8.1f} GFLOP/s")
    print(f"reading              {reading / 1e9:8.1f} GB/s")
    print(f"floor of operations  {floor * 1e3:8.1f} ms (the product)")
    print(f"floor of bytes       {moved / reading * 1e3:8.1f} ms ({moved / 1e6:.0f} MB of logits)")
    parts(z, pairs, options.steps)
    print(f"projection           {projection * 1e3:8.1f} ms = {projection / floor:.1f} x floor of operations")
    print(f"all columns          {measured * 1e3:8.1f} ms = {measured / floor:.1f} x floor of operations")
    if options.real:
        real()


if __name__ == "__main__":
    main()
