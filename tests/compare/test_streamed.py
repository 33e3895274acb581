"""Comparisons of models that stay on disk against the same ones of models in memory, which other tests hold against independent programs.

Everything must be the same bits in float32. Would catch a block that runs with another one's weights, mask or cache kind, a stream that is carried on
from the wrong batch, columns taken from rows in another order, and whatever else of a run depends on where the weights are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

import prunescope
from families import FAMILIES, characters_folder, tiny_folder
from prunescope.cli import main
from prunescope.compare import streamed
from prunescope.compare.context import Transcript
from prunescope.compare.layerwise import layerwise_key, layerwise_rows
from prunescope.compare.streamed import streamed_layerwise_rows
from prunescope.errors import UserError
from prunescope.models import keeping
from prunescope.models.blockwise import StreamedModel, stream_model
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling
from prunescope.models.loading import load_model
from prunescope.models.saving import save_dropped
from prunescope.models.streaming import Carried

PROMPTS = [[5, 6, 7, 8, 9], [20, 21], [33, 4, 9, 9, 9, 30, 31, 12]]
TEXTS = [[10, 11, 12, 13], [5, 6], [7, 8, 9, 10, 11, 40]]


def both_ways(
    dense: Path,
    target: Path | DropSpec | None,
    scratch: Path,
    prompts: Any = PROMPTS,
    texts: Any = TEXTS,
    **options: Any,
) -> tuple[Any, Any]:
    """`LayerwiseRows` of loaded models and of models on disk, and what is said of each model."""
    found = []
    loading = {"device": "cpu", "dtype": options.pop("dtype", "auto")}
    loaded = load_model(dense, **loading)
    other = load_model(target, **loading) if isinstance(target, Path) else target
    rows = layerwise_rows(loaded, other, prompts, texts=texts, batch_size=2, **options)
    found.append((rows, loaded.describe(), other.describe() if isinstance(target, Path) else None))

    streamed = stream_model(str(dense), scratch / "dense", experts=None, **loading)
    theirs: Any = target
    if isinstance(target, Path):
        theirs = stream_model(str(target), scratch / "target", experts=None, **loading)
    of_target = theirs.loaded if isinstance(theirs, StreamedModel) else theirs
    settings = (64, Sampling(), True, 2, options.get("lens", "raw"), 1.0)
    key = layerwise_key(streamed.loaded, of_target, prompts, texts, *settings)
    sequences = [Transcript(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    rows = streamed_layerwise_rows(streamed, theirs, sequences, key, scratch, batch_size=2, **options)
    found.append((rows, streamed.loaded.describe(), theirs.loaded.describe() if isinstance(target, Path) else None))
    return found[0], found[1]


def assert_same(held: Any, streamed: Any) -> None:
    (rows, *described), (other, *described_on_disk) = held, streamed
    assert described == described_on_disk
    assert (rows.floor, rows.key) == (other.floor, other.key)
    assert same(rows.table, other.table)
    assert max(rows.table["kl_dense_target"].to_pylist()) > 1e-6  # there is something to compare


def same(one: pa.Table, other: pa.Table) -> bool:
    """To the bit, NaN included."""
    return one.schema == other.schema and repr(one.to_pylist()) == repr(other.to_pylist())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_a_target_model(family: str, tmp_path: Path) -> None:
    """Sliding windows, parallel blocks, positions added or rotated, experts, soft-capping, tied heads. The noise floor needs a block's cache."""
    dense, target = (tiny_folder(family, tmp_path / str(seed), seed) for seed in (0, 1))
    assert_same(*both_ways(dense, target, tmp_path))


@pytest.mark.parametrize("target", [None, DropSpec((1,), (3,))])
def test_sublayers_dropped(target: DropSpec | None, tmp_path: Path) -> None:
    assert_same(*both_ways(tiny_folder("llama", tmp_path / "model"), target, tmp_path))


def test_a_target_without_some_blocks(tmp_path: Path) -> None:
    """A compact checkpoint's blocks have other numbers than the dense model's. Would catch one compared with the wrong block, or a layer that it
    lacks and that is left as an earlier run's file had it."""
    dense, target = tiny_folder("llama", tmp_path / "dense"), tmp_path / "target"
    target.mkdir()
    save_dropped(load_model(dense, device="cpu"), DropSpec((2, 5), (2, 5)), target, "compact")
    assert_same(*both_ways(dense, target, tmp_path))


