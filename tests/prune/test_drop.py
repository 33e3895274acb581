"""Scores and choices against plain computations, calibration, the score cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prunescope
from families import FAMILIES, tiny_folder
from prunescope.data.calibration import Calibration, calibration_tokens
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling, continue_texts
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.prune.select import choose_sublayers, score_sublayers

TOKENS = torch.randint(3, 64, (6, 17), generator=torch.Generator().manual_seed(8))


def plain_llama_streams(model: Any, ids: Tensor) -> list[Tensor]:
    """The residual stream of a Llama entering each block, between its sublayers, and at the end; written from its text."""
    streams: list[Tensor] = []
    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
        handles.append(
            block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        )
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [s.double() for s in streams]


def mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_scores_are_mean_cosines_over_tokens(dense: LoadedModel, batch_size: int) -> None:
    """Would catch a mean over samples of unequal weight, a score of the wrong side of a branch, and a batch left out."""
    streams = plain_llama_streams(dense.model, TOKENS)
    found = score_sublayers(dense, TOKENS, run=3, batch_size=batch_size)
    for layer in range(6):
        before, middle, after = streams[2 * layer : 2 * layer + 3]
        assert found.attn[layer] == pytest.approx(mean_cosine(before, middle), abs=1e-6)
        assert found.mlp[layer] == pytest.approx(mean_cosine(middle, after), abs=1e-6)
        assert found.block[layer] == pytest.approx(mean_cosine(before, after), abs=1e-6)
    assert len(found.runs) == 4
    for first in range(4):
        assert found.runs[first] == pytest.approx(mean_cosine(streams[2 * first], streams[2 * (first + 3)]), abs=1e-6)


def test_score_on_norm_compares_the_normed_input_with_the_output(dense: LoadedModel) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    block = dense.model.model.layers[2]
    handle = block.mlp.register_forward_hook(lambda _, args, out: seen.append((args[0].double(), out.double())))
    with torch.no_grad():
        dense.model(input_ids=TOKENS)
    handle.remove()
    assert score_sublayers(dense, TOKENS, score_on="norm").mlp[2] == pytest.approx(mean_cosine(*seen[0]), abs=1e-6)
    assert score_sublayers(dense, TOKENS, score_on="norm").block == score_sublayers(dense, TOKENS).block


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored(family: str, tmp_path: Path) -> None:
    found = score_sublayers(load_model(tiny_folder(family, tmp_path), device="cpu"), TOKENS)
    assert all(-1 <= value < 0.99999 for value in (*found.attn, *found.mlp, *found.block))


def calibration(tokens: Tensor = TOKENS) -> Calibration:
    return Calibration(tokens, "test", 0)


def test_the_highest_scores_go(dense: LoadedModel) -> None:
    found = score_sublayers(dense, TOKENS)
    best = sorted(range(6), key=lambda layer: -found.attn[layer])
    assert choose_sublayers(dense, calibration(), "attn", 2).spec == DropSpec(attn=tuple(sorted(best[:2])))
    both = sorted([(-v, i, k) for k in ("attn", "mlp") for i, v in enumerate(getattr(found, k))])[:5]
    chosen = choose_sublayers(dense, calibration(), "all", 5)
    assert chosen.spec == DropSpec.of((k, i) for _, i, k in both)  # type: ignore[misc]
    assert [row["dropped"] for row in chosen.rows].count(True) == 5 and len(chosen.rows) == 12
    block = max(range(6), key=lambda layer: found.block[layer])
    assert choose_sublayers(dense, calibration(), "block", 1).spec == DropSpec((block,), (block,))


def test_consecutive_takes_the_run_whose_ends_are_most_alike(dense: LoadedModel) -> None:
    runs = score_sublayers(dense, TOKENS, run=3).runs
    first = max(range(len(runs)), key=lambda i: runs[i])
    layers = tuple(range(first, first + 3))
    assert choose_sublayers(dense, calibration(), "block", 3, order="consecutive").spec == DropSpec(layers, layers)


def test_iterative_scores_again_after_every_drop(dense: LoadedModel) -> None:
    expected: set[int] = set()
    for _ in range(3):
        with dense.dropping(DropSpec(mlp=tuple(sorted(expected)))):
            found = score_sublayers(dense, TOKENS).mlp
        assert [v != v for v in found] == [layer in expected for layer in range(6)]
        expected.add(max((layer for layer in range(6) if layer not in expected), key=lambda layer: found[layer]))
    assert choose_sublayers(dense, calibration(), "mlp", 3, iterative=True).spec.mlp == tuple(sorted(expected))
    assert not dense.dropped


def test_ties_go_to_the_lower_layer(dense: LoadedModel) -> None:
    with torch.no_grad():
        for layer in (1, 3, 4):
            dense.model.model.layers[layer].self_attn.o_proj.weight.zero_()
    assert choose_sublayers(dense, calibration(), "attn", 2).spec.attn == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "attn", "n": 7}, "choose 1 to 6"),
        ({"target": "block", "n": 6}, "choose 1 to 5"),
        ({"target": "all", "n": 0}, "choose 1 to 12"),
        ({"target": "mlp", "n": 2, "order": "consecutive"}, "--target block"),
        ({"target": "block", "n": 2, "order": "consecutive", "iterative": True}, "leave --iterative out"),
        ({"target": "block", "n": 2, "score_on": "norm"}, "leave it out"),
    ],
)
def test_what_cannot_be_chosen_is_refused(dense: LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_sublayers(dense, calibration(), **options)


def test_scores_are_kept_for_the_same_weights_and_tokens_only(
    dense: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a cache that answers for other weights, tokens or settings, and one that breaks on a damaged entry."""
    import prunescope.prune.select as module

    calls: list[int] = []
    real = module.score_sublayers
    monkeypatch.setattr(module, "score_sublayers", lambda *a, **k: calls.append(1) or real(*a, **k))  # type: ignore[func-returns-value]
    cache = tmp_path / "cache"
    first = choose_sublayers(dense, calibration(), "attn", 2, cache=cache)
    assert choose_sublayers(dense, calibration(), "mlp", 2, cache=cache).spec and len(calls) == 1
    assert choose_sublayers(dense, calibration(), "attn", 2, cache=cache) == first and len(calls) == 1
    choose_sublayers(dense, calibration(TOKENS[:3]), "attn", 2, cache=cache)
    assert len(calls) == 2
    other = load_model(tiny_folder("llama", tmp_path / "other", seed=5), device="cpu")
    choose_sublayers(other, calibration(), "attn", 2, cache=cache)
    assert len(calls) == 3
    choose_sublayers(dense, calibration(TOKENS.view(-1, 3)), "attn", 2, cache=tmp_path / "shapes")
    choose_sublayers(dense, calibration(TOKENS.view(3, -1)), "attn", 2, cache=tmp_path / "shapes")
    assert len(calls) == 5, "the same tokens in another shape are another calibration"
    for path in cache.iterdir():
        path.write_text("{ damaged")
    assert choose_sublayers(dense, calibration(), "attn", 2, cache=cache) == first and len(calls) == 6


