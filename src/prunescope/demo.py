"""`prunescope demo`: the main job from end to end on the bundled model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunescope import commands
from prunescope.progress import console
from prunescope.report import KIND_NAMES
from prunescope.results import DemoResult, DropResult, GenerateResult, LayerwiseResult
from prunescope.runs.folder import check_free, staged, write_config, write_json
from prunescope.runs.result import RunResult

if TYPE_CHECKING:
    from prunescope.models.loaded import LoadedModel

__all__ = ["demo", "run_demo"]

_KINDS: tuple[Literal["attn"], Literal["mlp"]] = ("attn", "mlp")
_DROPPED = 8
_PAIRS = ("arithmetic", "brackets", "substitution")  # the quick tasks that cost least
_ITEMS = 20  # of each; also prompts and questions that are read together
_SHOWN_PROMPTS = ("mc-1", "math-1", "open-1")


def demo(*, out: str = "prunescope-demo", overwrite: bool = False) -> DemoResult:
    """Drop attention and MLP sublayers of the bundled model and see what breaks; no network, no GPU, a few minutes.

    Args:
        out: folder for checkpoints, run, figures and summary
        overwrite: replace an existing folder

    Raises:
        UserError: the bundled model is missing, or the folder exists.
    """
    return run_demo(out, overwrite=overwrite)


def run_demo(
    out: str = "prunescope-demo",
    *,
    overwrite: bool = False,
    model: str | None = None,
    calibration: tuple[int, int] = (32, 128),
    max_new_tokens: int = 32,
    questions: bool = True,
) -> DemoResult:
    """Score all sublayers of ``model`` on text it samples itself, drop 8 attention and, apart, 8 MLP sublayers, compare, draw, sum up.

    Writes ``out/drop-attn``, ``out/drop-mlp`` (recipes), ``out/layerwise`` and ``out/layerwise-final-norm``, ``out/generate-...`` and ``out/mcq-...`` of both (runs with
    figures, but for ``layerwise-final-norm``), ``out/evaluate`` (quick tasks), ``out/report.html`` (all of them on one page), ``out/summary.md`` and
    ``out/demo.json``, which holds the sentences, the texts and the seconds of every stage.

    Args:
        model: left out, the bundled one.
        calibration: samples, and tokens of each.
        questions: False makes no mcq and evaluate runs: a tokenizer that has no letters cannot answer.
    """
    from prunescope.models.references import BUNDLED
    from prunescope.report.figures.beside import Beside
    from prunescope.report.page.html import open_folder, write_report

    check_free(out, overwrite=overwrite)
    clock = _Clock()
    samples, seq_len = calibration
    drops: dict[str, DropResult] = {}
    with staged(out, overwrite=overwrite) as staging, Beside() as beside:
        beside.start()
        with clock.stage("load the model"):
            dense = commands.load(model or BUNDLED)
        chat = bool(dense.tokenizer.chat_template)
        written = []

        def keep(name: str, result: RunResult, *, figures: bool = True) -> None:
            (staging / name).mkdir()
            with clock.stage("files"):
                result.write(staging / name, figures=False)
            if figures and (draw := result.drawing()) is not None:
                beside.add(draw, staging / name)
            written.append(staging / name)

        for kind in _KINDS:
            with clock.stage("score on self-sampled text"):
                drops[kind] = commands.drop(dense, target=kind, n=_DROPPED, samples=samples, seq_len=seq_len)
            drops[kind].save(staging / f"drop-{kind}")
        with clock.stage("every sublayer in turn"):
            run = commands.layerwise(dense, chat=chat, max_new_tokens=max_new_tokens)
        keep("layerwise", run)
        few = min(8, max_new_tokens)
        with clock.stage("the same, final norm, 8 steps"):
            normed = commands.layerwise(dense, chat=chat, lens="final-norm", max_new_tokens=few)
        keep("layerwise-final-norm", normed, figures=False)
        generated = {}
        for name, drop in drops.items():
            target = f"drop:{drop.spec}"
            with clock.stage("both models write"):
                generated[name] = commands.generate(
                    dense, target, chat=chat, max_new_tokens=max_new_tokens, batch_size=_ITEMS
                )
            keep(f"generate-{name}", generated[name])
            if questions:
                with clock.stage("72 questions"):
                    asked = commands.mcq(dense, target, batch_size=_ITEMS)
                keep(f"mcq-{name}", asked)
        if questions:
            tasks = ",".join(f"{pair}-{way}" for pair in _PAIRS for way in ("gen", "mc"))
            models: list[str | LoadedModel] = [dense, *(f"drop:{drop.spec}" for drop in drops.values())]
            with clock.stage("quick tasks"):
                scored = commands.evaluate(models, tasks=tasks, limit=_ITEMS, batch_size=_ITEMS)
            keep("evaluate", scored)
        on_page = [*written, *(staging / f"drop-{kind}" for kind in drops)]
        sentences = _sentences(run, drops)
        texts = _texts(dense, generated)
        (staging / "summary.md").write_text(_page(sentences, texts), "utf-8")
        write_config(staging, {"out": str(out), "overwrite": overwrite})
        with clock.stage("page"):
            write_report([open_folder(folder) for folder in on_page], staging / "report.html")
        with clock.stage("figures, beside the rest", also=lambda: beside.cpu_seconds):
            beside.finish()
        found = {"schema_version": 1, "sentences": sentences, "texts": texts, "stages": clock.rows()}
        write_json(staging / "demo.json", found)
    folder = Path(out).expanduser()
    console.print()
    for sentence in sentences:
        console.print(sentence, markup=False)
    console.print(
        f"\nLook at {folder / 'report.html'} (opens in any browser, no network needed) and {folder / 'summary.md'}",
        markup=False,
    )
    console.print(_NEXT, markup=False)
    return DemoResult({"sentences": sentences}, folder, sentences, run, drops)


_NEXT = """
Next, with a model of your own:
  prunescope drop MODEL --target attn --n 8 --out my-drop   which layers can go
  prunescope generate MODEL my-drop --chat --out runs/text  can it still write
  prunescope mcq MODEL my-drop --out runs/options           can it still choose
  prunescope heal my-drop --teacher MODEL --out my-healed   bring some back
  prunescope report my-drop runs/text runs/options          all on one page"""


def _sentences(run: LayerwiseResult, drops: dict[str, DropResult]) -> list[str]:
    """What was found, in three sentences that say what the numbers say, whichever way they fall."""
    from prunescope.report.terminal.comparing import worst_layers

    first = " and ".join(
        f"{_DROPPED} {name} sublayers (layers {', '.join(map(str, drops[kind].spec.layers(kind)))}; {_saved(drops[kind]):.1f} % of the parameters)"
        for kind, name in ((kind, KIND_NAMES[kind]) for kind in _KINDS)
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


def _saved(drop: DropResult) -> float:
    counts = drop.record["parameters"]
    return 100 * float(1 - counts["dropped"] / counts["dense"])


def _texts(dense: LoadedModel, generated: dict[str, GenerateResult]) -> list[dict[str, str]]:
    """What the dense and both dropped models wrote after a few of the prompts, greedily."""

    def text(tokens: list[int]) -> str:
        return str(dense.tokenizer.decode(tokens, skip_special_tokens=True))

    texts: dict[str, dict[str, str]] = {}
    for kind, result in generated.items():
        for row in result.samples():
            if row["id"] in _SHOWN_PROMPTS:
                shown = {"prompt": row["text"], "dense": text(row["dense_tokens"])}
                texts.setdefault(row["id"], shown)[f"without {_DROPPED} {kind}"] = text(row["target_tokens"])
    return list(texts.values())


class _Clock:
    """Seconds, and processor seconds of all threads, of each stage."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float]] = {}

    @contextmanager
    def stage(self, name: str, also: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """``also``: processor seconds of other processes, asked for in the end."""
        started, used = time.perf_counter(), time.process_time()
        yield
        seconds, cpu = self._found.get(name, (0.0, 0.0))
        self._found[name] = (seconds + time.perf_counter() - started, cpu + time.process_time() - used + also())

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"stage": name, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
            for name, (seconds, cpu) in self._found.items()
        ]


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
