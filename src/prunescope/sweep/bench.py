"""Measure points of a sweep on one model in memory: change it in place, score tasks, compare it with the dense model, change it back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from torch import Tensor

from prunescope.compare.context import Transcript
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.packed import named_tensors, nonzero
from prunescope.models.quantised import Quantised, QuantSpec
from prunescope.progress import progress
from prunescope.prune.inplace import DenseWeights, pruned_in_place
from prunescope.sweep.advice import AGREEMENT
from prunescope.sweep.comparison import DenseReference
from prunescope.sweep.correlations import COUNTED
from prunescope.sweep.points import Point
from prunescope.sweep.storage import Storage
from prunescope.sweep.tables import Measured
from prunescope.tasks import quick
from prunescope.tasks.evaluate import evaluate_model, expand_tasks
from prunescope.tasks.scores import ITEMS_SCHEMA, at_floor, score

__all__ = ["Bench", "SweepPlan"]


@dataclass
class SweepPlan:
    """Everything that decides what a point gives, apart from the model; it goes to every worker as it is."""

    tasks: list[str]
    evaluation: dict[str, Any]  # options of `evaluate_model`
    texts: list[Transcript]  # what the dense model wrote
    comparing: dict[str, Any]  # options of `DenseReference`
    specs: dict[str, DropSpec]  # of the points that drop sublayers, by their names
    calibration: Tensor | None = field(default=None, repr=False)  # where weights are pruned
    healed: dict[str, str] = field(default_factory=dict)  # folder of each healed point, by its name
    sparse_bytes: bool = False  # whether zeros are left out of the bytes of a point


class Bench:
    """A dense model with what is needed to measure points on it. Between two points the model is dense, bit for bit."""

    def __init__(self, loaded: LoadedModel, plan: SweepPlan) -> None:
        self.loaded, self.plan = loaded, plan
        self.reference = DenseReference(loaded, plan.texts, **plan.comparing)
        self._dense = DenseWeights(loaded) if plan.calibration is not None else None
        self._weights = self._nonzero()
        self.storage = Storage(loaded, plan.sparse_bytes)
        self._quantised: Quantised | None = None  # the dense weights in the last format asked for

    def measure(self, point: Point, stage: str = "") -> Measured:
        """Everything about ``point``. Raises UserError where it cannot be made or scored."""
        started = time.monotonic()
        self._quantise(point)
        with self.pruned(point):
            left = self._nonzero()  # before anything is rounded: a weight that becomes zero in a format is not removed
            with self._rounded(point):
                model = self._healed(point) if point.healed else self.loaded
                scores, items = _evaluated(model, self.plan, stage or point.title)
                compared = self.reference.compare(model, None if model is self.loaded else self.loaded)
        if AGREEMENT in self.plan.tasks:
            alike = self.reference.agreement(compared)
            scores[AGREEMENT] = score(alike["score"].to_pylist(), "top1_agree", "generative", 0.0, 0) | {
                "at_floor": None
            }
            items = pa.concat_tables([items, alike])
        info: dict[str, Any] = point.columns() | {
            "dropped": str(self.plan.specs.get(point.name, DropSpec())),
            COUNTED: 1 - left / self._weights,
            "bytes": self.bytes_of(point),
            "scores": scores,
            "metrics": self.reference.summary(compared),
            "seconds": round(time.monotonic() - started, 3),
        }
        return Measured(info, items)

    def bytes_of(self, point: Point) -> int:
        """Bytes of its weights as they would be stored, see `Storage`."""
        quant = None if point.quant is None else QuantSpec.parse(point.quant)
        with self.loaded.dropping(self.plan.specs.get(point.name, DropSpec())):
            return self.storage.bytes(quant, point.goal)

    @contextmanager
    def at(self, point: Point) -> Iterator[None]:
        """The model at ``point`` for the length of a ``with`` block."""
        self._quantise(point)
        with self.pruned(point), self._rounded(point):
            yield

    @contextmanager
    def pruned(self, point: Point) -> Iterator[None]:
        """The model with what ``point`` drops or prunes, not yet quantised."""
        if point.method is not None:
            assert self._dense is not None and self.plan.calibration is not None
            with pruned_in_place(self.loaded, self._dense, point.method, point.goal, self.plan.calibration):  # type: ignore[arg-type]
                yield
        else:
            with self.loaded.dropping(self.plan.specs.get(point.name, DropSpec())):
                yield

    def _healed(self, point: Point) -> LoadedModel:
        """What healing wrote, in the dtype and on the device of the dense model."""
        dtype = str(self.loaded.dtype).removeprefix("torch.")
        found = load_model(self.plan.healed[point.name], dtype=dtype, device=str(self.loaded.device))
        if found.dropped != self.plan.specs[point.name]:
            raise UserError(
                f"{found.ref}: {found.dropped} is dropped there, not {self.plan.specs[point.name]}; heal it again"
            )
        return found

    def _quantise(self, point: Point) -> None:
        """Have the dense weights in the point's format ready, unless it is pruned weights that are quantised."""
        if point.quant is None or point.method is not None:
            return
        spec = QuantSpec.parse(point.quant)
        if self._quantised is None or self._quantised.spec != spec:
            self._quantised = None  # frees the last one first
            self._quantised = Quantised(self.loaded, spec)

    @contextmanager
    def _rounded(self, point: Point) -> Iterator[None]:
        """Its matrices in the point's format: the dense ones where sublayers are dropped, pruned ones where weights are."""
        if point.quant is None:
            yield
            return
        spec = QuantSpec.parse(point.quant)
        quantised = self._quantised if point.method is None else Quantised(self.loaded, spec)
        assert quantised is not None
        with quantised.applied():
            yield

    def _nonzero(self) -> int:
        """Weights of the blocks' matrices that are there and not zero; of packed ones, which may be buffers, every number that is held counts."""
        held = [t for b in self.loaded.anatomy.blocks for _, t in named_tensors(b.module) if t.dim() >= 2]
        return sum(map(nonzero, held))


def _evaluated(loaded: LoadedModel, plan: SweepPlan, stage: str) -> tuple[dict[str, Any], pa.Table]:
    """Scores by task, each with why it says nothing of pruning if this is the dense model (None if it does); and the items."""
    tasks = [task for task in plan.tasks if task != AGREEMENT]
    if not tasks:
        return {}, pa.Table.from_pylist([], schema=ITEMS_SCHEMA)
    items = _quick_items(tasks, plan.evaluation["limit"])
    bar = progress(stage, items) if items and sys.stderr.isatty() else nullcontext(None if not items else _silent)
    with bar as advance:
        found = evaluate_model(loaded, tasks, **plan.evaluation, advance=advance)
    return {task: {**score, "at_floor": at_floor(score)} for task, score in found.scores.items()}, found.items


def _quick_items(tasks: list[str], limit: int | None) -> int:
    """Items of a point, where they are known beforehand; 0 where a task is the harness's, which then shows its own progress."""
    names = expand_tasks(tasks)
    if any(name not in quick.QUICK for name in names):
        return 0
    return len({quick.pair_of(name) for name in names}) * (limit or quick.DEFAULT_ITEMS)


def _silent(done: int) -> None: ...
