"""`speed`: every size against a count made by hand, every time against work of a known length, and the words where nothing is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import prunescope
from families import tiny_folder, tiny_model, tiny_tokenizer
from prunescope.cli import main
from prunescope.errors import UserError
from prunescope.jobs import speed as speed_job
from prunescope.models import semistructured
from prunescope.models.anatomy import find_anatomy
from prunescope.models.loaded import LoadedModel
from prunescope.models.semistructured import check_kernels, inner_tensors, is_two_four, two_four_layers, using_kernels
from prunescope.speed import measure as speed_module
from prunescope.speed.timing import Rates, Timing, measure_rates, timed

CPU = torch.device("cpu")
RATES = Rates(1e10, 1e11)
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32  # q, k and v of 2 of 4 heads, o: the weights of a tiny Llama's attention
MLP = 3 * 32 * 48
SMALL = {"length": 6, "max_new_tokens": 4, "batch_size": "1,2", "repeats": 2, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def known_rates() -> Iterator[None]:
    """No test needs the device's own rates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_job, "measure_rates", lambda device, dtype: RATES)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dense model and what can be made of it."""
    root = tmp_path_factory.mktemp("speed")
    dense = str(tiny_folder("llama", root / "dense"))
    found = {"dense": dense}
    for form, target in (("recipe", "attn"), ("zeroed", "attn"), ("compact", "block")):
        found[form] = str(root / form)
        options: Any = {"format": form, "samples": 2, "seq_len": 8, "device": "cpu", "cache": False}
        prunescope.drop(dense, target=target, n=2, out=found[form], **options)  # type: ignore[arg-type]
    for name, asked in (("half", {"sparsity": 0.5}), ("two-four", {"pattern": "2:4"})):
        found[name] = str(root / name)
        given: Any = {**asked, "method": "magnitude", "calibration": "none", "device": "cpu"}
        prunescope.sparsify(dense, out=found[name], **given)
    return found


@pytest.fixture(scope="module")
def run(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> prunescope.Run:
    """All of them in one run, through the command line."""
    out = tmp_path_factory.mktemp("run") / "run"
    dense, *others = folders.values()
    words = [dense, "drop:attn=1;mlp=4", *others]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["speed", *words, *options, "--out", str(out)]) == 0
    return prunescope.open(out)


def row_of(run: prunescope.Run, name: str, batch: int = 1) -> dict[str, Any]:
    found = [r for r in run.table().to_pylist() if Path(r["model"]).name == name and r["batch_size"] == batch]
    assert len(found) == 1
    return found[0]


def test_sizes_are_those_counted_by_hand(run: prunescope.Run, folders: dict[str, str]) -> None:
    """Would catch parameters that are counted though dropped, a tied or untied embedding taken for the other, weights that stay in memory
    though they are said to be gone, and a cache that a dropped attention still fills."""
    dense = row_of(run, "dense")
    norms, embedding = 13 * 32, 64 * 32
    total = 2 * embedding + 6 * (ATTENTION + MLP) + norms
    buffers = 4 * 4 * 2  # inverse frequencies of the rotary embedding, and their original
    assert (dense["parameters"], dense["nonzero_parameters"], dense["dropped_parameters"]) == (total, total, 0)
    assert dense["memory_bytes"] == 4 * total + buffers
    assert dense["step_bytes"] == 4 * (total - embedding) + buffers
    assert dense["cache_bytes_per_token"] == 6 * 2 * 2 * 8 * 4  # blocks, keys and values, heads, width, float32
    assert dense["disk_bytes"] == (Path(folders["dense"]) / "model.safetensors").stat().st_size

    dropped = row_of(run, "drop:attn=1;mlp=4")
    gone = ATTENTION + MLP + 2 * 32
    assert (dropped["parameters"], dropped["dropped_parameters"]) == (total - gone, gone)
    assert dropped["memory_bytes"] == dense["memory_bytes"]  # what restore() puts back is still there
    assert dropped["step_bytes"] == dense["step_bytes"] - 4 * gone
    assert dropped["cache_bytes_per_token"] == 5 / 6 * dense["cache_bytes_per_token"]
    assert dropped["disk_bytes"] is None

    recipe, zeroed, compact = (row_of(run, name) for name in ("recipe", "zeroed", "compact"))
    assert recipe["parameters"] == total - 2 * (ATTENTION + 32)
    assert recipe["disk_bytes"] == sum(path.stat().st_size for path in Path(folders["recipe"]).iterdir())
    assert recipe["cache_bytes_per_token"] == 4 / 6 * dense["cache_bytes_per_token"]
    assert (zeroed["parameters"], zeroed["nonzero_parameters"]) == (total, total - 2 * 32 * 32)
    for column in ("memory_bytes", "step_bytes", "cache_bytes_per_token"):
        assert zeroed[column] == dense[column]
    block = ATTENTION + MLP + 2 * 32
    assert (compact["parameters"], compact["memory_bytes"]) == (total - 2 * block, dense["memory_bytes"] - 8 * block)
    assert compact["cache_bytes_per_token"] == 4 / 6 * dense["cache_bytes_per_token"]

    for name in ("half", "two-four"):
        row = row_of(run, name)
        assert row["nonzero_parameters"] == total - 3 * (ATTENTION + MLP)
        assert row["memory_bytes"] == dense["memory_bytes"]
    assert row_of(run, "two-four")["two_four_layers"] == 6 * 7
    assert row_of(run, "half")["two_four_layers"] == row_of(run, "dense")["two_four_layers"] == 0


