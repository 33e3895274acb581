"""Comparison step by step while both models write (the paper, section 7.1): on their own texts, and on the dense model's text.

*Free-running*: each model reads its own continuation. *Teacher-forced*: the target reads the dense model's. Both compare what the
heads read (the final states, after the final norm), the logits and the probabilities of one step. The states are caught while the models
write, so that nothing is computed twice. Up to and including the first step at which the tokens differ the two regimes are the
same comparison of the same context, and share their row; only behind it is the target run once more, over the dense text, in one
batched pass.

The divergence of a step has then two parts: the teacher-forced one is what the target gets wrong in the dense model's context,
the rest of the free-running one is what its own history adds (the paper, Eq. 67).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY, compare_final
from prunescope.compare.context import (
    Changed,
    TargetModel,
    Transcript,
    check_memory,
    check_pair,
    final_head,
    largest,
    mark_under_floor,
    read_states,
    run_key,
    switched,
)
from prunescope.compare.metrics import COLUMNS
from prunescope.compare.texts import first_difference
from prunescope.models.generating import Sampling, choose, continue_texts, decoding_way, uniform_draws
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress
from prunescope.runs.parts import begin, computed, joined, notes_of, with_notes
from prunescope.runs.workers import Compute, Workers, sharing

__all__ = ["FREE", "TEACHER", "GenerationRows", "Regime", "generation_key", "generation_passes", "generation_rows"]

FREE, TEACHER = "free-running", "teacher-forced"
Regime = Literal["both", "free-running", "teacher-forced"]
_CONFIDENCE = ("confidence_dense", "confidence_target")
_FORCED = "nll_target_of_dense"
TOP = 5  # most likely tokens kept of each model and step
_TOPS = ("top_dense", "top_dense_p", "top_target", "top_target_p")
_COLUMNS = ["prompt", "regime", "step", "position", "dense_token", "target_token", *COLUMNS, *_CONFIDENCE, *_TOPS]
_FLOOR_PROMPTS, _FLOOR_STEPS = 2, 16


@dataclass
class GenerationRows:
    """What `generation_rows` found."""

    table: pa.Table
    dense: list[Transcript]
    target: list[Transcript] | None  # None if only teacher-forced
    floor: dict[str, Any] = field(repr=False)
    decoding: dict[str, str] = field(default_factory=dict, repr=False)  # how each side was written, see `decoding_way`


# --- the states that the heads read ------------------------------------------------------------------------------------


@dataclass
class _Written:
    """A batch of texts with the final state at every step, ``(steps, batch, d)``."""

    texts: list[list[int]]
    states: Tensor


@torch.no_grad()
def _write(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    first: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop: bool,
    recall: bool = False,
) -> _Written:
    """Let the model write, and keep the last position's state of every step."""
    states: list[Tensor] = []
    texts = continue_texts(
        loaded, prompts, max_new_tokens, batch_size=len(prompts), sampling=sampling, stop=stop,
        numbers=range(first, first + len(prompts)), see=states.append, recall=recall,
    )  # fmt: skip
    return _Written(texts, states[0])


@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    sampling: Sampling
    stop: bool
    regime: Regime
    temperature: float
    memory: int


# --- one batch ---------------------------------------------------------------------------------------------------------


