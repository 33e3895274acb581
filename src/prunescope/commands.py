"""Prune a causal language model and see where pruning breaks it: in h (hidden states), z (logits) or p (probabilities)."""

# The public functions. Each is a command of the same name: its signature gives the options, its docstring the help. torch and
# transformers are imported inside them, so that `import prunescope` and `--help` answer at once.

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunescope.errors import UserError
from prunescope.runs import folder as results

if TYPE_CHECKING:
    import pyarrow as pa

    from prunescope.models.dropping import DropSpec
    from prunescope.models.loaded import LoadedModel
    from prunescope.sweep.tables import Tables

__all__ = [
    "DemoResult",
    "DropResult",
    "EvaluateResult",
    "GenerateResult",
    "LayerwiseResult",
    "McqResult",
    "RetrieveResult",
    "SparsifyResult",
    "SpeedResult",
    "SweepResult",
    "demo",
    "drop",
    "evaluate",
    "generate",
    "layerwise",
    "load",
    "mcq",
    "report",
    "retrieve",
    "sparsify",
    "speed",
    "sweep",
]

_StrPath = str | os.PathLike[str]


@dataclass
class LayerwiseResult:
    """What `layerwise` found; the same as its run folder holds."""

    info: dict[str, Any]
    _table: pa.Table = field(repr=False)
    _samples: list[dict[str, Any]] = field(repr=False)

    def table(self) -> pa.Table:
        """A row per prompt, step, position, layer and sublayer, with every metric."""
        return self._table

    @property
    def summary(self) -> dict[str, Any]:
        """Per space and column: mean, median, min, max, percentiles, confidence interval."""
        return dict(self.info["summary"])

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder, figures included. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        from prunescope.report.figures.layerwise import draw_layerwise

        results.write_run(
            staging,
            self.info,
            self._table,
            self._samples,
            lambda table, info, _, folder: draw_layerwise(table, info, folder),
        )


@dataclass
class GenerateResult:
    """What `generate` found; the same as its run folder holds."""

    info: dict[str, Any]
    _table: pa.Table = field(repr=False)
    _samples: list[dict[str, Any]] = field(repr=False)

    def table(self) -> pa.Table:
        """A row per prompt, regime and step, with the tokens of both models and every metric."""
        return self._table

    @property
    def summary(self) -> dict[str, Any]:
        """Per space and column: mean, median, min, max, percentiles, confidence interval; of the free-running steps where there are any."""
        return dict(self.info["summary"])

    def samples(self) -> list[dict[str, Any]]:
        """Prompts and the texts of both models."""
        return list(self._samples)

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder, figures included. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        from prunescope.report.figures.generation import draw_generation

        results.write_run(staging, self.info, self._table, self._samples, draw_generation)


@dataclass
class McqResult:
    """What `mcq` found; the same as its run folder holds."""

    info: dict[str, Any]
    _table: pa.Table = field(repr=False)
    _samples: list[dict[str, Any]] = field(repr=False)

    def table(self) -> pa.Table:
        """Two rows a question, the whole vocabulary and the options: metrics, log-likelihoods, choices, margins."""
        return self._table

    @property
    def summary(self) -> dict[str, Any]:
        """Per space and column over the whole vocabulary; that of the options is in ``info["summary_by_space"]``."""
        return dict(self.info["summary"])

    def samples(self) -> list[dict[str, Any]]:
        """Prompts, options, and the likeliest tokens of both models."""
        return list(self._samples)

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder, figures included. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        from prunescope.report.figures.mcq import draw_mcq

        results.write_run(staging, self.info, self._table, self._samples, draw_mcq)


@dataclass
class RetrieveResult:
    """What `retrieve` found; the same as its run folder holds."""

    info: dict[str, Any]
    _table: pa.Table = field(repr=False)
    _samples: list[dict[str, Any]] = field(repr=False)
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = field(repr=False)
    """``dense`` and ``target``: of each query the passages and their cosines, best first."""

    def table(self) -> pa.Table:
        """A row a query: measures of both models, agreement of their rankings, h columns of the query's embedding."""
        return self._table

    @property
    def summary(self) -> dict[str, Any]:
        """Mean, median, percentiles and confidence interval of the columns: ``h`` and ``retrieval``."""
        return dict(self.info["summary"])

    def samples(self) -> list[dict[str, Any]]:
        """Queries, their judgements, and the first ten passages of both models."""
        return list(self._samples)

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder, figures included. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        from prunescope.compare.retrieval import write_rankings
        from prunescope.report.figures.retrieval import draw_retrieval

        write_rankings(staging, self.rankings)
        results.write_run(staging, self.info, self._table, self._samples, draw_retrieval)


