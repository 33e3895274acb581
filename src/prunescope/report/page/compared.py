"""What a page compares: the names of its runs, its targets with their sizes and verdicts, its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prunescope.report.page import payload
from prunescope.report.page.passages import generation_passages, worst_of_generation
from prunescope.report.page.verdict import judge, warnings_of
from prunescope.report.terminal.recovery import recovery_rows
from prunescope.runs import folder as results

__all__ = [
    "VIEWS",
    "Checkpoint",
    "aliases_of",
    "checkpoint_of",
    "mixed",
    "names_of",
    "targets_of",
    "title_of",
    "view_of",
]

VIEWS = {"layerwise": payload.layerwise_view, "generate": payload.generation_view, "mcq": payload.mcq_view}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_PER_STEP = ("h_cos", "z_cos", "p_cos", "kl_dense_target", "js", "top1_agree")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `drop`, `sparsify` or `heal` wrote; ``record`` is its prunescope.json."""

    folder: Path
    record: dict[str, Any]


def short_name(name: str | None) -> str:
    if name is None:
        return "each sublayer in turn"
    path = name.rstrip("/")
    return payload.clipped(
        path.rpartition("/")[2] if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path, 60
    )


def aliases_of(runs: Sequence[results.Run], checkpoints: Sequence[Checkpoint]) -> dict[Path, str]:
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
        found[run.folder] = known.get(key) or short_name((run.info.get("config") or {}).get("target"))
    return found


def names_of(runs: Sequence[results.Run], aliases: Mapping[Path, str]) -> list[str]:
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
                label += ", " + word.format(short_name(value) if option == "dense" else value)
        found.append(label)
    repeated = {
        name
        for name in found
        if [(r.command, n) for r, n in zip(runs, found, strict=True)].count((runs[found.index(name)].command, name)) > 1
    }
    return [f"{name} ({run.folder.name})" if name in repeated else name for run, name in zip(runs, found, strict=True)]


def view_of(run: results.Run, name: str, runs: Sequence[results.Run], aliases: Mapping[Path, str]) -> dict[str, Any]:
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
        "dense": short_name(info["config"]["dense"]),
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
        "view": VIEWS[run.command](table, info, samples, share),
        "worst": worst_of_generation(table, samples, share) if run.command == "generate" else [],
        "passages": generation_passages(table, samples) if run.command == "generate" else [],
        "recovery": recovery_rows(info),
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


def targets_of(
    runs: Sequence[results.Run], views: Sequence[Mapping[str, Any]], searched: Sequence[results.Run]
) -> list[dict[str, Any]]:
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
    return list(grouped.values())


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


def checkpoint_of(one: Checkpoint) -> dict[str, Any]:
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
        "model": short_name(str(config.get("model") or config.get("target"))),
        "what": what,
        "parameters": record.get("parameters"),
        "perplexity": record.get("perplexity"),
        "view": payload.checkpoint_view(record),
        "config": config,
        "versions": record.get("versions"),
    }


def mixed(runs: Sequence[results.Run]) -> list[str]:
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


def title_of(runs: Sequence[results.Run], checkpoints: Sequence[Checkpoint]) -> str:
    dense = list(dict.fromkeys(short_name(run.info["config"]["dense"]) for run in runs))
    names = dense or list(dict.fromkeys(short_name(_base_name(c.record)) for c in checkpoints))
    targets = list(dict.fromkeys(short_name(t) for run in runs if (t := run.info["config"].get("target"))))
    against = f" against {targets[0]}" if len(targets) == 1 else f" against {len(targets)} targets" if targets else ""
    return f"{', '.join(names)}{against}"
