"""Greedy choice and search by KL, against brute force with plain transformers and numpy in float64."""

from __future__ import annotations

import random
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunescope
import prunescope.prune.search as search
from families import FAMILIES, characters_folder, tiny_folder
from prunescope.data.calibration import Calibration
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.prune.search import Judge, choose_jointly, mutated
from prunescope.prune.select import spec_of

TOKENS = torch.randint(3, 64, (5, 11), generator=torch.Generator().manual_seed(2))
COUNTS = torch.zeros(5, 11, dtype=torch.bool)
COUNTS[:, 3:9] = True
COUNTS[1, 7:] = False
TRACES = Calibration(TOKENS, "x", 0, COUNTS)


def plain_kl(loaded: LoadedModel, spec: DropSpec, calibration: Calibration = TRACES) -> float:
    """By the definition, from whole forward passes one sample at a time, in float64."""
    total, count = 0.0, 0
    for i, ids in enumerate(calibration.tokens):
        with torch.no_grad():
            z = loaded.model(input_ids=ids[None]).logits[0].double().numpy()
            with loaded.dropping(spec):
                z_other = loaded.model(input_ids=ids[None]).logits[0].double().numpy()
        for place in range(len(ids) - 1):
            if calibration.counts is None or calibration.counts[i, place + 1]:
                p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (z[place], z_other[place]))
                total, count = total + float((p * np.log(p / q)).sum()), count + 1
    return total / count


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(characters_folder(tmp_path_factory.mktemp("search") / "model"), device="cpu", dtype="float64")


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_change_no_divergence(family: str, tmp_path: Path) -> None:
    """In every family: blocks that are not run again, padding, batches. Would catch a stream of the wrong block, and of the dense model
    where that of the pruned one belongs."""
    loaded = load_model(tiny_folder(family, tmp_path), device="cpu")
    last = len(loaded.anatomy) - 1
    base = DropSpec(mlp=(0,))
    specs = [
        base.union(DropSpec(attn=(last,))),
        base.union(DropSpec(attn=(1,), mlp=(1,))),
        base.union(DropSpec(mlp=(last,))),
    ]
    found = Judge(loaded, TRACES, batch_size=2).divergences(base, specs)
    assert found == pytest.approx([plain_kl(loaded, spec) for spec in specs], rel=1e-4, abs=1e-9)
    assert not loaded.dropped and "forward" not in loaded.anatomy.blocks[0].module.__dict__


@pytest.mark.parametrize("target", ["attn", "mlp", "block", "all"])
def test_greedy_equals_brute_force_over_all_candidates(tiny: LoadedModel, target: Any) -> None:
    names = ("attn", "mlp") if target == "all" else (target,)
    candidates = [(name, layer) for layer in range(5) for name in names]
    gone: list[Any] = []
    for _ in range(2):
        gone.append(min((c for c in candidates if c not in gone), key=lambda c: plain_kl(tiny, spec_of([*gone, c]))))
    found = choose_jointly(tiny, TRACES, target, 2, "kl", batch_size=3)
    assert found.spec == spec_of(gone)
    score = next(r["score"] for r in found.rows if (r["sublayer"], r["layer"]) == gone[-1])
    assert score == pytest.approx(plain_kl(tiny, found.spec), rel=1e-6)


def test_search_finds_the_best_pair_and_never_a_worse_one(tiny: LoadedModel) -> None:
    """Over all pairs of a small space the best is known; a start that is not the best one must be left."""
    values = {pair: plain_kl(tiny, DropSpec(mlp=pair)) for pair in combinations(range(5), 2)}
    candidates = [("mlp", layer) for layer in range(5)]
    worst = max(values, key=values.__getitem__)
    parent: list[Any] = [("mlp", layer) for layer in worst]
    divergence, judge = values[worst], Judge(tiny, TRACES)
    for number in range(6):
        parent, better = search._generation(judge, candidates, parent, divergence, f"0/{number}")
        assert better <= divergence
        divergence = better
    assert tuple(layer for _, layer in parent) == min(values, key=values.__getitem__)
    assert divergence == pytest.approx(min(values.values()), rel=1e-6)