@dataclass
class EvaluateResult:
    """What `evaluate` found; the same as its run folder holds. ``harness`` is what lm-evaluation-harness itself returned, by task."""

    info: dict[str, Any]
    _table: pa.Table = field(repr=False)
    harness: dict[str, Any] = field(repr=False)

    def table(self) -> pa.Table:
        """A row per model, task and item: score, what was answered, what is right."""
        return self._table

    @property
    def summary(self) -> dict[str, Any]:
        """Model -> task -> metric, kind, value, stderr, ci95, n, chance. Differences from the first model are in ``info["paired"]``."""
        return dict(self.info["summary"])

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        from prunescope.report.scores import summary_page

        if self.harness:
            from prunescope.jobs.evaluate import write_harness

            labels = list(self.summary)
            for name, found in self.harness.items():
                write_harness(staging / "harness", name, labels[int(name.partition("-")[0])], found)
        (staging / "summary.md").write_text(summary_page(self.info), "utf-8")
        results.write_run(staging, self.info, self._table, [], lambda *_: None)


@dataclass
class SpeedResult:
    """What `speed` measured; the same as its run folder holds."""

    info: dict[str, Any]
    _table: pa.Table = field(repr=False)

    def table(self) -> pa.Table:
        """A row per model and batch size: parameters, bytes, seconds with their spread and floor, tokens a second, gain over the first."""
        return self._table

    @property
    def summary(self) -> dict[str, Any]:
        """Per model and batch size: memory, tokens a second, gain over the first model and whether it is within the spread."""
        return dict(self.info["summary"])

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        import pyarrow.parquet as pq

        pq.write_table(self._table, staging / results.TABLES["speed"])
        results.write_config(staging, self.info["config"])
        results.write_json(staging / "run.json", self.info)


@dataclass
class SweepResult:
    """What `sweep` measured; the same as its run folder holds."""

    info: dict[str, Any]
    _tables: Tables = field(repr=False)

    def table(self) -> pa.Table:
        """A row per point and task: score, interval, chance, what was lost against the dense model."""
        return self._tables.sweep

    def items(self) -> pa.Table:
        """A row per point, task and item: score, prediction, gold."""
        return self._tables.items

    def metrics(self) -> pa.Table:
        """A row per point and column of h, z and p: the mean over the steps of the dense model's texts."""
        return self._tables.metrics

    def correlations(self) -> pa.Table:
        """A row per outcome and column: rank correlation of the column's mean with what was lost, over points."""
        return self._tables.correlations

    @property
    def summary(self) -> dict[str, Any]:
        """Dense scores, the points at which half was lost, the columns that foretell best."""
        return dict(self.info["summary"])

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> results.Run:
        """Write the run folder, figures included. Raises UserError if it exists."""
        with results.staged(folder, overwrite=overwrite) as staging:
            self._write(staging)
        return results.open_run(folder)

    def _write(self, staging: Path) -> None:
        from prunescope.report.figures.sweep import draw_sweep
        from prunescope.sweep.tables import write_tables

        (staging / "figures").mkdir(exist_ok=True)
        tables = self._tables
        draw_sweep(tables.sweep, tables.metrics, tables.correlations, self.info, staging / "figures")
        write_tables(staging, self.info, tables)
        for path in staging.glob("part-*"):
            path.unlink()


@dataclass
class DropResult:
    """What `drop` chose: the sublayers, their scores, and how to write the checkpoint."""

    record: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)
    spec: DropSpec
    _dense: LoadedModel = field(repr=False)

    def table(self) -> pa.Table:
        """A row per candidate: layer, sublayer, score, dropped."""
        import pyarrow as pa

        return pa.Table.from_pylist(self.rows)

    @property
    def summary(self) -> dict[str, Any]:
        """Drop lists, parameters before and after."""
        return {key: self.record[key] for key in ("drop_attn_list", "drop_mlp_list", "parameters")}

    def save(
        self, folder: _StrPath, *, format: Literal["recipe", "zeroed", "compact"] = "recipe", overwrite: bool = False
    ) -> Path:
        """Write a checkpoint folder. Raises UserError if it exists, or if the format cannot hold this drop."""
        from prunescope.models.saving import checkpoint_bytes, save_dropped

        results.check_free(folder, overwrite=overwrite)
        results.require_space(folder, checkpoint_bytes(self._dense, format))
        with results.staged(folder, overwrite=overwrite) as staging:
            results.write_config(staging, self.record["config"])
            save_dropped(self._dense, self.spec, staging, format, {**self.record, "scores": self.rows})
        return Path(folder)


