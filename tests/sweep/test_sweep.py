"""Sweeps: points, weights pruned in place, tables, kills, workers, figures. The tasks are the built-in ones, on a tiny model that reads characters."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from scipy import stats

import prunescope
from families import tiny_folder
from prunescope.cli import main
from prunescope.compare.generation import generation_rows
from prunescope.compare.metrics import COLUMNS
from prunescope.data.calibration import Calibration, calibration_tokens
from prunescope.data.prompts import Prompt
from prunescope.data.tokens import encode
from prunescope.jobs.sweep import _twins
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model
from prunescope.paper.recipes import NOT_AT_HAND, _scores, read_recipe
from prunescope.prune.inplace import DenseWeights, pruned_in_place
from prunescope.prune.masks import Goal
from prunescope.prune.select import choose_sublayers, drop_orders, spec_of
from prunescope.runs import folder as results
from prunescope.stats import kendall, spearman
from prunescope.sweep.advice import HEALING
from prunescope.sweep.bench import Bench, SweepPlan
from prunescope.sweep.comparison import DenseReference, write_texts
from prunescope.sweep.correlations import COUNTED
from prunescope.sweep.points import DENSE, Point, read_points, read_range
from prunescope.sweep.storage import Storage
from prunescope.sweep.tables import Measured, assemble, split

TASKS = "arithmetic-gen,arithmetic-mc,reversal-mc"
OPTIONS: dict[str, Any] = {
    **{"target": "attn,mlp", "n": "0..3", "pattern": "2:4", "method": "magnitude", "tasks": TASKS, "limit": 12, "shots": 1},
    **{"max_new_tokens": 6, "samples": 4, "seq_len": 24, "cache": False, "seed": 3},
}  # fmt: skip
NAMES = ["dense", *(f"{kind}-00{n}" for kind in ("attn", "mlp") for n in (1, 2, 3)), "magnitude-2of4"]
QUICKLY = """
import importlib, sys, torch
torch.set_num_threads(1)
importlib.import_module("prunescope.report.figures.sweep").draw_sweep = lambda *_: []  # drawing has a test of its own
from prunescope.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def chars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that reads single characters, so that it can be asked the built-in tasks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    signs = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(signs), hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
    folder = tmp_path_factory.mktemp("chars") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "prompts.txt").write_text("cat dog\n2 + 3 = 5\n", "utf-8")
    return folder


def argv(chars: Path, out: Path, *more: str) -> list[str]:
    """The command line of a sweep with OPTIONS."""
    named = [
        f"--{key.replace('_', '-')}={str(value).lower() if value is False else value}" for key, value in OPTIONS.items()
    ]
    return ["sweep", str(chars), *named, f"--prompts={chars.parent / 'prompts.txt'}", f"--out={out}", *more]