class _Batch:
    """Both models on a batch of prompts: texts, states, and then rows."""

    def __init__(
        self,
        dense: LoadedModel,
        target: Changed,
        prompts: Sequence[list[int]],
        first: int,
        settings: _Settings,
        given: Sequence[list[int]] | None = None,
    ) -> None:
        self.dense, self.first, self.settings, self.given = dense, first, settings, given is not None
        how = (first, settings.max_new_tokens, settings.sampling, settings.stop)
        if given is not None:
            self.decoding = {"dense": "given"}
            self.ours = [Transcript(list(p), t) for p, t in zip(prompts, given, strict=True)]
            self.our_states = self.written_states = read_states(dense, self.ours, recall=True)
        else:
            self.decoding = {"dense": decoding_way(dense)}
            written = _write(dense, prompts, *how, recall=True)
            self.ours = [Transcript(list(p), t) for p, t in zip(prompts, written.texts, strict=True)]
            self.our_states = self.written_states = _of_sequences(written)
        self.theirs: list[Transcript] | None = None
        self.their_states: list[Tensor] = []
        with switched(dense, target) as self.of_target:
            if settings.regime != TEACHER:
                self.decoding["target"] = decoding_way(self.of_target)
                written = _write(self.of_target, prompts, *how)
                self.theirs = [Transcript(list(p), t) for p, t in zip(prompts, written.texts, strict=True)]
                self.their_states = _of_sequences(written)
            self.forced_states = self._force() if settings.regime != FREE else []

    def _force(self) -> list[Tensor]:
        """The target's states on the dense texts. Where it has read the same tokens already, these are the same states."""
        shared = [self._shared(i) for i in range(len(self.ours))]
        behind = [i for i, sequence in enumerate(self.ours) if shared[i] < len(sequence.continuation)]
        found = (
            dict(zip(behind, read_states(self.of_target, [self.ours[i] for i in behind]), strict=True))
            if behind
            else {}
        )
        if self.theirs is None:
            # nothing was written by the target: read both, so that equal models are equal to the bit
            if not self.given and self.of_target is not self.dense:
                self.our_states = read_states(self.dense, self.ours, recall=True)
            return [found[i] for i in range(len(self.ours))]
        return [
            torch.cat([self.their_states[i][: shared[i]], found[i][shared[i] :]])
            if i in found
            else self.their_states[i][: shared[i]]
            for i in range(len(self.ours))
        ]

    def _shared(self, i: int) -> int:
        """How many steps have the same context in both regimes: those up to and including the first that differs."""
        if self.theirs is None:
            return 0
        ours, theirs = self.ours[i].continuation, self.theirs[i].continuation
        step = first_difference(ours, theirs)
        return len(ours) if step is None else min(step + 1, len(ours), len(theirs))

    def table(self) -> pa.Table:
        """Rows of both regimes. Every dense state is projected once, and every target state too."""
        free = self.theirs is not None
        rows: list[tuple[int, int, str]] = []  # prompt, step, regime, in the order of the table
        for i, sequence in enumerate(self.ours):
            if self.theirs is not None:
                steps = min(len(sequence.continuation), len(self.theirs[i].continuation))
                rows += [(i, t, FREE) for t in range(steps)]
            if self.settings.regime != FREE:
                rows += [(i, t, TEACHER) for t in range(self._shared(i), len(sequence.continuation))]
        rows.sort(key=lambda row: row[:2])
        table = self._rows(rows)
        if free and self.settings.regime != FREE:
            table = pa.concat_tables(
                [table, _same_context(table, [self._shared(i) for i in range(len(self.ours))], self.first)]
            )
        return table.select(_COLUMNS).sort_by([(key, "ascending") for key in ("prompt", "regime", "step")])

    def _rows(self, rows: list[tuple[int, int, str]]) -> pa.Table:
        settings = self.settings
        starts = torch.tensor([0, *(len(s.continuation) for s in self.ours)]).cumsum(0)
        prompts, steps = (torch.tensor([row[k] for row in rows]) for k in (0, 1))
        states = {FREE: self.their_states, TEACHER: self.forced_states}
        ours = torch.tensor([self.ours[i].continuation[t] for i, t, _ in rows])
        theirs = torch.tensor(
            [self.theirs[i].continuation[t] if self.theirs and regime == FREE else -1 for i, t, regime in rows]
        )
        draws = uniform_draws(
            settings.sampling, range(self.first, self.first + len(self.ours)), settings.max_new_tokens
        )

        def taken(part: slice, z: Tensor, z_target: Tensor) -> dict[str, Tensor]:
            asked = (theirs[part] < 0).nonzero()[:, 0]  # on the dense text: which token would the target take?
            token = theirs[part].clone()
            at = prompts[part][asked], steps[part][asked]
            token[asked] = choose(z_target[asked.to(z.device)], settings.sampling, draws[at]).cpu()
            return {"target_token": token}

        columns = compare_final(
            torch.cat(self.our_states),
            _picked(states, rows),
            final_head(self.dense),
            final_head(self.of_target),
            starts[prompts] + steps,
            temperature=settings.temperature,
            next_token=ours,
            next_token_target=torch.where(theirs < 0, ours, theirs),
            also=taken if bool((theirs < 0).any()) else None,
            tops=TOP,
            memory=settings.memory,
        )
        width = torch.tensor([len(s.prompt) for s in self.ours])
        keys = {
            "prompt": prompts + self.first,
            "step": steps,
            "position": width[prompts] - 1 + steps,
            "dense_token": ours,
            "target_token": columns.get("target_token", theirs),
        }
        arrays = {name: pa.array(values.int().numpy()) for name, values in keys.items()}
        arrays["regime"] = pa.array([regime for _, _, regime in rows], pa.string())
        arrays |= {name: pa.array(list(columns[name].numpy())) for name in _TOPS}
        return pa.table(arrays | {name: pa.array(columns[name].numpy()) for name in (*COLUMNS, *_CONFIDENCE, _FORCED)})


