"""What choosing and healing buy: held-out KL of cosine and greedy choice at equal n, healed and not, and of sparse models healed with their zeros kept.

    python benchmarks/heal_choice.py --out heal-choice [--model smollm2-135m] [--ways attn_4,attn_8,mlp_4,sparsegpt_2:4,sparsegpt_0.5]

KL(dense || pruned) is in nats a token, on texts of the dense model that neither chose, healed nor stopped anything; its differences have 95 % intervals,
paired over those texts. Every finished way is added to OUT/choice.json, and OUT/heal-choice.png (docs/heal.md) is drawn from it; a way that is there
already is not measured again. Where both ways choose the same set, it is healed once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from safetensors import safe_open

import prunescope
from prunescope.cache import cache_folder
from prunescope.data.traces import write_traces
from prunescope.models.loading import load_model
from prunescope.prune.heal import HealPlan, held_out_kl
from prunescope.report.figures.style import ESTIMATE, TRUTH, style
from prunescope.stats import paired

NAMES = {"attn": "attention sublayers", "mlp": "MLP sublayers", "block": "blocks", "sparsegpt": "SparseGPT"}


def models(way: str, options: argparse.Namespace) -> dict[str, Path]:
    """The pruned folders to compare: by each way to choose, or the sparse one."""
    what, _, how = way.partition("_")
    name = way.replace(":", "").replace(".", "")
    common: dict[str, Any] = {"device": options.device, "overwrite": True}
    if what not in ("attn", "mlp", "block"):
        goal: dict[str, Any] = {"pattern": how} if ":" in how else {"sparsity": float(how)}
        out = options.out / f"{name}-pruned"
        prunescope.sparsify(
            options.model, method=what, refine=options.refine or None, out=str(out), calibration="traces",
            samples=options.sparse_samples, seq_len=options.sparse_tokens, **goal, **common,
        )  # type: ignore[arg-type]  # fmt: skip
        return {options.refine or "plain": out}
    found = {}
    for select in ("cosine", "kl"):
        found[select] = options.out / f"{name}-{select}"
        prunescope.drop(
            options.model, target=what, n=int(how), select=select, out=str(found[select]), calibration="traces",
            samples=options.choose_samples, seq_len=options.choose_tokens, seed=1, **common,
        )  # type: ignore[arg-type]  # fmt: skip
    return found


def zeros(folder: Path, names: list[str]) -> dict[str, Any]:
    """Where the matrices of a folder are zero."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) == 0 for name in names if name in set(opened.keys())}
    return found


