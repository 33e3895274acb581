"""What MODEL may be: identities against a hash made by hand, adapters against A and B multiplied by hand, quantised weights against their codes."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import prunescope
from families import tiny_folder, tiny_tokenizer
from prunescope.errors import UserError
from prunescope.models.blockwise import stream_model
from prunescope.models.dropping import DropSpec
from prunescope.models.hub import one_try
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.references import is_drop
from prunescope.models.variants import VariantSpec, read_variant

IDS = torch.arange(4, 14)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def plain(folder: Path) -> Any:
    """The folder in transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_target_is_read_once_for_all_commands(dense: LoadedModel) -> None:
    assert read_variant("drop:attn=1;mlp=0-2") == DropSpec((1,), (0, 1, 2))
    assert read_variant("drop:attn=1+quant:int8") == VariantSpec.parse("drop:attn=1+quant:int8")
    assert read_variant("org/model") is None
    assert read_variant(dense) is None and read_variant(None) is None
    assert is_drop("drop:") and not is_drop("./drop:attn=1") and not is_drop(dense)
    with pytest.raises(UserError, match="cannot read 'head=3'"):
        read_variant("drop:head=3")


def test_the_identity_of_a_folder_is_a_hash_of_its_weights_and_config(dense_folder: Path) -> None:
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        content = (dense_folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    expected = {"source": str(dense_folder.resolve()), "content_hash": f"sha256:{digest.hexdigest()}"}
    assert load_model(dense_folder, device="cpu").identity == expected
    (dense_folder / "README.md").write_text("not a part of the model")
    assert load_model(dense_folder, device="cpu").identity == expected


def test_a_missing_tokenizer_is_said_in_whole_sentences(dense_folder: Path) -> None:
    for path in dense_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded: no tokenizer\.json, .* is there; put"):
        load_model(dense_folder, device="cpu")


def test_a_config_that_does_not_fit_is_said_in_whole_sentences(dense_folder: Path) -> None:
    """transformers puts what is wrong on the line after a colon, or into a report of its own."""
    rewrite(dense_folder / "config.json", hidden_size="32")
    with pytest.raises(UserError, match=r"field 'hidden_size': .*expected int, got str"):
        load_model(dense_folder, device="cpu")
    rewrite(dense_folder / "config.json", hidden_size=32, vocab_size=1000)
    with pytest.raises(UserError, match=r"other shapes than its config\.json says"):
        load_model(dense_folder, device="cpu")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The switches of both libraries are thrown within the block, and back after it, whatever happens there."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(ZeroDivisionError), one_try():  # noqa: PT012
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    assert asked == [constants.ENDPOINT]
    said = " ".join(capfd.readouterr().err.split())
    assert "cannot be reached (Name or service not known)" in said and "and more" not in said


# --- adapters ------------------------------------------------------------------------------------------------------------


RANK, ALPHA = 2, 6


def make_adapter(base: Path, folder: Path, seed: int = 3) -> Path:
    """A LoRA with random A and B, in the files that peft writes, made without peft."""
    torch.manual_seed(seed)
    weights = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "q_proj" in name or "down_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, weight.shape[1]) * 0.3
            weights[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], RANK) * 0.3
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA},
        **{"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": str(base), "inference_mode": True},
    }
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_hand(base: Path, adapter: Path) -> Any:
    """W + alpha / r * B A."""
    model = plain(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in weights.items():
            if ".lora_A." in name:
                module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                b = weights[name.replace(".lora_A.", ".lora_B.")]
                model.get_submodule(module).weight += ALPHA / RANK * (b @ a)
    return model


def test_an_adapter_is_merged_into_its_base(dense_folder: Path, tmp_path: Path, capfd: Any) -> None:
    """Given beside the model, or as the model: the same weights, plain modules, and an identity of its own that says which adapter it was."""
    adapter = make_adapter(dense_folder, tmp_path / "lora")
    expected = logits(by_hand(dense_folder, adapter))
    assert (expected - logits(plain(dense_folder))).abs().max() > 0.1
    for ref, beside in ((dense_folder, adapter), (adapter, None)):
        capfd.readouterr()
        loaded = load_model(ref, adapter=beside, device="cpu")
        assert torch.allclose(logits(loaded.model), expected, atol=1e-5)
        assert f"adapter {adapter} merged into {dense_folder}" in "".join(capfd.readouterr().err.splitlines())
        assert all("lora" not in name for name, _ in loaded.model.named_modules())
        told = loaded.describe()
        assert (told["source"], told["adapter"]) == (str(dense_folder.resolve()), str(adapter.resolve()))
        assert told["adapter_hash"].startswith("sha256:")
        assert told["content_hash"] == load_model(dense_folder, device="cpu").identity["content_hash"]
    assert loaded.ref == str(adapter)
    loaded.model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain(tmp_path / "merged")), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["zeroed", "recipe"])
