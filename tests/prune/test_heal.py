"""Healing against plain PyTorch written here by hand, in float64, and what it may not touch: zeros and dropped branches."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import VOCAB, tiny_folder, tiny_model
from prunescope.data.traces import padded
from prunescope.errors import UserError
from prunescope.models.attending import any_length
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.residual import watching
from prunescope.prune.distil_loss import divergence_and_gradient, forward_kl
from prunescope.prune.heal import HealPlan, Text, _step, heal, held_out_kl, learning_rate, order
from prunescope.prune.reconstruct import reconstruction_error
from prunescope.prune.trainable import make_trainable

PLAN = HealPlan(steps=3, batch_size=4, learning_rate=0.01, warmup=0.5, check_every=1, weight_decay=0.1, chunk=7)


def some_texts(count: int, seed: int = 0) -> list[Text]:
    """Prompts of 1 to 4 tokens and continuations of 1 to 9, so that padding matters."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        prompt, new = (int(torch.randint(1, most, (), generator=generator)) for most in (5, 10))
        ids = torch.randint(4, VOCAB, (prompt + new,), generator=generator).tolist()
        texts.append((ids[:prompt], ids[prompt:]))
    return texts


def pair(
    tmp_path: Path, family: str = "llama", drop: str | None = None, dtype: str = "float64"
) -> tuple[LoadedModel, LoadedModel]:
    """A student of other weights than the teacher's."""
    for name, seed in (("teacher", 0), ("student", 1)):
        if not (tmp_path / name).exists():
            tiny_folder(family, tmp_path / name, seed)
    student = load_model(tmp_path / "student", device="cpu", dtype=dtype, drop=drop)
    return student, load_model(tmp_path / "teacher", device="cpu", dtype=dtype)


