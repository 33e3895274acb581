"""Recipes: one YAML file for each figure or table of the paper, run with our commands and shown on one page.

A recipe names its ``model`` and its ``steps``, each a command with options. ``$model`` stands for the model, ``@name`` for the folder of
an earlier step. Equal steps of different recipes are run once: a step's folder bears a hash of its options and of the steps it stands
on, and a folder that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from prunescope import commands
from prunescope.errors import UserError, first_line
from prunescope.files import replacing
from prunescope.progress import console
from prunescope.runs import folder as results

__all__ = ["Recipe", "read_recipe", "run_recipe", "write_page"]

_COMMANDS = {name: getattr(commands, name) for name in ("drop", "sparsify", "layerwise", "generate", "mcq", "sweep")}
_SHOWN_TEXTS = 3
NOT_AT_HAND = "not at hand"


@dataclass(frozen=True)
class Published:
    """What the paper prints: its models, its tasks, and those values that are at hand, in percent, each with where it was read.

    A value is ``{model, point, task, value, source}``; what is not listed is shown as not at hand. None is ever filled in by us.
    """

    models: list[str] = field(default_factory=list)
    tasks: str = ""
    note: str = ""
    values: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """A recipe file; ``show`` names figures as ``step/figure``, ``combine`` overlays generate runs, ``texts`` puts their texts side by side.

    ``tasks`` stands where a step says ``$tasks``. ``scores`` names a sweep whose scores are shown beside those that ``paper`` prints.
    """

    figure: str
    title: str
    model: str
    steps: dict[str, dict[str, Any]]
    show: list[str]
    note: str = ""
    combine: dict[str, list[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    tasks: str = "quick"
    scores: str = ""
    paper: Published | None = None


def read_recipe(path: str | os.PathLike[str], model: str | None = None, tasks: str | None = None) -> Recipe:
    """Read a recipe; ``model`` and ``tasks`` replace its own. Raises UserError if it is not one."""
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
        recipe = Recipe(**content)
        if recipe.paper is not None:
            paper = Published(**content["paper"])
            if any(not {"model", "point", "task", "value", "source"} <= set(value) for value in paper.values):
                raise TypeError("a value of the paper needs model, point, task, value and source")
            recipe = replace(recipe, paper=paper)
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no recipe: {first_line(error)}") from error
    for name, step in recipe.steps.items():
        if step.get("command") not in _COMMANDS:
            raise UserError(f"{path}: step {name} has no command among {', '.join(_COMMANDS)}")
    known = {*recipe.steps, *recipe.combine}
    for used in [
        *(shown.split("/")[0] for shown in recipe.show),
        *recipe.texts,
        *filter(None, [recipe.scores]),
        *(n for v in recipe.combine.values() for n in v),
    ]:
        if used not in known:
            raise UserError(f"{path} shows {used!r}, which is none of its steps")
    return replace(recipe, model=model or recipe.model, tasks=tasks or recipe.tasks)


def run_recipe(recipe: Recipe, root: Path) -> dict[str, Path]:
    """Run what is not there yet; returns the folder of every step and overlay, under ``root``."""
    folders: dict[str, Path] = {}
    for name, step in recipe.steps.items():
        options: dict[str, Any] = {key: _resolved(value, recipe, folders, name) for key, value in step.items()}
        command = options.pop("command")
        label = json.dumps([command, {k: _by_name(v, root) for k, v in options.items()}], sort_keys=True)
        folder = root / "runs" / f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        if not folder.is_dir():
            console.print(f"{recipe.figure}: {name}", markup=False)
            _COMMANDS[command](**options, out=str(folder), overwrite=True)
        folders[name] = folder
    for name, parts in recipe.combine.items():
        from prunescope.report.figures.generation import draw_targets

        runs = [results.open_run(folders[part]) for part in parts]
        folders[name] = root / "runs" / f"{recipe.figure.lower().replace('. ', '')}-{name}"
        (folders[name] / "figures").mkdir(parents=True, exist_ok=True)
        draw_targets([(run.table(), run.info) for run in runs], folders[name] / "figures")
    return folders


def _resolved(value: Any, recipe: Recipe, folders: Mapping[str, Path], step: str) -> Any:
    if value == "$model":
        return recipe.model
    if value == "$tasks":
        return recipe.tasks
    if isinstance(value, str) and value.startswith("@"):
        if value[1:] not in folders:
            raise UserError(f"{recipe.figure}: step {step} stands on {value[1:]!r}, which is no step before it")
        return str(folders[value[1:]])
    return value


def _by_name(value: Any, root: Path) -> Any:
    """A folder of ours by its name, so that the hash does not depend on where the page is made."""
    return Path(value).name if isinstance(value, str) and value.startswith(str(root)) else value


def write_page(done: Sequence[tuple[Recipe, Mapping[str, Path]]], root: Path) -> Path:
    """One page, ``root/index.html``, with the figures of all recipes, copied beside it. Text of models is escaped."""
    from jinja2 import Environment

    (root / "figures").mkdir(parents=True, exist_ok=True)
    sections = []
    for recipe, folders in done:
        images = []
        for shown in recipe.show:
            step, _, name = shown.partition("/")
            source = folders[step] / "figures" / f"{name}.svg"
            if not source.is_file():
                raise UserError(f"{recipe.figure} shows {shown}, but {source} is not there; the run has no such figure")
            copy = f"{folders[step].name}-{name}.svg"
            shutil.copyfile(source, root / "figures" / copy)
            images.append({"file": f"figures/{copy}", "name": name.replace("_", " ")})
        config = [f"{name}: {step}" for name, step in recipe.steps.items()]
        sections.append(
            {"recipe": recipe, "images": images, "texts": _texts(recipe, folders), "steps": config}
            | {"scores": _scores(recipe, folders)}
        )
    template = (files("prunescope.report.page") / "recipes.html.jinja").read_text("utf-8")
    page = Environment(autoescape=True).from_string(template).render(sections=sections)
    path = root / "index.html"
    with replacing(path) as beside:
        beside.write_text(page, "utf-8")
    return path


def _texts(recipe: Recipe, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The longest dense texts with what every target wrote after the same prompt."""
    if not recipe.texts:
        return []
    runs = {name: results.open_run(folders[name]).samples() for name in recipe.texts}
    first = runs[recipe.texts[0]]
    order = sorted(range(len(first)), key=lambda i: -len(first[i]["dense_tokens"]))[:_SHOWN_TEXTS]
    return [
        {
            "prompt": first[i]["text"],
            "rows": [("dense", first[i]["dense"]), *((name, samples[i]["target"]) for name, samples in runs.items())],
        }
        for i in sorted(order)
    ]


def _scores(recipe: Recipe, folders: Mapping[str, Path]) -> list[dict[str, str]]:
    """Scores of a sweep in percent, a row a point and task, beside what the paper prints for each of its models; then what only it has."""
    if not recipe.scores:
        return []
    paper = recipe.paper or Published()
    printed = {(v["point"], v["task"], v["model"]): v for v in paper.values}
    rows = []
    for row in results.open_run(folders[recipe.scores]).table().to_pylist():
        ours = f"{100 * row['score']:.1f}"
        if row["ci_low"] is not None:
            ours += f" ({100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f})"
        theirs = [printed.pop((row["point"], row["task"], model), None) for model in paper.models]
        rows.append({"point": row["point"], "task": row["task"], "ours": ours, "paper": _printed(paper.models, theirs)})
    for (point, task, model), value in printed.items():
        rows.append({"point": point, "task": task, "ours": "not run", "paper": _printed([model], [value])})
    return rows


def _printed(models: Sequence[str], values: Sequence[Mapping[str, Any] | None]) -> str:
    known = [f"{m}: {v['value']} ({v['source']})" for m, v in zip(models, values, strict=True) if v is not None]
    return "; ".join(known) or NOT_AT_HAND