@pytest.mark.parametrize(("dtype", "lens"), [("float32", "final-norm"), ("bfloat16", "raw")])
def test_dtypes_and_lenses(dtype: str, lens: str, tmp_path: Path) -> None:
    dense, target = (tiny_folder("gemma2", tmp_path / str(seed), seed) for seed in (0, 1))
    assert_same(*both_ways(dense, target, tmp_path, dtype=dtype, lens=lens))


def test_hidden_states_that_move_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. Would catch passes that are cut at the wrong places."""
    monkeypatch.setattr("prunescope.models.streaming._at_once", lambda carried: True)
    dense, target = (tiny_folder("mixtral", tmp_path / str(seed), seed) for seed in (0, 1))
    assert_same(*both_ways(dense, target, tmp_path))


def test_rows_are_on_the_disk_before_the_states_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disk that takes long for rows. Would catch states of a killed run that has not the rows in front of them."""
    for module in ("compare.streamed", "models.streaming"):
        monkeypatch.setattr(f"prunescope.{module}._at_once", lambda carried: True)
    write, replacing, missing = streamed._Rows._write, keeping.replacing, list[str]()

    def slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        write(*arguments)

    def looked_at(path: Path) -> Any:
        layer = int(path.stem.rpartition("-")[2])
        missing.extend(str(i) for i in range(layer) if not (path.parent / f"part-layer-{i:05d}.bin").is_file())
        return replacing(path)

    monkeypatch.setattr(streamed._Rows, "_write", slowly)
    monkeypatch.setattr(keeping, "replacing", looked_at)
    dense, target = (tiny_folder("llama", tmp_path / str(seed), seed) for seed in (0, 1))
    assert_same(*both_ways(dense, target, tmp_path))
    assert not missing


