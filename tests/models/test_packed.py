"""Quantised checkpoints of every format whose package installs on a CPU: each is the package's own model, and the plain model of its numbers.

Checkpoints are made here: by the package itself (bitsandbytes, torchao, compressed-tensors), or packed by hand from the format's description
(GPTQ, AWQ, FP8), with the numbers that they stand for beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_quantised import packaged
from torch import Tensor

import families
import prunescope
from families import tiny_folder, tiny_tokenizer
from prunescope.compare.context import Transcript
from prunescope.compare.divergence import Slice, divergence_rows
from prunescope.compare.layerwise import batch_rows, lens_head
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model
from prunescope.models.packed import format_of, is_finite, is_packed
from prunescope.models.quantised import Quantised, QuantSpec
from prunescope.models.rounding import round_to_nearest
from prunescope.prune.inplace import check_prunable
from prunescope.prune.masks import Goal
from prunescope.sweep.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own
GROUP = 32
SHIFTS = torch.arange(8) * 4
Numbers = dict[str, Tensor]


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama whose widths the formats can divide."""
    monkeypatch.setitem(families._COMMON, "hidden_size", 128)
    monkeypatch.setitem(families._COMMON, "intermediate_size", 256)
    return tiny_folder("llama", tmp_path / "dense")


# --- checkpoints -------------------------------------------------------------------------------------------------------