def test_scores_that_are_not_numbers_are_named(dense: LoadedModel) -> None:
    with torch.no_grad():
        dense.model.model.layers[3].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(UserError, match="score of mlp 3 is not a number"):
        score_sublayers(dense, TOKENS)


# --- calibration -------------------------------------------------------------------------------------------------------


def test_self_calibration_needs_no_data_and_repeats(dense: LoadedModel) -> None:
    a = calibration_tokens(dense, samples=5, seq_len=12, seed=3)
    b = calibration_tokens(dense, samples=5, seq_len=12, seed=3, batch_size=64)
    c = calibration_tokens(dense, samples=5, seq_len=12, seed=4)
    assert a.tokens.shape == (5, 12) and torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    assert (a.tokens[:, 0] == 1).all(), "texts start with the start token"
    assert len({tuple(row) for row in a.tokens.tolist()}) == 5, "samples differ"
    assert calibration_tokens(dense, samples=1).tokens.shape == (1, 64), "never past the model's context"


def test_samples_do_not_depend_on_the_batch(dense: LoadedModel) -> None:
    prompts = [[1, 5], [1, 9, 7, 4], [1], [1, 6, 6]]
    options: dict[str, Any] = {"sampling": Sampling(1.0, seed=2), "stop": False}
    together = continue_texts(dense, prompts, 8, batch_size=4, **options)
    assert together == continue_texts(dense, prompts, 8, batch_size=4, **options)
    assert together[0] == continue_texts(dense, prompts[:1], 8, batch_size=1, **options)[0]


