"""SparseGPT's kernels: on a GPU where there is one, otherwise in Triton's interpreter, which runs the same source on this CPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before anything imports triton", allow_module_level=True)
pytest.importorskip("triton", reason="the kernels for GPUs need triton, which is not installed")

from prunescope.prune import sparsegpt_gpu  # noqa: E402
from prunescope.prune.calibrate import InputStatistic  # noqa: E402
from prunescope.prune.factor import NotPositiveDefiniteError  # noqa: E402
from prunescope.prune.masks import Goal, _kth_on_gpu, lowest_per_row  # noqa: E402
from prunescope.prune.sparsegpt import sparsegpt  # noqa: E402
from prunescope.prune.sparsegpt_gpu import _Loop, repeated_shapes, sparsegpt_on_gpu, supported  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_gpu = pytest.mark.gpu


def problem(n: int, rows: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=generator))
    x[:, 5] = 0  # a dead input
    return [torch.randn(r, n, generator=generator) for r in rows], x.T @ x


def goal(case: str) -> Goal:
    return Goal.parse(case if ":" in case else float(case))


@pytest.mark.parametrize(
    ("n", "rows", "cases", "block"),
    [
        (48, (20, 9), ("0.5", "0.5"), 16),
        (48, (37,), ("2:4",), 16),
        (24, (11,), ("3:6",), 128),
        (32, (11,), ("4:8",), 16),
        (32, (11,), ("8:16",), 16),
        (90, (11,), ("0.3",), 32),
        (40, (18, 5, 7, 3), ("0.5", "2:4", "0.25", "0.0"), 20),
    ],
)
def test_kernels_give_what_the_cpu_gives(n: int, rows: tuple[int, ...], cases: tuple[str, ...], block: int) -> None:
    """Another formula (the factor of H, not of its inverse), so this would catch a wrong compensation, and every slip at the edges of tiles,
    matrices and blocks: rows and columns that a tile does not fill, matrices with goals of their own, a block size that is no power of two."""
    weights, hessian = problem(n, rows)
    goals = [goal(case) for case in cases]
    expected, _ = sparsegpt(weights, hessian, goals, block_size=block)  # on the CPU
    on = [weight.to(DEVICE) for weight in weights]
    assert supported(hessian.to(DEVICE), goals, block)
    found, damping = sparsegpt_on_gpu(on, hessian.to(DEVICE), goals, block_size=block)
    assert damping == 0.01
    for before, weight, mine, theirs, aim in zip(on, weights, found, expected, goals, strict=True):
        assert torch.equal(before.cpu(), weight), "the input is left as it is"
        assert torch.equal(mine.cpu() == 0, theirs == 0)
        assert int((mine == 0).sum()) == aim.count(weight.numel())
        torch.testing.assert_close(mine.cpu(), theirs, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("cases", [("0.5", "0.25"), ("2:4", "2:4"), ("0.5", "2:4")])
def test_problems_of_one_shape_share_memory_and_nothing_else(cases: tuple[str, str]) -> None:
    """Problems one after the other (on a GPU the second and those after it are a graph) against each alone, to the bit. Would catch counts, losses or
    factors of the problem before, results that are overwritten by the next, and dead inputs that are remembered."""
    goals = [goal(case) for case in cases]
    problems = [problem(16, (18, 1), seed) for seed in range(4 if CUDA else 3)]
    problems[1][1][:, 7] = problems[1][1][7] = 0.0
    on = [([weight.to(DEVICE) for weight in weights], hessian.to(DEVICE)) for weights, hessian in problems]
    alone = [sparsegpt_on_gpu(weights, hessian, goals, block_size=8)[0] for weights, hessian in on]
    with repeated_shapes():
        found = [sparsegpt_on_gpu(weights, hessian, goals, block_size=8)[0] for weights, hessian in on]
    for mine, theirs in zip(found, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("goal", "rows", "sub"),
    [
        (Goal(0.5), 4608, 0),
        (Goal(0.5), 16383, 0),
        (Goal(0.5), 16384, 8),
        (Goal.parse("2:4"), 1, 8),
        (Goal.parse("4:8"), 37888, 8),
        (Goal.parse("3:6"), 64, 6),
        (Goal.parse("2:5"), 64, 5),
        (Goal.parse("5:9"), 37888, 0),
    ],
)
def test_the_loop_is_chosen_by_pattern_and_rows(goal: Goal, rows: int, sub: int) -> None:
    """Would catch groups that the columns in registers would cut, a bound off by one, and tiles whose rows are not one to a thread."""
    loop = sparsegpt_gpu._loop(goal, rows)
    assert loop.sub == sub and (not sub or goal.of == 0 or sub % goal.of == 0)
    assert loop.rows == 32 * loop.warps if sub else loop.rows == 16


LOOPS = {
    "columns": lambda goal, rows: _Loop(16, 4, 0),
    "rows": lambda goal, rows: _Loop(32, 1, 8 // max(1, goal.of) * max(1, goal.of)),
}


@pytest.mark.parametrize(
    ("n", "rows", "cases", "block"),
    [
        (12, (33, 2), ("0.5", "0.25"), 10),
        (20, (33,), ("2:4",), 12),
        (18, (5,), ("1:3",), 9),
        (16, (3,), ("4:8",), 8),
    ],
)
def test_both_loops_give_the_same_bits(
    n: int, rows: tuple[int, ...], cases: tuple[str, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that the columns in registers fill and do not fill, two tiles of a matrix, ties. Would catch errors that reach a column
    in another order, ties counted from the wrong row, and a group ranked before it has heard of all columns in front of it."""
    weights, hessian = problem(n, rows)
    weights[0][1:20:2] = weights[0][:1]  # rows alike
    hessian[4:7] = hessian[:, 4:7] = 0  # three dead inputs in a group
    on, goals = [weight.to(DEVICE) for weight in weights], [goal(case) for case in cases]
    found = []
    for loop in LOOPS.values():
        monkeypatch.setattr(sparsegpt_gpu, "_loop", loop)
        found.append(sparsegpt_on_gpu(on, hessian.to(DEVICE), goals, block_size=block)[0])
    for mine, theirs, aim in zip(*found, goals, strict=True):
        assert torch.equal(mine, theirs)
        assert int((mine == 0).sum()) == aim.count(mine.numel())


