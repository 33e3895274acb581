"""The picture of the paper's Fig. 1 with the built-in pairs: attention sublayers, MLP sublayers and blocks, 0 to 12 dropped.

    python benchmarks/sweep_figure1.py --out runs/figure1 --limit 100
    python benchmarks/sweep_figure1.py --out runs/figure1 --draw      # draw again, from the tables

Needs no data, no network and no lm-evaluation-harness; prunescope must be installed, if only by `pip install --no-deps --no-build-isolation -e .`. Where matplotlib is missing the tables are written without figures; draw them elsewhere.
`--resume` goes on after an interruption. What a run of it showed is in docs/sweep.md.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from argparse import ArgumentParser
from pathlib import Path

import prunescope


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", default="runs/figure1")
    parser.add_argument("--n", default="0..12")
    parser.add_argument("--target", default="attn,mlp,block")
    parser.add_argument("--limit", type=int, help="items of each task; left out, all 100")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--draw", action="store_true", help="only draw what --out holds, finished or not")
    args = parser.parse_args()
    if args.draw:
        from prunescope.report.figures.sweep import draw_sweep

        run = prunescope.open(args.out)
        folder = Path(args.out) / "figures"
        folder.mkdir(exist_ok=True)
        tables = (run.table(name) for name in ("sweep", "metrics", "correlations"))
        print(*draw_sweep(*tables, run.info, folder), sep="\n")
        return
    if importlib.util.find_spec("matplotlib") is None:
        nothing = types.ModuleType("prunescope.report.figures.sweep")
        nothing.draw_sweep = lambda *_: []  # type: ignore[attr-defined]
        sys.modules[nothing.__name__] = nothing
    options = {key: value for key, value in vars(args).items() if key != "draw"}
    prunescope.sweep(options.pop("model"), tasks="quick", **options)


if __name__ == "__main__":
    try:
        main()
    except prunescope.UserError as error:
        print(f"sweep_figure1: {error}", file=sys.stderr)
        sys.exit(2)
