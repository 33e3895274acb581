"""SparseGPT and Wanda on the matrices of one block, against the published algorithms written down directly, on this CPU.

The direct versions do what the papers describe and their reference implementations do: one Hessian a module and sample; Cholesky, inverse,
Cholesky; one column after the other over the whole block of 128; for Wanda a full sort of every row. Both sides get the same inputs (random,
correlated, 16 samples of 512 tokens) and are timed in turn, the median of several runs. The floor is the operations that cannot be
avoided (half of each Gram matrix, a factorisation and an inverse, the updates) over the rate of a matrix product in the same run.

    python benchmarks/sparsify_cpu.py [--repeats 3] [--samples 16] [--length 512] [--shapes SmolLM2-135M]
"""

# ruff: noqa: B023  (what is timed runs before the loop goes on)
from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from prunescope.prune.calibrate import InputStatistic
from prunescope.prune.masks import Goal
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.wanda import wanda

SHAPES = {  # a block's inputs, each with the outputs of the modules that read it
    "SmolLM2-135M": [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))],
    "Qwen2.5-0.5B": [(896, (896, 128, 128)), (896, (896,)), (896, (4864, 4864)), (4864, (896,))],
    "tiny": [
        (64, (64, 32, 32)),
        (64, (64,)),
        (64, (128, 128)),
        (128, (64,)),
    ],  # for the test suite: shows nothing but that it runs
}


def direct_hessian(samples: list[Tensor]) -> Tensor:
    """As published: H, rescaled at every sample so that it is always the mean, in the module's own buffer."""
    n = samples[0].shape[1]
    hessian = torch.zeros(n, n, device=samples[0].device)
    for seen, x in enumerate(samples, 1):
        hessian *= (seen - 1) / seen
        scaled = math.sqrt(2 / seen) * x.T.float()
        hessian += scaled.matmul(scaled.T)
    return hessian


def direct_sparsegpt(weight: Tensor, hessian: Tensor, goal: Goal) -> Tensor:
    """As published: W, H -> pruned W, a column at a time."""
    w, h = weight.clone(), hessian.clone()
    n = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(h, upper=True)
    for start in range(0, n, 128):
        stop = min(start + 128, n)
        block, inverse = w[:, start:stop].clone(), factor[start:stop, start:stop]
        pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
        if goal.of:
            mask = torch.zeros_like(block, dtype=torch.bool)
        else:
            scores = block**2 / inverse.diagonal()[None] ** 2
            mask = scores <= scores.flatten().sort()[0][int(scores.numel() * goal.sparsity)]
        for i in range(stop - start):
            if goal.of and i % goal.of == 0:
                scores = block[:, i : i + goal.of] ** 2 / inverse.diagonal()[None, i : i + goal.of] ** 2
                mask.scatter_(1, i + scores.topk(goal.of - goal.keep, dim=1, largest=False)[1], True)
            column = block[:, i]
            kept = column.clone()
            kept[mask[:, i]] = 0
            pruned[:, i] = kept
            errors[:, i] = (column - kept) / inverse[i, i]
            block[:, i:] -= errors[:, i : i + 1].matmul(inverse[i : i + 1, i:])
        w[:, start:stop] = pruned
        w[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return w


def direct_wanda(weight: Tensor, squares: Tensor, goal: Goal) -> Tensor:
    """As published: scores, then a full sort of every row, or a top-k for every group of columns."""
    scores = weight.abs() * squares.sqrt()[None]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if goal.of:
        for i in range(0, scores.shape[1], goal.of):
            group = scores[:, i : i + goal.of]
            mask.scatter_(1, i + group.topk(goal.of - goal.keep, dim=1, largest=False)[1], True)
    else:
        order = scores.sort(dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(scores.shape[1] * goal.sparsity)], True)
    pruned = weight.clone()
    pruned[mask] = 0
    return pruned


def medians(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Seconds of each, run in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, seen in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("repeats", 3), ("samples", 16), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["SmolLM2-135M", "Qwen2.5-0.5B"])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3000, 3000, generator=generator)
    (seconds,) = medians(5, lambda: a @ a)
    rate = 2 * 3000**3 / seconds
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rate / 1e9:.0f} GFLOP/s float32"
    )
    for shape in options.shapes:
        block = SHAPES[shape]
        totals: dict[str, list[float]] = {}
        objectives: dict[str, list[float]] = {}

        def add(what: str, direct: float, ours: float, floor: float, totals: dict[str, list[float]] = totals) -> None:
            row = totals.setdefault(what, [0.0, 0.0, 0.0])
            totals[what] = [row[0] + direct, row[1] + ours, row[2] + floor]

        for n, rows in block:
            mixing = torch.eye(n) + 0.5 * torch.randn(n, n, generator=generator) / math.sqrt(n)
            samples = [torch.randn(options.length, n, generator=generator) @ mixing for _ in range(options.samples)]
            weights = [torch.randn(r, n, generator=generator) * 0.05 for r in rows]
            tokens = options.length * options.samples

            def gathered(samples: list[Tensor] = samples, n: int = n) -> InputStatistic:
                statistic = InputStatistic(n, torch.device("cpu"), gram=True)
                for x in samples:
                    statistic.add(x)
                statistic.hessian()
                return statistic

            direct, ours = medians(options.repeats, lambda: [direct_hessian(samples) for _ in weights], gathered)
            add("Hessians", direct, ours, tokens * n**2 / rate)
            hessian, squares = gathered().hessian(), gathered().hessian().diagonal() / tokens
            solve_floor = (2 / 3 * n**3 + sum(rows) * n**2) / rate
            for case in ("0.5", "2:4"):
                goal = Goal.parse(case if ":" in case else float(case))
                direct, ours = medians(
                    options.repeats,
                    lambda: [direct_sparsegpt(w, hessian, goal) for w in weights],
                    lambda: sparsegpt(weights, hessian, [goal] * len(weights)),
                )
                add(f"SparseGPT {case}", direct, ours, solve_floor)
                found = [
                    [direct_sparsegpt(w, hessian, goal) for w in weights],
                    sparsegpt(weights, hessian, [goal] * len(weights))[0],
                ]
                values = [
                    sum(float((((w - v) @ hessian) * (w - v)).sum()) for w, v in zip(weights, side, strict=True))
                    for side in found
                ]
                objectives[case] = [x + y for x, y in zip(objectives.get(case, [0.0, 0.0]), values, strict=True)]
                direct, ours = medians(
                    options.repeats,
                    lambda: [direct_wanda(w, squares, goal) for w in weights],
                    lambda: [w.masked_fill(wanda(w, squares.sqrt(), goal), 0) for w in weights],
                )
                add(f"Wanda {case}", direct, ours, 0.0)
        print(f"\n{shape}, one block, {options.samples} x {options.length} tokens")
        for case in ("0.5", "2:4"):
            both = [x + y for x, y in zip(totals["Hessians"], totals[f"SparseGPT {case}"], strict=True)]
            totals[f"SparseGPT {case} with its Hessians"] = both
        for what, (direct, ours, floor) in totals.items():
            tail = f", {ours / floor:.1f} x the floor" if floor else ""
            print(
                f"  {what:34s} direct {direct:8.3f} s   prunescope {ours:8.3f} s   {direct / ours:6.1f} times as fast{tail}"
            )
        for case, (direct, ours) in objectives.items():
            print(f"  objective at {case}: {ours / direct - 1:+.1e} against the direct version")


if __name__ == "__main__":
    main()
