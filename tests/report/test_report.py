"""The page without a browser: what goes in, what is refused, what the numbers are."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import prunescope
from prunescope.cli import main
from prunescope.compare.metrics import COLUMNS
from prunescope.errors import UserError
from prunescope.report.page import html, payload
from prunescope.report.page.verdict import judge
from reports import HOSTILE, checkpoint, generate_run, layerwise_run, mcq_run


def unpack(blob):
    size = np.dtype(blob["dtype"]).itemsize
    raw = np.frombuffer(zlib.decompress(base64.b64decode(blob["data"])), np.uint8)
    return raw.reshape(size, -1).T.copy().view(f"<{blob['dtype']}").reshape(blob["shape"])


def test_packing_keeps_every_bit():
    values = np.random.default_rng(0).normal(size=(3, 4, 5))
    values[0, 0, 0] = np.nan
    np.testing.assert_array_equal(unpack(payload.pack(values)), values)
    np.testing.assert_array_equal(unpack(payload.pack(values, "f4")), values.astype(np.float32))


def test_layer_numbers_are_those_of_the_rows(tmp_path):
    """Against sums row by row; catches mixed-up axes, kinds or prompts."""
    run = prunescope.open(layerwise_run(tmp_path / "run", prompts=2, steps=3, layers=4))
    view = payload.layerwise_view(run.table(), run.info, run.samples())
    rows = run.table().to_pylist()
    for kind, layer, step in ((0, 0, 0), (1, 3, 2), (0, 2, 1)):
        mine = [r for r in rows if r["layer"] == layer and r["sublayer"] == ("attn", "mlp")[kind]]
        there = [r["z_orth_rel"] for r in mine if r["step"] == step]
        assert unpack(view["means"]["z_orth_rel"])[kind, layer, step] == np.float32(np.mean(there))
        stats = unpack(view["by_layer"]["kl_est"])[:, kind, layer]
        known = [r["kl_est"] for r in mine]
        expected = [np.mean(known), np.quantile(known, 0.05), np.quantile(known, 0.95), min(known), max(known)]
        np.testing.assert_allclose(stats, expected, rtol=1e-14)
        one = next(r["js"] for r in mine if r["step"] == step and r["prompt"] == 1)
        assert unpack(view["prompts"][1]["cells"]["js"])[kind, layer, step] == np.float32(one)


def test_large_runs_are_thinned_and_say_so(tmp_path):
    """100,000 rows: bounded cells, whole steps and prompts, tables over all rows."""
    run = prunescope.open(layerwise_run(tmp_path / "run", prompts=25, steps=500, layers=4))
    table = run.table()
    assert len(table) == 100_000
    view = payload.layerwise_view(table, run.info, run.samples(), share=4)
    assert view["stride"] > 1 and view["steps"] == list(range(0, 500, view["stride"]))
    assert sum(np.prod(blob["shape"]) for blob in view["means"].values()) <= payload.MEAN_FLOATS
    cells = sum(np.prod(blob["shape"]) for one in view["prompts"] for blob in one["cells"].values())
    assert 0 < len(view["prompts"]) < 25 and cells <= payload.CELL_FLOATS
    step = view["steps"][7]
    chosen = table.filter((pc.field("step") == step) & (pc.field("layer") == 1) & (pc.field("sublayer") == "mlp"))
    assert unpack(view["means"]["tv"])[1, 1, 7] == pytest.approx(pc.mean(chosen["tv"]).as_py(), rel=1e-6)
    out = tmp_path / "page.html"
    html.write_report([run], out)
    assert out.stat().st_size < 6e6


def test_step_numbers_are_those_of_the_rows(tmp_path):
    run = prunescope.open(generate_run(tmp_path / "run"))
    view = payload.generation_view(run.table(), run.info, run.samples())
    rows = [r for r in run.table().to_pylist() if r["regime"] == "free-running" and r["step"] == 5]
    found = view["regimes"]["free-running"]
    assert found["prompts"][5] == len(rows) == 2  # one text is a step shorter
    assert unpack(found["by_step"]["js"])[0, 5] == pytest.approx(np.mean([r["js"] for r in rows]), rel=1e-14)
    assert view["texts"][1]["free"][5] is None and view["texts"][1]["forced"][5] is not None
    row = next(r for r in rows if r["prompt"] == 2)
    step = view["texts"][2]["free"][5]
    assert step["kl"] == row["kl_dense_target"]
    assert [p for _, p in step["target"]] == pytest.approx(row["top_target_p"], rel=1e-5)


def test_runs_without_likeliest_tokens_still_make_a_page(tmp_path):
    run = prunescope.open(generate_run(tmp_path / "old", tops=False))
    assert "dense" not in payload.generation_view(run.table(), run.info, run.samples())["texts"][0]["free"][0]
    html.write_report([run], tmp_path / "page.html")


def test_every_column_is_explained_as_in_the_docs():
    """The page's glossary and docs/metrics.md must not drift apart."""
    docs = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")
    for column in html.columns():
        assert f"| `{column['name']}` | {column['formula']} | {column['reading']} |" in docs
    assert {column["name"] for column in html.columns()} == set(COLUMNS)
    spec = importlib.util.spec_from_file_location("make_columns", Path(__file__).parents[2] / "docs/make_columns.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.with_tables(docs) == docs, "run docs/make_columns.py"


@pytest.mark.parametrize(
    ("cosine", "level"), [(0.96, "kept"), (0.95, "kept"), (0.94, "at risk"), (0.80, "at risk"), (0.79, "broken")]
)
def test_rule_of_retrieval(tmp_path, cosine, level):
    info = json.loads((generate_run(tmp_path / "run", prompts=5) / "run.json").read_text())
    info["summary_by_regime"]["teacher-forced"]["h"]["h_cos"]["mean"] = cosine
    assert judge({"generate": info})[0].level == level


@pytest.mark.parametrize(
    ("agree", "kl", "loops", "level"),
    [(0.96, 0.04, 0, "kept"), (0.96, 0.06, 0, "at risk"), (0.96, 0.04, 0.5, "at risk"), (0.9, 0.01, 0, "at risk"), (0.79, 0.01, 0, "broken")],
)  # fmt: skip
def test_rule_of_generation(tmp_path, agree, kl, loops, level):
    info = json.loads((generate_run(tmp_path / "run", prompts=5) / "run.json").read_text())
    p = info["summary_by_regime"]["teacher-forced"]["p"]
    p["top1_agree"]["mean"], p["kl_dense_target"]["mean"], info["texts"]["target"]["looping"] = agree, kl, loops
    info["texts"]["dense"]["looping"] = 0
    assert judge({"generate": info})[2].level == level


@pytest.mark.parametrize(
    ("same", "mcnemar", "lost", "level"),
    [(0.95, 1.0, 0, "kept"), (0.95, 0.01, 9, "at risk"), (0.8, 1.0, 0, "at risk"), (0.6, 1.0, 0, "broken")],
)
def test_rule_of_multiple_choice(tmp_path, same, mcnemar, lost, level):
    info = json.loads((mcq_run(tmp_path / "run") / "run.json").read_text())
    info["agreement"]["same_choice"] = same
    info["flips"] |= {"mcnemar_p": mcnemar, "right_to_wrong": lost, "wrong_to_right": 0}
    assert judge({"mcq": info})[1].level == level
    assert judge({})[1].level == "not shown"
    few = judge({"mcq": info | {"questions": 4}})[1]
    assert few.level == "not shown" and "Only 4 questions" in few.sentence and few.numbers


def test_a_target_seen_by_several_commands_is_one_target(tmp_path):
    folders = [generate_run(tmp_path / "g"), mcq_run(tmp_path / "m"), generate_run(tmp_path / "g2", target="thinner")]
    page = html.render([prunescope.open(folder) for folder in folders]).decode()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [t["name"] for t in data["targets"]] == ["thin", "thinner"]
    assert {"same choice", "kl_dense_target, teacher-forced"} <= set(data["targets"][0]["values"])
    assert "same choice" not in data["targets"][1]["values"]
    assert "only 3 prompts" in page and "only 12 questions" in page


def test_hostile_text_stays_inside_the_data(tmp_path):
    """No text of a model may open or close an element of the page, nor stop it from being written."""
    folders = [
        layerwise_run(tmp_path / "l", target=HOSTILE[0], texts=HOSTILE, steps=8),
        generate_run(tmp_path / "<b>g", target=HOSTILE[1], texts=HOSTILE),
        mcq_run(tmp_path / "m", target=HOSTILE[2], texts=HOSTILE),
    ]
    page = html.render([prunescope.open(folder) for folder in folders]).decode("utf-8")
    assert page.count("</script>") == 3 and page.count("<script") == 3
    assert "<img" not in page.replace("src=x", "") and "<b>g" not in page


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda run: (run / "layerwise.parquet").write_bytes((run / "layerwise.parquet").read_bytes()[:999]), "damaged"),
        (lambda run: (run / "run.json").write_text((run / "run.json").read_text()[:500]), "run it again"),
        (lambda run: _change(run, schema_version=99), "upgrade prunescope"),
        (lambda run: _change(run, schema_version="x"), "cannot be read"),
        (lambda run: _change(run, command="evaluate"), "lacks the table"),
        (lambda run: _change(run, command="mcq"), "lacks the table"),
        (lambda run: (run / "samples.jsonl").write_text('{"prompt": 0'), "damaged"),
        (lambda run: (run / "samples.jsonl").write_text(""), "do not fit together"),
        (lambda run: (run / "run.json").unlink(), "not a finished run"),
        (lambda run: _change(run, models={}), "do not fit together"),
        (lambda run: pq.write_table(pq.read_table(run / "layerwise.parquet").drop(["layer"]), run / "layerwise.parquet"), "do not fit together"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused_in_one_line(tmp_path, capfd, break_it, word):
    run, out = layerwise_run(tmp_path / "run"), tmp_path / "page.html"
    break_it(run)
    assert main(["report", str(generate_run(tmp_path / "good")), str(run), "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert word in error and str(run) in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("page*"))


def _change(run, **fields):
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "word"), [({"schema_version": 2}, "upgrade"), ({"command": "merge"}, "no checkpoint"), ({"modules": 3, "command": "sparsify"}, "do not fit")]
)  # fmt: skip
def test_a_foreign_checkpoint_is_refused(tmp_path, capfd, fields, word):
    folder = checkpoint(tmp_path / "c")
    path = folder / "prunescope.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert word in capfd.readouterr().err and not (tmp_path / "page.html").exists()


def test_command_line(tmp_path, capfd):
    """Folders before and after the options; an existing page stays; a demo folder stands for what is in it."""
    demo = tmp_path / "demo"
    layerwise_run(demo / "layerwise")
    checkpoint(demo / "drop-attn")
    (demo / "demo.json").write_text("{}")
    out = tmp_path / "new" / "page.html"
    other = checkpoint(tmp_path / "wanda", "sparsify")
    assert main(["report", str(demo), "--out", str(out), str(other)]) == 0
    page = out.read_text("utf-8")
    assert "wanda, sparsity 0.5" in page and "1 attn sublayers dropped (1)" in page and "each sublayer in turn" in page
    assert main(["report", str(demo), "--out", str(out)]) == 2 and "--overwrite" in capfd.readouterr().err
    assert main(["report", str(demo), "--out", str(out), "--overwrite"]) == 0
    assert main(["report", "--out", str(out)]) == 2
    assert main(["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "x.html")]) == 2
    with pytest.raises(UserError, match="at least one"):
        prunescope.report([], out=str(tmp_path / "x.html"))


def test_report_needs_neither_torch_nor_transformers(tmp_path):
    run = layerwise_run(tmp_path / "run")
    code = f"import sys, prunescope; prunescope.report([{str(run)!r}], out={str(tmp_path / 'p.html')!r}); assert not {{'torch', 'transformers'}} & set(sys.modules); import prunescope.report.figures.layerwise; assert callable(prunescope.report)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_layerwise_run_is_read_a_column_at_a_time(tmp_path, monkeypatch):
    """The page is the same, and the table is never read whole; a damaged file is said to be one. Catches a page that needs twice its run in memory."""
    folder = layerwise_run(tmp_path / "run", prompts=2, steps=3, layers=4)
    run = prunescope.open(folder)
    by_column = payload.layerwise_view(run.columns(), run.info, run.samples())
    assert by_column == payload.layerwise_view(run.table(), run.info, run.samples())
    monkeypatch.setattr(type(run), "table", lambda *_: pytest.fail("read whole"))
    html.write_report([run], tmp_path / "page.html")
    path = folder / "layerwise.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(prunescope.UserError, match="run folder is damaged, run layerwise again"):
        html.write_report([prunescope.open(folder)], tmp_path / "page.html")
