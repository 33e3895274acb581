"""What only a GPU runs: products on tensor cores, kernels at the sizes of real models, writing through a CUDA graph. `make test-gpu`.

Everything is compared with float64, with the CPU, or with the model's own `generate()`. No file is read and no network needed.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3_moe import modeling_qwen3_moe

from families import EXPERTS, FAMILIES, tiny_model
from prunescope.compare.columns import compare, compare_final
from prunescope.compare.context import Transcript
from prunescope.compare.generation import generation_rows
from prunescope.compare.head import Head, on_tensor_cores
from prunescope.compare.layerwise import batch_rows, layerwise_rows, lens_head, product_error
from prunescope.compare.metrics import COLUMNS, ERROR_BOUND, compare_hidden, compare_logits
from prunescope.models import generating
from prunescope.models.anatomy import find_anatomy
from prunescope.models.capturing import all_experts, chosen_experts, grouped_experts
from prunescope.models.dropping import DropSpec
from prunescope.models.fusing import norm_way, rotates_plainly
from prunescope.models.generating import Sampling, choose, decoding_way, uniform_draws
from prunescope.models.loaded import LoadedModel
from prunescope.prune.heal import HealPlan, _step
from prunescope.prune.masks import Goal
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.trainable import make_trainable

pytestmark = pytest.mark.gpu

WIDTH, VOCAB = 3584, 152_064  # Qwen2.5-7B
TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, get_vocab=dict)
DROPS = (DropSpec(), DropSpec(attn=(0, 2, 3)), DropSpec(attn=(0, 1, 5), mlp=(1, 2, 5)))
PROMPTS = [[5, 9, 11, 4, 60, 8, 33], [7, 3], [21, 40, 41, 42, 13]]


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def loaded_family(family: str, device: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    model = tiny_model(family).to(device, dtype)
    blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    return LoadedModel(family, model, TOKENIZER, find_anatomy(model), {}, tuple(range(blocks)), blocks)


# --- products on tensor cores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_a_real_head_against_float64(dtype: torch.dtype) -> None:
    """Half-precision products are exact and summed in float32, which tensor cores do to 4e-6 over 3,584 terms. Would catch sums in half
    precision (1e-3), a stride that the padded buffer breaks, and a bias, scale or cap in the wrong place."""
    h, weight = normal(96, WIDTH, seed=1, dtype=dtype), normal(VOCAB, WIDTH, seed=2, scale=0.02, dtype=torch.bfloat16)
    if dtype == torch.float16:
        weight = weight.to(torch.float16)
    head = Head(weight, bias=normal(VOCAB, seed=3, scale=0.1), scale=0.5, softcap=30.0)
    assert on_tensor_cores(h, head.weight)
    found = head.logits(h).double()
    exact = 30 * torch.tanh((h.double() @ weight.double().T + head.bias.double()) * 0.5 / 30)  # type: ignore[union-attr]
    assert (found - exact).norm() / exact.norm() < 6e-6
    assert torch.equal(head.logits(h), head.logits(h))


def test_a_float32_stream_keeps_all_its_digits() -> None:
    """It is split into three parts of 8 bits. With one weight of 1 in a row nothing is summed, so a lost part would show as a lost digit."""
    h, chosen = (
        normal(33, WIDTH, seed=8),
        torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))[:2048].cuda(),
    )
    weight = torch.zeros(2048, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight[torch.arange(2048, device="cuda"), chosen] = 1
    assert on_tensor_cores(h, weight)
    assert torch.equal(Head(weight).logits(h), h[:, chosen])


def test_product_error_says_what_massive_activations_cost() -> None:
    """Three entries of 4000 in every row: the float32 sums then put a KL off by more than the columns' bound, and the run must say so."""
    rows = normal(2, 3, WIDTH, seed=4, dtype=torch.bfloat16)
    head = Head(normal(32_000, WIDTH, seed=5, scale=0.02, dtype=torch.bfloat16))
    pairs = torch.tensor([[0, 1], [1, 2]])
    small = product_error(rows, pairs, head)["kl_dense_target"]["max"]
    rows[..., 5], rows[..., 77] = 4000.0, -2000.0
    large = product_error(rows, pairs, head)["kl_dense_target"]["max"]
    assert small < 1e-3 and large > small


