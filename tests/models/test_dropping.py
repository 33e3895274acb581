"""Dropping on every family, against plain transformers with the branch output zeroed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, VOCAB, tiny_model
from prunescope.errors import UserError
from prunescope.models.anatomy import find_anatomy
from prunescope.models.dropping import DropSpec, drop_sublayers

# By hand: the attribute names below are written out per family and owe nothing to the code under test.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "fc2")
POST_NORMS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
SPECS = {
    "attn": DropSpec(attn=(0, 2, 3)),
    "mlp": DropSpec(mlp=(0, 4)),
    "both": DropSpec(attn=(0, 1, 5), mlp=(1, 2, 5)),
    "no attention left": DropSpec(attn=(0, 1, 2, 3, 4, 5)),
    "everything": DropSpec(attn=(0, 1, 2, 3, 4, 5), mlp=(0, 1, 2, 3, 4, 5)),
}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 6)


def zeroed_by_hand(model: nn.Module, family: str, spec: DropSpec) -> list[Any]:
    """Hooks on the plain model that turn each branch's last output into zeros; its cache and masks stay those of the dense model."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = []
    for layer, block in enumerate(blocks_of(model)):
        for kind, names, post in (("attn", ATTENTION_NAMES, 0), ("mlp", MLP_NAMES, 1)):
            if layer in spec.layers(kind):  # type: ignore[arg-type]
                name = POST_NORMS[family][post] if family in POST_NORMS else next(n for n in names if hasattr(block, n))
                handles.append(getattr(block, name).register_forward_hook(zero))
    return handles


def logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("what", SPECS)
def test_dropped_logits_equal_hand_zeroed(family: str, what: str) -> None:
    """Would catch a branch whose post-norm bias, scale or second half survives, and a drop that does nothing."""
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    model = tiny_model(family)
    dense = logits(model, ids)
    handles = zeroed_by_hand(model, family, SPECS[what])
    expected = logits(model, ids, use_cache=False)
    for handle in handles:
        handle.remove()
    dropped = drop_sublayers(model, find_anatomy(model), SPECS[what])
    found = logits(model, ids, use_cache=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - dense).abs().max() > 1e-2
    dropped.restore()
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("what", SPECS)
def test_cached_generation_equals_uncached(family: str, what: str) -> None:
    """Would catch history lost after the first step, a mask of the wrong kind, and positions that restart at zero."""
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(2))
    model = tiny_model(family)
    drop_sublayers(model, find_anatomy(model), SPECS[what])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    left = 6 - len(SPECS[what].attn)
    cache = out.past_key_values
    assert len(cache.layers) == max(left, 1)
    assert sum(layer.keys.numel() > 0 for layer in cache.layers if layer.keys is not None) == left
    uncached = logits(model, out.sequences[:, :-1], use_cache=False)[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), uncached, atol=2e-4, rtol=1e-4)


def test_left_padded_batch_generates_what_single_prompts_do(family: str) -> None:
    model = tiny_model(family)
    drop_sublayers(model, find_anatomy(model), DropSpec(attn=(0, 3), mlp=(2,)))
    prompts = [torch.arange(3, 3 + n) for n in (4, 9)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        batch = torch.stack(model.generate(ids, attention_mask=mask, **options).logits, 1)
        for i, prompt in enumerate(prompts):
            alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options)
            torch.testing.assert_close(batch[i], torch.stack(alone.logits, 1)[0], atol=2e-4, rtol=1e-3)


def test_a_filled_dense_cache_is_refused() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        drop_sublayers(model, find_anatomy(model), DropSpec(attn=(0,)))
        with pytest.raises(ValueError, match="cache of its own"):
            model(input_ids=ids, past_key_values=cache)


def test_a_cache_of_another_drop_is_refused() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        dropped = drop_sublayers(model, find_anatomy(model), DropSpec(attn=(0,)))
        cache = model(input_ids=ids, use_cache=True).past_key_values
        dropped.restore()
        drop_sublayers(model, find_anatomy(model), DropSpec(attn=(5,)))
        with pytest.raises(ValueError, match="other sublayers dropped"):
            model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("what", ["attn", "no attention left"])
def test_beam_search_runs_on_a_dropped_model(what: str) -> None:
    model = tiny_model("gpt2")
    drop_sublayers(model, find_anatomy(model), SPECS[what])
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        with_cache, without = (
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=3,
                max_new_tokens=5,
                eos_token_id=None,
                do_sample=False,
                use_cache=c,
            )
            for c in (True, False)
        )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attn=0,5;mlp=7", DropSpec(attn=(0, 5), mlp=(7,))),
        ("mlp=7 ; attn=5,0", DropSpec(attn=(0, 5), mlp=(7,))),
        ("block=2-4", DropSpec(attn=(2, 3, 4), mlp=(2, 3, 4))),
        ("attn=3,3", DropSpec(attn=(3,))),
    ],
)
def test_spec_is_read(text: str, expected: DropSpec) -> None:
    assert DropSpec.parse(text) == expected
    assert DropSpec.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "attn", "attn=", "attn=x", "attn=4-2", "heads=3", "attn=1;;mlp=", "attn=-1"])
def test_bad_spec_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="drop spec"):
        DropSpec.parse(text)


def test_layer_out_of_range_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="layer 6 is out of range; the model has layers 0 to 5"):
        drop_sublayers(model, find_anatomy(model), DropSpec(attn=(6,)))
