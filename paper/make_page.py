"""Run every recipe of paper/recipes and show all figures on one page. See docs/paper.md."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from prunescope.errors import UserError
from prunescope.paper.recipes import read_recipe, run_recipe, write_page

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, help="recipe files; left out, all of paper/recipes")
    parser.add_argument("--out", type=Path, default=Path("paper-figures"), help="folder of runs and page")
    parser.add_argument("--model", help="instead of the model that the recipes name")
    parser.add_argument(
        "--tasks", help="instead of the tasks that the recipes of tables name, such as gsm8k,humaneval,mmlu"
    )
    args = parser.parse_args()
    paths = args.recipes or sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
    try:
        recipes = [read_recipe(path, args.model, args.tasks) for path in paths]
        print(write_page([(recipe, run_recipe(recipe, args.out)) for recipe in recipes], args.out))
    except UserError as error:
        print(f"prunescope: {error}", file=sys.stderr)
        sys.exit(2)
