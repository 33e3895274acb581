"""Whether a step keeps to its device, without one: on the meta device nothing can be read, so that what asks the host fails, and a tensor
that comes from the host can be told from those that were there. And the experts against the loop of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from families import EXPERTS, FAMILIES, tiny_model
from kernels import needs_kernels
from prunescope.models import agreeing, capturing, decoding
from prunescope.models.anatomy import find_anatomy
from prunescope.models.capturing import (
    all_experts,
    chosen_experts,
    grouped_experts,
    on_the_device,
    stacked_experts,
    trial_rows,
)
from prunescope.models.generating import try_static
from prunescope.models.loaded import LoadedModel

COPIES = {
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "falcon_new",
}  # of FAMILIES, as transformers runs them


def tiny(family: str) -> LoadedModel:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    blocks = len(anatomy.blocks)
    return LoadedModel(family, model, None, anatomy, {}, tuple(range(blocks)), blocks)


class OnlyTheDevice(TorchDispatchMode):
    """Fails for an operation that reads the host's memory, or whose kernel on CUDA does. Once ``settled``, a tensor that no operation made,
    no parameter is and no earlier step has read counts as the host's: so come lists, which PyTorch turns into tensors out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Tensor] = {}
        self.settled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._grouped_mm.default and given[0].dtype != torch.bfloat16:
            raise RuntimeError(f"{func} copies the ends of its groups to the host")
        if torch.device(kwargs.get("device") or "meta").type != "meta":
            raise RuntimeError(f"{func} makes a tensor of the host")
        for tensor in given:
            copied = tensor.dim() or func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            if tensor.device.type != "meta" and copied:
                raise RuntimeError(f"{func} reads a tensor of the host")
            if self.settled and id(tensor) not in self.known and not isinstance(tensor, torch.nn.Parameter):
                raise RuntimeError(f"{func} reads a tensor that was made out of sight")
            self.known[id(tensor)] = tensor
        made = func(*args, **kwargs)
        self.known |= {id(leaf): leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        return made


@contextmanager
def _as_transformers_does(model: Any) -> Iterator[None]:
    with decoding._grouped_attention():
        yield


def three_steps(loaded: LoadedModel, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as if a graph were being captured: transformers asks, and then looks at no mask."""
    loaded.model.to("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ids = torch.zeros(3, 7, dtype=torch.long, device="meta")
    loop = decoding._Loop(loaded, 3, 16, 8, lambda z, step: z.argmax(-1), [2], 0, False)
    with torch.no_grad():
        with on_the_device(loaded.model):
            loop.restart(ids, torch.ones_like(ids))
        with how(loaded.model), OnlyTheDevice() as watch:
            loop.step()
            watch.settled = True
            loop.step()
            loop.step()


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_a_step_keeps_to_its_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch `item`, `nonzero`, `tolist`, shapes that depend on data, lists as indices, and scalars or tables made on the host, in any
    family: each sends the family back to `generate()` on a GPU."""
    three_steps(tiny(family), decoding.stepping, monkeypatch)


@pytest.mark.parametrize("family", sorted(COPIES))
def test_the_check_finds_what_a_graph_refuses(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These are the families that a H100 refused while transformers' code ran as it is. Would catch a check that passes everything."""
    with pytest.raises(RuntimeError, match=r"host|out of sight"):
        three_steps(tiny(family), _as_transformers_does, monkeypatch)


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x + torch.tensor([1.0]).to(x), lambda x: x.tolist(), lambda x: x[x > 0]])  # fmt: skip
def test_the_check_finds_every_question_to_the_host(ask: Any) -> None:
    x = torch.empty(2, 3, device="meta")
    with OnlyTheDevice(), pytest.raises((RuntimeError, NotImplementedError)):
        ask(x)


@pytest.mark.parametrize("family", sorted(EXPERTS))
def test_other_experts_write_what_generate_writes(family: str) -> None:
    """Few texts and many: of 24 experts, 2 a token, two texts take `chosen_experts` and five `all_experts`."""
    loaded = tiny(family)
    assert trial_rows(loaded.model) == {"olmoe": 5}.get(family, 1)
    assert try_static(loaded) is None


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "olmoe", "granitemoe"])
def test_experts_against_the_loop_of_transformers(family: str) -> None:
    """In float64. Would catch weights given to the wrong expert, a bias left out or given twice, a gate applied across experts, and what was
    not chosen leaking into the sum: one expert is not a number, and no token chooses it."""
    model = tiny_model(family)
    module = stacked_experts(model)[0].double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[1] = torch.nan
    others = torch.tensor([i for i in range(module.num_experts) if i != 1])
    index = torch.stack([others[torch.randperm(len(others))[:2]] for _ in range(7)])
    tokens, weights = torch.randn(7, 32, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = module(tokens, index, weights)
        for found in (chosen_experts(module, tokens, index, weights), all_experts(module, tokens, index, weights)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert bool(expected.isfinite().all())


@needs_kernels
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe", "granitemoe"])
def test_the_kernel_of_the_experts_against_the_loop(family: str) -> None:
    """Evenly spread, and more tokens than a tile holds, whose experts are others in the second tile. One expert is not a number and is not chosen.
    Would catch the second tile left out where nothing of the first is an expert's, a result in the place of another choice, and inputs and outputs
    exchanged."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(family)
    module = stacked_experts(model)[0].to(device)
    others = torch.tensor([i for i in range(module.num_experts) if i != 1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[1] = torch.nan
    spread = torch.stack([others[torch.randperm(len(others), generator=generator)[:2]] for _ in range(40)])
    model.set_experts_implementation("eager")
    tiles = torch.cat([torch.tensor([[0, 2]]).expand(64, 2), torch.tensor([[3, 2]]).expand(6, 2)])
    for index in (spread, spread[:1], tiles):
        tokens = torch.randn(len(index), 32, generator=generator).to(device)
        weights, chosen = torch.rand(len(index), 2, generator=generator).to(device), index.contiguous().to(device)
        with torch.no_grad():
            expected = module.double()(tokens.double(), chosen, weights.double())
            found = grouped_experts(module.float(), tokens, chosen, weights)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert bool(found.isfinite().all())


def test_packed_experts_are_left_alone_and_forwards_come_back() -> None:
    """Would catch weights of another form read as numbers, and replacements that outlive the block."""
    model = tiny_model("mixtral")
    modules = stacked_experts(model)
    assert len(modules) == 6
    with on_the_device(model):
        assert all("forward" in module.__dict__ for module in modules)
    assert not any("forward" in module.__dict__ for module in modules)
    first = modules[0]
    first.down_proj = torch.nn.Parameter(first.down_proj.to(torch.uint8), requires_grad=False)
    assert len(stacked_experts(model)) == 5
    assert stacked_experts(tiny_model("llama")) == [] and trial_rows(tiny_model("llama")) == 0


def test_only_a_list_of_one_number_becomes_a_slice() -> None:
    """Every index gives what it gives without the block. Would catch a last element cut off, and a list of two read as one."""
    x = torch.arange(2 * 3 * 4).view(2, 3, 4)
    indices: list[Any] = [
        (..., [-2], slice(None)), (..., [-1]), ([1],), [0], (slice(None), [0, 2]), ([1], torch.tensor([2])), 1, (None, [1]), (..., [True, False, True], slice(None)), ([0], 1),
    ]  # fmt: skip
    expected = [x[index] for index in indices]
    with on_the_device(torch.nn.Identity()):
        found = [x[index] for index in indices]
    for one, other, index in zip(found, expected, indices, strict=True):
        assert torch.equal(one, other), index


def test_a_number_becomes_the_same_tensor() -> None:
    """Value, type and shape are those of `torch.tensor`. Would catch an int that turns into a float, and options that get lost."""
    with on_the_device(torch.nn.Identity()):
        made = [
            torch.tensor(3),
            torch.tensor(0.5),
            torch.tensor(True),
            torch.tensor(2, dtype=torch.float16),
            torch.tensor([1.0, 2.0]),
        ]
    for one, other in zip(
        made,
        (
            torch.tensor(3),
            torch.tensor(0.5),
            torch.tensor(True),
            torch.tensor(2, dtype=torch.float16),
            torch.tensor([1.0, 2.0]),
        ),
        strict=True,
    ):
        assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize(
    ("texts", "kernel", "way"), [(64, True, "grouped"), (65, True, "all"), (1, False, "chosen"), (9, False, "all")]
)
def test_which_way_experts_take(texts: int, kernel: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a kernel asked for where there is none, and many texts that read an expert several times."""
    model = tiny_model("mixtral")
    module = stacked_experts(model)[0]
    monkeypatch.setattr(capturing, "kernels_run", lambda device: kernel)
    monkeypatch.setattr(capturing, "_kernel_agrees", lambda *_: True)
    for name in ("grouped", "all", "chosen"):
        monkeypatch.setattr(capturing, f"{name}_experts", lambda *_, name=name: name)
    module.num_experts = 12  # of which a token has two
    index = torch.zeros(texts, 2, dtype=torch.int64)
    assert capturing._experts(module, torch.zeros(texts, 8), index, index.float()) == way
    assert trial_rows(model) == (65 if kernel else 3)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_does_not_agree_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little shared memory, or no compiler. Would catch a model that then writes by `generate()`, and numbers that nobody has looked at."""
    module = stacked_experts(tiny_model("mixtral"))[0]
    index, weights = torch.tensor([[0, 2], [3, 1], [1, 2]]), torch.rand(3, 2)
    tokens = torch.randn(3, 32)
    monkeypatch.setattr(capturing, "kernels_run", lambda device: True)

    def kernel(module: Any, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        return chosen_experts(module, tokens, index, weights) * 1.001

    monkeypatch.setattr(capturing, "grouped_experts", kernel)
    monkeypatch.setattr(agreeing, "_TRIED", {})
    with torch.no_grad():
        assert torch.equal(
            capturing._experts(module, tokens, index, weights), all_experts(module, tokens, index, weights)
        )
        monkeypatch.setattr(capturing, "grouped_experts", lambda *given: chosen_experts(*given))
        monkeypatch.setattr(agreeing, "_TRIED", {})
        found = capturing._experts(module, tokens, index, weights)
        assert torch.equal(found, chosen_experts(module, tokens, index, weights))
