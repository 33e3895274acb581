"""The ladder of quantised types: what it measures, that it measures once, and where a KL is placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunescope.compare import familiar
from prunescope.compare.divergence import Slice, divergence_rows
from prunescope.compare.familiar import Rung, like_rung, measure_ladder
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.models.quantised import quantising

SLICES = [Slice("a", torch.arange(4, 36).view(2, 16), 32)]


def test_rungs_are_the_kl_of_the_quantised_model_and_measured_once(
    dense: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL by plain log-softmax over the scored half. Catches a rung of another type, KL the other way round, a cache that forgets what
    decides, such as the text."""
    rungs = measure_ladder(dense, SLICES, ("int8", "int4", "int2"), cache=tmp_path / "c")
    for rung in rungs:
        with torch.no_grad():
            p = dense.model(SLICES[0].chunks).logits[:, 8:15].double().log_softmax(-1)
            with quantising(dense, rung.name):
                q = dense.model(SLICES[0].chunks).logits[:, 8:15].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).flatten()
        assert rung.kl == pytest.approx(kl.mean().item(), rel=1e-3)
        assert rung.error == pytest.approx((kl.std(correction=0) / (len(kl) - 1) ** 0.5).item(), rel=1e-3)
    assert rungs[0].kl < rungs[1].kl < rungs[2].kl
    assert rungs[1].bits_per_weight == pytest.approx(4 + 16 / 32, rel=0.1)
    calls = []
    monkeypatch.setattr(familiar, "divergence_rows", lambda *a, **k: calls.append(1) or divergence_rows(*a, **k))
    assert measure_ladder(dense, SLICES, ("int8", "int4", "int2"), cache=tmp_path / "c") == rungs and not calls
    other = [Slice("a", torch.arange(5, 37).view(2, 16), 32)]
    assert measure_ladder(dense, other, ("int8",), cache=tmp_path / "c") != rungs[:1] and len(calls) == 1
    measure_ladder(dense, SLICES, ("int8",), temperature=2.0, cache=tmp_path / "c")
    assert len(calls) == 2
    dense.identity = {"source": "x"}
    measure_ladder(dense, SLICES, ("int8",), cache=tmp_path / "c")
    measure_ladder(dense, SLICES, ("int8",), cache=tmp_path / "c")
    assert len(calls) == 4  # nothing pins these weights


def test_a_kl_is_placed_between_two_rungs() -> None:
    """Catches better and worse exchanged, and a ladder that is taken as sorted when it is not."""
    ladder = [Rung("q2_k", 0.9, 0.01, 2.6), Rung("q8_0", 0.001, 0.0, 8.5), Rung("q4_k", 0.05, 0.0, 4.5)]
    for kl, says in (
        (0.0005, "better than q8_0"), (0.001, "between q8_0 and q4_k"), (0.2, "between q4_k and q2_k"), (2.0, "worse than q2_k")
    ):  # fmt: skip
        assert str(like_rung(kl, ladder)) == says
    assert (like_rung(0.2, ladder).better, like_rung(0.2, ladder).worse) == ("q4_k", "q2_k")
    for kl, rungs in ((float("nan"), ladder), (0.1, [])):
        with pytest.raises(ValueError, match="measured"):
            like_rung(kl, rungs)


def test_unknown_rungs(dense: LoadedModel) -> None:
    with pytest.raises(UserError, match="is unknown"):
        measure_ladder(dense, SLICES, ("q9",))
    with pytest.raises(UserError, match="names no type"):
        measure_ladder(dense, SLICES, ())
