"""SparseGPT and Wanda on a GPU, a block of Qwen2.5-7B's shape, against the published algorithm and the two floors.

Random, correlated bf16 activations with some large channels; random weights. For each of a block's inputs the Hessian is gathered and the modules
that read it are pruned, by prunescope and (with --published) by the published algorithm written down directly (sparsify_cpu.py), on the same
inputs at full size. The objective ||(W - W') X||^2 of both is computed in float64 from the same Hessian. Times are of CUDA events, the
median of --repeats runs after one that does not count; the published algorithm is timed once. Operations that cannot be avoided (half of each
Gram matrix on tensor cores; a third of n^3 and rows x n^2 in float32) and bytes (inputs read once; Hessian, factor and weights once read and
written) are held against rates measured in the same run.

Then blocks of a real model class with random weights run through prunescope's own steps: two passes of the calibration text alone, with Wanda,
with SparseGPT.

    python benchmarks/sparsify_gpu.py [--published] [--shape 7b|tiny] [--samples 128] [--length 2048] [--parts solve,blocks]
"""

# ruff: noqa: B023, F821  (what is timed runs before the loop goes on, and before anything is deleted)
from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sparsify_cpu import direct_hessian, direct_sparsegpt
from torch import Tensor

from prunescope.prune.calibrate import InputStatistic
from prunescope.prune.masks import Goal
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.sparsegpt_gpu import repeated_shapes

SHAPES = {  # a block's inputs, each with the outputs of the modules that read it
    "7b": {"q,k,v": (3584, (3584, 512, 512)), "o": (3584, (3584,)), "gate,up": (3584, (18944, 18944)), "down": (18944, (3584,))},
    "tiny": {"q,k,v": (96, (96, 32, 32)), "o": (96, (96,)), "gate,up": (96, (256, 256)), "down": (256, (96,))},
}  # fmt: skip
CASES = ("0.5", "2:4", "4:8")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def seconds(work: Callable[[], object], repeats: int, warm: bool = True) -> float:
    """Median, on CUDA events where there are any."""
    times = []
    for i in range(repeats + warm):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken = begin.elapsed_time(end) / 1000
        else:
            started = time.perf_counter()
            work()
            taken = time.perf_counter() - started
        if i or not warm:
            times.append(taken)
    return statistics.median(times)


def rates() -> tuple[float, float, float]:
    """Operations a second in bf16 and in float32, bytes a second of a copy."""
    n = 8192 if CUDA else 512
    a, b = (torch.randn(n, n, device=DEVICE) for _ in range(2))
    c, d = a.bfloat16(), b.bfloat16()
    half, full = seconds(lambda: c @ d, 20), seconds(lambda: a @ b, 5)
    big = torch.randn(2**30 if CUDA else 2**22, device=DEVICE)
    other = torch.empty_like(big)
    copy = seconds(lambda: other.copy_(big), 5)
    return 2 * n**3 / half, 2 * n**3 / full, 8 * len(big) / copy


