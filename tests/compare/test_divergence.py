"""Divergence over a text against brute force: one pass a chunk of plain transformers in float64, sums written out as llama.cpp's tool has them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from families import VOCAB, tiny_folder, tiny_model, tiny_tokenizer
from prunescope.compare import divergence as module
from prunescope.compare.divergence import COLUMNS, Slice, divergence_key, divergence_rows, read_slices
from prunescope.compare.divergence_summary import divergence_summary, grouped, kl_table, worst_passages
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.rounding import round_to_nearest
from prunescope.models.variants import Variant

CONTEXT, SCORED = 12, 5  # of 12 tokens the predictions at positions 6 to 10 count


def words(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(4, VOCAB, count))


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Two texts: of 3 chunks and 4 tokens, and of 2 chunks."""
    files = tmp_path / "a.txt", tmp_path / "b.txt"
    for file, count in zip(files, (3 * CONTEXT + 4, 2 * CONTEXT), strict=True):
        file.write_text(words(count, count), "utf-8")
    return files


@pytest.fixture
def pair(tmp_path: Path) -> tuple[LoadedModel, LoadedModel]:
    """Two models of one vocabulary, different widths of MLP aside nothing in common, in float64."""
    first, second = tiny_folder("llama", tmp_path / "one", 1), tiny_folder("olmo2", tmp_path / "two", 2)
    return load_model(first, device="cpu", dtype="float64"), load_model(second, device="cpu", dtype="float64")


def brute_force(dense: Any, target: Any, chunks: torch.Tensor) -> list[dict[str, Any]]:
    """Every scored token from full logits, as sums over the vocabulary in float64."""
    rows = []
    for number, chunk in enumerate(chunks):
        with torch.no_grad():
            log_p, log_q = (side(chunk[None]).logits[0].double().log_softmax(-1).numpy() for side in (dense, target))
        for j in range(len(chunk) // 2, len(chunk) - 1):
            a, b, token = log_p[j], log_q[j], int(chunk[j + 1])
            p, q = np.exp(a), np.exp(b)
            m = np.log((p + q) / 2)
            rows.append({
                "chunk": number, "position": j, "token": token,
                "kl_dense_target": (p * (a - b)).sum(), "kl_target_dense": (q * (b - a)).sum(),
                "js": ((p * (a - m)).sum() + (q * (b - m)).sum()) / 2, "tv": np.abs(p - q).sum() / 2,
                "nll_dense": -a[token], "nll_target": -b[token], "dp": q[token] - p[token],
                "entropy_dense": -(p * a).sum(), "entropy_target": -(q * b).sum(),
                "confidence_dense": p.max(), "confidence_target": q.max(), "top1_agree": float(p.argmax() == q.argmax()),
                "same_sampled": (p * q).sum(), "same_sampled_dense": (p * p).sum(),
                "top_dense": np.argsort(-p)[:5].tolist(), "top_target": np.argsort(-q)[:5].tolist(),
                "top_dense_p": np.sort(p)[::-1][:5].tolist(), "top_target_p": np.sort(q)[::-1][:5].tolist(),
            })  # fmt: skip
    return rows


def same_rows(table: pa.Table, expected: list[dict[str, Any]], rel: float = 1e-8) -> None:
    assert len(table) == len(expected)
    for found, wanted in zip(table.to_pylist(), expected, strict=True):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=rel, abs=rel / 100), name


def test_rows_are_brute_force(pair: tuple[LoadedModel, LoadedModel], texts: tuple[Path, Path]) -> None:
    """Catches the wrong half of a chunk, a token that is off by one, dense and target exchanged, and a text that is split wrongly."""
    dense, target = pair
    slices = read_slices(dense, f"{texts[0]},{texts[1]}", context=CONTEXT)
    assert [len(piece.chunks) for piece in slices] == [3, 2] and [piece.tokens for piece in slices] == [40, 24]
    found = divergence_rows(dense, target, slices, batch_size=2)
    chunks = torch.cat([piece.chunks for piece in slices])
    same_rows(found.table, brute_force(dense.model, target.model, chunks))
    assert found.table["slice"].to_pylist() == [str(texts[0])] * 3 * SCORED + [str(texts[1])] * 2 * SCORED
    assert (
        chunks.flatten()[:40].tolist()
        == [int(w[1:]) for w in texts[0].read_text().split()][:36] + chunks[3].tolist()[:4]
    )
    assert all(value <= 1e-12 for value in found.floor["floor"].values()) and found.floor["tokens"] == 2 * SCORED


