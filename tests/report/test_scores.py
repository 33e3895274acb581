"""Targets of generate runs against each other, as the page shows them, held to plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import prunescope
from families import characters_folder
from prunescope.report.page.scores import generation_section


def test_generation_is_paired_prompt_by_prompt_and_use_by_use(tmp_path: Path) -> None:
    """Steps averaged over all prompts at once, targets in the wrong order, prompts of one kind counted to another, runs of other prompts paired."""
    dense = str(characters_folder(tmp_path / "dense"))
    runs = []
    for name, layers in (("one", "1"), ("two", "1,2,3")):
        target = f"drop:attn={layers}"
        prunescope.generate(dense, target, max_new_tokens=5, device="cpu", out=str(tmp_path / name))
        runs.append(prunescope.open(str(tmp_path / name)))
    section = generation_section(runs, ["one", "two"])
    assert section is not None
    (table,) = section["tables"]
    rows = {(row[0], row[1]): row for row in table["rows"]}
    kinds = np.array([sample["kind"] for sample in runs[0].samples()])
    assert {use for use, _ in rows} == {"all", *kinds} and len(rows) == 3 * (1 + len(set(kinds)))
    for column, measure in (("kl_dense_target", "KL, nats a token"), ("top1_agree", "same most likely token")):
        means = []
        for run in runs:
            frame = [r for r in run.table().to_pylist() if r["regime"] == "teacher-forced"]
            means.append(np.array([np.mean([r[column] for r in frame if r["prompt"] == i]) for i in range(len(kinds))]))
        for use in ("all", *set(kinds)):
            chosen = [use in ("all", kind) for kind in kinds]
            before, after = (found[chosen].mean() for found in means)
            _, _, n, model, against, *cells = rows[use, measure]
            assert (n, model, against) == (str(sum(chosen)), "two", "one")
            np.testing.assert_allclose([float(cell) for cell in cells[:3]], [before, after, after - before], 6e-3, 1e-8)
            low, high = map(float, cells[3].split(" .. "))
            spread = 5 * float(np.std((means[1] - means[0])[chosen])) / sum(chosen) ** 0.5 + 1e-3
            assert low - 1e-3 <= after - before <= high + 1e-3 and high - low < 2 * spread
    page = prunescope.report([str(tmp_path / name) for name in ("one", "two")], out=str(tmp_path / "report.html"))
    assert "Generation: differences from the target before it" in Path(page).read_text("utf-8")
    prunescope.generate(dense, "drop:attn=1", max_new_tokens=4, device="cpu", out=str(tmp_path / "shorter"))
    assert generation_section([runs[0], prunescope.open(str(tmp_path / "shorter"))], ["one", "shorter"]) is None