@dataclass
class SparsifyResult:
    """What `sparsify` did: a checkpoint folder, and for every matrix what was asked and what was reached."""

    record: dict[str, Any] = field(repr=False)
    folder: (
        Path | None
    )  # of the checkpoint, kept only as long as this object where no out was given; None after a dry run

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.record["modules"])

    def table(self) -> pa.Table:
        """A row per matrix (for `structured`, per MLP): sparsity asked and reached, relative error, dead inputs, damping."""
        import pyarrow as pa

        return pa.Table.from_pylist(self.rows)

    @property
    def summary(self) -> dict[str, Any]:
        """Method, sparsity over all pruned matrices, perplexity before and after where it was measured."""
        return {key: self.record[key] for key in ("method", "sparsity", "perplexity")}

    def save(self, folder: _StrPath, *, overwrite: bool = False) -> Path:
        """Copy the checkpoint to another folder. Raises UserError if it exists, or after a dry run."""
        import shutil

        if self.folder is None:
            raise UserError("a dry run leaves no checkpoint to save; run it without dry_run")
        results.require_space(folder, sum(path.stat().st_size for path in self.folder.iterdir()))
        with results.staged(folder, overwrite=overwrite) as staging:
            for path in self.folder.iterdir():
                shutil.copyfile(path, staging / path.name)
        return Path(folder)


@dataclass
class DemoResult:
    """The demo's folder, its two checkpoints, its run, and what was found in three sentences."""

    folder: Path
    sentences: list[str]
    layerwise: LayerwiseResult
    drops: dict[str, DropResult]

    def table(self) -> pa.Table:
        """The rows of the layerwise run."""
        return self.layerwise.table()

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of the layerwise run."""
        return self.layerwise.summary


def load(
    model: str,
    *,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    drop: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model, optionally with sublayers dropped.

    Args:
        model: a Hugging Face id, a folder, a .gguf file, smollm2-135m (bundled), or a prunescope or LLM-Drop checkpoint folder
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        drop: sublayers to drop, for example attn=0,5;mlp=7
        revision: revision of a Hugging Face id
        trust_remote_code: run code that comes with the model

    Returns:
        An object with `.model` (the ordinary transformers model, `generate()` and all), `.tokenizer`, `.restore()`.

    Raises:
        UserError: whatever is wrong with the reference, the files, the weights or the architecture.
    """
    from prunescope.models.loading import load_model

    return load_model(
        model, dtype=dtype, device=device, drop=drop, revision=revision, trust_remote_code=trust_remote_code
    )


