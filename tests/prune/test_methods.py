"""The pruning methods as functions of tensors, each against an independent computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunescope.errors import UserError
from prunescope.prune import calibrate, factor
from prunescope.prune.calibrate import InputStatistic
from prunescope.prune.factor import NotPositiveDefiniteError, inverse_factor, split_product
from prunescope.prune.magnitude import magnitude
from prunescope.prune.masks import Goal, lowest, lowest_along_first, lowest_per_group, lowest_per_row
from prunescope.prune.owl import stretch
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.structured import neuron_scores, structured
from prunescope.prune.wanda import wanda


def by_sorting(scores: Tensor, count: int) -> Tensor:
    """The lowest of each row by a full, stable sort: ties go to the lower index."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, torch.sort(scores, dim=1, stable=True).indices[:, :count], True)


def random(*shape: int, seed: int = 0, levels: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels:  # many ties
        return torch.randint(0, levels, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


# --- selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 17, 39, 40])
def test_selection_takes_exactly_the_lowest(levels: int | None, count: int) -> None:
    """Would catch an off-by-one at the threshold and ties that are all taken or all left."""
    scores = random(7, 40, levels=levels)
    assert torch.equal(lowest_per_row(scores, count), by_sorting(scores, count))
    flat = by_sorting(scores.view(1, -1), 5 * count).view(7, 40)
    assert torch.equal(lowest(scores, 5 * count), flat)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4), (3, 5), (7, 10), (1, 2), (4, 20)])
def test_n_of_m_leaves_n_in_every_group(levels: int | None, keep: int, of: int) -> None:
    scores = random(6, 40, levels=levels)
    expected = by_sorting(scores.view(-1, of), of - keep).view(6, 40)
    found = lowest_per_group(scores, keep, of)
    assert torch.equal(found, expected)
    assert ((~found).view(6, -1, of).sum(-1) == keep).all()
    columns = scores.view(6, -1, of).movedim(-1, 0)
    assert torch.equal(lowest_along_first(columns, keep).movedim(0, -1).reshape(6, 40), expected)


def test_goal_counts_the_decimal_that_was_written() -> None:
    """0.7 x 10 is 7, though the float 0.7 x 10 may be a little less; 0.29 x 100 is 28.999... in floats."""
    assert [Goal(0.7).count(10), Goal(0.29).count(100), Goal(0.5).count(7), Goal(0.0).count(9)] == [7, 29, 3, 0]
    assert Goal.parse("2:4").count(48) == 24
    assert Goal.parse("1:4").sparsity == 0.75
    assert str(Goal.parse("4:8")) == "4:8" and str(Goal.parse(0.55)) == "0.55"


@pytest.mark.parametrize("value", [1, 1.5, -0.1, "4:4", "0:4", "5:4", "x", True, None, "nan"])
def test_goal_refuses(value: Any) -> None:
    with pytest.raises(UserError):
        Goal.parse(value)


# --- the reference's numbers ---------------------------------------------------------------------------------------------


def reference_layer(reference: Path) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Tensor]:
    tensors = load_file(reference / "pruning.safetensors")
    expected = json.loads((reference / "pruning_expected.json").read_text())["results"]
    return tensors, expected, tensors["weight"], tensors["inputs"].reshape(-1, tensors["weight"].shape[1])


CASES = ["0.5", "0.7", "2of4", "4of8"]