def judged(options: argparse.Namespace, *folders: Path) -> list[list[float]]:
    """For each folder a number a text, whose mean is KL(dense || pruned) over all tokens of the texts."""
    dense = load_model(options.model, dtype="float32", device=options.device)
    written = write_traces(
        dense, [], samples=options.judged, new_tokens=options.new_tokens, seed=2, batch_size=32, cache=cache_folder()
    )
    texts = [(row.prompt, row.continuation) for row in written.rows if row.continuation]
    counts = [len(own) - (not prompt) for prompt, own in texts]
    mean = sum(counts) / len(counts)
    plan = HealPlan(steps=1, chunk=max(16, 2**24 // dense.anatomy.vocab_size))
    found = []
    for folder in folders:
        model = load_model(folder, dtype="float32", device=options.device)
        each = (held_out_kl(model, dense, [text], plan) for text in texts)
        found.append([value * count / mean for value, count in zip(each, counts, strict=True)])
    return found


def measure(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for chosen, pruned in models(way, options).items():
        before = json.loads((pruned / "prunescope.json").read_text("utf-8"))
        dropped = before.get("drop_attn_list") or before.get("drop_mlp_list")
        same = next((row for row in rows if dropped and row["dropped"] == dropped), None)
        if same is not None:
            rows.append(same | {"chosen": chosen, "same_as": same["chosen"]})
            continue
        out, started = Path(f"{pruned}-healed"), time.process_time()
        record = prunescope.heal(
            str(pruned), teacher=options.model, out=str(out), samples=options.samples, new_tokens=options.new_tokens,
            held_out=options.held_out, steps=options.steps, batch_size=options.batch_size, check_every=options.steps,
            learning_rate=options.learning_rate, device=options.device, overwrite=True,
        ).record  # fmt: skip
        row: dict[str, Any] = {"way": way, "chosen": chosen, "dropped": dropped, "tokens": record["tokens"]}
        row |= {"seconds_cpu": round(time.process_time() - started), "best_step": record["best_step"]}
        row |= dict(zip(("texts_pruned", "texts_healed"), judged(options, pruned, out), strict=True))
        row |= {state: sum(row[f"texts_{state}"]) / len(row[f"texts_{state}"]) for state in ("pruned", "healed")}
        names = [module["name"] for module in before.get("modules", [])]
        if names:
            there, after = zeros(pruned, names), zeros(out, names)
            row["zeros"] = sum(int(mask.sum()) for mask in there.values())
            row["zeros_kept"] = sum(int((mask & after[name]).sum()) for name, mask in there.items())
            if row["zeros"] != row["zeros_kept"]:
                raise SystemExit(f"{out}: {row['zeros'] - row['zeros_kept']} zeros were lost")
        rows.append(row)
    for row in rows:
        row["bought"] = paired(row["texts_pruned"], row["texts_healed"])
        if row["chosen"] == "kl":
            for state in ("pruned", "healed"):
                row[f"{state}_less_cosine"] = paired(rows[0][f"texts_{state}"], row[f"texts_{state}"])
        print(
            f"RESULT {json.dumps({name: value for name, value in row.items() if not name.startswith('texts_')})}",
            flush=True,
        )
    return rows


def draw(rows: list[dict[str, Any]], model: str, file: Path) -> None:
    """A line a model: from what it was, pruned, to what it is, healed."""
    with style():
        figure = Figure(figsize=(6.0, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        labels = []
        for place, row in enumerate(rows):
            axes.plot([row["healed"], row["pruned"]], [place, place], "-", color="0.75", linewidth=2, zorder=1)
            for value, colour, label in (("pruned", TRUTH, "pruned"), ("healed", ESTIMATE, "healed")):
                axes.plot(row[value], place, "o", color=colour, markersize=6, label=None if place else label)
                side = "left" if value == "pruned" else "right"
                axes.annotate(
                    f"{row[value]:.3g}", (row[value], place), xytext=(7 if side == "left" else -7, 0), ha=side,
                    va="center", textcoords="offset points", fontsize="small",
                )  # fmt: skip
            what, _, how = row["way"].partition("_")
            if what == "sparsegpt":
                goal = how if ":" in how else f"{100 * float(how):g} %"
                labels.append(f"SparseGPT {goal}" + ("" if row["chosen"] == "plain" else f", {row['chosen']}"))
            else:
                labels.append(f"{how} {NAMES.get(what, what)}, {row['chosen']}")
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
        axes.margins(x=0.15)
        axes.set(xscale="log", xlabel="KL(dense || pruned) on held-out texts, nats a token", title=model)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside upper right", ncols=2)
        figure.savefig(file, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--title", default="SmolLM2-135M")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", default="attn_4,attn_8,mlp_4,sparsegpt_2:4,sparsegpt_0.5")
    parser.add_argument("--refine", default="admm", help="of sparsify; empty for none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of heal; its own default is for more steps")
    whole = {"samples": 64, "new_tokens": 48, "held_out": 16, "steps": 12, "batch_size": 6}
    whole |= {"judged": 24, "choose_samples": 6, "choose_tokens": 40, "sparse_samples": 48, "sparse_tokens": 128}
    for name, default in whole.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "choice.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text("utf-8")) if kept.is_file() else []
    ways = options.ways.split(",")
    for way in ways:
        if not any(row["way"] == way for row in rows):
            rows += measure(way, options)
            kept.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    order = {way: place for place, way in enumerate(ways)}
    drawn = sorted((row for row in rows if row["way"] in order), key=lambda row: order[row["way"]])
    draw(drawn, options.title, options.out / "heal-choice.png")
    print(f"written: {options.out / 'heal-choice.png'}")


if __name__ == "__main__":
    main()
