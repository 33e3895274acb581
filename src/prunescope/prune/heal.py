"""Heal a pruned model: distil the dense model's distribution into what pruning left, on text that the dense model wrote.

The loss is KL(teacher || student) over the full vocabulary, averaged over the tokens that count (Hinton et al. 2015; on the student's own
text, arXiv 2306.13649). Weights that are zero stay zero and dropped branches stay dropped. Every step follows from the plan, the texts and
the step's number alone, so that an interrupted run goes on with the same numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunescope.data.traces import padded
from prunescope.errors import UserError
from prunescope.files import replacing
from prunescope.models.attending import any_length
from prunescope.models.generating import Sampling, continue_texts
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import final_states
from prunescope.progress import Advance, console
from prunescope.prune.distil_loss import forward_kl
from prunescope.prune.heal_team import add_gradients, check_same, share_state
from prunescope.prune.reconstruct import dense_changes, reconstruction_error
from prunescope.prune.team import ALONE, Team
from prunescope.prune.trainable import Trainable

__all__ = ["HealPlan", "Healed", "Text", "heal", "held_out_kl", "learning_rate", "order"]

_AHEAD = 4  # steps on the student's own text that are written at a time, which takes hardly longer than one
_STATE, _BEST = "part-state.safetensors", "part-best.safetensors"
Text = tuple[Sequence[int], Sequence[int]]  # prompt, continuation; the tokens of the continuation count


@dataclass(frozen=True)
class HealPlan:
    """How a model is healed; see `prunescope.heal`."""

    steps: int
    batch_size: int = 8
    micro_batch: int | None = None  # texts that a process has in memory at a time; changes no number but in rounding
    learning_rate: float = 2e-5
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    on_policy: float = 0.0
    reconstruct: int = 0  # steps of the first stage, before ``steps``
    compile: bool = False  # the blocks, with torch.compile
    check_every: int = 20
    patience: int | None = None
    chunk: int = 1024
    seed: int = 0


@dataclass
class Healed:
    """What healing did: a row a step, and the held-out divergence in nats a token before, at its best, and where."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    kl_before: float = math.nan
    kl_best: float = math.inf
    best_step: int = 0
    waited: int = 0
    tokens: int = 0
    seconds: float = 0.0
    written: list[list[Text]] = field(default_factory=list)  # by the student, for its next steps


# --- schedule and texts --------------------------------------------------------------------------------------------------


