"""Calibration on traces: what counts in scores and Gram matrices, against rows picked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prunescope
from families import characters_folder, tiny_folder
from prunescope.data.calibration import Calibration, calibration_tokens
from prunescope.errors import UserError
from prunescope.models.blockwise import stream_model
from prunescope.models.loading import load_model
from prunescope.models.residual import Passage, watching
from prunescope.prune.calibrate import Text, gather
from prunescope.prune.select import score_sublayers

TOKENS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))
COUNTS = torch.zeros(3, 12, dtype=torch.bool)
COUNTS[0, 4:9] = COUNTS[1, 1:12] = COUNTS[2, 7:8] = True


def test_which_places_count() -> None:
    """A place predicts a counted token if the next one counts; it is used if it predicts one or is one. Would catch a shift the wrong way."""
    found = Calibration(TOKENS, "x", 0, COUNTS)
    places = found.predicting().nonzero().tolist()
    assert places == [[i, p] for i, (low, high) in enumerate(((3, 8), (0, 11), (6, 7))) for p in range(low, high)]
    used = found.used()
    assert used is not None
    assert used.nonzero().tolist() == [
        [i, p] for i, (low, high) in enumerate(((3, 9), (0, 12), (6, 8))) for p in range(low, high)
    ]
    gathered = found.gathered()
    assert gathered is not None and bool(gathered[:, 0].all()) and torch.equal(gathered[:, 1:], used[:, 1:])
    assert not used[0, 0], "scores leave the first place out"
    plain = Calibration(TOKENS, "x", 0)
    assert plain.used() is None and plain.gathered() is None and plain.predicting().sum() == 3 * 11
    assert found.describe()["tokens_sha256"] != plain.describe()["tokens_sha256"]


def test_scores_average_over_used_places_and_padding_has_no_say(tmp_path: Path) -> None:
    loaded = load_model(tiny_folder("llama", tmp_path), device="cpu")
    calibration = Calibration(TOKENS, "x", 0, COUNTS)
    used = calibration.used()
    assert used is not None
    seen: list[Passage] = []
    with watching(loaded, seen.append), torch.no_grad():
        loaded.model(input_ids=TOKENS, use_cache=False)
    found = score_sublayers(loaded, TOKENS, used=used, batch_size=2)
    for passage in seen:
        before, after = passage.before[used].double(), passage.after[used].double()
        cosine = ((before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))).mean()
        assert found.of(passage.kind)[passage.layer] == pytest.approx(cosine.item(), abs=1e-6)
    other = TOKENS.clone()
    other[0, 9:] = 3
    other[2, 8:] = 9
    again = score_sublayers(loaded, other, used=used)
    assert again.attn == pytest.approx(found.attn, abs=1e-7) and again.mlp == pytest.approx(found.mlp, abs=1e-7)


@pytest.mark.parametrize("gram", [True, False])
def test_gram_matrices_add_up_used_places_alone(gram: bool, tmp_path: Path) -> None:
    """Would catch a mask of another batch than the running one, and norms over all tokens."""
    streamed = stream_model(str(tiny_folder("llama", tmp_path / "model")), tmp_path / "scratch", device="cpu")
    used = Calibration(TOKENS, "x", 0, COUNTS).used()
    assert used is not None
    text = Text(streamed, TOKENS, 2, 2**30, tmp_path / "spill", used)
    with streamed.block(0):
        normed = streamed.blocks[0].input_layernorm(text.hidden(0, 3))[used].double()
        statistics, _ = gather(text, 0, streamed.matrices(0), gram=gram, advance=lambda n: None)
    statistic = next(value for name, value in statistics.items() if "q_proj" in name)
    assert statistic.tokens == int(used.sum())
    expected = normed.T @ normed
    assert torch.allclose(statistic.norm().double(), (expected.diagonal() / used.sum()).sqrt(), rtol=1e-5)
    if gram:
        assert torch.allclose(statistic.hessian().double(), expected, rtol=1e-4, atol=1e-5)


def test_traces_calibrate_drop_and_sparsify(tmp_path: Path) -> None:
    model = load_model(characters_folder(tmp_path / "model"), device="cpu")
    (tmp_path / "asked.txt").write_text("one\ntwo and more\n", "utf-8")
    source = f"traces:{tmp_path / 'asked.txt'}"
    found = calibration_tokens(model, source, samples=4, seq_len=6)
    assert found.counts is not None and found.counts.sum(1).max() == 6 and found.tokens.shape == found.counts.shape
    assert found.describe()["traces"]["sources"] == [str(tmp_path / "asked.txt")]
    assert calibration_tokens(model, "traces", samples=2, seq_len=5).tokens.shape[0] == 2
    dropped = prunescope.drop(model, n=1, calibration=source, samples=4, seq_len=6, cache=False)
    assert dropped.info["calibration"]["source"] == source
    written = prunescope.sparsify(
        str(tmp_path / "model"), pattern="2:4", calibration=source, samples=4, seq_len=6, cache=False, device="cpu",
        out=str(tmp_path / "sparse"),
    )  # fmt: skip
    assert written.info["calibration"]["samples"] == 4
    gathered = found.gathered()
    assert gathered is not None and {row["tokens"] for row in written.rows} == {int(gathered.sum())}
    with pytest.raises(UserError, match="give two --samples at least"):
        prunescope.sparsify(
            str(tmp_path / "model"), pattern="2:4", calibration=source, samples=1, seq_len=6, cache=False, device="cpu", refine="admm"
        )  # fmt: skip
    with pytest.raises(UserError, match="nowhere"):
        calibration_tokens(model, "traces:nowhere.txt", samples=4, seq_len=6)
