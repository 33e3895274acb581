"""`--compensate`: the map against numpy, the folded weights against the map made explicit, and the folder that is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import prunescope
import prunescope.jobs.drop
import prunescope.prune.compensate as compensate
from families import tiny_folder
from prunescope.data.calibration import Calibration
from prunescope.errors import UserError
from prunescope.models.anatomy import first_output
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.prune.compensate import Fold, fit_maps, folded, pairs

TOKENS = torch.randint(3, 64, (12, 14), generator=torch.Generator().manual_seed(3))
COUNTS = torch.zeros(12, 14, dtype=torch.bool)
COUNTS[:, 4:11] = True


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "granite"])
@pytest.mark.parametrize("spec", ["attn=2", "mlp=1,2", "block=1-2"])
def test_folded_weights_are_the_explicit_map(family: str, spec: str, tmp_path: Path) -> None:
    """Weights stored either way round, with and without biases, sequential and parallel blocks."""
    folder = tiny_folder(family, tmp_path)
    loaded = load_model(folder, device="cpu")
    drop = DropSpec.parse(spec)
    generator = torch.Generator().manual_seed(1)
    size = loaded.anatomy.hidden_size
    folds = [
        Fold(host, last, torch.randn(size, size, generator=generator) / size, 0.0, 0.0)
        for host, last in pairs(loaded, drop)
    ]
    assert folds
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with loaded.dropping(drop), torch.no_grad():
        handles = []
        for fold in folds:

            def add(_: Any, __: Any, out: Any, by: torch.Tensor = fold.map) -> Any:
                y = first_output(out)
                more = y + y @ by.T
                return (more, *out[1:]) if isinstance(out, tuple) else more

            handles.append(fold.host.exit.register_forward_hook(add))
        explicit = loaded.model(input_ids=TOKENS, use_cache=False).logits
        for handle in handles:
            handle.remove()
        plain = loaded.model(input_ids=TOKENS, use_cache=False).logits
    with folded(loaded, folds), loaded.dropping(drop), torch.no_grad():
        found = loaded.model(input_ids=TOKENS, use_cache=False).logits
    assert (found - explicit).abs().max() <= 1e-5 * explicit.abs().max() < (plain - explicit).abs().max()
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_the_map_is_the_ridge_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's least squares over stacked rows, from plain hooks; would catch a transposed map, places that do not count, the first place left
    out, and rows that are not divided by the length of the dense stream."""
    loaded = load_model(tiny_folder("llama", tmp_path), device="cpu")
    calibration = Calibration(TOKENS, "x", 0, COUNTS)
    monkeypatch.setattr(compensate, "RIDGES", (0.03,))
    layers, rows = loaded.model.model.layers, {}
    size = loaded.anatomy.hidden_size
    by = 20 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))

    def keep(_: Any, __: Any, out: torch.Tensor) -> None:
        rows["y"] = out

    def depend(_: Any, __: Any, out: Any) -> Any:  # a random model's branches have nothing to do with each other
        rows["a"] = out[0] + rows["y"] @ by.T
        return (rows["a"], *out[1:])

    def after(_: Any, args: Any) -> None:
        rows["x"] = args[0]

    with torch.no_grad():  # the first token's stream is thirty times as long as the others'
        loaded.model.model.embed_tokens.weight[TOKENS[:, 0]] *= 30
    handles = [layers[2].mlp.register_forward_hook(keep), layers[3].self_attn.register_forward_hook(depend)]
    handles.append(layers[3].post_attention_layernorm.register_forward_pre_hook(after))
    (fold,) = fit_maps(loaded, DropSpec(attn=(3,)), calibration)
    assert fold.kl is not None and fold.kl[1] < fold.kl[0]
    assert fold.host.name == "mlp of layer 2" and fold.last.name == "attn of layer 3"
    with torch.no_grad():
        loaded.model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    used = np.zeros((12, 14), bool)
    used[:, 3:11] = True  # what predicts a token that counts, or is one
    used[:, 0] = True
    x, y, a = (rows[name].double().numpy()[used] for name in "xya")
    length = np.linalg.norm(x, axis=1, keepdims=True)
    y, a = y / length, a / length  # with the attention alone gone, what is missing after it is what it added
    ridge = 0.03 * (y**2).sum(0).mean()
    stacked = np.concatenate([y, np.sqrt(ridge) * np.eye(y.shape[1])])
    expected = np.linalg.lstsq(stacked, np.concatenate([a, np.zeros((y.shape[1], a.shape[1]))]), rcond=None)[0].T
    assert np.abs(fold.map.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_dropped_branch_that_is_a_map_of_its_host_is_restored(tmp_path: Path) -> None:
    loaded = load_model(tiny_folder("llama", tmp_path), device="cpu")
    layers = loaded.model.model.layers
    by = (
        torch.randn(loaded.anatomy.hidden_size, loaded.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))
        / 8
    )
    kept: list[torch.Tensor] = []
    handles = [
        layers[2].self_attn.register_forward_hook(lambda _, __, out: kept.append(out[0])),
        layers[2].mlp.register_forward_hook(lambda _, __, out: kept.pop() @ by.T),
    ]
    with torch.no_grad():
        dense = loaded.model(input_ids=TOKENS).logits
        (fold,) = fit_maps(loaded, DropSpec(mlp=(2,)), Calibration(TOKENS, "x", 0))
        for handle in handles:
            handle.remove()
        with loaded.dropping(DropSpec(mlp=(2,))):
            plain = loaded.model(input_ids=TOKENS).logits
        with folded(loaded, [fold]), loaded.dropping(DropSpec(mlp=(2,))):
            found = loaded.model(input_ids=TOKENS).logits
    assert fold.left < 0.01 and (found - dense).norm() < 0.1 * (plain - dense).norm()


