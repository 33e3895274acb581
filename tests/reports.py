"""Run folders and checkpoints for tests of the page: made-up numbers and any text, summed up and written by the real code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prunescope.compare.divergence_summary import divergence_summary, worst_passages
from prunescope.compare.metrics import COLUMNS
from prunescope.compare.summary import generation_summary, layerwise_summary, mcq_summary
from prunescope.runs import folder as results
from prunescope.sweep.tables import Measured, assemble

VERSIONS = {"python": "3", "prunescope": "0", "torch": "0", "transformers": "0", "pyarrow": "0"}
HOSTILE = [
    "<script>window.hurt = 1</script>",
    "</script><img src=x onerror='window.hurt = 1'>",
    "=1+1\"'`><b onmouseover=window.hurt=1>",
    "\u202eright to left\u202c\u200f",
    "\U0001f469\u200d\U0001f52c\U0001f1eb\U0001f1f7",
    "half \ud83d pair",
    "<a href='javascript:window.hurt=1'>link</a> $x^2$ &lt;b&gt; %{x}",
    "A" * 10_000,
]


def _metrics(rng: np.random.Generator, rows: int) -> dict[str, pa.Array]:
    found = {name: rng.lognormal(-3, 1.5, rows) for name in COLUMNS}
    for space in "hzp":
        found[f"{space}_cos"] = 1 - np.minimum(found[f"{space}_cos_dev"], 1.5)
    found["top1_agree"] = (rng.random(rows) < 0.7).astype(float)
    found["dp_top1"] = -found["tv"]
    columns = {name: pa.array(values) for name, values in found.items()}
    return columns | {f"{space}_under_floor": pa.array(rng.random(rows) < 0.05) for space in "hzp"}


def _info(command: str, target: str | None, prompts: int, config: dict[str, Any]) -> dict[str, Any]:
    dense = {
        **{"source": "tiny", "content_hash": "sha256:0", "architecture": "LlamaForCausalLM", "blocks": 4, "hidden_size": 8, "vocab_size": 32},
        **{"parameters": 1000, "dtype": "float32", "sparsity": 0.0, "drop_attn_list": [], "drop_mlp_list": []},
    }  # fmt: skip
    other = dense | {"parameters": 900 - len(target or ""), "drop_attn_list": [1]}
    return {
        "schema_version": results.SCHEMA_VERSION,
        "command": command,
        "config": {"dense": "tiny", "target": target, "metric_temperature": 1.0, "temperature": 0.0, "lens": "raw", **config},
        "seed": 0,
        "versions": VERSIONS,
        "device": "cpu",
        "models": {"dense": dense, "target": None if target is None else other},
        "wall_time_s": 1.0,
        "prompts": [{"id": f"p{i}", "kind": None} for i in range(prompts)],
        "noise_floor": {"floor": {"h_cos_dev": 1e-12, "z_cos_dev": 1e-12, "p_cos_dev": 1e-12, "kl_dense_target": 1e-12}},
    }  # fmt: skip


def _write(folder: Path, info: dict[str, Any], table: pa.Table, samples: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    results.write_run(folder, info, {"": table}, samples)
    return folder


def layerwise_run(
    folder: Path, *, target: str | None = None, prompts: int = 3, steps: int = 5, layers: int = 4, seed: int = 0, texts: list[str] | None = None, **config: Any
) -> Path:  # fmt: skip
    rng = np.random.default_rng(seed)
    prompt, step, layer, kind = (
        a.ravel() for a in np.meshgrid(range(prompts), range(steps), range(layers), range(2), indexing="ij")
    )
    keys = {"prompt": prompt, "step": step, "position": step + 3, "layer": layer}
    table = pa.table(
        {name: pa.array(values.astype(np.int32)) for name, values in keys.items()}
        | {"sublayer": pa.array(np.where(kind == 0, "attn", "mlp").tolist())}
        | _metrics(rng, len(prompt))
    )
    info = _info("layerwise", target, prompts, config)
    info["models"]["dense"]["blocks"] = layers
    info |= {"steps": prompts * steps, **layerwise_summary(table, 0)}
    words = texts or [f" word{i}" for i in range(steps)]
    samples = [
        {"prompt": i, "id": f"p{i}", "kind": None, "text": words[0], "prompt_tokens": [1], "dense_tokens": list(range(steps)), "dense": "".join(words), "dense_pieces": [words[t % len(words)] for t in range(steps)]}
        for i in range(prompts)
    ]  # fmt: skip
    return _write(folder, info, table, samples)


def generate_run(
    folder: Path, *, target: str = "thin", prompts: int = 3, steps: int = 6, seed: int = 0, texts: list[str] | None = None, tops: bool = True
) -> Path:  # fmt: skip
    rng = np.random.default_rng(seed)
    rows = [
        (p, r, t)
        for p in range(prompts)
        for r in ("free-running", "teacher-forced")
        for t in range(steps - (p == 1 and r == "free-running"))
    ]
    n = len(rows)
    tokens = rng.integers(0, 20, (n, 2))
    table = pa.table(
        {
            "prompt": pa.array([r[0] for r in rows], pa.int32()), "regime": [r[1] for r in rows], "step": pa.array([r[2] for r in rows], pa.int32()),
            "position": pa.array([r[2] + 3 for r in rows], pa.int32()), "dense_token": pa.array(tokens[:, 0], pa.int32()), "target_token": pa.array(tokens[:, 1], pa.int32()),
        }
        | _metrics(rng, n)
        | {f"confidence_{side}": pa.array(rng.random(n)) for side in ("dense", "target")}
    )  # fmt: skip
    if tops:
        for side in ("dense", "target"):
            table = table.append_column(f"top_{side}", pa.array([[0, 1, 2, 3, 4]] * n, pa.list_(pa.int32())))
            table = table.append_column(
                f"top_{side}_p", pa.array(np.sort(rng.random((n, 5)))[:, ::-1].tolist(), pa.list_(pa.float32()))
            )
    words = texts or [f" w{i}" for i in range(8)]
    ours = [[int(x) for x in rng.integers(0, len(words), steps)] for _ in range(prompts)]
    theirs = [list(text[: steps - (i == 1)]) for i, text in enumerate(ours)]
    theirs[0][2] = (theirs[0][2] + 1) % len(words)
    info = _info("generate", target, prompts, {})
    info |= {"steps": prompts * steps, **generation_summary(table, ours, theirs, ([], []), steps, 0)}
    samples = [
        {
            "prompt": i, "id": f"p{i}", "kind": None, "text": words[i % len(words)], "prompt_tokens": [1], "first_difference": info["first_difference"]["by_prompt"][i],
            "dense_tokens": a, "target_tokens": b, "dense": "", "target": "", "dense_pieces": [words[x] for x in a], "target_pieces": [words[x] for x in b],
            "token_texts": {str(x): words[x % len(words)] for x in range(5)},
        }
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]  # fmt: skip
    return _write(folder, info, table, samples)


def mcq_run(
    folder: Path, *, target: str = "thin", questions: int = 12, seed: int = 0, texts: list[str] | None = None
) -> Path:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, questions, 4)) - 2
    gold = rng.integers(0, 4, questions)
    margins = [[s[i, g] - np.delete(s[i], g).max() for i, g in enumerate(gold)] for s in scores]
    shared = {
        "question": pa.array(range(questions), pa.int32()), "id": [f"q{i}" for i in range(questions)], "subject": ["tests"] * questions, "scoring": ["token"] * questions,
        "gold": pa.array(gold, pa.int32()), "choice_dense": pa.array(scores[0].argmax(1), pa.int32()), "choice_target": pa.array(scores[1].argmax(1), pa.int32()),
        "loglik_dense": scores[0].tolist(), "loglik_target": scores[1].tolist(), "margin_dense": margins[0], "margin_target": margins[1],
        **{f"option_confidence_{side}": rng.random(questions) for side in ("dense", "target")},
        **{f"gold_rank_{side}": pa.array(rng.integers(0, 9, questions), pa.int32()) for side in ("dense", "target")},
    }  # fmt: skip
    parts = [
        pa.table(shared | {"space": [space] * questions} | _metrics(rng, questions)) for space in ("global", "options")
    ]
    table = pa.concat_tables(parts)
    info = _info("mcq", target, 0, {"template": "cue", "shots": 0})
    info |= {"questions": questions, **mcq_summary(table, 0)}
    words = texts or [f"text {i}" for i in range(4)]
    samples = [
        {
            "question": i, "id": f"q{i}", "subject": "tests", "text": words[i % len(words)], "choices": [words[(i + k) % len(words)] for k in range(4)], "gold": int(gold[i]),
            "option_strings": [" A", " B", " C", " D"], "option_tokens": [0, 1, 2, 3],
            **{f"top_{side}": [{"token": k, "text": words[k % len(words)], "p_dense": 0.1 / (k + 1), "p_target": 0.08 / (k + 1)} for k in range(20)] for side in ("dense", "target")},
        }
        for i in range(questions)
    ]  # fmt: skip
    return _write(folder, info, table, samples)


def divergence_run(
    folder: Path, *, target: str = "thin", chunks: int = 4, each: int = 40, seed: int = 0, texts: list[str] | None = None, ladder: bool = True
) -> Path:  # fmt: skip
    """Two texts, ``chunks`` chunks of twice ``each`` tokens; token i is spelled ``texts[i % 8]``."""
    rng = np.random.default_rng(seed)
    n = chunks * each
    words = texts or [f" w{i}" for i in range(8)]
    slices = [words[0], words[1]] if texts else ["a.txt", "b.txt"]
    nll = rng.gamma(1.5, 1.5, n)
    uniform = {
        name: rng.random(n)
        for name in ("tv", "confidence_dense", "confidence_target", "same_sampled", "same_sampled_dense")
    }
    table = pa.table(
        {
            "slice": np.repeat(slices, [n - n // 2, n // 2]), "chunk": np.repeat(np.arange(chunks), each).astype("i4"),
            "position": np.tile(np.arange(each, 2 * each), chunks).astype("i4"), "token": rng.integers(0, 8, n).astype("i4"),
            **{name: rng.gamma(0.3, scale, n) for name, scale in (("kl_dense_target", 0.3), ("kl_target_dense", 0.4), ("js", 0.05))},
            "nll_dense": nll, "nll_target": nll + 0.1, "dp": np.exp(-nll - 0.1) - np.exp(-nll), **uniform,
            "entropy_dense": rng.uniform(0, 4, n), "entropy_target": rng.uniform(0, 4, n), "top1_agree": (rng.random(n) < 0.8).astype(float),
            **{name: [[0, 1, 2, 3, 4]] * n for name in ("top_dense", "top_target")},
            **{name: [[0.3, 0.2, 0.1, 0.1, 0.05]] * n for name in ("top_dense_p", "top_target_p")},
        }
    )  # fmt: skip
    info = _info("divergence", target, 0, {"context": 2 * each, "text": ",".join(slices)})
    summary = divergence_summary(table)
    rungs = [
        {"name": name, "kl": kl, "error": kl / 20, "bits_per_weight": bits}
        for name, kl, bits in (("q8_0", 0.001, 8.5), ("q2_k", 9.0, 2.6))
    ]
    info |= {
        "slices": [{"name": name, "tokens": n, "chunks": chunks // 2} for name in slices],
        "ladder": rungs if ladder else [], "like": "between q8_0 and q2_k" if ladder else None, **summary,
    }  # fmt: skip
    tokens = {chunk: rng.integers(0, 8, 2 * each).tolist() for chunk in range(chunks)}
    samples = worst_passages(table, tokens, lambda ids: "".join(words[i % len(words)] for i in ids))
    return _write(folder, info, table, samples)


def sweep_run(folder: Path) -> Path:
    """The dense model, and two attention and two MLP points of ten items a task; writing loses a tenth a sublayer, choosing half of that."""
    measured = []
    for series, n in (("dense", 0), ("attn", 2), ("attn", 4), ("mlp", 1), ("mlp", 3)):
        rows, scores = [], {}
        for task, kind, chance, right in (("a-gen", "generative", 0.0, 10 - n), ("a-mc", "choice", 0.25, 10 - n / 2)):
            values = [float(i < right) for i in range(10)]
            rows += [{"task": task, "item": i, "key": str(i), "score": v, "prediction": "", "gold": ""} for i, v in enumerate(values)]  # fmt: skip
            mean = float(np.mean(values))
            scores[task] = {"kind": kind, "metric": "acc", "value": mean, "stderr": 0.1, "ci95": [mean - 0.2, mean + 0.2], "n": 10, "chance": chance, "at_floor": None}  # fmt: skip
        name = "dense" if series == "dense" else f"{series}-{n:03d}"
        dropped = f"{series}={','.join(map(str, range(n)))}" if n else ""
        stats = {"p": {"kl_dense_target": {"mean": 0.1 * n, "median": 0.1 * n, "ci95": [0.0, 1.0]}}}
        measured.append(
            Measured(
                {
                    "point": name, "series": series, "n": n, "method": None, "sparsity": None, "pattern": None, "quant": None,
                    "change": "dense" if series == "dense" else "drop", "dropped": dropped, "weights_removed": n / 100, "bytes": 1000 - 10 * n,
                    "scores": scores, "metrics": stats, "seconds": 1.0,
                },
                pa.Table.from_pylist(rows),
            )
        )  # fmt: skip
    found = assemble(measured)
    info = _info("sweep", None, 0, {"model": "tiny"})
    info |= {"complete": True, "points_done": ["dense"], "points_asked": ["dense"], "summary": found.summary}
    folder.mkdir(parents=True)
    results.write_run(folder, info, found.named())
    (folder / "figures").mkdir()
    (folder / "figures" / "drawn.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    return folder


def checkpoint(folder: Path, command: str = "drop") -> Path:
    record: dict[str, Any] = {
        "schema_version": 1,
        "command": command,
        "config": {"model": "tiny"},
        "versions": VERSIONS,
    }
    if command == "drop":
        scores = [{"layer": i, "sublayer": "attn", "score": 0.9 + i / 100, "dropped": i == 1} for i in range(4)]
        record |= {
            "drop_attn_list": [1],
            "drop_mlp_list": [],
            "scores": scores,
            "parameters": {"dense": 1000, "dropped": 900},
        }
    elif command == "heal":
        record |= {
            "config": {"target": "./thin", "teacher": "tiny"}, "steps": 4, "tokens": 4000, "kl": {"before": 0.9, "written": 0.3},
            "checks": [{"tokens": 1000 * i, "loss": 1.0 / i, "held_out_kl": 0.9 / i} for i in range(1, 5)],
        }  # fmt: skip
    else:
        modules = [
            {
                "name": f"model.layers.{i}.mlp.{n}.weight",
                "layer": i,
                "error": None if n == "up_proj" and i == 0 else 0.1 * i,
            }
            for i in range(4)
            for n in ("up_proj", "down_proj")
        ]
        record |= {
            "method": "wanda",
            "sparsity": 0.5,
            "modules": modules,
            "perplexity": {"dense": 18.0, "pruned": 30.0},
            "config": {"model": "tiny", "pattern": None, "sparsity": 0.5},
        }
    folder.mkdir(parents=True)
    (folder / "prunescope.json").write_text(json.dumps(record))
    return folder
