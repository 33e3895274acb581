"""Products of a step in isolation: linear layers that are given the same few rows, in one kernel against one cuBLAS call each.

What is measured: microseconds of one use of the layers (queries, keys and values together, or one of the other products of a block of Qwen2.5-7B), in a
CUDA graph of many uses with weights of their own, so that no cache holds them; GB/s are bytes of weights over that time, beside the rate of a copy
in the same run. Every cut of the kernel is checked against cuBLAS first, and against itself run again.

Run: python benchmarks/products_gpu.py [qkv o gate_up gated down head]; without a GPU, one cut in Triton's interpreter: TRITON_INTERPRET=1 python benchmarks/products_gpu.py --small --device cpu
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunescope.errors import first_line
from prunescope.models.gating import gated
from prunescope.models.products import Tile, gated_products, gated_tile_of, products, tile_of
from prunescope.speed.timing import measure_rates

PARTS = {  # outputs of each matrix, inputs, whether there are biases
    "qkv": ((3584, 512, 512), 3584, True),
    "o": ((3584,), 3584, False),
    "gate_up": ((18944, 18944), 3584, False),
    "gated": ((18944, 18944), 3584, False),  # with the activation between them
    "down": ((3584,), 18944, False),
    "head": ((152064,), 3584, False),
}
SMALL = {"qkv": ((48, 16, 16), 96, True), "gated": ((48, 48), 96, False)}
PROCESSORS, MEMORY = 132, 220 * 1024  # of a Hopper, and bytes of shared memory of one
HELD = 600e6  # bytes of weights that no cache holds
Layers = list[tuple[list[Tensor], list[Tensor | None]]]


def cuts(part: str, rows: int, every: bool) -> list[Tile]:
    """Cuts with enough programs for all processors and enough loads on their way."""
    outs, ins, _ = PARTS[part]
    wide = max(16, 1 << (rows - 1).bit_length())
    together = 2 if part == "gated" else 1  # matrices that a program reads
    found = []
    for width, deep, split, warps, stages in product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (4, 8), (2, 3, 4, 5, 6)):  # fmt: skip
        programs = sum(-(-count // width) for count in outs) * split // together
        step = (together * width + wide) * deep * 2
        beside = min(MEMORY // (step * stages + 1024), 2048 // (32 * warps), -(-programs // PROCESSORS))
        enough = beside and programs >= PROCESSORS and -(-ins // deep) >= split * 2
        if enough and beside * (stages - 1) * together * width * deep * 2 >= 32e3:
            usual = warps == (8 if together * width >= 256 else 4) and stages <= 4 and (split < 8 or programs < 1000)
            if every or (usual and programs < 2500 and not (width == 16 and part not in ("gated", "gate_up"))):
                found.append(Tile(width, deep, split, warps, stages))
    return found


def layers_of(outs: tuple[int, ...], ins: int, biased: bool, count: int, device: torch.device, dtype: torch.dtype) -> Layers:  # fmt: skip
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * 0.02

    return [([normal(n, ins) for n in outs], [normal(n) if biased else None for n in outs]) for _ in range(count)]


def micros(work: Callable[[], object], uses: int, device: torch.device) -> float:
    """Of one use, in a graph; the least of five replays."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - began) / uses
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    took = []
    for _ in range(6):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        took.append(began.elapsed_time(ended))
    return 1000 * min(took[1:]) / uses


def layer(weight: Tensor) -> Any:
    return SimpleNamespace(weight=weight, bias=None)


def plainly(part: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    found = [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return [gated(*found, 0)] if part == "gated" else found


def at_once(part: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None], counts: Tensor, tile: Tile) -> list[Tensor]:  # fmt: skip
    if part == "gated":
        return [gated_products(x, *(layer(w) for w in weights), 0, counts, tile)]
    return products(x, weights, biases, counts, tile)


def agrees(part: str, x: Tensor, layers: Layers, counts: Tensor, tile: Tile) -> str:
    found, again = (at_once(part, x, *layers[0], counts, tile) for _ in range(2))
    plain = plainly(part, x, *layers[0])
    off = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, plain, strict=True))
    turned = at_once(part, x.flip(0), *layers[0], counts, tile)
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    order = all(torch.equal(a, b.flip(0)) for a, b in zip(found, turned, strict=True))
    return "" if off < 5e-3 and same and order else f" WRONG: off by {off:.1e}, again {same}, in another order {order}"


def measure(part: str, args: Namespace, device: torch.device, rate: float) -> None:
    outs, ins, biased = (SMALL if args.small else PARTS)[part]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    size = 2 * ins * sum(outs)
    count = 2 if args.small else max(2, min(28, round(HELD / size)))
    layers = layers_of(outs, ins, biased, count, device, dtype)
    x = torch.randn(args.batch, ins, device=device, dtype=dtype)
    counts = torch.zeros(2**14, dtype=torch.int32, device=device)

    def plain() -> None:
        for pair in layers:
            plainly(part, x, *pair)

    def together(tile: Tile) -> Callable[[], None]:
        def work() -> None:
            for pair in layers:
                at_once(part, x, *pair, counts, tile)

        return work

    took = micros(plain, count, device)
    print(f"{part}: {outs} x {ins}, {args.batch} rows, {size / 1e6:.1f} MB; a copy's rate gives {size / rate * 1e6:.1f} us", flush=True)  # fmt: skip
    print(f"  {took:8.1f} us {size / took / 1e3:6.0f} GB/s  cuBLAS, {len(outs)} calls", flush=True)
    rows = []
    own = (
        Tile(16, 32, 2, 4, 2)
        if args.small
        else (gated_tile_of if part == "gated" else tile_of)(ins, outs[0] if part == "gated" else sum(outs))
    )
    for tile in [own] if args.small else dict.fromkeys([own, *cuts(part, args.batch, args.every)]):
        try:
            wrong = agrees(part, x, layers, counts, tile)
            rows.append((micros(together(tile), count, device), tile, wrong + (" (as it is set)" if tile == own else "")))  # fmt: skip
        except Exception as error:  # more shared memory or registers than there are
            print(f"  {tile}: {type(error).__name__}: {first_line(error)}", flush=True)
    for took, tile, note in sorted(rows, key=lambda row: row[0])[: args.show]:
        print(f"  {took:8.1f} us {size / took / 1e3:6.0f} GB/s  {tile}{note}", flush=True)
    if any("WRONG" in note for *_, note in rows):
        print("  WRONG among: " + "; ".join(f"{tile}{note}" for _, tile, note in rows if "WRONG" in note), flush=True)
    print(f"  {len(rows)} cuts", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["qkv"], help="of " + ", ".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", action="store_true", help="all cuts, not a few of each kind")
    parser.add_argument("--show", type=int, default=25, help="the fastest cuts")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rate = measure_rates(device, torch.bfloat16 if device.type == "cuda" else torch.float32).bytes_per_s
    print(f"a copy: {rate / 1e9:.0f} GB/s; torch {torch.__version__}", flush=True)
    for part in args.parts:
        measure(part, args, device, rate)


if __name__ == "__main__":
    main()
