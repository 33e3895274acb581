"""Families of transformers' own lists, each against plain transformers; a few kinds in `make test`, all in `make test-families`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import zoo
from family_checks import check_family, works

DOCS = Path(__file__).resolve().parents[2] / "docs"
FEW = ("load", "drop attn", "drop mlp", "cache", "layerwise", "zeroed", "compact")
KINDS = {  # one family for each kind of structure
    "bloom": "attention and MLP that add the stream themselves",
    "mpt": "an MLP that adds the stream itself, ALiBi",
    "granitemoeshared": "an MoE summed with a dense MLP",
    "granitemoehybrid": "Mamba or attention, and a summed MLP",
    "hunyuan_v1_dense": "an MLP that has a layer number too",
    "gpt_neo": "a layer number inside the attention",
    "minicpm3": "scaled branches",
    "qwen2_5_vl": "images and text, three axes of positions",
    "llava": "images and text, the tower with as many layers as the decoder",
    "aya_vision": "images and text, without the decoder's logit scale",
    "gemma3": "images and text, sliding layers",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", KINDS)
def test_one_family_of_each_kind(family: str) -> None:
    """Would catch a kind that is dropped half, or saved so that plain transformers reads something else."""
    results = check_family(family, FEW)
    assert works(results), results


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family(family: str) -> None:
    """Every check of every class: never a wrong number or a traceback, and what works according to docs/families.json still does."""
    results = check_family(family)
    assert not [result for result in results.values() if result.startswith(("wrong", "traceback"))], results
    known = json.loads((DOCS / "families.json").read_text("utf-8")).get(family)
    if known is not None and works(known):
        assert works(results), results
        assert known.get("experts") != "works" or results["experts"] == "works", results


def test_the_document_is_that_of_the_results() -> None:
    """Would catch a table edited by hand, or results that were merged without writing it."""
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = json.loads((DOCS / "families.json").read_text("utf-8"))
    assert (DOCS / "families.md").read_text("utf-8") == module.page_of(found)
    faulty = {family for family, results in found.items() if module.state_of(results) in ("wrong", "traceback")}
    assert not faulty
