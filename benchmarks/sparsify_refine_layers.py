"""What each refinement leaves of a layer's squared error, on the text it saw and on text it did not see: a table of docs/sparsify.md.

    python benchmarks/sparsify_refine_layers.py --text C4.json [--model smollm2-135m] [--layers 2,15] [--samples 32 --seq-len 512]

Half of the samples are calibrated on, half are held out. Inputs are the dense model's. Errors are summed over the matrices of these blocks, each
relative to what it puts out, and given as a share of SparseGPT's (or the method's own) error before refinement.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import prunescope
from prunescope.data.calibration import calibration_tokens
from prunescope.prune.calibrate import InputStatistic, Text, gather
from prunescope.prune.inplace import Resident
from prunescope.prune.masks import Goal
from prunescope.prune.refine import Refine, refine
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.wanda import wanda

WAYS: tuple[Refine, ...] = ("swaps", "admm", "swaps-admm", "admm-gradual")


def inputs(resident: Resident, tokens: Tensor, layers: list[int], file: Path) -> dict[str, InputStatistic]:
    """Gram matrices of the blocks' inputs, by the first matrix that reads them."""
    text = Text(resident, tokens, 4, 2**32, file)
    found: dict[str, InputStatistic] = {}
    for layer in range(max(layers) + 1):
        if layer in layers:
            statistics, shares = gather(text, layer, resident.matrices(layer), gram=True, advance=lambda n: None)
            found |= {name: statistics[first] for name, first in shares.items()}
        if layer < max(layers):
            text.run(layer, keep=True, advance=lambda n: None)
    text.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--layers", default="2,15")
    parser.add_argument("--goals", default="2:4,0.5")
    parser.add_argument("--methods", default="sparsegpt,wanda")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    dense = prunescope.load(options.model, device=options.device)
    resident = Resident(dense)
    layers = [int(layer) for layer in options.layers.split(",")]
    tokens = calibration_tokens(dense, options.text, samples=options.samples, seq_len=options.seq_len, seed=0).tokens
    half = len(tokens) // 2
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        seen, unseen = (inputs(resident, part, layers, Path(scratch) / "s") for part in (tokens[:half], tokens[half:]))
    matrices = [matrix for layer in layers for matrix in resident.matrices(layer)]
    print(f"{half * options.seq_len} tokens seen, as many not; {len(matrices)} matrices", flush=True)
    for goal in map(Goal.parse, options.goals.split(",")):
        for method in options.methods.split(","):
            errors: dict[str, list[tuple[float, float]]] = {}
            seconds = dict.fromkeys(("none", *WAYS), 0.0)
            for matrix in matrices:
                old, gram = matrix.weight.detach().float(), seen[matrix.name].hessian()
                if method == "sparsegpt":
                    (new,), _ = sparsegpt([old], gram, [goal])
                else:
                    new = old.masked_fill(wanda(old, gram.diagonal().sqrt(), goal), 0.0)
                for way in ("none", *WAYS):
                    started = time.process_time()
                    found = new
                    if way != "none":
                        fit = method == "sparsegpt"
                        (found,) = refine(way, [old], [new], gram, [goal], damping=0.01, fit=fit, per_row=not fit)
                    seconds[way] += time.process_time() - started
                    both = [part[matrix.name].relative_error(old, found) ** 2 for part in (seen, unseen)]
                    errors.setdefault(way, []).append((both[0], both[1]))
            plain = torch.tensor(errors["none"])
            for way, each in errors.items():
                ratio = (torch.tensor(each) / plain).mean(0)
                mean = torch.tensor(each).sqrt().mean(0)
                print(
                    f"RESULT {method:9s} {goal!s:4s} {way:12s} squared error, of the unrefined: seen {ratio[0]:.3f} unseen {ratio[1]:.3f}; "
                    f"mean relative error: seen {mean[0]:.4f} unseen {mean[1]:.4f}; {seconds[way]:.1f} s CPU",
                    flush=True,
                )


if __name__ == "__main__":
    main()
