"""What the commands return. Results know how to show and save themselves, and nothing of how they were found; no torch on import."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunescope.errors import UserError
from prunescope.runs.folder import Run, check_free, require_space, staged, write_config
from prunescope.runs.result import Draw, Result, RunResult, StrPath

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import pyarrow as pa

    from prunescope.models.dropping import DropSpec
    from prunescope.models.loaded import LoadedModel
    from prunescope.prune.compensate import Fold
    from prunescope.sweep.tables import Tables

__all__ = [
    "AdviseResult",
    "DemoResult",
    "DivergenceResult",
    "DropResult",
    "EvaluateResult",
    "GenerateResult",
    "HealResult",
    "LayerwiseResult",
    "McqResult",
    "RetrieveResult",
    "SparsifyResult",
    "SpeedResult",
    "SweepResult",
]


CURVES = "curves.parquet"  # of a healed checkpoint

# --- run folders -------------------------------------------------------------------------------------------------------


class LayerwiseResult(RunResult):
    """What `layerwise` found: a row per prompt, step, position, layer and sublayer, with every metric.

    ``summary`` says per space and column: mean, median, min, max, percentiles, confidence interval.
    """

    def drawing(self) -> Draw:
        from prunescope.report.figures.layerwise import draw_layerwise

        return draw_layerwise


class GenerateResult(RunResult):
    """What `generate` found: a row per prompt, regime and step, with the tokens of both models and every metric.

    ``summary`` is per space and column, of the free-running steps where there are any.
    """

    def drawing(self) -> Draw:
        from prunescope.report.figures.generation import draw_generation

        return draw_generation


class McqResult(RunResult):
    """What `mcq` found: two rows a question, the whole vocabulary and the options, with metrics, log-likelihoods, choices and margins.

    ``summary`` is per space and column over the whole vocabulary; that of the options is in ``info["summary_by_space"]``.
    """

    def drawing(self) -> Draw:
        from prunescope.report.figures.mcq import draw_mcq

        return draw_mcq


class DivergenceResult(RunResult):
    """What `divergence` found: a row per scored token, with every column and the five most likely tokens of both models.

    ``summary`` is per column; llama.cpp's table is ``info["table"]``, the same by groups of tokens ``info["by"]``, and ``samples()`` are the
    passages that diverge most.
    """

    def drawing(self) -> Draw:
        from prunescope.report.figures.divergence import draw_divergence

        return draw_divergence


@dataclass
class RetrieveResult(RunResult):
    """What `retrieve` found: a row a query, with the measures of both models, the agreement of their rankings and the h columns of the
    query's embedding. ``summary`` is per column: ``h`` and ``retrieval``."""

    rankings: dict[str, dict[str, list[tuple[str, float]]]] = field(default_factory=dict, repr=False)
    """``dense`` and ``target``: of each query the passages and their cosines, best first."""

    @classmethod
    def of_run(cls, run: Run) -> Self:
        from prunescope.compare.retrieval import read_rankings

        return cls(run.info, run.table(), run.samples(), read_rankings(run.folder))

    def write(self, folder: Path, *, figures: bool = True) -> None:
        from prunescope.compare.retrieval import write_rankings

        write_rankings(folder, self.rankings)
        super().write(folder, figures=figures)

    def drawing(self) -> Draw:
        from prunescope.report.figures.retrieval import draw_retrieval

        return draw_retrieval


@dataclass
class EvaluateResult(RunResult):
    """What `evaluate` found: a row per model, task and item, with the score, what was answered and what is right.

    ``summary`` is model -> task -> metric, kind, value, stderr, ci95, n, chance; differences from the first model are in ``info["paired"]``.
    """

    harness: dict[str, Any] = field(default_factory=dict, repr=False)
    """What lm-evaluation-harness itself returned, by task; empty for a run that was read from its folder."""

    def write(self, folder: Path, *, figures: bool = True) -> None:
        from prunescope.report.terminal.scoring import summary_page

        if self.harness:
            from prunescope.tasks.harness import write_harness

            labels = list(self.summary)
            for name, found in self.harness.items():
                write_harness(folder / "harness", name, labels[int(name.partition("-")[0])], found)
        (folder / "summary.md").write_text(summary_page(self.info), "utf-8")
        super().write(folder, figures=figures)


class SpeedResult(RunResult):
    """What `speed` measured: a row per model and batch size, with parameters, bytes, seconds with their spread and floor, tokens a second
    and the gain over the first model. ``summary`` is per model and batch size."""


class AdviseResult(RunResult):
    """What `advise` found: a row per point, with what it saves, what it keeps of the use, the fit with its interval, and the verdict.
    ``summary`` has the best point, the command that makes it, and the advice in sentences."""


class SweepResult(RunResult):
    """What `sweep` measured: a row per point and task, with the score, its interval, chance, and what was lost against the dense model.

    ``summary`` has the dense scores, the points at which half was lost, and the columns that predict best.
    """

    def __init__(self, info: dict[str, Any], tables: Tables) -> None:
        super().__init__(info, tables.sweep)
        self.all_tables = tables
        """All tables of the folder: `table`, `items`, `metrics`, `correlations`."""

    @classmethod
    def of_run(cls, run: Run) -> Self:
        from prunescope.sweep.tables import Tables

        return cls(run.info, Tables.of_run(run))

    def items(self) -> pa.Table:
        """A row per point, task and item: score, prediction, gold."""
        return self.all_tables.items

    def metrics(self) -> pa.Table:
        """A row per point and column of h, z and p: the mean over the steps of the dense model's texts."""
        return self.all_tables.metrics

    def correlations(self) -> pa.Table:
        """A row per outcome and column: rank correlation of the column's mean with what was lost, over points."""
        return self.all_tables.correlations

    def tables(self) -> dict[str, pa.Table]:
        return self.all_tables.named()

    def drawing(self) -> Draw:
        from prunescope.report.figures.sweep import draw_sweep

        found = self.all_tables
        return lambda _, info, __, folder: draw_sweep(found.sweep, found.metrics, found.correlations, info, folder)


