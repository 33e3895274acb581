"""Our table on the bundled model against the one that llama.cpp's own tool printed on the same two GGUF files (tests/reference/llama_cpp_table.py)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunescope.compare.divergence import divergence_rows, read_slices
from prunescope.compare.divergence_summary import DP_PERCENTILES, KL_PERCENTILES, kl_table
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.variants import Variant
from prunescope.report.terminal.divergence import kl_lines

REFERENCE = Path(__file__).parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))


@pytest.fixture(scope="module")
def ours(
    smollm2: LoadedModel, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any]]:
    """Rows and table of the bundled model against itself in q4_0, on the text and chunks that llama.cpp was given.

    The second GGUF file is written as the script does, and the weights that transformers reads from it are those of the variant.
    """
    from llama_cpp_table import CHUNKS, CONTEXT, TYPE, rewrite

    from prunescope.models.references import bundled_file

    slices = read_slices(smollm2, str(shared_data / "wikitext2_test.txt"), context=CONTEXT, chunks=CHUNKS)
    file = load_model(rewrite(bundled_file(), tmp_path_factory.mktemp("gguf") / "q4_0.gguf", TYPE, False), device="cpu")
    variant = Variant(smollm2, "quant:q4_0")
    with variant.applied():
        theirs = dict(file.model.named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in smollm2.model.named_parameters())
    found = divergence_rows(smollm2, variant, slices, batch_size=4)
    return found.table, kl_table(found.table)


def printed(table: dict[str, Any]) -> dict[str, list[float]]:
    """Our lines as numbers, percent as shares, by llama.cpp's names."""
    found = {}
    for _, lines in kl_lines(table):
        for name, value in lines:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", value)]
            found[name] = [number / 100 for number in numbers] if "%" in value else numbers
    return found


def test_every_row_is_llama_cpps(ours: tuple[Any, dict[str, Any]]) -> None:
    """Both files expanded to float32, so that only the 16-bit logits of its file and a 16-bit cache stand between the two: every row within a
    twentieth of its printed error; rows without one within 5 %, and three digits of the last printed place.

    Catches another half of the chunks, a start token too many, base and target exchanged, other percentiles, another error.
    """
    theirs = json.loads((REFERENCE / "llama_cpp_kl_expanded.json").read_text("utf-8"))["table"]
    mine = printed(ours[1])
    assert len(theirs) == 6 + 12 + 16 and set(theirs) <= set(mine)
    for name, (value, *error) in theirs.items():
        if error:
            assert mine[name][0] == pytest.approx(value, abs=error[0] / 20), name
            assert mine[name][1] == pytest.approx(error[0], rel=0.01), name
        else:
            assert mine[name][0] == pytest.approx(value, rel=0.05, abs=3e-5), name


def test_quantised_files_agree_within_their_errors(ours: tuple[Any, dict[str, Any]]) -> None:
    """The files as a user has them: llama.cpp rounds activations to 8 bits, which ours does not. Rows with an error within it, percentiles
    within two standard errors of their rank."""
    theirs = json.loads((REFERENCE / "llama_cpp_kl_packed.json").read_text("utf-8"))["table"]
    mine = printed(ours[1])
    rows = ours[0]
    for name, (value, *error) in theirs.items():
        if error:
            assert mine[name][0] == pytest.approx(value, abs=error[0]), name
    for label, column, percents in (("KLD", "kl_dense_target", KL_PERCENTILES), ("Δp", "dp", DP_PERCENTILES)):
        values = rows[column].to_numpy()
        for percent in percents:
            share = percent / 100
            off = 2 * np.sqrt(share * (1 - share) / len(values))
            low, high = np.quantile(values, [max(0, share - off), min(1, share + off)])
            name = f"Median {label}" if percent == 50 else f"{percent:.1f}% {label}"
            assert low - 1e-4 <= theirs[name][0] <= high + 1e-4, name


def test_the_reference_reads_what_the_tool_prints() -> None:
    """Catches a row that the script would drop in silence."""
    from llama_cpp_table import parse

    text = """====== Perplexity statistics ======
Mean PPL(Q)                   :  21.352857 ±   2.953842
Cor(ln(PPL(Q)), ln(PPL(base))):  96.65%

99.9%   KLD:   3.424376
Minimum KLD:  -0.000003
Mean    Δp: -1.805 ± 0.493 %
Minimum Δp: -85.070%
Same top p: 73.611 ± 1.965 %
"""
    assert parse(text) == {
        "Mean PPL(Q)": [21.352857, 2.953842],
        "Cor(ln(PPL(Q)), ln(PPL(base)))": [pytest.approx(0.9665)],
        "99.9% KLD": [3.424376],
        "Minimum KLD": [-0.000003],
        "Mean Δp": pytest.approx([-0.01805, 0.00493]),
        "Minimum Δp": [pytest.approx(-0.8507)],
        "Same top p": pytest.approx([0.73611, 0.01965]),
    }
