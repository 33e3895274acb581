"""Perplexity before and after, by method and pattern: the table of docs/sparsify.md.

    python benchmarks/sparsify_perplexity.py --calibration C4.json --perplexity wikitext2_test.txt [--model smollm2-135m] [--device cuda]

Any model and texts do; on a CPU take fewer --samples and --perplexity-windows. Says at the end whether SparseGPT <= Wanda < magnitude.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import prunescope
from prunescope.models.blockwise import stream_model

CASES: list[tuple[str, dict[str, Any]]] = [
    ("0.5", {"sparsity": 0.5}),
    ("2:4", {"pattern": "2:4"}),
    ("4:8", {"pattern": "4:8"}),
]
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("wanda, variant", "0.5", {"method": "wanda", "sparsity": 0.5, "variant": True}),
    ("sparsegpt, owl", "0.5", {"method": "sparsegpt", "sparsity": 0.5, "allocation": "owl"}),
    ("sparsegpt", "0.7", {"method": "sparsegpt", "sparsity": 0.7}),
    ("sparsegpt, owl", "0.7", {"method": "sparsegpt", "sparsity": 0.7, "allocation": "owl"}),
    ("structured", "0.2", {"method": "structured", "sparsity": 0.2}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--perplexity", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--perplexity-windows", type=int, default=None)
    parser.add_argument("--more", action="store_true", help="variant, owl, 70 % and structured too")
    options = parser.parse_args()
    common = {name: value for name, value in vars(options).items() if name not in ("model", "more")}
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if not Path(model).is_dir():  # dequantise once, not for every run
            model = str(stream_model(model, Path(scratch), device=options.device).folder)
        found: dict[tuple[str, str], float] = {}
        runs = [
            (method, case, {"method": method, **given})
            for case, given in CASES
            for method in ("magnitude", "wanda", "sparsegpt")
        ]
        for method, case, given in [*runs, *(MORE if options.more else [])]:
            started = time.perf_counter()
            record = prunescope.sparsify(model, **common, **given).record
            errors = [row["error"] for row in record["modules"] if row["error"] is not None]
            found[method, case] = record["perplexity"]["pruned"]
            print(
                f"RESULT {method:16s} {case:4s} dense {record['perplexity']['dense']:.3f}  pruned {record['perplexity']['pruned']:.3f}  "
                f"mean relative error {sum(errors) / len(errors):.4f}  sparsity {record['sparsity']:.4f}  {time.perf_counter() - started:.1f} s",
                flush=True,
            )
    for case, _ in CASES:
        sparsegpt, wanda, magnitude = (found[method, case] for method in ("sparsegpt", "wanda", "magnitude"))
        print(f"{case}: SparseGPT <= Wanda < magnitude: {sparsegpt <= wanda < magnitude}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "CPU"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