# --- kernels at real sizes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_streams() -> tuple[Tensor, Tensor, Head]:
    """Streams of a few steps of a 7B model's size, each a small change of the one before; pairs as a drop makes them."""
    steps = [normal(1, WIDTH, seed=10)]
    for i in range(40):
        steps.append(steps[-1] + normal(1, WIDTH, seed=11 + i, scale=0.3))
    rows = torch.cat(steps).to(torch.bfloat16)
    head = Head(normal(VOCAB, WIDTH, seed=6, scale=0.02, dtype=torch.bfloat16))
    pairs = torch.stack([torch.arange(1, len(rows)), torch.arange(len(rows) - 1)], 1)
    return rows, pairs, head


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_columns_at_real_size_against_float64(real_streams: tuple[Tensor, Tensor, Head], temperature: float) -> None:
    """The kernels' sums against the plain formulas in float64 on the same logits, within the bounds that docs/metrics.md promises."""
    rows, pairs, head = real_streams
    following = torch.arange(len(pairs)) * 97 % VOCAB
    found = compare(rows, pairs, head, temperature=temperature, next_token=following)
    z = head.logits(rows).double()
    for k, (i, j) in enumerate(pairs.tolist()):
        exact = compare_logits(z[i : i + 1], z[j : j + 1], temperature, following[k : k + 1].cuda())
        exact |= compare_hidden(rows[i : i + 1], rows[j : j + 1])
        for column in COLUMNS:
            relative, absolute = ERROR_BOUND[column]
            value = exact[column].cpu()[0]
            assert abs(found[column][k] - value) <= relative * abs(value) + absolute, column


def test_columns_are_the_same_bits_twice_and_zero_against_themselves(real_streams: tuple[Tensor, Tensor, Head]) -> None:
    """Would catch a race between programs, and sums whose order depends on the launch."""
    rows, pairs, head = real_streams
    first, second = (compare(rows, pairs, head) for _ in range(2))
    assert all(torch.equal(first[column], second[column]) for column in first)
    whole = compare(rows, pairs, head, memory=2**30)
    for column, values in compare(rows, pairs, head, memory=64 * 2**20).items():  # other chunks, the same pairs
        relative, absolute = ERROR_BOUND[column]
        torch.testing.assert_close(values, whole[column], rtol=2 * relative, atol=2 * absolute)
    same = torch.arange(len(rows))
    itself = compare(torch.cat([rows, rows]), torch.stack([same, same + len(rows)], 1), head)
    for column in ("h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target", "kl_target_dense", "js", "tv", "dz_rms"):
        assert itself[column].abs().max() == 0


def test_final_states_of_two_heads_at_real_size(real_streams: tuple[Tensor, Tensor, Head]) -> None:
    """`compare_final` through two heads against float64, a dense row shared by neighbouring rows."""
    rows, _, head = real_streams
    other = Head(head.weight + normal(VOCAB, WIDTH, seed=7, scale=0.002, dtype=torch.bfloat16))
    index = torch.tensor([0, 0, 1, 2, 2])
    found = compare_final(rows[:3], rows[5:10], head, other, index)
    z, z_target = head.logits(rows[:3]).double()[index.cuda()], other.logits(rows[5:10]).double()
    exact = compare_logits(z, z_target)
    for column, values in exact.items():
        relative, absolute = ERROR_BOUND[column]
        torch.testing.assert_close(found[column], values.cpu(), rtol=relative, atol=absolute)