def run_apart(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", QUICKLY, *arguments], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def undisturbed(chars: Path, tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    """A sweep of eight points, in one go."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("prunescope.report.figures.sweep"), "draw_sweep", lambda *_: [])
        prunescope.sweep(str(chars), out=str(out), prompts=str(chars.parent / "prompts.txt"), **OPTIONS)
    return prunescope.open(out)


def tables(run: results.Run) -> dict[str, pa.Table]:
    found = {name: run.table(name) for name in ("sweep", "items", "metrics", "correlations")}
    found["sweep"] = found["sweep"].drop_columns(["seconds"])
    return found


def assert_same(one: results.Run, other: results.Run) -> None:
    for name, table in tables(one).items():
        assert table.equals(tables(other)[name]), name
    assert one.summary == other.summary
    assert one.info["points_done"] == other.info["points_done"]


# --- what is asked for -------------------------------------------------------------------------------------------------


def test_ranges() -> None:
    assert [int(n) for n in read_range("0..12..4,5", "--n")] == [0, 4, 8, 12, 5]
    assert [float(s) for s in read_range("0.3..0.7", "--sparsity")] == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert [float(s) for s in read_range("0.3..0.7..0.2", "--sparsity")] == [
        0.3,
        0.5,
        0.7,
    ]  # 0.7 is not lost to rounding
    assert [p.name for p in read_points("attn,block", "0..2")] == [
        "dense",
        "attn-001",
        "attn-002",
        "block-001",
        "block-002",
    ]
    assert [p.title for p in read_points(method="wanda", sparsity="0.5", pattern="2:4")] == [
        "dense",
        "wanda 0.5",
        "wanda 2:4",
    ]
    assert len(read_points()) == 1 + 3 * 12
    joined = read_points("attn", "1", "wanda", None, "2:4", "int4-g16,Q4_0", "int8")
    assert [(p.name, p.change) for p in joined] == [
        ("dense", "dense"), ("attn-001", "drop"), ("wanda-2of4", "sparsify"), ("quant-int4-g16", "quant"), ("quant-q4_0", "quant"),
        ("attn-001+int8", "joined"), ("wanda-2of4+int8", "joined"),
    ]  # fmt: skip
    assert [p.name for p in read_points(quant="int8")] == ["dense", "quant-int8"]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--n", "1..x"], "cannot read"),
        (["--n", "4..2"], "backwards"),
        (["--n", "0.5"], "whole numbers"),
        (["--n", "0..100000"], "larger step"),
        (["--n", "6"], "choose 1 to"),
        (["--target", "heads"], "choose among"),
        (["--method", "structured", "--sparsity", "0.5"], "use sparsify"),
        (["--method", "wanda"], "--sparsity"),
        (["--sparsity", "1"], "shares"),
        (["--pattern", "4:2"], "N below M"),
        (["--pattern", "3:5"], "divide"),
        (["--n", "0"], "no point"),
        (["--workers", "0"], "at least 1"),
        (["--n", "1", "--tasks", "arithmetic-gen", "--shots", "40"], "context"),
        (["--resume"], "--out"),
        (["--quant", "int9"], "unknown"),
        (["--quant", "int8", "--join", "int4"], "no point to join"),
        (["--quant", "int8", "--ladder", "q9_0"], "unknown"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    options: list[str], said: str, chars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--samples", "2", "--seq-len", "8", "--max-new-tokens", "2", "--prompts", str(chars.parent / "prompts.txt")]
    out = [] if options == ["--resume"] else ["--out", str(tmp_path / "out")]
    assert main(["sweep", str(chars), *few, *options, *out]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunescope: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.iterdir())


# --- one point ---------------------------------------------------------------------------------------------------------


def test_what_goes_first_is_what_drop_chooses(chars: Path) -> None:
    """Catches an order of its own: the first n of every target must be the choice of `drop`, and so n within n + 1."""
    loaded = load_model(chars, device="cpu")
    data = Calibration(torch.randint(4, 90, (4, 24), generator=torch.Generator().manual_seed(0)), "x", 0)
    orders = drop_orders(loaded, data, ["attn", "mlp", "block", "all"])
    for target, order in orders.items():
        for n in (1, 3, 4):
            assert spec_of(order[:n]) == choose_sublayers(loaded, data, target, n).spec  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("method, pattern", [("magnitude", "2:4"), ("wanda", None), ("sparsegpt", None)])
def test_pruning_in_place_is_what_sparsify_writes(
    family: str, method: Any, pattern: str | None, tmp_path: Path
) -> None:
    """Bit for bit, and the dense weights are back afterwards. Catches a block calibrated on dense outputs, a matrix left out, a lost weight."""
    folder = tiny_folder(family, tmp_path / "dense")
    rng = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in rng.integers(4, 64, 400)), "utf-8")
    loaded = load_model(folder, device="cpu")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    tokens = calibration_tokens(loaded, str(text), samples=6, seq_len=16).tokens
    how: Any = {"pattern": pattern} if pattern else {"sparsity": 0.6}
    written = prunescope.sparsify(
        str(folder), method=method, calibration=str(text), samples=6, seq_len=16, device="cpu", **how
    )
    assert written.folder is not None
    expected = load_model(written.folder, device="cpu").model.state_dict()
    with pruned_in_place(loaded, DenseWeights(loaded), method, Goal.parse(pattern or 0.6), tokens) as share:
        assert share == pytest.approx(written.summary["sparsity"])
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(value, expected[name]), name
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_dense_model_after_a_sweep_is_the_dense_model_before(chars: Path) -> None:
    """Bitwise: every tensor, the modules themselves, and the logits; also after a point that failed halfway."""
    loaded = load_model(chars, device="cpu")
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = loaded.model(ids).logits
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    modules = [id(module) for module in loaded.model.modules()]
    points = read_points("attn,block", "1,3", "wanda,sparsegpt", "0.5", "2:4")
    plan = SweepPlan(
        tasks=["arithmetic-mc"],
        evaluation={"limit": 3, "shots": 0, "batch_size": 2, "seed": 0},
        texts=write_texts(loaded, [[5, 6, 7]], 4, batch_size=1),
        comparing={},
        specs={p.name: DropSpec.parse(f"{p.series}=0-{p.n - 1}") for p in points if p.n},
        calibration=torch.randint(4, 90, (4, 24), generator=torch.Generator().manual_seed(0)),
    )
    bench = Bench(loaded, plan)
    for point in points:
        bench.measure(point)
    for point in points:
        with pytest.raises(RuntimeError, match="halfway"), bench.at(point):
            raise RuntimeError("halfway")
    assert [id(module) for module in loaded.model.modules()] == modules and not loaded.dropped
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, logits)