@pytest.mark.parametrize("loop", LOOPS)
def test_equal_scores_go_in_order_of_their_index(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal H leaves weights as they are, so the mask is plain selection; with three levels most scores tie, over several tiles."""
    monkeypatch.setattr(sparsegpt_gpu, "_loop", LOOPS[loop])
    weight = torch.randint(1, 4, (70, 16), generator=torch.Generator().manual_seed(1)).float()
    (found,), _ = sparsegpt_on_gpu([weight.to(DEVICE)], torch.eye(16, device=DEVICE), [Goal(0.45)])
    count = Goal(0.45).count(weight.numel())
    order = torch.sort(weight.flatten(), stable=True).indices[:count]
    expected = weight.flatten().index_fill(0, order, 0.0).view_as(weight)
    assert torch.equal(found.cpu(), expected)


def test_a_hessian_that_cannot_be_factorised_is_refused_in_the_same_way() -> None:
    bad = torch.full((16, 16), 9.0, device=DEVICE).fill_diagonal_(1.0)
    with pytest.raises(NotPositiveDefiniteError):
        sparsegpt_on_gpu([torch.ones(3, 16, device=DEVICE)], bad, [Goal(0.5)])


@pytest.mark.parametrize("levels", [0, 3])
def test_the_threshold_of_long_rows(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a sort; with negative numbers, both zeros and ties."""
    monkeypatch.setattr("prunescope.prune.masks._LONG_ROW", 100)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3000, generator=generator).to(DEVICE)
    scores = (scores * levels).round() / levels if levels else scores
    for count in (1, 7, 1500, 3000):
        assert torch.equal(_kth_on_gpu(scores, count), scores.sort(dim=1).values[:, count - 1 : count])


@needs_gpu
def test_gpu_at_full_block_width_is_reproducible_and_equal_to_the_cpu() -> None:
    """Compiled kernels can differ from interpreted ones (the mask of tl.histogram did): the sizes fill some tiles and not others."""
    for cases in (("0.5", "0.5"), ("2:4", "4:8")):
        weights, hessian = problem(504, (300, 200))
        goals = [goal(case) for case in cases]
        expected, _ = sparsegpt(weights, hessian, goals)
        on = [weight.cuda() for weight in weights]
        first, second = (sparsegpt(on, hessian.cuda(), goals)[0] for _ in range(2))
        with repeated_shapes():
            replayed = [sparsegpt(on, hessian.cuda(), goals)[0] for _ in range(4)]
        assert all(torch.equal(a, b) for again in replayed for a, b in zip(again, first, strict=True))
        for a, b, cpu, aim in zip(first, second, expected, goals, strict=True):
            assert torch.equal(a, b)
            assert int((a == 0).sum()) == aim.count(a.numel())
            assert ((a.cpu() == 0) == (cpu == 0)).float().mean() > 0.999


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_on_a_gpu_against_float64(dtype: torch.dtype) -> None:
    """Would catch sums kept in 16 bits, a stripe left out, and an error measured from half of H with the diagonal counted twice."""
    x = torch.randn(5000, 1300, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    whole, plain = (InputStatistic(1300, DEVICE, gram=gram) for gram in (True, False))
    for part in x.split(1024):
        whole.add(part)
        plain.add(part, part)
    exact = x.double().T @ x.double()
    assert (whole.hessian().double() - exact).norm() / exact.norm() < 2e-5
    assert torch.equal(whole.hessian(), whole.hessian().T)
    torch.testing.assert_close(plain.norm().double(), x.double().square().mean(0).sqrt(), rtol=1e-5, atol=0)
    old = torch.randn(7, 1300, device=DEVICE)
    new = old * ~lowest_per_row(old.abs(), 650)
    error = ((old - new).double() @ x.double().T).norm() / (old.double() @ x.double().T).norm()
    assert whole.relative_error(old, new) == pytest.approx(error.item(), rel=1e-4)
    assert plain.relative_error(old, new) == pytest.approx(error.item(), rel=1e-4)