def plain_kl(student: Any, teacher: Any, texts: list[Text]) -> Tensor:
    """The mean KL over counted tokens, text by text without padding, from whole logits and torch's own kl_div."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, continuation in texts:
        ids = torch.tensor([[*prompt, *continuation]])
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        q = student(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total + torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        count += len(continuation)
    return total / count


# --- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunked_loss_and_gradients_are_those_of_whole_logits(chunk: int) -> None:
    """A chunk left out or counted twice, p and q exchanged, a softcap or scale without its derivative, a head's gradient not summed."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, teacher_h, weight, other = draw(13, 6), draw(13, 4), draw(50, 6), draw(50, 4)
    h.requires_grad_()
    weight.requires_grad_()

    def project(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight.T * 0.7 / 3) * 3

    found = forward_kl(project, h, lambda x: x @ other.T, teacher_h, chunk=chunk, weights=[weight])
    (found * 0.3).backward()
    gradients = [h.grad, weight.grad]
    p, q = (teacher_h @ other.T).softmax(-1), project(h).softmax(-1)
    expected = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected * 0.3, [h, weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_the_loss_of_half_precision_logits_is_taken_in_float32() -> None:
    z, teacher_z = torch.randn(4, 1000).bfloat16(), torch.randn(4, 1000).bfloat16()
    divergence, gradient = divergence_and_gradient(z, teacher_z)
    assert divergence.dtype == gradient.dtype == torch.float32
    exact, exact_gradient = divergence_and_gradient(z.double(), teacher_z.double())
    torch.testing.assert_close(divergence.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_against_float64(dtype: torch.dtype) -> None:
    """Rows that end within a block, one word that is certain, equal rows; in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from prunescope.prune.distil_kernels import rows_divergence

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    z, teacher_z = (torch.randn(4, 4100, generator=generator).mul(5).to(dtype) for _ in range(2))
    z[0, 7], teacher_z[1, 4099], teacher_z[2] = 80, 80, z[2]
    exact, exact_gradient = divergence_and_gradient(z.double(), teacher_z.double())
    divergence, gradient = rows_divergence(z.to(device), teacher_z.clone().to(device))
    assert float(divergence) == pytest.approx(float(exact), rel=1e-5)
    assert (
        float((gradient.double().cpu() - exact_gradient).norm() / exact_gradient.norm())
        < {2: 4e-3, 4: 1e-5}[z.element_size()]
    )


@pytest.mark.parametrize("family", ["gemma2", "granite", "gpt2", "opt", "falcon", "mixtral"])
def test_held_out_divergence_of_every_family(family: str, tmp_path: Path) -> None:
    """A norm, scale or softcap in front of the head that is left out; a place that is one off."""
    student, teacher = pair(tmp_path, family, dtype="float32")
    texts = some_texts(5)
    with torch.no_grad():
        expected = float(plain_kl(student.model, teacher.model, texts))
    assert held_out_kl(student, teacher, texts, PLAN) == pytest.approx(expected, rel=1e-4)


# --- the loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_three_steps_are_those_of_plain_pytorch(micro_batch: int | None, tmp_path: Path) -> None:
    """Batches, mean over tokens, clipping, warm-up, decay and AdamW as documented, with a branch dropped; to 1e-8 in every weight."""
    student, teacher = pair(tmp_path, drop="attn=2;mlp=4")
    plan = dataclasses.replace(PLAN, micro_batch=micro_batch, clip=0.5)
    texts, held_out = some_texts(10), some_texts(3, seed=9)
    healed = heal(student, teacher, make_trainable(student), texts, held_out, plan)

    by_hand, _ = pair(tmp_path, drop="attn=2;mlp=4")
    blocks = [p for name, p in by_hand.model.named_parameters() if "layers." in name or name == "model.norm.weight"]
    optimiser = torch.optim.AdamW(blocks, weight_decay=0.1)
    rates = [0.01 / 2, 0.01, 0.01]  # half of three steps are two; the third is the first of the decay
    best, found = math.inf, []
    for step, rate in enumerate(rates):
        batch = [texts[i] for i in order(10, plan, step)]
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        loss = plain_kl(by_hand.model, teacher.model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(blocks, 0.5)
        optimiser.step()
        found.append((float(loss.detach()), float(norm)))
        with torch.no_grad():
            kl = float(plain_kl(by_hand.model, teacher.model, held_out))
        if kl < best:
            best, kept = kl, {name: p.detach().clone() for name, p in by_hand.model.named_parameters()}
    assert [row["learning_rate"] for row in healed.rows] == pytest.approx(rates)
    assert [row["loss"] for row in healed.rows] == pytest.approx([loss for loss, _ in found], rel=1e-9)
    assert [row["gradient_norm"] for row in healed.rows] == pytest.approx([norm for _, norm in found], rel=1e-7)
    assert healed.kl_best == pytest.approx(best, rel=1e-9) and healed.kl_best < healed.kl_before
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(parameter, kept[name], rtol=0, atol=1e-8, msg=name)


def test_batches_take_every_text_once_a_round() -> None:
    """Rounds that do not end with a step: the first and last texts of a round were drawn from the wrong one."""
    plan = HealPlan(steps=10, batch_size=4)
    numbers = [number for step in range(7) for number in order(7, plan, step)]
    rounds = [numbers[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds) and rounds[0] != rounds[1]


@pytest.mark.parametrize(("decay", "last"), [("cosine", 0.0245), ("linear", 0.1), ("constant", 1.0)])
def test_learning_rates(decay: Any, last: float) -> None:
    plan = HealPlan(steps=12, learning_rate=1.0, warmup=2 / 12, decay=decay)
    assert [learning_rate(plan, step) for step in (0, 1, 2, 11)] == pytest.approx([0.5, 1, 1, last], abs=1e-4)


def test_what_counts_is_what_was_written() -> None:
    tokens, counts = padded([([5, 6], [7]), ([], [8, 9, 10, 11])])
    assert tokens.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert counts.tolist() == [[False, False, True, False], [False, True, True, True]]


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_reconstruction_is_local_and_leads_to_the_dense_stream(family: str, tmp_path: Path) -> None:
    """Sublayer by sublayer with the block's own modules: the target is where the next kept sublayer begins, and no gradient passes a sublayer."""
    student, teacher = pair(tmp_path, family, drop="attn=2;mlp=2,5", dtype="float64")
    tokens = torch.randint(4, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    read = torch.arange(7) < torch.tensor([[7], [4]])
    found = reconstruction_error(student, teacher, tokens, read)
    streams: dict[str, list[Any]] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        with watching(model, streams.setdefault(name, []).append), torch.no_grad():
            model.model(input_ids=tokens, use_cache=False)
    dense = {(one.layer, one.kind): one for one in streams["teacher"]}
    gone = {(2, "attn"), (2, "mlp"), (5, "mlp")}
    kept = [place for place in dense if place not in gone]
    errors = []
    for one in streams["student"]:
        place = (one.layer, one.kind)
        if place in gone:
            continue
        later = kept[kept.index(place) + 1 :]
        target = dense[later[0]].before if later else dense[5, "mlp"].after
        errors.append(((one.after - target)[read] ** 2).sum() / ((target - dense[place].before)[read] ** 2).sum())
    assert float(found.detach()) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-9)
    found.backward()
    first = next(student.anatomy.blocks[0].attn.modules[0].parameters()).grad
    student.model.zero_grad()
    with torch.no_grad():
        for parameter in student.anatomy.blocks[4].module.parameters():
            parameter.mul_(1.5)
    reconstruction_error(student, teacher, tokens, read).backward()
    again = next(student.anatomy.blocks[0].attn.modules[0].parameters()).grad
    assert first is not None and again is not None and bool(first.any())
    torch.testing.assert_close(first, again)


def test_a_first_stage_of_reconstruction_comes_before(tmp_path: Path) -> None:
    student, teacher = pair(tmp_path, drop="attn=2")
    plan = dataclasses.replace(PLAN, reconstruct=4, steps=2, check_every=3)
    healed = heal(student, teacher, make_trainable(student), some_texts(10), some_texts(3, 9), plan)
    assert [row["stage"] for row in healed.rows] == ["reconstruct"] * 4 + ["distil"] * 2
    assert [row["step"] for row in healed.rows if row["held_out_kl"] is not None] == [3, 4, 6]
    assert healed.rows[3]["loss"] < healed.rows[0]["loss"]
    assert [row["learning_rate"] for row in healed.rows[4:]] == [0.01, 0.01]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_blocks_give_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo alone, which is quick. Compiled code that is not taken off again would write with the wrong cache."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    curves = []
    for chosen in (False, True):
        student, teacher = pair(tmp_path, drop="attn=2")
        plan = dataclasses.replace(PLAN, steps=2, compile=chosen)
        texts = [(prompt[:1] * 2, continuation[:1] * 6) for prompt, continuation in some_texts(13)]  # of one length
        healed = heal(student, teacher, make_trainable(student), texts[3:], texts[:3], plan)
        curves.append([row["loss"] for row in healed.rows])
        assert all(block.module._compiled_call_impl is None for block in student.anatomy.blocks)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_new_lengths_and_drops_compile_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each length, each number of texts, or each block would make every step of a real run wait for the compiler."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    counts, teacher = [], pair(tmp_path)[1]
    plan = dataclasses.replace(PLAN, batch_size=8, compile=True)
    for drop, lengths in (("attn=2", (5, 7)), ("attn=1,2", (8, 9, 11, 12, 6)), ("attn=1", (13, 14))):
        student = pair(tmp_path, drop=drop)[0]
        trained = make_trainable(student)
        optimiser = torch.optim.AdamW(list(trained.parameters.values()))
        for step, length in enumerate(lengths):
            texts: list[Text] = [([5] * 2, [6 + row] * (length - 2)) for row in range(2 + step)]
            _step(student, teacher, trained, optimiser, texts, plan, step)
        counts.append(len(graphs))
    assert counts == [
        8,
        8,
        8,
    ]  # teacher, first block, other blocks, blocks without attention; for one length, then for any


def test_no_pass_attends_through_cudnn(tmp_path: Path) -> None:
    """Which plans every new length for longer than a small model's step takes. A stage left out, or a setting that stays after an error."""
    seen = []
    student, teacher = pair(tmp_path)
    for loaded in (student, teacher):
        loaded.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    plan = dataclasses.replace(PLAN, reconstruct=1, steps=1, micro_batch=2)
    heal(student, teacher, make_trainable(student), some_texts(5), some_texts(3, 9), plan)
    assert len(seen) > 8
    assert not any(seen)
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        with pytest.raises(ZeroDivisionError), any_length():
            1 / 0  # noqa: B018
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    torch.backends.cuda.enable_cudnn_sdp(True)


# --- zeros ---------------------------------------------------------------------------------------------------------------


def pruned(student: LoadedModel, pattern: str) -> dict[str, Tensor]:
    """Zero half of every block's matrices in place; gives the masks."""
    masks = {}
    with torch.no_grad():
        for name, weight in student.model.named_parameters():
            if "layers." in name and weight.dim() == 2:
                groups = weight.abs().view(-1, 4 if pattern == "2:4" else weight.shape[1])
                least = groups.argsort(-1)[:, : groups.shape[1] // 2]
                mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, least, True).view_as(weight)
                weight.masked_fill_(mask, -0.0)
                masks[name] = mask
    return masks


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_and_everything_else_moves(pattern: str, rank: int | None, tmp_path: Path) -> None:
    """Weight decay, momentum or a merged low-rank product that fills a zero; a mask so wide that nothing learns."""
    student, teacher = pair(tmp_path)
    masks = pruned(student, pattern)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    trained = make_trainable(student, rank=rank)
    healed = heal(student, teacher, trained, some_texts(10), some_texts(3, 9), PLAN)
    trained.merge()
    assert healed.kl_best < healed.kl_before
    after = dict(student.model.named_parameters())
    assert set(after) == set(before)
    for name, mask in masks.items():
        assert torch.equal(after[name] == 0, mask), name
        assert float((after[name] != before[name])[~mask].double().mean()) > 0.99, name
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_low_rank_is_what_peft_computes_where_nothing_is_pruned(tmp_path: Path) -> None:
    """Scale, orientation and which factor is zero at the start, against peft's own layers with the same factors."""
    from peft import LoraConfig, get_peft_model

    student, _ = pair(tmp_path)
    other = tiny_model("llama", seed=1).double()
    trained = make_trainable(student, rank=3, alpha=12)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers is about to remove
        wrapped = get_peft_model(other, LoraConfig(r=3, lora_alpha=12, target_modules=names, lora_dropout=0.0))
    theirs = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters() if "lora" in n}
    assert len(theirs) == len(trained.parameters)
    with torch.no_grad():
        for name, p in trained.parameters.items():
            assert bool(p.any()) == name.endswith(".a")
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
            where = name.replace("weight.a", "lora_A.default.weight").replace("weight.b", "lora_B.default.weight")
            theirs[where].copy_(p)
    ids = torch.randint(0, VOCAB, (2, 9))
    outputs = [model(input_ids=ids).logits for model in (student.model, wrapped)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for out in outputs:
        out.square().sum().backward()
    for name, p in trained.parameters.items():
        where = name.replace("weight.a", "lora_A.default.weight").replace("weight.b", "lora_B.default.weight")
        torch.testing.assert_close(p.grad, theirs[where].grad, rtol=1e-8, atol=1e-8)
    trained.merge()
    torch.testing.assert_close(student.model(input_ids=ids).logits, outputs[0], rtol=1e-9, atol=1e-9)


def test_branches_that_are_gone_are_not_trained(tmp_path: Path) -> None:
    student, teacher = pair(tmp_path, drop="attn=0;mlp=3")
    held = [*student.anatomy.blocks[0].attn.modules, *student.anatomy.blocks[3].mlp.modules]
    before = [p.detach().clone() for module in held for p in module.parameters()]
    trained = make_trainable(student)
    assert not any("layers.0.self_attn" in name or "layers.3.mlp" in name for name in trained.parameters)
    heal(student, teacher, trained, some_texts(10), some_texts(3, 9), PLAN)
    assert all(map(torch.equal, before, (p for module in held for p in module.parameters())))


# --- resume and ends -----------------------------------------------------------------------------------------------------


def interrupted(step: Any, last: int) -> Any:
    def stopping(*args: Any) -> Any:
        if args[6] == last:
            raise KeyboardInterrupt
        return step(*args)

    return stopping


@pytest.mark.parametrize("rank", [None, 2])
def test_an_interrupted_run_goes_on_with_the_same_numbers(
    rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two checks: curve, weights and the best are those of a run that nobody disturbed, to the bit, own texts
    included; damaged files begin it again."""
    plan = dataclasses.replace(PLAN, steps=6, check_every=2, on_policy=0.5)
    texts, held_out = some_texts(10), some_texts(3, 9)
    found = []
    for name, killed in (("whole", False), ("cut", True)):
        (tmp_path / name).mkdir()
        if killed:
            student, teacher = pair(tmp_path)
            with monkeypatch.context() as patch:
                import prunescope.prune.heal as module

                patch.setattr(module, "_step", interrupted(module._step, 5))
                with pytest.raises(KeyboardInterrupt):
                    heal(
                        student,
                        teacher,
                        make_trainable(student, rank=rank),
                        texts,
                        held_out,
                        plan,
                        folder=tmp_path / name,
                    )
        student, teacher = pair(tmp_path)
        trained = make_trainable(student, rank=rank)
        healed = heal(student, teacher, trained, texts, held_out, plan, folder=tmp_path / name)
        trained.merge()
        found.append((healed, dict(student.model.named_parameters())))
    (whole, weights), (cut, others) = found
    assert [{**row, "seconds": 0} for row in whole.rows] == [{**row, "seconds": 0} for row in cut.rows]
    assert [row["on_policy"] for row in whole.rows] == [False, True] * 3
    assert (whole.kl_best, whole.best_step, whole.tokens) == (cut.kl_best, cut.best_step, cut.tokens)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    student, teacher = pair(tmp_path)
    with pytest.raises(UserError, match="begun with other"):
        heal(
            student,
            teacher,
            make_trainable(student, rank=rank),
            texts,
            held_out,
            plan,
            folder=tmp_path / "cut",
            key="x",
        )
    for name in ("part-state.safetensors", "part-best.safetensors"):  # cut off by a disk or a copy: a traceback before
        kept = tmp_path / "cut" / name
        kept.write_bytes(kept.read_bytes()[:-8])
        student, teacher = pair(tmp_path)
        trained = make_trainable(student, rank=rank)
        again = heal(student, teacher, trained, texts, held_out, plan, folder=tmp_path / "cut")
        assert [{**row, "seconds": 0} for row in again.rows] == [{**row, "seconds": 0} for row in whole.rows]


def test_the_best_is_kept_and_a_run_that_gets_worse_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate that only harms: the weights left are the first ones, patience ends the run, and it is said what to change."""
    student, teacher = pair(tmp_path)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    plan = dataclasses.replace(PLAN, steps=9, learning_rate=100.0, warmup=0.0, patience=2)
    healed = heal(student, teacher, make_trainable(student), some_texts(10), some_texts(3, 9), plan)
    assert len(healed.rows) == 2 and healed.best_step == 0 and healed.kl_best == healed.kl_before
    assert capsys.readouterr().err.count("of before, try a lower --learning-rate") == 2
    assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())
    assert json.dumps(healed.rows)
