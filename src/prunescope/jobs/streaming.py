"""Whether models stay on disk; the two sides of a comparison where they do, and the folder that such a run works in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from prunescope.compare.context import Transcript, check_pair, padded
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, OutputOptions, Stream
from prunescope.jobs.pair import Pair
from prunescope.models.blockwise import StreamedModel, stream_model
from prunescope.models.dropping import DropSpec
from prunescope.models.finding import hooks
from prunescope.models.fitting import free_bytes, unstreamable, weight_bytes
from prunescope.models.generating import Sampling, continue_texts
from prunescope.models.streaming import having_read
from prunescope.models.variants import VariantSpec, read_variant
from prunescope.progress import console, progress
from prunescope.runs.parts import begin

__all__ = ["UNWRITTEN", "Placement", "Sides", "StreamedPair", "place", "refuse_stream", "sides", "stream_folder", "write_texts"]  # fmt: skip

CPU = torch.device("cpu")
UNWRITTEN = "both models would be read again for every token that they write; give texts with --continuations FILE"
_ROOM = 16  # of the weights' bytes one in so many is kept for hidden states


@dataclass(frozen=True)
class Placement:
    """Whether the models of a run stay on disk, and, where that was chosen by itself, why."""

    streamed: bool
    needed: int | None = None  # bytes
    free: int | None = None

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of it."""
        why = {} if self.needed is None else {"needed_bytes": self.needed, "free_bytes": self.free}
        return {"streamed": self.streamed, **why}


def refuse_stream(stream: Stream, hindrance: str | None) -> None:
    """Raise UserError where streaming is asked for and something is in its way."""
    if stream is True and hindrance is not None:
        raise UserError(f"--stream: {hindrance}")


def place(
    stream: Stream,
    dense: Model,
    target: Model | None,
    loading: LoadOptions,
    memory_mb: int = 0,
    hindrance: str | None = None,
) -> Placement:
    """Decide whether the models stay on disk; with ``auto`` they do where they do not fit into the memory that is free, and it is said.

    Args:
        target: a model of its own counts too, one that is the dense one changed does not.
        memory_mb: that the columns may use.
        hindrance: why the command as it was asked for cannot run from disk; it is said where the models do not fit.
    """
    if stream != "auto":
        return Placement(stream)
    models = [model for model in (dense, target) if model is not None and not VariantSpec.names(model)]
    if not all(isinstance(model, str) for model in models):
        return Placement(False)  # loaded already
    free = free_bytes(loading.device)
    if free is None:
        return Placement(False)
    needed = memory_mb * 2**20
    for model in models:
        ours = {"revision": loading.revision, "adapter": loading.adapter} if model is dense else {}
        weights = weight_bytes(
            str(model), dtype=loading.dtype, device=loading.device, enough=(free - needed) // 2, **ours
        )
        if weights is None:
            return Placement(False)
        needed += weights + weights // _ROOM
    if needed <= free:
        return Placement(False)
    why = (unstreamable(str(model), dequantise=loading.dequantise) for model in models)
    hindrance = hindrance or next(filter(None, why), None)
    spec = read_variant(target)
    if hindrance is None and isinstance(spec, VariantSpec):
        hindrance = f"target {spec} is quantised in memory; give a checkpoint that holds it as floats"
    size = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on {loading.device}"
    if hindrance is not None:
        console.print(f"{size}, but blocks cannot be read from disk: {hindrance}", markup=False, highlight=False)
        return Placement(False)
    console.print(f"{size}: blocks are read from disk (--stream false loads the models)", markup=False, highlight=False)
    return Placement(True, needed, free)


