"""The Pareto picture of docs/sweep.md: writing, choosing and retrieving against the bytes of the weights, all kinds of points of one sweep.

    python benchmarks/sweep_bytes.py --out runs/bytes                                     # the sweep, then retrieval at each of its points, then both of:
    python benchmarks/sweep_bytes.py --out runs/bytes --only draw --draw docs/sweep-pareto.png   # draw from the tables, and print them; needs no model

The sweep is `prunescope sweep` with the points of `POINTS`, which can be interrupted and goes on where it was. Retrieval searches the shipped corpus
(156 passages, 108 queries, weighted-mean pooling) with the model at each point; nDCG@10 a query is kept in OUT-retrieval.json. Wants prunescope
installed, and ggml's quantisers: pip install libggml-python.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import prunescope
from prunescope.files import replacing
from prunescope.report.figures.pareto import Panel, draw_pareto
from prunescope.report.figures.style import style
from prunescope.report.sweep_means import mean_over_tasks, of_kind

TASKS = ",".join(f"{pair}-{way}" for pair in ("arithmetic", "reversal", "substitution") for way in ("gen", "mc"))
POINTS: tuple[dict[str, str], ...] = (  # in this order, so that an interrupted run has some of every kind
    {"target": "attn", "n": "4,8", "quant": "int4-g128,q8_0,int3-g64,q4_0,int8,q3_k", "join": "int4-g128"},
    {"method": "sparsegpt,wanda", "sparsity": "0.5"},
    {"target": "mlp", "n": "2,4"},
    {"method": "sparsegpt,wanda", "pattern": "2:4"},
    {"target": "attn", "n": "12", "quant": "q4_k"},
)
SAMPLES = 16
DRAWS = 2000


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", default="runs/bytes")
    parser.add_argument("--limit", type=int, default=30, help="items of each task")
    parser.add_argument("--parts", default="0,1,2,3,4", help="which of the lists of points to sweep")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--only", choices=("sweep", "retrieve", "draw"), help="one step; draw takes what --out holds, finished or not"
    )
    parser.add_argument("--draw", help="file to draw into; left out, OUT-pareto.png")
    args = parser.parse_args()
    out = Path(args.out)
    if args.only in (None, "sweep"):
        for points in (POINTS[int(part)] for part in args.parts.split(",")):
            prunescope.sweep(
                args.model, tasks=TASKS, limit=args.limit, samples=SAMPLES, sparse_bytes=True, batch_size=10,
                out=args.out, resume=True, device=args.device, **points,  # type: ignore[arg-type]
            )  # fmt: skip
    if args.only in (None, "retrieve"):
        retrieve(args.model, args.device, out)
    if args.only in (None, "draw"):
        draw(out, Path(args.draw) if args.draw else out.with_name(f"{out.name}-pareto.png"))


# --- retrieving --------------------------------------------------------------------------------------------------------


def opened(out: Path) -> Any:
    """The sweep, or what an interrupted one has."""
    return prunescope.open(out if out.exists() else out.with_name(f"{out.name}.partial"))


def kept_in(out: Path) -> Path:
    return out.with_name(f"{out.name}-retrieval.json")


def retrieve(model: str, device: str, out: Path) -> None:
    """nDCG@10 of every query at every point that the sweep has and the file has not."""
    from prunescope.compare.embedding import Reading, embed, tokens_of
    from prunescope.compare.retrieval import measure
    from prunescope.data.beir import read_collection
    from prunescope.models.loading import load_model

    file = kept_in(out)
    found: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    points = {row["point"]: row for row in opened(out).table().to_pylist()}
    loaded = load_model(model, device=device)
    collection, reading = read_collection(), Reading("weighted-mean")
    queries, _ = tokens_of(loaded, collection.queries, reading, "query")
    passages, _ = tokens_of(loaded, collection.passages, reading, "passage")
    ids = list(collection.passages)
    for name, row in points.items():
        if name in found:
            continue
        with at(loaded, row):
            asked, there = (embed(loaded, texts, reading.pooling, 8).double() for texts in (queries, passages))
        score = (asked / asked.norm(dim=-1, keepdim=True)) @ (there / there.norm(dim=-1, keepdim=True)).T
        ranking = {}
        for query, cosines in zip(collection.queries, score.tolist(), strict=True):
            own = [(p, c) for p, c in zip(ids, cosines, strict=True) if p != query]
            ranking[query] = sorted(own, key=lambda pair: -pair[1])
        measured = measure(collection.qrels, ranking)
        found[name] = [measured[query]["ndcg_10"] for query in collection.queries]
        with replacing(file) as beside:
            beside.write_text(json.dumps(found))
        print(f"{name}: nDCG@10 {np.mean(found[name]):.3f}", flush=True)


def at(loaded: Any, row: dict[str, Any]) -> ExitStack:
    """The model at a point of the sweep for the length of a ``with`` block: dropped or pruned first, then rounded, as in the sweep."""
    from prunescope.cache import cache_folder
    from prunescope.data.calibration import calibration_tokens
    from prunescope.models.dropping import DropSpec
    from prunescope.models.quantised import Quantised, QuantSpec
    from prunescope.prune.inplace import DenseWeights, pruned_in_place
    from prunescope.prune.masks import Goal

    stack = ExitStack()
    quant = None if row["quant"] is None else QuantSpec.parse(row["quant"])
    rounded = None if quant is None or row["method"] else Quantised(loaded, quant)  # of the dense weights
    if row["method"]:
        tokens = calibration_tokens(loaded, "self", samples=SAMPLES, seq_len=None, seed=0, cache=cache_folder()).tokens
        goal = Goal.parse(row["pattern"]) if row["pattern"] else Goal(row["sparsity"])
        stack.enter_context(pruned_in_place(loaded, DenseWeights(loaded), row["method"], goal, tokens))
    elif row["dropped"]:
        stack.enter_context(loaded.dropping(DropSpec.parse(row["dropped"])))
    if quant is not None:
        stack.enter_context((rounded or Quantised(loaded, quant)).applied())
    return stack


# --- drawing -----------------------------------------------------------------------------------------------------------


def kept_of(found: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Share of the dense model's mean nDCG@10 at every point, with a 95 % interval bootstrapped over queries, the same draws for both."""
    dense = np.array(found["dense"])
    drawn = np.random.default_rng(0).integers(0, len(dense), (DRAWS, len(dense)))
    shares = {}
    for name, values in found.items():
        each = np.array(values)[drawn].mean(1) / dense[drawn].mean(1)
        shares[name] = (np.mean(values) / dense.mean(), *np.quantile(each, [0.025, 0.975]))
    return shares