def test_times_floors_and_gains_follow_from_each_other(run: prunescope.Run) -> None:
    """Would catch tokens a second of another batch or length, a floor without the head, and a gain the wrong way round."""
    linear = 6 * (ATTENTION + MLP)
    for batch in (1, 2):
        dense, dropped = row_of(run, "dense", batch), row_of(run, "drop:attn=1;mlp=4", batch)
        assert dense["prefill_tokens_per_s"] == pytest.approx(batch * 6 / dense["prefill_s"])
        assert dense["decode_tokens_per_s"] == pytest.approx(batch / dense["decode_s"])
        assert dense["prefill_floor_s"] == pytest.approx(batch * 2 * (6 * linear + 64 * 32) / 1e11)
        assert dense["decode_floor_s"] == pytest.approx(dense["step_bytes"] / 1e10)
        assert dropped["prefill_floor_s"] == pytest.approx(
            batch * 2 * (6 * (linear - ATTENTION - MLP) + 64 * 32) / 1e11
        )
        for kind in ("prefill", "decode"):
            assert dense[f"{kind}_speedup"] == 1
            assert dropped[f"{kind}_speedup"] == pytest.approx(dense[f"{kind}_s"] / dropped[f"{kind}_s"])
            assert dropped[f"{kind}_s_min"] <= dropped[f"{kind}_s"] <= dropped[f"{kind}_s_max"]
            assert dense[f"{kind}_over_floor"] == pytest.approx(dense[f"{kind}_s"] / dense[f"{kind}_floor_s"])


def test_the_run_says_where_nothing_is_saved(run: prunescope.Run) -> None:
    """Would catch a note on the wrong model, and a format that is praised for what it does not do."""
    notes = {Path(name).name: " ".join(found) for name, found in run.info["notes"].items()}
    assert notes["dense"] == notes["compact"] == ""
    assert "no memory" in notes["drop:attn=1;mlp=4"]
    assert "saves nothing on disk" in notes["recipe"]
    assert "no memory" in notes["recipe"]
    assert "zeroed saves nothing" in notes["zeroed"]
    assert "unstructured zeros save nothing: 50 % zeros" in notes["half"]
    assert "2:4 as dense tensors saves nothing: 50 % zeros" in notes["two-four"]


def test_the_run_folder_opens(run: prunescope.Run) -> None:
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.yaml", "run.json", "speed.parquet"]
    assert run.command == "speed"
    assert run.info["rates"] == {"bytes_per_s": 1e10, "operations_per_s": 1e11}
    assert len(run.info["models"]) == 7
    assert len(run.summary) == len(run.table()) == len(pq.read_table(run.folder / "speed.parquet")) == 14
    json.dumps(run.summary, allow_nan=False)


