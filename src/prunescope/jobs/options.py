"""What the options of all commands have in common: checks, loading, the folder that is written. Each stands here once.

A command's options are a frozen dataclass beside its job, with a field for every parameter of its public function. `LoadOptions` and
`OutputOptions` are groups that many commands share; in `config.yaml` and `run.json` their fields stand among the others. No torch on
import: `report` does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from prunescope.errors import UserError
from prunescope.progress import console
from prunescope.runs.folder import Run, check_free, open_run, require_space, staged

if TYPE_CHECKING:
    from prunescope.models.loaded import LoadedModel
    from prunescope.runs.workers import Workers

__all__ = ["DType", "Group", "LoadOptions", "Model", "Options", "OutputOptions", "SpreadOptions", "Stream", "listed"]

DType = Literal["auto", "float32", "float64", "bfloat16", "float16"]
Stream: TypeAlias = bool | Literal["auto"]  # whether models stay on disk; auto: where they do not fit into the memory
Model: TypeAlias = "str | LoadedModel"  # a reference, see `load_model`, or a model that is loaded already
_LEAST = {  # of whole numbers, in whatever command they are options
    **dict.fromkeys(("batch_size", "memory_mb", "limit", "samples", "max_length", "depth"), 1),
    **dict.fromkeys(("length", "repeats", "block_size", "perplexity_windows", "shares"), 1),
    "shots": 0,
    "generations": 0,
}


@dataclass(frozen=True)
class Group:
    """Options that belong together."""

    def config(self) -> dict[str, Any]:
        """By name, as `config.yaml` and `run.json` keep them: groups flat, a loaded model as its reference."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            found |= value.config() if isinstance(value, Group) else {field.name: _written(value)}
        return found


