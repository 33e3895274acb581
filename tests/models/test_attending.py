"""Passes over texts of many lengths keep away from the attention that plans every length anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import tiny_folder
from prunescope.compare.context import Transcript, read_states
from prunescope.compare.embedding import embed
from prunescope.compare.layerwise import layerwise_rows
from prunescope.models.blockwise import stream_model
from prunescope.models.loading import load_model
from prunescope.tasks.answering import Asking, answer


@pytest.mark.parametrize("what", ["drop", "target", "states"])
def test_no_pass_over_given_texts_attends_through_cudnn(what: str, tmp_path: Path) -> None:
    """A pass left out (of the dense model, of the target, of the noise floor), and a setting that stays behind."""
    dense, target = (load_model(tiny_folder("llama", tmp_path / name, seed=i)) for i, name in enumerate("ab"))
    seen: list[bool] = []
    for loaded in (dense, target):
        loaded.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    prompts, texts = [[5, 6, 7], [8, 9]], [[11, 12, 13], [14, 15]]
    before = torch.backends.cuda.cudnn_sdp_enabled()
    if what == "states":
        read_states(dense, [Transcript(p, t) for p, t in zip(prompts, texts, strict=True)])
    else:
        layerwise_rows(dense, target if what == "target" else None, prompts, texts=texts)
    assert len(seen) >= (1 if what == "states" else 5)
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_answers_and_vectors_keep_away_from_it_too(tmp_path: Path) -> None:
    """A prefix, an option or a passage that is read by another call of the model."""
    dense = load_model(tiny_folder("llama", tmp_path / "a"))
    seen: list[bool] = []
    dense.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    asked = [Asking([5, 6, 7], [[8], [9, 10]]), Asking([5, 6, 11], [[8], [9, 10]])]
    answer(dense, asked, write=False, choose=True, ended=lambda tokens: True, max_new_tokens=1, batch_size=2)
    embed(dense, [[5, 6, 7], [8, 9]], batch_size=2, pooling="mean", advance=lambda done: None)
    assert len(seen) >= 3
    assert not any(seen)


def test_a_model_on_disk_is_opened_as_its_blocks_run(tmp_path: Path) -> None:
    """Two kernels of attention round differently: the check of every block against the opening would refuse a model in bfloat16 on a GPU."""
    seen: list[bool] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    try:
        stream_model(str(tiny_folder("llama", tmp_path / "a")), tmp_path / "b", device="cpu")
    finally:
        hook.remove()
    assert len(seen) > 10
    assert not any(seen)