@pytest.mark.parametrize("last", [True, False])
def test_a_run_that_is_cut_off_while_it_forgets(last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun on a GPU, begun anew without, killed while the rows of the first are removed. Would catch a third that goes on from states without rows."""
    monkeypatch.setattr("prunescope.models.streaming._at_once", lambda carried: True)
    run, unlink, cuts = Carried.run, Path.unlink, [3]

    def cut(self: Carried, *args: Any, **options: Any) -> None:
        if cuts == [self.layer]:
            self.settle()
            raise KeyboardInterrupt
        run(self, *args, **options)

    def dies(self: Path, **options: Any) -> None:
        unlink(self, **options)
        raise KeyboardInterrupt

    dense, other = (tiny_folder("llama", tmp_path / str(seed), seed) for seed in (0, 1))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name, function, held in (("run", cut, True), ("unlink", dies, False)):
        monkeypatch.setattr("prunescope.compare.streamed._at_once", lambda rows, held=held: held)
        with monkeypatch.context() as patch:
            patch.setattr(Carried if name == "run" else Path, name, function)
            with pytest.raises(KeyboardInterrupt):
                both_ways(dense, other, scratch)
    monkeypatch.setattr("prunescope.compare.streamed._at_once", lambda rows: last)
    assert_same(*both_ways(dense, other, scratch))


@pytest.mark.parametrize(("target", "first", "then"), [("model", True, True), ("drop", True, True), ("model", True, False), ("drop", False, True)])  # fmt: skip
def test_rows_that_stay_on_the_device(
    target: str, first: bool, then: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, cut off in front of block 3 and begun again. Would catch rows of a layer that are not in their file when its states are, a slot that
    is brought to another place, and rows that a second run takes for nothing, or looks for where a run on another device would have kept them."""
    monkeypatch.setattr("prunescope.models.streaming._at_once", lambda carried: True)
    monkeypatch.setattr("prunescope.compare.streamed._at_once", lambda rows: first)
    run, cuts = Carried.run, [3]

    def cut(self: Carried, *args: Any, **options: Any) -> None:
        if cuts == [self.layer]:
            cuts.clear()
            self.settle()
            raise KeyboardInterrupt
        run(self, *args, **options)

    monkeypatch.setattr(Carried, "run", cut)
    dense, other = (tiny_folder("llama", tmp_path / str(seed), seed) for seed in (0, 1))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(KeyboardInterrupt):
        both_ways(dense, other if target == "model" else DropSpec((1,), (3, 4)), scratch)
    left = sorted(path.name for path in scratch.glob("part-dense-*"))
    assert left != ["part-dense-00000.bin"] and len(left) == 1
    monkeypatch.setattr("prunescope.compare.streamed._at_once", lambda rows: then)
    assert_same(*both_ways(dense, other if target == "model" else DropSpec((1,), (3, 4)), scratch))


@pytest.mark.stream
def test_the_bundled_model(tmp_path: Path) -> None:
    """A real model, from a GGUF file."""
    prompts, texts = [[504, 3575, 282, 4649, 314]], [[7042]]
    assert_same(*both_ways("smollm2-135m", DropSpec((3,), ()), tmp_path, prompts, texts))  # type: ignore[arg-type]


def test_one_block_of_each_model_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a block that is not let go, and a head that is."""
    dense, target = (
        stream_model(str(tiny_folder("llama", tmp_path / str(seed), seed)), tmp_path / f"s{seed}", device="cpu")
        for seed in (0, 1)
    )
    seen: list[tuple[int, int]] = []
    run = Carried.run

    def spying(self: Carried, before: Callable[[int], None], after: Callable[[int, Tensor], None]) -> None:
        def looking(number: int, hidden: Tensor) -> None:
            after(number, hidden)
            there = [sum(not p.is_meta for p in model.model.parameters()) for model in (dense, target)]
            assert there == [len(list(dense.blocks[self.layer].parameters()))] * 2
            seen.append((self.layer, number))

        run(self, before, looking)

    monkeypatch.setattr(Carried, "run", spying)
    sequences = [Transcript(prompt, text) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    streamed_layerwise_rows(dense, target, sequences, "key", tmp_path, batch_size=2)
    assert {layer for layer, _ in seen} == set(range(6))
    assert all(parameter.is_meta for model in (dense, target) for parameter in model.model.parameters())


def test_blocks_that_pass_on_more_than_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose blocks share something is refused, not computed wrongly: here block 2 also adds what block 1 has left for it."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward, left = LlamaDecoderLayer.forward, [torch.zeros(())]

    def sharing(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = forward(self, hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx == 1:
            left[0] = found.mean() * found.shape[1]
        return found

    monkeypatch.setattr(LlamaDecoderLayer, "forward", sharing)
    mlp = __import__("transformers").models.llama.modeling_llama.LlamaMLP
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: plain(self, x) + left[0])
    streamed = stream_model(str(tiny_folder("llama", tmp_path / "model")), tmp_path / "s", device="cpu")
    sequences = [Transcript(prompt, text) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    left[0] = torch.tensor(3.0)
    with pytest.raises(UserError, match=r"block 0 .* pass on more than the stream; give --stream false"):
        streamed_layerwise_rows(streamed, None, sequences, "key", tmp_path)


# --- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    characters_folder(folder / "chars")
    for seed in (0, 1):
        tiny_folder("llama", folder / f"llama{seed}", seed)
    for name in ("recipe", "packed"):
        (folder / name).mkdir()
    save_dropped(load_model(folder / "llama0", device="cpu"), DropSpec((1,), ()), folder / "recipe", "recipe")
    for path in (folder / "llama0").iterdir():
        shutil.copy(path, folder / "packed")
    config = json.loads((folder / "packed" / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "packed" / "config.json").write_text(json.dumps(config), "utf-8")
    rows = [
        {"prompt": "w5 w6 w7 w8 w9", "continuation": "w10 w11 w12 w13", "id": "a"},
        {"prompt": "w20 w21", "continuation": [5, 6], "id": "b"},
        {"prompt": "w33 w4 w9 w9", "continuation": "w7 w8 w9", "id": "c"},
    ]
    (folder / "continuations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    asked = [{"question": f"how {i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    (folder / "text.txt").write_text(" ".join(f"w{4 + (i * 7) % 59}" for i in range(100)), "utf-8")
    return folder


def assert_same_run(held: Any, streamed: Any) -> None:
    assert same(held.table(), streamed.table())
    assert held.samples() == streamed.samples()
    for name in ("key", "models", "noise_floor", "summary"):
        assert held.info[name] == streamed.info[name], name


@pytest.mark.parametrize("target", ["drop:attn=1;mlp=3", "llama1"])
def test_divergence(target: str, place: Path, tmp_path: Path) -> None:
    """Against a drop, the dense model is read a second time without these sublayers. Would catch states of one side taken for the other's."""
    target = target if target.startswith("drop:") else str(place / target)
    options: dict[str, Any] = {
        "text": str(place / "text.txt"),
        "context": 16,
        "scale": False,
        "batch_size": 2,
        "device": "cpu",
    }
    dense = str(place / "llama0")
    streamed = prunescope.divergence(dense, target, stream=True, out=str(tmp_path / "run"), **options)
    assert_same_run(prunescope.divergence(dense, target, **options), streamed)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(("part-", "scratch"))]