def drop(
    model: str,
    *,
    target: Literal["attn", "mlp", "block", "all"] = "attn",
    n: int = 8,
    out: str | None = None,
    format: Literal["recipe", "zeroed", "compact"] = "recipe",
    order: Literal["discrete", "consecutive"] = "discrete",
    iterative: bool = False,
    score_on: Literal["stream", "norm"] = "stream",
    calibration: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    overwrite: bool = False,
) -> DropResult:
    """Score sublayers, drop the n least needed, save a checkpoint.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        target: what to drop; all ranks attention and MLP sublayers together
        n: how many sublayers, or blocks
        out: checkpoint folder to write
        format: recipe (drop lists, no weights), zeroed (full weights, silent branches) or compact (blocks removed)
        order: discrete takes the n highest scores, consecutive the run of n blocks whose ends are most alike
        iterative: drop one, score again, n times
        score_on: stream compares the residual stream before and after, norm the module's normed input with its output
        calibration: self (text the model samples), a text, JSON or JSONL file, or a data set id (c4, wikitext2)
        samples: calibration samples, by default 128 from a text and 32 from the model
        seq_len: tokens of a sample, by default 2048 from a text and 256 from the model, never past its context
        batch_size: samples at a time, by default 32 while the model samples and 8 while it scores
        seed: of the calibration's choice
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id
        trust_remote_code: run code that comes with the model
        cache: keep scores for the next call ($PRUNESCOPE_CACHE, else the user's cache folder)
        overwrite: replace an existing checkpoint folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    from prunescope.cache import cache_folder
    from prunescope.data.calibration import calibration_tokens
    from prunescope.models.loading import load_model
    from prunescope.prune.select import check_choice, choose
    from prunescope.report.terminal import show_scores

    if out is not None:
        results.check_free(out, overwrite=overwrite)
    _check_counts(batch_size=1 if batch_size is None else batch_size)
    _check_seed(seed)
    dense = load_model(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    if dense.dropped:
        raise UserError(f"{model} has sublayers dropped already ({dense.dropped}); give its dense model")
    check_choice(dense, target, n, order, iterative, score_on)
    data = calibration_tokens(
        dense,
        calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        batch_size=batch_size or 32,
        cache=cache_folder() if cache else None,
    )
    choice = choose(
        dense,
        data,
        target,
        n,
        order=order,
        iterative=iterative,
        score_on=score_on,
        batch_size=batch_size or 8,
        cache=cache_folder() if cache else None,
    )
    before = sum(p.numel() for p in dense.model.parameters())
    with dense.dropping(choice.spec):
        after = sum(p.numel() for p in dense.model.parameters())
    record: dict[str, Any] = {
        "command": "drop",
        "config": config | {"model": str(model)},
        "target": target,
        "calibration": data.describe(),
        "parameters": {"dense": before, "dropped": after},
    }
    record |= {f"drop_{kind}_list": list(choice.spec.layers(kind)) for kind in ("attn", "mlp")}
    result = DropResult(record, choice.rows, choice.spec, dense)
    show_scores(
        result.rows, f"{model}: {n} of {target} dropped, {before / 1e6:.1f} M -> {after / 1e6:.1f} M parameters"
    )
    if out is not None:
        result.save(out, format=format, overwrite=overwrite)
        _say(f"written: {out} ({format})")
    return result


def sparsify(
    model: str,
    *,
    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    out: str | None = None,
    variant: bool = False,
    sparsity_map: str | None = None,
    allocation: Literal["uniform", "owl"] = "uniform",
    owl_spread: float = 0.08,
    owl_threshold: float = 5.0,
    block_size: int = 128,
    damping: float = 0.01,
    calibration: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    perplexity: str | None = None,
    perplexity_windows: int | None = None,
    memory_mb: int = 4096,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> SparsifyResult:
    """Prune weights block by block, with one block of the model in memory at a time, and save a plain checkpoint.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        method: magnitude, wanda, sparsegpt, or structured (whole MLP neurons, physically removed)
        sparsity: share of the weights to remove, from 0 up to, not including, 1
        pattern: N:M, at most N weights are left of every M consecutive inputs (2:4, 4:8); or unstructured, with a sparsity
        out: checkpoint folder to write
        variant: of wanda, one threshold for a matrix on the share of each row's score that is lost
        sparsity_map: YAML file, glob pattern of module names -> share or N:M; the last that matches counts, 0 leaves a module alone
        allocation: uniform, or owl (blocks with more outliers lose less)
        owl_spread: of owl, how far a block's sparsity may be from the mean
        owl_threshold: of owl, how many times the mean score makes an outlier
        block_size: of sparsegpt, columns of a block
        damping: of sparsegpt, relative to the mean of the Hessian's diagonal
        calibration: self (text that the model samples, for which it is loaded whole), a text, JSON or JSONL file, a data set id (c4, wikitext2), or none (magnitude only)
        samples: calibration samples, by default 128 from a text and 32 from the model
        seq_len: tokens of a sample and of a perplexity window, by default 2048, and 256 of what the model samples; never past its context
        batch_size: samples at a time, by default as many as make 2048 tokens (on a GPU 8192); models with fused experts take one at a time
        seed: of the calibration's choice
        perplexity: text, JSON or JSONL file to measure perplexity on, before and after
        perplexity_windows: take only so many windows of it
        memory_mb: memory for hidden states, in MB; more are kept on disk
        dtype: of the computation, which must hold the checkpoint's; auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id
        trust_remote_code: run code that comes with the model
        cache: keep self-sampled calibration text for the next call
        dry_run: say what would be pruned, with memory and time estimated, and write no checkpoint
        resume: continue an interrupted run
        overwrite: replace an existing checkpoint folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals()) | {"model": str(model)}
    from prunescope.jobs.sparsify import run_sparsify

    return run_sparsify(config)