def learning_rate(plan: HealPlan, step: int) -> float:
    """Of step 0, 1, ...: linear over the warm-up, then down to zero after the last step (cosine or linear), or constant."""
    warm = max(1, round(plan.warmup * plan.steps)) if plan.warmup else 0
    if step < warm:
        return plan.learning_rate * (step + 1) / warm
    if plan.decay == "constant":
        return plan.learning_rate
    done = (step - warm) / max(1, plan.steps - warm)
    return plan.learning_rate * (1 - done if plan.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


def order(count: int, plan: HealPlan, step: int) -> list[int]:
    """Numbers of the texts of a step: every text once before any comes again, each round in an order of its own."""
    found = []
    for place in range(step * plan.batch_size, (step + 1) * plan.batch_size):
        turn = torch.Generator().manual_seed(plan.seed * 1_000_003 + place // count)
        found.append((place // count, place % count, turn))
    shuffled = {number: torch.randperm(count, generator=turn).tolist() for number, _, turn in found}
    return [shuffled[number][at] for number, at, _ in found]


def _is_own(plan: HealPlan, step: int) -> bool:
    """Whether the student writes the text of this step: evenly spread, ``on_policy`` of all steps."""
    return math.floor((step + 1) * plan.on_policy) > math.floor(step * plan.on_policy)


def _own_texts(student: LoadedModel, texts: Sequence[Text], plan: HealPlan, step: int, team: Team) -> list[list[Text]]:
    """Prompts of ``texts``, continued by the student itself at temperature 1: for this step and the next of its kind, `_AHEAD` in all.
    Each process writes its part; the draws follow from a text's number."""
    last = plan.reconstruct + plan.steps
    steps = [at for at in range(step, last) if _is_own(plan, at - plan.reconstruct)][:_AHEAD]
    asked = [[texts[number] for number in order(len(texts), plan, at)] for at in steps]
    flat = [text for group in asked for text in group]
    most = max(len(continuation) for _, continuation in flat)
    draws = Sampling(1.0, seed=plan.seed + 1)
    mine = team.span(len(flat))
    prompts, numbers = [list(flat[i][0]) for i in mine], [step * plan.batch_size + i for i in mine]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if _on_gpu(student) else nullcontext():
        wrote = continue_texts(student, prompts, most, batch_size=None, sampling=draws, numbers=numbers)
    found = iter([own for part in team.all(wrote) for own in part])
    return [[(prompt, own) for (prompt, _), own in zip(group, found, strict=False) if own] for group in asked]


# --- the loss ------------------------------------------------------------------------------------------------------------


def _states(loaded: LoadedModel, tokens: Tensor, counts: Tensor, compiled: bool = False) -> Tensor:
    """What the head reads where the next token counts, ``(places, d)``."""
    found: list[Tensor] = []
    with final_states(loaded, found.append), _compiled(loaded) if compiled else nullcontext():
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return found[0][:, :-1][counts[:, 1:]]


@contextmanager
def _compiled(loaded: LoadedModel) -> Iterator[None]:
    """Blocks run as torch.compile makes them, for the length of a ``with`` block: norms, rotations and activations of a small model take longer
    than its products, unless they are fused. Blocks of one kind are compiled once."""
    modules: list[Any] = [block.module for block in loaded.anatomy.blocks]
    with torch._dynamo.config.patch(recompile_limit=64):  # kinds of blocks, lengths, with a gradient or not
        for module in modules:
            if not hasattr(module, "_prunescope_compiled"):
                module.__dict__["_prunescope_compiled"] = torch.compile(module._call_impl)
            module._compiled_call_impl = module.__dict__["_prunescope_compiled"]
        try:
            yield
        finally:
            for module in modules:
                module._compiled_call_impl = None


def _divergence(student: LoadedModel, teacher: LoadedModel, texts: Sequence[Text], plan: HealPlan) -> Tensor:
    """The sum over counted tokens of KL(teacher || student)."""
    tokens, counts = (found.to(student.device) for found in padded(texts))
    with torch.no_grad():
        teacher_h = _states(teacher, tokens, counts, plan.compile)
    h = _states(student, tokens, counts, plan.compile)
    trained = [p for p in student.anatomy.head.parameters() if p.requires_grad]
    return forward_kl(student.anatomy.project, h, teacher.anatomy.project, teacher_h, chunk=plan.chunk, weights=trained)


def _read_places(student: LoadedModel, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Token ids and where no padding is, ``(texts, length)``."""
    tokens = padded(texts)[0].to(student.device)
    lengths = torch.tensor([[len(prompt) + len(continuation)] for prompt, continuation in texts], device=student.device)
    return tokens, torch.arange(tokens.shape[1], device=student.device) < lengths


def _changes(student: LoadedModel, teacher: LoadedModel, parts: Sequence[Sequence[Text]], team: Team) -> Tensor | None:
    """What the dense model adds in all texts of a step, by which errors are divided; None where the one part has them all."""
    if team.world == 1 and len(parts) == 1:
        return None
    with _mixed(student):
        found = dense_changes(student, teacher, (_read_places(student, part) for part in parts), student.device)
    team.add([found])
    return found


def _counted(texts: Sequence[Text]) -> int:
    return sum(len(continuation) - (not prompt) for prompt, continuation in texts)


def _micro(texts: Sequence[Text], size: int, team: Team = ALONE) -> Iterator[Sequence[Text]]:
    """This process's texts in groups of ``size``, long ones together, so that little is padded."""
    falling = sorted(texts, key=lambda text: -len(text[0]) - len(text[1]))[team.rank :: team.world]
    for start in range(0, len(falling), size):
        yield falling[start : start + size]


@torch.no_grad()
def held_out_kl(
    student: LoadedModel, teacher: LoadedModel, texts: Sequence[Text], plan: HealPlan, team: Team = ALONE
) -> float:
    """KL(teacher || student) in nats, averaged over the counted tokens of texts that nothing is trained on."""
    size = plan.micro_batch or plan.batch_size
    with _mixed(student):
        mine = sum(float(_divergence(student, teacher, part, plan)) for part in _micro(texts, size, team))
    total = torch.tensor(mine, dtype=torch.float64, device=student.device)
    team.add([total])
    return float(total) / _counted(texts)


@contextmanager
def _mixed(student: LoadedModel) -> Iterator[None]:
    """bfloat16 products on a GPU with float32 weights, and attention that takes batches of new lengths as they come; elsewhere nothing changes."""
    with any_length(), torch.autocast("cuda", torch.bfloat16, enabled=_on_gpu(student), cache_enabled=True):
        yield


# --- the loop ------------------------------------------------------------------------------------------------------------


def heal(
    student: LoadedModel,
    teacher: LoadedModel,
    trained: Trainable,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    plan: HealPlan,
    *,
    folder: Path | None = None,
    key: str = "",
    advance: Advance | None = None,
    team: Team = ALONE,
) -> Healed:
    """Train ``trained``, parameters of ``student``, in place; they are left as they were at the best held-out divergence.

    Args:
        teacher: the dense model; it is only read.
        texts, held_out: to train on and to check on, apart from one another.
        folder: where the state of the run is kept at every check (``part-*``, safetensors), and found by a later call with the same ``key``;
            the first process's alone.
        team: the processes that heal together, with the same arguments but ``folder``; any number goes on with what another began.
    Raises:
        UserError: the state in ``folder`` is of another run; the loss is not finite.
        RuntimeError: processes whose weights differ.
    """
    advance = advance or Advance()
    if student.device.type == "cuda":
        torch.cuda.empty_cache()  # what writing texts left in small pieces would be in the way of every step
    optimiser = torch.optim.AdamW(
        list(trained.parameters.values()), lr=plan.learning_rate, weight_decay=plan.weight_decay,
        fused=student.device.type == "cuda",
    )  # fmt: skip
    done = share_state(team, trained, optimiser, _resume(trained, optimiser, folder, key))
    awaited, team.awaited = team.awaited, False
    advance(len(done.rows))
    started = time.monotonic() - done.seconds
    if not done.rows and math.isnan(done.kl_before):
        done.kl_before = done.kl_best = held_out_kl(student, teacher, held_out, plan, team)
        _keep(folder, _BEST, _weights(trained), {"key": key})
        _say(plan, done, 0, None, done.kl_before)
    in_memory = folder is None and not team.rank
    best = _weights(trained, copy=True) if in_memory else None
    stopped = done.waited >= (plan.patience or math.inf)
    last = plan.reconstruct + plan.steps
    for step in range(len(done.rows), last):
        if stopped:
            break
        if step == plan.reconstruct:  # gradients of another size: its means begin anew
            optimiser.state.clear()
        own = step >= plan.reconstruct and _is_own(plan, step - plan.reconstruct)
        if own:
            done.written = done.written or _own_texts(student, texts, plan, step, team)
            chosen = done.written.pop(0)
        else:
            chosen = [texts[number] for number in order(len(texts), plan, step)]
        row = _step(student, teacher, trained, optimiser, chosen, plan, step, team)
        done.tokens += row["tokens"]
        done.seconds = time.monotonic() - started
        done.rows.append(row | {"on_policy": own, "seconds": done.seconds, "held_out_kl": None})
        advance(1)
        if (step + 1) % plan.check_every and step + 1 not in (plan.reconstruct, last):
            continue
        check_same(team, trained)
        kl = held_out_kl(student, teacher, held_out, plan, team)
        done.rows[-1]["held_out_kl"] = kl
        done.waited += step >= plan.reconstruct
        if kl < done.kl_best:
            done.kl_best, done.best_step, done.waited = kl, step + 1, 0
            best = _weights(trained, copy=True) if in_memory else None
            _keep(folder, _BEST, _weights(trained), {"key": key})
        stopped = done.waited >= (plan.patience or math.inf)
        _save_state(folder, trained, optimiser, done, key)
        advance.note(_say(plan, done, step + 1, row["loss"], kl))
    if folder is not None:
        best = _read(folder / _BEST)[0]
    if best is not None:
        _put(trained, best)
    optimiser.state.clear()
    team.awaited = awaited
    return share_state(team, trained, optimiser, done)


def _step(
    student: LoadedModel,
    teacher: LoadedModel,
    trained: Trainable,
    optimiser: torch.optim.Optimizer,
    texts: Sequence[Text],
    plan: HealPlan,
    step: int,
    team: Team = ALONE,
) -> dict[str, Any]:
    """One step of the optimiser; what the curves say of it."""
    first = step < plan.reconstruct
    rate = learning_rate(
        replace(plan, steps=plan.reconstruct) if first else plan, step - plan.reconstruct * (not first)
    )
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    count, total = _counted(texts), torch.zeros((), device=student.device, dtype=torch.float64)
    parts = list(_micro(texts, plan.micro_batch or plan.batch_size, team))
    changes = _changes(student, teacher, parts, team) if first else None
    for part in parts:
        with _mixed(student):
            if first:
                loss = reconstruction_error(student, teacher, *_read_places(student, part), changes)
            else:
                loss = _divergence(student, teacher, part, plan) / count
        loss.backward()
        total += loss.detach()
    team.add([total])
    add_gradients(team, list(trained.parameters.values()))
    trained.mask_gradients()
    norm = torch.nn.utils.clip_grad_norm_(trained.parameters.values(), plan.clip or math.inf)
    found, length = float(total), float(norm)
    if not math.isfinite(found + length):
        if team.rank:  # the first says it
            team.leave()
        raise UserError(
            f"{student.ref}: the loss is not finite at step {step + 1}; give a lower --learning-rate, or --dtype float32"
        )
    optimiser.step()
    trained.keep_zeros()
    stage = "reconstruct" if first else "distil"
    return {
        "step": step + 1,
        "stage": stage,
        "tokens": count,
        "loss": found,
        "gradient_norm": length,
        "learning_rate": rate,
    }


def _on_gpu(student: LoadedModel) -> bool:
    return student.device.type == "cuda" and student.dtype == torch.float32


def _say(plan: HealPlan, done: Healed, step: int, loss: float | None, kl: float) -> str:
    """One line for a log, at every check; gives the short form for the progress bar."""
    short = f"held-out KL {kl:.4f}" if loss is None else f"loss {loss:.4f} held-out KL {kl:.4f}"
    if loss is None:
        console.print(f"heal: before, {short}", markup=False)
        return short
    left = done.seconds / step * (plan.reconstruct + plan.steps - step)
    rate = done.tokens / max(done.seconds, 1e-9)
    worse = f"; above the {done.kl_before:.4f} of before, try a lower --learning-rate" if kl > done.kl_before else ""
    console.print(
        f"heal: step {step} of {plan.reconstruct + plan.steps}, {short}, {rate:,.0f} tokens/s, {left:.0f} s left{worse}",
        markup=False,
    )
    return short


# --- state ---------------------------------------------------------------------------------------------------------------


def _weights(trained: Trainable, copy: bool = False) -> dict[str, Tensor]:
    return {name: p.detach().clone() if copy else p.detach() for name, p in trained.parameters.items()}


@torch.no_grad()
def _put(trained: Trainable, weights: dict[str, Tensor]) -> None:
    for name, parameter in trained.parameters.items():
        parameter.copy_(weights[name])


def _keep(folder: Path | None, name: str, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Tensors and what belongs to them in one file, beside it first and then renamed, so that the two cannot be of different steps."""
    if folder is None:
        return
    with replacing(folder / name) as beside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata={"notes": json.dumps(notes)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        notes: dict[str, Any] = json.loads((file.metadata() or {}).get("notes", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 (no mapping)


def _save_state(
    folder: Path | None, trained: Trainable, optimiser: torch.optim.Optimizer, done: Healed, key: str
) -> None:
    tensors = {f"weight {name}": p.detach() for name, p in trained.parameters.items()}
    for name, parameter in trained.parameters.items():
        for what, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{what} {name}"] = value
    _keep(folder, _STATE, tensors, {"key": key, "done": vars(done)})


def _resume(trained: Trainable, optimiser: torch.optim.Optimizer, folder: Path | None, key: str) -> Healed:
    """The state that an interrupted run left, put into the parameters and the optimiser; else, or if a file is damaged, a fresh beginning."""
    if folder is None or not (folder / _STATE).is_file():
        return Healed()
    try:
        tensors, notes = _read(folder / _STATE)
        with safe_open(folder / _BEST, framework="pt"):  # whole, or it does not open
            pass
    except (SafetensorError, FileNotFoundError) as error:
        console.print(f"heal: what was kept in {folder} is damaged ({error}); it begins again", markup=False)
        return Healed()
    if notes.get("key") != key:
        raise UserError(
            f"{folder} was begun with other models, texts or options; continue with those, or start over with --overwrite"
        )
    _put(trained, {name: tensors[f"weight {name}"] for name in trained.parameters})
    for name, parameter in trained.parameters.items():
        held = {
            what: tensors[f"{what} {name}"] for what in ("step", "exp_avg", "exp_avg_sq") if f"{what} {name}" in tensors
        }
        if held:
            on_device = {what: value.to(parameter.device) for what, value in held.items()}
            if not optimiser.defaults["fused"]:
                on_device["step"] = held["step"]  # plain AdamW counts on the CPU
            optimiser.state[parameter] = on_device
    return Healed(**notes["done"])