def test_a_machine_that_slows_down_is_noise(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timing is a third slower than the one before: dense, dropped, dense again. Would catch a gain made of drift alone."""
    clock = iter((1.0, 1.4, 1.8))

    def times(*_: Any) -> tuple[Timing, Timing]:
        seconds = next(clock)
        return Timing((seconds, seconds)), Timing((seconds, seconds))

    monkeypatch.setattr(speed_module, "_times", times)
    options: Any = {**SMALL, "batch_size": "1"}
    dense, dropped = prunescope.speed([folders["dense"], "drop:attn=1"], **options).table().to_pylist()
    assert (dense["decode_s_min"], dense["decode_s"], dense["decode_s_max"]) == (1.0, 1.4, 1.8)
    assert dropped["decode_within_spread"]
    assert dropped["prefill_within_spread"]


def test_the_page_shows_what_was_timed(run: prunescope.Run, tmp_path: Path) -> None:
    page = prunescope.report([str(run.folder)], out=str(tmp_path / "page.html")).read_text("utf-8")
    for row in run.table().to_pylist():
        assert f'<td class="n">{row["decode_tokens_per_s"]:,.0f}</td>' in page
        assert f'<td class="n">{row["parameters"]:,.0f}</td>' in page


def test_the_function_returns_what_the_command_writes(folders: dict[str, str], tmp_path: Path) -> None:
    result = prunescope.speed([folders["dense"]], **SMALL)  # type: ignore[arg-type]
    saved = result.save(tmp_path / "run")
    assert saved.table().equals(result.table())
    assert saved.summary == result.summary
    assert isinstance(result, prunescope.SpeedResult)


def test_a_mixture_of_experts_has_no_floor(tmp_path: Path) -> None:
    """Its operations follow from the routing; would catch a floor that counts every expert, or none."""
    result = prunescope.speed([str(tiny_folder("mixtral", tmp_path / "moe"))], **SMALL)  # type: ignore[arg-type]
    row = result.table().to_pylist()[0]
    assert row["prefill_over_floor"] is None
    assert row["decode_over_floor"] is None
    assert row["decode_s"] > 0


# --- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ([], {}, "needs at least one model"),
        (["drop:attn=1"], {}, "name that model first"),
        (["DENSE", "DENSE"], {}, "named twice"),
        (["DENSE", "drop:attn=9"], {}, "layer 9 is out of range"),
        (["DENSE"], {"batch_size": "1,x"}, "write different numbers with commas"),
        (["DENSE"], {"batch_size": "2,2"}, "write different numbers with commas"),
        (["DENSE"], {"length": 62}, "more than its context of 64 tokens"),
        (["DENSE"], {"max_new_tokens": 2}, "at least 4"),
        (["DENSE"], {"repeats": 0}, "--repeats 0"),
        (["DENSE"], {"sparse_kernels": True}, "--sparse-kernels needs a CUDA device"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    models: list[str], options: dict[str, Any], said: str, dense_folder: Path, tmp_path: Path
) -> None:
    refs = [str(dense_folder) if ref == "DENSE" else ref for ref in models]
    with pytest.raises(UserError, match=said) as raised:
        prunescope.speed(refs, out=str(tmp_path / "run"), **{**SMALL, **options})
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("run*"))


# --- parts -------------------------------------------------------------------------------------------------------------


def test_two_four_is_told_from_other_zeros() -> None:
    """Would catch groups counted down a column, or across a row's end, and half of all zeros taken for the pattern."""
    good = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0], [0, 0, 5, 6, 7, 0, 0, 0]])
    assert is_two_four(good)
    assert not is_two_four(torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 4]]))  # half zero, three in a group
    assert not is_two_four(good.T.contiguous())
    assert not is_two_four(torch.ones(4, 6))
    model = tiny_model("llama")
    loaded = LoadedModel("tiny", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)
    assert two_four_layers(loaded) == []
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.view(-1, 4)[:, 1:3] = 0
        model.lm_head.weight.view(-1, 4)[:, 1:3] = 0  # not in a block: it is never pruned
        model.model.layers[3].mlp.up_proj.weight.zero_()
    assert [name for name, _ in two_four_layers(loaded)] == ["model.layers.2.mlp.up_proj"]


