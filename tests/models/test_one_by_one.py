"""Experts read one at a time, against transformers' own loop over all of them in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families import tiny_folder
from prunescope.errors import UserError
from prunescope.models import blockwise
from prunescope.models.blockwise import stream_model
from prunescope.models.streaming import having_read

MOE = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_LARGE", 1)


@pytest.mark.parametrize("family", MOE)
def test_states_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """To the bit, where transformers runs experts in a loop too. Would catch an expert that gets another one's weights, tokens or shares, sums in
    another order, zeros that are not counted, and an expert that stays in memory."""
    folder = tiny_folder(family, tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    streamed = stream_model(str(folder), tmp_path / "s", device="cpu", prefetch=True)
    large = [streamed._large(layer) for layer in range(len(streamed.blocks))]
    assert sum(map(len, large)) == sum(hasattr(block.mlp, "experts") for block in plain.model.layers) > 2
    seen: list[set[int]] = []
    handles = [
        module.act_fn.register_forward_hook(
            lambda *_, module=module: seen.append({len(p) for p in module.parameters(recurse=False)})
        )
        for modules in large
        for module in modules.values()
    ]
    (tmp_path / "work").mkdir()
    with torch.no_grad(), having_read(streamed, [IDS], tmp_path / "work", "dense", lambda done: None):
        found = streamed.states(IDS)
        expected = plain.model(input_ids=IDS, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)
    assert seen and all(sizes == {1} for sizes in seen)
    assert all(parameter.is_meta for parameter in streamed.blocks.parameters())
    zeros = {
        name: streamed.loaded.zeros.get(id(p)) for name, p in streamed.model.named_parameters() if "experts" in name
    }
    assert set(zeros.values()) == {0}


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """Also of an expert that no token of the probe reaches."""
    folder = tiny_folder("mixtral", tmp_path / "model")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[3].mlp.experts.down_proj.data[1, 0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="holds NaN or infinite weights"):
        stream_model(str(folder), tmp_path / "s", device="cpu", prefetch=True)
