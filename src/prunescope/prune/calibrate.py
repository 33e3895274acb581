"""Calibration, streamed: what each matrix reads, block by block, while the text passes through the model once.

A text enters as tokens and is kept as the hidden states ``(samples, length, d)`` in front of the block that is worked on: in memory, or in a
file past a limit. The arguments with which the model calls its blocks (masks, rotary embeddings, ...) are recorded once, by running the
model's own forward with its blocks passing the stream on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel
from prunescope.models.finding import first_output, swap_first_tensor
from prunescope.models.matrices import Matrix, reading
from prunescope.models.streaming import Recorded, recording
from prunescope.prune.picking import ONE_IN, SAMPLED_ROWS, held_out_samples, picked_positions

__all__ = ["InputStatistic", "Text", "gather", "overflow", "rows_held"]

_EXPERT_ROWS = 256  # the same for one expert among many
_HALF = (torch.bfloat16, torch.float16)
_STRIPES = 8  # of the upper triangle of a Gram matrix
_TOGETHER = 16384  # tokens that one product takes on a GPU: their sum is read and written once


class InputStatistic:
    """What is known of the inputs of a matrix: sums that add up, so that they can be gathered in parts.

    Attributes:
        tokens: rows seen.
        squares: ``(n,)`` float32, sum of squares of each input.
        gram: ``(n, n)`` float32, sum of x x^T, or None where it is not asked for. Read it through `hessian`.
        rows: ``(k, n)`` some of the rows, each times the root of how many it stands for; empty where a Gram matrix is gathered.
        held_out: the same of rows that are in none of these sums, to judge by; None where all are in them.
    """

    def __init__(self, width: int, device: torch.device, *, gram: bool) -> None:
        self.tokens = 0
        self.squares = torch.zeros(width, device=device)
        self._gram = torch.zeros(width, width, device=device) if gram else None
        self.rows = torch.zeros(0, width, device=device)
        self.held_out: InputStatistic | None = None
        self._mirrored = not gram
        self._waiting: Tensor | None = None  # (rows_held(n), n), whose first `_held` rows are not in the sum yet
        self._held = 0

    @property
    def gram(self) -> Tensor | None:
        if self._gram is not None and self._waiting is not None and self._held:
            _add_upper_gram(self._gram, self._waiting[: self._held])
            self._held = 0
        return self._gram

    @classmethod
    def empty(cls, tokens: int, rows: torch.Size, device: torch.device, *, gram: bool) -> InputStatistic:
        """To be filled with what another process has gathered of so many tokens, ``rows`` (k, n) of them kept."""
        statistic = cls(rows[1], device, gram=gram)
        statistic.tokens, statistic.rows, statistic._mirrored = tokens, torch.empty(rows, device=device), not gram
        return statistic

    @classmethod
    def uniform(cls, weight: Tensor, *, gram: bool) -> InputStatistic:
        """Stands in for the inputs of a matrix ``(out, in)`` that no token reached: every input alike."""
        statistic = cls(weight.shape[1], weight.device, gram=gram)
        statistic.squares.fill_(1)
        if statistic.gram is not None:
            statistic.gram.diagonal().fill_(1)
        return statistic

    def add(self, x: Tensor, sampled: Tensor | None = None) -> None:
        """Add rows ``x`` ``(tokens, n)``; ``sampled`` are those of them to keep."""
        self.tokens += len(x)
        if self._gram is None:
            self.squares += _sum_of_squares(x)
            if sampled is not None:
                self.rows = torch.cat([self.rows, sampled.float()])
        else:
            self._add_rows(self._gram, x)
            self._mirrored = False

    def _add_rows(self, gram: Tensor, x: Tensor) -> None:
        most = rows_held(len(gram))
        if not _on_tensor_cores(x) or 2 * len(x) >= most:  # copying these would take what a larger product saves
            return _add_upper_gram(gram, x)
        if self._waiting is None:
            self._waiting = x.new_empty(most, len(gram))
        if x.dtype != self._waiting.dtype:
            return _add_upper_gram(gram, x)
        if self._held + len(x) > most:
            _ = self.gram  # adds the rows that wait
        self._waiting[self._held : self._held + len(x)] = x
        self._held += len(x)

    def hold_out(self, x: Tensor) -> None:
        """Add rows ``x`` ``(tokens, n)`` to those that are only judged by; here Gram matrices alone are gathered."""
        if self.held_out is None:
            self.held_out = InputStatistic(len(self.squares), self.squares.device, gram=True)
        self.held_out.add(x)

    def add_held_out(self) -> None:
        """Nothing is held out any longer: it is a part of the sums."""
        held, self.held_out = self.held_out, None
        if held is not None:
            self.merge(held)

    def merge(self, other: InputStatistic) -> None:
        """Add what another part of the calibration text gave."""
        if self.held_out is None:
            self.held_out = other.held_out
        elif other.held_out is not None:
            self.held_out.merge(other.held_out)
        self.tokens += other.tokens
        self.squares += other.squares
        self.rows = torch.cat([self.rows, other.rows])
        if self.gram is not None and other.gram is not None:
            self.gram.add_(other.gram)
            self._mirrored = False

    def hessian(self) -> Tensor:
        """``(n, n)`` float32, sum of x x^T, symmetric. The same memory as ``gram``."""
        if self.gram is None:
            raise ValueError("no Gram matrix was gathered")
        self._waiting = None
        for low, high in [] if self._mirrored else _stripes(self.gram):
            square = self.gram[low:high, low:high]
            square.copy_(square.triu() + square.triu(1).T)
            self.gram[high:, low:high] = self.gram[low:high, high:].T
        self._mirrored = True
        return self.gram

    def norm(self) -> Tensor:
        """``(n,)`` float32, root mean square of each input."""
        squares = self.squares if self.gram is None else self.gram.diagonal()
        return (squares / max(1, self.tokens)).sqrt()

    def finite(self) -> bool:
        return bool(torch.isfinite(self.squares if self.gram is None else self.gram.diagonal()).all())

    def relative_error(self, old: Tensor, new: Tensor) -> float:
        """``||(W - W') X|| / ||W X||`` (Frobenius) over the tokens seen, or over the rows kept; NaN without any."""
        lost, whole = (self._energy(weight.float()) for weight in (old.float() - new.float(), old))
        return math.sqrt(lost / whole) if whole > 0 else math.nan

    def _energy(self, weight: Tensor) -> float:
        if self.gram is not None and self.gram.device.type == "cuda":
            return max(0.0, _energy_by_half(weight, self.gram))
        if self.gram is not None:
            return max(0.0, float(((weight @ self.hessian()) * weight).sum(dtype=torch.float64)))
        return float((self.rows @ weight.T).square().sum(dtype=torch.float64))


def rows_held(n: int) -> int:
    """Rows of n inputs in half precision that wait at most on a GPU, to be multiplied together: never more memory than their Gram matrix."""
    return min(_TOGETHER, 2 * n)


def _on_tensor_cores(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in _HALF


def _stripes(gram: Tensor) -> list[tuple[int, int]]:
    n = len(gram)
    size = max(64, -(-n // _STRIPES))
    if gram.device.type == "cuda":  # fewer and wider where n is small, and whole tiles of a product
        size = -(-max(n // 16, min(n, 1792)) // 128) * 128
    return [(low, min(low + size, n)) for low in range(0, n, size)]


def _energy_by_half(weight: Tensor, gram: Tensor) -> float:
    """``sum((weight @ H) * weight)`` from the upper triangle of H alone: each pair of inputs once, in float32."""
    total = torch.zeros((), dtype=torch.float64, device=gram.device)
    for low, high in _stripes(gram):
        square = gram[low:high, low:high].triu()
        square.diagonal().mul_(0.5)
        product = weight[:, low:high] @ square
        total += (product * weight[:, low:high]).sum(dtype=torch.float64)
        if high < len(gram):
            product = weight[:, low:high] @ gram[low:high, high:]
            total += (product * weight[:, high:]).sum(dtype=torch.float64)
    return 2 * float(total)


def _sum_of_squares(x: Tensor) -> Tensor:
    """``(n,)`` float32."""
    if _on_tensor_cores(x):  # one reading of x, and nothing of its size in float32
        norm: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)
        return norm.square()
    return x.float().square().sum(0)


def _add_upper_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper triangle, in float32. Below the diagonal only the stripes' own squares are kept up."""
    if x.device.type == "cuda" and x.dtype in _HALF:  # tensor cores: exact products, float32 sums, added in place
        for low, high in _stripes(gram):
            part = gram[low:high, low:]
            torch.addmm(part, x[:, low:high].T, x[:, low:], out_dtype=torch.float32, out=part)
        return
    x = x.float()
    for low, high in _stripes(gram):
        gram[low:high, low:].addmm_(x[:, low:high].T, x[:, low:])


class Text:
    """Tokens on their way through the model: hidden states in front of the block that is next.

    Args:
        tokens: ``(samples, length)`` int64.
        batch_size: samples that run at a time.
        used: ``(samples, length)`` bool, the places whose inputs `gather` adds up; None for all.
        limit: bytes of hidden states to hold in memory; more are kept in ``file``.
        whole: samples of the text that this one is a part of, of which it has those from ``first`` on.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        tokens: Tensor,
        batch_size: int,
        limit: int,
        file: Path,
        used: Tensor | None = None,
        whole: int | None = None,
        first: int = 0,
    ) -> None:
        self.whole, self.first = len(tokens) if whole is None else whole, first
        self.streamed = streamed
        self.tokens = tokens
        self.used = used
        self.batches = [(i, min(i + batch_size, len(tokens))) for i in range(0, len(tokens), batch_size)]
        self._recorded = Recorded()
        width, dtype = streamed.loaded.anatomy.hidden_size, streamed.model.dtype
        self._shape = (tokens.shape[1], width)
        self._dtype = dtype
        self._row_bytes = tokens.shape[1] * width * dtype.itemsize
        self._file = file if self._row_bytes * len(tokens) > limit else None
        self._memory = (
            torch.empty(len(tokens), *self._shape, dtype=dtype, device=streamed.device) if self._file is None else None
        )
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
        self._embed()

    @property
    def spilled(self) -> bool:
        return self._file is not None

    def hidden(self, low: int, high: int) -> Tensor:
        """Samples ``low`` to ``high``: ``(high - low, length, d)`` on the model's device."""
        if self._memory is not None:
            return self._memory[low:high]
        assert self._file is not None
        buffer = torch.empty((high - low) * self._row_bytes, dtype=torch.uint8)
        with self._file.open("rb") as file:
            file.seek(low * self._row_bytes)
            file.readinto(memoryview(buffer.numpy()))  # type: ignore[arg-type]
        return buffer.view(self._dtype).view(high - low, *self._shape).to(self.streamed.device)

    def _store(self, low: int, hidden: Tensor) -> None:
        if self._memory is not None:
            self._memory[low : low + len(hidden)] = hidden
            return
        assert self._file is not None
        with self._file.open("r+b") as file:
            file.seek(low * self._row_bytes)
            file.write(memoryview(hidden.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]

    @torch.no_grad()
    def _embed(self) -> None:
        """Hidden states in front of block 0, and the arguments of every block for every batch."""
        with recording(self.streamed, self._recorded) as record:
            for low, high in self.batches:
                self._store(low, record(input_ids=self.tokens[low:high].to(self.streamed.device), use_cache=False))

    @torch.no_grad()
    def run(
        self, layer: int, *, keep: bool, before: Callable[[int], None] | None = None, advance: Callable[[int], None]
    ) -> None:
        """Run block ``layer``, whose weights are in memory, on the whole text.

        Args:
            keep: whether its outputs become the hidden states in front of the next block.
            before: called in front of each batch with its number of samples; ``advance`` behind it, with the same.
        Raises:
            FloatingPointError: the block's output holds NaN or infinite values.
        """
        block = self.streamed.loaded.anatomy.blocks[layer].module
        for (low, high), calls in zip(self.batches, self._recorded.calls, strict=True):
            if before is not None:
                before(high - low)
            args, kwargs = calls[layer]
            hidden = self.hidden(low, high)
            args, kwargs = swap_first_tensor(args, kwargs, hidden)
            out = first_output(block(*args, **kwargs))
            if keep:
                if not torch.isfinite(out).all():
                    raise FloatingPointError(f"the output of block {layer} holds NaN or infinite values")
                self._store(low, out)
            advance(high - low)

    @torch.no_grad()
    def first_output(self, layer: int) -> Tensor:
        """What block ``layer``, whose weights are in memory, makes of the first batch: ``(batch, length, d)``."""
        args, kwargs = self._recorded.calls[0][layer]
        args, kwargs = swap_first_tensor(args, kwargs, self.hidden(*self.batches[0]))
        return first_output(self.streamed.loaded.anatomy.blocks[layer].module(*args, **kwargs)).clone()

    def perplexity(self, advance: Callable[[int], None]) -> float:
        """Perplexity of the tokens, once every block has run: exp of the mean of -log p of each token but a sample's first."""
        losses = self.losses(advance)
        return self.perplexity_of(
            [value for window in losses for value in window], len(self.tokens) * (self.tokens.shape[1] - 1)
        )

    @staticmethod
    def perplexity_of(losses: Sequence[float], count: int) -> float:
        """Of ``count`` tokens, from the sums of -log p that `losses` gives."""
        total = 0.0
        for value in losses:
            total += value
        return math.exp(total / count) if total / count < 700 else math.inf

    @torch.no_grad()
    def losses(self, advance: Callable[[int], None]) -> list[list[float]]:
        """Of every sample, sums of -log p over some tokens at a time, once every block has run."""
        anatomy = self.streamed.loaded.anatomy
        found: list[list[float]] = []
        for i, ids in enumerate(self.tokens.to(self.streamed.device)):
            hidden = self.hidden(i, i + 1)[0, :-1]
            found.append([])
            for rows, targets in zip(hidden.split(256), ids[1:].split(256), strict=True):
                logits = anatomy.logits(rows[None])[0].float()
                found[-1].append(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()))
            advance(1)
        return found

    def close(self) -> None:
        """Let go of memory and file."""
        self._memory = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def gather(
    text: Text,
    layer: int,
    matrices: Sequence[Matrix],
    *,
    gram: bool,
    advance: Callable[[int], None],
    hold_out: bool = False,
) -> tuple[dict[str, InputStatistic], dict[str, str]]:
    """Run block ``layer`` on the text as it stands and gather what its matrices read.

    Args:
        hold_out: one sample in four apart, to judge by; of the tokens that reach an expert, every fourth. Goes with ``gram``.
    Returns:
        Statistics by the name of the first matrix of each shared input; and for every matrix that ran, the name of that first one.
    Raises:
        UserError: a matrix reads NaN or infinite values, or a matrix that is not an expert's never ran.
    """
    statistics: dict[str, InputStatistic] = {}
    shares: dict[str, str] = {}
    samples, length = text.whole, text.tokens.shape[1]
    picked, stands_for = (t.to(text.streamed.device) for t in picked_positions(samples, length))
    running = samples_done = 0
    counted: Tensor | None = None  # of the running batch, which rows are added up
    apart = held_out_samples(text.whole)[text.first :].to(text.streamed.device)

    def see(matrix: Matrix, entering: Tensor, first: Matrix) -> None:
        if shares.setdefault(matrix.name, first.name) != first.name:
            raise UserError(
                f"{matrix.name} shares its input in one batch and not in another; this architecture is not supported"
            )
        if first is not matrix:
            return
        width = entering.shape[-1]
        rows = entering.detach().reshape(-1, width)
        if matrix.name not in statistics:
            statistics[matrix.name] = InputStatistic(width, rows.device, gram=gram)
        sampled = None
        one = statistics[matrix.name]
        judging: Tensor | None = None
        if hold_out and len(rows) == running * length:
            judging = apart[samples_done - running : samples_done].repeat_interleave(length)
        elif hold_out:  # an expert's
            seen = one.tokens + (0 if one.held_out is None else one.held_out.tokens)
            judging = torch.arange(seen, seen + len(rows), device=rows.device) % ONE_IN == ONE_IN - 1
        if text.used is not None:
            if len(rows) != running * length or counted is None:
                raise UserError(
                    f"{matrix.name} reads some of the tokens only, as an expert does; calibrate on another text than traces"
                )
            rows = rows[counted]
            judging = None if judging is None else judging[counted]
            if not gram and len(rows):
                few = min(-(-SAMPLED_ROWS // samples) * running, len(rows))
                picks = torch.linspace(0, len(rows) - 1, few).round().long()
                sampled = rows[picks].float() * math.sqrt(len(rows) / few)
        elif not gram and len(rows) == running * length:
            sampled = (rows.view(running, length, width)[:, picked].float() * stands_for.sqrt()[:, None]).flatten(0, 1)
        elif not gram and len(rows):  # an expert's: some of what it got
            few = min(-(-_EXPERT_ROWS // samples), len(rows))
            sampled = rows[torch.linspace(0, len(rows) - 1, few).round().long()].float() * math.sqrt(len(rows) / few)
        if judging is not None:
            one.hold_out(rows[judging])
            rows = rows[~judging]
        one.add(rows, sampled)

    with reading(matrices, see) as start:

        def before(batch: int) -> None:
            nonlocal running, samples_done, counted
            running = batch
            if text.used is not None:
                counted = text.used[samples_done : samples_done + batch].flatten().to(text.streamed.device)
            samples_done += batch
            start()

        text.run(layer, keep=False, before=before, advance=advance)
    fused = [matrix for matrix in matrices if matrix.fused]
    if fused and not any(matrix.name in shares for matrix in fused):
        raise UserError(
            f"{fused[0].parameter}: the products of these experts cannot be followed; this architecture is not supported"
        )
    for matrix in matrices:
        if matrix.name not in shares and not matrix.fused:
            raise UserError(
                f"{matrix.name} is never applied to the calibration text; this architecture is not supported"
            )
    for name, statistic in statistics.items():
        if not statistic.finite() or not (statistic.held_out is None or statistic.held_out.finite()):
            raise UserError(
                f"{text.streamed.loaded.ref}: NaN or infinite values enter {name} (block {layer}); {overflow(text.streamed.model.dtype)}"
            )
    return statistics, shares


def overflow(dtype: torch.dtype) -> str:
    """What to do about activations that overflow."""
    if dtype in (torch.float32, torch.float64):
        return f"the model itself overflows in {dtype} on this text; give another text"
    return f"the activations overflow in {dtype}, try --dtype float32"
