"""`prunescope demo`: the main job from end to end on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunescope import commands
from prunescope.commands import DemoResult, LayerwiseResult
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.references import BUNDLED
from prunescope.progress import console
from prunescope.report import KIND_NAMES
from prunescope.report.page.html import open_folder, write_report
from prunescope.report.terminal import worst_layers
from prunescope.runs import folder as results

__all__ = ["run_demo"]

_DROPPED = 8
_PAIRS = ("arithmetic", "brackets", "substitution")  # the quick tasks that cost least
_ITEMS = 20  # of each
_SHOWN_PROMPTS = ("mc-1", "math-1", "open-1")


def run_demo(
    out: str = "prunescope-demo",
    *,
    overwrite: bool = False,
    model: str = BUNDLED,
    calibration: tuple[int, int] = (32, 128),
    max_new_tokens: int = 32,
    questions: bool = True,
) -> DemoResult:
    """Score all sublayers of ``model`` on text it samples itself, drop 8 attention and, apart, 8 MLP sublayers, compare, draw, sum up.

    Writes ``out/drop-attn``, ``out/drop-mlp`` (recipes), ``out/layerwise`` and ``out/layerwise-final-norm``, ``out/generate-...`` and ``out/mcq-...`` of both (runs with
    figures), ``out/evaluate`` (quick tasks), ``out/report.html`` (all of them on one page), ``out/demo.json`` and ``out/summary.md``.
    Without ``questions`` there are no mcq and evaluate runs: a tokenizer that has no letters cannot answer.
    """
    results.check_free(out, overwrite=overwrite)
    dense = load_model(model)
    samples, seq_len = calibration
    options: Any = {"calibration": "self", "samples": samples, "seq_len": seq_len}
    drops = {}
    with results.staged(out, overwrite=overwrite) as staging:
        for kind in ("attn", "mlp"):
            drops[kind] = commands.drop(dense, target=kind, n=_DROPPED, **options)  # type: ignore[arg-type]
            drops[kind].save(staging / f"drop-{kind}")
        run = commands.layerwise(dense, chat=bool(dense.tokenizer.chat_template), max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
        (staging / "layerwise").mkdir()
        run._write(staging / "layerwise")
        chat, few = bool(dense.tokenizer.chat_template), min(8, max_new_tokens)
        normed = commands.layerwise(dense, chat=chat, lens="final-norm", max_new_tokens=few)  # type: ignore[arg-type]
        (staging / "layerwise-final-norm").mkdir()
        normed._write(staging / "layerwise-final-norm")
        compared = _compare(dense, drops, staging, max_new_tokens, questions)
        if questions:
            _evaluate(dense, drops, staging)
        sentences = _sentences(run, drops)
        texts = _texts(dense, run, drops, max_new_tokens)
        (staging / "summary.md").write_text(_page(sentences, texts), "utf-8")
        results.write_config(staging, {"out": str(out), "overwrite": overwrite})
        results.write_json(staging / "demo.json", {"schema_version": 1, "sentences": sentences, "texts": texts})
        folders = [
            staging / name
            for name in ("layerwise", "layerwise-final-norm", *compared, *(f"drop-{kind}" for kind in drops))
        ]
        write_report([open_folder(folder) for folder in folders], staging / "report.html")
    console.print()
    for sentence in sentences:
        console.print(sentence, markup=False)
    console.print(
        f"\nLook at {Path(out) / 'report.html'} (opens in any browser, no network needed) and {Path(out) / 'summary.md'}",
        markup=False,
    )
    return DemoResult(Path(out), sentences, run, drops)


def _compare(
    dense: LoadedModel, drops: dict[str, commands.DropResult], staging: Path, max_new_tokens: int, questions: bool
) -> list[str]:
    """Let both dropped models write and answer questions; returns the names of the run folders."""
    written = []
    for kind, drop in drops.items():
        target = f"drop:{kind}={','.join(map(str, drop.spec.layers(kind)))}"  # type: ignore[arg-type]
        chat = bool(dense.tokenizer.chat_template)
        found: list[tuple[str, Any]] = [
            ("generate", commands.generate(dense, target, chat=chat, max_new_tokens=max_new_tokens))  # type: ignore[arg-type]
        ]
        if questions:
            found.append(("mcq", commands.mcq(dense, target)))  # type: ignore[arg-type]
        for command, result in found:
            name = f"{command}-{kind}"
            (staging / name).mkdir()
            result._write(staging / name)
            written.append(name)
    return written


def _evaluate(dense: LoadedModel, drops: dict[str, commands.DropResult], staging: Path) -> None:
    """Three pairs of quick tasks, dense and with both drops."""
    targets = [f"drop:{drop.spec}" for drop in drops.values()]
    tasks = ",".join(f"{pair}-{way}" for pair in _PAIRS for way in ("gen", "mc"))
    found = commands.evaluate([dense, *targets], tasks=tasks, limit=_ITEMS, batch_size=_ITEMS)  # type: ignore[list-item]
    (staging / "evaluate").mkdir()
    found._write(staging / "evaluate")


def _sentences(run: LayerwiseResult, drops: dict[str, commands.DropResult]) -> list[str]:
    """What was found, in three sentences that say what the numbers say, whichever way they fall."""
    first = " and ".join(
        f"{_DROPPED} {name} sublayers (layers {', '.join(map(str, drops[kind].spec.layers(kind)))}; {_saved(drops[kind]):.1f} % of the parameters)"  # type: ignore[arg-type]
        for kind, name in KIND_NAMES.items()
    )
    stats = {kind: run.info["summary_by_sublayer"][kind] for kind in ("attn", "mlp")}
    means = {kind: {space: stats[kind][space][f"{space}_cos"]["mean"] for space in "hzp"} for kind in stats}
    cosines = "; ".join(
        f"{name} {means[kind]['h']:.3f} in h, {means[kind]['z']:.3f} in z, {means[kind]['p']:.3f} in p"
        for kind, name in KIND_NAMES.items()
    )
    falls = all(m["p"] < m["h"] and m["p"] < m["z"] for m in means.values())
    verdict = (
        "the damage is larger in probabilities than in hidden states or logits"
        if falls
        else "the damage is not larger in probabilities for both kinds"
    )
    worse = max(stats, key=lambda kind: stats[kind]["p"]["kl_dense_target"]["mean"])
    kl = {kind: stats[kind]["p"]["kl_dense_target"]["mean"] for kind in stats}
    layers = worst_layers(run.table(), worse, "kl_dense_target", True, run.info["changed_layers"][worse])
    return [
        f"Scored on text the model sampled itself, the least needed are {first}.",
        f"Dropping one sublayer at a time in the same context, mean cosines are: {cosines}; {verdict}.",
        f"Dropping {KIND_NAMES[worse]} costs more (mean KL {kl[worse]:.3g} nats against {min(kl.values()):.3g}), most of all in layers {', '.join(map(str, layers))}.",
    ]


def _saved(drop: commands.DropResult) -> float:
    counts = drop.record["parameters"]
    return 100 * float(1 - counts["dropped"] / counts["dense"])


def _texts(
    dense: LoadedModel, run: LayerwiseResult, drops: dict[str, commands.DropResult], max_new_tokens: int
) -> list[dict[str, str]]:
    """What the dense and both dropped models write after a few of the prompts, greedily."""
    from prunescope.models.generating import continue_texts

    chosen = [row for row in run._samples if row["id"] in _SHOWN_PROMPTS]
    texts = [
        {"prompt": row["text"], "dense": dense.tokenizer.decode(row["dense_tokens"], skip_special_tokens=True)}
        for row in chosen
    ]
    for kind, drop in drops.items():
        with dense.dropping(drop.spec):
            found = continue_texts(
                dense, [row["prompt_tokens"] for row in chosen], max_new_tokens, batch_size=len(chosen)
            )
        for row, tokens in zip(texts, found, strict=True):
            row[f"without {_DROPPED} {kind}"] = dense.tokenizer.decode(tokens, skip_special_tokens=True)
    return texts


def _page(sentences: list[str], texts: list[dict[str, str]]) -> str:
    lines = [
        "# What was found",
        "",
        *(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1)),
        "",
        "# What the models write",
        "",
    ]
    for row in texts:
        for name, text in row.items():
            lines += [f"**{name}**", "", *(f"    {line}" for line in text.splitlines() or [""]), ""]
    lines += ["# Figures", ""]
    lines += [
        f"![cosine by layer, {kind}](layerwise/figures/fig04_cosine_by_layer_{kind}.png)\n" for kind in ("attn", "mlp")
    ]
    return "\n".join(lines)