@pytest.mark.parametrize("times", [1.0, -40.0])
def test_a_map_that_leads_away_from_the_dense_model_is_left_out(
    times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Squares that fall say nothing of what is predicted. Would catch a map that is judged by them alone."""
    loaded, plain = load_model(tiny_folder("llama", tmp_path), device="cpu"), compensate._fit
    attention, mlp = loaded.model.model.layers[2].self_attn, loaded.model.model.layers[2].mlp
    kept: list[torch.Tensor] = []
    attention.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    mlp.register_forward_hook(lambda *_: 3 * kept.pop())  # which a map of the attention gives as well

    def turned(*args: Any) -> tuple[Fold, Fold] | None:
        found = plain(*args)
        assert found is not None and found[0].left < 0.5
        return found[0], replace(found[1], map=times * found[1].map)  # what is judged is what was fitted to the others

    monkeypatch.setattr(compensate, "_fit", turned)
    found = fit_maps(loaded, DropSpec(mlp=(2,)), Calibration(TOKENS, "x", 0))
    assert len(found) == (times > 0)
    said = capsys.readouterr()
    assert ("no map does better than none" in said.out + said.err) == (times < 0)


@pytest.mark.parametrize(("form", "target"), [("zeroed", "attn"), ("compact", "block")])
def test_the_folder_is_plain_and_holds_the_map(
    form: Any, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def maps(loaded: LoadedModel, spec: DropSpec, *_: Any) -> list[Fold]:
        size = loaded.anatomy.hidden_size
        return [Fold(host, last, torch.randn(size, size) / size, 0.1, 0.5) for host, last in pairs(loaded, spec)]

    monkeypatch.setattr(prunescope.jobs.drop, "fit_maps", maps)
    folder = tiny_folder("llama", tmp_path / "dense")
    how: dict[str, Any] = {"target": target, "n": 2, "samples": 16, "seq_len": 24, "cache": False, "device": "cpu"}
    out = tmp_path / "out"
    result = prunescope.drop(str(folder), out=str(out), format=form, compensate=True, **how)
    assert result.info["compensated"][0]["ridge"] == 0.1
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        found = plain(input_ids=TOKENS).logits
        with folded(result._dense, result._folds), result._dense.dropping(result.spec):
            expected = result._dense.model(input_ids=TOKENS).logits
        with result._dense.dropping(result.spec):
            without = result._dense.model(input_ids=TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, without, atol=1e-4)
    with pytest.raises(UserError, match="a recipe has none"):
        prunescope.drop(str(folder), out=str(tmp_path / "no"), compensate=True, **how)
    assert not (tmp_path / "no").exists()


def test_a_norm_in_between_is_refused(tmp_path: Path) -> None:
    loaded = load_model(tiny_folder("gemma2", tmp_path), device="cpu")
    with pytest.raises(UserError, match="a norm stands between"):
        fit_maps(loaded, DropSpec(attn=(1,)), Calibration(TOKENS, "x", 0))


def test_a_host_that_adds_nothing_gets_no_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its Gram matrix is zero, which no ridge can damp: torch's solver ended in an error of its own."""
    loaded = load_model(tiny_folder("llama", tmp_path), device="cpu")
    drop = DropSpec(attn=(1, 2))
    silent = pairs(loaded, drop)[0][0]
    with torch.no_grad():
        for parameter in silent.modules[-1].parameters():
            parameter.zero_()
    folds = fit_maps(loaded, drop, Calibration(TOKENS, "x", 0))
    assert silent.name not in [fold.host.name for fold in folds]
    assert f"{silent.name}: no map does better than none" in capsys.readouterr().err
