"""What `sparsify --refine` buys: layer error, held-out KL and perplexity, by pattern and refinement; the table of docs/sparsify.md.

    python benchmarks/sparsify_refine.py --perplexity wikitext2_test.txt [--model smollm2-135m] [--samples 64 --seq-len 128] [--goals 2:4,0.5]

Calibrated on traces (what the dense model writes itself). KL(dense || pruned), nats a token, is on traces of another seed, and compared text by
text with the unrefined model of the same goal. A line a run, as soon as it is done.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import prunescope
from prunescope.cache import cache_folder
from prunescope.data.traces import write_traces
from prunescope.models.blockwise import stream_model
from prunescope.prune.heal import HealPlan, held_out_kl
from prunescope.stats import paired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--goals", default="2:4,0.5")
    parser.add_argument("--ways", default="none,admm,swaps,swaps-admm,admm-gradual")
    parser.add_argument("--calibration", default="traces")
    parser.add_argument("--perplexity")
    parser.add_argument("--perplexity-windows", type=int, default=24)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kept", type=Path, help="JSON file of what each text cost so far, to go on from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if not Path(folder).is_dir():  # dequantise once, not for every run
            folder = str(stream_model(folder, Path(scratch), device=options.device).folder)
        dense = prunescope.load(folder, device=options.device)
        traces = write_traces(dense, [], samples=options.held_out, new_tokens=options.seq_len, seed=1, cache=cache_folder())  # fmt: skip
        texts = [(row.prompt, row.continuation) for row in traces.rows if row.continuation]
        lengths = np.array([len(continuation) for _, continuation in texts])
        print(f"held out: {len(texts)} texts, {lengths.sum()} tokens", flush=True)
        common: dict[str, Any] = {"samples": options.samples, "seq_len": options.seq_len, "device": options.device}
        common |= {"calibration": options.calibration, "method": options.method, "perplexity": options.perplexity}
        if options.perplexity:
            common["perplexity_windows"] = options.perplexity_windows
        kept: dict[str, list[float]] = {}
        if options.kept and options.kept.is_file():
            kept = json.loads(options.kept.read_text("utf-8"))
        for way in options.ways.split(","):
            for goal in options.goals.split(","):
                started = time.process_time()
                given: dict[str, Any] = {"pattern": goal} if ":" in goal else {"sparsity": float(goal)}
                out = Path(scratch) / "pruned"
                record = prunescope.sparsify(
                    folder, **given, refine=None if way == "none" else way, out=str(out), overwrite=True, **common
                ).record  # type: ignore[arg-type]
                took = time.process_time() - started
                student = prunescope.load(str(out), device=options.device)
                each = np.array([held_out_kl(student, dense, [text], HealPlan(steps=1)) for text in texts])
                errors = np.array([row["error"] for row in record["modules"]])
                before = np.array([row.get("error_unrefined") or row["error"] for row in record["modules"]])
                found = paired(kept.get(f"{goal} none", list(each)), list(each))
                kept[f"{goal} {way}"] = list(each)
                if options.kept:
                    options.kept.write_text(json.dumps(kept), "utf-8")
                perplexity = record["perplexity"] or {}
                print(
                    f"RESULT {options.method} {goal} {way:12s} mean relative error {errors.mean():.4f}, squared error {np.mean((errors / before) ** 2):.3f} of the unrefined  "
                    f"KL {(each * lengths).sum() / lengths.sum():.4f}  a text {each.mean():.4f}, against unrefined {found['difference']:+.4f} {found['ci95']}  "
                    f"perplexity {perplexity}  sparsity {record['sparsity']:.4f}  {took:.0f} s CPU",
                    flush=True,
                )


if __name__ == "__main__":
    main()
