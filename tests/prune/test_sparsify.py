"""Weight pruning from a folder to a folder: every family, plain transformers, resume, bytes, statistics."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import prunescope
from families import CONFIGS, FAMILIES, VOCAB, tiny_folder, tiny_model, tiny_tokenizer
from prunescope.cli import main
from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel, stream_model
from prunescope.models.loading import load_model
from prunescope.prune.blocks import prune_model
from prunescope.prune.calibrate import InputStatistic, Text, gather
from prunescope.prune.masks import Goal
from prunescope.prune.owl import owl_sparsities
from prunescope.prune.plan import make_plan
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.wanda import wanda

TOKENS = torch.randint(3, VOCAB, (6, 16), generator=torch.Generator().manual_seed(5))
MORE = torch.randint(
    3, VOCAB, (30, 16), generator=torch.Generator().manual_seed(6)
)  # more tokens than any matrix has inputs
MOE = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_tiny(family: str, folder: Path, **options: Any) -> StreamedModel:
    if not (folder / "dense").exists():
        tiny_folder(family, folder / "dense")
    return stream_model(str(folder / "dense"), folder / "scratch", device="cpu", **options)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def nll(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    ("method", "goal"), [("magnitude", "0.5"), ("wanda", "2:4"), ("sparsegpt", "0.6"), ("structured", "0.4")]
)
def test_every_family_and_method_loads_in_plain_transformers(
    family: str, method: Any, goal: str, tmp_path: Path
) -> None:
    """Would catch names that transformers does not know, a module left out, routers pruned, a report that is not what was written."""
    streamed = open_tiny(family, tmp_path)
    plan = make_plan(streamed, method, Goal.parse(goal))
    out = tmp_path / "out"
    out.mkdir()
    found = prune_model(streamed, plan, TOKENS, out, perplexity=TOKENS)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert nll(plain, TOKENS).exp().item() == pytest.approx(found.perplexity["pruned"], rel=1e-5)
    assert nll(tiny_model(family), TOKENS).exp().item() == pytest.approx(found.perplexity["dense"], rel=1e-5)
    text = plain.eval().generate(TOKENS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 20)
    before, after = weights_of(tmp_path / "dense"), weights_of(out)
    assert set(before) == set(after)
    changed = (
        {name for name in before if not torch.equal(before[name], after[name])} if method != "structured" else set()
    )
    assert not [
        name
        for name in changed
        if before[name].dim() < 2 or "embed" in name or "wte" in name or name.endswith("gate.weight")
    ]
    zeros = sum(int((after[name] == 0).sum()) for name in changed)
    asked, rows = Goal.parse(goal), found.rows
    if method == "structured":
        sizes = {row["neurons"]: row["neurons"] - row["removed"] for row in rows}
        assert all(0 < left < neurons for neurons, left in sizes.items())
        if family not in MOE:
            assert all(row["removed"] == asked.count(row["neurons"]) for row in rows)
        assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in tiny_model(family).parameters())
    else:
        assert zeros == sum(row["zeros"] for row in rows)
        assert all(row["zeros"] == asked.count(row["outputs"] * row["inputs"]) for row in rows)
        shapes = sum(before[name].numel() for name in changed)
        assert shapes == sum(row["outputs"] * row["inputs"] for row in rows), "every matrix is in the report"
        inside = [
            name for name in before if before[name].dim() == 2 and ".0." in name and not name.endswith("gate.weight")
        ]
        assert set(inside) <= changed, "no matrix of block 0 was left out"
    assert all(0 <= row["error"] < 1 for row in rows if row["error"] is not None)
    assert any(row["error"] is not None for row in rows)


# --- against an implementation that holds the model and hooks every module by itself -----------------------------------


def hooked_inputs(model: nn.Module, modules: dict[str, nn.Module], tokens: Tensor) -> dict[str, Tensor]:
    """What every module reads when the whole model runs: ``(tokens, n)`` float64, a sample at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, -2).double())
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for row in tokens:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "gemma3", "falcon", "gpt_neox", "opt", "phi3", "mistral"]
)
def test_streamed_pruning_equals_pruning_in_memory(family: str, method: str, tmp_path: Path) -> None:
    """The whole model is run for every block, with one statistic a module. Would catch a block calibrated on dense or stale inputs, a mask or
    rotary table of another block, inputs shared that are not the same, Conv1D the wrong way round, and rounding of what is written."""
    streamed = open_tiny(family, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    found = prune_model(streamed, make_plan(streamed, method, Goal(0.5)), MORE, out, batch_size=4)  # type: ignore[arg-type]
    names = {row["name"].removesuffix(".weight") for row in found.rows}
    errors = {row["name"].removesuffix(".weight"): row["error"] for row in found.rows}
    model = tiny_model(family)
    modules = dict(model.named_modules())
    for layer in range(6):
        mine = {name: modules[name] for name in sorted(names) if f".{layer}." in name}
        inputs = hooked_inputs(model, mine, MORE)
        for name, module in mine.items():
            conv1d = type(module).__name__ == "Conv1D"
            weight = module.weight.detach().T if conv1d else module.weight.detach()
            x = inputs[name].float()
            if method == "wanda":
                new = weight.masked_fill(wanda(weight, x.square().sum(0).sqrt(), Goal(0.5)), 0)
            else:
                (new,), _ = sparsegpt([weight], x.T @ x, [Goal(0.5)])
            expected = ((weight - new).double() @ inputs[name].T).norm() / (weight.double() @ inputs[name].T).norm()
            assert errors[name] == pytest.approx(expected.item(), rel=1e-3)
            inputs[name] = new.T if conv1d else new
        with torch.no_grad():
            for name, module in mine.items():
                module.weight.copy_(inputs[name])
    expected_weights = model.state_dict()
    written = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, value in expected_weights.items():
        torch.testing.assert_close(
            written[name], value, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_experts_are_calibrated_on_the_tokens_routed_to_them(tmp_path: Path) -> None:
    """Tokens of each expert against the router's own choices; masks against Wanda on the rows that the expert was given."""
    streamed = open_tiny("mixtral", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    found = prune_model(streamed, make_plan(streamed, "wanda", Goal(0.5)), TOKENS, out)
    model = tiny_model("mixtral")
    block = model.model.layers[0]
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = block.mlp.experts.register_forward_pre_hook(lambda _, args: given.append(args[:3]))
    with torch.no_grad():
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            del part  # block 0 is gathered while dense
        for row in TOKENS:
            model(input_ids=row[None])
    handle.remove()
    hidden, chosen = (torch.cat([call[i] for call in given]) for i in (0, 1))
    written = weights_of(out)
    for expert in range(4):
        rows = hidden[(chosen == expert).any(-1)]
        entry = next(r for r in found.rows if r["name"] == f"model.layers.0.mlp.experts.gate_up_proj[{expert}]")
        assert entry["tokens"] == len(rows)
        assert entry["few_tokens"] == (len(rows) < 32)
        weight = block.mlp.experts.gate_up_proj[expert].detach()
        kept = ~wanda(weight, rows.square().mean(0).sqrt(), Goal(0.5))
        stored = [written[f"model.layers.0.block_sparse_moe.experts.{expert}.{w}.weight"] for w in ("w1", "w3")]
        assert torch.equal(torch.cat(stored) != 0, kept)


def test_experts_that_are_stored_by_inputs(tmp_path: Path) -> None:
    """GPT-OSS keeps its experts as (experts, in, out) and writes `x @ weight`: N:M must hold along the inputs all the same."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    result = sparsify(tmp_path / "dense", tmp_path / "out", method="wanda", sparsity=None, pattern="2:4")
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    experts = written.model.layers[0].mlp.experts
    for value in (experts.gate_up_proj, experts.down_proj):  # (experts, in, out)
        assert ((value != 0).view(4, value.shape[1] // 4, 4, -1).sum(2) <= 2).all()
    rows = [row for row in result.rows if "experts" in row["name"]]
    assert all(row["tokens"] for row in rows)
    assert {(row["outputs"], row["inputs"]) for row in rows} == {(96, 32), (32, 48)}
    with pytest.raises(UserError, match="which way the experts"):
        sparsify(
            tmp_path / "dense", tmp_path / "none", method="magnitude", sparsity=None, pattern="2:4", calibration="none"
        )


def test_an_expert_without_tokens_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder("mixtral", tmp_path / "dense")
    model = tiny_model("mixtral")
    with torch.no_grad():
        for block in model.model.layers:  # one token of one text reaches two of four experts
            block.mlp.gate.weight.copy_(torch.tensor([3.0, 2.0, -50.0, -50.0])[:, None] * block.mlp.gate.weight.abs())
    model.save_pretrained(folder)
    streamed = open_tiny("mixtral", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    found = prune_model(streamed, make_plan(streamed, "sparsegpt", Goal(0.5)), TOKENS[:1, :3], out)
    unseen = [row for row in found.rows if row["tokens"] == 0]
    assert unseen and all(
        row["error"] is None and row["zeros"] == row["outputs"] * row["inputs"] // 2 for row in unseen
    )
    said = capfd.readouterr().err
    assert f"{unseen[0]['name']}: no calibration token reached it" in said
    assert "fewer tokens than they have inputs" in said


# --- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_add_up(dtype: torch.dtype) -> None:
    """In parts and merged as at once, and as numpy in float64."""
    x = torch.randn(300, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = InputStatistic(130, x.device, gram=True)
    whole.add(x)
    first, second = (InputStatistic(130, x.device, gram=True) for _ in range(2))
    first.add(x[:50])
    first.hessian()  # reading in between must not disturb
    first.add(x[50:120])
    second.add(x[120:])
    first.merge(second)
    exact = x.double().T @ x.double()
    for statistic in (whole, first):
        assert statistic.tokens == 300
        torch.testing.assert_close(statistic.hessian().double(), exact, rtol=1e-5, atol=1e-3)
        assert torch.equal(statistic.hessian(), statistic.hessian().T)
        torch.testing.assert_close(statistic.norm().double(), x.double().square().mean(0).sqrt(), rtol=1e-5, atol=0)
    plain = InputStatistic(130, x.device, gram=False)
    plain.add(x[:90], x[:5])
    other = InputStatistic(130, x.device, gram=False)
    other.add(x[90:], x[90:95])
    plain.merge(other)
    torch.testing.assert_close(plain.norm(), whole.norm())
    old = torch.randn(7, 130, generator=torch.Generator().manual_seed(1))
    new = old * (old.abs() > 0.5)
    for statistic, rows in ((whole, x), (plain, torch.cat([x[:5], x[90:95]]))):
        y = rows.double()
        expected = ((old - new).double() @ y.T).norm() / (old.double() @ y.T).norm()
        assert statistic.relative_error(old, new) == pytest.approx(expected.item(), rel=1e-5)


def test_modules_that_read_the_same_input_share_a_statistic(tmp_path: Path) -> None:
    streamed = open_tiny("llama", tmp_path)
    text = Text(streamed, TOKENS, 2, 2**30, tmp_path / "spill")
    with streamed.block(0):
        statistics, shares = gather(text, 0, streamed.matrices(0), gram=True, advance=lambda n: None)
    groups: dict[str, set[str]] = {}
    for name, first in shares.items():
        groups.setdefault(first.split(".")[-2], set()).add(name.split(".")[-2])
    assert groups == {
        "q_proj": {"q_proj", "k_proj", "v_proj"}, "o_proj": {"o_proj"}, "gate_proj": {"gate_proj", "up_proj"}, "down_proj": {"down_proj"},
    }  # fmt: skip
    assert len(statistics) == 4


def test_a_text_passes_as_the_model_itself_would(family: str, tmp_path: Path) -> None:
    """Hidden states of every block, from memory and from a file, equal those of the model's own forward pass."""
    streamed = open_tiny(family, tmp_path)
    model = tiny_model(family)
    streams: list[Tensor] = []
    blocks = streamed.loaded.anatomy
    twin = dict(model.named_modules())
    handles = [
        twin[name].register_forward_hook(lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out))
        for name in streamed.names
    ]
    with torch.no_grad():
        model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    held = Text(streamed, TOKENS, 4, 2**30, tmp_path / "spill-a")
    spilled = Text(streamed, TOKENS, 1, 100, tmp_path / "spill-b")
    assert spilled.spilled and not held.spilled
    for layer in range(len(blocks)):
        with streamed.block(layer):
            for text in (held, spilled):
                text.run(layer, keep=True, advance=lambda n: None)
                torch.testing.assert_close(text.hidden(0, 6), streams[layer], atol=2e-5, rtol=1e-5)
    assert (tmp_path / "spill-b").is_file() and not (tmp_path / "spill-a").exists()
    spilled.close()
    assert not (tmp_path / "spill-b").exists()
    assert all(p.device.type == "meta" for p in streamed.model.parameters()), "weights are let go"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_batch_size_changes_nothing(family: str, tmp_path: Path) -> None:
    """The same masks, errors to 1e-5, weights to 1e-5, whatever the batch and wherever the hidden states are kept."""
    rows, weights = [], []
    for i, (batch_size, limit) in enumerate(((1, 2**30), (4, 2**30), (6, 10))):
        streamed = open_tiny(family, tmp_path)
        out = tmp_path / f"out{i}"
        out.mkdir()
        found = prune_model(
            streamed, make_plan(streamed, "sparsegpt", Goal(0.5)), TOKENS, out,
            batch_size=1 if family in MOE else batch_size, limit=limit, perplexity=TOKENS,
        )  # fmt: skip
        rows.append([row["error"] for row in found.rows] + list(found.perplexity.values()))
        weights.append(weights_of(out))
    for other_rows, other in zip(rows[1:], weights[1:], strict=True):
        assert other_rows == pytest.approx(rows[0], rel=1e-5)
        for name, value in weights[0].items():
            assert torch.equal(other[name] == 0, value == 0)
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5)


def test_owl_gives_less_to_blocks_with_outliers(tmp_path: Path) -> None:
    """Ratios against a count over all scores of a block, in the dense model."""
    folder = tiny_folder("llama", tmp_path / "dense")
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in (2, 4):
            model.model.layers[layer].mlp.up_proj.weight[:, :2] *= 8 * layer
    model.save_pretrained(folder)
    streamed = open_tiny("llama", tmp_path)
    found = owl_sparsities(
        streamed, TOKENS, 0.6, threshold=5.0, spread=0.08, batch_size=2, limit=2**30, file=tmp_path / "x"
    )
    names = [m.name.removesuffix(".weight") for layer in range(6) for m in streamed.matrices(layer)]
    modules = {name: module for name, module in model.named_modules() if name in names}
    inputs = hooked_inputs(model, modules, TOKENS)
    ratios = []
    for layer in range(6):
        scores = torch.cat([
            (modules[name].weight.detach().double().abs() * inputs[name].square().mean(0).sqrt()).flatten()
            for name in names if f".{layer}." in name
        ])  # fmt: skip
        ratios.append((scores > 5 * scores.mean()).double().mean().item())
    density = [(r - min(ratios)) / (max(ratios) - min(ratios)) * 0.16 for r in ratios]
    expected = [0.6 - (d - sum(density) / 6) for d in density]
    assert found == pytest.approx(expected, abs=1e-6)
    assert min(range(6), key=lambda i: found[i]) in (2, 4)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def sparsify(folder: Path, out: Path, **options: Any) -> prunescope.SparsifyResult:
    text = folder.parent / "text.txt"
    if not text.exists():
        words = torch.randint(4, VOCAB, (400,), generator=torch.Generator().manual_seed(9)).tolist()
        text.write_text(" ".join(f"w{i}" for i in words))
    given = {
        "method": "sparsegpt",
        "sparsity": 0.5,
        "calibration": str(text),
        "samples": 6,
        "seq_len": 16,
        "device": "cpu",
    } | options
    return prunescope.sparsify(str(folder), out=str(out), **given)


def test_bf16_stays_bf16_and_what_is_not_pruned_stays_byte_for_byte(tmp_path: Path) -> None:
    """A tied bf16 model in several shards, computed in float32 on a CPU; masked weights keep their bits under Wanda."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    folder = tmp_path / "dense"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    result = sparsify(folder, tmp_path / "out", method="wanda")
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    assert set(before) == set(after) and "lm_head.weight" not in after
    pruned = {row["name"] for row in result.rows}
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        kept = value != 0 if name in pruned else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept]), name
        assert name not in pruned or int((value == 0).sum()) == value.numel() // 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16 and plain.lm_head.weight is plain.model.embed_tokens.weight
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "prunescope.json",
        "config.yaml",
        "tokenizer.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    assert not [name for name in names if name.startswith(("part", "scratch", "finished", "."))]
    sparsify(folder, tmp_path / "gpt", method="sparsegpt", pattern="2:4", sparsity=None)
    for name, value in weights_of(tmp_path / "gpt").items():
        assert name not in pruned or ((value.float() != 0).view(value.shape[0], -1, 4).sum(-1) <= 2).all()


@pytest.mark.parametrize(("stored", "computed"), [(torch.float64, "float64"), (torch.float16, "float32")])
def test_kept_weights_keep_their_bits_in_other_dtypes(stored: torch.dtype, computed: str, tmp_path: Path) -> None:
    """Would catch weights that pass through a narrower dtype than they are stored in."""
    folder = tiny_folder("llama", tmp_path / "dense")
    model = tiny_model("llama").to(stored)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 / 3)
    model.save_pretrained(folder)
    before = weights_of(folder)
    assert {value.dtype for value in before.values()} == {stored}
    for method in ("magnitude", "wanda"):
        sparsify(folder, tmp_path / method, method=method, dtype=computed)
        for name, value in weights_of(tmp_path / method).items():
            assert value.dtype == stored
            assert torch.equal(value[value != 0], before[name][value != 0]), name


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    """The original GPT-2 is stored from the base model: its tensors are called `h.0...`, and stay so."""
    model = tiny_model("gpt2")
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    from safetensors.torch import save_file

    weights = {name.removeprefix("transformer."): value for name, value in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = sparsify(folder, tmp_path / "out")
    after = weights_of(tmp_path / "out")
    assert set(after) == set(weights)
    assert len(result.rows) == 24
    assert int((after["h.3.mlp.c_fc.weight"] == 0).sum()) == after["h.3.mlp.c_fc.weight"].numel() // 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain.transformer.h[3].mlp.c_fc.weight.detach(), after["h.3.mlp.c_fc.weight"])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "dense")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sparsify(folder, tmp_path / name, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    rows = [json.loads((tmp_path / name / "prunescope.json").read_text())["modules"] for name in "ab"]
    assert rows[0] == rows[1]


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as in the tests: sums round by the number of threads
import importlib
from prunescope.cli import main
where, count = sys.argv[1].split(":"), int(sys.argv[2])
module, where = importlib.import_module(where[0]), where[1]
original, calls = getattr(module, where), []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, where, dying)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("family", "where", "count", "extra"),
    [
        (
            "llama",
            "prunescope.prune.checkpoint:write_shard",
            4,
            ["--method", "sparsegpt", "--sparsity", "0.5", "--allocation", "owl"],
        ),
        ("mixtral", "prunescope.prune.team:gather", 3, ["--method", "wanda", "--pattern", "2:4"]),
        (
            "llama",
            "prunescope.prune.blocks:refine",
            9,
            ["--method", "sparsegpt", "--pattern", "2:4", "--refine", "swaps-admm"],
        ),
        ("gpt2", "prunescope.prune.checkpoint:write_shard", 7, ["--method", "structured", "--sparsity", "0.3"]),
        ("llama", "shutil:rmtree", 1, ["--method", "wanda", "--sparsity", "0.5"]),
        ("gemma2", "prunescope.prune.checkpoint:is_weights", 2, ["--method", "magnitude", "--sparsity", "0.5"]),
    ],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    family: str, where: str, count: int, extra: list[str], tmp_path: Path
) -> None:
    """SIGKILL while a shard is written, between two blocks, while a block is refined, while the folder is finished, and while it is tidied up."""
    folder = tiny_folder(family, tmp_path / "dense")
    sparsify(folder, tmp_path / "unused", method="magnitude")
    text = str(tmp_path / "text.txt")
    argv = [
        "sparsify",
        str(folder),
        *extra,
        "--calibration",
        text,
        "--samples",
        "6",
        "--seq-len",
        "16",
        "--device",
        "cpu",
        "--perplexity",
        text,
    ]

    def run(out: str, *more: str) -> int:
        return main([*argv, "--out", str(tmp_path / out), *more])

    assert run("whole") == 0
    call = [sys.executable, "-c", KILLED, where, str(count), *argv, "--out", str(tmp_path / "cut")]
    assert subprocess.run(call, capture_output=True, check=False).returncode == -9
    assert not (tmp_path / "cut").exists()
    done = sorted((tmp_path / "cut.partial").glob("*.safetensors"))
    assert done
    assert run("cut", "--resume", "--damping", "0.02") == 2, "other options"
    assert sorted((tmp_path / "cut.partial").glob("*.safetensors")) == done
    assert run("cut", "--resume") == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    records = [json.loads((tmp_path / name / "prunescope.json").read_text()) for name in ("cut", "whole")]
    assert records[0]["modules"] == records[1]["modules"]
    assert records[0]["perplexity"] == records[1]["perplexity"]
    assert [p.name for p in sorted((tmp_path / "cut").iterdir())] == [
        p.name for p in sorted((tmp_path / "whole").iterdir())
    ]
    assert run("cut", "--resume") == 0, "complete already"
    assert run("cut", "--resume", "--seed", "3") == 2


def test_checkpoints_go_on_to_layerwise_and_carry_what_was_dropped(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "dense")
    sparsify(folder, tmp_path / "sparse")
    found = prunescope.layerwise(str(folder), str(tmp_path / "sparse"), max_new_tokens=2, device="cpu")
    assert found.info["changed_layers"] == {"attn": list(range(6)), "mlp": list(range(6))}
    assert found.info["models"]["target"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    drop = prunescope.drop(str(folder), target="block", n=2, samples=2, seq_len=8, device="cpu")
    for form in ("compact", "zeroed", "recipe"):
        drop.save(tmp_path / form, format=form)  # type: ignore[arg-type]
    for form in ("compact", "zeroed"):
        sparsify(tmp_path / form, tmp_path / f"{form}-sparse", method="wanda")
        loaded = load_model(tmp_path / f"{form}-sparse", device="cpu")
        assert loaded.dropped == drop.spec
        assert loaded.sparsity() >= 0.5
    with pytest.raises(UserError, match="a recipe has no weights"):
        sparsify(tmp_path / "recipe", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_sparsity_map_decides_module_by_module(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "dense")
    path = tmp_path / "map.yaml"
    path.write_text("'*.mlp.*': 0.25\n'model.layers.1.*': 0\n'*.o_proj': 2:4\n")
    result = sparsify(folder, tmp_path / "out", sparsity_map=str(path))
    asked = {row["name"].removeprefix("model.layers.").removesuffix(".weight"): row["asked"] for row in result.rows}
    assert (
        asked["0.self_attn.q_proj"] == "0.5"
        and asked["0.mlp.up_proj"] == "0.25"
        and asked["1.self_attn.o_proj"] == "2:4"
    )
    assert not [name for name in asked if name.startswith("1.") and "o_proj" not in name]
    path.write_text("'*.experts.*': 0.25\n")
    with pytest.raises(UserError, match="matches no matrix"):
        sparsify(folder, tmp_path / "none", sparsity_map=str(path))


def test_self_calibration_no_calibration_and_the_api(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder("llama", tmp_path / "dense")
    result = prunescope.sparsify(str(folder), method="wanda", sparsity=0.5, samples=3, seq_len=12, device="cpu")
    assert result.record["calibration"]["source"] == "self"
    assert result.folder is not None and result.folder.is_dir()
    assert result.table().num_rows == 42 and result.summary["sparsity"] == pytest.approx(0.5, abs=1e-3)
    result.save(tmp_path / "saved")
    assert digest(tmp_path / "saved") == digest(result.folder)
    with pytest.raises(UserError, match="exists"):
        result.save(tmp_path / "saved")
    bare = prunescope.sparsify(str(folder), method="magnitude", sparsity=0.5, calibration="none", device="cpu")
    assert all(row["error"] is None and row["tokens"] is None for row in bare.rows)
    capfd.readouterr()
    dry = prunescope.sparsify(str(folder), sparsity=0.5, dry_run=True, device="cpu", out=str(tmp_path / "dry"))
    said = capfd.readouterr().out
    assert "dry run" in said and "self_attn.q_proj" in said and "calibration tokens" in said
    assert not (tmp_path / "dry").exists() and not (tmp_path / "dry.partial").exists()
    assert dry.folder is None and dry.summary["sparsity"] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UserError, match="dry run"):
        dry.save(tmp_path / "dry")


def test_a_hub_id_is_fetched_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub would put into its cache is read as a folder; revision and id are kept."""
    import huggingface_hub

    snapshot = tiny_folder("llama", tmp_path / "snapshots" / "0123abcd")
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = prunescope.sparsify(
        "someone/model",
        method="magnitude",
        sparsity=0.5,
        calibration="none",
        revision="main",
        device="cpu",
        out=str(tmp_path / "out"),
    )
    assert asked[0][0] == "someone/model" and asked[0][1]["revision"] == "main"
    assert not [pattern for pattern in asked[0][1]["allow_patterns"] if "bin" in pattern or "pt" in pattern]
    assert found.record["base"] == {"source": "someone/model", "revision": "0123abcd"}
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors weights on the hub"):
        prunescope.sparsify(
            "someone/model", method="magnitude", sparsity=0.5, calibration="none", device="cpu", out=str(tmp_path / "o")
        )


def test_overflowing_activations_name_the_block(tmp_path: Path) -> None:
    """The probe of seven tokens passes; the calibration text overflows in one expert-free MLP."""
    folder = tiny_folder("llama", tmp_path / "dense")
    streamed = open_tiny("llama", tmp_path)
    assert folder.is_dir()
    out = tmp_path / "out"
    out.mkdir()
    plan = make_plan(streamed, "wanda", Goal(0.5))
    weights = dict(streamed.weights.items())
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"] * 1e38
    streamed.weights = weights
    with pytest.raises(UserError, match=r"enter model\.layers\.2\.mlp\.down_proj\.weight \(block 2\)"):
        prune_model(streamed, plan, TOKENS, out)


def test_a_hessian_that_cannot_be_factorised_names_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    streamed = open_tiny("llama", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    original = InputStatistic.hessian
    below = [-0.05]

    def spoiled(self: InputStatistic) -> Tensor:
        h = original(self).clone()
        h[0, :] = h[:, 0] = 0
        h[0, 0] = below[0] * h.diagonal().mean()
        return h

    monkeypatch.setattr(InputStatistic, "hessian", spoiled)
    found = prune_model(streamed, make_plan(streamed, "sparsegpt", Goal(0.5)), TOKENS, out)
    assert {row["damping"] for row in found.rows} == {0.1}
    assert "is not positive definite with damping 0.01; " in capfd.readouterr().err
    below[0] = -50.0
    out = tmp_path / "out2"
    out.mkdir()
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: its Hessian is not positive definite"
    ):
        prune_model(streamed, make_plan(streamed, "sparsegpt", Goal(0.5)), TOKENS, out)
