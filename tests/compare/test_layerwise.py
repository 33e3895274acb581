"""The one-pass analysis against brute force: no cache, one forward per step, one sublayer replaced at a time, plain transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_dropping import zeroed_by_hand
from torch import Tensor, nn

from families import FAMILIES, tiny_folder, tiny_model
from prunescope.compare.head import Head
from prunescope.compare.layerwise import layerwise_rows, noise_floor, product_error
from prunescope.compare.metrics import COLUMNS, FLOOR_COLUMNS, compare_hidden, compare_logits, space_of
from prunescope.data.prompts import Prompt, read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.models.anatomy import find_anatomy
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.saving import save_dropped
from prunescope.runs.parts import write_part


def rows_of(table: Any, **wanted: Any) -> dict[str, Any]:
    """The one row with these keys."""
    import pyarrow.compute as pc

    for key, value in wanted.items():
        table = table.filter(pc.equal(table[key], value))
    assert len(table) == 1
    return table.to_pylist()[0]


# --- brute force on the real model -------------------------------------------------------------------------------------


def stream_after(model: Any, ids: Tensor, layer: int, kind: str, replacement: nn.Module | None) -> Tensor:
    """The last position's residual stream right after a sublayer of a plain Llama, whose module is replaced (or gives nothing).

    Written against the text of `LlamaDecoderLayer`; shares nothing with the code under test. Everything before it stays dense; the blocks
    after it are not run.
    """
    block = model.model.layers[layer]
    caught: dict[str, Tensor] = {}

    class ReachedError(Exception):
        pass

    name = "self_attn" if kind == "attn" else "mlp"
    norm = block.post_attention_layernorm

    def catch_middle(_: nn.Module, args: Any) -> None:
        caught["attn"] = args[0]

    def catch_end(_: nn.Module, __: Any, output: Tensor) -> None:
        caught["mlp"] = output
        raise ReachedError

    class Nothing(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            zero = torch.zeros_like(hidden_states)
            return (zero, None) if kind == "attn" else zero

    original = getattr(block, name)
    handles = [norm.register_forward_pre_hook(catch_middle), block.register_forward_hook(catch_end)]
    try:
        setattr(block, name, replacement or Nothing())
        with torch.no_grad(), pytest.raises(ReachedError):
            model(input_ids=ids, use_cache=False)
    finally:
        setattr(block, name, original)
        for handle in handles:
            handle.remove()
    return caught[kind][0, -1]


def brute_force(
    dense: Any, weight: Tensor, ids: list[int], layer: int, kind: str, target: Any, following: int
) -> dict[str, float]:
    block = dense.model.layers[layer]
    name = "self_attn" if kind == "attn" else "mlp"
    read = torch.tensor([ids])
    before = stream_after(dense, read, layer, kind, getattr(block, name))
    after = stream_after(
        dense, read, layer, kind, None if target is None else getattr(target.model.layers[layer], name)
    )
    z, y = before.double() @ weight.T, after.double() @ weight.T
    columns = compare_hidden(before[None], after[None]) | compare_logits(
        z[None], y[None], 1.0, torch.tensor([following])
    )
    return {column: value.item() for column, value in columns.items()}


# A signed or bounded column may lie near zero as a difference of larger parts: its error is relative to the size of these.
SCALE = {
    "z_alpha": "z_orth_rel", "z_para_rel": "z_orth_rel", "h_alpha": "h_orth_rel", "h_para_rel": "h_orth_rel", "dp_top1": "tv",
    "p_cos": "1", "z_cos": "1", "z_cos_centred": "1", "h_cos": "1",
}  # fmt: skip


def relative_errors(found: dict[str, Any], expected: dict[str, float]) -> dict[str, float]:
    scales = expected | {"1": 1.0}
    return {
        column: max(0.0, abs(found[column] - value) - 1e-9)
        / max(abs(value), scales.get(SCALE.get(column, ""), 0.0), 1e-12)
        for column, value in expected.items()
    }


@pytest.fixture(scope="module")
def noisy(smollm2: LoadedModel) -> LoadedModel:
    """The real model with every matrix of its blocks disturbed: a target of the same shape."""
    target = copy.copy(smollm2)
    target.model = copy.deepcopy(smollm2.model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in target.model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    target.anatomy = find_anatomy(target.model)
    target.ref = "noisy"
    return target


@pytest.mark.parametrize("against", ["drop", "noisy weights"])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 3), (torch.float64, 2)])
def test_one_pass_equals_brute_force_on_the_real_model(
    smollm2: LoadedModel, noisy: LoadedModel, against: str, dtype: torch.dtype, steps: int
) -> None:
    """3 prompts x 3 steps. Would catch a stream read at the wrong place or step, lost history, and a wrong context.

    In float64 nothing hides behind rounding: every column agrees to 1e-9. In float32 h and z agree to 2e-4 everywhere, p to 2e-4 in
    nine rows of ten: logits of the raw lens reach 300 here, and what two float32 passes differ by (the noise floor, another on every
    kind of processor) moves single rows of p by up to 2e-3.
    """
    prompts = [Prompt("The capital of France is", "a"), Prompt("Water boils at about", "b"), Prompt("1 2 3 4 5 6", "c")]
    dense, target = in_dtype(smollm2, dtype), in_dtype(noisy, dtype) if against == "noisy weights" else None
    encoded = encode(dense, prompts, steps)
    found = layerwise_rows(dense, target, encoded, max_new_tokens=steps, batch_size=3)
    assert len(found.table) == 60 * sum(len(s.continuation) for s in found.sequences)
    assert set(COLUMNS) <= set(found.table.column_names)
    plain, other = dense.model, None if target is None else target.model
    weight = plain.lm_head.weight.detach().double()
    errors: dict[str, list[float]] = {}
    for i, sequence in enumerate(found.sequences):
        read = list(sequence.prompt)
        for step, token in enumerate(sequence.continuation):
            layer = (7 * step + 3 * i) % 30
            for kind in ("attn", "mlp"):
                expected = brute_force(plain, weight, read, layer, kind, other, token)
                row = rows_of(found.table, prompt=i, step=step, layer=layer, sublayer=kind)
                assert row["position"] == len(read) - 1
                for column, error in relative_errors(row, expected).items():
                    errors.setdefault(column, []).append(error)
            read.append(token)
        with torch.no_grad():  # the continuation itself is the plain model's greedy choice
            assert plain(input_ids=torch.tensor([read[:-1]])).logits[0, -1].argmax() == read[-1]
    for column, found_errors in errors.items():
        ordered = sorted(found_errors)
        if dtype == torch.float64:
            assert ordered[-1] <= 1e-9, column
        else:
            assert ordered[int(0.9 * len(ordered))] <= 2e-4, column
            follows_p = space_of(column) == "p" or column.startswith("dz_top5")
            assert ordered[-1] <= (4e-3 if follows_p else 2e-4), column


def in_dtype(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    if loaded.dtype == dtype:
        return loaded
    converted = copy.copy(loaded)
    converted.model = copy.deepcopy(loaded.model).to(dtype)
    converted.anatomy = find_anatomy(converted.model)
    return converted


def test_a_drop_spec_equals_dropping_in_turn_where_it_drops(smollm2: LoadedModel) -> None:
    encoded = encode(smollm2, [Prompt("Once upon a time", "a")], 3)
    every = layerwise_rows(smollm2, None, encoded, max_new_tokens=3).table.to_pylist()
    some = layerwise_rows(smollm2, DropSpec(attn=(2, 29)), encoded, max_new_tokens=3).table.to_pylist()
    for a, b in zip(every, some, strict=True):
        if b["sublayer"] == "attn" and b["layer"] in (2, 29):
            assert a == b
        else:
            assert all(b[column] == 0 for column in FLOOR_COLUMNS)
            assert b["h_cos"] == b["z_cos"] == b["p_cos"] == 1
            assert b["h_under_floor"]


def test_a_model_against_itself_is_zero_everywhere(smollm2: LoadedModel) -> None:
    """As a second model, through the path of a target: all deviations at most 1e-6, ranks and agreement exact."""
    encoded = encode(smollm2, read_prompts()[5:7], 4)
    found = layerwise_rows(smollm2, copy.copy(smollm2), encoded, max_new_tokens=4)
    table = found.table
    for column in FLOOR_COLUMNS:
        assert table[column].to_numpy().__abs__().max() <= 1e-6, column
    for column, value in (("top1_agree", 1), ("top5_overlap", 1), ("rank_in_target", 0)):
        assert (table[column].to_numpy() == value).all()
    # with the cache on and off: what differs is rounding alone
    for way in ("batched_against_single", "cache_against_no_cache"):
        assert found.floor[way]["kl_dense_target"] <= 1e-6
        assert found.floor[way]["h_cos_dev"] <= 1e-6
        assert found.floor[way]["js"] <= 1e-6
    assert found.floor["floor"]["h_cos_dev"] > 0, "a floor of exactly zero would mean that nothing was measured"


def test_batches_of_any_size_give_the_same_numbers(smollm2: LoadedModel) -> None:
    prompts = [Prompt("Hello", "a"), Prompt("A list of colours: red, green, blue,", "b"), Prompt("2 + 2 =", "c")]
    encoded = encode(smollm2, prompts, 5)
    tables = [layerwise_rows(smollm2, None, encoded, max_new_tokens=5, batch_size=size).table for size in (1, 3)]
    for column in ("h_cos_dev", "kl_dense_target", "z_orth_rel", "js"):
        a, b = (torch.from_numpy(t[column].to_numpy().copy()) for t in tables)
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
    for column in ("prompt", "step", "position", "layer"):
        assert tables[0][column].equals(tables[1][column])


# --- every family, on tiny models --------------------------------------------------------------------------------------


def hand_target(dense: Any, target: Any, ids: Tensor, spec_layer: int, kind: str, names: tuple[str, ...]) -> Tensor:
    """Block output of a family's own block with one branch's modules taken from the target, everything before it dense."""
    blocks, others = (
        next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 6) for model in (dense, target)
    )
    caught: list[Tensor] = []
    handle = blocks[spec_layer].register_forward_hook(
        lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    originals = {name: getattr(blocks[spec_layer], name) for name in names}
    try:
        for name in names:
            setattr(blocks[spec_layer], name, getattr(others[spec_layer], name))
        with torch.no_grad():
            dense(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        for name, module in originals.items():
            setattr(blocks[spec_layer], name, module)
    return caught[0]


MLP_BRANCH = {  # modules of the MLP branch, norms included, by family; default is Llama's
    "gemma2": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    "gemma3": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    "olmo2": ("mlp", "post_feedforward_layernorm"),
    "gpt2": ("ln_2", "mlp"),
    "opt": ("final_layer_norm", "fc1", "fc2"),
    "falcon": ("mlp",),  # reads the norm of the attention, which stays dense in this comparison
    "falcon_new": ("ln_mlp", "mlp"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_mlp_reads_the_dense_stream_in_every_family(family: str, tmp_path: Path) -> None:
    """h after the target's MLP must be the block's output with just that branch exchanged: sequential, parallel, MoE, post-norm, scaled."""
    dense = load_model(tiny_folder(family, tmp_path / "a"), device="cpu")
    target = load_model(tiny_folder(family, tmp_path / "b", seed=1), device="cpu")
    if (
        family == "falcon"
    ):  # one norm for both branches: make it the same, so that exchanging the MLP alone is the whole branch
        for a, b in zip(dense.anatomy.blocks, target.anatomy.blocks, strict=True):
            b.mlp.pre.load_state_dict(a.mlp.pre.state_dict())  # type: ignore[union-attr]
    ids = list(range(5, 14))
    found = layerwise_rows(dense, target, [ids], max_new_tokens=1, temperature=1.0)
    names = MLP_BRANCH.get(family, ("post_attention_layernorm", "mlp"))
    for layer in (0, 3, 5):
        dense_out = hand_target(dense.model, dense.model, torch.tensor([ids]), layer, "mlp", names)[0, -1]
        target_out = hand_target(dense.model, target.model, torch.tensor([ids]), layer, "mlp", names)[0, -1]
        expected = compare_hidden(dense_out[None], target_out[None])
        row = rows_of(found.table, prompt=0, step=0, layer=layer, sublayer="mlp")
        for column, value in expected.items():
            assert row[column] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), (layer, column)


ATTENTION_BRANCH = {  # modules of the attention branch, norms included, by family; default is Llama's
    "gemma2": ("input_layernorm", "self_attn", "post_attention_layernorm"),
    "gemma3": ("input_layernorm", "self_attn", "post_attention_layernorm"),
    "olmo2": ("self_attn", "post_attention_layernorm"),
    "gpt2": ("ln_1", "attn"),
    "gpt_neox": ("input_layernorm", "attention"),
    "gpt_neox_sequential": ("input_layernorm", "attention"),
    "opt": ("self_attn_layer_norm", "self_attn"),
    "falcon": ("self_attention",),
    "falcon_new": ("ln_attn", "self_attention"),
    "falcon_alibi": ("input_layernorm", "self_attention"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_attention_sees_the_dense_history_in_every_family(family: str, tmp_path: Path) -> None:
    """h after the target's attention, by hand: that branch exchanged in the block, its MLP silenced, so that the block's output is the
    stream after attention. Sliding windows, fused and grouped heads, latent attention and ALiBi get the masks and positions they need."""
    dense = load_model(tiny_folder(family, tmp_path / "a"), device="cpu")
    target = load_model(tiny_folder(family, tmp_path / "b", seed=1), device="cpu")
    if family == "falcon":
        for a, b in zip(dense.anatomy.blocks, target.anatomy.blocks, strict=True):
            b.attn.pre.load_state_dict(a.attn.pre.state_dict())  # type: ignore[union-attr]
    ids = list(range(5, 17))
    found = layerwise_rows(dense, target, [ids], max_new_tokens=1)
    names = ATTENTION_BRANCH.get(family, ("input_layernorm", "self_attn"))
    for layer in (0, 2, 3):
        handles = zeroed_by_hand(dense.model, family, DropSpec(mlp=(layer,)))
        outs = [
            hand_target(dense.model, m.model, torch.tensor([ids]), layer, "attn", names)[0, -1] for m in (dense, target)
        ]
        for handle in handles:
            handle.remove()
        row = rows_of(found.table, prompt=0, step=0, layer=layer, sublayer="attn")
        assert row["h_orth_rel"] > 1e-3
        for column, value in compare_hidden(outs[0][None], outs[1][None]).items():
            assert row[column] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), (layer, column)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lens", ["raw", "final-norm"])
def test_the_last_stream_through_the_final_norm_is_the_model(family: str, lens: Any, tmp_path: Path) -> None:
    """nll of the last block under the final-norm lens is the model's own: soft-capping, scales and biases are in; raw differs."""
    dense = load_model(tiny_folder(family, tmp_path), device="cpu")
    found = layerwise_rows(dense, None, [[5, 9, 4, 7]], max_new_tokens=3, lens=lens)
    sequence = found.sequences[0]
    with torch.no_grad():
        logits = dense.model(input_ids=torch.tensor([sequence.read])).logits[0, 3:].log_softmax(-1)
    own = [-logits[i, token].item() for i, token in enumerate(sequence.continuation)]
    ours = [rows_of(found.table, step=i, layer=5, sublayer="mlp")["nll_dense"] for i in range(len(own))]
    if lens == "final-norm":
        assert ours == pytest.approx(own, rel=1e-4, abs=1e-5)
    else:
        assert any(abs(a - b) > 1e-3 for a, b in zip(ours, own, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_itself_is_exactly_zero(family: str, dtype: str, tmp_path: Path) -> None:
    """As a second model in memory; would catch a sum of branches in another order, which in bf16 is no small thing."""
    folder = tiny_folder(family, tmp_path)
    a, b = (load_model(folder, device="cpu", dtype=dtype) for _ in range(2))
    found = layerwise_rows(a, b, [[5, 6, 7], [9, 4, 12, 30, 8]], max_new_tokens=3)
    for column in FLOOR_COLUMNS:
        assert (found.table[column].to_numpy() == 0).all(), column


@pytest.mark.parametrize("form", ["recipe", "zeroed", "compact"])
def test_checkpoints_of_a_drop_compare_like_the_drop(form: Any, dense: LoadedModel, tmp_path: Path) -> None:
    """A target folder of any format gives the rows of the drop spec it was made from; compact ones lack whole blocks."""
    spec = DropSpec.parse("block=1,4")
    (tmp_path / form).mkdir()
    save_dropped(dense, spec, tmp_path / form, form)
    encoded = [[5, 6, 7], [9, 4, 12, 30, 8]]
    by_spec = layerwise_rows(dense, spec, encoded, max_new_tokens=4).table.to_pylist()
    by_folder = layerwise_rows(
        dense, load_model(tmp_path / form, device="cpu"), encoded, max_new_tokens=4
    ).table.to_pylist()
    for a, b in zip(by_spec, by_folder, strict=True):
        assert (a["layer"], a["sublayer"]) == (b["layer"], b["sublayer"])
        for column in ("h_cos_dev", "z_cos_dev", "kl_dense_target"):
            assert b[column] == pytest.approx(a[column], rel=1e-4, abs=1e-9)


# --- what cannot be compared -------------------------------------------------------------------------------------------


def test_models_that_do_not_belong_together_are_refused(dense: LoadedModel, tmp_path: Path) -> None:
    import transformers

    from families import CONFIGS, tiny_tokenizer

    def variant(name: str, **changes: Any) -> LoadedModel:
        config = CONFIGS["llama"]()
        for key, value in changes.items():
            setattr(config, key, value)
        folder = tmp_path / name
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return load_model(folder, device="cpu")

    for changes, message in (
        ({"vocab_size": 70}, "vocabulary of 70 tokens"),
        ({"hidden_size": 64, "head_dim": 16}, "hidden size 64"),
        ({"num_hidden_layers": 4}, "4 blocks"),
    ):
        with pytest.raises(UserError, match=message):
            layerwise_rows(dense, variant(str(changes)[:20].replace("'", ""), **changes), [[5, 6]], max_new_tokens=1)
    dense.drop("attn=1")
    with pytest.raises(UserError, match="must be whole"):
        layerwise_rows(dense, None, [[5, 6]], max_new_tokens=1)


def test_prompts_that_do_not_fit_are_refused(dense: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"'long' has 60 tokens.*context of 64"):
        encode(dense, [Prompt(" ".join(["w5"] * 60), "long")], 8)
    with pytest.raises(UserError, match="no tokens"):
        encode(dense, [Prompt(" ", "blank")], 8)
    with pytest.raises(UserError, match="no chat template"):
        encode(dense, [Prompt("w5", "x")], 8, chat=True)
    with pytest.raises(UserError, match="max-new-tokens"):
        encode(dense, [Prompt("w5", "x")], 0)


def test_overflowing_activations_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e30)
    folder = tiny_folder("llama", tmp_path / "m")
    model.save_pretrained(folder)
    dense = load_model(folder, device="cpu")
    with torch.no_grad():
        dense.model.lm_head.weight.mul_(1e20)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        layerwise_rows(dense, None, [[5, 6]], max_new_tokens=1)


def test_shipped_prompts_are_of_the_three_kinds() -> None:
    prompts = read_prompts()
    kinds = [prompt.kind for prompt in prompts]
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 12
    assert all(kinds.count(kind) >= 4 for kind in ("multiple-choice", "arithmetic", "open-ended"))
    assert len(set(kinds)) == 3


def test_too_little_memory_is_said_before_any_work(dense: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"--memory-mb 1: this vocabulary needs at least \d+"):
        layerwise_rows(dense, None, [[5, 6]], max_new_tokens=1, memory=2**20)


def test_damaged_parts_are_computed_again(dense: LoadedModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 1, "parts": tmp_path}
    whole = layerwise_rows(dense, None, [[5, 6], [7, 8]], **options).table
    (tmp_path / "part-00001.parquet").write_bytes(b"PAR1 cut off")
    assert layerwise_rows(dense, None, [[5, 6], [7, 8]], **options).table.equals(whole)
    (tmp_path / "part-state.json").write_text("{ damaged")
    assert layerwise_rows(dense, None, [[5, 6], [7, 8]], **options).table.equals(whole)


def test_the_noise_floor_is_kept_with_the_first_batch(
    dense: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a floor that a resumed run measures again, and parts of a run from disk, which hold none, that are taken to have one."""
    options: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 1, "parts": tmp_path}
    measured: list[int] = []

    def measure(*arguments: Any) -> dict[str, Any]:
        measured.append(1)
        return noise_floor(*arguments)

    monkeypatch.setattr("prunescope.compare.layerwise.noise_floor", measure)
    first = layerwise_rows(dense, None, [[5, 6], [7, 8]], **options)
    again = layerwise_rows(dense, None, [[5, 6], [7, 8]], **options)
    assert len(measured) == 1 and again.floor == first.floor and again.table.equals(first.table)
    assert first.table.schema.metadata is None
    write_part(tmp_path, 0, pq.read_table(tmp_path / "part-00000.parquet").replace_schema_metadata(None))
    bare = layerwise_rows(dense, None, [[5, 6], [7, 8]], **options)
    assert len(measured) == 2 and bare.floor == first.floor and bare.table.equals(first.table)


def test_the_error_of_the_product_is_measured() -> None:
    """A head whose float32 sums are wrong must be seen: the same rows, with logits that are off by 1e-3 of themselves."""

    class Careless(Head):
        def logits(self, h: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
            z = super().logits(h, dtype, out)
            return z if dtype == torch.float64 else z.mul_(1.001)

    weight = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    pairs = torch.tensor([(slot, slot - 1) for slot in range(1, 5)])
    good, bad = product_error(rows, pairs, Head(weight)), product_error(rows, pairs, Careless(weight))
    assert good["pairs"] == 8
    assert good["dz_rms"]["max"] < 1e-5
    assert bad["dz_rms"]["median"] == pytest.approx(1e-3, rel=1e-2)
    assert bad["kl_dense_target"]["max"] > 1e-4