def goal_of(case: str) -> Goal:
    return Goal.parse(case.replace("of", ":") if "of" in case else float(case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_equal_the_reference(reference: Path, method: str, case: str) -> None:
    """The reference's magnitude mask is `<= threshold` and takes one weight too many; everything else is identical."""
    tensors, _, weight, x = reference_layer(reference)
    goal = goal_of(case)
    mask = magnitude(weight, goal) if method == "magnitude" else wanda(weight, x.square().mean(0).sqrt(), goal)
    theirs = tensors[f"{method}_{case}"] == 0
    if method == "wanda" or goal.of:
        assert torch.equal(mask, theirs)
    else:
        assert mask.sum() == goal.count(weight.numel())
        extra = theirs & ~mask
        assert not (mask & ~theirs).any()
        assert extra.sum() == 1 and weight.abs()[extra] >= weight.abs()[mask].max()
    if method == "wanda" and not goal.of:
        assert (mask.sum(1) == goal.count(weight.shape[1])).all()


@pytest.mark.parametrize("case", CASES)
def test_sparsegpt_objective_equals_the_reference(reference: Path, case: str) -> None:
    """With the reference's block size; its threshold takes one weight a block more, so ours may be a little below."""
    _, expected, weight, x = reference_layer(reference)
    goal = goal_of(case)
    before = weight.clone()
    (pruned,), damping = sparsegpt([weight], x.T @ x, [goal], block_size=32)
    assert torch.equal(weight, before) and damping == 0.01
    objective = float(((weight - pruned).double() @ x.T.double()).square().sum())
    theirs = expected[f"sparsegpt_{case}"]["objective"]
    assert 0.99 * theirs < objective <= 1.001 * theirs
    assert int((pruned == 0).sum()) == goal.count(weight.numel())
    if goal.of:
        assert objective == pytest.approx(theirs, rel=1e-4)  # the damping of a dead input apart
        assert ((pruned != 0).view(48, -1, goal.of).sum(-1) == goal.keep).all()
    assert (pruned[:, 17] == 0).all(), "the dead input goes first"


# --- SparseGPT -----------------------------------------------------------------------------------------------------------


def exact_obs(weight: Tensor, hessian: Tensor, goal: Goal, block: int, damping: float) -> np.ndarray:
    """Columns from left to right, each with the inverse of what is left of H, inverted anew, a row at a time, in float64."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    rows, n = w.shape
    h += np.eye(n) * damping * h.diagonal().mean()
    gone = np.zeros(w.shape, bool)
    for start in range(0, n, block):
        stop = min(start + block, n)
        for i in range(start, stop):
            inverse = np.linalg.inv(h[i:, i:])
            if (not goal.of and i == start) or (goal.of and i % goal.of == 0):
                last = stop if not goal.of else i + goal.of
                weights = w[:, i:last]
                scores = np.stack(
                    [weights[:, j] ** 2 / np.linalg.inv(h[i + j :, i + j :])[0, 0] for j in range(last - i)], 1
                )
                if goal.of:
                    order = np.argsort(scores, axis=1, kind="stable")[:, : goal.of - goal.keep]
                    np.put_along_axis(gone[:, i:last], order, True, axis=1)
                else:
                    count = goal.count(rows * stop) - goal.count(rows * start)
                    gone[:, i:last].flat[np.argsort(scores, axis=None, kind="stable")[:count]] = True
            for r in range(rows):
                if gone[r, i]:
                    w[r, i:] -= w[r, i] / inverse[0, 0] * inverse[:, 0]
                    w[r, i] = 0.0
    return w


@pytest.mark.parametrize("case", ["0.5", "0.3", "2:4", "1:4", "3:6"])
@pytest.mark.parametrize("block", [4, 12, 24])
def test_sparsegpt_is_exact_brain_surgery_from_left_to_right(case: str, block: int) -> None:
    """Would catch a wrong factor, an update with the wrong sign or scale, and columns that a lazy update leaves out."""
    goal = Goal.parse(case if ":" in case else float(case))
    if goal.of and block % goal.of:
        block = max(goal.of, block - block % goal.of)
    x = random(200, 24) @ (torch.eye(24) + 0.3 * random(24, 24, seed=1))
    weight = random(9, 24, seed=2)
    (found,), _ = sparsegpt([weight], x.T @ x, [goal], block_size=block)
    expected = exact_obs(weight, x.T @ x, goal, block, 0.01)
    assert np.array_equal(found.numpy() == 0, expected == 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_matrices_that_share_their_input_are_solved_as_if_alone() -> None:
    """The stacked solution chooses each matrix's weights apart, also with a goal of its own."""
    x = random(300, 40)
    weights = [random(rows, 40, seed=rows) for rows in (5, 11, 3)]
    goals = [Goal(0.5), Goal.parse("2:4"), Goal(0.25)]
    together, _ = sparsegpt(weights, x.T @ x, goals, block_size=16)
    for weight, goal, found in zip(weights, goals, together, strict=True):
        (alone,), _ = sparsegpt([weight], x.T @ x, [goal], block_size=16)
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)
        assert int((found == 0).sum()) == goal.count(weight.numel())


@pytest.mark.parametrize("n", [5, 64, 700, 1500])
def test_inverse_factor(n: int) -> None:
    x = random(2 * n, n).double()
    h = x.T @ x
    reverse, used = inverse_factor(h, 0.01)
    factor = reverse.flip(0, 1)
    whole = h + torch.eye(n).double() * 0.01 * h.diagonal().mean()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(whole), rtol=1e-8, atol=1e-12)
    assert torch.equal(factor, factor.triu()) and used == 0.01


def test_damping_is_raised_in_steps_and_then_given_up() -> None:
    h = torch.eye(6)
    h[0, 1] = h[1, 0] = 1.05
    assert inverse_factor(h, 0.01)[1] == pytest.approx(0.1)
    h[0, 1] = h[1, 0] = 1.5
    assert inverse_factor(h, 0.01)[1] == pytest.approx(1.0)
    h[0, 1] = h[1, 0] = 9.0
    with pytest.raises(NotPositiveDefiniteError):
        inverse_factor(h, 0.01)
    with pytest.raises(NotPositiveDefiniteError):
        inverse_factor(torch.full((3, 3), torch.nan), 0.01)


def test_a_dead_input_goes_first_and_costs_nothing() -> None:
    x = random(300, 16)
    x[:, [3, 9]] = 0
    weight = random(10, 16) + 5.0  # what a dead input carries is large
    (found,), _ = sparsegpt([weight], x.T @ x, [Goal(0.25)], block_size=8)
    assert (found[:, [3, 9]] == 0).all()
    assert int((found == 0).sum()) == 40
    alive = [i for i in range(16) if i not in (3, 9)]
    (few,), _ = sparsegpt([weight], x.T @ x, [Goal(0.0)], block_size=8)
    assert torch.equal(few, weight), "nothing asked, nothing changed"
    assert torch.isfinite(found).all() and (found[:, alive] != 0).any()