def test_mcq(place: Path) -> None:
    """Options of two tokens, which are read as texts of their own."""
    options: dict[str, Any] = {"questions": str(place / "questions.jsonl"), "batch_size": 2, "device": "cpu"}
    pair = (str(place / "chars"), "drop:attn=1;mlp=3")
    assert_same_run(prunescope.mcq(*pair, **options), prunescope.mcq(*pair, stream=True, **options))


@pytest.mark.parametrize("target", ["drop:attn=1;mlp=3", "llama1"])
def test_generate(target: str, place: Path, tmp_path: Path) -> None:
    """Both models read given texts. Would catch a text read in another batch, and, by the run in which the dense model wrote these texts itself,
    a step that is shifted."""
    target = target if target.startswith("drop:") else str(place / target)
    dense, given = str(place / "llama0"), tmp_path / "given.jsonl"
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\nw20 w21\nw9 w8 w7 w4\n", "utf-8")
    options: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 2, "device": "cpu", "ignore_eos": True}
    wrote = prunescope.generate(
        dense, target, prompts=str(tmp_path / "prompts.txt"), regime="teacher-forced", **options
    )
    rows = [{"prompt": row["text"], "continuation": row["dense_tokens"]} for row in wrote.samples()]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    held = prunescope.generate(dense, target, continuations=str(given), stream=False, **options)
    streamed = prunescope.generate(
        dense, target, continuations=str(given), stream=True, out=str(tmp_path / "run"), **options
    )
    assert_same_run(held, streamed)
    assert held.info["regimes"] == ["teacher-forced"] and held.info["decoding"] == {"dense": "given"}
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(("part-", "scratch"))]
    for name in ("kl_dense_target", "h_cos_dev", "nll_target", "target_token"):
        ours, theirs = (torch.tensor(run.table()[name].to_pylist()) for run in (held, wrote))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert max(held.table()["kl_dense_target"].to_pylist()) > 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"target": "all", "n": 3},
        {"target": "block", "n": 2, "iterative": True},
        {"target": "mlp", "score_on": "norm", "n": 2},
    ],
)
def test_drop(options: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """Would catch the check of a block on the probe counted among the calibration tokens."""
    options |= {
        "calibration": str(place / "text.txt"),
        "samples": 5,
        "seq_len": 16,
        "batch_size": 2,
        "cache": False,
        "device": "cpu",
    }
    held = prunescope.drop(str(place / "llama0"), **options)
    streamed = prunescope.drop(str(place / "llama0"), stream=True, out=str(tmp_path / "recipe"), **options)
    assert (held.rows, held.spec, held.info["parameters"]) == (
        streamed.rows,
        streamed.spec,
        streamed.info["parameters"],
    )
    assert load_model(tmp_path / "recipe", device="cpu").dropped == held.spec


def test_continuations_of_the_dense_model_give_what_it_writes(place: Path, tmp_path: Path) -> None:
    """Given the tokens that the dense model would write, the rows are those of the run in which it wrote them. Would catch a continuation that is
    cut or shifted by a token."""
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\nw20 w21\n", "utf-8")
    options: dict[str, Any] = {"max_new_tokens": 5, "device": "cpu"}
    dense = str(place / "llama0")
    wrote = prunescope.layerwise(dense, prompts=str(tmp_path / "prompts.txt"), **options)
    rows = [{"prompt": row["text"], "continuation": row["dense_tokens"]} for row in wrote.samples()]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    given = prunescope.layerwise(dense, continuations=str(tmp_path / "given.jsonl"), **options)
    assert same(wrote.table(), given.table())


def test_a_model_on_disk_writes_what_it_writes_in_memory(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All prompts in one batch. Would catch a cache that is lost between two tokens, and a block that runs with another one's weights."""
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\nw20 w21\nw9 w8 w7 w4\n", "utf-8")
    options: dict[str, Any] = {"prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 5, "device": "cpu"}
    for more in ({}, {"temperature": 1.0, "seed": 3}):
        pair = (str(place / "llama0"), str(place / "llama1"))
        held = prunescope.layerwise(*pair, stream=False, **options, **more)
        assert "from disk" not in capfd.readouterr().err
        streamed = prunescope.layerwise(*pair, stream=True, **options, **more)
        assert "writes 3 continuations from disk, token by token: up to 5 times 0.0 GB" in capfd.readouterr().err
        assert_same_run(held, streamed)


KILLED = """
import os, signal, sys
from prunescope.cli import main
from prunescope.compare import streamed
from prunescope.compare.streamed import _Rows
after = _Rows.after
def deadly(self, number, hidden):
    after(self, number, hidden)
    if (self.layer, number) == (3, 1):
        os.kill(os.getpid(), signal.SIGKILL)
_Rows.after = deadly
main(sys.argv[1:])
"""


def test_killed_within_a_block_and_resumed_it_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    """SIGKILL while block 3 runs on the second batch, when a half of its output is written. Would catch a half-written file taken for whole, a block
    that is run twice on its own output, and rows of the killed block that are not taken again; and that blocks 0 to 2 run again."""
    argv = [
        *("layerwise", str(place / "llama0"), str(place / "llama1"), "--stream", "true", "--batch-size", "2", "--device", "cpu"),
        *("--continuations", str(place / "continuations.jsonl"), "--out"),
    ]  # fmt: skip
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *argv, str(out)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -9, killed.stderr
    left = sorted(path.name for path in (tmp_path / "out.partial").glob("part-dense*"))
    assert left == ["part-dense-00003.bin", "part-dense-00004.bin.writing"]
    assert main([*argv, str(out)]) == 2  # not without --resume
    assert main([*argv, str(out), "--resume", "--batch-size", "1"]) == 2  # nor with other options
    assert main([*argv, str(out), "--resume"]) == 0
    assert main([*argv, str(tmp_path / "whole")]) == 0
    assert (out / "layerwise.parquet").read_bytes() == (tmp_path / "whole" / "layerwise.parquet").read_bytes()
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert main([*argv, str(out), "--resume"]) == 0  # complete already


DENSE = ("{place}/llama0", "--stream", "true", "--device", "cpu")
GIVEN = ("--continuations", "{place}/continuations.jsonl")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "prompts twice": (("layerwise", *DENSE, *GIVEN, "--prompts", "{place}/text.txt"), "leave --prompts out"),
    "quantised in memory": (("layerwise", DENSE[0], "quant:int8", *DENSE[1:], *GIVEN), "give a checkpoint that holds them as floats"),
    "recipe": (("layerwise", DENSE[0], "{place}/recipe", *DENSE[1:], *GIVEN), "--format zeroed or compact"),
    "packed": (("layerwise", DENSE[0], "{place}/packed", *DENSE[1:], *GIVEN), "give --dequantise"),
    "ladder": (("divergence", DENSE[0], "drop:attn=1", *DENSE[1:], "--text", "{place}/text.txt"), "--scale false"),
    "ladder of mcq": (("mcq", DENSE[0], "drop:attn=1", *DENSE[1:], "--ladder", "q8_0"), "leave --ladder out"),
    "free-running": (("generate", DENSE[0], "drop:attn=1", *GIVEN, "--regime", "free-running"), "leave --regime or --continuations out"),
    "no texts of generate": (("generate", DENSE[0], "drop:attn=1", *DENSE[1:]), "give texts with --continuations FILE"),
    "ladder of generate": (("generate", DENSE[0], "drop:attn=1", *DENSE[1:], *GIVEN, "--ladder", "q8_0"), "leave --ladder out"),
    "search": (("drop", *DENSE, "--select", "kl", "--n", "1"), "--select cosine"),
    "run of blocks": (("drop", *DENSE, "--target", "block", "--order", "consecutive", "--n", "1"), "--order discrete"),
    "weights": (("drop", *DENSE, "--n", "1", "--format", "compact", "--calibration", "{place}/text.txt"), "--format recipe"),
    "sampled": (("drop", *DENSE, "--n", "1"), "give a text or a data set"),
    "no such file": (("layerwise", *DENSE, "--continuations", "{place}/none.jsonl"), "cannot be read"),
    "no continuation": (("layerwise", *DENSE, "--continuations", "{place}/questions.jsonl"), "no 'prompt'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_streamed_is_one_line(
    mistake: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, words = MISTAKES[mistake]
    assert main([*(word.format(place=place) for word in argv), "--out", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunescope: ")]
    assert len(said) == 1
    assert words in said[0]
    assert not list(tmp_path.iterdir())
