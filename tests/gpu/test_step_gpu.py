"""The kernels of a step at the sizes of real models. `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunescope.models import gating
from prunescope.models.products import Tile, gated_products, products, tile_of

pytestmark = pytest.mark.gpu

QWEN = (3584, 512, 512), 3584  # Qwen2.5-7B: queries, keys and values
LLAMA = (2048, 512, 512), 2048  # Llama-3.2-1B
TILES = (None, Tile(16, 128, 1, 4, 5), Tile(32, 128, 4, 4, 4), Tile(64, 128, 7, 4, 4))


def given(outs: tuple[int, ...], ins: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator("cuda").manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    return normal(rows, 1, ins), [normal(n, ins) * 0.02 for n in outs], [normal(n) for n in outs]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 32, 50])
@pytest.mark.parametrize(("outs", "ins"), [QWEN, LLAMA])
def test_products_of_a_real_block(
    outs: tuple[int, ...], ins: int, rows: int, dtype: torch.dtype, tile: Tile | None
) -> None:
    """Against float64, rounded once; run again, and with the rows turned, the same bits. Would catch parts that are added before they are
    written, in the order in which they end, or seen as they were in the launch before."""
    x, weights, biases = given(outs, ins, rows, dtype)
    counts = torch.zeros(1024, dtype=torch.int32, device="cuda")
    first = products(x, weights, biases, counts, tile)
    for one, weight, bias in zip(first, weights, biases, strict=True):
        exact = x.double() @ weight.double().T + bias.double()
        assert bool(((one.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 5e-5).all())
    for _ in range(50):
        again = products(x, weights, biases, counts, tile)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    turned = products(x.flip(0), weights, biases, counts, tile)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(first, turned, strict=True))
    assert not counts.any()


def test_the_own_cut_fills_the_device() -> None:
    tile = tile_of(QWEN[1], sum(QWEN[0]))
    assert sum(-(-count // tile.outs) for count in QWEN[0]) * tile.split >= 132


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_of_a_real_block(dtype: torch.dtype, kind: int) -> None:
    """Against PyTorch's own kernels, both roundings included: few entries may be the next number. Prints how many."""
    gate, up = ((torch.randn(32, 1, 18944, device="cuda") * 3).to(dtype) for _ in range(2))
    assert gating._kernel_fits(kind, dtype, gate.device)
    found, plain = gating.gated(gate, up, kind), gating._ACTIVATIONS[kind](gate) * up
    moved = int((found != plain).sum())
    print(f"{moved} of {plain.numel()} entries are other ones")
    assert moved <= plain.numel() // 500
    torch.testing.assert_close(found, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("tile", [None, Tile(64, 128, 4, 4, 4), Tile(16, 128, 1, 4, 5)])
@pytest.mark.parametrize("rows", [1, 32, 50])
@torch.no_grad()
def test_gate_and_up_of_a_real_block_at_once(rows: int, tile: Tile | None) -> None:
    """Near the plain code, which rounds the same numbers, and the same bits run again and in another order."""
    gate, up = (torch.nn.Linear(3584, 18944, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(rows, 1, 3584, device="cuda").to(torch.bfloat16)
    counts = torch.zeros(4096, dtype=torch.int32, device="cuda")
    assert gating._together(gate, up, 0, x, counts)
    found = gated_products(x, gate, up, 0, counts, tile)
    plain = torch.nn.functional.silu(gate(x)) * up(x)
    assert float((found.float() - plain.float()).norm() / plain.float().norm()) < 2e-3
    for _ in range(20):
        assert torch.equal(found, gated_products(x, gate, up, 0, counts, tile))
    assert torch.equal(found, gated_products(x.flip(0), gate, up, 0, counts, tile).flip(0))
    assert not counts.any()


@torch.no_grad()
def test_a_real_block_is_as_near_to_float64_as_by_the_librarys_products() -> None:
    """Errors of both against float64 without any rounding."""
    gate, up = (torch.nn.Linear(3584, 18944, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(32, 3584, device="cuda").to(torch.bfloat16)
    counts = torch.zeros(4096, dtype=torch.int32, device="cuda")
    exact = [x.double() @ m.weight.double().T for m in (gate, up)]
    expected = torch.nn.functional.silu(exact[0]) * exact[1]
    ours = products(x, [gate.weight], [None], counts)[0], gated_products(x, gate, up, 0, counts)
    plain = gate(x), torch.nn.functional.silu(gate(x)) * up(x)
    for one, other, right in zip(ours, plain, (exact[0], expected), strict=True):
        assert float((one.double() - right).norm()) <= 1.1 * float((other.double() - right).norm())