def test_what_is_dropped_from_a_merged_model_loads_again(dense_folder: Path, tmp_path: Path, form: Any) -> None:
    """A recipe remembers the adapter, and refuses another in its place."""
    adapter = make_adapter(dense_folder, tmp_path / "lora")
    found = prunescope.drop(
        str(adapter), n=1, samples=2, seq_len=8, format=form, out=str(tmp_path / "out"), device="cpu"
    )
    again = load_model(tmp_path / "out", device="cpu")
    assert again.dropped == found.spec
    expected = load_model(adapter, device="cpu", drop=found.spec)
    assert torch.allclose(logits(again.model), logits(expected.model), atol=1e-5)
    shutil.rmtree(adapter)
    make_adapter(dense_folder, adapter, seed=4)
    if form == "recipe":
        with pytest.raises(UserError, match=r"the recipe was made from .* with adapter_hash sha256"):
            load_model(tmp_path / "out", device="cpu")
    else:
        with pytest.raises(UserError, match="was pruned without the adapter"):
            load_model(tmp_path / "out", adapter=adapter, device="cpu")


def test_weights_are_pruned_with_the_adapter_merged(dense_folder: Path, tmp_path: Path) -> None:
    """Block by block from disk too; the second opening reads what the first one merged."""
    adapter = make_adapter(dense_folder, tmp_path / "lora")
    expected = by_hand(dense_folder, adapter)
    for _ in range(2):
        streamed = stream_model(str(adapter), tmp_path / "scratch", device="cpu")
        assert streamed.loaded.identity["adapter"] == str(adapter.resolve())
        with streamed.running():
            assert torch.allclose(logits(streamed.model), logits(expected), atol=1e-5)
    found = prunescope.sparsify(
        str(adapter), method="magnitude", sparsity=0.5, calibration="none", out=str(tmp_path / "half"), device="cpu"
    )
    assert found.record["base"]["adapter"] == str(adapter.resolve())
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = next(w[name] for w in map(load_file, (tmp_path / "half").glob("*.safetensors")) if name in w)
    dense = expected.state_dict()[name]
    assert torch.allclose(kept[kept != 0], dense[kept != 0], atol=1e-6) and (kept == 0).float().mean() == 0.5


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_base(adapter: Path, dense: Path) -> Path:
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=None)
    return adapter


def base_elsewhere(adapter: Path, dense: Path) -> Path:
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(dense.parent / "moved"))
    return adapter


def beside_the_model(adapter: Path, dense: Path) -> Path:
    for path in adapter.iterdir():
        shutil.copy(path, dense)
    return dense


def pickled(adapter: Path, dense: Path) -> Path:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    return adapter


def truncated(adapter: Path, dense: Path) -> Path:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    return adapter


def of_a_deeper_model(adapter: Path, dense: Path) -> Path:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(weights | {name.replace("layers.5", "layers.9"): value.clone() for name, value in weights.items()}, path)
    return adapter


def incomplete(adapter: Path, dense: Path) -> Path:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path)
    return adapter


def of_a_wider_model(adapter: Path, dense: Path) -> Path:
    path = adapter / "adapter_model.safetensors"
    save_file({name: value.repeat(2, 2) for name, value in load_file(path).items()}, path)
    return adapter


def broken_config(adapter: Path, dense: Path) -> Path:
    (adapter / "adapter_config.json").write_text("[1")
    return adapter


def unknown_kind(adapter: Path, dense: Path) -> Path:
    rewrite(adapter / "adapter_config.json", peft_type="NOT_LORA")
    return adapter


def chain(adapter: Path, dense: Path) -> Path:
    other = adapter.with_name("second")
    shutil.copytree(adapter, other)
    rewrite(other / "adapter_config.json", base_model_name_or_path=str(adapter))
    return other


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_base, "names no base model; give the base model and --adapter"),
        (base_elsewhere, "is not there; give the base model and --adapter"),
        (beside_the_model, r"an adapter \(adapter_config.json\) lies beside the full model; move its files"),
        (pickled, "pickled weights are never read"),
        (truncated, "the adapter cannot be merged into"),
        (of_a_deeper_model, "have no counterpart, first"),
        (incomplete, "have no counterpart, first"),
        (of_a_wider_model, "the adapter cannot be merged into"),
        (broken_config, "adapter_config.json cannot be read"),
        (unknown_kind, "the adapter cannot be merged into"),
        (chain, "is an adapter too"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    spoil: Callable[[Path, Path], Path], message: str, dense_folder: Path, tmp_path: Path
) -> None:
    ref = spoil(make_adapter(dense_folder, tmp_path / "lora"), dense_folder)
    for opening in (
        lambda: load_model(ref, device="cpu"),
        lambda: stream_model(str(ref), tmp_path / "scratch", device="cpu"),
    ):
        with pytest.raises(UserError, match=message):
            opening()


