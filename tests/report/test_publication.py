"""Publication figures from run folders alone: every file in three formats, whatever the runs hold."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axis import Axis

import prunescope
from prunescope.cli import main
from prunescope.report.figures import layerwise as figures
from prunescope.report.figures import publication
from prunescope.report.figures.layerwise import draw_layerwise
from reports import checkpoint, generate_run, layerwise_run, mcq_run


def record(folder):
    return folder, json.loads((folder / "prunescope.json").read_text())


def test_every_view_in_three_formats(tmp_path, monkeypatch):
    """Two runs of one name, through the command. Of the figures that layerwise draws itself one stands for all: each takes a second."""
    monkeypatch.setattr(
        publication,
        "draw_layerwise",
        lambda table, info, samples, folder: figures.save(figures._cosines_by_layer(table, "attn", info), folder / "fig04_cosine_by_layer_attn"),
    )  # fmt: skip
    a = layerwise_run(tmp_path / "a" / "run", prompts=2, steps=3, layers=2)
    b = generate_run(tmp_path / "b" / "run", prompts=2, steps=3)
    c = mcq_run(tmp_path / "c", questions=4)
    d, e = checkpoint(tmp_path / "d"), checkpoint(tmp_path / "e.50", "sparsify")
    out = tmp_path / "figures"
    assert main(["report", *map(str, (a, b, c, d, e)), "--out", str(tmp_path / "p.html"), "--figures", str(out)]) == 0
    expected = {
        *(f"run/heatmap_{column}" for column in ("h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target")),
        *(
            "run/fig04_cosine_by_layer_attn",
            "run-2/fig07_kl_by_step",
            "run-2/texts",
        ),
        *("c/fig08_tokens_and_options", "c/margins", "layers_p_cos", "layers_kl_dense_target", "fig12_targets"),
        *("pareto_bytes_kl", "checkpoint_d", "checkpoint_e.50"),
    }
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    for name in expected:
        for kind, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
            assert f"{name}.{kind}" in files
            content = (out / f"{name}.{kind}").read_bytes()
            assert content.startswith(start) and len(content) > 2000
    assert main(["report", str(a), "--out", str(tmp_path / "q.html"), "--figures", str(out)]) == 2
    assert not (tmp_path / "q.html").exists()


def test_ordinary_runs_write_no_pdf(tmp_path):
    run = prunescope.open(layerwise_run(tmp_path / "run", prompts=1, steps=2, layers=2))
    written = draw_layerwise(run.table(), run.info, [], tmp_path)
    assert {path.suffix for path in written} == {".svg", ".png"}


def test_small_panels_are_drawn_as_with_matplotlibs_own_search(tmp_path, monkeypatch):
    """They have no axis labels whose place could matter, byte for byte. Would catch a tick or an offset that goes with it."""
    run = prunescope.open(layerwise_run(tmp_path / "run", prompts=1, steps=3, layers=2))
    found = []
    for name in ("ours", "plain"):
        (tmp_path / name).mkdir()
        draw_layerwise(run.table(), run.info, [], tmp_path / name)
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("fig1[4-7]*")})
        monkeypatch.setattr(Axis, "set_label_coords", lambda *_: None)
    assert found[0] == found[1] and found[0]


def test_heatmap_shows_means_and_leaves_zeros_blank(tmp_path):
    """Exact zeros have no place on a logarithmic scale; catches mixed-up layers and steps."""
    folder = layerwise_run(tmp_path / "run", prompts=2, steps=3, layers=4)
    table = pq.read_table(folder / "layerwise.parquet")
    values = table["js"].to_numpy().copy()
    rows = [(r["layer"], r["step"], r["sublayer"]) for r in table.select(["layer", "step", "sublayer"]).to_pylist()]
    values[[row == (1, 2, "attn") for row in rows]] = 0
    table = table.set_column(table.column_names.index("js"), "js", pa.array(values))
    info = prunescope.open(folder).info
    figure = publication._heatmap(table, info, "js", "js")
    attn, mlp = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert np.ma.getmaskarray(np.ma.masked_invalid(attn))[1, 2]
    expected = np.mean([v for v, row in zip(values, rows, strict=True) if row == (3, 0, "mlp")])
    assert mlp[3, 0] == expected


def test_checkpoints_alone(tmp_path):
    folder = checkpoint(tmp_path / "x")
    path, content = record(folder)
    written = publication.draw_publication([], [(path, content), (path, content | {"scores": []})], tmp_path / "f")
    assert sorted(p.name for p in written) == ["checkpoint_x.pdf", "checkpoint_x.png", "checkpoint_x.svg"]
    assert Path(written[0]).is_file()
