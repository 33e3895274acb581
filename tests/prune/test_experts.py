"""Experts that are removed: who goes, against a count by hand in plain transformers, and what is left, against routers that cannot choose them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import prunescope
from families import VOCAB, tiny_folder, tiny_tokenizer
from prunescope.cli import main
from zoo import family_folder

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16,
    "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, str]] = {
    "mixtral": (transformers.MixtralConfig(**_SIZES, num_local_experts=8), "num_local_experts"),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig(**_SIZES, num_experts=8, moe_intermediate_size=16, shared_expert_intermediate_size=24),
        "num_experts",
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(**_SIZES, num_experts=8, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[1]),
        "num_experts",
    ),
    "olmoe": (transformers.OlmoeConfig(**_SIZES, num_experts=8), "num_experts"),
    "deepseek_v2": (
        transformers.DeepseekV2Config(**(_SIZES | _LATENT), n_group=2, topk_group=1, topk_method="group_limited_greedy"),
        "n_routed_experts",
    ),
    "deepseek_v3": (transformers.DeepseekV3Config(**(_SIZES | _LATENT), n_group=2, topk_group=1), "n_routed_experts"),
}  # fmt: skip
WORDS = " ".join(f"w{4 + (i * i * 7 + i) % 59}" for i in range(97))


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def dense(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, saved with its tokenizer; the bias that chooses experts is not zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family][0], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.dim() >= 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0, 0.05)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = (
        folder / "config.json"
    )  # the count as published models call it, where transformers has another name for it now
    path.write_text(path.read_text("utf-8").replace('"num_local_experts"', f'"{CONFIGS[family][1]}"'), "utf-8")
    (folder.parent / "text.txt").write_text(WORDS, "utf-8")
    return model


def prune(folder: Path, **more: Any) -> Any:
    options: dict[str, Any] = {"sparsity": 0.25, "samples": 6, "seq_len": 16, "device": "cpu", "cache": False}
    options |= {"calibration": str(folder / "text.txt"), "out": str(folder / "out")}
    return prunescope.sparsify(str(folder / "dense"), method="experts", **(options | more))


def routers(model: Any) -> dict[int, Any]:
    """By block, the module with a row for each of eight experts; told by its name, not as the code under test does."""
    return {i: block.mlp.gate for i, block in enumerate(model.model.layers) if hasattr(block.mlp, "gate")}


def by_hand(model: Any, tokens: Tensor) -> dict[int, Tensor]:
    """Saliencies by block: every expert's MLP written out, in float64, for the tokens that the router sends to it."""
    found = {}
    for layer, router in routers(model).items():
        seen: list[tuple[Tensor, Any]] = []
        experts = model.model.layers[layer].mlp.experts
        with torch.no_grad():
            handles = [
                router.register_forward_hook(
                    lambda _, args, out, seen=seen: seen.append((args[0].reshape(-1, 32), out))
                )
            ]
            for sample in tokens:
                model(input_ids=sample[None])
            handles[0].remove()
        total, count = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
        for states, (_, weights, chosen) in seen:
            for x, ws, places in zip(states.double(), weights.double(), chosen, strict=True):
                for w, expert in zip(ws, places.tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[expert].double() @ x).chunk(2)
                    y = experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)
                    total[expert] += w * y.norm()
                    count[expert] += 1
        found[layer] = (total / count.clamp(min=1)).detach()
    return found