def test_sampling_follows_the_distribution(dense: LoadedModel) -> None:
    """2,000 first tokens against the model's own probabilities; top-k and top-p cut where they should."""
    with torch.no_grad():
        p = dense.model(input_ids=torch.tensor([[5, 9]])).logits[0, -1].double().softmax(-1)
    prompts = [[5, 9]] * 2000

    def frequencies(**options: Any) -> Tensor:
        drawn = continue_texts(
            dense, prompts, 1, batch_size=1000, sampling=Sampling(1.0, seed=1, **options), stop=False
        )
        return torch.tensor(drawn).flatten().bincount(minlength=64) / 2000

    assert (frequencies() - p).abs().max() < 4 * (p.max() / 2000).sqrt()
    order = p.argsort(descending=True)
    top3 = frequencies(top_k=3)
    assert set(top3.nonzero().flatten().tolist()) == set(order[:3].tolist())
    kept = int((p[order].cumsum(0) - p[order] < 0.6).sum())
    assert set(frequencies(top_p=0.6).nonzero().flatten().tolist()) <= set(order[:kept].tolist())


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_texts_give_windows_that_do_not_overlap(dense: LoadedModel, tmp_path: Path, suffix: str) -> None:
    words = [f"w{4 + i % 59}" for i in range(400)]
    path = tmp_path / f"text{suffix}"
    rows = [{"text": " ".join(words[i : i + 100])} for i in range(0, 400, 100)]
    path.write_text(
        " ".join(words)
        if suffix == ".txt"
        else json.dumps(rows)
        if suffix == ".json"
        else "\n".join(map(json.dumps, rows))
    )
    found = calibration_tokens(dense, str(path), samples=5, seq_len=20)
    assert found.tokens.shape == (5, 20)
    documents = [words] if suffix == ".txt" else [words[i : i + 100] for i in range(0, 400, 100)]
    stream = [token for document in documents for token in [*(int(word[1:]) for word in document), 2]]  # 2 ends a text
    windows = iter([stream[i : i + 20] for i in range(0, len(stream) - 19, 20)])
    assert all(row in windows for row in found.tokens.tolist()), "in order, none twice"
    assert (
        found.describe()["tokens_sha256"]
        == calibration_tokens(dense, str(path), samples=5, seq_len=20).describe()["tokens_sha256"]
    )
    assert (
        len(calibration_tokens(dense, str(path), samples=10**4, seq_len=20).tokens)
        == (400 + (4 if suffix != ".txt" else 1)) // 20
    )


def test_calibration_sources_that_cannot_be_used_are_refused(dense: LoadedModel, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w5 w6 w7")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"body": "w5"}]')
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    for source, options, message in (
        (str(short), {"seq_len": 20}, "shorter than one sample of 20"),
        (str(broken), {}, "need a field 'text'"),
        (str(empty), {}, "is empty"),
        (str(tmp_path / "none.jsonl"), {}, "no such file"),
        ("self", {"seq_len": 65}, "longer than the model's context"),
        ("self", {"samples": 0}, "at least one sample"),
    ):
        with pytest.raises(UserError, match=message):
            calibration_tokens(dense, source, **options)


def test_data_sets_of_the_hub_are_read_as_they_are_asked_for(
    dense: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real loading code with the download taken away: short names, streaming, and errors in one line."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        if path == "no/where":
            raise ConnectionError("offline\nand more lines")
        return iter([{"body": "x"}] if path == "other/columns" else [{"text": "w5 w6 w7 w8 " * 30}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert calibration_tokens(dense, "c4", samples=2, seq_len=10).tokens.shape == (2, 10)
    assert calibration_tokens(dense, "wikitext2", samples=2, seq_len=10).tokens.shape == (2, 10)
    assert [name for name, _ in asked] == ["allenai/c4", "Salesforce/wikitext"]
    assert all(options["streaming"] and options["split"] == "train" for _, options in asked)
    with pytest.raises(UserError, match="ConnectionError: offline;"):
        calibration_tokens(dense, "no/where", samples=2, seq_len=10)
    with pytest.raises(UserError, match="no column 'text' but body"):
        calibration_tokens(dense, "other/columns", samples=2, seq_len=10)


@pytest.mark.parametrize("name", ["c4_300.json", "wikitext2_test.txt"])
def test_public_texts_calibrate_the_real_model(smollm2: LoadedModel, shared_data: Path, name: str) -> None:
    """Windows are pieces of the text, and the scores of a real model say what is known of it: its first layer is needed most."""
    found = calibration_tokens(smollm2, str(shared_data / name), samples=3, seq_len=96)
    content = (shared_data / name).read_text("utf-8")
    text = " ".join(row["text"] for row in json.loads(content)[:20]) if name.endswith("json") else content
    window = smollm2.tokenizer.decode(found.tokens[0, 40:52])
    assert window.strip() in text
    scores = score_sublayers(smollm2, found.tokens)
    assert min(scores.attn) == scores.attn[0] < 0.9
    assert sorted(scores.attn)[-8] > 0.95


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["recipe", "zeroed", "compact"])
def test_the_command_writes_what_it_says(dense_folder: Path, tmp_path: Path, form: Any) -> None:
    out = tmp_path / "out"
    target = "block" if form == "compact" else "all"
    result = prunescope.drop(str(dense_folder), target=target, n=2, out=str(out), format=form, samples=4, seq_len=16)  # type: ignore[arg-type]
    record = json.loads((out / "prunescope.json").read_text())
    assert record["drop_attn_list"] == list(result.spec.attn) and record["calibration"]["samples"] == 4
    assert record["parameters"]["dropped"] < record["parameters"]["dense"]
    assert load_model(out, device="cpu").dropped == result.spec
    assert result.table().num_rows == len(result.rows) and result.summary["parameters"] == record["parameters"]
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match="--overwrite"):
        prunescope.drop(str(dense_folder), n=1, out=str(out))
    with pytest.raises(UserError, match="give its dense model"):
        prunescope.drop(str(out), n=1, samples=2, seq_len=8)
