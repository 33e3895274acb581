"""Sums that wait for their norm and rotations that wait for the cache, against the same one by one; without a GPU Triton interprets the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from families import tiny_model, tiny_tokenizer
from kernels import DEVICE, HALF, needs_kernels
from prunescope.models import fusing
from prunescope.models.anatomy import find_anatomy
from prunescope.models.deferring import Deferring, current, take
from prunescope.models.fusing import fused_norm, fused_rotation, write_token
from prunescope.models.generating import try_static
from prunescope.models.loaded import LoadedModel

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fusing, "kernels_run", lambda device: True)


def random(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("kind", "way"), [(LlamaRMSNorm, 0), (Gemma2RMSNorm, 2)])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@torch.no_grad()
def test_a_norm_takes_its_sum(kind: Any, way: int, dtype: torch.dtype) -> None:
    """The bits of a sum and a norm after another, and the sum is there. Would catch a norm of what was not rounded yet."""
    module = kind(40, eps=1e-5).to(DEVICE, dtype)
    x, y = random(3, 1, 40, dtype=dtype), random(3, 1, 40, dtype=dtype)
    total = x + y
    expected = fused_norm(module, way, total)
    with Deferring({40}) as deferring:
        waits = x + y
        assert deferring.waiting is not None and deferring.waiting.results[0] is waits
        found = fused_norm(module, way, waits)
        assert deferring.waiting is None
    assert current() is None
    assert torch.equal(waits, total) and torch.equal(found, expected)


@torch.no_grad()
def test_whoever_looks_first_sees_the_sum() -> None:
    """Would catch a tensor that is read, or whose parts are changed, before it was computed."""
    x, y = random(2, 1, 24), random(2, 1, 24)
    total = x + y
    looks: list[Any] = [lambda s: s * 1, lambda s: s[0], lambda s: s.shape, lambda s: s.data_ptr(), lambda s: y.dtype]
    for look in looks:
        with Deferring({24}) as deferring:
            waits = torch.add(x, y)
            look(waits)
            assert deferring.waiting is None
        assert torch.equal(waits, total)
    with Deferring({24}):
        first = x + y
        x.add_(1)
        second = x + y
    assert torch.equal(first, total) and torch.equal(second, x + y)
    left: list[Tensor] = []

    def fail() -> None:
        with Deferring({24}):
            left.append(x + y)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(left[0], second) and current() is None


@torch.no_grad()
def test_what_no_norm_could_take_does_not_wait() -> None:
    x = random(2, 1, 24)
    with Deferring({24}) as deferring:
        for other in (x[:1], 1.0, x.float(), random(2, 1, 48)[..., ::2]):
            assert torch.equal(x + other, x.add(other))
            assert deferring.waiting is None
        with torch.enable_grad():
            x + x
            assert deferring.waiting is None
        x + x
        assert deferring.waiting is not None
        assert take(x) is None  # it is another one that waits


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@torch.no_grad()
def test_turned_keys_go_to_the_cache_at_once(dtype: torch.dtype) -> None:
    """Against rotation and `index_copy_`. Would catch keys written before they are turned, values at the place of keys, and a cache that is written
    by a rotation of other keys."""
    plain = modeling_llama.apply_rotary_pos_emb
    q, k = (random(3, 1, n, 16, dtype=dtype).transpose(1, 2) for n in (6, 2))
    v = random(3, 1, 2, 24, dtype=dtype).transpose(1, 2)
    cos, sin = random(2, 3, 1, 16, dtype=dtype)
    keys, values = random(3, 2, 5, 16, dtype=dtype), random(3, 2, 5, 24, dtype=dtype)
    position = torch.tensor([3], device=DEVICE)
    turned = plain(q, k, cos, sin)
    expected = keys.index_copy(2, position, turned[1]), values.index_copy(2, position, v)
    for same in (True, False):
        held = keys.clone(), values.clone()
        with Deferring(set()) as deferring:
            q_out, k_out = fused_rotation(plain, q, k, cos, sin)
            assert deferring.waiting is not None
            write_token(*held, k_out if same else turned[1], v, position)
        for one, other in zip((q_out, k_out, *held), (*turned, *expected), strict=True):
            assert torch.equal(one, other)


def test_a_model_writes_the_same_with_sums_in_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial against `generate()`; of a block's two sums one is taken by its second norm, one by the next block's first or by the last."""
    model = tiny_model("llama").to(DEVICE)
    loaded = LoadedModel("llama", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)
    taken: list[int] = []

    def counted(result: Tensor) -> Any:
        found = take(result)
        taken.append(0 if found is None else len(found.results))
        return found

    monkeypatch.setattr(fusing, "take", counted)
    assert try_static(loaded) is None
    steps = len(taken) // 19  # 13 norms and 6 caches a step
    assert taken.count(1) == 12 * steps > 0 and taken.count(2) == 6 * steps


def test_another_thread_defers_nothing() -> None:
    """Would catch a norm of one thread that takes a sum of another."""
    from threading import Thread

    seen: list[Any] = []
    with Deferring({8}):
        other = Thread(target=lambda: seen.append(current()))
        other.start()
        other.join()
        assert current() is not None
    assert seen == [None] and current() is None


def test_what_is_scripted_or_compiled_gets_finished_sums() -> None:
    """No function mode sees into it. Would catch a model of such modules that is given tensors with nothing in them."""
    model = tiny_model("llama")
    assert all(map(fusing._seen_through, model.modules()))
    model.model.layers[1].mlp.compile(backend="eager")
    assert not all(map(fusing._seen_through, model.modules()))
