"""Products of few rows with several matrices at the sizes of real models. `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunescope.models.products import Tile, products, tile_of

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
    tile = tile_of(QWEN[1], sum(QWEN[0]), 32)
    assert sum(-(-count // tile.outs) for count in QWEN[0]) * tile.split >= 132
