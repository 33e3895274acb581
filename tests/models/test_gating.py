"""An activation and its product in one kernel, found by what a module gives; without a GPU Triton interprets the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from families import tiny_model, tiny_tokenizer
from kernels import CUDA, DEVICE, HALF, needs_kernels
from prunescope.models import fusing, gating, generating
from prunescope.models.anatomy import find_anatomy
from prunescope.models.gating import Gating, gate_forwards, gated, gating_of
from prunescope.models.generating import try_static
from prunescope.models.loaded import LoadedModel
from prunescope.models.products import Tile, gated_products, products

pytestmark = needs_kernels
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Named(nn.Module):
    """Other names, in another order; square, so that every role is possible by its shape."""

    def __init__(self, formula: str) -> None:
        super().__init__()
        self.w2, self.w1, self.w3 = (nn.Linear(32, 32) for _ in range(3))
        self.formula, self.drop = formula, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        act = functional.relu if self.formula == "relu" else functional.silu
        gate = act(self.w1(x))
        if self.formula == "clamped":
            gate = gate.clamp(max=7.0)
        return self.drop(self.w2(gate * self.w3(x)))  # type: ignore[no-any-return]


def test_a_limit_that_small_weights_hardly_reach_is_seen() -> None:
    """As DeepSeek's and gpt-oss's MLPs have it. Would catch rows that are too small to show it."""

    class Limited(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(-10.0, 10.0)
            return self.down_proj(functional.silu(gate) * up)  # type: ignore[no-any-return]

    for kind, known in ((LlamaMLP, True), (Limited, False)):
        module = kind(LlamaConfig(**SHAPE)).to(DEVICE, HALF).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.01)
        assert (gating_of(module) is not None) == known


@pytest.mark.parametrize(("kind", "config", "way"), [(LlamaMLP, LlamaConfig(**SHAPE), 0), (Gemma2MLP, Gemma2Config(**SHAPE), 1)])  # fmt: skip
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_a_gated_mlp_is_known_by_what_it_gives(kind: Any, config: Any, way: int, dtype: torch.dtype) -> None:
    """Would catch gate and up exchanged, one GELU taken for the other, and a product that is rounded once instead of twice."""
    module = kind(config).to(DEVICE, dtype).eval()
    found = gating_of(module)
    assert found == Gating("gate_proj", "up_proj", "down_proj", way)
    x = torch.randn(5, 1, 32, device=DEVICE).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(gate_forwards(module)[module](x), module(x))
    gate, up = (torch.randn(3, 1100, device=DEVICE).to(dtype) * 5 for _ in range(2))
    act = gating._ACTIVATIONS[way]
    exact = (act(gate.double()) * up.double()).abs()
    off = (gated(gate, up, way).double() - (act(gate) * up).double()).abs()
    off -= 4 * torch.finfo(torch.float32).eps * (gate * up).double().abs()  # 1 + tanh cancels
    assert bool((off <= 4 * torch.finfo(dtype).eps * exact).all())
    if dtype == HALF:
        assert int((off > 0).sum()) <= off.numel() // 200
    assert torch.equal(gated(gate.T, up.T, way), (act(gate) * up).T)


def test_roles_are_found_whatever_the_names_and_other_formulas_left_alone() -> None:
    assert gating_of(Named("silu").to(DEVICE).eval()) == Gating("w1", "w3", "w2", 0)
    assert gating_of(Named("relu").to(DEVICE).eval()) is None
    assert gating_of(Named("clamped").to(DEVICE).eval()) is None
    assert gating_of(Named("silu").to(DEVICE)) is None  # in training
    held = Named("silu").to(DEVICE).eval()
    held.forward = held.forward  # type: ignore[method-assign]  # somebody else's
    assert gating_of(held) is None
    changed = LlamaMLP(LlamaConfig(**SHAPE)).to(DEVICE).eval()
    assert gating_of(changed) is not None
    changed.act_fn = nn.ReLU()
    assert gating_of(changed) is None


@pytest.mark.parametrize(("outs", "rows", "ins", "split"), [(48, 5, 96, 1), (80, 33, 160, 3), (16, 1, 64, 2)])
@pytest.mark.parametrize("kind", [0, 1])
@torch.no_grad()
def test_both_products_and_their_gate_at_once(outs: int, rows: int, ins: int, split: int, kind: int) -> None:
    """Against sums in float64 that are rounded where the plain code rounds them. Would catch gate and up exchanged in one of the parts, a bias that is
    added to every part, and outputs that fill no tile written over the next row."""
    gate, up = (nn.Linear(ins, outs, bias=split > 1).to(DEVICE, HALF) for _ in range(2))
    x = (torch.randn(rows, 1, ins, device=DEVICE) * 4).to(HALF)
    counts = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    tile = Tile(outs=32, ins=32, split=split, warps=4, stages=2)
    found = gated_products(x, gate, up, kind, counts, tile)
    a, b = (functional.linear(x.double(), m.weight.double(), None if m.bias is None else m.bias.double()).to(HALF) for m in (gate, up))  # fmt: skip
    expected = gating._ACTIVATIONS[kind](a) * b
    off = (found.double() - expected.double()).abs()
    eps = torch.finfo(HALF).eps
    assert bool((off <= 4 * eps * (expected.double().abs() + 0.2 * b.double().abs())).all())
    assert int((off > 0).sum()) <= max(2, off.numel() // 20)  # sums that lie at the middle of two numbers
    assert torch.equal(found, gated_products(x, gate, up, kind, counts, tile)) and not counts.any()
    with pytest.raises(ValueError, match="need as many counters"):
        gated_products(x, gate, up, kind, counts[:0], Tile(outs=32, ins=32, split=2, warps=4, stages=2))


@torch.no_grad()
def test_results_are_as_near_to_float64_as_the_plain_codes() -> None:
    """The kernels of products and gates against PyTorch's own products and activations in the same dtype, both against float64 without any rounding:
    another order of the sums may move single entries, but must not make the error larger. Would catch sums in half precision, and a rounding more."""
    gate, up = (nn.Linear(1024, 96).to(DEVICE, HALF) for _ in range(2))
    x = (torch.randn(32, 1024, device=DEVICE) * 3).to(HALF)
    counts = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    exact = [functional.linear(x.double(), m.weight.double(), m.bias.double()) for m in (gate, up)]
    tile = Tile(outs=32, ins=128, split=4, warps=4, stages=3)

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.double() - expected).norm() / expected.norm())

    together = products(x, [gate.weight, up.weight], [gate.bias, up.bias], counts, tile)
    for found, module, expected in zip(together, (gate, up), exact, strict=True):
        assert 0 < error(found, expected) <= 1.1 * error(module(x), expected)
    for kind, act in enumerate(gating._ACTIVATIONS):
        expected = act(exact[0]) * exact[1]
        plain = error(act(gate(x)) * up(x), expected)
        assert 0 < error(gated_products(x, gate, up, kind, counts, tile), expected) <= 1.1 * plain


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_a_model_writes_the_same_with_fewer_activations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial against `generate()`. Would catch forwards that nobody calls, and such that outlive the block."""
    monkeypatch.setattr(fusing, "kernels_run", lambda device: True)
    model = tiny_model("llama").to(DEVICE, dtype)
    loaded = LoadedModel("llama", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)
    gate_forwards(model)  # tried
    calls: list[int] = []
    name = "gated" if dtype == torch.float32 else "gated_products"
    plain = getattr(gating, name)
    monkeypatch.setattr(gating, name, lambda *given: calls.append(1) or plain(*given))
    assert try_static(loaded) is None
    assert len(calls) in (
        (12, 13) if CUDA else (6 * (generating._TRIAL_STEPS - 1) + n for n in (0, 1))
    )  # and the trial
    assert not any("forward" in module.__dict__ for module in model.modules())
