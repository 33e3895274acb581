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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prunescope.errors import UserError, first_line
from prunescope.files import replacing
from prunescope.report.page import payload
from prunescope.report.page.divergence import divergence_section
from prunescope.report.page.scores import generation_section, scores_section
from prunescope.report.page.sweep import sweep_section
from prunescope.report.page.tables import TABLES, table_section
from prunescope.report.page.verdict import Verdict, judge, warnings_of
from prunescope.runs import folder as results

__all__ = ["Checkpoint", "expand", "open_folder", "write_report"]

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_VIEWS = {"layerwise": payload.layerwise_view, "generate": payload.generation_view, "mcq": payload.mcq_view}
_PER_STEP = ("h_cos", "z_cos", "p_cos", "kl_dense_target", "js", "top1_agree")
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `drop`, `sparsify` or `heal` wrote; ``record`` is its prunescope.json."""

    folder: Path
    record: dict[str, Any]


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
        if run.command not in (*_VIEWS, "divergence", "sweep", "evaluate", *TABLES):
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


def render(opened: Sequence[results.Run | Checkpoint]) -> bytes:
    """The page. Raises UserError for a run whose files do not fit together."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    all_runs = [one for one in opened if isinstance(one, results.Run)]
    swept = [run for run in all_runs if run.command == "sweep"]
    scored = [run for run in all_runs if run.command == "evaluate"]
    read = [run for run in all_runs if run.command == "divergence"]
    runs = [run for run in all_runs if run.command in _VIEWS]
    checkpoints = [one for one in opened if isinstance(one, Checkpoint)]
    aliases = _aliases(runs, checkpoints)
    names = _names(runs, aliases)
    views = [_guarded(run.folder, _view, run, name, runs, aliases) for run, name in zip(runs, names, strict=True)]
    made = [_guarded(one.folder, _checkpoint, one) for one in checkpoints]
    sweeps = [_guarded(run.folder, sweep_section, run) for run in swept]
    scores = [_guarded(run.folder, scores_section, run) for run in scored]
    scores += [_guarded(run.folder, table_section, run) for run in all_runs if run.command in TABLES]
    divergences = [_guarded(run.folder, divergence_section, run) for run in read]
    if len(runs) > 1 and (steps := _guarded(runs[0].folder, generation_section, runs, names)) is not None:
        scores.append(steps)
    searched = [run for run in all_runs if run.command == "retrieve"]
    targets = list(_targets(runs, views, searched).values())
    data = {"runs": views, "checkpoints": made, "targets": targets, "columns": columns()}
    # < never stands in the JSON, so no text in it can end the script element that holds it
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files("prunescope.report.page")
    source = (template / "report.html.jinja").read_text("utf-8")
    scripts = {"plotly": _asset("vendor/plotly-cartesian.min.js"), "script": _asset("report.js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        title=_title([*runs, *read], checkpoints)
        or ", ".join(dict.fromkeys([sweep["model"] for sweep in sweeps] + [one["models"][0] for one in scores])),
        runs=views,
        sweeps=sweeps,
        scores=scores,
        divergences=divergences,
        checkpoints=made,
        targets=targets,
        verdicts=[(target["name"], [Verdict(**v) for v in target["verdicts"]]) for target in targets],
        warnings=list(dict.fromkeys(w for view in views for w in view["warnings"])) + _mixed([*swept, *runs, *read]),
        columns=columns(),
        commands={view["command"] for view in views},
        data=Markup(text),
        css=Markup(_asset("report.css")),
        plotly=Markup(scripts["plotly"]),
        script=Markup(scripts["script"]),
        hashes=" ".join(f"'sha256-{_digest(content)}'" for content in scripts.values()),
        version=version("prunescope"),
    )
    return page.encode("utf-8", "replace")  # half a surrogate pair has no UTF-8


def _guarded(folder: Path, make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except _DAMAGED as error:
        raise UserError(
            f"{folder}: its files do not fit together ({type(error).__name__}: {first_line(error)}); "
            "the folder is damaged or of an older version, make it again"
        ) from error


@cache
def _asset(name: str) -> str:
    content = (files("prunescope.report.page") / name).read_text("utf-8").strip()
    if "</script" in content.lower() or "</style" in content.lower():
        raise AssertionError(f"{name} would end its own element")
    return content


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


@cache
def columns() -> list[dict[str, str]]:
    """Name, space, formula and reading of every metric column; docs/metrics.md has the same."""
    found: list[dict[str, str]] = json.loads((files("prunescope.report.page") / "columns.json").read_text("utf-8"))
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


# --- what is compared --------------------------------------------------------------------------------------------------


def _short(name: str | None) -> str:
    if name is None:
        return "each sublayer in turn"
    path = name.rstrip("/")
    return payload.clipped(
        path.rpartition("/")[2] if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path, 60
    )


def _aliases(runs: Sequence[results.Run], checkpoints: Sequence[Checkpoint]) -> dict[Path, str]:
    """Run folder -> name of its target: the checkpoint on this page that drops the same of the same model, else what was asked for."""
    known = {}
    for one in checkpoints:
        base = one.record.get("base") or {}
        if one.record["command"] == "drop":
            lists = (one.record.get(f"drop_{kind}_list") for kind in ("attn", "mlp"))
            known[json.dumps([base.get("content_hash"), base.get("source"), *lists])] = one.folder.name
    found = {}
    for run in runs:
        target = (run.info.get("models") or {}).get("target") or {}
        lists = (target.get(f"drop_{kind}_list") for kind in ("attn", "mlp"))
        key = json.dumps([target.get("content_hash"), target.get("source"), *lists])
        found[run.folder] = known.get(key) or _short((run.info.get("config") or {}).get("target"))
    return found


def _names(runs: Sequence[results.Run], aliases: Mapping[Path, str]) -> list[str]:
    """What each run is called on the page: its target, with what tells it from others of the same command."""
    plain = [(run.command, aliases[run.folder]) for run in runs]
    found = []
    for run, (command, name) in zip(runs, plain, strict=True):
        config = run.info["config"]
        label = name
        others = [other for other, key in zip(runs, plain, strict=True) if key == (command, name) and other is not run]
        for option, word in (
            ("lens", "lens {}"),
            ("metric_temperature", "T = {:g}"),
            ("dense", "on {}"),
            ("template", "{}"),
        ):
            if others and any(other.info["config"].get(option) != config.get(option) for other in others):
                value = config.get(option)
                label += ", " + word.format(_short(value) if option == "dense" else value)
        found.append(label)
    repeated = {
        name
        for name in found
        if [(r.command, n) for r, n in zip(runs, found, strict=True)].count((runs[found.index(name)].command, name)) > 1
    }
    return [f"{name} ({run.folder.name})" if name in repeated else name for run, name in zip(runs, found, strict=True)]


def _view(run: results.Run, name: str, runs: Sequence[results.Run], aliases: Mapping[Path, str]) -> dict[str, Any]:
    info, samples = run.info, run.samples()
    table = run.columns() if run.command == "layerwise" else run.table()  # which may be larger than the memory
    if not len(table):
        raise ValueError("no rows")
    expected = info["questions"] if run.command == "mcq" else len(info["prompts"])
    if len(samples) != expected:
        raise ValueError(f"samples.jsonl has {len(samples)} of {expected} lines")
    share = sum(other.command == run.command for other in runs)
    floor = _under_floor(run.command, table, info)
    return {
        "name": name,
        "command": run.command,
        "folder": run.folder.name,
        "dense": _short(info["config"]["dense"]),
        "target": aliases[run.folder],
        "lens": info["config"].get("lens"),
        "temperature": info["config"]["metric_temperature"],
        "rows": len(table),
        "floor": info["noise_floor"]["floor"],
        "summary": info["summary"],
        "summary_by_sublayer": info.get("summary_by_sublayer"),
        "summary_by_space": info.get("summary_by_space"),
        "summary_by_regime": info.get("summary_by_regime"),
        "warnings": warnings_of(f"{run.command}, {name}", info, floor),
        "view": _VIEWS[run.command](table, info, samples, share),
        "config": info["config"],
        "versions": info["versions"],
        "device": info["device"],
        "seed": info["seed"],
        "wall_time_s": info["wall_time_s"],
    }


def _under_floor(command: str, table: Any, info: Mapping[str, Any]) -> dict[str, float]:
    """Share of rows under the noise floor by space; of a layerwise run only sublayers that the target changes."""
    keep = np.ones(len(table), bool)
    if command == "layerwise":
        layer = table["layer"].to_numpy()
        for kind, layers in info["changed_layers"].items():
            of_kind = pc.equal(table["sublayer"], kind).to_numpy()
            keep &= ~of_kind | np.isin(layer, list(layers))
    rows = pa.array(keep)
    names = {space: f"{space}_under_floor" for space in "hzp"}
    shares = {s: pc.mean(table[name].filter(rows)).as_py() for s, name in names.items() if name in table.column_names}
    return {space: float(share) for space, share in shares.items() if share is not None}


def _identity(info: Mapping[str, Any]) -> str:
    """One target of one dense model, whatever dtype a run took it in."""
    target, dense = info["models"]["target"], info["models"]["dense"]
    base = {"base": dense["content_hash"] if "content_hash" in dense else dense["source"]}
    return json.dumps({key: value for key, value in target.items() if key != "dtype"} | base, sort_keys=True)


def _targets(
    runs: Sequence[results.Run], views: Sequence[Mapping[str, Any]], searched: Sequence[results.Run]
) -> dict[str, dict[str, Any]]:
    """Every target with its size, its runs, its verdicts and the columns of the sortable table; a run of `retrieve` adds to a target that
    another run shows."""
    grouped: dict[str, dict[str, Any]] = {}
    for run, view in zip(runs, views, strict=True):
        target, dense = run.info["models"]["target"], run.info["models"]["dense"]
        if target is None:
            continue
        found = grouped.setdefault(
            _identity(run.info), {"name": view["target"], "models": (dense, target), "infos": {}}
        )
        found["infos"].setdefault(run.command, run.info)
    for run in searched:
        if (shown := grouped.get(_identity(run.info))) is not None:
            shown["infos"].setdefault("retrieve", run.info)
    names = [found["name"] for found in grouped.values()]
    for number, found in enumerate(grouped.values()):
        dense, target = found.pop("models")
        infos = found.pop("infos")
        if names.count(found["name"]) > 1:
            found["name"] += f" ({number + 1})"
        found |= {"size": _size(dense, target), "verdicts": [vars(v) for v in judge(infos)], "values": _values(infos)}
    return grouped


def _size(dense: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and bytes in memory as loaded, of both, and what was removed in words."""
    sizes = [(m["parameters"], m["parameters"] * _BYTES.get(m["dtype"], 4)) for m in (dense, target)]
    words = []
    for kind, name in (("attn", "attention"), ("mlp", "MLP")):
        if layers := target.get(f"drop_{kind}_list"):
            words.append(f"{len(layers)} {name} sublayers ({', '.join(map(str, layers))})")
    sparsity = target.get("sparsity") or 0.0
    if sparsity > (dense.get("sparsity") or 0.0) + 1e-3:
        words.append(f"{100 * sparsity:.1f} % of the weights are zero")
    return {
        "parameters_dense": sizes[0][0],
        "parameters": sizes[1][0],
        "bytes_dense": sizes[0][1],
        "bytes": sizes[1][1],
        "nonzero": round(sizes[1][0] * (1 - sparsity)),
        "saved": 100 * (1 - sizes[1][0] / sizes[0][0]),
        "removed": "; ".join(words) or "no sublayer dropped, no weights set to zero",
    }


def _values(infos: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """One number a column for the table of targets and the Pareto picture; None where no run tells."""
    found: dict[str, float | None] = {}
    if info := infos.get("generate"):
        regime = "teacher-forced" if "teacher-forced" in info["regimes"] else info["regimes"][0]
        for name in _PER_STEP:
            space = name[0] if name[1] == "_" else "p"
            found[f"{name}, {regime}"] = (info["summary_by_regime"][regime][space].get(name) or {}).get("mean")
        if parts := info.get("divergence"):
            found["KL, free-running"], found["KL, history part"] = parts["total"], parts["history"]
        if first := info.get("first_difference"):
            found["share of texts that stay the same"] = first["same_texts"] / len(first["by_prompt"])
    if info := infos.get("mcq"):
        found["accuracy"] = info["accuracy"]["target"]["accuracy"]
        found["accuracy, dense"] = info["accuracy"]["dense"]["accuracy"]
        found["same choice"] = info["agreement"]["same_choice"]
        found["KL at the answer"] = info["summary_by_space"]["global"]["p"]["kl_dense_target"]["mean"]
        found["KL over the options"] = info["summary_by_space"]["options"]["p"]["kl_dense_target"]["mean"]
    if info := infos.get("layerwise"):
        found["KL a sublayer, same context"] = info["summary"]["p"]["kl_dense_target"]["mean"]
    return found


def _checkpoint(one: Checkpoint) -> dict[str, Any]:
    record = one.record
    config = record.get("config") or {}
    if record["command"] == "sparsify":
        asked = config.get("pattern") or f"sparsity {config.get('sparsity')}"
        what = f"{record['method']}, {asked}: {100 * record['sparsity']:.2f} % reached in {len(record['modules'])} matrices"
    elif record["command"] == "heal":
        kl = record["kl"]
        what = f"{record['steps']} steps, {record['tokens']:,} tokens: held-out KL {kl['before']:.4f} before, {kl['written']:.4f} as written"
    else:
        layers = {kind: record[f"drop_{kind}_list"] for kind in ("attn", "mlp")}
        what = "; ".join(f"{len(v)} {k} sublayers dropped ({', '.join(map(str, v))})" for k, v in layers.items() if v)
    return {
        "name": one.folder.name,
        "command": record["command"],
        "model": _short(str(config.get("model") or config.get("target"))),
        "what": what,
        "parameters": record.get("parameters"),
        "perplexity": record.get("perplexity"),
        "view": payload.checkpoint_view(record),
        "config": config,
        "versions": record.get("versions"),
    }


def _mixed(runs: Sequence[results.Run]) -> list[str]:
    """Said where not all runs have the same dense model."""
    known = {
        json.dumps({k: v for k, v in r.info["models"]["dense"].items() if k in ("source", "content_hash", "revision")})
        for r in runs
    }
    return (
        ["The runs on this page have different dense models; their numbers must not be compared."]
        if len(known) > 1
        else []
    )


def _base_name(record: Mapping[str, Any]) -> str:
    """The dense model of a checkpoint, as it was written on the command line."""
    config = record.get("config") or {}
    return str(config.get("model") or config.get("teacher"))


def _title(runs: Sequence[results.Run], checkpoints: Sequence[Checkpoint]) -> str:
    dense = list(dict.fromkeys(_short(run.info["config"]["dense"]) for run in runs))
    names = dense or list(dict.fromkeys(_short(_base_name(c.record)) for c in checkpoints))
    targets = list(dict.fromkeys(_short(t) for run in runs if (t := run.info["config"].get("target"))))
    against = f" against {targets[0]}" if len(targets) == 1 else f" against {len(targets)} targets" if targets else ""
    return f"{', '.join(names)}{against}"