def test_sparsegpt_at_real_size() -> None:
    """The kernels against the float64 objective of the CPU's result on a layer of 2048 inputs, and twice to the bit."""
    n, rows = 2048, 512
    x = normal(4 * n, n, seed=20) @ (torch.eye(n, device="cuda") + 0.02 * normal(n, n, seed=21))
    hessian, weight = x.T @ x, normal(rows, n, seed=22, scale=0.02)
    for case in (Goal(0.5), Goal.parse("2:4")):
        (first,), (second,) = (sparsegpt([weight], hessian, [case])[0] for _ in range(2))
        assert torch.equal(first, second)
        assert int((first == 0).sum()) >= case.count(weight.numel())
        (on_cpu,), _ = sparsegpt([weight.cpu()], hessian.cpu(), [case])

        def lost(pruned: Tensor) -> float:
            change = (weight - pruned.cuda()).double()
            return float(((change @ hessian.double()) * change).sum())

        assert lost(first) == pytest.approx(lost(on_cpu), rel=2e-3)


# --- the whole way, against the CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_neox", "granite"])
def test_layerwise_on_a_gpu_equals_the_cpu(family: str) -> None:
    """Every column of every sublayer and step, float32 models, so that products are float64 on both."""
    on_gpu, on_cpu = (loaded_family(family, device) for device in ("cuda", "cpu"))
    found, expected = (layerwise_rows(model, None, PROMPTS, max_new_tokens=4, stop=False) for model in (on_gpu, on_cpu))
    assert [s.continuation for s in found.sequences] == [s.continuation for s in expected.sequences]
    for column in ("h_cos_dev", "z_cos_dev", "kl_dense_target", "js", "entropy_dense", "nll_target"):
        a, b = (torch.tensor(rows.table[column].to_numpy()) for rows in (found, expected))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


def test_against_a_target_on_a_gpu_equals_the_cpu() -> None:
    dense, target = (loaded_family("llama", "cpu") for _ in range(2))
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.02)
    batch = [Transcript(prompt, [3, 1, 4, 1]) for prompt in PROMPTS]
    expected = batch_rows(dense, target, batch, lens_head(dense, "raw"))
    for model in (dense, target):
        model.model = copy.deepcopy(model.model).cuda()
        model.anatomy = find_anatomy(model.model)
    found = batch_rows(dense, target, batch, lens_head(dense, "raw"))
    for column in ("h_cos_dev", "z_cos_dev", "kl_dense_target", "js"):
        a, b = (torch.tensor(table[column].to_numpy()) for table in (found, expected))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


# --- writing through a CUDA graph --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_the_graph_writes_what_generate_writes(family: str) -> None:
    """Greedy and sampled, dense and dropped, left-padded prompts of three lengths. Would catch a position or mask that stays what it was
    when the graph was captured, a cache slot written twice, and a state of the wrong step."""
    loaded = loaded_family(family, "cuda")
    for spec in DROPS:
        with loaded.dropping(spec):
            assert decoding_way(loaded) == "fixed cache, CUDA graph"
            for sampling in (Sampling(), Sampling(0.9, 20, 0.95, 3)):
                ids, mask = generating._left_padded(PROMPTS, 0, loaded.device)
                draws = uniform_draws(sampling, range(len(PROMPTS)), 24)
                how: Any = (loaded, ids, mask, 24, sampling, draws, [], 0, True)
                (tokens, states), (expected, others) = generating._write_static(*how), generating._write_plain(*how)
                assert torch.equal(tokens, expected)
                torch.testing.assert_close(states, others, atol=1e-4, rtol=1e-4)


def test_generation_rows_on_a_gpu_equal_the_cpu() -> None:
    on_gpu, on_cpu = (loaded_family("llama", device) for device in ("cuda", "cpu"))
    spec = DropSpec(attn=(1, 3))
    found, expected = (generation_rows(m, spec, PROMPTS, max_new_tokens=8, stop=False) for m in (on_gpu, on_cpu))
    for column in ("prompt", "regime", "step", "dense_token", "target_token"):
        assert found.table[column].to_pylist() == expected.table[column].to_pylist()
    for column in ("kl_dense_target", "h_cos_dev", "nll_target"):
        a, b = (torch.tensor(rows.table[column].to_numpy()) for rows in (found, expected))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


