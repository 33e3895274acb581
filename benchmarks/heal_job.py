"""Prune, heal and judge a model by tasks: dense, pruned and healed side by side for several ways of pruning, and the page of all of it.

The job of docs/heal.md with Qwen2.5-Coder-0.5B-Instruct on one GPU: prompts to write traces from are GSM8K questions 200 to 1318 and prompts for code;
judged are GSM8K 0 to 199 and HumanEval. A way to prune is what `drop` or `sparsify` are told, and how much.

    python benchmarks/heal_job.py --model qwen.gguf --gsm8k ../shared/data/gsm8k_test.jsonl --code code-prompts.jsonl --data ../shared/data --out runs/qwen --compile
    python benchmarks/heal_job.py --model ./tiny --prompts p.txt --out runs/tiny --ways block_1 --tasks reversal-mc --limit 2 --samples 8 --new-tokens 4 --steps 2 --batch-size 2 --device cpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import prunescope

WAYS = "block_4,attn_8,mlp_4,sparsegpt_0.5,sparsegpt_2:4"


def questions(gsm8k: Path, out: Path, first: int = 200) -> Path:
    """Prompts of GSM8K's questions that are not among those that are judged."""
    rows = [json.loads(line) for line in gsm8k.read_text("utf-8").splitlines() if line][first:]
    out.write_text("".join(json.dumps({"prompt": row["question"]}) + "\n" for row in rows), "utf-8")
    return out


def prune(way: str, options: argparse.Namespace, folder: Path, traces: str) -> None:
    what, _, how = way.partition("_")
    common: dict[str, Any] = {"out": str(folder), "device": options.device, "overwrite": True}
    if what in ("attn", "mlp", "block"):
        select = {"select": options.select, "calibration": f"traces:{traces}"} if options.select else {}
        prunescope.drop(options.model, target=what, n=int(how), samples=min(64, options.samples), **select, **common)  # type: ignore[arg-type]
    else:
        goal: dict[str, Any] = {"pattern": how} if ":" in how else {"sparsity": float(how)}
        prunescope.sparsify(
            options.model,
            method=what,
            calibration=f"traces:{traces}",
            samples=min(128, options.samples),
            **goal,
            **common,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", help="files of prompts, with commas between them")
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--code")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", default=WAYS)
    parser.add_argument("--select", default="", help="of drop; left out, cosine on text that the model samples")
    parser.add_argument("--tasks", default="gsm8k,humaneval")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--on-policy", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true")
    whole = {"limit": 200, "samples": 4096, "new_tokens": 256, "steps": 1200, "batch_size": 32, "held_out": 64}
    for name, default in whole.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.prompts] if options.prompts else []
    if options.gsm8k:
        files.append(str(questions(options.gsm8k, options.out / "questions.jsonl")))
    files += [options.code] if options.code else []
    traces = ",".join(files)
    for way in options.ways.split(","):
        name = way.replace("_", "-").replace(":", "")
        pruned, healed = options.out / f"{name}-pruned", options.out / f"{name}-healed"
        prune(way, options, pruned, traces)
        found = prunescope.heal(
            str(pruned), teacher=options.model, out=str(healed), traces=traces, samples=options.samples,
            new_tokens=options.new_tokens, held_out=min(options.held_out, options.samples // 4), steps=options.steps,
            batch_size=options.batch_size, on_policy=options.on_policy, compile=options.compile, device=options.device, overwrite=True,
        )  # fmt: skip
        kl = found.summary["kl"]
        print(
            f"{way}: held-out KL {kl['before']:.4f} -> {kl['written']:.4f}, {found.record['tokens']:,} tokens in {found.record['seconds']:.0f} s"
        )
        models = [options.model, str(pruned), str(healed)]
        prunescope.evaluate(
            models, tasks=options.tasks, limit=options.limit, data=options.data, out=str(options.out / f"{name}-scores"),
            allow_code_execution="humaneval" in options.tasks, device=options.device, overwrite=True,
        )  # fmt: skip
    folders = [str(path) for path in sorted(options.out.iterdir()) if path.is_dir()]
    prunescope.report(folders, out=str(options.out / "report.html"), overwrite=True)
    print(f"written: {options.out / 'report.html'}")


if __name__ == "__main__":
    main()