# --- Wanda, structured, OWL --------------------------------------------------------------------------------------------


def test_wanda_scores_weights_by_their_inputs() -> None:
    weight, norm = random(8, 20), random(20, seed=1).abs()
    expected = by_sorting(weight.abs() * norm, 10)
    assert torch.equal(wanda(weight, norm, Goal(0.5)), expected)
    assert not torch.equal(expected, by_sorting(weight.abs(), 10)), "the test would not see the norm left out"


def test_wanda_variant_is_one_threshold_on_the_share_of_a_row_that_is_lost() -> None:
    """Against the search as published: cumulative sums of sorted scores up to alpha times the row's sum, alpha by bisection."""
    weight, norm, goal = random(12, 50) * random(12, 1, seed=5).exp(), random(50, seed=1).abs(), Goal(0.6)
    scores = weight.abs() * norm
    ordered, order = scores.sort(dim=1)
    total = scores.sum(1, keepdim=True)
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        count = int((ordered.cumsum(1) <= alpha * total).sum())
        low, high = (alpha, high) if count <= goal.count(scores.numel()) else (low, alpha)
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, ordered.cumsum(1) <= low * total)
    found = wanda(weight, norm, goal, variant=True)
    assert int(found.sum()) == goal.count(scores.numel())
    assert (found ^ expected).sum() <= 1
    assert found.sum(1).unique().numel() > 1, "rows lose different numbers"


def test_structured_keeps_the_strongest_neurons() -> None:
    down, norm = random(6, 30), random(30, seed=3).abs()
    scores = np.abs(down.numpy()).mean(0) * norm.numpy()
    np.testing.assert_allclose(neuron_scores(down, norm), scores, rtol=1e-6)
    kept = structured(down, norm, 12)
    assert kept.tolist() == sorted(np.argsort(scores)[12:].tolist())


def test_owl_stretches_ratios_and_keeps_the_mean() -> None:
    found = stretch([0.01, 0.05, 0.02, 0.04], 0.7, 0.08)
    assert np.mean(found) == pytest.approx(0.7)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert np.argsort(found).tolist() == [1, 3, 2, 0], "more outliers, less pruned"
    assert stretch([0.1, 0.1], 0.5, 0.08) == [0.5, 0.5]
    with pytest.raises(UserError, match="owl-spread"):
        stretch([0.0, 1.0], 0.02, 0.08)


# --- what a GPU does in another order ------------------------------------------------------------------------------------


def test_rows_that_wait_are_in_every_sum_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU some rows wait for others before they are multiplied. Pieces that fill the room exactly, that do not fit any more, that are larger than it
    while others wait, and sums read in between, against the whole product. Would catch rows that are added twice or never."""
    monkeypatch.setattr(calibrate, "_on_tensor_cores", lambda x: True)
    monkeypatch.setattr(calibrate, "_TOGETHER", 20)
    x = random(100, 12, seed=4)
    statistic, other = (InputStatistic(12, torch.device("cpu"), gram=True) for _ in range(2))
    for k, part in enumerate(x[:90].split([7, 9, 4, 9, 9, 30, 3, 19])):
        statistic.add(part)
        if k == 3:
            expected = x[:29].double().square().mean(0).sqrt()
            torch.testing.assert_close(statistic.norm().double(), expected, rtol=1e-5, atol=0)
    other.add(x[90:])
    statistic.merge(other)
    torch.testing.assert_close(statistic.hessian(), x.T @ x, rtol=1e-5, atol=1e-4)


def test_products_of_split_matrices_have_the_digits_they_promise() -> None:
    """Two parts of 8 bits each leave 16, three leave 24. Would catch a product of parts that is left out, or taken twice."""
    x, y = random(40, 300, seed=5), random(30, 300, seed=6)
    exact = x.double() @ y.double().T
    for parts, least, most in ((2, 1e-7, 1e-5), (3, 0.0, 2e-8)):
        a, b = split_product(x, y, parts)
        assert a.dtype == torch.bfloat16
        error = float((a.double() @ b.double().T - exact).norm() / exact.norm())
        assert least < error < most


def test_factor_by_blocks_against_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a GPU's factor, with a CPU's products: blocks and updates that do not divide the size. Would catch a block that is updated twice or not
    at all, an upper triangle that is left over, and a matrix that is not positive definite and is taken for one."""

    def addmm(part: Tensor, a: Tensor, b: Tensor, *, alpha: float, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(part + alpha * (a.double() @ b.double()).to(out_dtype))

    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a.double() @ b.double()).to(out_dtype))
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(factor, "_BLOCK", 64)
    monkeypatch.setattr(factor, "_UPDATED", 96)
    x = random(900, 300, seed=7)
    hessian = x.T.matmul(x)
    lower = hessian.clone()
    assert factor._factorise_by_blocks(lower)
    torch.testing.assert_close(lower.double(), torch.linalg.cholesky(hessian.double()), rtol=0, atol=2e-3)
    hessian[200, 200] = -1
    assert not factor._factorise_by_blocks(hessian)
