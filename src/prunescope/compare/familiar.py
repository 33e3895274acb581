"""A KL on a scale that everybody knows: the same model quantised at a ladder of GGUF's types, measured once on the same text.

A rung is one pure type for all matrices of the blocks, by round to nearest, with embeddings, head and norms left as they are. A file that
llama.cpp calls Q3_K_M is a mixture around q3_k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunescope.cache import recalled, remembered
from prunescope.compare.columns import DEFAULT_MEMORY
from prunescope.compare.divergence import Slice, divergence_rows
from prunescope.compare.divergence_summary import kl_table
from prunescope.errors import UserError
from prunescope.models import ggml
from prunescope.models.loaded import LoadedModel
from prunescope.models.quantised import QuantSpec
from prunescope.models.variants import Variant

__all__ = [
    "LADDER",
    "LADDER_IN_NUMPY",
    "Likeness",
    "Rung",
    "check_rungs",
    "like_rung",
    "likenesses",
    "measure_ladder",
    "remembered_ladder",
    "usual_ladder",
]

LADDER = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
LADDER_IN_NUMPY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # where ggml's library is not installed


@dataclass(frozen=True)
class Rung:
    """One type of the ladder, and the KL(dense || quantised) of the model at it."""

    name: str
    kl: float
    error: float  # standard error over tokens
    bits_per_weight: float


@dataclass(frozen=True)
class Likeness:
    """The rungs that a KL lies between: ``better`` has a smaller one, ``worse`` a larger one; None past the end of the ladder."""

    kl: float
    better: str | None
    worse: str | None

    def __str__(self) -> str:
        if self.better and self.worse:
            return f"between {self.better} and {self.worse}"
        return f"worse than {self.better}" if self.better else f"better than {self.worse}"


def like_rung(kl: float, ladder: Sequence[Rung]) -> Likeness:
    """Place ``kl`` on the ladder. Raises ValueError for an empty one or a KL that is no number."""
    if not ladder or kl != kl:
        raise ValueError("a KL is placed on rungs that were measured")
    rungs = sorted(ladder, key=lambda rung: rung.kl)
    above = [rung.name for rung in rungs if rung.kl > kl]
    below = [rung.name for rung in rungs if rung.kl <= kl]
    return Likeness(kl, below[-1] if below else None, above[0] if above else None)


def measure_ladder(
    dense: LoadedModel,
    slices: Sequence[Slice],
    types: Sequence[str] = LADDER,
    *,
    batch_size: int = 4,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    cache: Path | None = None,
) -> list[Rung]:
    """The rungs of ``dense`` on the text of ``slices``, each measured once and kept in ``cache``.

    Args:
        types: formats as `QuantSpec.parse` reads them.
        cache: folder of what was measured; None keeps nothing. A model without a revision or content hash is measured anew each time.
    Raises:
        UserError: a format that is unknown, or whose quantiser is not installed.
    """
    text = hashlib.sha256()
    for piece in slices:
        text.update(repr(tuple(piece.chunks.shape)).encode() + piece.chunks.numpy().tobytes())

    def measure(variant: Variant) -> tuple[float, float]:
        rows = divergence_rows(dense, variant, slices, batch_size=batch_size, temperature=temperature, memory=memory)
        mean, error = kl_table(rows.table)["kl_dense_target"]["mean"]
        return mean, error

    return remembered_ladder(dense, text.hexdigest(), types, measure, temperature=temperature, cache=cache)


def remembered_ladder(
    dense: LoadedModel,
    text: str,
    types: Sequence[str],
    measure: Callable[[Variant], tuple[float, float]] | None,
    *,
    temperature: float = 1.0,
    cache: Path | None = None,
) -> list[Rung]:
    """Rungs on a text that ``text`` names: from the cache, else by ``measure``, which gives the mean KL of a variant and its standard error.

    Without ``measure`` the rungs that the cache lacks are left out: nothing is computed.

    Raises:
        UserError: a format that is unknown, or whose quantiser is not installed.
    """
    if not types:
        raise UserError("--ladder names no type; write for example q8_0,q4_k,q2_k")
    cache = cache if dense.pinned else None
    found = []
    for name in types:
        key = {
            "what": "rung 1", "model": dense.identity, "dtype": str(dense.dtype), "text": text, "type": name, "temperature": temperature
        }  # fmt: skip

        def compute(name: str = name) -> dict[str, Any]:
            assert measure is not None
            variant = Variant(dense, f"quant:{name}")
            return asdict(Rung(name, *measure(variant), variant.describe()["bits_per_weight"]))

        if measure is not None:
            found.append(Rung(**remembered(cache, key, compute)))
        else:
            with suppress(LookupError):
                found.append(Rung(**recalled(cache, key)))
    return found


def usual_ladder() -> tuple[str, ...]:
    """The types of the ladder that can be made here."""
    return LADDER if ggml.has_library() else LADDER_IN_NUMPY


def check_rungs(text: str | None) -> list[str]:
    """The types in an option, none where it is left out. Raises UserError for one that is unknown or cannot be made here."""
    names = [] if text is None else [str(QuantSpec.parse(name)) for name in text.split(",")]
    for name in names:
        ggml.check(QuantSpec.parse(name).scheme)
    return names


def likenesses(kls: Mapping[str, float], ladder: Sequence[Rung]) -> dict[str, str]:
    """Where each KL above 0 stands on the ladder, in words; a rung of this name is left out of its own scale. Empty without a ladder."""
    found = {}
    for name, kl in kls.items():
        others = [rung for rung in ladder if name != f"quant-{rung.name}"]
        if others and kl > 0:
            found[name] = str(like_rung(kl, others))
    return found