@dataclass(frozen=True)
class StreamedPair:
    """``target`` is None where every sublayer of the dense model is dropped in turn."""

    dense: StreamedModel
    target: StreamedModel | DropSpec | None

    @classmethod
    def open(cls, dense: Model, target: Model | None, options: LoadOptions, scratch: Path) -> StreamedPair:
        """Open both sides.

        Args:
            scratch: for what has to be converted before it can be read a block at a time, see `stream_model`.
        Raises:
            UserError: as `stream_model`, and for a model in memory or a target that is made from a dense model in memory.
        """
        for model in (dense, target):
            if model is not None and not isinstance(model, str):
                raise UserError(f"{model}: --stream reads models from disk; give its folder, or give --stream false")
        spec = read_variant(target)
        if isinstance(spec, VariantSpec):
            raise UserError(
                f"target {spec}: weights are quantised in memory; with --stream give a checkpoint that holds them as floats, or give --stream false"
            )
        base = stream_model(str(dense), scratch / "dense", experts=None, prefetch=True, **options.config())
        if spec is not None or target is None:
            return cls(base, spec)
        other = LoadOptions(options.dtype, options.device, None, options.trust_remote_code, None, options.dequantise)
        theirs = stream_model(str(target), scratch / "target", experts=None, prefetch=True, **other.config())
        return cls(base, theirs)

    def close(self) -> None:
        """Unlock what is locked of both models' files; neither is used afterwards."""
        for side in (self.dense, self.target):
            if isinstance(side, StreamedModel):
                side.close()

    @contextmanager
    def having_read(
        self, both: Sequence[Sequence[Transcript]], dense_only: Sequence[Sequence[Transcript]], folder: Path
    ) -> Iterator[None]:
        """Batches of texts read by both models, some by the dense one alone; within the ``with`` block `read_states` has their states."""
        check_pair(self.dense.loaded, self.pair.pruned)
        ours, theirs = ([padded(texts, CPU) for texts in batches] for batches in ([*both, *dense_only], both))
        target = self.target if isinstance(self.target, StreamedModel) else self.dense
        drop = self.target if isinstance(self.target, DropSpec) else None
        blocks = len(self.dense.blocks) + len(target.blocks)
        with ExitStack() as stack:
            with progress(f"{blocks} blocks from disk, {len(ours) + len(theirs)} batches", blocks) as advance:
                stack.enter_context(having_read(self.dense, ours, folder, "dense", advance))
                stack.enter_context(having_read(target, theirs, folder, "target", advance, drop))
            yield

    def bytes_read(self, both: Sequence[Sequence[Transcript]], dense_only: Sequence[Sequence[Transcript]]) -> int:
        """What the hidden states of these texts take on the disk while they are read."""
        tokens = sum(padded(texts, CPU).numel() for texts in (*both, *both, *dense_only))
        width: int = self.dense.loaded.anatomy.hidden_size * self.dense.model.dtype.itemsize
        return 2 * tokens * width  # in front of a block and after it

    @property
    def pair(self) -> Pair:
        """What is known of the two without their weights."""
        return Pair(self.dense.loaded, self.target.loaded if isinstance(self.target, StreamedModel) else self.target)


def write_texts(
    streamed: StreamedModel, prompts: Sequence[list[int]], steps: int, sampling: Sampling, *, stop: bool
) -> list[list[int]]:
    """What a model on disk writes after ``prompts``, at most ``steps`` tokens: all in one batch, every block read anew for each token.

    What that costs is said first.
    """
    loaded = streamed.loaded
    size = sum(p.numel() * p.element_size() for p in streamed.blocks.parameters())
    console.print(
        f"{loaded.ref} writes {len(prompts)} continuations from disk, token by token: up to {steps} times {size / 1e9:.1f} GB are read, about {steps * streamed.seconds:.0f} s at the rate at which it was opened; --continuations FILE gives it texts instead",
        markup=False, highlight=False,
    )  # fmt: skip
    loaded.decoding[str(loaded.dropped)] = "its weights stay on disk"
    with streamed.running(mapped=True), hooks() as handles, progress(f"up to {steps} tokens", steps) as advance:
        handles.append(streamed.blocks[-1].register_forward_hook(lambda *_: advance(1)))
        return continue_texts(loaded, prompts, steps, batch_size=len(prompts), sampling=sampling, stop=stop)


@contextmanager
def stream_folder(output: OutputOptions) -> Iterator[Path]:
    """The folder to work in, a temporary one where nothing is to be written or the run is complete."""
    if output.out is None or output.exists():
        with TemporaryDirectory(prefix="prunescope-") as folder:
            yield Path(folder)
        return
    with output.staged() as staging:
        assert staging is not None
        yield staging
        shutil.rmtree(staging / "scratch", ignore_errors=True)


@dataclass(frozen=True)
class Sides:
    """Both models of a comparison, in memory or, with ``streamed`` and the ``folder`` that is worked in, on disk."""

    pair: Pair
    placement: Placement = Placement(False)
    streamed: StreamedPair | None = None
    folder: Path | None = None

    def bytes_read(self, both: Sequence[Sequence[Transcript]], dense_only: Sequence[Sequence[Transcript]]) -> int:
        """See `StreamedPair.bytes_read`; nothing where the models are in memory."""
        return 0 if self.streamed is None else self.streamed.bytes_read(both, dense_only)

    @contextmanager
    def reading(
        self,
        output: OutputOptions,
        key: str,
        both: Sequence[Sequence[Transcript]],
        dense_only: Sequence[Sequence[Transcript]],
    ) -> Iterator[Path | None]:
        """Within the ``with`` block the models give their states of these texts; gives the folder for finished parts, if there is one."""
        with ExitStack() as stack:
            folder = self.folder or stack.enter_context(output.staged())
            stack.enter_context(self.pair.blaming())
            if self.streamed is not None and folder is not None:
                begin(folder, key)
                stack.enter_context(self.streamed.having_read(both, dense_only, folder))
            yield folder


@contextmanager
def sides(
    dense: Model,
    target: Model,
    loading: LoadOptions,
    output: OutputOptions,
    stream: Stream,
    memory_mb: int,
    hindrance: str | None,
) -> Iterator[Sides]:
    """Open both models, where `place` says. Raises UserError as `Pair.load`, or as `StreamedPair.open`."""
    placement = place(stream, dense, target, loading, memory_mb, hindrance)
    if not placement.streamed:
        yield Sides(Pair.load(dense, target, loading))
        return
    with (
        stream_folder(output) as folder,
        closing(StreamedPair.open(dense, target, loading, folder / "scratch")) as streamed,
    ):
        yield Sides(streamed.pair, placement, streamed, folder)
