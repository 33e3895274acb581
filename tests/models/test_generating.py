"""How a token is chosen, which texts are written together and how many, and that a text depends on neither."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from families import tiny_model, tiny_tokenizer
from prunescope.models import generating
from prunescope.models.anatomy import find_anatomy
from prunescope.models.decoding import _Loop
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling, by_length, choose, continue_texts, texts_at_a_time
from prunescope.models.loaded import LoadedModel

BELOW_ONE = float(np.nextafter(1, 0))


def tiny(family: str = "llama") -> LoadedModel:
    model = tiny_model(family)
    return LoadedModel("tiny", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)


# --- the token -----------------------------------------------------------------------------------------------------------


def straight(scores: np.ndarray, sampling: Sampling, draw: float) -> tuple[int, np.ndarray]:
    """The token of one row by a cumulated sum from the first word to the last, and the probabilities, in numpy's float64."""
    z = (scores / np.float32(sampling.temperature)).astype(np.float64)
    p = np.exp(z - z.max())
    p /= p.sum()
    if sampling.top_k:
        p[p < np.sort(p)[-min(sampling.top_k, len(p))]] = 0
    if sampling.top_p < 1:
        falling = np.sort(p)[::-1]
        p[p < falling[np.searchsorted(falling.cumsum(), sampling.top_p * p.sum())]] = 0
    mass = p.cumsum()
    return min(int(np.searchsorted(mass, draw * mass[-1], "right")), int(p.nonzero()[0][-1])), p


@pytest.mark.parametrize("words", [3, 512, 513, 1000, 1536, 2047])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.3), Sampling(1.5, top_k=40), Sampling(0.9, 0, 0.7), Sampling(1.0, 30, 0.6)])  # fmt: skip
def test_the_token_is_that_of_a_straight_sum(sampling: Sampling, words: int) -> None:
    """Flat and sharp rows, words of no probability first, last and a whole block of them, draws from 0 to just below 1. Would catch a block or a
    place within it that is one off, words past the last, a rest that is not counted from its block, and a word of no probability."""
    turn = torch.Generator().manual_seed(words)
    rows = 120
    scores = torch.randn(rows, words, generator=turn) * torch.logspace(-1, 1.3, rows)[:, None]
    scores[::3, 0] = scores[1::3, -1] = scores[2::6, : words // 3] = scores[5::6, 2 * words // 3 :] = -torch.inf
    scores[::4, 600:1100] = -torch.inf
    draws = torch.rand(rows, generator=turn, dtype=torch.float64)
    for given in (draws, draws * 1e-9, 1 - draws * 1e-9, draws * 0, draws * 0 + BELOW_ONE):
        found = choose(scores, sampling, given)
        for row, (token, draw) in enumerate(zip(found.tolist(), given.tolist(), strict=True)):
            expected, p = straight(scores[row].numpy(), sampling, draw)
            assert p[token] > 0
            assert token == expected or p[min(token, expected) + 1 : max(token, expected) + 1].sum() < 1e-15, (row, draw)  # fmt: skip
    assert len(set(choose(scores, Sampling(1.0), draws).tolist())) > min(2, rows // 4)


def test_a_draw_on_a_border_takes_the_word_after_it() -> None:
    """Four words of a quarter each, exact in binary, and nothing between them. Would catch `>=` for `>`."""
    scores = torch.full((1, 1600), -torch.inf)
    words = [3, 511, 512, 1598]
    scores[0, words] = 0.7
    for number, word in enumerate(words):
        at = number / 4
        inside = torch.tensor([at, at + 0.1, float(np.nextafter(at + 0.25, 0))], dtype=torch.float64)
        assert choose(scores.expand(3, -1), Sampling(1.0), inside).tolist() == [word] * 3


def test_rounding_past_an_end_stays_on_words_with_probability() -> None:
    """What a sum of sums may do by its last bit: a place a little before the first part, or at and past the end."""
    parts = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.0]], dtype=torch.float64)
    for at, expected in ((-1e-17, 1), (0.0, 1), (0.25, 3), (0.75, 3), (0.76, 3)):
        assert generating._fall(parts, torch.tensor([[at]], dtype=torch.float64))[0].item() == expected


# --- which texts together, and how many -----------------------------------------------------------------------------------


