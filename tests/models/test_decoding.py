"""The loop over a fixed cache against `generate()`, on every family. On a CPU the loop runs without a CUDA graph, over the same buffers; the
graph itself is checked by benchmarks/generation_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, tiny_model, tiny_tokenizer
from prunescope.models import decoding, generating
from prunescope.models.anatomy import find_anatomy
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling, continue_texts, decoding_way, static_problem, try_static
from prunescope.models.loaded import LoadedModel

STEPS = 24
DROPS = {
    "dense": DropSpec(),
    "attn": DropSpec(attn=(0, 2, 3)),
    "both": DropSpec(attn=(0, 1, 5), mlp=(1, 2, 5)),
}
PROMPTS = [
    [5, 9, 11, 4, 60, 8, 33],
    [7, 3],
    [21, 40, 41, 42, 13],
]  # with left padding, one longer than the sliding windows


def tiny(family: str) -> LoadedModel:
    model = tiny_model(family)
    return LoadedModel("tiny", model, tiny_tokenizer(), find_anatomy(model), {}, tuple(range(6)), 6)


def written(loaded: LoadedModel, **options: Any) -> tuple[list[list[int]], Tensor]:
    states: list[Tensor] = []
    texts = continue_texts(loaded, PROMPTS, STEPS, batch_size=3, see=states.append, **options)
    return texts, states[0]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From here on `continue_texts` goes through the loop; the number of batches that did is counted."""
    count: list[int] = []
    plain = generating._write_static

    def counted(*args: Any, **options: Any) -> Any:
        count.append(1)
        return plain(*args, **options)

    def switch() -> list[int]:
        monkeypatch.setattr(generating, "static_problem", lambda loaded: None)
        monkeypatch.setattr(generating, "_write_static", counted)
        return count

    return switch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fixed_cache_writes_what_generate_writes(family: str, fixed: Any) -> None:
    """Tokens are the same and the states of every step agree, dense and dropped, greedy and sampled, with texts that end.

    Would catch a step that sees padding or the future, a position or a sliding window off by one, an attention that reads another one's
    keys once some are dropped, and a text that goes on behind its end.
    """
    loaded = tiny(family)
    settings: list[dict[str, Any]] = [{"stop": False}, {"sampling": Sampling(0.9, top_k=20, top_p=0.95, seed=3)}]
    expected = {}
    for name, spec in DROPS.items():
        with loaded.dropping(spec):
            expected[name] = [written(loaded, **options) for options in settings]
    count = fixed()
    for name, spec in DROPS.items():
        with loaded.dropping(spec):
            for options, (texts, states) in zip(settings, expected[name], strict=True):
                found, found_states = written(loaded, **options)
                assert found == texts
                for row, text in enumerate(texts):
                    ours, theirs = found_states[: len(text), row], states[: len(text), row]
                    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
                    assert torch.equal(ours[0], theirs[0])  # prompts are read in the same way, to the bit
    assert len(count) == 2 * len(DROPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trial_finds_every_family_fit(family: str) -> None:
    """Would catch a trial that refuses what the test above shows to be right, so that a GPU would never get the loop."""
    loaded = tiny(family)
    assert try_static(loaded) is None
    with loaded.dropping(DropSpec(attn=(1, 2))):
        assert try_static(loaded) is None
    with loaded.dropping(DropSpec(attn=tuple(range(6)))):
        assert "no attention is left" in str(try_static(loaded))


def test_the_trial_refuses_what_is_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a trial that always agrees: a cache that writes one place too far, and a model that cannot be run with it."""
    loaded = tiny("llama")
    plain = decoding._FixedLayer.update

    def misplaced(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, keys, values) if not self.is_initialized else plain(self, keys * 1.05, values)

    monkeypatch.setattr(decoding._FixedLayer, "update", misplaced)
    assert "differ from those of generate()" in str(try_static(loaded))
    monkeypatch.setattr(decoding._FixedLayer, "update", lambda *args, **kwargs: 1 / 0)
    assert try_static(loaded) == "ZeroDivisionError: division by zero"


def test_a_cpu_keeps_generate_and_says_so() -> None:
    loaded = tiny("llama")
    assert static_problem(loaded) is not None
    assert decoding_way(loaded) == "generate(): a fixed cache pays on a CUDA device only, this is cpu"
    assert loaded.decoding == {}  # nothing was tried


def test_a_dropped_attention_has_no_place_in_the_cache() -> None:
    """Would catch buffers that are still made for what is dropped, and sizes that grow with the steps."""
    loaded = tiny("llama")
    ids, mask = generating._left_padded(PROMPTS, 0, torch.device("cpu"))
    with loaded.dropping(DropSpec(attn=(0, 2, 3))):
        loop = decoding._Loop(loaded, 3, 32, STEPS, lambda z, step: z.argmax(-1), [], 0, False)
        with torch.no_grad():
            loop.restart(ids, mask)
        places = [layer.keys.data_ptr() for layer in loop.cache.layers]
        for _ in range(STEPS - 1):
            with torch.no_grad():
                loop.step()
    assert len(loop.cache.layers) == 3
    assert [layer.keys.data_ptr() for layer in loop.cache.layers] == places
    assert loop.cache.layers[0].keys.shape == (3, 2, 32, 8)  # 7 + 24 tokens, rounded up to 16


def test_decoding_stops_once_all_texts_have_ended() -> None:
    """Would catch a loop that writes to the limit, and one that stops with the first text."""
    loaded = tiny("llama")
    ids, mask = generating._left_padded(PROMPTS, 0, torch.device("cpu"))
    at = torch.tensor([2, 9, 5])

    def ending(scores: Tensor, step: Tensor) -> Tensor:
        return torch.where(step >= at, 2, 7)

    found = decoding.decode(loaded, ids, mask, STEPS, ending, ends=[2], pad=0)
    assert found.tokens.tolist() == [[7] * n + [2] + [0] * (9 - n) for n in at.tolist()]


def test_the_attention_of_before_comes_back() -> None:
    """The library's own, and one that somebody else had put in its place. Would catch a transformers whose table no longer keeps replacements
    apart from what it comes with."""
    table = decoding.ALL_ATTENTION_FUNCTIONS
    own = table["sdpa"]
    with decoding._grouped_attention():
        assert isinstance(table["sdpa"], decoding._GroupedAttention) and table["sdpa"].plain is own
        with decoding._grouped_attention():
            pass
        assert isinstance(table["sdpa"], decoding._GroupedAttention)
    assert table["sdpa"] is own
    other: Any = lambda *_, **__: None  # noqa: E731
    table["sdpa"] = other
    try:
        with decoding._grouped_attention():
            assert table["sdpa"].plain is other
        assert table["sdpa"] is other
    finally:
        del table["sdpa"]
    assert table["sdpa"] is own


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=20, seed=3)])
def test_batches_of_one_shape_share_their_buffers(
    sampling: Sampling, fixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches of four texts, the last of another shape, each as if it were alone. Would catch keys of the batch before that can still be
    seen, a text that counts as ended, numbers drawn for another prompt, results that the next batch writes over, and buffers that move: a
    captured step would go on reading the old ones."""
    loaded = tiny("llama")
    prompts = [[(7 * i + 5 * j) % 60 + 4 for j in range(4 + i % 4)] for i in range(10)]
    alone: list[list[int]] = []
    fixed()
    for start in (0, 4, 8):
        alone += continue_texts(loaded, prompts[start : start + 4], STEPS, batch_size=4, sampling=sampling, numbers=range(start, start + len(prompts[start : start + 4])), see=lambda states: None)  # fmt: skip
    loops: list[Any] = []
    places: set[tuple[int, ...]] = set()
    plain, restart = decoding._Loop.__init__, decoding._Loop.restart

    def made(self: Any, *args: Any) -> None:
        loops.append(self)
        plain(self, *args)

    def restarted(self: Any, *args: Any) -> None:
        restart(self, *args)
        held = (self.position, self.number, self.seen, self.places, self.read, self.tokens, self.finished, self.states)
        places.add(
            tuple(
                x.data_ptr() for x in (*held, *(y for layer in self.cache.layers for y in (layer.keys, layer.values)))
            )
        )

    monkeypatch.setattr(decoding._Loop, "__init__", made)
    monkeypatch.setattr(decoding._Loop, "restart", restarted)
    states: list[Tensor] = []
    assert continue_texts(loaded, prompts, STEPS, batch_size=4, sampling=sampling, see=states.append) == alone
    assert len(loops) == 2 and len(places) == 2
    assert not torch.equal(states[0], states[1])
