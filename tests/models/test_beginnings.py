"""What texts begin with is read once, and their states are those of reading each whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import tiny_folder
from prunescope.compare.context import Transcript, read_states
from prunescope.models import beginnings
from prunescope.models.beginnings import common_beginning
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model

HEAD = [5, 9, 11, 4, 60, 8]
TEXTS = [Transcript([*HEAD, 7, 3], [21, 40]), Transcript([*HEAD, 12], [9]), Transcript([*HEAD, 33, 2, 17], [4, 4, 6])]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("dropped", ["", "attn=0;mlp=1", "attn=0-2"])
def test_states_behind_a_common_beginning_are_those_of_plain_transformers(
    family: str, dropped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one pass a text. Would catch positions that begin anew behind the beginning, states of another step, and a cache that one
    text leaves to the next. Windows (gemma2) are read whole."""
    monkeypatch.setattr(beginnings, "_WORTH", 1)
    loaded = load_model(tiny_folder(family, tmp_path / "m"), device="cpu", dtype="float32")
    read: list[int] = []
    loaded.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with loaded.dropping(DropSpec.parse(dropped) if dropped else DropSpec()), torch.no_grad():
        found = read_states(loaded, TEXTS)
        assert read == ([3 * 11] if family == "gemma2" else [6, 3 * 5])
        for text, states in zip(TEXTS, found, strict=True):
            whole = loaded.model(
                input_ids=torch.tensor([text.read]), use_cache=False, output_hidden_states=True
            ).hidden_states
            expected = whole[-1][0, list(text.positions)]
            torch.testing.assert_close(states, expected, rtol=2e-5, atol=2e-5)


def test_nothing_is_read_apart_where_little_is_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is asked for must not be cut off with the beginning, and a pass of its own must save more than it costs."""
    loaded = load_model(tiny_folder("llama", tmp_path / "m"), device="cpu")
    read: list[int] = []
    loaded.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    read_states(loaded, TEXTS)
    assert read == [3 * 11]
    monkeypatch.setattr(beginnings, "_WORTH", 1)
    read.clear()
    early = [
        Transcript(HEAD[:2], [*HEAD[2:], 4]),
        Transcript(HEAD, [9]),
    ]  # the first state asked for is that of token 1
    read_states(loaded, early)
    assert read == [1, 2 * 5]


def test_the_common_beginning_of_texts() -> None:
    assert common_beginning([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_beginning([[1], [2]]) == 0 and common_beginning([[1, 2]]) == 2
