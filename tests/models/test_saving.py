"""Checkpoint formats on every family: plain transformers must load the dropped model, not the dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, VOCAB, tiny_folder, tiny_model
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model
from prunescope.models.saving import save_dropped

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("form", "spec"), [("zeroed", DropSpec(attn=(0, 3), mlp=(1, 3, 5))), ("compact", DropSpec.parse("block=0,3-4"))]
)
def test_plain_transformers_loads_the_dropped_model(family: str, form: str, spec: DropSpec, tmp_path: Path) -> None:
    """Would catch a projection that was missed, a bias left behind, a per-layer list not cut, and a layer number kept."""
    loaded = load_model(tiny_folder(family, tmp_path / "dense"), device="cpu")
    before = run(loaded.model)
    with loaded.dropping(spec):
        expected = run(loaded.model)
    out = tmp_path / form
    out.mkdir()
    save_dropped(loaded, spec, out, form)  # type: ignore[arg-type]
    assert torch.equal(run(loaded.model), before), "saving must leave the dense model as it was"
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(run(plain), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-2
    again = load_model(out, device="cpu")
    torch.testing.assert_close(run(again.model), expected, atol=1e-5, rtol=1e-5)
    if form == "compact":
        assert again.dropped == spec
        assert again.layer_map == (1, 2, 5)
        with torch.no_grad():
            tokens = plain.generate(
                IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, eos_token_id=None
            )
        assert tokens.shape == (2, 17)


def test_recipe_has_no_weights_and_loads_dropped(tmp_path: Path) -> None:
    dense = load_model(tiny_folder("llama", tmp_path / "dense"), device="cpu")
    spec = DropSpec(attn=(0, 2), mlp=(5,))
    with dense.dropping(spec):
        expected = run(dense.model)
    out = tmp_path / "recipe"
    out.mkdir()
    save_dropped(dense, spec, out, "recipe")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "prunescope.json"]
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(run(load_model(out, device="cpu").model), expected)


def test_recipe_refuses_a_base_that_changed(tmp_path: Path) -> None:
    dense = load_model(tiny_folder("llama", tmp_path / "dense"), device="cpu")
    out = tmp_path / "recipe"
    out.mkdir()
    save_dropped(dense, DropSpec(attn=(1,)), out, "recipe")
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="content_hash"):
        load_model(out, device="cpu")


def test_llm_drop_folder_is_read(tmp_path: Path) -> None:
    """Published folders keep weights beside `drop_*_list`; weights of dropped sublayers may be absent, others may not."""
    from safetensors.torch import load_file, save_file

    folder = tiny_folder("llama", tmp_path / "published")
    dense = load_model(folder, device="cpu")
    with dense.dropping(DropSpec(attn=(1, 4))):
        expected = run(dense.model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"drop_attn_list": [4, 1], "drop_mlp_list": None}))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if ".4.self_attn" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    loaded = load_model(folder, device="cpu")
    assert loaded.dropped == DropSpec(attn=(1, 4))
    assert torch.equal(run(loaded.model), expected)
    save_file(
        {k: v for k, v in weights.items() if ".2.self_attn" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"weights are missing, first model\.layers\.2"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("spec", ["attn=1", "block=1;mlp=2"])
def test_compact_refuses_half_a_block(spec: str, tmp_path: Path) -> None:
    dense = load_model(tiny_folder("llama", tmp_path / "dense"), device="cpu")
    with pytest.raises(UserError, match="whole blocks"):
        save_dropped(dense, DropSpec.parse(spec), tmp_path, "compact")


def test_compact_refuses_settings_that_follow_the_layer_number(tmp_path: Path) -> None:
    """GPT-2 may divide attention by layer number + 1 at construction: a renumbered block would compute something else."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=6, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    )
    folder = tiny_folder("gpt2", tmp_path / "dense")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    dense = load_model(folder, device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="scaling"):
        save_dropped(dense, DropSpec.parse("block=1"), out, "compact")


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (
            {"drop_attn_list": [False, False, False, True, False, False], "drop_mlp_list": [False] * 6},
            DropSpec(attn=(3,)),
        ),
        ({"drop_attn_list": [None, True, None, None, None, None], "drop_mlp_list": []}, DropSpec(attn=(1,))),
        ({"drop_attn_list": [5, 2], "drop_mlp_list": [0]}, DropSpec(attn=(2, 5), mlp=(0,))),
    ],
)
def test_llm_drop_lists_of_indices_and_of_booleans(
    lists: dict[str, list[object]], expected: DropSpec, tmp_path: Path
) -> None:
    """LLM-Drop's own config class turns index lists into one boolean a layer: True is not layer 1."""
    folder = tiny_folder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | lists))
    assert load_model(folder, device="cpu").dropped == expected


def test_a_missing_mlp_is_not_excused_by_a_dropped_attention(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_folder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"drop_attn_list": [4]}))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if ".4.mlp" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing, first model\.layers\.4\.mlp"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("form", ["zeroed", "compact"])
def test_weights_keep_the_dtype_they_have_on_disk_and_stay_tied(form: str, tmp_path: Path) -> None:
    """A bf16 checkpoint is loaded as float32 on a CPU; what is written must be bf16 again, bit for bit."""
    import transformers
    from safetensors.torch import load_file

    from families import CONFIGS, tiny_tokenizer

    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    folder = tmp_path / "dense"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    loaded = load_model(folder, device="cpu")
    assert loaded.dtype == torch.float32
    out = tmp_path / "out"
    out.mkdir()
    save_dropped(loaded, DropSpec.parse("block=5"), out, form)  # type: ignore[arg-type]
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in after
    for name, value in after.items():
        if ".5." not in name:
            assert torch.equal(value, before[name]), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.dtype == loaded.model.config.dtype == torch.float32
