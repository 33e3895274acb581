"""Products of several matrices in one kernel against float64, and who computes what for whom; without a GPU Triton interprets the kernel, in float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import tiny_model, tiny_tokenizer
from kernels import CUDA, DEVICE, HALF, needs_kernels
from prunescope.models import agreeing, fusing, generating, products
from prunescope.models.anatomy import find_anatomy
from prunescope.models.generating import try_static
from prunescope.models.loaded import LoadedModel
from prunescope.models.products import Tile, shared_inputs, sibling_forwards

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def counters() -> Tensor:
    return torch.zeros(64, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("outs", "rows", "ins"), [((80, 16, 32), 5, 160), ((48, 16), 33, 96), ((64,), 1, 64)])
def test_products_against_float64(outs: tuple[int, ...], rows: int, ins: int, split: int) -> None:
    """Outputs and inputs that fill no tile, weights that are a slice of wider ones, a bias that is missing. Would catch a matrix that begins at
    another one's row, a part of the inputs that is left out or read twice, a tile that writes over the next matrix, and counters that stay."""
    x = torch.randn(rows, 1, ins, device=DEVICE).to(HALF)
    weights = [(torch.randn(n, ins + 16, device=DEVICE) / 8).to(HALF)[:, :ins] for n in outs]
    biases = [torch.randn(n, device=DEVICE).to(HALF) if i != 1 else None for i, n in enumerate(outs)]
    counts = counters()
    for _ in range(2):
        found = products.products(x, weights, biases, counts, Tile(outs=32, ins=32, split=split, warps=4, stages=2))
    for one, weight, bias in zip(found, weights, biases, strict=True):
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert one.is_contiguous() and one.shape == exact.shape
        assert bool(((one.double() - exact).abs() <= torch.finfo(HALF).eps * exact.abs() + 1e-5).all())
    assert not counts.any()


def test_rows_in_another_order_and_fewer_of_them_give_the_same_bits() -> None:
    x, weights = torch.randn(16, 96, device=DEVICE).to(HALF), [torch.randn(48, 96, device=DEVICE).to(HALF)]
    found = products.products(x, weights, [None], counters())[0]
    order = torch.randperm(16)
    assert torch.equal(products.products(x[order], weights, [None], counters())[0], found[order])
    assert torch.equal(products.products(x[:3], weights, [None], counters())[0], found[:3])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, n) for n in (32, 16, 16))
        self.o_proj = nn.Linear(32, 32)  # as wide as the others, and given something else

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q * k.repeat(1, 2) + v.repeat(1, 2))  # type: ignore[no-any-return]


def seen(module: nn.Module, x: Tensor) -> list[tuple[nn.Linear, ...]]:
    with torch.no_grad(), shared_inputs(module) as shared:
        module(x)
    assert not any(child._forward_pre_hooks for child in module.modules())
    return shared


def test_who_is_given_the_same_tensor_is_seen() -> None:
    """Would catch layers that are grouped by their widths or names, and values that are shared by equality."""
    attention = Attention().to(DEVICE, HALF)
    x = torch.randn(3, 32, device=DEVICE).to(HALF)
    assert seen(attention, x) == [(attention.q_proj, attention.k_proj, attention.v_proj)]
    plain_k = attention.k_proj
    attention.k_proj = nn.Sequential(plain_k)  # type: ignore[assignment]  # between them, not plain: another parent's child
    assert (attention.q_proj, attention.v_proj) not in seen(attention, x)
    attention.k_proj = plain_k
    for change in (lambda: plain_k.register_forward_hook(lambda *_: None), lambda: setattr(plain_k, "forward", plain_k.forward)):  # fmt: skip
        undo: Any = change()
        assert not any(plain_k in run for run in seen(attention, x))
        undo.remove() if undo is not None else plain_k.__dict__.pop("forward")
    assert not seen(attention.float(), x.float())


def test_only_the_very_tensor_gets_what_was_found_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer computes all. Would catch keys of an equal tensor, of one changed since, or of the step before."""
    attention = Attention().to(DEVICE, HALF)
    x = torch.randn(3, 32, device=DEVICE).to(HALF)
    forwards = sibling_forwards(attention, seen(attention, x))
    q, k, v = (forwards[module] for module in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert attention.o_proj not in forwards
    calls: list[int] = []
    plain = products.products
    with torch.no_grad():
        q(x)  # tried, and what was found stays
        monkeypatch.setattr(products, "products", lambda *given: calls.append(1) or plain(*given))
        found = q(x), k(x), v(x)
        assert len(calls) == 1
        for one, module in zip(found, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            torch.testing.assert_close(one, module(x), atol=2e-3, rtol=2e-3)
        q(x)
        other = x + 1
        torch.testing.assert_close(k(other), attention.k_proj(other))
        x.add_(1)
        torch.testing.assert_close(v(x), attention.v_proj(x))
        assert len(calls) == 2
        many = torch.randn(65, 32, device=DEVICE).to(HALF)
        assert torch.equal(q(many), attention.q_proj(many)) and len(calls) == 2


def test_a_kernel_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention().to(DEVICE, HALF)
    x = torch.randn(3, 32, device=DEVICE).to(HALF)
    plain = products.products
    monkeypatch.setattr(products, "products", lambda *given: [one * 1.01 for one in plain(*given)])
    monkeypatch.setattr(agreeing, "_TRIED", {})
    forwards = sibling_forwards(attention, seen(attention, x))
    with torch.no_grad():
        assert torch.equal(forwards[attention.q_proj](x), attention.q_proj(x))
    assert list(agreeing._TRIED.values()) == [False]


def test_a_model_writes_the_same_with_fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial against `generate()`. Would catch products that nobody is given, and forwards that outlive the block."""
    monkeypatch.setattr(fusing, "kernels_run", lambda device: True)
    model = tiny_model("qwen2").to(DEVICE, HALF)
    loaded = LoadedModel("qwen2", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)
    calls: list[int] = []
    plain = products.products
    monkeypatch.setattr(products, "products", lambda *given: calls.append(len(given[1])) or plain(*given))
    assert try_static(loaded) is None
    assert calls.count(3) >= 6  # queries, keys, values
    if not CUDA:
        assert abs(calls.count(3) - 6 * (generating._TRIAL_STEPS - 1)) <= 1  # and the trial of the kernel
    assert not any("forward" in module.__dict__ for module in model.modules())