# --- checkpoints -------------------------------------------------------------------------------------------------------


@dataclass
class DropResult(Result):
    """What `drop` chose: a row per candidate (layer, sublayer, score, dropped). ``info`` is the record of the checkpoint.

    ``summary`` has the drop lists and the parameters before and after.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    spec: DropSpec
    _dense: LoadedModel = field(repr=False)
    _folds: Sequence[Fold] = field(default=(), repr=False)  # of `--compensate`

    @property
    def record(self) -> dict[str, Any]:
        return self.info

    def table(self) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_pylist(self.rows)

    @property
    def summary(self) -> dict[str, Any]:
        return {key: self.info[key] for key in ("drop_attn_list", "drop_mlp_list", "parameters")}

    def save(
        self, folder: StrPath, *, format: Literal["recipe", "zeroed", "compact"] = "recipe", overwrite: bool = False
    ) -> Path:
        """Write a checkpoint folder. Raises UserError if it exists, or if the format cannot hold this drop."""
        from prunescope.models.saving import checkpoint_bytes

        check_free(folder, overwrite=overwrite)
        require_space(folder, checkpoint_bytes(self._dense, format))
        with staged(folder, overwrite=overwrite) as staging:
            self.write(staging, format)
        return Path(folder).expanduser()

    def write(self, folder: Path, format: Literal["recipe", "zeroed", "compact"] = "recipe") -> None:
        from prunescope.models.saving import save_dropped
        from prunescope.prune.compensate import check_format, folded

        check_format(bool(self.info.get("compensated")), format)
        write_config(folder, self.info["config"])
        with folded(self._dense, self._folds):
            save_dropped(self._dense, self.spec, folder, format, {**self.info, "scores": self.rows})


@dataclass
class SparsifyResult(Result):
    """What `sparsify` did: a row per matrix (for `structured`, per MLP, for `experts`, per block) with the sparsity asked and reached, relative error, dead inputs
    and damping. ``info`` is the record of the checkpoint.

    ``summary`` has the method, the sparsity over all pruned matrices, and perplexity before and after where it was measured.
    """

    folder: Path | None
    """Of the checkpoint, kept only as long as this object where no ``out`` was given; None after a dry run."""

    @property
    def record(self) -> dict[str, Any]:
        return self.info

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.info["modules"])

    def table(self) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_pylist(self.rows)

    @property
    def summary(self) -> dict[str, Any]:
        return {key: self.info[key] for key in ("method", "sparsity", "perplexity")}

    def save(self, folder: StrPath, *, overwrite: bool = False) -> Path:
        """Copy the checkpoint to another folder. Raises UserError if it exists, or after a dry run."""
        if self.folder is None:
            raise UserError("a dry run leaves no checkpoint to save; run it without dry_run")
        require_space(folder, sum(path.stat().st_size for path in self.folder.iterdir()))
        with staged(folder, overwrite=overwrite) as staging:
            self.write(staging)
        return Path(folder).expanduser()

    def write(self, folder: Path) -> None:
        assert self.folder is not None
        for path in self.folder.iterdir():
            shutil.copyfile(path, folder / path.name)


@dataclass
class HealResult(Result):
    """What `heal` did: a row per step with tokens, loss, learning rate, length of the gradient and, at checks, the held-out divergence.
    ``info`` is the record of the checkpoint.

    ``summary`` has the held-out divergence before, at its best and as written, the step of the best, and the tokens that were read.
    """

    folder: Path
    """Of the checkpoint, kept only as long as this object where no ``out`` was given."""
    _curves: pa.Table = field(repr=False)

    @property
    def record(self) -> dict[str, Any]:
        return self.info

    def table(self) -> pa.Table:
        return self._curves

    @property
    def summary(self) -> dict[str, Any]:
        return {key: self.info[key] for key in ("kl", "best_step", "steps", "tokens")}

    def save(self, folder: StrPath, *, overwrite: bool = False) -> Path:
        """Copy the checkpoint to another folder. Raises UserError if it exists."""
        require_space(folder, sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()))
        with staged(folder, overwrite=overwrite) as staging:
            self.write(staging)
        return Path(folder).expanduser()

    def write(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@dataclass
class DemoResult(Result):
    """The demo's folder, its two checkpoints, its layerwise run (rows, summary and samples are that run's), and what was found in three
    sentences."""

    folder: Path
    sentences: list[str]
    layerwise: LayerwiseResult
    drops: dict[str, DropResult]

    def table(self) -> pa.Table:
        return self.layerwise.table()

    @property
    def summary(self) -> dict[str, Any]:
        return self.layerwise.summary

    def samples(self) -> list[dict[str, Any]]:
        return self.layerwise.samples()

    def save(self, folder: StrPath, *, overwrite: bool = False) -> Path:
        """Copy the demo's folder. Raises UserError if the other one exists."""
        with staged(folder, overwrite=overwrite) as staging:
            self.write(staging)
        return Path(folder).expanduser()

    def write(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
