"""Weight pruning of the bundled real model: against brute force, and the order of the methods by perplexity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import prunescope
from prunescope.cli import main
from prunescope.models.gguf import dequantise
from prunescope.models.loaded import LoadedModel
from prunescope.models.references import bundled_file
from prunescope.prune.masks import Goal
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.wanda import wanda

LAYERS = (0, 20)


@pytest.fixture(scope="module")
def dense_dir(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled GGUF file, dequantised a tensor at a time."""
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    return dequantise("smollm2-135m", bundled_file(), folder)


def test_a_gguf_file_is_dequantised_to_what_transformers_reads(smollm2: LoadedModel, dense_dir: Path) -> None:
    """Name by name and bit by bit; would catch a permutation of q and k left out, and a shard that is not in the index."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(dense_dir)
    expected = dict(smollm2.model.named_parameters())
    found = dict(plain.named_parameters())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert plain.dtype == torch.float32 and plain.lm_head.weight is plain.model.embed_tokens.weight
    assert len(list(dense_dir.glob("*.safetensors"))) > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense_dir)
    assert tokenizer("Hello, world")["input_ids"] == smollm2.tokenizer("Hello, world")["input_ids"]
    assert tokenizer.chat_template == smollm2.tokenizer.chat_template


@pytest.fixture(scope="module")
def runs(
    dense_dir: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, prunescope.SparsifyResult]:
    """The three methods at 2:4 with perplexity before and after."""
    folder = tmp_path_factory.mktemp("runs")
    text = {"calibration": str(shared_data / "c4_300.json"), "samples": 8}
    return {
        method: prunescope.sparsify(
            str(dense_dir), method=method, pattern="2:4", seq_len=256, perplexity=str(shared_data / "wikitext2_test.txt"),
            perplexity_windows=3, out=str(folder / method), device="cpu", **({"calibration": "none"} if method == "magnitude" else text),
        )
        for method in ("magnitude", "wanda", "sparsegpt")
    }  # fmt: skip


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_are_pruned_as_brute_force_prunes_them(
    method: str, runs: dict[str, prunescope.SparsifyResult], dense_dir: Path, shared_data: Path
) -> None:
    """Two blocks, each with what its modules read in a plain model whose earlier blocks are the written, pruned ones."""
    result = runs[method]
    tokens = calibration_of(dense_dir, shared_data)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).state_dict()
    model = transformers.AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
    errors = {row["name"]: row["error"] for row in result.rows}
    for layer, block in enumerate(model.model.layers):
        mine = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        seen: dict[str, Tensor] = {}
        if layer in LAYERS:
            handles = [
                m.register_forward_pre_hook(
                    lambda _, args, name=name, seen=seen: seen.__setitem__(name, args[0].flatten(0, 1))
                )
                for name, m in mine.items()
            ]
            with torch.no_grad():
                model.model(input_ids=tokens)
            for handle in handles:
                handle.remove()
        for name, module in mine.items():
            full = f"model.layers.{layer}.{name}.weight"
            if layer in LAYERS:
                x, weight = seen[name], module.weight.detach()
                if method == "wanda":
                    new = weight.masked_fill(wanda(weight, x.square().sum(0).sqrt(), Goal.parse("2:4")), 0)
                else:
                    (new,), _ = sparsegpt([weight], x.T @ x, [Goal.parse("2:4")])
                flips = ((new == 0) != (pruned[full] == 0)).float().mean().item()
                assert flips < 2e-3 if method == "sparsegpt" else flips < 1e-5, full
                theirs, ours = (
                    ((weight - value) @ x.T).norm() / (weight @ x.T).norm() for value in (new, pruned[full])
                )
                assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
                assert errors[full] == pytest.approx(ours.item(), rel=1e-3 if method == "sparsegpt" else 0.15)
            module.weight.data.copy_(pruned[full])


def calibration_of(folder: Path, shared_data: Path, length: int = 256) -> Tensor:
    """The windows that the command takes with its defaults: the stream of texts, cut, a seeded choice of them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream: list[int] = []
    for row in json.loads((shared_data / "c4_300.json").read_text()):
        stream += [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= 8 * length * 2:
            break
    windows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:8].sort().values]