def test_temperature_divides_the_logits(pair: tuple[LoadedModel, LoadedModel], texts: tuple[Path, Path]) -> None:
    """Catches a temperature that reaches some of the columns only."""
    dense, target = pair
    slices = read_slices(dense, str(texts[1]), context=CONTEXT)
    cold = [copy.deepcopy(model.model) for model in pair]
    for model in cold:
        model.lm_head.weight.data /= 0.5
    found = divergence_rows(dense, target, slices, temperature=0.5)
    same_rows(found.table, brute_force(*cold, slices[0].chunks))


@pytest.mark.parametrize("spec", ["quant:int4-g16", "drop:attn=1,4+quant:int8", "drop:mlp=2"])
def test_a_variant_is_the_model_made_by_hand(spec: str, dense: LoadedModel, texts: tuple[Path, Path]) -> None:
    """Against plain transformers with rounded weights and silenced branches. Catches a dense pass that sees the variant, or the other way."""
    plain, made = copy.deepcopy(dense.model), copy.deepcopy(dense.model)
    with torch.no_grad():
        for layer in made.model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear) and "quant" in spec):
                linear.weight.copy_(
                    round_to_nearest(linear.weight, "int4" if "int4" in spec else "int8", 16 if "g16" in spec else None)
                )
        for i in (1, 4) if "attn" in spec else ():
            made.model.layers[i].self_attn.o_proj.weight.zero_()
        if "mlp" in spec:
            made.model.layers[2].mlp.down_proj.weight.zero_()
    slices = read_slices(dense, str(texts[0]), context=CONTEXT)
    found = divergence_rows(dense, Variant(dense, spec), slices, batch_size=2)
    expected = brute_force(plain.double(), made.double(), slices[0].chunks)
    for row, wanted in zip(found.table.to_pylist(), expected, strict=True):
        for name in ("kl_dense_target", "kl_target_dense", "js", "nll_dense", "nll_target", "same_sampled"):
            assert row[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-6), name


def test_a_model_against_itself_is_zero(dense: LoadedModel, texts: tuple[Path, Path]) -> None:
    slices = read_slices(dense, str(texts[0]), context=CONTEXT)
    found = divergence_rows(dense, dense, slices)
    for name in ("kl_dense_target", "kl_target_dense", "js", "tv", "dp"):
        assert not np.any(found.table[name].to_numpy()), name
    table = kl_table(found.table)
    assert table["ln_ppl_ratio"] == [0, 0] and table["same_top"] == [1, 0] and table["dp_rms"] == [0, 0]
    assert table["same_sampled"] == table["same_sampled_dense"] and table["overlap"] == [1, 0]


def test_batches_change_nothing_and_each_model_reads_once(
    pair: tuple[LoadedModel, LoadedModel], texts: tuple[Path, Path]
) -> None:
    """Catches a second pass over the text, and chunks that see each other."""
    dense, target = pair
    slices = read_slices(dense, f"{texts[0]},{texts[1]}", context=CONTEXT)
    one = divergence_rows(dense, target, slices, batch_size=1).table
    read = []
    handle = target.model.register_forward_pre_hook(
        lambda m, a, k: read.append(k["input_ids"].numel()), with_kwargs=True
    )
    many = divergence_rows(dense, target, slices, batch_size=5).table
    handle.remove()
    assert sum(read) == 5 * (CONTEXT - 1)  # the last token of a chunk predicts nothing that counts
    for name in COLUMNS:
        assert np.allclose(one[name].to_numpy(), many[name].to_numpy(), rtol=1e-9, atol=1e-12), name