def _picked(states: dict[str, list[Tensor]], rows: list[tuple[int, int, str]]) -> Tensor:
    """``(rows, d)``: of each row its prompt, step and regime, of each regime the states of its prompts. One copy, however many rows."""
    starts: dict[str, list[int]] = {}
    before = 0
    for regime, parts in states.items():
        starts[regime] = [before := before + size for size in (0, *map(len, parts))]
    at = [starts[regime][i] + t for i, t, regime in rows]
    joined = torch.cat([part for parts in states.values() for part in parts])
    return joined[torch.tensor(at, device=joined.device)]


def _of_sequences(written: _Written) -> list[Tensor]:
    return [written.states[: len(text), i] for i, text in enumerate(written.texts)]


def _same_context(rows: pa.Table, shared: list[int], first: int) -> pa.Table:
    """The free-running rows whose context is the dense one, as teacher-forced rows."""
    steps, prompts, regimes = (rows[name].to_pylist() for name in ("step", "prompt", "regime"))
    same = [r == FREE and t < shared[i - first] for i, t, r in zip(prompts, steps, regimes, strict=True)]
    found = rows.filter(pa.array(same, pa.bool_()))
    regime = pa.array([TEACHER] * len(found), pa.string())
    found = found.set_column(found.column_names.index("regime"), "regime", regime)
    # at the first difference the token that follows is another in the target's own text than in the dense one
    return found.set_column(found.column_names.index("nll_target"), "nll_target", found[_FORCED])


def generation_key(dense: LoadedModel, target: TargetModel, prompts: Sequence[list[int]], *settings: Any) -> str:
    """A hash of everything that decides the rows of a run."""
    return run_key(dense, target, prompts, "generate", *settings)