def test_quantised_points_are_stored_weights_by_hand_and_are_put_back(chars: Path) -> None:
    """Bytes by counting parameters one by one; the live weights of a joined point are those of the packages' formula on the kept ones; the dense model is
    back bit for bit. Catches dropped sublayers that are counted, scales that are not, weights quantised twice, and rounding counted as pruning."""
    loaded = load_model(chars, device="cpu")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    points = read_points("attn", "1", "magnitude", None, "2:4", "int4-g16", "int4-g16")
    plan = SweepPlan(
        tasks=["arithmetic-mc"], evaluation={"limit": 2, "shots": 0, "batch_size": 2, "seed": 0},
        texts=write_texts(loaded, [[5, 6, 7]], 3, batch_size=1), comparing={}, specs={p.name: DropSpec.parse("attn=2") for p in points if p.n},
        calibration=torch.randint(4, 90, (2, 16), generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip
    bench = Bench(loaded, plan)
    found = {point.name: bench.measure(point).info for point in points}
    inside = {name: value for name, value in before.items() if ".layers." in name and value.dim() == 2}
    outside = sum(v.numel() for n, v in before.items() if n not in inside) * 4  # the checkpoint is in float32
    dense = outside + sum(v.numel() for v in inside.values()) * 4
    packed = sum(v.numel() / 2 + v.shape[0] * -(-v.shape[1] // 16) * 2 for v in inside.values())
    gone = {n: v for n, v in inside.items() if ".layers.2.self_attn." in n}
    less = sum(v.numel() / 2 + v.shape[0] * -(-v.shape[1] // 16) * 2 for v in gone.values())
    assert found["dense"]["bytes"] == found["magnitude-2of4"]["bytes"] == dense
    norm = dense - sum(v.numel() for v in gone.values()) * 4 - found["attn-001"]["bytes"]
    assert norm in (0, 32 * 4)  # the norm before it goes too, where the modules are taken out
    assert found["quant-int4-g16"]["bytes"] == outside + packed
    assert found["attn-001+int4-g16"]["bytes"] == outside + packed - less - norm
    assert found["quant-int4-g16"][COUNTED] == 0 and found["magnitude-2of4+int4-g16"][COUNTED] == pytest.approx(0.5)
    with bench.at(points[-1]):
        state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    for name, weight in inside.items():
        rows = weight.view(-1, 4)
        kept = torch.zeros_like(rows).scatter(1, rows.abs().topk(2, 1).indices, 1.0).mul(rows).view(weight.shape)
        for row, live in zip(kept, state[name], strict=True):
            for part, now in zip(row.split(16), live.split(16), strict=True):
                scale = part.abs().max() / 7.5
                assert torch.allclose((part * (1.0 / scale)).round().clamp(-8, 7) * scale, now, atol=1e-6), name
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    sparse = Storage(loaded, sparse=True).bytes(None, Goal.parse("2:4"))
    assert sparse == outside + sum(v.numel() for v in inside.values()) * (0.5 * (32 + 2)) / 8


def test_h_z_and_p_are_those_of_generate(chars: Path) -> None:
    """The teacher-forced comparison of `generate` on the same prompts; the dense model against itself is exactly 0."""
    loaded = load_model(chars, device="cpu")
    prompts = encode(loaded, [Prompt("cat dog", "0"), Prompt("1 + 1 = 2\n2 + 3", "1")], 8)
    spec = DropSpec.parse("attn=1,3")
    rows = generation_rows(loaded, spec, prompts, max_new_tokens=8, regime="teacher-forced").table
    reference = DenseReference(loaded, write_texts(loaded, prompts, 8, batch_size=8))
    with loaded.dropping(spec):
        found = reference.measure(loaded)
    columns = {name: stats for space in found.values() for name, stats in space.items()}
    assert set(columns) == set(COLUMNS)
    for name in COLUMNS:
        assert columns[name]["mean"] == pytest.approx(np.mean(rows[name].to_numpy()), rel=2e-3, abs=1e-5), name
    itself = reference.measure(loaded)
    assert itself["p"]["kl_dense_target"]["max"] == 0 and itself["h"]["h_cos_dev"]["max"] == 0


# --- whole sweeps ------------------------------------------------------------------------------------------------------


def test_a_sweep_holds_what_it_says(undisturbed: results.Run) -> None:
    """A row a point and task; scores are the means of their items; what was removed grows; and a point is read without torch."""
    sweep, items = undisturbed.table(), undisturbed.table("items")
    assert list(dict.fromkeys(sweep["point"].to_pylist())) == NAMES
    assert len(sweep) == len(NAMES) * 3 and len(items) == len(NAMES) * 36
    assert set(undisturbed.table("metrics")["column"].to_pylist()) == set(COLUMNS)
    scored: dict[tuple[str, str], list[float]] = {}
    for row in items.to_pylist():
        scored.setdefault((row["point"], row["task"]), []).append(row["score"])
    for row in sweep.to_pylist():
        assert row["score"] == pytest.approx(np.mean(scored[row["point"], row["task"]]))
        assert row["loss"] == pytest.approx(row["dense"] - row["score"], abs=1e-12)
        assert row["kind"] == ("generative" if row["task"].endswith("gen") else "choice")
    removed = {row["point"]: row[COUNTED] for row in sweep.to_pylist()}
    assert removed["dense"] == 0 < removed["attn-001"] < removed["attn-002"] < removed["attn-003"]
    assert removed["magnitude-2of4"] == pytest.approx(0.5)
    dropped = {row["point"]: row["dropped"] for row in sweep.to_pylist()}
    assert set(dropped["mlp-001"][4:].split(",")) < set(dropped["mlp-003"][4:].split(","))
    answers = {p: tuple(r["prediction"] for r in items.to_pylist() if r["point"] == p) for p in NAMES}
    assert len(set(answers.values())) == len(NAMES)  # so that equal tables mean something
    probe = f"import sys, prunescope; r = prunescope.open({str(undisturbed.folder)!r}); assert len(r.table()) and r.summary['dense'] and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_a_killed_sweep_is_readable_and_goes_on(chars: Path, undisturbed: results.Run, tmp_path: Path) -> None:
    """SIGKILL with some points done: these can be opened and put on a page; the resumed sweep measures the others only, and its tables are
    those of an undisturbed one."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen(
        [sys.executable, "-c", QUICKLY, *argv(chars, out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while len(list(partial.glob("part-*.parquet"))) < 3 or not (partial / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(partial.glob("part-*.parquet")))
    assert 3 <= done < len(NAMES) and not out.exists()
    with pytest.raises(prunescope.UserError, match=r"out\.partial"):
        prunescope.open(out)
    half = prunescope.open(partial)
    assert half.info["complete"] is False and 1 <= len(set(half.table()["point"].to_pylist())) <= done
    prunescope.report([str(partial)], out=str(tmp_path / "half.html"))
    assert "Not complete" in (tmp_path / "half.html").read_text("utf-8")
    again = run_apart(argv(chars, out, "--resume"))
    assert again.returncode == 0, again.stderr
    assert sum(" s" in line and ": generative" in line for line in again.stderr.splitlines()) == len(NAMES) - done
    assert_same(prunescope.open(out), undisturbed)
    assert not partial.exists() and not list(out.glob("part-*"))


def test_two_workers_give_the_tables_of_one(chars: Path, undisturbed: results.Run, tmp_path: Path) -> None:
    """On a local Ray cluster; catches a worker with another seed, other texts, another drop order, or points mixed up on their way."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install prunescope[ray]")
    done = run_apart(argv(chars, tmp_path / "out", "--workers", "2", "--ray-address", "local"))
    assert done.returncode == 0, done.stderr
    assert_same(prunescope.open(tmp_path / "out"), undisturbed)


def test_a_finished_sweep_takes_more_points_and_keeps_the_old_ones(
    chars: Path,
    undisturbed: results.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First attn 1 and 2, then all: nothing is measured twice, nothing is lost, other options are refused."""
    monkeypatch.setattr(importlib.import_module("prunescope.report.figures.sweep"), "draw_sweep", lambda *_: [])
    out, where = str(tmp_path / "out"), {"prompts": str(chars.parent / "prompts.txt")}
    few = OPTIONS | {"target": "attn", "n": "1,2", "pattern": None, "method": None}
    prunescope.sweep(str(chars), out=out, **few, **where)
    capsys.readouterr()
    prunescope.sweep(str(chars), out=out, resume=True, **OPTIONS, **where)
    assert capsys.readouterr().err.count(": generative") == len(NAMES) - 3
    assert_same(prunescope.open(out), undisturbed)
    again = prunescope.sweep(str(chars), out=out, resume=True, **few, **where)
    assert "complete already" in capsys.readouterr().err and len(again.table()) == len(undisturbed.table())
    with pytest.raises(prunescope.UserError, match="made with another"):
        prunescope.sweep(str(chars), out=out, resume=True, **(OPTIONS | {"limit": 13}), **where)


def test_a_mistake_that_shows_late_leaves_the_points_before_it(
    chars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bench.measure

    def measure(self: Bench, point: Point, stage: str = "") -> Measured:
        if point.n == 2:
            raise prunescope.UserError("activations overflow")
        return real(self, point, stage)

    monkeypatch.setattr(Bench, "measure", measure)
    options = OPTIONS | {"target": "attn", "n": "0..3", "pattern": None, "method": None}
    with pytest.raises(prunescope.UserError, match="overflow"):
        prunescope.sweep(str(chars), out=str(tmp_path / "out"), prompts=str(chars.parent / "prompts.txt"), **options)
    assert prunescope.open(tmp_path / "out.partial").info["points_done"] == ["dense", "attn-001"]


# --- numbers and figures -----------------------------------------------------------------------------------------------


def test_rank_correlations_equal_those_of_scipy() -> None:
    """With ties, and none where there is nothing to order."""
    rng = np.random.default_rng(0)
    for size, levels in ((3, 100), (12, 4), (37, 3), (40, 1000)):
        x, y = rng.integers(0, levels, size) / 7, rng.integers(0, levels, size) / 3
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
            assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert spearman([1, 1, 1], [1, 2, 3]) is None and kendall([1, 2], [1, 2]) is None


def made_up() -> list[Measured]:
    """A sweep whose truth is known: KL predicts, h_cos does not; writing goes, choosing stays; lookup is at floor; names are hostile."""
    rng = np.random.default_rng(1)
    points = [DENSE, *(Point(s, n=n) for s in ("attn", "mlp") for n in range(1, 6)), Point("wanda N:M", method="wanda", sparsity=0.5, pattern="2:4"), Point("wanda", method="wanda", sparsity=0.6)]  # fmt: skip
    level = {"arithmetic-gen": (0.8, 0.0), "arithmetic-mc": (0.9, 0.25), "lookup-gen": (0.0, 0.0), "lookup-mc": (0.9, 0.25), "<b>$x_1$": (0.7, 0.25)}  # fmt: skip
    found = []
    for point in points:
        damage = (point.n or 0) / 5 * (1.0 if point.series == "attn" else 0.5) + (point.sparsity or 0)
        rows, scores = [], {}
        for task, (dense, chance) in level.items():
            kind = "generative" if task.endswith("gen") else "choice"
            share = dense * max(0.0, 1 - damage) if kind == "generative" else dense - 0.1 * damage
            values = [float(i < round(share * 40)) for i in range(40)]
            rows += [{"task": task, "item": i, "key": str(i), "score": v, "prediction": "", "gold": ""} for i, v in enumerate(values)]  # fmt: skip
            mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(40))
            scores[task] = {"kind": kind, "metric": "acc", "value": mean, "stderr": error, "ci95": [mean - 2 * error, mean + 2 * error], "n": 40, "chance": chance, "at_floor": "none" if task == "lookup-gen" else None}  # fmt: skip
        stats = {name: {"mean": damage if name == "kl_dense_target" else float(rng.random()), "median": 0.1, "ci95": [0.0, 1.0]} for name in ("h_cos", "h_cos_dev", "kl_dense_target")}  # fmt: skip
        metrics = {
            "h": {n: s for n, s in stats.items() if n[0] == "h"},
            "p": {"kl_dense_target": stats["kl_dense_target"]},
        }
        info = point.columns() | {
            "dropped": "",
            COUNTED: damage / 10,
            "scores": scores,
            "metrics": metrics,
            "seconds": 1.0,
        }
        found.append(Measured(info, pa.Table.from_pylist(rows)))
    return found


def test_tables_of_a_sweep_whose_truth_is_known() -> None:
    """Floors go by pairs, kept shares and paired intervals by hand, the metric that predicts is found, and `split` is the way back."""
    measured = made_up()
    found = assemble(measured)
    rows = {(row["point"], row["task"]): row for row in found.sweep.to_pylist()}
    assert (
        not rows["dense", "lookup-mc"]["informative"] and rows["dense", "lookup-mc"]["kept"] is None
    )  # its pair is at floor
    row = rows["attn-002", "arithmetic-gen"]
    lost = np.array([1.0] * 32 + [0.0] * 8) - np.array([1.0] * 19 + [0.0] * 21)
    assert row["kept"] == pytest.approx(1 - lost.mean() / 0.8)
    assert row["loss_ci_high"] - row["loss"] == pytest.approx(1.959964 * lost.std(ddof=1) / np.sqrt(40), rel=1e-5)
    assert found.summary["half_lost"]["attn"] == {"generative": "attn-003", "choice": None}
    more = {row["point"]: row for row in found.summary["discrepancy"]}[
        "attn-002"
    ]  # of the one pair that says something
    chosen = np.array([1.0] * 36 + [0.0] * 4) - np.array([1.0] * round(0.86 * 40) + [0.0] * (40 - round(0.86 * 40)))
    each = lost / 0.8 - chosen / 0.65
    assert more["choice_keeps_more"] == pytest.approx(each.mean()) and more["pairs"] == 1
    assert more["ci95"][1] - each.mean() == pytest.approx(1.959964 * each.std(ddof=1) / np.sqrt(40), rel=1e-5)
    best = found.summary["predicts"]["all generative"][0]
    assert best["column"] in ("kl_dense_target", COUNTED) and best["spearman"] > 0.97
    assert not any(row["outcome"].startswith("lookup") for row in found.correlations.to_pylist())
    again = assemble(split(found))
    for name in ("sweep", "metrics", "correlations"):
        assert getattr(again, name).equals(getattr(found, name)), name
    swapped = [measured[0], Measured(measured[1].info, measured[1].items.slice(1))]
    with pytest.raises(RuntimeError, match="same items"):
        assemble(swapped)


@pytest.mark.draws
def test_figures_and_page_of_a_sweep(tmp_path: Path) -> None:
    """Every figure is drawn, pairs at floor say so, and hostile task names are text."""
    info = {
        "schema_version": 1, "command": "sweep", "config": {"model": "tiny<i>"}, "complete": True,
        "points_done": ["dense"], "points_asked": ["dense"], "models": {"dense": {"source": "x"}, "target": None},
    }  # fmt: skip
    found = assemble(made_up())
    run = prunescope.SweepResult(info | {"summary": found.summary}, found).save(tmp_path / "run")
    names = {path.stem for path in (tmp_path / "run" / "figures").glob("*.svg")}
    assert names == {"fig01_by_dropped", "fig01_by_sparsity", "fig03_tasks_attn", "fig03_tasks_mlp", "fig03_tasks_wanda", "predicts", "metrics_and_loss"}  # fmt: skip
    assert {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")} == names
    assert "lookup: at floor, says nothing" in (run.folder / "figures" / "fig03_tasks_attn.svg").read_text("utf-8")
    prunescope.report([str(run.folder)], out=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("data:image/svg+xml;base64,") == len(names) and "attn-005" in page
    assert "<b>$x_1$" not in page and "tiny<i>" not in page and "lookup-gen" in page


def test_recipes_of_tables_show_the_papers_values_or_say_that_they_are_not_at_hand(tmp_path: Path) -> None:
    recipes = Path(__file__).parents[2] / "paper" / "recipes"
    recipe = read_recipe(recipes / "table1.yaml", tasks="gsm8k")
    found = assemble(made_up())
    info = {
        "schema_version": 1,
        "command": "sweep",
        "config": {"model": "tiny"},
        "complete": True,
        "summary": found.summary,
    }
    (tmp_path / "run").mkdir()
    results.write_run(tmp_path / "run", info, found.named())
    rows = _scores(recipe, {"sweep": tmp_path / "run"})
    assert recipe.tasks == "gsm8k" and rows[0]["ours"].startswith("80.0 (") and rows[0]["paper"] == NOT_AT_HAND
    assert [row for row in rows if row["ours"] == "not run" and "48.4" in row["paper"] and row["task"] == "gsm8k"]
    assert recipe.paper is not None and all(value["source"] for value in recipe.paper.values)
    table2 = read_recipe(recipes / "table2.yaml")
    assert {row["paper"] for row in _scores(table2, {"sweep": tmp_path / "run"})} == {NOT_AT_HAND}
    (tmp_path / "bad.yaml").write_text(json.dumps({"figure": "x", "title": "x", "model": "x", "steps": {}, "show": [], "paper": {"values": [{"value": 1}]}}))  # fmt: skip
    with pytest.raises(prunescope.UserError, match="needs model"):
        read_recipe(tmp_path / "bad.yaml")


def test_advise_without_a_sweep_runs_one(
    chars: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost stands before the first point; the sweep is kept beside --out, and is not run again. The tiny model knows nothing, so that advise
    then refuses, as it must."""
    for name, value in {"_TARGETS": "attn", "_FORMATS": "int8", "_WEIGHTS": {}}.items():
        monkeypatch.setattr(f"prunescope.jobs.advise_measure.{name}", value)
    argv = ["advise", str(chars), "--use", "arithmetic-mc", "--limit", "3", "--out", str(tmp_path / "advice")]
    for first in (True, False):
        assert main(argv) == 2
        err = " ".join(capfd.readouterr().err.split())
        assert "the dense model itself is at chance" in err and not (tmp_path / "advice").exists()
        cost = err.index(
            "no sweep given, so one is run first: 3 points (attn n = 0,1; int8), then up to 1 joined with a format, 1 task of 3 items"
        )
        assert ("dense (1 of 3)" in err) == first and (not first or cost < err.index("dense (1 of 3)"))
    assert prunescope.open(tmp_path / "advice-sweep").info["complete"]


def test_points_that_are_one_model_are_measured_once(chars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a twin that keeps the other's name or series, and points in another format, or healed, taken for twins."""
    specs = {"attn-001": DropSpec(attn=(1,)), "mlp-001": DropSpec(mlp=(1,)), "all-001": DropSpec(attn=(1,))}
    points = [DENSE, *(Point(name.removesuffix("-001"), n=1) for name in specs)]
    more = [points[1].with_quant("int8"), points[3].with_quant("int4"), points[1].with_healing()]
    plan = SweepPlan([], {}, [], {}, specs | {point.name: DropSpec(attn=(1,)) for point in more})
    assert _twins([*points, *more], plan) == {"all-001": "attn-001"}
    monkeypatch.setattr(
        "prunescope.jobs.sweep.drop_orders", lambda *_, **__: {"attn": [("attn", 1)], "all": [("attn", 1)]}
    )
    calls: list[str] = []
    real = Bench.measure
    monkeypatch.setattr(
        Bench, "measure", lambda self, point, stage="": calls.append(point.name) or real(self, point, stage)
    )
    found = prunescope.sweep(
        str(chars), target="attn,all", n="1", tasks="agreement", prompts=str(chars.parent / "prompts.txt"), max_new_tokens=4,
        calibration=str(chars.parent / "prompts.txt"), samples=1, seq_len=8,
    )  # fmt: skip
    rows = {row["point"]: row for row in found.table().to_pylist()}
    assert calls == ["dense", "attn-001"] and rows["all-001"]["series"] == "all"
    same = rows["all-001"].keys() - {"point", "series"}
    assert all(rows["all-001"][name] == rows["attn-001"][name] for name in same)


def test_advise_on_own_prompts_joins_and_heals(
    chars: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts without answers are judged by agreement, which is taken from plain transformers here: of a dropped attention, of the healed model's
    folder. Catches agreement with the model's own text instead of the dense one's, a healed point measured on unhealed weights, and points that
    depend on whether the sweep was interrupted."""
    monkeypatch.setattr("prunescope.jobs.advise_measure._FORMATS", "int8")
    for name, value in {
        "_TARGETS": "attn",
        "_WEIGHTS": {"method": "wanda", "sparsity": "0.3", "pattern": "2:4"},
        "_OWN_STEPS": 6,
    }.items():
        monkeypatch.setattr(f"prunescope.jobs.advise_measure.{name}", value)
    for name, value in {"samples": 6, "new_tokens": 6, "held_out": 2, "steps": 2, "batch_size": 2}.items():
        monkeypatch.setitem(HEALING, name, value)
    prompts = chars.parent / "prompts.txt"
    argv = ["advise", str(chars), "--use", str(prompts), "--heal", "--out", str(tmp_path / "advice")]
    assert main(argv) == 0
    printed, err = map(" ".join, map(str.split, capfd.readouterr()))
    assert "then up to 3 joined with a format and up to 1 healed, 1 task of 2 items" in err
    assert "Judged is agreement" in printed
    run = prunescope.open(tmp_path / "advice-sweep")
    rows = {row["point"]: row for row in run.table("sweep").to_pylist()}
    assert {"dense", "attn-001", "wanda-0.3", "wanda-2of4", "quant-int8", "attn-001+healed"} <= rows.keys()
    assert {row["change"] for row in rows.values()} == {"dense", "drop", "sparsify", "quant", "joined", "healed"}
    assert rows["attn-001+healed"]["dropped"] == rows["attn-001"]["dropped"] == rows["attn-001+int8"]["dropped"]
    assert rows["attn-001+healed"]["bytes"] == rows["attn-001"]["bytes"] > rows["attn-001+int8"]["bytes"]
    items = {(row["point"], row["item"]): row["score"] for row in run.table("items").to_pylist()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(chars)
    layer = int(rows["attn-001"]["dropped"].removeprefix("attn="))
    models = {
        "dense": transformers.AutoModelForCausalLM.from_pretrained(chars),
        "attn-001": transformers.AutoModelForCausalLM.from_pretrained(chars),
    }
    models["attn-001"].model.layers[layer].self_attn.o_proj.weight.data.zero_()
    healed = next(tmp_path.glob("advice-sweep-healed-attn-001"))
    models["attn-001+healed"] = transformers.AutoModelForCausalLM.from_pretrained(healed)
    for item, text in enumerate(prompts.read_text("utf-8").splitlines()):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = models["dense"].generate(ids, do_sample=False, max_new_tokens=6)
            for name, model in models.items():
                best = model(whole).logits.argmax(-1)[0, ids.shape[1] - 1 : -1]
                assert items[name, item] == pytest.approx(float((best == whole[0, ids.shape[1] :]).float().mean()))
    advice = {row["point"]: row for row in prunescope.open(tmp_path / "advice").table().to_pylist()}
    assert advice["attn-001+healed"]["command"].startswith(
        f'prunescope heal "drop:attn={layer}" --teacher {chars} --samples 6'
    )
    given = prunescope.advise(str(chars), sweep=str(tmp_path / "advice-sweep"), use=str(prompts))
    assert given.table()["kept"].to_pylist() == [row["kept"] for row in advice.values()]
    other = tmp_path / "other.txt"
    other.write_text("dog", "utf-8")
    with pytest.raises(prunescope.UserError, match="was not asked these rows; sweep with --tasks agreement --prompts"):
        prunescope.advise(str(chars), sweep=str(tmp_path / "advice-sweep"), use=str(other))
    with pytest.raises(prunescope.UserError, match="leave out --heal, or the sweep"):
        prunescope.advise(str(chars), sweep=str(tmp_path / "advice-sweep"), heal=True)