def test_the_bytes_of_a_semi_structured_weight_are_those_of_its_parts() -> None:
    """Half of the values, and 2 bits for each of them: 9/16 of the dense bytes. Would catch a tensor counted by its outer shape."""
    packed = torch.zeros(64, 64 // 2 + 64 // 16, dtype=torch.bfloat16)
    outer = object.__new__(_Outer)
    outer.packed = packed  # type: ignore[attr-defined]
    weight = type("Parameter", (), {"data": outer})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.sparse, "SparseSemiStructuredTensor", _Outer)
        assert sum(t.nbytes for t in inner_tensors(weight)) == 64 * 64 * 2 * 9 // 16  # type: ignore[arg-type]
    plain = nn.Parameter(torch.zeros(3, 4))
    assert list(inner_tensors(plain)) == [plain]


class _Outer:
    """Stands for a semi-structured tensor, which needs a CUDA device to be made."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed"], None


def test_the_kernels_get_rows_and_the_dense_weights_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's conversion replaced by a weight that only multiplies matrices. Would catch a layer that hands it three dimensions, a
    dense copy that stays in memory, and weights or a forward pass that are not those of before afterwards."""
    model = tiny_model("qwen2")  # its projections have biases
    loaded = LoadedModel("tiny", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.view(-1, 4)[:, 1:3] = 0
            layer.self_attn.q_proj.weight.view(-1, 4)[:, 1:3] = 0
    ids = torch.arange(4, 24).view(2, 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[int] = []
    plain = semistructured.functional.linear

    def rows_only(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(rows.dim())
        return plain(rows, weight, bias)

    monkeypatch.setattr(semistructured, "check_kernels", lambda device, dtype: None)
    monkeypatch.setattr(semistructured.torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    monkeypatch.setattr(semistructured, "functional", type("functional", (), {"linear": staticmethod(rows_only)}))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        dense = model.model.layers[0].mlp.up_proj.weight
        with using_kernels(loaded) as names:
            assert dense.numel() == 0
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert seen == [2] * 12
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert len(names) == 12
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert len(seen) == 12  # the class's own forward is back
    assert model.model.layers[0].mlp.up_proj.weight is dense
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_kernels_are_refused_in_one_line() -> None:
    for device, dtype in ((CPU, torch.bfloat16), (torch.device("cuda"), torch.float32)):
        with pytest.raises(UserError, match="--sparse-kernels needs a CUDA device and --dtype bfloat16 or float16"):
            check_kernels(device, dtype)


def test_a_difference_within_the_spread_is_noise() -> None:
    quick, slow = Timing((1.0, 1.1, 1.3)), Timing((1.2, 1.25, 1.3))
    assert quick.median == 1.1
    assert quick.spread == pytest.approx(0.3)
    assert quick.same_as(slow)
    assert slow.same_as(quick)
    assert not quick.same_as(Timing((1.5, 1.5, 1.5)))
    assert quick.and_then(Timing((2.0,))).seconds == (1.0, 1.1, 1.3, 2.0)


def test_the_clock_measures_the_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a warm-up that is counted, and a median of the wrong number of repeats."""
    from prunescope.speed import timing as clock

    now = 0.0
    cost = iter([100.0, 2.0, 5.0, 3.0])

    def work() -> None:
        nonlocal now
        now += next(cost)

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    found = timed(work, CPU, 3, warm_up=1)
    assert found.seconds == (2.0, 5.0, 3.0)
    assert found.median == 3.0


def test_rates_are_plausible() -> None:
    """A machine that runs this moves between 0.1 GB/s and 10 TB/s; would catch a rate a second taken for one a repeat, or bits for bytes."""
    found = measure_rates(CPU, torch.float32, repeats=1)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.operations_per_s < 1e15
