"""Retrieval: pooling and tokens, measures and rankings, the folder and its resumption, the shipped corpus."""

from __future__ import annotations

import json
import random
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import prunescope
from families import tiny_folder, tiny_model, tiny_tokenizer
from prunescope import UserError
from prunescope.cli import main
from prunescope.compare import retrieval
from prunescope.compare.embedding import Reading, embed, pool, tokens_of
from prunescope.compare.metrics import H_COLUMNS
from prunescope.compare.retrieval import measure, read_rankings
from prunescope.data.beir import Collection, read_collection
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.report.page.verdict import judge

POOLINGS = ("mean", "last", "weighted-mean")


def _text(chance: random.Random, words: int) -> str:
    return " ".join(f"w{chance.randrange(4, 64)}" for _ in range(words))


def _write(folder: Path, passages: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", passages), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"{query}\t{passage}\t{grade}\n" for query, found in qrels.items() for passage, grade in found.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


@pytest.fixture
def collection_folder(tmp_path: Path) -> Path:
    """30 passages of 2 to 20 words and 7 queries; passage ``q3`` has the id of a query."""
    chance = random.Random(5)
    passages = {f"d{i}": _text(chance, 2 + i % 19) for i in range(29)} | {"q3": _text(chance, 6)}
    queries = {f"q{i}": _text(chance, 1 + 2 * i) for i in range(7)} | {"unjudged": "w5"}
    qrels = {f"q{i}": {f"d{4 * i}": 2, f"d{4 * i + 1}": 1, f"d{4 * i + 3}": 0} for i in range(7)}
    return _write(tmp_path / "beir", passages, queries, qrels)


def _plain_vectors(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """Plain transformers, one text at a time, pooled by the formulas in numpy; (texts, d) float64."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
        weights = {
            "mean": np.ones(len(states)),
            "last": np.eye(len(states))[-1],
            "weighted-mean": np.arange(1, len(states) + 1),
        }[pooling]
        rows.append((weights[:, None] * states).sum(0) / weights.sum())
    return np.stack(rows)


# --- vectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_padding_holds_does_not_matter(pooling: Any) -> None:
    """NaN in the padding: a pooling that multiplies it by zero gives NaN, one that reads it gives another vector."""
    torch.manual_seed(0)
    states, lengths = torch.randn(3, 5, 4), torch.tensor([5, 1, 3])
    alone = torch.stack([pool(states[i : i + 1, :n], lengths[i : i + 1], pooling)[0] for i, n in enumerate(lengths)])
    for i, n in enumerate(lengths):
        states[i, n:] = torch.nan
    assert torch.equal(pool(states, lengths, pooling), alone)
    first = states[0].double().numpy()
    weights = {"mean": [1, 1, 1, 1, 1], "last": [0, 0, 0, 0, 1], "weighted-mean": [1, 2, 3, 4, 5]}[pooling]
    np.testing.assert_allclose(alone[0], np.average(first, axis=0, weights=weights), rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral", "gemma2", "falcon_alibi", "mixtral"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_plain_transformers_one_by_one(family: str, pooling: Any, tmp_path: Path) -> None:
    """Batched by length against one text at a time: catches padding that leaks, a wrong last token, the state before the final norm, texts
    that come back in another order."""
    folder = tiny_folder(family, tmp_path / "model")
    loaded, chance = load_model(folder, device="cpu"), random.Random(1)
    texts = {str(i): _text(chance, n) for i, n in enumerate((3, 11, 1, 7, 30, 2, 11))}
    tokens, cut = tokens_of(loaded, texts, Reading(), "passage")
    assert cut == 0
    expected = _plain_vectors(folder, list(texts.values()), pooling)
    for batch_size in (1, 3, 16):
        found = embed(loaded, tokens, pooling, batch_size)
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("pooling", "theirs"), [("mean", "mean"), ("last", "lasttoken"), ("weighted-mean", "weightedmean")]
)
def test_vectors_are_those_of_sentence_transformers(pooling: Any, theirs: str, tmp_path: Path) -> None:
    """The library that most embedders are used with, on the same folder, with its own batching and padding."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder, chance = tiny_folder("llama", tmp_path / "model"), random.Random(2)
    texts = {str(i): _text(chance, n) for i, n in enumerate((4, 19, 1, 9, 33))}
    body = Transformer(str(folder))
    other = SentenceTransformer(modules=[body, Pooling(32, pooling_mode=theirs)], device="cpu")
    expected = other.encode(list(texts.values()), batch_size=2, show_progress_bar=False)
    loaded = load_model(folder, device="cpu")
    tokens, _ = tokens_of(loaded, texts, Reading(), "passage")
    found = embed(loaded, tokens, pooling, 4).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_tokens_of_the_e5_convention(dense: LoadedModel) -> None:
    """The instruction stands before queries alone; the end-of-text token comes once, and stays when a text is cut."""
    reading = Reading("last", "Find it", append_eos=True, max_length=4)
    assert reading.query("w4 w5") == "Instruct: Find it\nQuery: w4 w5"
    assert Reading().query("w4 w5") == "w4 w5"
    tokens, cut = tokens_of(
        dense, {"a": "w4 w5", "b": "w4 w5 w6 w7 w8", "c": "w4 </s>", "d": "w4 w5 w6"}, reading, "passage"
    )
    assert tokens == [[4, 5, 2], [4, 5, 6, 2], [4, 2], [4, 5, 6, 2]]
    assert cut == 1
    with pytest.raises(UserError, match="passage 'a': the tokenizer gives no tokens"):
        tokens_of(dense, {"a": " "}, Reading(), "passage")
    dense.tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        tokens_of(dense, {"a": "w4"}, reading, "passage")


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_weights_without_a_head_load_for_retrieval_alone(family: str, collection_folder: Path, tmp_path: Path) -> None:
    """Embedding models are written from `MistralModel`: no head. Elsewhere they are refused, never given a made-up head."""
    folder = tmp_path / "embedder"
    model = tiny_model(family)
    tied = model.config.tie_word_embeddings
    model.base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if tied:  # its head is the embedding, so it is a language model too
        assert load_model(folder, device="cpu").anatomy.vocab_size == 64
    else:
        with pytest.raises(UserError, match=r"MistralModel without an output head.*only prunescope retrieve takes it"):
            load_model(folder, device="cpu")
    loaded = load_model(folder, device="cpu", headless=True)
    assert loaded.describe()["parameters"] == sum(p.numel() for p in model.base_model.parameters())
    texts = ["w4 w9 w33 w20", "w8"]
    tokens, _ = tokens_of(loaded, dict(enumerate(texts)), Reading(), "query")  # type: ignore[arg-type]
    expected = _plain_vectors(folder, texts, "last")
    np.testing.assert_allclose(embed(loaded, tokens, "last", 2).numpy(), expected, rtol=2e-5, atol=2e-5)
    e5: dict[str, Any] = {"pooling": "last", "instruction": "w7 w8", "append_eos": True}
    result = prunescope.retrieve(str(folder), "drop:attn=1", corpus=str(collection_folder), device="cpu", **e5)
    vectors = _plain_vectors(folder, ["Instruct: w7 w8\nQuery: w44 w5 </s>", "w44 </s>"], "last")
    asked = embed(loaded, [[3, 7, 8, 3, 44, 5, 2], [44, 2]], "last", 2)
    np.testing.assert_allclose(asked.numpy(), vectors, rtol=2e-5, atol=2e-5)
    assert 0 < result.summary["retrieval"]["kendall"]["mean"] < 1


def test_a_language_model_that_lost_its_head_is_still_refused(tmp_path: Path) -> None:
    """`headless` is for weights written without a head, not for incomplete ones."""
    from safetensors.torch import load_file, save_file

    folder = tiny_folder("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing, first lm_head\.weight"):
        load_model(folder, device="cpu", headless=True)


# --- measures ----------------------------------------------------------------------------------------------------------


def test_measures_of_a_toy_run_by_hand_and_by_trec_eval() -> None:
    """nDCG by its formula with linear gains, AP, reciprocal rank and recall by counting, and pytrec_eval handed the raw scores."""
    from pytrec_eval import RelevanceEvaluator

    qrels = {"a": {"x": 2, "y": 1, "z": 0, "far": 1}, "b": {"x": 1}}
    order = {"a": ["n0", "y", "z", "x", *(f"n{i}" for i in range(1, 8)), "far"], "b": ["n1", "n2"]}
    ranking = {q: [(d, 0.9 - 0.01 * i) for i, d in enumerate(found)] for q, found in order.items()}
    found = measure(qrels, ranking, (2, 10))
    by_hand = (1 / log2(3) + 2 / log2(5)) / (2 / log2(2) + 1 / log2(3) + 1 / log2(4))
    assert found["a"]["ndcg_10"] == pytest.approx(by_hand, abs=1e-12)
    assert found["a"]["ap"] == pytest.approx((1 / 2 + 2 / 4 + 3 / 12) / 3, abs=1e-12)
    assert found["a"]["rr"] == 1 / 2
    assert (found["a"]["recall_2"], found["a"]["recall_10"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert set(found["b"].values()) == {0.0}
    raw = {q: dict(pairs) for q, pairs in ranking.items()}
    theirs = RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recip_rank", "recall.2,10"}).evaluate(raw)
    for query in qrels:
        for ours, name in (("ndcg_10", "ndcg_cut_10"), ("ap", "map"), ("rr", "recip_rank"), ("recall_10", "recall_10")):
            assert found[query][ours] == theirs[query][name]


# --- the whole run -----------------------------------------------------------------------------------------------------


def _brute(folder: Path, beir: Path, pooling: str, drop: tuple[int, ...] = ()) -> dict[str, list[tuple[str, float]]]:
    """Rankings from plain transformers and numpy; an attention is dropped by zeroing its output projection."""
    if drop:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for layer in drop:
                model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.save_pretrained(folder.with_name("zeroed"))
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder.with_name("zeroed"))
        folder = folder.with_name("zeroed")
    collection = read_collection(beir)
    q, p = (
        _plain_vectors(folder, list(texts.values()), pooling) for texts in (collection.queries, collection.passages)
    )
    cosines = (q / np.linalg.norm(q, axis=1)[:, None]) @ (p / np.linalg.norm(p, axis=1)[:, None]).T
    ids = list(collection.passages)
    return {
        name: sorted(((d, float(s)) for d, s in zip(ids, row, strict=True) if d != name), key=lambda pair: -pair[1])
        for name, row in zip(collection.queries, cosines, strict=True)
    }


def test_a_run_is_what_brute_force_finds(dense_folder: Path, collection_folder: Path, tmp_path: Path) -> None:
    """Rankings, Kendall, overlap and h columns of both models against numpy; chunks and depth that cut through the corpus; a passage with the
    query's own id left out; both models not mixed up."""
    from scipy.stats import kendalltau

    out, depth = tmp_path / "run", 12
    words = ["retrieve", str(dense_folder), "drop:attn=1,4", "--corpus", str(collection_folder), "--out", str(out)]
    assert main([*words, "--pooling", "weighted-mean", "--depth", "12", "--recall-at", "3,10", "--device", "cpu"]) == 0
    run = prunescope.open(out)
    rankings = read_rankings(out)
    brute = {
        "dense": _brute(dense_folder, collection_folder, "weighted-mean"),
        "target": _brute(dense_folder, collection_folder, "weighted-mean", (1, 4)),
    }
    for side in ("dense", "target"):
        for query, found in brute[side].items():
            assert [d for d, _ in rankings[side][query]] == [d for d, _ in found[:depth]]
            np.testing.assert_allclose(
                [s for _, s in rankings[side][query]], [s for _, s in found[:depth]], rtol=0, atol=1e-6
            )
    assert all("q3" not in dict(found) for found in (rankings["dense"]["q3"], rankings["target"]["q3"]))
    assert any("q3" in dict(found) for found in rankings["dense"].values())
    rows = {row["id"]: row for row in run.table().to_pylist()}
    assert list(rows) == [f"q{i}" for i in range(7)]
    h = [
        _plain_vectors(path, list(read_collection(collection_folder).queries.values()), "weighted-mean")
        for path in (dense_folder, dense_folder.with_name("zeroed"))
    ]
    collection = read_collection(collection_folder)
    for i, (query, row) in enumerate(rows.items()):
        top = [[d for d, _ in brute[side][query][:10]] for side in ("dense", "target")]
        assert row["overlap_10"] == len(set(top[0]) & set(top[1])) / 10
        theirs = dict(brute["target"][query])
        tau = kendalltau(
            [s for _, s in brute["dense"][query][:depth]], [theirs[d] for d, _ in brute["dense"][query][:depth]]
        )
        assert row["kendall"] == pytest.approx(tau.statistic, abs=1e-9)
        cosine = h[0][i] @ h[1][i] / np.linalg.norm(h[0][i]) / np.linalg.norm(h[1][i])
        assert row["h_cos_dev"] == pytest.approx(1 - cosine, rel=1e-4)
        gains = [collection.qrels[query].get(d, 0) for d in top[1]]
        ideal = 2 + 1 / log2(3)
        assert row["ndcg_10_target"] == pytest.approx(
            sum(g / log2(r + 2) for r, g in enumerate(gains)) / ideal, abs=1e-9
        )
        assert row["ndcg_10_diff"] == row["ndcg_10_target"] - row["ndcg_10_dense"]
        assert row["recall_3_dense"] == pytest.approx(
            sum(collection.qrels[query].get(d, 0) > 0 for d in top[0][:3]) / 2
        )
    found = run.info["measures"]["ndcg_10"]
    mean = np.mean([row["ndcg_10_diff"] for row in rows.values()])
    assert found["diff"] == pytest.approx(mean) and found["diff_ci95"][0] <= mean <= found["diff_ci95"][1]
    assert found["better"] + found["worse"] + found["same"] == 7
    assert {"config.yaml", "figures", "rankings", "retrieval.parquet", "run.json", "samples.jsonl"} == {
        p.name for p in out.iterdir()
    }
    assert run.samples()[3]["top_dense"] == [d for d, _ in rankings["dense"]["q3"][:10]]
    assert not list(out.glob("part-*"))


def test_chunks_change_nothing(dense_folder: Path, collection_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that goes by in many chunks gives the rankings of one chunk: catches a merge that loses, doubles or misnumbers passages."""
    options: dict[str, Any] = {"corpus": str(collection_folder), "depth": 9, "recall_at": "5", "device": "cpu"}
    whole = prunescope.retrieve(str(dense_folder), "drop:mlp=2", **options)
    monkeypatch.setattr(retrieval, "_CHUNK", 4)
    chunked = prunescope.retrieve(str(dense_folder), "drop:mlp=2", **options)
    for side in ("dense", "target"):
        for query, found in whole.rankings[side].items():
            assert [d for d, _ in found] == [d for d, _ in chunked.rankings[side][query]]
    assert chunked.info["passages_moved"]["h_cos_dev"]["mean"] == pytest.approx(
        whole.info["passages_moved"]["h_cos_dev"]["mean"], rel=1e-4
    )


def test_a_model_against_itself_changes_nothing(dense_folder: Path, collection_folder: Path) -> None:
    """The same folder loaded twice: the same rankings, tau 1, no deviation at all."""
    result = prunescope.retrieve(str(dense_folder), str(dense_folder), corpus=str(collection_folder), device="cpu")
    assert result.rankings["dense"] == result.rankings["target"]
    rows = result.table().to_pylist()
    assert all(row["h_cos_dev"] == 0 and row["h_orth_rel"] == 0 and row["kendall"] == 1 for row in rows)
    assert all(row["overlap_10"] == 1 and row["ndcg_10_diff"] == 0 and row["h_under_floor"] for row in rows)
    assert result.info["passages_moved"]["h_cos_dev"]["max"] == 0
    assert result.info["measures"]["ndcg_10"]["diff_ci95"] == [0, 0]
    assert set(result.summary["h"]) == set(H_COLUMNS)


@pytest.mark.parametrize("keep", [0, 3, 200, -30])
def test_what_was_saved_and_is_damaged_is_found_again(keep: int, tmp_path: Path) -> None:
    """Cut off at the start, in the middle, near the end: nothing of it is taken, and nothing is raised."""
    best = {side: retrieval._Best(2, 3) for side in retrieval.SIDES}
    for one in best.values():
        one.add(np.array([[0.5, 0.25], [0.125, 1.0]]), np.zeros((2, 2)), np.arange(2))
    retrieval._State(best, np.ones((2, 6)), done=4).save(tmp_path)
    path = tmp_path / "part-best.npz"
    whole = path.read_bytes()
    fresh = retrieval._State({side: retrieval._Best(2, 3) for side in retrieval.SIDES}, np.zeros((2, 6)))
    path.write_bytes(whole[:keep])
    fresh.load(tmp_path)
    assert fresh.done == 0 and not fresh.moved.any() and fresh.best["dense"].score.shape == (2, 0)
    path.write_bytes(whole)
    fresh.load(tmp_path)
    assert fresh.done == 4 and fresh.best["target"].score.tolist() == [[0.5, 0.25], [1.0, 0.125]]


def test_an_interrupted_run_goes_on(
    dense_folder: Path, collection_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after some chunks and resumed: the same table, and no chunk embedded twice. Other options are refused."""
    monkeypatch.setattr(retrieval, "_CHUNK", 8)
    options: dict[str, Any] = {"corpus": str(collection_folder), "device": "cpu"}
    expected = prunescope.retrieve(str(dense_folder), "drop:attn=2", **options)
    calls, stop_at, real = [], 6, embed

    def counted(*args: Any) -> torch.Tensor:
        calls.append(len(args[1]))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(retrieval, "embed", counted)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):  # queries twice, a chunk twice, half a chunk
        prunescope.retrieve(str(dense_folder), "drop:attn=2", out=str(out), **options)
    assert not out.exists()
    calls.clear()
    stop_at = -1
    with pytest.raises(UserError, match="--resume needs the same ones"):
        prunescope.retrieve(str(dense_folder), "drop:attn=3", out=str(out), resume=True, **options)
    calls.clear()
    resumed = prunescope.retrieve(str(dense_folder), "drop:attn=2", out=str(out), resume=True, **options)
    assert calls == [7, 7, 8, 8, 8, 8, 6, 6, 4, 4]  # queries, three chunks of the four, the noise floor
    assert resumed.table().equals(expected.table())
    assert resumed.rankings == expected.rankings
    again = prunescope.retrieve(str(dense_folder), "drop:attn=2", out=str(out), resume=True, **options)
    assert again.rankings == expected.rankings and len(calls) == 10


def test_models_of_another_width_have_rankings_but_no_h(
    dense_folder: Path, collection_folder: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    tiny_tokenizer().save_pretrained(tmp_path / "narrow")
    result = prunescope.retrieve(
        str(dense_folder), str(tmp_path / "narrow"), corpus=str(collection_folder), device="cpu"
    )
    run = result.save(tmp_path / "run")
    assert np.isnan(run.table()["h_cos_dev"].to_numpy()).all() and not any(run.table()["h_under_floor"].to_pylist())
    assert run.table()["kendall"].null_count == 0
    assert run.summary["h"] == {} and run.info["passages_moved"] == {}


def test_mistakes_are_one_line(
    dense_folder: Path, collection_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["retrieve", str(dense_folder), "drop:attn=1", "--device", "cpu"]
    beir = ["--corpus", str(collection_folder)]
    for words, message in (
        (["--queries", "x"], "--queries and --qrels go with --corpus"),
        (["--corpus", str(tmp_path / "none")], "is no folder; give a folder with corpus.jsonl"),
        ([*beir, "--split", "dev"], "dev.tsv: no such file; --split can be test"),
        ([*beir, "--recall-at", "5,2000"], "cut-offs go from 1 to --depth, 1000"),
        ([*beir, "--recall-at", "five"], "write comma-separated whole numbers, such as 10,100"),
        ([*beir, "--max-length", "0"], "--max-length 0: it must be at least 1"),
        ([*beir, "--depth", "0"], "--depth 0: it must be at least 1"),
    ):
        assert main([*base, *words, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not list(tmp_path.glob("run*"))


def test_the_page_shows_retrieval_and_judges_by_it(dense_folder: Path, collection_folder: Path, tmp_path: Path) -> None:
    """Would catch a verdict that still reads cosines where a corpus was searched, and a change shown with the wrong sign."""
    result = prunescope.retrieve(str(dense_folder), "drop:attn=1", corpus=str(collection_folder), device="cpu")
    result.save(tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\n" * 6, "utf-8")
    texts = prunescope.generate(str(dense_folder), "drop:attn=1", prompts=str(prompts), max_new_tokens=1, device="cpu")
    texts.save(tmp_path / "texts")
    page = prunescope.report([str(tmp_path / "run"), str(tmp_path / "texts")], out=str(tmp_path / "report.html"))
    shown, found = page.read_text("utf-8"), result.info["measures"]["ndcg_10"]
    assert f'<td class="n">{found["diff"]:+.3f}</td>' in shown
    assert "nDCG@10, target" in shown and "cosine of h, teacher-forced" not in shown
    share = found["target"] / found["dense"]
    info = {"retrieve": result.info}
    level = judge(info)[0].level
    assert level == ("broken" if share < 0.8 else "kept" if share >= 0.95 and found["diff_ci95"][1] >= 0 else "at risk")
    for target, bounds, expected in (
        (0.6, [-0.5, -0.3], "broken"),
        (1.0, [-0.1, 0.1], "kept"),
        (0.97, [-0.05, -0.01], "at risk"),
    ):
        made_up = found | {"dense": 1.0, "target": target, "diff": target - 1, "diff_ci95": bounds}
        assert judge({"retrieve": result.info | {"measures": {"ndcg_10": made_up}, "queries": 50}})[0].level == expected


# --- collections -------------------------------------------------------------------------------------------------------


def test_three_paths_are_the_folder_and_titles_come_first(collection_folder: Path) -> None:
    """BEIR's convention: title, a blank, text. Queries without a judgement are left out."""
    corpus = collection_folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + '{"_id": "new", "title": "A title", "text": "and a text", "metadata": {}}\n')
    found = read_collection(corpus, collection_folder / "queries.jsonl", collection_folder / "qrels")
    assert found == read_collection(collection_folder)
    assert found.passages["new"] == "A title and a text"
    assert list(found.queries) == [f"q{i}" for i in range(7)] and found.relevant("q0") == 2


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("corpus.jsonl", "not json", "line 31: not JSON"),
        ("corpus.jsonl", '{"_id": "x"}', "no '_id' and 'text'"),
        ("corpus.jsonl", '{"_id": "x", "text": " "}', "passage 'x' has no text"),
        ("corpus.jsonl", '{"_id": "d1", "text": "w4"}', "'d1' stands there twice"),
        ("corpus.jsonl", '{"_id": "x y", "text": "w4"}', "has a blank in it"),
        ("queries.jsonl", '{"_id": "q1", "text": "w4"}', "'q1' stands there twice"),
        ("qrels/test.tsv", "q0\tnowhere\t1", "passage 'nowhere' is not in the corpus"),
        ("qrels/test.tsv", "nobody\td1\t1", "query 'nobody' is not among the queries"),
        ("qrels/test.tsv", "q0\td0\t1", "judged twice"),
        ("qrels/test.tsv", "q0 0 d0 1", "with tabs between them"),
    ],
)
def test_what_is_wrong_with_a_collection_is_said(file: str, line: str, message: str, collection_folder: Path) -> None:
    path = collection_folder / file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_collection(collection_folder)


def test_the_shipped_corpus_is_consistent() -> None:
    """Ids exist (reading checks it), every query has a relevant passage of grade 2, grades are 1 and 2, no text stands twice, no query is
    answered by its own words, and every passage ends as a sentence."""
    found = read_collection()
    assert len(found.passages) >= 150 and len(found.queries) >= 60
    assert len({text.lower() for text in found.passages.values()}) == len(found.passages)
    assert len({text.lower() for text in found.queries.values()}) == len(found.queries)
    assert set(found.qrels) == set(found.queries)
    assert all(max(grades.values()) == 2 and set(grades.values()) <= {1, 2} for grades in found.qrels.values())
    assert sum(found.relevant(query) >= 2 for query in found.queries) >= 12
    assert all(20 <= len(text.split()) <= 80 and text.endswith(".") for text in found.passages.values())
    for query, grades in found.qrels.items():  # long words in common are at most one
        asked = {word.strip(",.").lower() for word in found.queries[query].split() if len(word) > 5}
        for passage in grades:
            answer = {word.strip(",.;:()").lower() for word in found.passages[passage].split()}
            assert len(asked & answer) <= 1, (query, asked & answer)


def test_the_real_model_finds_passages(smollm2: LoadedModel) -> None:
    """24 passages and 17 queries of the shipped corpus: far better than chance before, and the drop is seen. Catches pooling of nonsense
    and judgements that name the wrong passages."""
    whole = read_collection()
    passages = {name: text for name, text in whole.passages.items() if name[0] in "kg"}
    names = [query for query, grades in whole.qrels.items() if set(grades) <= set(passages)]
    few = Collection(
        passages, {name: whole.queries[name] for name in names}, {name: whole.qrels[name] for name in names}
    )
    tokens = [
        tokens_of(smollm2, texts, Reading(), "text")[0] for texts in (few.queries, few.passages)
    ]  # fmt: skip
    from prunescope.models.dropping import DropSpec

    found = retrieval.retrieval_rows(
        smollm2, DropSpec.parse("attn=20,22"), few, *tokens, pooling="weighted-mean", recall_at=(10,)
    )
    dense = found.table["ndcg_10_dense"].to_numpy()
    chance = np.mean([1 / (rank + 1) / log2(rank + 2) for rank in range(10)])
    assert dense.mean() > 0.35 > chance
    dev = found.table["h_cos_dev"].to_numpy()
    assert (dev > 100 * found.floor["floor"]["h_cos_dev"]).all() and (dev < 0.5).all()
    assert not smollm2.dropped