def draw(out: Path, file: Path) -> None:
    run = opened(out)
    rows, metrics = run.table().to_pylist(), run.table("metrics").to_pylist()
    searched = kept_of(json.loads(kept_in(out).read_text())) if kept_in(out).exists() else {}
    more = [Panel("what is retrieved", "share kept of nDCG@10", searched)] if searched else []
    with style():
        figure = draw_pareto(rows, metrics, run.info["config"]["model"], more)
        assert figure is not None, "fewer than three points have been measured"
        figure.savefig(file, dpi=110)
    print(f"written: {file}")
    print(f"{'point':24} {'MB':>6}  {'written':22} {'chosen':22} {'retrieved':22} KL")
    says = [row for row in rows if row["informative"]]
    for point in dict.fromkeys(row["point"] for row in says):
        mine = [row for row in says if row["point"] == point]
        shares = [mean_over_tasks(of_kind(mine, kind, True), "kept") for kind in ("generative", "choice")]
        kl = next((r for r in metrics if r["point"] == point and r["column"] == "kl_dense_target"), None)
        cells = [f"{s[0]:.2f} ({s[1]:.2f} to {s[2]:.2f})" if s else "-" for s in [*shares, searched.get(point)]]
        told = "" if kl is None else f"{kl['mean']:.3f} ({kl['ci_low']:.3f} to {kl['ci_high']:.3f})"
        print(f"{point:24} {mine[0]['bytes'] / 1e6:6.1f}  " + " ".join(f"{cell:22}" for cell in cells) + f" {told}")


if __name__ == "__main__":
    main()