def by_package(config: Any, dense: Path, folder: Path) -> None:
    """Quantised and saved by transformers and the package; what its numbers are is asked of its own modules."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def bitsandbytes(dense: Path, folder: Path, **options: Any) -> None:
    packaged("bitsandbytes")
    by_package(transformers.BitsAndBytesConfig(**options), dense, folder)


def torchao(dense: Path, folder: Path, make: Callable[[], Any]) -> None:
    packaged("torchao")
    by_package(transformers.TorchAoConfig(make()), dense, folder)


def _intx() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def _float8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def compressed_tensors(dense: Path, folder: Path, preset: str) -> None:
    packaged("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"g": scheme}, ignore=["lm_head"], quantization_status="calibration")
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            args, w = module.quantization_scheme.weights, module.weight.data
            groups = {"group": (w.shape[0], -1, args.group_size or 1), "tensor": (1, 1, -1)}.get(
                args.strategy, (w.shape[0], 1, -1)
            )
            parts = w.reshape(groups)
            scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
            module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("zero_point"):
                    parameter.data.zero_()
                elif name == "input_scale":  # static, and left uninitialised: without text nothing has observed it
                    parameter.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    compressor.update_config(folder)


def by_hand(
    dense: Path, folder: Path, pack: Callable[[Tensor], tuple[Numbers, Tensor]], config: dict[str, Any]
) -> Numbers:
    """Pack every matrix of the blocks; returns the state of the plain model that the checkpoint stands for."""
    stored, plain = {}, {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if ".layers." in name and weight.dim() == 2:
            packed, plain[name] = pack(weight)
            stored |= {name.removesuffix("weight") + key: value.contiguous() for key, value in packed.items()}
        else:
            stored[name] = plain[name] = weight
    transformers.AutoConfig.from_pretrained(dense).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return plain


def _nibbles(values: Tensor) -> Tensor:
    """Eight 4-bit numbers of the last dimension ``(..., 8)`` into one int32, the first in the lowest bits."""
    packed = (values.long() << SHIFTS).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _affine(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Asymmetric 4 bit in groups of 32: steps (out, in), scales and zero points (out, groups), and what they stand for."""
    parts = weight.view(len(weight), -1, GROUP)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    steps = (parts / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    plain = ((steps - zero[..., None]) * scale[..., None]).view_as(weight)
    return steps.view_as(weight), scale, zero, plain


def gptq(dense: Path, folder: Path) -> Numbers:
    packaged("gptqmodel")

    def pack(weight: Tensor) -> tuple[Numbers, Tensor]:
        steps, scale, zero, plain = _affine(weight)
        rows, columns = steps.T.reshape(-1, 8, len(weight)).transpose(1, 2), (zero.T - 1).reshape(zero.shape[1], -1, 8)
        where = torch.arange(weight.shape[1]) // GROUP
        return {
            "qweight": _nibbles(rows),
            "qzeros": _nibbles(columns),
            "scales": scale.T.half(),
            "g_idx": where.int(),
        }, plain

    settings = {
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    return by_hand(dense, folder, pack, {"quant_method": "gptq", **settings})


def awq(dense: Path, folder: Path) -> Numbers:
    packaged("gptqmodel")
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(weight: Tensor) -> tuple[Numbers, Tensor]:
        steps, scale, zero, plain = _affine(weight)
        packed = [_nibbles(values.T.reshape(values.shape[1], -1, 8)[..., order]) for values in (steps, zero)]
        return {"qweight": packed[0], "qzeros": packed[1], "scales": scale.T.half()}, plain

    return by_hand(
        dense,
        folder,
        pack,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    )


def fp8(dense: Path, folder: Path, block: int | None) -> Numbers:
    def pack(weight: Tensor) -> tuple[Numbers, Tensor]:
        size = (block, block) if block else tuple(weight.shape)
        parts = weight.view(weight.shape[0] // size[0], size[0], weight.shape[1] // size[1], size[1])
        scale = parts.abs().amax((1, 3), keepdim=True) / 448
        packed = (parts / scale).to(torch.float8_e4m3fn)
        plain = (packed.float() * scale).view_as(weight)
        return {
            "weight": packed.view(weight.shape),
            "weight_scale_inv": scale[:, 0, :, 0] if block else scale.view(()),
        }, plain

    sizes = [block, block] if block else None
    return by_hand(
        dense, folder, pack, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": sizes}
    )


FORMATS: dict[str, Callable[[Path, Path], Numbers | None]] = {
    "bitsandbytes 4": lambda dense, folder: bitsandbytes(dense, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes 8": lambda dense, folder: bitsandbytes(dense, folder, load_in_8bit=True),
    "torchao int4": lambda dense, folder: torchao(dense, folder, _intx),
    "torchao fp8": lambda dense, folder: torchao(dense, folder, _float8),
    **{f"compressed-tensors {p}": lambda dense, folder, p=p: compressed_tensors(dense, folder, p) for p in ("W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC")},
    "gptq": gptq, "awq": awq,
    "fp8 blocks": lambda dense, folder: fp8(dense, folder, 64),
    "fp8 tensor": lambda dense, folder: fp8(dense, folder, None),
}  # fmt: skip
_DEQUANTISED = ("fp8 blocks", "fp8 tensor")


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_the_packages_own_model(name: str, wide: Path, tmp_path: Path) -> None:
    """Logits of plain transformers; of the numbers that were packed by hand; layerwise and divergence against itself; KL against the dense
    model by brute force, and layerwise against it at one MLP. Catches a loader that changes a number, a head or states that are read wrongly from packed modules."""
    if name in ("gptq", "awq") and "GPTQMODEL" not in os.environ:
        pytest.importorskip("gptqmodel", reason="gptqmodel is not installed; `make test-quant` installs it")
    folder = tmp_path / "packed"
    folder.mkdir()
    numbers = FORMATS[name](wide, folder)
    dense, target = load_model(wide, device="cpu"), load_model(folder, device="cpu")
    ids = torch.randint(4, families.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits, ours = target.model(ids).logits, theirs(ids).logits
        base = dense.model(ids).logits.double().log_softmax(-1)
    assert torch.equal(logits, ours)
    if numbers is not None:
        plain = transformers.AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
        plain.load_state_dict(numbers, strict=False)
        with torch.no_grad():
            expected = plain(ids).logits
        tolerance = 1e-5 if name in _DEQUANTISED else 0.05  # gptqmodel multiplies in half precision
        assert torch.allclose(logits, expected, atol=tolerance), (logits - expected).abs().max()
    method = name.split()[0]
    found = target.describe().get("quantisation")
    if name in _DEQUANTISED:
        assert found is None and not any(map(is_packed, target.model.parameters()))
    else:
        assert found is not None and found["method"] == method
        # compressed-tensors unpacks weights when the model runs first
        assert found["packed"] == (method != "compressed-tensors")
        with torch.no_grad():
            assert torch.equal(target.model(ids).logits, ours)  # to be described changes nothing
    pieces = [Slice("ids", ids, ids.numel())]
    same = divergence_rows(target, target, pieces).table
    assert not any(same["kl_dense_target"].to_numpy())
    rows = divergence_rows(dense, target, pieces).table
    q = ours.double().log_softmax(-1)
    kl = (base.exp() * (base - q)).sum(-1)[:, 12:23].flatten()
    found_kl = torch.tensor(rows["kl_dense_target"].to_numpy())
    # LLM.int8() looks for outliers over all tokens of a pass, so that what a token gives depends on those beside it
    assert torch.allclose(
        found_kl, kl, **({"atol": 0.01} if name == "bitsandbytes 8" else {"rtol": 1e-3, "atol": 1e-5})
    )
    texts = [Transcript(row[:12].tolist(), row[12:].tolist()) for row in ids]
    for against, zero in ((target, True), (dense, False)):
        table = batch_rows(against, target, texts, lens_head(against, "raw"), 1.0, 2**29, 0)
        largest = table["h_orth_rel"].to_numpy().max()
        assert largest < 1e-5 if zero else largest > 1e-3
    expected = mlp_by_hand(dense.model, theirs, ids, layer=2)
    mine = table.filter(pc.and_(pc.equal(table["layer"], 2), pc.equal(table["sublayer"], "mlp"))).to_pylist()
    assert len(mine) == 24
    for row in mine:
        by_hand = expected[row["prompt"], row["position"]].item()
        assert row["h_orth_rel"] == pytest.approx(by_hand, rel=0.3 if name == "bitsandbytes 8" else 0.02, abs=1e-5)


def mlp_by_hand(dense: Any, theirs: Any, ids: Tensor, layer: int) -> Tensor:
    """How far the stream after one MLP turns if the package's own model computes it from the dense stream: ‖Δ⊥‖/‖h‖, (prompts, tokens)."""
    caught: dict[str, Tensor] = {}
    block, other = dense.model.layers[layer], theirs.model.layers[layer]
    hooks = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: caught.update(before=args[0])),
        block.register_forward_hook(
            lambda _, args, out: caught.update(after=out if isinstance(out, Tensor) else out[0])
        ),
    ]
    with torch.no_grad():
        dense(ids)
        target = caught["before"] + other.mlp(other.post_attention_layernorm(caught["before"]))
    for hook in hooks:
        hook.remove()
    h, delta = caught["after"].double(), target.double() - caught["after"].double()
    along = (delta * h).sum(-1, keepdim=True) / (h * h).sum(-1, keepdim=True) * h
    return (delta - along).norm(dim=-1) / h.norm(dim=-1)


_ROUNDING = {  # logits of dense floats against the packed layers' own arithmetic, which is in half precision or rounds activations to 8 bits
    "gptq": 0.05, "awq": 0.05, "bitsandbytes 4": 0.5, "bitsandbytes 8": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in _DEQUANTISED])
def test_dequantised_it_is_a_dense_model_of_the_same_numbers(name: str, wide: Path, tmp_path: Path) -> None:
    """Logits equal the packed model's within the arithmetic of its layers, and those of the numbers that were packed by hand; then it drops and prunes
    as any dense model does. Catches a transposed or shifted unpacking, a scale left out, and layers that stay packed."""
    if name in ("gptq", "awq") and "GPTQMODEL" not in os.environ:
        pytest.importorskip("gptqmodel", reason="gptqmodel is not installed; `make test-quant` installs it")
    folder = tmp_path / "packed"
    folder.mkdir()
    numbers = FORMATS[name](wide, folder)
    ids = torch.randint(4, families.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    packed = load_model(folder, device="cpu", dtype="float32")
    found = load_model(folder, device="cpu", dtype="float32", dequantise=True)
    with torch.no_grad():
        expected, logits = packed.model(ids).logits.float(), found.model(ids).logits
    if name.rpartition(" ")[2] in (
        "W8A8",
        "FP8",
        "FP8_DYNAMIC",
    ):  # activations are quantised too: the weights are compared
        theirs = packed.model.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in found.model.state_dict().items())
    else:
        assert torch.allclose(logits, expected, atol=_ROUNDING.get(name, 1e-5)), (logits - expected).abs().max()
    if name == "bitsandbytes 4":  # its kernel for CPUs computes in half precision
        for key, weight in load_file(wide / "model.safetensors").items():
            if ".layers." in key and weight.dim() == 2:
                assert torch.equal(found.model.get_parameter(key), round_to_nearest(weight, "nf4")), key
    if (
        name == "bitsandbytes 8"
    ):  # LLM.int8() rounds activations as well: the nearest of 255 levels of a row's largest magnitude
        for key, weight in load_file(wide / "model.safetensors").items():
            if ".layers." in key and weight.dim() == 2:
                off = (found.model.get_parameter(key) - weight).abs()
                assert bool((off <= weight.abs().amax(1, keepdim=True) / 220).all()), key  # and half precision
    assert logits.dtype == torch.float32 and not any(map(is_packed, found.model.parameters()))
    assert found.describe().get("quantisation") is None and found.identity["dequantised"] == "true"
    if numbers is not None:
        for key, value in found.model.state_dict().items():
            if ".layers." in key and value.dim() == 2:  # scales are kept in half precision
                assert torch.allclose(value, numbers[key], atol=2e-3 * float(numbers[key].abs().max())), key
    check_prunable(found, "magnitude", Goal(sparsity=0.5))
    Quantised(found, QuantSpec("int8"))
    with found.dropping(DropSpec.parse("attn=1")), torch.no_grad():
        assert not torch.equal(found.model(ids).logits, logits)
    if name == "bitsandbytes 4":
        options: Any = {"method": "magnitude", "sparsity": 0.5, "calibration": "none", "device": "cpu"}
        with pytest.raises(UserError, match="--dequantise"):
            prunescope.sparsify(str(folder), out=str(tmp_path / "sparse"), **options)
        prunescope.sparsify(str(folder), out=str(tmp_path / "sparse"), dequantise=True, **options)
        assert load_model(tmp_path / "sparse", device="cpu").sparsity() == pytest.approx(0.5, abs=0.02)


def test_commands_take_a_packed_checkpoint(wide: Path, tmp_path: Path) -> None:
    """As the target, and alone as the model of sweep and speed. Catches a command that reads packed bytes as numbers: scores, KL or sizes that are not finite."""
    folder = tmp_path / "packed"
    bitsandbytes(wide, folder, load_in_4bit=True)
    dense, target = str(wide), str(folder)
    how: Any = {"device": "cpu", "seed": 0}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("t5 t6 t7\nt8 t9\n", "utf-8")
    short: Any = {"prompts": str(prompts), "max_new_tokens": 4}
    written = prunescope.generate(dense, target, **short, **how)
    assert 0 < written.summary["p"]["kl_dense_target"]["mean"] < 5
    assert len(prunescope.retrieve(dense, target, **how).table())
    tasks: Any = {"tasks": "arithmetic-mc", "limit": 3, "shots": 0}
    scores = prunescope.evaluate([dense, target], **tasks, **how).summary
    assert set(scores) == {dense, target}
    swept = prunescope.sweep(target, target="attn", n="1", samples=2, seq_len=16, cache=False, **tasks, **short, **how)
    sizes = dict(zip(swept.table()["point"].to_pylist(), swept.table()["bytes"].to_pylist(), strict=True))
    assert 0 < sizes["attn-001"] < sizes["dense"] < Storage(load_model(wide, device="cpu")).bytes()
    with pytest.raises(UserError, match="--dequantise"):
        prunescope.sweep(target, quant="int8", **tasks, **short, **how)
    timed = prunescope.speed([dense, target], batch_size="1", length=8, max_new_tokens=4, repeats=1, **how).table()
    memory = dict(zip(timed["model"].to_pylist(), timed["memory_bytes"].to_pylist(), strict=True))
    assert memory[target] < memory[dense]


def test_packed_weights_are_named_where_they_cannot_be_used(wide: Path, tmp_path: Path) -> None:
    """Catches packed bytes that are pruned or rounded as if they were numbers."""
    folder = tmp_path / "packed"
    bitsandbytes(wide, folder, load_in_4bit=True)
    target = load_model(folder, device="cpu")
    assert target.sparsity() == 0
    for work in (
        lambda: Quantised(target, QuantSpec("int8")),
        lambda: check_prunable(target, "magnitude", Goal(sparsity=0.5)),
    ):
        with pytest.raises(UserError, match=r"q_proj\.weight is quantised already"):
            work()


def test_what_counts_as_packed() -> None:
    plain = torch.nn.Parameter(torch.zeros(2, 2))
    assert not is_packed(plain) and not is_packed(plain.half()) and is_packed(torch.zeros(2, dtype=torch.uint8))
    broken = torch.tensor([1.0, float("nan")])
    assert not is_finite(broken) and not is_finite(broken.to(torch.float8_e4m3fn))
    assert is_finite(torch.tensor([1], dtype=torch.int32)) and is_finite(torch.ones(2).to(torch.float8_e4m3fn))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        numbers = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite, they are not
        assert is_finite(numbers) and is_finite(numbers[:0])
        for bad in ("nan", "inf", "-inf"):
            numbers = torch.zeros(3, 5, dtype=dtype)
            numbers[1, 2] = float(bad)
            assert not is_finite(numbers) and not is_finite(numbers.T)
    model = torch.nn.Module()
    model.config = type("Config", (), {})()  # type: ignore[assignment]
    assert format_of(model) is None


def test_a_missing_package_is_named_in_one_line(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers names it; catches a traceback, or a model that is loaded as if its bytes were weights."""
    folder = tmp_path / "packed"
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    by_hand(wide, folder, lambda w: ({"weight": w}, w), settings)
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    with pytest.raises(UserError, match="a package that this model needs is missing: compressed-tensors"):
        load_model(folder, device="cpu")