def test_a_real_shape_in_bfloat16_takes_the_graph() -> None:
    """Four blocks of Qwen2.5-7B's width: the same tokens as `generate()` up to near ties, and the same bits twice."""
    config = transformers.Qwen2Config(
        hidden_size=WIDTH, intermediate_size=18_944, num_hidden_layers=4, num_attention_heads=28, num_key_value_heads=4, vocab_size=VOCAB,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    loaded = LoadedModel("random", model, TOKENIZER, find_anatomy(model), {}, (0, 1, 2, 3), 4)
    assert norm_way(model.model.norm) == 0  # one kernel each, see fusing.py
    assert rotates_plainly(modeling_qwen2.apply_rotary_pos_emb, torch.bfloat16, model.device)
    assert decoding_way(loaded) == "fixed cache, CUDA graph"
    ids, mask = generating._left_padded(PROMPTS, 0, loaded.device)
    how: Any = (loaded, ids, mask, 16, Sampling(), torch.zeros(3, 16), [], 0, True)
    (tokens, states), (again, same), (expected, _) = (
        write(*how) for write in (generating._write_static,) * 2 + (generating._write_plain,)
    )
    assert torch.equal(tokens, again) and torch.equal(states, same)
    assert float((tokens == expected).cumprod(1).float().mean()) > 0.5


@pytest.mark.parametrize("texts", [2, 32])
def test_many_experts_in_bfloat16_take_the_graph(texts: int) -> None:
    """Two blocks of 128 experts, 8 a token. Two texts gather the weights of what they chose, 32 run every expert. States stay near those of
    `generate()` as long as both have read the same; a second run gives the same bits. Would catch a graph that keeps the choice of the
    captured step: the tokens would be those of other experts from the third step on."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=32_000, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    loaded = LoadedModel("random", model, TOKENIZER, find_anatomy(model), {}, (0, 1), 2)
    assert decoding_way(loaded) == "fixed cache, CUDA graph"
    prompts = [[(5 + 37 * row + 11 * i) % 32_000 for i in range(3 + row % 5)] for row in range(texts)]
    ids, mask = generating._left_padded(prompts, 0, loaded.device)
    how: Any = (loaded, ids, mask, 16, Sampling(), torch.zeros(texts, 16), [], 0, True)
    (tokens, states), (again, same) = generating._write_static(*how), generating._write_static(*how)
    assert torch.equal(tokens, again) and torch.equal(states, same)
    expected, others = generating._write_plain(*how)
    read_same = torch.cat(
        [torch.ones_like(tokens[:, :1]), (tokens == expected).cumprod(1)[:, :-1]], 1
    ).T.bool()  # (steps, texts)
    error = (states.double() - others.double()).norm(dim=-1) / others.double().norm(dim=-1)
    assert float(error[read_same].max()) < 16 * torch.finfo(torch.bfloat16).eps
    assert float(read_same[2:].float().mean()) > 0.25


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 20, 0.95, 3)])
def test_one_graph_writes_batch_after_batch(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches of four, captured once, as `generate()` writes them. Would catch a captured step that reads what belonged to the first
    batch: its keys, its numbers drawn, its ends."""
    loaded = loaded_family("llama", "cuda")
    prompts = [[(7 * i + 5 * j) % 60 + 4 for j in range(4 + i % 4)] for i in range(12)]
    captured: list[int] = []
    plain = torch.cuda.CUDAGraph.capture_begin

    def counted(self: Any, *args: Any, **options: Any) -> None:
        captured.append(1)
        plain(self, *args, **options)

    assert decoding_way(loaded) == "fixed cache, CUDA graph"
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)
    found = generating.continue_texts(loaded, prompts, 20, batch_size=4, sampling=sampling)
    assert len(captured) == 1
    monkeypatch.setattr(generating, "static_problem", lambda loaded: "none of it")
    assert found == generating.continue_texts(loaded, prompts, 20, batch_size=4, sampling=sampling)


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, 50, 0.9)])
def test_the_token_is_that_of_a_cpu(sampling: Sampling) -> None:
    """At the size of a real vocabulary, with words of no probability, and in no more memory than `texts_at_a_time` counts: as float32 divided
    by the temperature 4 bytes a word, as float64 8. Would catch a float64 copy, and a sum in parallel that stops on a word of no probability."""
    turn = torch.Generator().manual_seed(3)
    scores = torch.randn(256, 151_936, generator=turn) * 3
    scores[:, :700] = scores[:, -300:] = scores[::2, 1000:9000] = -torch.inf
    draws = torch.rand(256, generator=turn, dtype=torch.float64)
    draws[:8], draws[8:16] = 0, 1 - 2.0**-53
    held, given = scores.cuda(), draws.cuda()
    choose(held, sampling, given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = choose(held, sampling, given)
    if not sampling.top_k:
        assert torch.cuda.max_memory_allocated() - before < 13 * scores.numel()
    assert scores.gather(1, found.cpu()[:, None]).isfinite().all()
    assert (found.cpu() == choose(scores, sampling, draws)).double().mean() > 0.99  # exp differs in its last bit


def test_as_many_texts_as_fit_are_written_as_by_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,100 prompts of 1 to 40 tokens, sampled: two batches, the second of another length. Would catch rows in the order of the batches."""
    loaded = loaded_family("llama", "cuda")
    prompts = [[(7 * i + 5 * j) % 60 + 4 for j in range(1 + 37 * i % 40)] for i in range(1100)]
    sampling = Sampling(1.0, seed=2)
    found = generating.continue_texts(loaded, prompts, 12, batch_size=None, sampling=sampling)
    monkeypatch.setattr(generating, "static_problem", lambda loaded: "none of it")
    expected = generating.continue_texts(loaded, prompts, 12, batch_size=64, sampling=sampling)
    assert (
        sum(a == b for a, b in zip(found, expected, strict=True)) > 1090
    )  # a draw on a border may fall on either side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("texts", [1, 8, 32, 200])
def test_experts_at_real_size_against_float64(texts: int, dtype: torch.dtype) -> None:
    """A block of 128 experts, 8 a token, by each of the three ways. Would catch a tile that reads past its expert, and sums in half precision."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8
    )
    config._experts_implementation = "eager"
    with torch.device("cuda"):
        module: Any = modeling_qwen3_moe.Qwen3MoeExperts(config)
    for parameter in module.parameters():
        parameter.data.copy_(normal(*parameter.shape, seed=1, scale=0.03))
    module = module.to(dtype)
    index = torch.stack(
        [torch.randperm(128, generator=torch.Generator().manual_seed(i))[:8] for i in range(texts)]
    ).cuda()
    tokens, weights = normal(texts, 2048, seed=2, dtype=dtype), normal(texts, 8, seed=3, dtype=dtype).abs()
    with torch.no_grad():
        ways = (all_experts, grouped_experts, *([chosen_experts] if texts <= 32 else []))  # which gathers 30 GB for 200
        found = [way(module, tokens, index, weights).double() for way in ways]
        expected = copy.deepcopy(module).double()(tokens.double(), index, weights.double())
    for one in found:
        assert (
            float((one - expected).norm() / expected.norm())
            < (4 if dtype == torch.bfloat16 else 32) * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_healing_never_plans_an_attention(compiled: bool) -> None:
    """cuDNN comes first on an H100 and plans every new length, which takes longer than a step; compiled blocks keep what they were traced with."""
    student, teacher = (loaded_family("llama", "cuda", dtype) for dtype in (torch.float32, torch.bfloat16))
    trained = make_trainable(student)
    optimiser = torch.optim.AdamW(list(trained.parameters.values()), fused=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for step, length in enumerate((9, 12, 13)):
            texts = [([5, 9], [7 + row] * length) for row in range(4)]
            _step(student, teacher, trained, optimiser, texts, HealPlan(steps=3, compile=compiled), step)
    names = [event.key for event in profile.key_averages() if "attention" in event.key]
    assert names
    assert not [name for name in names if "cudnn" in name]