def activations(samples: int, length: int, n: int, seed: int) -> list[Tensor]:
    """``(length, n)`` bf16 each: mixtures of n/8 directions, noise, and a few channels twenty times as large."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    directions = torch.randn(n // 8, n, device=DEVICE, generator=generator).bfloat16() * (n // 8) ** -0.5
    size = torch.ones(n, device=DEVICE, dtype=torch.bfloat16)
    size[torch.randperm(n, device=DEVICE, generator=generator)[: max(1, n // 500)]] = 20
    found = []
    for _ in range(samples):
        mix = torch.randn(length, n // 8, device=DEVICE, generator=generator).bfloat16()
        noise = torch.randn(length, n, device=DEVICE, generator=generator).bfloat16()
        found.append((mix @ directions + 0.3 * noise) * size)
    return found


def objective(weights: list[Tensor], pruned: list[Tensor], hessian: Tensor) -> float:
    """``sum ||(W - W') X||^2`` in float64."""
    lost = torch.cat([w.float() - v for w, v in zip(weights, pruned, strict=True)]).double()
    total = 0.0
    for low in range(0, len(hessian), 2048):
        total += float(((lost @ hessian[:, low : low + 2048].double()) * lost[:, low : low + 2048]).sum())
    return total


def solve(options: argparse.Namespace) -> None:
    half, full, copy = rates()
    print(f"rates: bf16 {half / 1e12:.0f} TFLOP/s, float32 {full / 1e12:.1f} TFLOP/s, copy {copy / 1e12:.2f} TB/s")
    tokens = options.samples * options.length
    total: dict[str, float] = {}
    for i, (name, (n, rows)) in enumerate(SHAPES[options.shape].items()):
        samples = activations(options.samples, options.length, n, i)
        generator = torch.Generator(DEVICE).manual_seed(100 + i)
        weights = [torch.randn(r, n, device=DEVICE, generator=generator).bfloat16() * 0.02 for r in rows]

        def gathered() -> InputStatistic:
            statistic = InputStatistic(n, DEVICE, gram=True)
            for x in samples:
                statistic.add(x)
            statistic.hessian()
            return statistic

        taken = seconds(gathered, options.repeats)
        operations, bytes_moved = tokens * n**2 / half, (2 * tokens * n + 4 * n**2) / copy
        total["Hessian"] = total.get("Hessian", 0.0) + taken
        total["Hessian floor"] = total.get("Hessian floor", 0.0) + max(operations, bytes_moved)
        print(
            f"{name:8s} Hessian {taken * 1e3:7.1f} ms: {taken / operations:.2f} x operations, {taken / bytes_moved:.1f} x bytes"
        )
        hessian = gathered().hessian()
        assert torch.equal(hessian, gathered().hessian()), "Hessians differ from run to run"
        some = torch.arange(0, n, max(1, n // 256), device=DEVICE)
        exact = sum(x[:, some].double().T @ x.double() for x in samples)
        error = float((hessian[some].double() - exact).norm() / exact.norm())
        del exact
        print(f"         error against float64 {error:.1e} (norm of {len(some)} rows)")
        if options.published:
            took = seconds(lambda: [direct_hessian(samples) for _ in weights], 1, warm=False)
            total["published Hessian"] = total.get("published Hessian", 0.0) + took
            print(f"         published {took:.2f} s")
        del samples
        for case in CASES:
            goals = [Goal.parse(case if ":" in case else float(case))] * len(rows)
            once = seconds(lambda: sparsegpt(weights, hessian, goals), 1)
            torch.cuda.reset_peak_memory_stats() if CUDA else None
            first = sparsegpt(weights, hessian, goals)[0]
            with (
                repeated_shapes()
            ):  # as in a model: the first call of a shape is plain, the second captures, those after replay
                taken = seconds(lambda: sparsegpt(weights, hessian, goals), options.repeats)
                second = sparsegpt(weights, hessian, goals)[0]
            peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "results differ from run to run"
            for w, v, goal in zip(weights, first, goals, strict=True):
                assert int((v == 0).sum()) >= goal.count(w.numel()), "too few zeros"
            del second
            operations = (n**3 / 3 + sum(rows) * n**2) / full
            bytes_moved = (8 * n**2 + 8 * sum(rows) * n) / copy
            total[case] = total.get(case, 0.0) + taken
            total["solve floor"] = total.get("solve floor", 0.0) + max(operations, bytes_moved) / len(CASES)
            line = f"{name:8s} {case:4s} {taken * 1e3:7.1f} ms ({once * 1e3:.1f} the first time): {taken / operations:.2f} x operations, {taken / bytes_moved:.1f} x bytes, peak {peak:.1f} GB"
            if options.published:
                theirs: list[Tensor] = []
                took = seconds(
                    lambda: theirs.extend(direct_sparsegpt(w.float(), hessian, goal) for w, goal in zip(weights, goals, strict=True)), 1, warm=False
                )  # fmt: skip
                ours, other = objective(weights, first, hessian), objective(weights, theirs, hessian)
                total[f"published {case}"] = total.get(f"published {case}", 0.0) + took
                line += f"; published {took:.2f} s; objective {ours / other - 1:+.1e}"
                del theirs
            print(line, flush=True)
            del first
        del hessian
    for case in CASES:
        both, floor = total["Hessian"] + total[case], total["Hessian floor"] + total["solve floor"]
        line = f"BLOCK {case}: {both:.3f} s = {total['Hessian']:.3f} Hessians + {total[case]:.3f} solving, {both / floor:.2f} x the floor"
        if options.published:
            line += f"; published {total['published Hessian']:.2f} + {total[f'published {case}']:.2f} s, {(total['published Hessian'] + total[f'published {case}']) / both:.1f} x"
        print(line + f"; 28 blocks {28 * both:.1f} s", flush=True)


def blocks(options: argparse.Namespace) -> None:
    """Blocks of a Qwen2 model, through the steps of `prune_model` that are not files."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from prunescope.models.blockwise import stream_model
    from prunescope.prune.blocks import prune_block
    from prunescope.prune.calibrate import Text
    from prunescope.prune.plan import make_plan

    big = options.shape == "7b"
    config = Qwen2Config(
        hidden_size=3584 if big else 96, intermediate_size=18944 if big else 256, num_hidden_layers=2, num_attention_heads=28 if big else 6,
        num_key_value_heads=4 if big else 2, vocab_size=2048, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = Qwen2ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(Path(folder) / "model")
        del model
        streamed = stream_model(
            str(Path(folder) / "model"), Path(folder) / "scratch", dtype="bfloat16", device=DEVICE.type
        )
        tokens = torch.randint(0, 2048, (options.samples, options.length), generator=torch.Generator().manual_seed(1))

        class Quiet:
            def __call__(self, _: int) -> None: ...
            def note(self, _: str) -> None: ...

        quiet: Any = Quiet()
        for batch in options.batches:
            for layer in range(2):  # the first warms up
                found: dict[str, float] = {}
                for method, case in (
                    ("alone", "0.5"),
                    ("wanda", "0.5"),
                    ("wanda", "2:4"),
                    ("sparsegpt", "0.5"),
                    ("sparsegpt", "2:4"),
                    ("alone", "again"),
                ):
                    text = Text(streamed, tokens, batch, 2**40, Path(folder) / "spill")
                    with streamed.block(layer):
                        if method == "alone":
                            work = lambda: text.run(layer, keep=False, advance=quiet)  # noqa: E731
                        else:
                            plan = make_plan(streamed, method, Goal.parse(case if ":" in case else float(case)))  # type: ignore[arg-type]
                            work = lambda: prune_block(streamed, plan, layer, text, quiet)  # type: ignore[assignment]  # noqa: E731
                        gathering = seconds(work, 1, warm=False)
                        found[f"{method} {case}"] = gathering + seconds(
                            lambda: text.run(layer, keep=True, advance=quiet), 1, warm=False
                        )
                    text.close()
            alone = min(found["alone 0.5"], found["alone again"])
            print(
                f"blocks, {batch} x {options.length} tokens at a time: two passes alone {alone:.3f} s a block ({found['alone 0.5']:.3f}, {found['alone again']:.3f})"
            )
            for what, taken in found.items():
                if "alone" not in what:
                    print(
                        f"  {what:14s} {taken:.3f} s a block, {taken / alone:.2f} x the passes alone, {taken - alone:.3f} s more",
                        flush=True,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("repeats", 3), ("samples", 128), ("length", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b" if CUDA else "tiny")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--parts", default="solve,blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if CUDA else "CPU"
    print(
        f"{datetime.date.today()}, {card}, torch {torch.__version__}, {options.samples} x {options.length} tokens, shape {options.shape}"
    )
    with torch.no_grad():
        if "solve" in options.parts:
            solve(options)
        if "blocks" in options.parts:
            blocks(options)


if __name__ == "__main__":
    main()