def test_mutants_keep_their_size(tiny: LoadedModel) -> None:
    candidates = [(kind, layer) for layer in range(4) for kind in ("attn", "mlp")]
    rng = random.Random(0)
    for n in (1, 3, 8):
        for _ in range(30):
            child = mutated(candidates, candidates[:n], rng)
            assert len(set(child)) == n and set(child) <= set(candidates)


def test_an_interrupted_search_goes_on_and_ends_alike(
    tmp_path: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"generations": 3, "seed": 4, "batch_size": 2}
    expected = choose_jointly(tiny, TRACES, "attn", 2, "search", **how)
    calls = 0
    whole = Judge.divergences

    def counting(self: Judge, *args: Any, **more: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return whole(self, *args, **more)

    monkeypatch.setattr(Judge, "divergences", counting)
    with pytest.raises(KeyboardInterrupt):
        choose_jointly(tiny, TRACES, "attn", 2, "search", cache=tmp_path, **how)
    assert choose_jointly(tiny, TRACES, "attn", 2, "search", cache=tmp_path, **how) == expected
    spent = calls
    assert choose_jointly(tiny, TRACES, "attn", 2, "search", cache=tmp_path, **how) == expected and calls == spent


def test_a_tasks_score_chooses_and_ties_go_to_the_smaller_divergence(tiny: LoadedModel) -> None:
    scores = {(2,): 0.5, (0, 2): 0.4, (2, 4): 0.4}
    found = choose_jointly(tiny, TRACES, "mlp", 2, "task", score=lambda spec: scores.get(spec.mlp, 0.1))
    closer = min(((0, 2), (2, 4)), key=lambda pair: plain_kl(tiny, DropSpec(mlp=pair)))
    assert found.spec.mlp == closer
    assert {row["layer"]: row["score"] for row in found.rows}[2] == 0.5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(characters_folder(tmp_path / "model"))
    how: dict[str, Any] = {
        "target": "mlp",
        "n": 1,
        "calibration": "traces",
        "samples": 3,
        "seq_len": 5,
        "cache": False,
        "device": "cpu",
    }
    by_kl = prunescope.drop(model, select="kl", **how)
    printed = " ".join(capsys.readouterr().err.split())
    # 1 dense pass, 1 of the step, 5 candidates that run 5, 4, 3, 2, 1 of 5 blocks
    assert "at most 5 forward passes of" in printed and "6 if no prefix were shared" in printed
    assert by_kl.info["select"] == "kl" and sum(row["dropped"] for row in by_kl.rows) == 1
    assert prunescope.drop(model, select="task:reversal-mc", batch_size=50, **how).info["select"] == "task:reversal-mc"
    for select, more, said in (
        ("task:nothing", {}, "no such quick task"),
        ("best", {}, "give cosine, kl, search"),
        ("kl", {"iterative": True}, "leave them out"),
    ):
        with pytest.raises(UserError, match=said):
            prunescope.drop(model, select=select, **(how | more))


@pytest.mark.parametrize("select", ["search", "task"])
def test_shared_candidates_give_the_choice_of_one_process(select: Any, dense: LoadedModel, tmp_path: Path) -> None:
    """Groups are computed last first, by judges of their own. Would catch values that come back to other candidates, and a group that is
    measured from the streams of another."""
    calibration = Calibration(TOKENS, "x", 0)
    seen: list[int] = []

    class Shared:
        count = 2

        def sharing(self, make: Any) -> Any:
            def share(items: Any, here: Any, done: Any) -> None:
                seen.append(len(items))
                for place in reversed(range(len(items))):
                    done(place, make(dense)(items[place]))

            return share

    scoring = partial(_scored_by, first=1.0)
    score = scoring(dense) if select == "task" else None
    alone, together = (
        choose_jointly(dense, calibration, "all", 3, select, score=score, generations=2, workers=workers, scoring=scoring if score else None)
        for workers in (None, Shared())
    )  # fmt: skip
    assert max(seen) > 1
    assert together.spec == alone.spec and together.rows == alone.rows


def _scored_by(dense: LoadedModel, *, first: float) -> Any:
    return lambda spec: sum(first / (layer + 1) for layer in (*spec.attn, *spec.mlp))