def test_texts_of_about_the_same_length_are_written_together() -> None:
    """Longest first, equal ones in their order, and as many as the longest of a batch allows, at least one."""
    asked: list[int] = []

    def rows(longest: int) -> int:
        asked.append(longest)
        return 40 // longest

    found = list(by_length([5, 90, 20, 5, 8, 20, 5], rows))
    assert found == [[1], [2, 5], [4, 0, 3, 6]] and asked == [90, 20, 8]
    assert list(by_length([], rows)) == []


def test_what_a_text_holds() -> None:
    """Keys and values against the buffers of the loop, which are rounded up, and without those of a dropped attention; a model that makes logits of
    its whole prompt needs more for it."""
    loaded = tiny()
    for drop in (DropSpec(), DropSpec(attn=(0, 2, 3))):
        with loaded.dropping(drop):
            text = generating._text_bytes(loaded, 24)
            loop = _Loop(loaded, 2, 32, 24, lambda z, step: z.argmax(-1), [], 0, False)
            with torch.no_grad():
                loop.restart(torch.full((2, 7), 5), torch.ones(2, 7, dtype=torch.long))
            held = sum(part.nbytes for layer in loop.cache.layers for part in (layer.keys, layer.values) if part is not None)  # fmt: skip
            assert held > 0
            config = loaded.model.config
            reading = 4 * (8 * config.hidden_size + 3 * max(config.intermediate_size, config.hidden_size))
            assert text(7) == held // 2 + 7 * reading + 40 * config.vocab_size
    plain = generating._text_bytes(loaded, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generating, "forward_options", lambda model: {})
        assert generating._text_bytes(loaded, 24)(7) == plain(7) + 7 * 4 * loaded.anatomy.vocab_size


def test_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is free, in a few sizes, at most 1,024 and at least one. No GPU is asked: its figures are made up here."""
    assert [generating._round_down(n) for n in (0, 1, 2, 3, 5, 6, 7, 100, 191, 192, 1023, 1024)] == [1, 1, 2, 3, 4, 6, 6, 96, 128, 192, 768, 1024]  # fmt: skip
    assert texts_at_a_time(tiny(), 5)(10_000) == 32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000_000, 9_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_500_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500_000)
    monkeypatch.setattr(generating, "_text_bytes", lambda loaded, new: lambda longest: 100 * (longest + new))
    gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    fitting = texts_at_a_time(gpu, 5)
    assert [fitting(n) for n in (0, 4, 20, 95, 20_000)] == [1024, 1024, 384, 96, 1]


# --- texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["generate", "decode"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=2)])
def test_mixed_lengths_are_written_as_one_by_one(sampling: Sampling, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both ways, in batches of 4 and of as many as fit, with numbers that are not those of the places. Would catch rows in the order of the
    batches, and draws by the place in a batch or among the prompts."""
    loaded = tiny()
    prompts = [[(7 * i + 5 * j) % 60 + 4 for j in range(1 + 37 * i % 23)] for i in range(10)]
    numbers = [3, 50, 4, 0, 9, 7, 1_000, 8, 2, 6]
    alone = [
        continue_texts(loaded, [prompt], 8, batch_size=1, sampling=sampling, numbers=[number])[0]
        for prompt, number in zip(prompts, numbers, strict=True)
    ]
    assert len({tuple(text) for text in alone}) > 5
    if way == "decode":
        monkeypatch.setattr(generating, "static_problem", lambda loaded: None)
    monkeypatch.setattr(generating, "_CPU_ROWS", 1)
    widths: list[int] = []
    padded = generating._left_padded

    def noted(prompts: list[list[int]], *more: Any) -> tuple[Tensor, Tensor]:
        widths.append(max(map(len, prompts)))
        return padded(prompts, *more)

    monkeypatch.setattr(generating, "_left_padded", noted)
    options: dict[str, Any] = {"sampling": sampling, "numbers": numbers}
    told: list[int] = []
    assert continue_texts(loaded, prompts, 8, batch_size=4, advance=told.append, **options) == alone
    lengths = sorted(map(len, prompts), reverse=True)
    assert widths == lengths[::4] and told == [4, 4, 2]
    assert continue_texts(loaded, prompts, 8, batch_size=None, **options) == alone
    # with states that are seen batch by batch, the order is that of the prompts
    widths.clear()
    seen: list[Tensor] = []
    assert continue_texts(loaded, prompts, 8, batch_size=4, see=seen.append, **options) == alone
    assert widths == [max(map(len, prompts[i : i + 4])) for i in (0, 4, 8)] and [s.shape[1] for s in seen] == [4, 4, 2]
