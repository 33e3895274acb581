"""What is found in a model is checked by running it; what does not fit is an error, never half-understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from families import _COMMON, FAMILIES, tiny_model
from prunescope.errors import UserError
from prunescope.models.anatomy import find_anatomy
from prunescope.models.dropping import DropSpec, drop_sublayers

PARALLEL = {"gpt_neox", "falcon", "falcon_new"}
POST_NORM = {"gemma2", "gemma3", "olmo2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_found(family: str) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    assert len(anatomy) == 6
    assert anatomy.final_norm is not None
    assert anatomy.head is model.get_output_embeddings()
    assert {block.parallel for block in anatomy.blocks} == {family in PARALLEL}
    assert all((part.post is not None) == (family in POST_NORM) for part in anatomy.sublayers())
    assert all((part.pre is None) == (family == "olmo2") for part in anatomy.sublayers())
    assert all(part.scale == (0.4 if family == "granite" else 1.0) for part in anatomy.sublayers())
    assert anatomy.logit_softcap == (5.0 if family == "gemma2" else None)
    assert anatomy.logit_scale == pytest.approx(1 / 3 if family == "granite" else 1.0)


UNSEEN: dict[str, Callable[[], Any]] = {  # families that no line of the code was written for
    "cohere": lambda: transformers.CohereConfig(**_COMMON, logit_scale=0.3),
    "phi": lambda: transformers.PhiConfig(**_COMMON),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=64, rotary_dim=8, bos_token_id=1, eos_token_id=2
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**_COMMON),
    "glm4": lambda: transformers.Glm4Config(**_COMMON, head_dim=8),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**_COMMON),
}


@pytest.mark.parametrize("family", UNSEEN)
def test_a_new_family_needs_nothing(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(UNSEEN[family]()).eval()
    drop_sublayers(model, find_anatomy(model), DropSpec(attn=(0, 2), mlp=(1,)))
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        uncached = model(out.sequences[:, :-1], use_cache=False).logits[:, 6:]
    torch.testing.assert_close(torch.stack(out.logits, 1), uncached, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: transformers.MiniMaxConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=8, num_local_experts=4, full_attn_alpha_factor=2.0, linear_attn_alpha_factor=2.0, mlp_alpha_factor=2.0,
            ),
            "layer 0: stream before",
        ),
        (lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "no MLP ran"),
        (lambda: transformers.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "does not read the residual stream"),
    ],
)  # fmt: skip
def test_an_architecture_that_does_not_fit_says_why(config: Callable[[], Any], message: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(UserError, match=message):
        find_anatomy(model)


def test_a_stream_that_is_not_a_sum_is_refused() -> None:
    """A branch that is scaled in a way that nobody told us about must fail the load, not shift every number."""
    model = tiny_model("llama")
    block = model.model.layers[3]
    block.register_forward_hook(lambda _, __, out: out * 0.9)
    with pytest.raises(
        UserError, match=r"layer 3: stream before \+ attention branch \+ MLP branch is not the stream after"
    ):
        find_anatomy(model)


def test_logits_that_are_not_head_of_norm_are_refused() -> None:
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = None
    original = model.forward
    model.forward = lambda *a, **k: (lambda out: setattr(out, "logits", out.logits.tanh()) or out)(original(*a, **k))
    with pytest.raises(UserError, match="differs from the model's logits"):
        find_anatomy(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_the_check(dtype: torch.dtype) -> None:
    for family in ("llama", "gemma2", "granite", "falcon"):
        find_anatomy(tiny_model(family).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_neox", "falcon", "falcon_new"])
def test_parallel_blocks_pass_whatever_the_weights(family: str, dtype: torch.dtype) -> None:
    """Attention and stream may cancel each other: the slack must follow the parts, not their sum."""
    for seed in range(12):
        find_anatomy(tiny_model(family, seed).to(dtype))


def test_overflow_on_the_probe_is_called_that() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"overflow in torch\.float16 on a probe; try --dtype float32"):
        find_anatomy(model.half())
