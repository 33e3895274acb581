"""Traces: what is written, after which prompts, and that it is the same when it is written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from families import characters_folder
from prunescope.data.traces import Traces, write_traces
from prunescope.errors import UserError
from prunescope.models.generating import Sampling, continue_texts
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"

MIXED = [
    "ab",
    "a long prompt, of which there is more than of the others, 60",
    "def f(",
    "some words of middle length",
    "x",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(characters_folder(tmp_path_factory.mktemp("traces") / "model"), device="cpu")


def texts(model: LoadedModel, found: Traces) -> list[str]:
    return [model.tokenizer.decode(row.prompt) for row in found.rows]


def test_files_are_mixed_evenly_and_gone_through_again(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a one\na two\na three\n", "utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "b only"}) + "\n", "utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    found = write_traces(model, files, samples=8, new_tokens=5, batch_size=3)
    said = texts(model, found)
    assert [row.source for row in found.rows] == files * 4 and said[1::2] == ["b only"] * 4
    assert sorted(said[:6:2]) == ["a one", "a three", "a two"] and said[6] == said[0]
    assert len({row.continuation for row in found.rows[1::2]}) == 4  # the same prompt, other draws
    again = write_traces(model, files, samples=8, new_tokens=5, batch_size=8)
    assert again == found and again.describe() == found.describe()
    assert write_traces(model, files, samples=8, new_tokens=5, seed=1).describe() != found.describe()


def test_without_files_the_model_writes_the_prompts_too(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_traces(model, [], samples=3, new_tokens=4)
    assert [row.prompt for row in plain.rows] == [(model.tokenizer.bos_token_id,)] * 3
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    chat = write_traces(model, [], samples=3, new_tokens=4)
    said = texts(model, chat)
    assert all(text.startswith("[user]") and text.endswith("|[assistant]") for text in said) and len(set(said)) == 3


def test_self_among_files_is_a_source_like_them(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of prompts that the model writes, and text that no chat template surrounds: that a source is left out or put at another's place."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    rows = [{"prompt": "def f(", "chat": False}, {"prompt": "say"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    file = str(tmp_path / "a.jsonl")
    found = write_traces(model, ["self", file], samples=5, new_tokens=4)
    assert [row.source for row in found.rows] == ["self", file, "self", file, "self"]
    said = texts(model, found)
    assert sorted(said[1::2], key=len) == ["def f(", "[user]say|[assistant]"]
    alone = write_traces(model, [], samples=3, new_tokens=4)
    assert said[::2] == texts(model, alone) and all(text.startswith("[user]") for text in said[::2])


def test_what_counts(model: LoadedModel) -> None:
    found = write_traces(model, [], samples=5, new_tokens=6)
    batches = list(found.batches(2))
    assert [len(tokens) for tokens, _ in batches] == [2, 2, 1]
    for number, row in enumerate(found.rows):
        tokens, counts = (part[number % 2] for part in batches[number // 2])
        assert tuple(tokens[counts].tolist()) == row.continuation
        assert not counts[: len(row.prompt)].any() and tokens.dtype == torch.int64


def test_texts_are_kept_batch_by_batch(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted call goes on: what was written is not written again."""
    import prunescope.data.traces as module

    (tmp_path / "a.txt").write_text("\n".join(MIXED), "utf-8")
    files: list[str] = [str(tmp_path / "a.txt"), "self"]
    options = {"samples": 6, "new_tokens": 4, "batch_size": 2}
    expected = write_traces(model, files, **options)  # type: ignore[arg-type]
    calls: list[list[int]] = []
    write = module.continue_texts

    def counting(loaded: LoadedModel, prompts: list[list[int]], *args: object, **more: object) -> list[list[int]]:
        calls.append([len(prompt) for prompt in prompts])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(loaded, prompts, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "continue_texts", counting)
    with pytest.raises(KeyboardInterrupt):
        write_traces(model, files, cache=tmp_path, **options)  # type: ignore[arg-type]
    assert write_traces(model, files, cache=tmp_path, **options) == expected and len(calls) == 4  # type: ignore[arg-type]
    # sorted over all of the call; what was interrupted is asked for again, and nothing else
    assert [n for batch in calls[:3] for n in batch] == sorted((len(row.prompt) for row in expected.rows), reverse=True)
    assert calls[3] == calls[2] and calls[0][0] > calls[2][-1]
    write_traces(model, files, cache=tmp_path, **options)  # type: ignore[arg-type]
    assert len(calls) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_what_is_written_with_it(
    temperature: float, model: LoadedModel, tmp_path: Path
) -> None:
    """Prompts of 1 to 60 tokens in the order of the mix. Would catch texts given to another's prompt, and draws that follow from the place in a
    batch: alone, a prompt has no place but the first."""
    (tmp_path / "a.txt").write_text("\n".join(MIXED), "utf-8")
    files = ["self", str(tmp_path / "a.txt")]
    options = {"samples": 12, "new_tokens": 6, "temperature": temperature, "seed": 5}
    found = write_traces(model, files, **options)  # type: ignore[arg-type]
    assert [row.source for row in found.rows] == files * 6 and len({len(row.prompt) for row in found.rows}) > 3
    assert found == write_traces(model, files, batch_size=1, **options)  # type: ignore[arg-type]
    assert found == write_traces(model, files, batch_size=5, **options)  # type: ignore[arg-type]
    for number, row in enumerate(found.rows):
        alone = continue_texts(
            model, [row.prompt], 6, batch_size=1, sampling=Sampling(temperature, seed=5), numbers=[number]
        )
        assert tuple(alone[0]) == row.continuation


def test_bad_input_is_one_line(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "a", "chat": "no"}) + "\n", "utf-8")
    with pytest.raises(UserError, match="'chat' is 'no'; write true, or false"):
        write_traces(model, [str(tmp_path / "chat.jsonl")], samples=1, new_tokens=1)
    (tmp_path / "empty.txt").write_text("", "utf-8")
    for files, more, said in (
        (["nowhere.txt"], {}, "nowhere.txt"),
        ([str(tmp_path / "empty.txt")], {}, "holds no prompt"),
        ([], {"samples": 0}, "--samples 0"),
        ([], {"temperature": -1.0}, "--temperature -1.0"),
    ):
        with pytest.raises(UserError, match=said):
            write_traces(model, files, **({"samples": 2, "new_tokens": 3} | more))  # type: ignore[arg-type]