def _written(value: Any) -> Any:
    if isinstance(value, list):
        return [_written(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


@dataclass(frozen=True)
class LoadOptions(Group):
    """How models are loaded."""

    dtype: DType
    device: str
    revision: str | None  # of the dense model
    trust_remote_code: bool
    adapter: str | None = None  # to merge into the dense model
    dequantise: bool = False  # packed weights as dense floats

    def config(self) -> dict[str, Any]:
        return {
            name: value for name, value in super().config().items() if name not in ("adapter", "dequantise") or value
        }

    def load(self, ref: Model, *, headless: bool = False) -> LoadedModel:
        """The dense model, which ``revision`` is of."""
        return self._load(ref, self.revision, self.adapter, headless)

    def load_other(self, ref: Model, *, headless: bool = False) -> LoadedModel:
        """Any other model."""
        return self._load(ref, None, None, headless)

    def _load(self, ref: Model, revision: str | None, adapter: str | None, headless: bool) -> LoadedModel:
        from prunescope.models.loading import load_model

        loaded = load_model(
            ref, dtype=self.dtype, device=self.device, revision=revision, adapter=adapter, trust_remote_code=self.trust_remote_code,
            headless=headless, dequantise=self.dequantise,
        )  # fmt: skip
        loaded.recall.look_again()
        return loaded


@dataclass(frozen=True)
class SpreadOptions(Group):
    """Who computes: one process, or several that share the prompts."""

    workers: int
    ray_address: str | None

    @property
    def spread(self) -> bool:
        return self.workers > 1 or self.ray_address is not None

    def check(self) -> None:
        """Raises UserError."""
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: it must be at least 1")
        if self.ray_address is not None:
            from prunescope.runs.workers import require_ray

            require_ray()

    @property
    def hindrance(self) -> str | None:
        """Why models cannot stay on disk."""
        return (
            "one process reads the blocks; leave out --stream, or --workers and --ray-address" if self.spread else None
        )

    def refuse(self, option: str, why: str) -> None:
        """Raises UserError if anything is shared, with ``option`` that does not go with it."""
        if self.spread:
            raise UserError(f"{option}: {why}; leave out {option}, or --workers and --ray-address")

    @contextmanager
    def started(
        self,
        load: Callable[..., tuple[Any, ...]],
        models: list[Model | None],
        loading: LoadOptions,
        dense: LoadedModel,
        **how: Any,
    ) -> Iterator[Workers | None]:
        """The workers, None where this process does everything.

        Args:
            load: a module's function of the models as the user named them, ``loading`` and ``how``; runs in every worker.
            dense: the dense model here.
        Raises:
            UserError: a model that only this process has, or what `prunescope.runs.workers` raises.
        """  # fmt: skip
        if not self.spread:
            yield None
            return
        from prunescope.models.placing import refuse_sharded
        from prunescope.runs import workers

        for model in models:
            if model is not None and not isinstance(model, str):
                raise UserError(
                    f"{model}: every worker loads its own; give the model's folder or name, or leave --workers out"
                )
        refuse_sharded(dense.ref, dense.model, "--workers", "each takes one GPU: leave --workers out")
        own = replace(loading, device="cuda") if loading.device.startswith("cuda") else loading  # a worker sees one GPU
        loads = partial(load, *models, own, **how)
        if self.ray_address is None:
            with workers.processes(self.workers, loads, dense.device) as found:
                yield found
        else:
            with workers.ray_actors(self.workers, loads, self.ray_address, loading.device != "cpu") as found:
                yield found


@dataclass(frozen=True)
class OutputOptions(Group):
    """The folder that a command writes, if any."""

    out: str | None
    overwrite: bool
    resume: bool | None = None  # None where a command cannot go on with an interrupted run

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in super().config().items() if name != "resume" or value is not None}

    def check(self) -> None:
        """Say early that the folder is taken. Raises UserError."""
        if self.out is not None:
            check_free(self.out, overwrite=self.overwrite, resume=bool(self.resume))

    def require_space(self, needed: int) -> None:
        """Raise UserError if the disk has less than ``needed`` bytes free."""
        if self.out is not None:
            require_space(self.out, needed)

    @contextmanager
    def staged(self, *, keep_parts: bool = False) -> Iterator[Path | None]:
        """The folder to write into until it is complete, see `prunescope.runs.folder.staged`; None where nothing is to be written."""
        if self.out is None:
            yield None
            return
        with staged(self.out, overwrite=self.overwrite, resume=bool(self.resume), keep_parts=keep_parts) as staging:
            yield staging

    def exists(self) -> bool:
        """Whether ``--resume`` finds a folder of this name, which then is complete."""
        return bool(self.resume) and self.out is not None and Path(self.out).expanduser().exists()

    def complete(self, key: str, made_with: str = "other models, prompts or options") -> Run | None:
        """The run that ``--resume`` finds complete. Raises UserError if it was made of something else, which ``made_with`` names."""
        if not self.exists():
            return None
        run = open_run(str(self.out))
        if run.info.get("key") != key:
            raise UserError(
                f"{self.out} is complete, but was made with {made_with}; choose another --out or give --overwrite"
            )
        return run

    def say_complete(self) -> None:
        console.print(f"complete already: {self.out}", markup=False)

    def say_written(self, note: str = "") -> None:
        if self.out is not None:
            console.print(f"written: {self.out}{note}", markup=False)


@dataclass(frozen=True)
class Options(Group):
    """Base of the options of every command."""

    LEAST: ClassVar[Mapping[str, int]] = _LEAST

    def check(self) -> None:
        """What can be said before anything is read or loaded. Raises UserError."""
        for field in fields(self):
            value, option = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            least = self.LEAST.get(field.name)
            if least is not None and isinstance(value, int) and value < least:
                raise UserError(f"{option} {value}: it must be at least {least}")
            if field.name == "seed" and not 0 <= value < 2**31:
                raise UserError(f"{option} {value}: it must be from 0 to {2**31 - 1}")
            if field.name == "metric_temperature" and not value > 0:
                raise UserError(f"{option} {value}: it must be positive")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (OutputOptions, SpreadOptions)):
                value.check()


def listed(text: str) -> list[str]:
    """The names in a comma-separated option."""
    return [name.strip() for name in text.split(",")]