def layerwise(
    dense: str,
    target: str | None = None,
    *,
    out: str | None = None,
    prompts: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    lens: Literal["raw", "final-norm"] = "raw",
    metric_temperature: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_eos: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    memory_mb: int = 512,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> LayerwiseResult:
    """Compare h, z and p after every sublayer at every decoding step, in the same context.

    Args:
        dense: the base model
        target: a model, a checkpoint, or drop:attn=3,5;mlp=7 on the dense model; left out, every sublayer is dropped in turn
        out: run folder to write
        prompts: JSONL with a field prompt, or one prompt a line; left out, the 15 shipped ones
        chat: put each prompt into the model's chat template
        max_new_tokens: decoding steps at most; a text ends earlier at an end-of-text token
        lens: how logits come from an inner stream; raw is W h (the paper), final-norm is W norm(h)
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        temperature: sampling temperature of the dense text; 0 is greedy
        top_k: sample from the k likeliest tokens only; 0 is off
        top_p: sample from the likeliest tokens of this total probability only
        ignore_eos: write on behind an end-of-text token, as the paper's code does
        seed: of the sampling and the bootstrap
        batch_size: prompts at a time
        memory_mb: memory that the metrics may use, in MB
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        trust_remote_code: run code that comes with the model
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    from contextlib import nullcontext

    from prunescope.compare.layerwise import check_comparable, encode, layerwise_rows, run_key
    from prunescope.data.prompts import read_prompts
    from prunescope.models.dropping import DropSpec
    from prunescope.models.generating import Sampling
    from prunescope.models.loading import load_model
    from prunescope.report.terminal import show_layerwise
    from prunescope.runs.provenance import describe_target, run_record

    started = time.monotonic()
    _check_counts(batch_size=batch_size, memory_mb=memory_mb)
    _check_seed(seed)
    if not metric_temperature > 0:
        raise UserError(f"--metric-temperature {metric_temperature}: it must be positive")
    if out is not None:
        results.check_free(out, overwrite=overwrite, resume=resume)
    chosen = read_prompts(prompts)
    sampling = Sampling(temperature, top_k, top_p, seed)
    sampling.check()
    spec = (
        DropSpec.parse(target.removeprefix("drop:")) if isinstance(target, str) and target.startswith("drop:") else None
    )
    options: Any = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    base = load_model(dense, revision=revision, **options)
    other = load_model(target, **options) if target is not None and spec is None else None
    check_comparable(base, other or spec)
    encoded = encode(base, chosen, max_new_tokens, chat=chat)
    if resume and out is not None and Path(out).exists():
        settings = (max_new_tokens, sampling, not ignore_eos, batch_size, lens, metric_temperature)
        return _finished(out, run_key(base, other or spec, encoded, *settings))
    if out is not None:
        results.require_space(out, 2 * len(encoded) * max_new_tokens * 2 * len(base.anatomy) * 60 * 8 + 2**24)
    with results.staged(out, overwrite=overwrite, resume=resume) if out is not None else nullcontext() as staging:
        try:
            found = layerwise_rows(
                base, other or spec, encoded, max_new_tokens=max_new_tokens, sampling=sampling, stop=not ignore_eos, batch_size=batch_size,
                lens=lens, temperature=metric_temperature, memory=memory_mb * 2**20, parts=staging,
            )  # fmt: skip
        except FloatingPointError as error:
            raise UserError(
                f"{dense}: {error} after a sublayer; the model's activations overflow in {base.dtype}, try --dtype float32"
            ) from error
        info = {
            **run_record("layerwise", config, base, describe_target(base, other or spec), started),
            "key": found.key,
            "prompts": [{"id": prompt.id, "kind": prompt.kind} for prompt in chosen],
            "steps": sum(len(s.continuation) for s in found.sequences),
            "noise_floor": found.floor,
            **_summaries(found.table, seed),
        }
        samples = [
            {
                "prompt": i,
                "id": p.id,
                "kind": p.kind,
                "text": p.text,
                "prompt_tokens": s.prompt,
                "dense_tokens": s.continuation,
                "dense": base.tokenizer.decode(s.continuation),
                "dense_pieces": [base.tokenizer.decode([token]) for token in s.continuation],
            }
            for i, (p, s) in enumerate(zip(chosen, found.sequences, strict=True))
        ]
        result = LayerwiseResult(info, found.table, samples)
        if staging is not None:
            result._write(staging)
    show_layerwise(result.table(), info)
    if out is not None:
        _say(f"written: {out}")
    return result


def generate(
    dense: str,
    target: str,
    *,
    out: str | None = None,
    prompts: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    regime: Literal["both", "free-running", "teacher-forced"] = "both",
    metric_temperature: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_eos: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    memory_mb: int = 512,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> GenerateResult:
    """Let both models write and compare h, z and p at every step: on their own texts, and on the dense model's.

    Args:
        dense: the base model
        target: a model with the same vocabulary, a checkpoint, or drop:attn=3,5;mlp=7 on the dense model
        out: run folder to write
        prompts: JSONL with a field prompt, or one prompt a line; left out, the 15 shipped ones
        chat: put each prompt into the model's chat template
        max_new_tokens: decoding steps at most; a text ends earlier at an end-of-text token
        regime: free-running (each model reads its own text), teacher-forced (the target reads the dense one's), or both
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        temperature: sampling temperature; 0 is greedy
        top_k: sample from the k likeliest tokens only; 0 is off
        top_p: sample from the likeliest tokens of this total probability only
        ignore_eos: write on behind an end-of-text token, as the paper's code does
        seed: of the sampling, the same draws for both models, and of the bootstrap
        batch_size: prompts at a time
        memory_mb: memory that the metrics may use, in MB
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        trust_remote_code: run code that comes with the model
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    from prunescope.jobs.generate import run_generate

    result = run_generate(config)
    if out is not None:
        _say(f"written: {out}")
    return result


def mcq(
    dense: str,
    target: str,
    *,
    out: str | None = None,
    questions: str | None = None,
    template: Literal["cue", "paper", "chat"] = "cue",
    shots: int = 0,
    subjects: str | None = None,
    limit: int | None = None,
    metric_temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    memory_mb: int = 512,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> McqResult:
    """Ask both models multiple-choice questions: the whole vocabulary against the answer options, accuracy, flips.

    Args:
        dense: the base model
        target: a model with the same vocabulary, a checkpoint, or drop:attn=3,5;mlp=7 on the dense model
        out: run folder to write
        questions: JSONL with question, choices and answer, an MMLU CSV file, or a folder of them; left out, the 72 shipped ones
        template: cue ends in "Answer:", paper is question and options only, chat is the model's chat template
        shots: solved examples before each question, from the folder's dev files
        subjects: of an MMLU folder, names with commas between them
        limit: take only the first so many questions
        metric_temperature: temperature T of p = softmax(z / T) in the metrics; accuracy does not depend on it
        seed: of the bootstrap
        batch_size: questions at a time
        memory_mb: memory that the metrics may use, in MB
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        trust_remote_code: run code that comes with the model
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    from prunescope.jobs.generate import run_mcq

    result = run_mcq(config)
    if out is not None:
        _say(f"written: {out}")
    return result


def retrieve(
    dense: str,
    target: str,
    *,
    out: str | None = None,
    corpus: str | None = None,
    queries: str | None = None,
    qrels: str | None = None,
    split: str = "test",
    pooling: Literal["mean", "last", "weighted-mean"] = "mean",
    instruction: str | None = None,
    append_eos: bool = False,
    max_length: int = 512,
    depth: int = 1000,
    recall_at: str = "10,100",
    seed: int = 0,
    batch_size: int = 16,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> RetrieveResult:
    """Search a corpus with the pooled hidden states of both models: nDCG@10, recall, MAP, agreement of the rankings.

    Args:
        dense: the base model, or an embedding model made of one (weights without an output head load too)
        target: a model with the same vocabulary, a checkpoint, or drop:attn=3,5;mlp=7 on the dense model
        out: run folder to write
        corpus: BEIR folder with corpus.jsonl, queries.jsonl and qrels/, or the corpus file alone; left out, the shipped corpus
        queries: queries.jsonl, where it is not in the folder
        qrels: qrels file, tab-separated, or the folder of them, where it is not in the folder
        split: which qrels of a folder
        pooling: mean of all tokens, last token (E5-Mistral), or weighted-mean (SGPT, later tokens weigh more)
        instruction: what queries are for; a query is then read as Instruct: ... and Query: ... on two lines, passages as they are
        append_eos: end every text in an end-of-text token, if the tokenizer does not
        max_length: tokens of a text, special ones included; the rest is cut
        depth: passages that a ranking keeps; MAP is counted over them
        recall_at: cut-offs of recall, with commas between them
        seed: of the bootstrap
        batch_size: texts at a time
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        trust_remote_code: run code that comes with the model
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    from prunescope.jobs.retrieve import run_retrieve

    result = run_retrieve(config)
    if out is not None:
        _say(f"written: {out}")
    return result


def evaluate(
    models: list[str],
    *,
    tasks: str = "quick",
    out: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    max_new_tokens: int | None = None,
    data: str | None = None,
    allow_code_execution: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> EvaluateResult:
    """Score models on tasks, the built-in quick ones or those of lm-evaluation-harness, and compare each with the first, item by item.

    Args:
        models: the dense model, then any others; drop:attn=3,5;mlp=7 drops from the first
        tasks: names with commas between them: quick, quick-gen, quick-mc or a quick task; any task of lm-evaluation-harness (gsm8k, mmlu, ...); a .jsonl file with question and answer, and choices if any
        out: run folder to write
        limit: take only the first so many items of each task; a quick task has 100
        shots: solved examples before each item; left out, the task's own number
        max_new_tokens: tokens that a generative task of the harness may write at most; left out, the task's own number
        data: folder of local files for the harness's tasks; left out, they come from the Hugging Face hub
        allow_code_execution: run programs that the models write (humaneval, mbpp), in a sandbox
        seed: of the quick tasks' items, of the harness's choice of shots, and of bootstraps
        batch_size: items at a time
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the first model)
        trust_remote_code: run code that comes with a model
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    from prunescope.jobs.evaluate import run_evaluate

    result = run_evaluate(config)
    if out is not None:
        _say(f"written: {out}")
    return result


def speed(
    models: list[str],
    *,
    out: str | None = None,
    batch_size: str = "1,8",
    length: int = 128,
    max_new_tokens: int = 32,
    repeats: int = 5,
    sparse_kernels: bool = False,
    seed: int = 0,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> SpeedResult:
    """Measure what each model costs: parameters, bytes on disk and in memory, cache, prefill and decode tokens a second.

    Args:
        models: models and checkpoints, the dense one first; drop:attn=3,5;mlp=7 drops from the first
        out: run folder to write
        batch_size: texts at a time, several with commas between them
        length: tokens of a prompt
        max_new_tokens: tokens written behind it
        repeats: how often each time is measured, after a warm-up; the median counts
        sparse_kernels: run 2:4 weights with PyTorch's semi-structured kernels (CUDA, bfloat16 or float16)
        seed: of the random prompts
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the first model)
        trust_remote_code: run code that comes with the model
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals())
    config["models"], config["batch_size"] = [str(model) for model in models], str(batch_size)
    from prunescope.speed.measure import run_speed

    result = run_speed(config)
    if out is not None:
        _say(f"written: {out}")
    return result


def sweep(
    model: str,
    *,
    out: str | None = None,
    target: str | None = None,
    n: str | None = None,
    method: str | None = None,
    sparsity: str | None = None,
    pattern: str | None = None,
    tasks: str = "quick",
    limit: int | None = None,
    shots: int | None = None,
    data: str | None = None,
    allow_code_execution: bool = False,
    prompts: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 32,
    metric_temperature: float = 1.0,
    calibration: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    workers: int = 1,
    ray_address: str | None = None,
    seed: int = 0,
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> SweepResult:
    """Task scores against the number of dropped sublayers, or against sparsity, with h, z and p of the same points.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        out: run folder to write; a point is kept there as soon as it is measured
        target: what to drop, with commas between: attn, mlp, block, all; attn,mlp,block if nothing else is asked for
        n: how many, such as 0..12, 0..12..4 or 1,2,8; left out, 0..12
        method: how to prune weights, with commas between: magnitude, wanda, sparsegpt (the default)
        sparsity: shares of weights to prune, such as 0.3..0.7 (in steps of 0.1) or 0.5,0.6
        pattern: N:M patterns to prune to, such as 2:4,4:8
        tasks: names with commas between; quick are the built-in pairs, quick-gen and quick-mc one half of them
        limit: items of each task
        shots: solved examples before each item; left out, the task's own number
        data: folder of local task files
        allow_code_execution: run what the model writes, for tasks that need it
        prompts: on what to compare h, z and p: JSONL with a field prompt, or one prompt a line; left out, the 15 shipped ones
        chat: put each of these prompts into the model's chat template
        max_new_tokens: decoding steps at most that are compared on a prompt
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        calibration: self (text the model samples), a text, JSON or JSONL file, or a data set id (c4, wikitext2)
        samples: calibration samples, by default 128 from a text and 32 from the model
        seq_len: tokens of a sample, by default 2048 from a text and 256 from the model, never past its context
        batch_size: items at a time
        workers: processes that share the points through Ray, each with a GPU where there are any
        ray_address: of a running Ray cluster (auto finds one); left out, one is started here for more than one worker
        seed: of tasks, calibration and bootstrap
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id
        trust_remote_code: run code that comes with the model
        cache: keep drop scores and self-sampled text for the next call
        resume: continue an interrupted sweep, or add points to a finished one
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    config = dict(locals()) | {"model": str(model)}
    from prunescope.jobs.sweep import run_sweep

    result = run_sweep(config)
    if out is not None:
        _say(f"written: {out}")
    return result


def report(runs: list[str], *, out: str = "report.html", figures: str | None = None, overwrite: bool = False) -> Path:
    """Make one self-contained page of run folders and checkpoints; it opens from disk with no network.

    Args:
        runs: folders of layerwise, generate, mcq, drop, sparsify or demo
        out: HTML file to write
        figures: folder for publication figures of every view, as SVG, PNG and PDF
        overwrite: replace an existing page and existing figures

    Raises:
        UserError: a folder that is no run, is damaged or of a newer schema; nothing is written.
    """
    from prunescope.report.page.html import expand, open_folder, write_report

    page = Path(out)
    if page.is_dir() or (page.exists() and not overwrite):
        raise UserError(f"{out} exists; choose another --out" + ("" if page.is_dir() else " or give --overwrite"))
    if figures is not None and Path(figures).exists() and not (overwrite and Path(figures).is_dir()):
        raise UserError(f"{figures} exists; choose another --figures or give --overwrite")
    opened = [open_folder(folder) for folder in expand(runs)]
    write_report(opened, page)
    _say(f"written: {out} ({page.stat().st_size / 1e6:.1f} MB)")
    if figures is not None:
        from prunescope.report.figures.publication import draw_publication

        found = [one for one in opened if isinstance(one, results.Run)]
        checkpoints = [(one.folder, one.record) for one in opened if not isinstance(one, results.Run)]
        written = draw_publication(found, checkpoints, Path(figures))
        _say(f"written: {figures} ({len(written)} files)")
    return page


def demo(*, out: str = "prunescope-demo", overwrite: bool = False) -> DemoResult:
    """Drop attention and MLP sublayers of the bundled model and see what breaks; no network, no GPU, a few minutes.

    Args:
        out: folder for checkpoints, run, figures and summary
        overwrite: replace an existing folder

    Raises:
        UserError: the bundled model is missing, or the folder exists.
    """
    from prunescope.demo import run_demo

    return run_demo(out, overwrite=overwrite)


def _finished(out: str, key: str) -> LayerwiseResult:
    """The run that ``--resume`` finds complete. Raises UserError if it was made of other models, prompts or options."""
    run = results.open_run(out)
    if run.info.get("key") != key:
        raise UserError(
            f"{out} is complete, but was made with other models, prompts or options; choose another --out or give --overwrite"
        )
    _say(f"complete already: {out}")
    return LayerwiseResult(run.info, run.table(), run.samples())


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed {seed}: it must be from 0 to {2**31 - 1}")


def _summaries(table: pa.Table, seed: int) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    from prunescope.compare.metrics import H_COLUMNS, P_COLUMNS, Z_COLUMNS

    spaces = {"h": H_COLUMNS, "z": Z_COLUMNS, "p": P_COLUMNS}
    changed, per_kind = {}, {}
    for kind in ("attn", "mlp"):
        rows = table.filter(pc.equal(table["sublayer"], kind))
        moved = rows.filter(pc.or_(pc.not_equal(rows["h_orth_rel"], 0.0), pc.not_equal(rows["h_para_rel"], 0.0)))
        changed[kind] = sorted(pc.unique(moved["layer"]).to_pylist())
        per_kind[kind] = results.summarise(rows.filter(pc.is_in(rows["layer"], moved["layer"])), spaces, seed=seed)
    moved = [
        pc.and_(pc.equal(table["sublayer"], k), pc.is_in(table["layer"], pa.array(v, pa.int32())))
        for k, v in changed.items()
    ]
    rows = table.filter(pc.or_(*moved)) if any(changed.values()) else table
    return {
        "changed_layers": changed,
        "summary_rows": "sublayers that the target changes"
        if any(changed.values())
        else "all, the target changes none",
        "summary": results.summarise(rows, spaces, seed=seed),
        "summary_by_sublayer": per_kind,
    }


def _say(text: str) -> None:
    from prunescope.progress import console

    console.print(text, markup=False)
