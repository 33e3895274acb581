"""The two sides of a comparison with both models on disk, and the folder that such a run works in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from prunescope.compare.context import Transcript, check_pair, padded
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, OutputOptions
from prunescope.jobs.pair import Pair
from prunescope.models.blockwise import StreamedModel, stream_model
from prunescope.models.dropping import DropSpec
from prunescope.models.streaming import having_read
from prunescope.models.variants import VariantSpec, read_variant
from prunescope.progress import progress
from prunescope.runs.parts import begin

__all__ = ["Sides", "StreamedPair", "sides", "stream_folder"]

CPU = torch.device("cpu")


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
                raise UserError(f"{model}: --stream reads models from disk; give its folder, or leave --stream out")
        spec = read_variant(target)
        if isinstance(spec, VariantSpec):
            raise UserError(
                f"target {spec}: weights are quantised in memory; with --stream give a checkpoint that holds them as floats, or leave --stream out"
            )
        base = stream_model(str(dense), scratch / "dense", experts=None, **options.config())
        if spec is not None or target is None:
            return cls(base, spec)
        other = LoadOptions(options.dtype, options.device, None, options.trust_remote_code, None, options.dequantise)
        return cls(base, stream_model(str(target), scratch / "target", experts=None, **other.config()))

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
def sides(dense: Model, target: Model, loading: LoadOptions, output: OutputOptions, *, stream: bool) -> Iterator[Sides]:
    """Open both models. Raises UserError as `Pair.load`, or as `StreamedPair.open`."""
    if not stream:
        yield Sides(Pair.load(dense, target, loading))
        return
    with stream_folder(output) as folder:
        streamed = StreamedPair.open(dense, target, loading, folder / "scratch")
        yield Sides(streamed.pair, streamed, folder)
