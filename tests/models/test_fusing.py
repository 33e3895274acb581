"""Norms and rotations of one kernel against the modules of transformers; without a GPU Triton interprets the kernels, in float16, since it cuts
bfloat16 off where a GPU rounds."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from families import tiny_model, tiny_tokenizer
from kernels import CUDA, DEVICE, HALF, needs_kernels
from prunescope.models import fusing, generating
from prunescope.models.anatomy import find_anatomy
from prunescope.models.fusing import fused, fused_norm, fused_rotation, norm_way, rotates_plainly
from prunescope.models.generating import try_static
from prunescope.models.loaded import LoadedModel

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "kernels_run", lambda device: device.type != "meta")


class Centred(LlamaRMSNorm):  # type: ignore[misc]
    """Looks like a norm, and takes the mean away."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x - x.mean(-1, keepdim=True))


class Later(LlamaRMSNorm):  # type: ignore[misc]
    """Its epsilon is added behind the root."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(x.dtype)


@pytest.mark.parametrize("width", [24, 1000])
@pytest.mark.parametrize(("kind", "way"), [(LlamaRMSNorm, 0), (Olmo2RMSNorm, 1), (Gemma2RMSNorm, 2)])
def test_a_norm_is_known_by_what_it_gives(kind: Any, way: int, width: int) -> None:
    """Then rows of other lengths and strides, heads of a transposed tensor among them, agree but for single places. Would catch a weight that
    is applied on the other side of the rounding, padding that counts in the mean, and a stride taken for granted."""
    module = kind(width, eps=1e-5).to(DEVICE, HALF)
    module.weight.data.normal_(1, 0.3)
    assert norm_way(module) == way
    x = torch.randn(2, 5, 3, width, device=DEVICE).to(HALF)
    for rows in (x, x.transpose(1, 2), x[:, 0], x[0, 0, 0] * 1e-3):
        with torch.no_grad():
            expected, found = module(rows), fused_norm(module, way, rows)
        off = (found.double() - expected.double()).abs()
        assert bool((off <= 2 * torch.finfo(HALF).eps * expected.double().abs()).all())
        assert int((off > 0).sum()) <= max(1, off.numel() // 200)


@pytest.mark.parametrize("module", [nn.LayerNorm(32), nn.LayerNorm(32, bias=False), Centred(32), Later(32), nn.Linear(8, 8), nn.PReLU(4)])  # fmt: skip
def test_what_is_not_one_of_these_norms_is_left_alone(module: nn.Module) -> None:
    assert norm_way(module.to(DEVICE, HALF)) is None


def test_a_forward_that_somebody_has_put_there_stays() -> None:
    module = LlamaRMSNorm(16).to(DEVICE)
    module.forward = lambda x: x
    assert norm_way(module) is None


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(("heads", "of_keys", "tokens", "width"), [(6, 2, 1, 16), (3, 3, 2, 24)])
def test_a_rotation_gives_the_same_bits(dtype: torch.dtype, heads: int, of_keys: int, tokens: int, width: int) -> None:
    """Would catch the halves swapped, a sign, a head of the keys read as one of the queries, and sums rounded once instead of twice."""
    plain = modeling_llama.apply_rotary_pos_emb
    assert rotates_plainly(plain, dtype, DEVICE)
    q, k = (torch.randn(3, tokens, n, width, device=DEVICE).to(dtype).transpose(1, 2) for n in (heads, of_keys))
    for texts in (3, 1):
        cos, sin = torch.randn(2, texts, tokens, width, device=DEVICE).to(dtype)
        for one, other in zip(fused_rotation(plain, q, k, cos, sin), plain(q, k, cos, sin), strict=True):
            assert torch.equal(one, other) and one.is_contiguous()


def test_other_rotations_are_refused_and_other_calls_passed_on() -> None:
    """Pairs of neighbours instead of halves, and the other sign. What a rotation is not called with in a step goes to the plain function."""
    plain = modeling_llama.apply_rotary_pos_emb

    def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos[:, None], sin[:, None]
        return tuple(x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))

    assert not rotates_plainly(neighbours, torch.float32, DEVICE)
    assert not rotates_plainly(lambda q, k, cos, sin: plain(q, k, cos, -sin), torch.float32, DEVICE)
    assert not rotates_plainly(lambda q: q, torch.float32, DEVICE)
    q, k = torch.randn(2, 3, 1, 4, 16, device=DEVICE)
    cos, sin = torch.randn(2, 3, 1, 16, device=DEVICE)
    for one, other in zip(fused_rotation(plain, q, k, cos, sin, unsqueeze_dim=2), plain(q, k, cos, sin, unsqueeze_dim=2), strict=True):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_model_writes_the_same_with_fewer_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial against `generate()`, with queries and keys normed too, and norms of the other kind. Would catch replacements that are never
    called, and such that outlive the block."""
    model = tiny_model(family).to(DEVICE)
    loaded = LoadedModel(family, model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)
    calls = {"norm": 0, "rotation": 0}

    def counted(name: str, plain: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return plain(*args, **options)

        return call

    home = vars(sys.modules[type(model).__module__])
    before = home["apply_rotary_pos_emb"]
    norms = [module for module in model.modules() if norm_way(module) is not None]
    assert rotates_plainly(before, torch.float32, DEVICE)
    monkeypatch.setattr(fusing, "fused_norm", counted("norm", fused_norm))
    monkeypatch.setattr(fusing, "fused_rotation", counted("rotation", fused_rotation))
    assert try_static(loaded) is None
    steps = generating._TRIAL_STEPS - 1
    if not CUDA:
        assert calls == {"norm": steps * len(norms), "rotation": steps * 6}
    assert home["apply_rotary_pos_emb"] is before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_nothing_is_left_behind_by_an_error() -> None:
    model = tiny_model("llama").to(DEVICE)
    before = modeling_llama.apply_rotary_pos_emb
    seen = []

    def fail() -> None:
        with fused(model):
            seen.append(modeling_llama.apply_rotary_pos_emb)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0] is not before
    assert modeling_llama.apply_rotary_pos_emb is before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_two_norms_of_one_class_are_two_norms() -> None:
    """One that multiplies by its weight and one by one plus it. Would catch the way of the first taken for the second."""

    class Either(nn.Module):
        def __init__(self, unit: bool) -> None:
            super().__init__()
            self.weight, self.eps, self.unit = nn.Parameter(torch.randn(64, device=DEVICE), False), 1e-6, unit

        def forward(self, x: Tensor) -> Tensor:
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            return normed * (1 + self.weight if self.unit else self.weight)

    ways = [norm_way(Either(unit)) for unit in (False, True)]
    assert None not in ways and ways[0] != ways[1]