def test_perplexity_orders_the_methods(runs: dict[str, prunescope.SparsifyResult]) -> None:
    """WikiText-2 at 2:4: SparseGPT <= Wanda < magnitude; benchmarks/sparsify_perplexity.py takes the whole text, and 50 %."""
    found = {method: result.record["perplexity"] for method, result in runs.items()}
    dense = found["wanda"]["dense"]
    assert all(values["dense"] == pytest.approx(dense, rel=1e-6) for values in found.values())
    assert dense < found["sparsegpt"]["pruned"] <= found["wanda"]["pruned"] < found["magnitude"]["pruned"]
    errors = {method: sum(row["error"] for row in runs[method].rows) for method in ("wanda", "sparsegpt")}
    assert errors["sparsegpt"] < errors["wanda"]


def test_refined_blocks_lose_less_of_their_output(
    dense_dir: Path, shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Block 0 by the command line: 2:4 in every group, errors before and after as plain transformers' inputs give them, all else bit by bit dense.
    What is held out is every fourth sample, and was not fitted to."""
    plan = tmp_path / "map.yaml"
    plan.write_text('"*": 0\n"model.layers.0.*": 2:4\n', "utf-8")
    text = str(shared_data / "c4_300.json")
    argv = ["sparsify", str(dense_dir), "--pattern", "2:4", "--sparsity-map", str(plan), "--refine", "swaps-admm"]
    argv += ["--calibration", text, "--samples", "8", "--seq-len", "64", "--device", "cpu", "--out", str(tmp_path / "o")]  # fmt: skip
    assert main(argv) == 0
    assert "refined (swaps-admm): 7 of 7 matrices" in capfd.readouterr().out
    rows = json.loads((tmp_path / "o" / "prunescope.json").read_text("utf-8"))["modules"]
    dense = transformers.AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32).state_dict()
    seen: dict[str, Tensor] = {}
    mine = {f"model.layers.0.{name}": m for name, m in dense.model.layers[0].named_modules() if isinstance(m, nn.Linear)}  # fmt: skip
    for name, module in mine.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).double())
        )
    with torch.no_grad():
        dense.model(input_ids=calibration_of(dense_dir, shared_data, 64))
    assert [row["name"].removesuffix(".weight") for row in rows] == list(mine)
    for row in rows:
        name = row["name"].removesuffix(".weight")
        old, new, x = mine[name].weight.detach().double(), weights[row["name"]].double(), seen[name]
        assert bool(((new != 0).view(len(new), -1, 4).sum(-1) == 2).all()) and row["zeros"] * 2 == new.numel()
        error = float(((old - new) @ x.T).norm() / (old @ x.T).norm())
        assert row["error"] == pytest.approx(error, rel=1e-3)
        (plain,), _ = sparsegpt([old.float()], (x.T @ x).float(), [Goal.parse("2:4")])
        unrefined = float(((old - plain.double()) @ x.T).norm() / (old @ x.T).norm())
        assert row["error_unrefined"] == pytest.approx(unrefined, rel=1e-2)
        assert error < 0.95 * unrefined, name
        samples = x.view(8, 64, -1)
        apart, fitted = (samples[[i for i in range(8) if (i % 4 == 3) == held]].flatten(0, 1) for held in (True, False))
        (plain,), _ = sparsegpt([old.float()], (fitted.T @ fitted).float(), [Goal.parse("2:4")])
        unrefined = float(((old - plain.double()) @ apart.T).norm() / (old @ apart.T).norm())
        assert row["held_out_unrefined"] == pytest.approx(unrefined, rel=1e-2)
        assert row["refined"] and row["held_out"] == row["held_out_refined"] < row["held_out_unrefined"]
    others = dense.state_dict()
    pruned = {row["name"] for row in rows}
    assert all(torch.equal(weights[name], value) for name, value in others.items() if name not in pruned)