def test_an_interrupted_run_goes_on(
    pair: tuple[LoadedModel, LoadedModel], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts that are computed again, or parts of another run that are taken."""
    dense, target = pair
    slices = read_slices(dense, str(texts[0]), context=CONTEXT)
    parts = tmp_path / "parts"
    parts.mkdir()
    key = divergence_key(dense, target, slices, 1, 1.0)
    whole = divergence_rows(dense, target, slices, batch_size=1).table
    real, calls = module._Pair.rows, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(module._Pair, "rows", failing)
    with pytest.raises(KeyboardInterrupt):
        divergence_rows(dense, target, slices, batch_size=1, parts=parts, key=key)
    resumed = divergence_rows(dense, target, slices, batch_size=1, parts=parts, key=key)
    assert calls == [0, 1, 2, 2] and resumed.table.equals(whole) and resumed.floor["tokens"] == SCORED
    variant = divergence_key(dense, Variant(dense, "quant:int8"), slices, 1, 1.0)
    assert len({key, variant, divergence_key(dense, Variant(dense, "quant:int4"), slices, 1, 1.0)}) == 3
    with pytest.raises(UserError, match="other models"):
        divergence_rows(dense, target, slices, batch_size=1, parts=parts, key=variant)


# --- texts -------------------------------------------------------------------------------------------------------------


def test_the_start_token_takes_the_first_place_of_every_chunk(dense: LoadedModel, texts: tuple[Path, Path]) -> None:
    """As in llama.cpp: in front of the text it pushes the words on by one, and then it replaces the first token of each chunk.
    Catches a start token that is left out, inserted into every chunk, or written where the tokenizer has none."""
    plain = read_slices(dense, str(texts[0]), context=CONTEXT)[0].chunks.flatten().tolist()
    dense.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    chunks = read_slices(dense, str(texts[0]), context=CONTEXT)[0].chunks
    assert chunks[:, 0].tolist() == [1, 1, 1]
    shifted = [1, *plain]
    for i, chunk in enumerate(chunks.tolist()):
        assert chunk[1:] == shifted[i * CONTEXT + 1 : (i + 1) * CONTEXT]


def test_chunks_are_limited(dense: LoadedModel, texts: tuple[Path, Path]) -> None:
    first = read_slices(dense, f"{texts[0]},{texts[1]}", context=CONTEXT, chunks=1)
    assert [len(piece.chunks) for piece in first] == [1, 1]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"context": 3}, "--context 3: at least 4"),
        ({"context": 65}, "longer than the 64 tokens"),
        ({"chunks": 0}, "--chunks 0: at least one"),
        ({"context": 30, "files": "b"}, "24 tokens, fewer than one chunk of 30"),
        ({"files": "nowhere"}, "cannot be read"),
        ({"files": "a,a"}, "named twice"),
        ({"files": "latin"}, "UTF-8"),
    ],
)
def test_texts_that_cannot_be_used(
    options: dict[str, Any], says: str, dense: LoadedModel, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    names = options.pop("files", "a").split(",")
    with pytest.raises(UserError, match=says):
        read_slices(dense, ",".join(str(tmp_path / f"{name}.txt") for name in names), **{"context": CONTEXT, **options})


def test_models_that_cannot_be_compared(dense: LoadedModel, texts: tuple[Path, Path], tmp_path: Path) -> None:
    slices = read_slices(dense, str(texts[0]), context=CONTEXT)
    with pytest.raises(UserError, match="layer 9 is out of range"):
        Variant(dense, "drop:attn=9")
    with pytest.raises(UserError, match="--memory-mb 0"):
        divergence_rows(dense, dense, slices, memory=100)
    other = tiny_model("llama", 3)
    other.resize_token_embeddings(VOCAB + 8)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="vocabulary of 72"):
        divergence_rows(dense, load_model(tmp_path / "other", device="cpu"), slices)


# --- the table ---------------------------------------------------------------------------------------------------------


def made_up(tokens: int = 400, chunks: int = 4, seed: int = 0) -> pa.Table:
    """Rows of the right kind, with correlated log-likelihoods, of which nothing was computed by a model."""
    rng = np.random.default_rng(seed)
    nll = rng.gamma(1.5, 1.5, tokens)
    other = np.maximum(1e-3, nll + rng.normal(0.1, 0.5, tokens))
    columns = {
        "kl_dense_target": rng.gamma(0.3, 0.3, tokens), "kl_target_dense": rng.gamma(0.3, 0.4, tokens), "js": rng.gamma(0.3, 0.05, tokens),
        "tv": rng.uniform(0, 1, tokens), "nll_dense": nll, "nll_target": other, "dp": np.exp(-other) - np.exp(-nll),
        "entropy_dense": rng.uniform(0, 4, tokens), "entropy_target": rng.uniform(0, 4, tokens),
        "confidence_dense": rng.uniform(0, 1, tokens), "confidence_target": rng.uniform(0, 1, tokens),
        "top1_agree": (rng.uniform(0, 1, tokens) < 0.8).astype(float), "same_sampled": rng.uniform(0, 1, tokens),
        "same_sampled_dense": rng.uniform(0, 1, tokens),
    }  # fmt: skip
    each = tokens // chunks
    where = {
        "slice": np.repeat(["a", "b"], tokens // 2),
        "chunk": np.repeat(np.arange(chunks), each).astype("i4"),
        "position": np.tile(np.arange(each, 2 * each), chunks).astype("i4"),
        "token": rng.integers(4, VOCAB, tokens).astype("i4"),
    }
    tops = {name: [[5, 6, 7, 8, 9]] * tokens for name in ("top_dense", "top_target")}
    shares = {name: [[0.3, 0.2, 0.1, 0.1, 0.1]] * tokens for name in ("top_dense_p", "top_target_p")}
    return pa.table({**where, **columns, **tops, **shares})


def test_the_table_is_llama_cpps_sums() -> None:
    """Running sums and sums of squares in plain Python, propagated as tools/perplexity does. Catches n for n - 1, a covariance that is
    left out, an error that is not carried through exp, percent for shares."""
    rows = made_up()
    found = kl_table(rows)
    n = len(rows)

    def mean(values: list[float]) -> tuple[float, float]:
        f = sum(values) / n
        return f, math.sqrt((sum(v * v for v in values) / n - f * f) / (n - 1))

    a, b, dp = (rows[name].to_pylist() for name in ("nll_dense", "nll_target", "dp"))
    (la, ea), (lb, eb) = mean(a), mean(b)
    covariance = (sum(x * y for x, y in zip(a, b, strict=True)) / n - la * lb) / (n - 1)
    ratio_error = math.sqrt(ea**2 + eb**2 - 2 * covariance)
    close = lambda value: pytest.approx(value, rel=1e-9)  # noqa: E731
    assert found["ppl_target"] == close([math.exp(lb), math.exp(lb) * eb])
    assert found["ppl_dense"] == close([math.exp(la), math.exp(la) * ea])
    assert found["ln_ppl_correlation"] == close(covariance / (ea * eb))
    assert found["ln_ppl_ratio"] == close([lb - la, ratio_error])
    assert found["ppl_ratio"] == close([math.exp(lb - la), math.exp(lb - la) * ratio_error])
    square = (math.exp(lb) * eb) ** 2 + (math.exp(la) * ea) ** 2 - 2 * math.exp(la + lb) * covariance
    assert found["ppl_difference"] == close([math.exp(lb) - math.exp(la), math.sqrt(square)])
    mse, mse_error = mean([v * v for v in dp])
    assert found["dp_rms"] == close([math.sqrt(mse), 0.5 / math.sqrt(mse) * mse_error])
    same = sum(rows["top1_agree"].to_pylist()) / n
    assert found["same_top"] == close([same, math.sqrt(same * (1 - same) / (n - 1))])
    for name in ("kl_dense_target", "kl_target_dense", "js", "dp"):
        values = sorted(rows[name].to_pylist())
        assert found[name]["mean"] == close(mean(values))
        assert (found[name]["min"], found[name]["max"]) == (values[0], values[-1])
        assert found[name]["p50"] == close((values[n // 2 - 1] + values[n // 2]) / 2)
        for percent in (99.9, 99, 95, 90, 10, 5, 1, 0.1):
            place = percent / 100 * (n - 1)
            low = int(place)
            wanted = values[low] * (1 - place + low) + values[low + 1] * (place - low)
            assert found[name][f"p{percent:g}"] == close(wanted)
    assert found["overlap"] == close(mean([1 - v for v in rows["tv"].to_pylist()]))


def test_groups_cover_every_token_once_and_keep_their_means() -> None:
    """Catches an edge that counts twice or not at all, and a group that takes another's rows."""
    rows = made_up()
    by = grouped(rows)
    kl = rows["kl_dense_target"].to_numpy()
    for name, groups in by.items():
        assert sum(group["tokens"] for group in groups) == len(rows), name
        total = sum(group["tokens"] * group["kl_dense_target"][0] for group in groups)
        assert total == pytest.approx(kl.sum()), name
    assert [(group["slice"], group["chunk"]) for group in by["chunk"]] == [("a", 0), ("a", 1), ("b", 2), ("b", 3)]
    confidence = rows["confidence_dense"].to_numpy()
    inside = (confidence >= 0.6) & (confidence < 0.8)
    (group,) = [group for group in by["confidence"] if group["from"] == 0.6]
    assert group["kl_dense_target"][0] == pytest.approx(kl[inside].mean())
    assert group["ppl_dense"] == pytest.approx(math.exp(rows["nll_dense"].to_numpy()[inside].mean()))
    assert [(group["from"], group["to"]) for group in by["position"]][::7] == [(100, 112), (188, 200)]


def test_the_summary_resamples_chunks() -> None:
    """Chunks of very different KL: an interval over tokens would be far too narrow."""
    rows = made_up()
    shifted = rows["kl_dense_target"].to_numpy() + 5.0 * (rows["chunk"].to_numpy() == 3)
    rows = rows.set_column(rows.column_names.index("kl_dense_target"), "kl_dense_target", pa.array(shifted))
    found = divergence_summary(rows)
    low, high = found["summary"]["p"]["kl_dense_target"]["ci95"]
    assert high - low > 2 and found["table"]["kl_dense_target"]["mean"][1] < 0.2
    assert found["tokens"] == 400 and found["chunks"] == 4


def test_worst_passages_do_not_overlap_or_cross_chunks() -> None:
    """A peak at the end of a chunk and one at the start of the next. Catches a window over the border, the same peak twice, text that is
    off by one."""
    rows = made_up()
    kl = np.full(400, 0.01)
    kl[95:105] = 3.0  # chunk 0 ends at row 100
    kl[250] = 20.0
    rows = rows.set_column(rows.column_names.index("kl_dense_target"), "kl_dense_target", pa.array(kl))
    chunks = {number: [0] * 101 + rows["token"].to_pylist()[100 * number : 100 * number + 100] for number in range(4)}
    found = worst_passages(rows, chunks, lambda ids: " ".join(map(str, ids)), 3)
    assert [passage["chunk"] for passage in found] == [2, 0, 1]
    assert found[0]["kl_dense_target"] == pytest.approx((20 + 15 * 0.01) / 16)
    assert found[1]["kl_dense_target"] == found[2]["kl_dense_target"] == pytest.approx((5 * 3 + 11 * 0.01) / 16)
    passage = found[1]
    tokens = chunks[0][passage["position"] : passage["position"] + 16]
    assert passage["text"].split() == [str(t) for t in tokens] == [t["text"] for t in passage["tokens"]]
    assert passage["before"].split()[-1] == str(chunks[0][passage["position"] - 1])
    assert passage["tokens"][0]["top_dense"][0] == {"token": 5, "text": "5", "p": 0.3}


def test_slices_know_their_context() -> None:
    assert Slice("a", torch.zeros(2, 7, dtype=torch.long), 15).context == 7