def test_one_adapter_at_a_time(dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(dense_folder, tmp_path / "lora")
    with pytest.raises(UserError, match="give one of them"):
        load_model(adapter, adapter=adapter, device="cpu")
    with pytest.raises(UserError, match=r"no adapter_config\.json there"):
        load_model(dense_folder, adapter=dense_folder, device="cpu")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft merges adapters.*pip install 'prunescope\[adapters\]'"):
        load_model(adapter, device="cpu")


# --- quantised weights ---------------------------------------------------------------------------------------------------

_BLOCK = 16
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def quantise_fp8(folder: Path) -> dict[str, Tensor]:
    """Rewrite the matrices of the blocks as FP8 with a scale per 16 x 16; returns what each stands for, in float32."""
    stands_for, stored = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or ".layers." not in name:
            stored[name] = weight.bfloat16()
            stands_for[name] = stored[name].float()
            continue
        rows, columns = weight.shape[0] // _BLOCK, weight.shape[1] // _BLOCK
        tiles = weight.view(rows, _BLOCK, columns, _BLOCK)
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stands_for[name] = (codes.float() * scale[:, None, :, None]).view_as(weight)
        stored[name], stored[f"{name}_scale_inv"] = codes.view_as(weight), scale
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    rewrite(
        folder / "config.json",
        dtype="bfloat16",
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
    )
    return stands_for


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_block_fp8_weights_are_dequantised_on_a_cpu(dense_folder: Path, dtype: str) -> None:
    expected = quantise_fp8(dense_folder)
    loaded = load_model(dense_folder, device="cpu", dtype=dtype)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, expected[name].to(kind)), name


def mxfp4_folder(folder: Path) -> Path:
    """A tiny GPT-OSS as it is released: experts as blocks of 32 four-bit codes with a scale."""
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    config = transformers.GptOssConfig(
        vocab_size=64, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16", **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(120, 127, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rewrite(
        folder / "config.json",
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
    )
    return folder


def test_mxfp4_experts_are_their_codes(tmp_path: Path) -> None:
    folder = mxfp4_folder(tmp_path / "gpt-oss")
    stored = load_file(folder / "model.safetensors")
    loaded = load_model(folder, device="cpu")
    codes = stored["model.layers.1.mlp.experts.down_proj_blocks"].long()
    scales = stored["model.layers.1.mlp.experts.down_proj_scales"].double()
    values = torch.tensor(_E2M1, dtype=torch.float64)[torch.stack([codes & 15, codes >> 4], -1)].flatten(-2)
    expected = (values * 2 ** (scales - 127)[..., None]).flatten(2).transpose(1, 2)  # (experts, in, out)
    assert torch.equal(loaded.model.model.layers[1].mlp.experts.down_proj.double(), expected)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_what_is_written_of_a_dequantised_model_is_what_was_loaded(kind: str, tmp_path: Path) -> None:
    """transformers would quantise FP8 weights again, or write floats under the names of MXFP4 blocks, and then read random weights."""
    if kind == "mxfp4":
        folder = mxfp4_folder(tmp_path / "dense")
    else:
        quantise_fp8(folder := tiny_folder("llama", tmp_path / "dense"))
    found = prunescope.drop(
        str(folder), n=1, samples=2, seq_len=8, format="zeroed", out=str(tmp_path / "out"), device="cpu"
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(again[1].values())
    loaded = load_model(folder, device="cpu")
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the dtype that the config names, in which it is written
    loaded.drop(found.spec)
    assert torch.allclose(logits(again[0]), logits(loaded.model), atol=1e-5)


def test_a_model_of_linear_attention_alone_says_that_it_cannot_write(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A hybrid whose layers are all linear attention: transformers' cache raised a ValueError in the middle of the run."""
    from prunescope.cli import main
    from zoo import family_config

    config = family_config("qwen3_next")
    config.layer_types = ["linear_attention"] * config.num_hidden_layers
    folder = tmp_path / "linear"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "p.txt").write_text("w5 w6\n", "utf-8")
    out = tmp_path / "out"
    assert (
        main(
            [
                "layerwise",
                str(folder),
                "--prompts",
                str(tmp_path / "p.txt"),
                "--max-new-tokens",
                "2",
                "--device",
                "cpu",
                "--out",
                str(out),
            ]
        )
        == 2
    )
    assert "all of its layers are linear attention" in capfd.readouterr().err
    assert not out.exists()