def masked_logits(model: Any, removed: dict[int, list[int]], tokens: Tensor) -> Tensor:
    """The dense model's logits where its routers' logits of some experts are minus infinity: their rows are replaced in the product itself."""
    handles = []
    linear = torch.nn.functional.linear
    now: list[list[int]] = []

    def masking(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        return out.index_fill(-1, torch.tensor(now[0]), -torch.inf) if now and weight.shape[0] == 8 else out

    for layer, router in routers(model).items():
        handles.append(router.register_forward_pre_hook(lambda *_, gone=removed[layer]: now.append(gone)))
        handles.append(router.register_forward_hook(lambda *_: now.clear()))
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:  # a score of 0 with its bias could still be among the best
            bias[removed[layer]] = -torch.inf
    torch.nn.functional.linear = masking  # type: ignore[assignment]
    try:
        with torch.no_grad():
            return model(input_ids=tokens).logits  # type: ignore[no-any-return]
    finally:
        torch.nn.functional.linear = linear
        for handle in handles:
            handle.remove()


def test_every_family(family: str, tmp_path: Path) -> None:
    """Would catch weights of the wrong expert under a name that remains, tokens or router weights of another expert in a saliency, groups that lose
    unlike numbers, biases that are not cut, experts of the source that are copied along, and a config that says otherwise."""
    model = dense(family, tmp_path / "dense")
    result = prune(tmp_path)
    record, key = result.info, CONFIGS[family][1]
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert [
        config[name] for name in config if "experts" in name and "per_tok" not in name and "shared" not in name
    ] == [6]
    assert config[key] == 6
    removed = {row["layer"]: row["removed_experts"] for row in record["modules"]}
    assert sorted(removed) == sorted(routers(model))
    assert record["sparsity"] == 0.25
    ids = tiny_tokenizer()(WORDS, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[:96]).view(6, 16)
    groups = 2 if family.startswith("deepseek") else 1
    rows = {row["layer"]: row for row in record["modules"]}
    first = min(removed)  # later blocks read what pruned ones say
    expected = by_hand(model, tokens)[first]
    saliency = torch.tensor(rows[first]["saliency"], dtype=torch.float64)
    torch.testing.assert_close(saliency, expected, rtol=1e-4, atol=1e-7)
    expected = expected.view(groups, -1)
    lowest = expected.argsort(dim=1)[:, : 2 // groups] + torch.arange(groups)[:, None] * (8 // groups)
    assert removed[first] == sorted(lowest.flatten().tolist())
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(plain) is type(model)
    with torch.no_grad():
        found = plain.eval()(input_ids=tokens[:2]).logits
        assert not torch.allclose(found, model(input_ids=tokens[:2]).logits, atol=1e-3)
    torch.testing.assert_close(found, masked_logits(model, removed, tokens[:2]), rtol=1e-4, atol=1e-5)
    stored = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    experts = {name.rpartition(".experts.")[2].partition(".")[0] for name in stored if ".experts." in name}
    assert experts <= {*map(str, range(6)), "gate_up_proj", "down_proj"}


@pytest.mark.parametrize(("name", "key"), [("minimax_m2", "num_local_experts"), ("ernie4_5_moe", "moe_num_experts")])
def test_biases_that_are_not_the_routers(name: str, key: str, tmp_path: Path) -> None:
    """They choose experts and lie in the MLP, or in a module of their own, with the experts in the last dimension. Would catch one that keeps all its
    entries, or loses others than the router: the expected logits come from the dense model, with these entries at minus infinity."""
    model = family_folder(name, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(WORDS.replace("w5", "w4"), "utf-8")
    removed = {row["layer"]: row["removed_experts"] for row in prune(tmp_path, samples=2, seq_len=16).info["modules"]}
    plain, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert getattr(plain.config, key) == 3
    tokens = torch.arange(4, 16)[None]
    for buffer_name, value in [*model.named_buffers(), *model.named_parameters()]:
        if buffer_name.endswith("e_score_correction_bias"):
            value.data[..., removed[int(buffer_name.split(".layers.")[1].split(".")[0])]] = -torch.inf
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=tokens).logits for m in (plain, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after two of three blocks. Would catch a finished block that goes on with all its experts, and a bias that is cut twice."""
    dense("deepseek_v3", tmp_path / "dense")
    prune(tmp_path)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    from prunescope.prune import blocks

    plain = blocks.prune_block

    def failing(streamed: Any, plan: Any, layer: int, *more: Any) -> Any:
        if layer == 2:
            raise KeyboardInterrupt
        return plain(streamed, plan, layer, *more)

    monkeypatch.setattr(blocks, "prune_block", failing)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, out=str(tmp_path / "again"))
    monkeypatch.setattr(blocks, "prune_block", plain)
    prune(tmp_path, out=str(tmp_path / "again"), resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.safetensors")} == whole


def test_bfloat16_stays_as_it_was(tmp_path: Path) -> None:
    """What remains has its bits. Would catch a checkpoint written in the dtype of the computation."""
    model = dense("mixtral", tmp_path / "dense", torch.bfloat16)
    removed = {row["layer"]: row["removed_experts"] for row in prune(tmp_path).info["modules"]}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    for layer, gone in removed.items():
        kept = [i for i in range(8) if i not in gone]
        ours, theirs = (m.model.layers[layer].mlp for m in (plain, model))
        assert torch.equal(ours.gate.weight, theirs.gate.weight[kept])
        assert torch.equal(ours.experts.down_proj, theirs.experts.down_proj[kept])
        assert torch.equal(ours.experts.gate_up_proj, theirs.experts.gate_up_proj[kept])


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("mixtral", ("--sparsity", "0.9"), "its router needs 2 to choose 2 for a token; lower --sparsity"),
        ("mixtral", ("--sparsity", "0.01"), "no expert of 8 experts would be removed"),
        ("deepseek_v3", ("--sparsity", "0.75"), "in 2 groups would remain, but its router needs 4"),
        ("mixtral", ("--pattern", "2:4"), "removes whole experts"),
        ("mixtral", ("--sparsity", "0.25", "--calibration", "none"), "the others need a text"),
        ("llama", ("--sparsity", "0.25"), "no block has routed experts"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    family: str, options: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written."""
    if family == "llama":
        tiny_folder("llama", tmp_path / "dense")
    else:
        dense(family, tmp_path / "dense")
    argv = ["sparsify", str(tmp_path / "dense"), "--method", "experts", "--device", "cpu", *options]
    text = () if "--calibration" in options else ("--calibration", str(tmp_path / "text.txt"))
    assert main([*argv, *text, "--out", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunescope: ")]
    assert len(said) == 1 and why in said[0], said
    assert not list(tmp_path.glob("out*"))
