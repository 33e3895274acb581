"""One self-contained page from run folders: `prunescope report`. Imports neither torch nor transformers.

The page holds its script, its style, the plotting library and the packed numbers of `payload`; a content security policy lets only these two
scripts run and nothing be fetched. Text of models reaches it in two ways: through jinja2 with autoescape, or as JSON that the script sets as
text content.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from prunescope.errors import UserError, first_line
from prunescope.files import replacing
from prunescope.report.page.compared import (
    VIEWS,
    Checkpoint,
    aliases_of,
    checkpoint_of,
    mixed,
    names_of,
    targets_of,
    title_of,
    view_of,
)
from prunescope.report.page.divergence import divergence_section
from prunescope.report.page.healing import healings
from prunescope.report.page.scores import generation_section, scores_section
from prunescope.report.page.sweep import sweep_section
from prunescope.report.page.tables import TABLES, table_section
from prunescope.report.page.verdict import Verdict
from prunescope.report.terminal.recovery import HEADINGS, RULE
from prunescope.runs import folder as results

__all__ = ["Checkpoint", "expand", "open_folder", "write_report"]

_HERE = files("prunescope.report.page")
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError)


def expand(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folders, with a folder of the demo replaced by the runs and checkpoints in it."""
    found: list[Path] = []
    for folder in map(Path, folders):
        inside = [folder]
        if (folder / "demo.json").is_file():
            inside = sorted(folder.iterdir())
        found += [p for p in inside if p == folder or any((p / n).is_file() for n in ("run.json", "prunescope.json"))]
    unique = list(dict.fromkeys(found))
    if not unique:
        raise UserError(
            "report needs at least one run folder; give the --out folder of layerwise, generate, mcq, divergence, retrieve, evaluate, sweep, speed, advise, drop, sparsify or heal"
        )
    return unique


def open_folder(folder: Path) -> results.Run | Checkpoint:
    """A run or a checkpoint. Raises UserError if it is neither, damaged or of a newer schema."""
    path = folder / "prunescope.json"
    if (folder / "run.json").exists() or not path.is_file():
        run = results.open_run(folder)
        if run.command not in (*VIEWS, "divergence", "sweep", "evaluate", *TABLES):
            raise UserError(
                f"{folder}: the page has no view of {run.command} runs yet; look at run.json and figures/ in it"
            )
        return run
    try:
        record = json.loads(path.read_text("utf-8"))
        number, command = record["schema_version"], record.get("command")
        newer = number > results.SCHEMA_VERSION
    except (OSError, *_DAMAGED) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); make the checkpoint again"
        ) from error
    if newer:
        raise UserError(
            f"{folder} has schema version {number}, newer than this prunescope knows ({results.SCHEMA_VERSION}); upgrade prunescope"
        )
    if command not in ("drop", "sparsify", "heal"):
        raise UserError(
            f"{folder} is no checkpoint of drop, sparsify or heal ({command!r}); report does not know what to show of it"
        )
    return Checkpoint(folder, record)


