"""`export --check`: what was written, run by its engine on this machine, against prunescope's own model: greedy tokens and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunescope.errors import UserError, first_line
from prunescope.export.llama_cpp_engine import LlamaCpp, require_engine
from prunescope.export.vllm_engine import Vllm, require_vllm
from prunescope.models.loaded import LoadedModel

__all__ = ["CHECKED", "Answers", "Checked", "check", "compare", "require"]

TEXTS = (
    "The history of the city of Vienna begins with",
    "def mean(values):\n    total = 0\n    for value in values:\n",
    "Question: What is 17 + 25?\nAnswer:",
)
TOP = 20  # most likely tokens whose log-probabilities are compared
LIMIT = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.5}
"""How far a log-probability may be off, by the precision of the weights: more than engines were seen to be off on dense models."""


@dataclass(frozen=True)
class Answers:
    """What an engine wrote after every prompt."""

    tokens: list[list[int]]
    told: list[
        tuple[int, dict[int, float]]
    ]  # a step of each prompt, the first that the engine tells, and log-probabilities of its most likely tokens
    never: list[int]  # tokens that the engine gives no probability
    read: list[list[int]] | None = None  # the prompts as the engine's own tokenizer reads them


@dataclass(frozen=True)
class Checked:
    """What was compared and found equal."""

    engine: str
    prompts: int
    steps: int
    error: float  # largest difference of a log-probability
    texts: int  # prompts that the engine's own tokenizer reads as prunescope's; 0 where it is not asked

    def __str__(self) -> str:
        read = f", {self.texts} texts read as the same tokens" if self.texts else ""
        return (
            f"checked in {self.engine}: {self.prompts} prompts x {self.steps} greedy tokens equal, "
            f"log-probabilities of the {TOP} most likely first tokens within {self.error:.2g}{read}"
        )


def require(engine: str, python: str | None) -> str:
    """Name and version of ``engine`` on this machine. Raises UserError where it cannot be run."""
    if engine not in CHECKED:
        raise UserError(f"--check runs {', '.join(CHECKED)}, not {engine}; leave --check out")
    if engine == "vllm":
        return require_vllm(python)
    if python is not None:
        raise UserError(f"--engine-python is for vllm alone; {engine} runs with this Python")
    if engine == "llama.cpp":
        return require_engine()
    from importlib.metadata import version

    return f"{engine} {version(engine)}"


def check(loaded: LoadedModel, engine: str, folder: Path, python: str | None = None, steps: int = 64) -> Checked:
    """Run what ``folder`` holds in ``engine``, vLLM by ``python``, and compare it with ``loaded``.

    Raises:
        UserError: the engine is not here, does not load the folder, or computes something else.
    """
    name = require(engine, python)
    prompts = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    if loaded.context is not None:
        steps = min(steps, loaded.context - max(map(len, prompts)))
    if not all(prompts) or steps < 1:
        raise UserError("--check: the model has no context for its prompts; leave --check out")
    found = CHECKED[engine](loaded, folder, prompts, steps, python)
    for text, ours, theirs in zip(TEXTS, prompts, found.read or prompts, strict=True):
        if ours != theirs:
            raise UserError(f"--check: {engine} reads {text[:30]!r} as other tokens than prunescope does")
    return Checked(name, len(prompts), steps, compare(loaded, prompts, found), len(found.read or []))


def compare(loaded: LoadedModel, prompts: list[list[int]], found: Answers) -> float:
    """The largest difference of a log-probability after ``prompts``. Raises UserError where tokens differ or the difference is large."""
    errors = []
    for ids, theirs, (told, values) in zip(prompts, found.tokens, found.told, strict=True):
        ours, rows = _by_prunescope(loaded, ids, len(theirs), found.never)
        for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine != other:
                gap = (rows[step][mine] - rows[step][other]).item()
                raise UserError(
                    f"--check: the engine does not write what prunescope writes: token {step + 1} of {len(ours)} is {other}, not {mine} "
                    f"(prunescope has the two {gap:.2g} apart)"
                )
        errors += [abs(value - rows[told][i].item()) for i, value in values.items() if i not in found.never]
    if not max(errors) < LIMIT.get(loaded.dtype, 0.5):
        raise UserError(
            f"--check: the tokens are equal, but a log-probability of the engine is off by {max(errors):.3g}"
        )
    return max(errors)


@torch.no_grad()
def _by_prunescope(loaded: LoadedModel, ids: list[int], steps: int, never: list[int]) -> tuple[list[int], Tensor]:
    """Greedy tokens and ``(steps, V)`` log-probabilities, with no probability for the tokens ``never``."""
    prompt = torch.tensor([ids], device=loaded.device)
    text = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0,
        suppress_tokens=never or None,
    )  # fmt: skip
    logits = loaded.model(text).logits[0, len(ids) - 1 : -1].float()
    logits[:, never] = -math.inf
    return text[0, len(ids) :].tolist(), logits.log_softmax(-1)


# --- engines -----------------------------------------------------------------------------------------------------------


def _by_llama_cpp(_: LoadedModel, folder: Path, prompts: list[list[int]], steps: int, __: str | None) -> Answers:
    with LlamaCpp(folder / "model.gguf", context=max(map(len, prompts)) + steps + 1) as engine:
        read = [engine.tokenize(text) for text in TEXTS]
        written = [engine.write(ids, steps, TOP) for ids in prompts]
        told = [(step := min(one.logprobs), one.logprobs[step]) for one in written]
        return Answers([list(one.tokens) for one in written], told, engine.never_written(), read)


@torch.no_grad()
def _by_transformers(loaded: LoadedModel, folder: Path, prompts: list[list[int]], steps: int, _: str | None) -> Answers:
    from transformers import AutoModelForCausalLM

    try:  # the code in the folder is what was just written
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=loaded.dtype)
    except Exception as error:  # of whatever kind
        raise UserError(f"--check: transformers does not load the folder: {first_line(error)}") from error
    model.to(loaded.device).eval()
    tokens, told = [], []
    for ids in prompts:
        prompt = torch.tensor([ids], device=loaded.device)
        top = model(prompt).logits[0, -1].float().log_softmax(-1).topk(min(TOP, loaded.anatomy.vocab_size))
        text = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
        tokens.append(text[0, len(ids) :].tolist())
        told.append((0, dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))))
    return Answers(tokens, told, [])


def _by_vllm(loaded: LoadedModel, folder: Path, prompts: list[list[int]], steps: int, python: str | None) -> Answers:
    with Vllm(python) as engine:
        engine.load(
            folder, dtype=str(loaded.dtype).removeprefix("torch."), context=max(map(len, prompts)) + steps, top=TOP
        )
        found = engine.write(prompts, steps, TOP)
    return Answers([list(one.tokens) for one in found], [(0, one.first) for one in found], [])


CHECKED: dict[str, Callable[[LoadedModel, Path, list[list[int]], int, str | None], Answers]] = {
    "llama.cpp": _by_llama_cpp,
    "transformers": _by_transformers,
    "vllm": _by_vllm,
}
"""Engine -> what it writes after the prompts."""
