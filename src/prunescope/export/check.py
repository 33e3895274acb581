"""`export --check`: what was written, run by its engine on this machine, against prunescope's own model: greedy tokens and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prunescope.errors import UserError, first_line
from prunescope.export.llama_cpp_engine import LlamaCpp, require_engine
from prunescope.models.loaded import LoadedModel

__all__ = ["CHECKED", "Checked", "Runner", "check", "compared"]

TEXTS = (
    "The history of the city of Vienna begins with",
    "def mean(values):\n    total = 0\n    for value in values:\n",
    "Question: What is 17 + 25?\nAnswer:",
)
TOP = 20  # most likely tokens whose log-probabilities are compared
LIMIT = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.5}
"""How far a log-probability may be off, by the precision of the weights: more than engines were seen to be off on dense models."""


class Runner(Protocol):
    """An engine with the exported model in it."""

    def write(self, ids: list[int], steps: int) -> tuple[list[int], int, dict[int, float]]:
        """The greedy tokens after the prompt ``ids``, the first step that the engine tells the most likely tokens of, and their log-probabilities."""

    def never_written(self) -> list[int]:
        """Tokens that the engine gives no probability."""


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


def check(loaded: LoadedModel, engine: str, folder: Path, steps: int = 64) -> Checked:
    """Run what ``folder`` holds in ``engine`` and compare it with ``loaded``.

    Raises:
        UserError: the engine is not here, does not load the folder, or computes something else.
    """
    name, open_engine = CHECKED[engine]
    prompts = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    if loaded.context is not None:
        steps = min(steps, loaded.context - max(map(len, prompts)))
    if not all(prompts) or steps < 1:
        raise UserError("--check: the model has no context for its prompts; leave --check out")
    with open_engine(loaded, folder, max(map(len, prompts)) + steps) as runner:
        errors = [compared(loaded, runner, ids, steps) for ids in prompts]
        texts = 0
        if isinstance(runner, _InLlamaCpp):
            for text, ids in zip(TEXTS, prompts, strict=True):
                if runner.engine.tokenize(text) != ids:
                    raise UserError(f"--check: llama.cpp reads {text[:30]!r} as other tokens than prunescope does")
                texts += 1
    return Checked(name(), len(prompts), steps, max(errors), texts)


def compared(loaded: LoadedModel, runner: Runner, ids: list[int], steps: int) -> float:
    """The largest difference of a log-probability after the prompt ``ids``. Raises UserError where tokens differ or the difference is large."""
    theirs, told, first = runner.write(ids, steps)
    never = runner.never_written()
    ours, rows = _by_prunescope(loaded, ids, steps, never)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            gap = (rows[step][mine] - rows[step][other]).item()
            raise UserError(
                f"--check: the engine does not write what prunescope writes: token {step + 1} of {steps} is {other}, not {mine} "
                f"(prunescope has the two {gap:.2g} apart)"
            )
    error = max(abs(value - rows[told][token].item()) for token, value in first.items() if token not in never)
    if not error < LIMIT.get(loaded.dtype, 0.5):
        raise UserError(f"--check: the tokens are equal, but a log-probability of the engine is off by {error:.3g}")
    return error


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


class _InLlamaCpp:
    def __init__(self, engine: LlamaCpp) -> None:
        self.engine = engine

    def write(self, ids: list[int], steps: int) -> tuple[list[int], int, dict[int, float]]:
        written = self.engine.write(ids, steps, TOP)
        told = min(written.logprobs)
        return list(written.tokens), told, written.logprobs[told]

    def never_written(self) -> list[int]:
        return self.engine.never_written()


@contextmanager
def _llama_cpp(_: LoadedModel, folder: Path, context: int) -> Any:
    with LlamaCpp(folder / "model.gguf", context=context + 1) as engine:
        yield _InLlamaCpp(engine)


class _InTransformers:
    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def write(self, ids: list[int], steps: int) -> tuple[list[int], int, dict[int, float]]:
        prompt = torch.tensor([ids], device=self.model.device)
        row = self.model(prompt).logits[0, -1].float().log_softmax(-1)
        top = row.topk(min(TOP, len(row)))
        text = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
        return text[0, len(ids) :].tolist(), 0, dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def never_written(self) -> list[int]:
        return []


@contextmanager
def _transformers(loaded: LoadedModel, folder: Path, _: int) -> Any:
    from transformers import AutoModelForCausalLM

    try:  # the code in the folder is what was just written
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=loaded.dtype)
    except Exception as error:  # of whatever kind
        raise UserError(f"--check: transformers does not load the folder: {first_line(error)}") from error
    yield _InTransformers(model.to(loaded.device).eval())


def _transformers_name() -> str:
    from importlib.metadata import version

    return f"transformers {version('transformers')}"


_Opens = Callable[[LoadedModel, Path, int], AbstractContextManager[Runner]]
CHECKED: dict[str, tuple[Callable[[], str], _Opens]] = {
    "llama.cpp": (require_engine, _llama_cpp),
    "transformers": (_transformers_name, _transformers),
}
"""Engine -> its name with the version, and how it is opened."""