def write_report(opened: Sequence[results.Run | Checkpoint], out: Path) -> Path:
    """Write the page to ``out``, beside it first.

    Raises:
        UserError: a run whose files do not fit together, or ``out`` cannot be written.
    """
    page = render(opened)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as beside:
            beside.write_bytes(page)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
    return out


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, which names its template in ``sections/`` too, its word in the navigation, and whether a page has it."""

    name: str
    title: str
    of: Callable[[Mapping[str, Any]], Any]


def _has(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda page: page[key]


def _has_runs(command: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda page: command in page["commands"]


SECTIONS = (
    Section("verdict", "Verdict", lambda page: True),
    Section("layers", "Layers", _has_runs("layerwise")),
    Section("decoding", "Decoding", _has_runs("generate")),
    Section("options", "Options", _has_runs("mcq")),
    Section("targets", "Targets", _has("targets")),
    Section("divergence", "Divergence", _has("divergences")),
    Section("scores", "Scores", _has("scores")),
    Section("sweeps", "Sweeps", _has("sweeps")),
    Section("healing", "Healing", _has("healings")),
    Section("checkpoints", "Checkpoints", _has("checkpoints")),
    Section("notes", "Notes", lambda page: True),
)
# In this order, one script; each file may use what stands before it.
_SCRIPTS = ("core", "worst", "layers", "decoding", "options", "targets", "sweeps", "links", "start")


def render(opened: Sequence[results.Run | Checkpoint]) -> bytes:
    """The page. Raises UserError for a run whose files do not fit together."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    page = _content(opened)
    data = {key: page[key] for key in ("checkpoints", "targets", "columns")}
    data["runs"] = [
        {k: v for k, v in run.items() if k != "passages"} for run in page["runs"]
    ]  # the templates have these
    data["sweeps"] = [{"series": sweep["series"]} for sweep in page["sweeps"]]
    data["read"] = [read["worst"] for read in page["divergences"]]
    # < never stands in the JSON, so no text in it can end the script element that holds it
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = {"plotly": _asset("vendor/plotly-cartesian.min.js"), "script": _script()}
    environment = Environment(
        loader=FunctionLoader(lambda name: (_HERE / name).read_text("utf-8")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made = environment.get_template("report.html.jinja").render(
        **page,
        sections=[section for section in SECTIONS if section.of(page)],
        folders=len(opened),
        data=Markup(text),
        css=Markup(_asset("report.css")),
        **{name: Markup(content) for name, content in scripts.items()},
        hashes=" ".join(f"'sha256-{_digest(content)}'" for content in scripts.values()),
        version=version("prunescope"),
    )
    return made.encode("utf-8", "replace")  # half a surrogate pair has no UTF-8


def _content(opened: Sequence[results.Run | Checkpoint]) -> dict[str, Any]:
    """What the templates and the script are given."""

    def of(*commands: str) -> list[results.Run]:
        return [one for one in opened if isinstance(one, results.Run) and one.command in commands]

    runs, checkpoints = of(*VIEWS), [one for one in opened if isinstance(one, Checkpoint)]
    aliases = aliases_of(runs, checkpoints)
    names = names_of(runs, aliases)
    views = [_guarded(run.folder, view_of, run, name, runs, aliases) for run, name in zip(runs, names, strict=True)]
    sweeps = [_guarded(run.folder, sweep_section, run, of("retrieve")) for run in of("sweep")]
    scores = [_guarded(run.folder, scores_section, run) for run in of("evaluate")]
    scores += [_guarded(run.folder, table_section, run) for run in of(*TABLES)]
    if len(runs) > 1 and (steps := _guarded(runs[0].folder, generation_section, runs, names)) is not None:
        scores.append(steps)
    targets = targets_of(runs, views, of("retrieve"))
    compared = [*runs, *of("divergence")]
    return {
        "title": title_of(compared, checkpoints)
        or ", ".join(dict.fromkeys([sweep["model"] for sweep in sweeps] + [one["models"][0] for one in scores])),
        "runs": views,
        "sweeps": sweeps,
        "scores": scores,
        "divergences": [_guarded(run.folder, divergence_section, run) for run in of("divergence")],
        "checkpoints": [_guarded(one.folder, checkpoint_of, one) for one in checkpoints],
        "targets": targets,
        "verdicts": [(target["name"], [Verdict(**v) for v in target["verdicts"]]) for target in targets],
        "warnings": list(dict.fromkeys(w for view in views for w in view["warnings"]))
        + mixed([*of("sweep"), *compared]),
        "columns": columns(),
        "healings": healings(checkpoints, targets, of("evaluate")),
        "recovery": {"headings": HEADINGS, "rule": RULE},
        "commands": {view["command"] for view in views},
    }


def _guarded(folder: Path, make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except _DAMAGED as error:
        raise UserError(
            f"{folder}: its files do not fit together ({type(error).__name__}: {first_line(error)}); "
            "the folder is damaged or of an older version, make it again"
        ) from error


@cache
def _script() -> str:
    parts = [_asset(f"script/{name}.js") for name in _SCRIPTS]
    return "\n".join(['"use strict";', "(() => {", *parts, "})();"])


@cache
def _asset(name: str) -> str:
    content = (_HERE / name).read_text("utf-8").strip()
    if "</script" in content.lower() or "</style" in content.lower():
        raise AssertionError(f"{name} would end its own element")
    return content


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


@cache
def columns() -> list[dict[str, str]]:
    """Name, space, formula and reading of every metric column; docs/metrics.md has the same."""
    found: list[dict[str, str]] = json.loads((_HERE / "columns.json").read_text("utf-8"))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if abs(float(value)) < float("inf") else None
    if isinstance(value, np.integer):
        return int(value)
    return value