def generation_rows(
    dense: LoadedModel,
    target: Changed,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: bool = True,
    regime: Regime = "both",
    batch_size: int = 8,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    parts: Path | None = None,
    key: str = "",
    texts: Sequence[list[int]] | None = None,
    workers: Workers | None = None,
) -> GenerationRows:
    """Compare two models at every step while they write, or on texts that are given.

    Args:
        dense: the dense model, nothing dropped.
        target: a loaded model of the same vocabulary, or the dense model changed: a `DropSpec` or a `Variant`.
        prompts: token ids, from `encode`.
        max_new_tokens: steps at most; a text ends earlier at an end-of-text token if ``stop``.
        sampling: how both choose their tokens; step t of prompt i uses the same uniform number in both.
        regime: free-running, teacher-forced or both.
        batch_size: prompts at a time, left-padded while they are written.
        temperature: metric temperature T, independent of the sampling temperature.
        memory: bytes for the metrics, see `compare_final`.
        parts, key: folder for finished batches, and what they must have been made from (`generation_key`).
        texts: continuations that both models read instead of writing any; teacher-forced only.
        workers: who share the batches, each with both models of its own; None computes all here.
    Raises:
        UserError: models that cannot be compared, or parts of another run.
        FloatingPointError: a NaN or infinite logit.
    """
    check_pair(dense, target)
    check_memory(memory, dense, target)
    settings = _Settings(max_new_tokens, sampling, stop, regime, temperature, memory)
    begin(parts, key)
    assert texts is None or regime == TEACHER
    make = partial(_batches, prompts=prompts, texts=texts, settings=settings)
    with progress(f"{len(prompts)} prompts, up to {max_new_tokens} steps of both models", len(prompts)) as advance:
        tables = computed(
            parts, len(prompts), batch_size, make(dense, target), lambda numbers: advance(len(numbers)), sharing(workers, make)
        )  # fmt: skip
    notes = [notes_of(table) for table in tables]
    ours, theirs = ([text for note in notes for text in note[side] or []] for side in ("dense", "target"))
    table = joined(tables)
    return GenerationRows(
        mark_under_floor(table, notes[0]["floor"]["floor"]),
        [Transcript(list(p), t) for p, t in zip(prompts, ours, strict=True)],
        None if regime == TEACHER else [Transcript(list(p), t) for p, t in zip(prompts, theirs, strict=True)],
        notes[0]["floor"],
        notes[0].get("decoding", {}),
    )


def _batches(
    dense: LoadedModel, target: Changed, *, prompts: Sequence[list[int]], texts: Sequence[list[int]] | None, settings: _Settings
) -> Compute:  # fmt: skip
    """Numbers of prompts -> their table, with the texts, and the noise floor of the first batch, in its notes."""

    def rows(numbers: Sequence[int]) -> pa.Table:
        given = None if texts is None else [list(texts[i]) for i in numbers]
        batch = _Batch(dense, target, [prompts[i] for i in numbers], numbers[0], settings, given)
        notes: dict[str, Any] = {
            "dense": [s.continuation for s in batch.ours],
            "target": None if batch.theirs is None else [s.continuation for s in batch.theirs],
        }
        if not numbers[0]:
            notes |= {"floor": _noise_floor(batch), "decoding": batch.decoding}
        return with_notes(batch.table(), notes)

    return rows


def generation_passes(
    prompts: Sequence[list[int]], texts: Sequence[list[int]], batch_size: int
) -> tuple[list[list[Transcript]], list[list[Transcript]]]:
    """The batches of given texts that `generation_rows` lets both models read, and those that the dense one reads alone, for its noise floor."""
    given = [Transcript(list(p), list(t)) for p, t in zip(prompts, texts, strict=True)]
    both = [given[i : i + batch_size] for i in range(0, len(given), batch_size)]
    return both, [[text] for text in _looked_at(both[0])]


def _looked_at(texts: Sequence[Transcript]) -> list[Transcript]:
    return [Transcript(s.prompt, s.continuation[:_FLOOR_STEPS]) for s in texts[:_FLOOR_PROMPTS]]


def _noise_floor(batch: _Batch) -> dict[str, Any]:
    """The dense model against itself: its states as it wrote, in a left-padded batch with a cache (of given texts, as it read the batch), and
    from one pass over each text alone.

    Returns:
        ``floor``: per deviation column the largest absolute value; beside it how much was looked at.
    """
    looked_at = _looked_at(batch.ours)
    alone = torch.cat([read_states(batch.dense, [s], recall=True)[0] for s in looked_at])
    written = torch.cat([states[:_FLOOR_STEPS] for states in batch.written_states[:_FLOOR_PROMPTS]])
    head = final_head(batch.dense)
    columns = compare_final(
        alone, written, head, head, temperature=batch.settings.temperature, memory=batch.settings.memory
    )
    return {
        "dtype": str(batch.dense.dtype).removeprefix("torch."),
        "prompts": len(looked_at),
        "steps": len(alone),
        "way": f"{'read in a batch' if batch.given else 'written in a batch with a cache'}, against one pass over the text alone",
        "floor": largest(columns),
    }
