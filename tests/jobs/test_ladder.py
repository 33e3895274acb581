"""`--ladder` of the commands: the rungs are brute force on the same tokens, another model's are not taken, and bad ones are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunescope
from families import characters_folder
from prunescope.cli import main
from prunescope.data.prompts import read_prompts
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.quantised import quantising
from prunescope.report.page.verdict import judge
from prunescope.report.terminal.scoring import remarks

OTHER = "drop:attn=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    characters_folder(folder / "model")
    (folder / "prompts.txt").write_text("cat dog\n2 + 3 = 5\n", "utf-8")
    (folder / "text.txt").write_text("a cat and a dog and 12 birds\n" * 3, "utf-8")
    asked = [{"question": f"{i} + 2", "choices": ["3", "4", "7"], "answer": i % 3} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked), "utf-8")
    return folder


def another(model: Path, folder: Path) -> None:
    """A model of the same vocabulary and other weights, its head among them."""
    shutil.copytree(model, folder)
    noise = torch.Generator().manual_seed(1)
    weights = load_file(model / "model.safetensors")
    other = {
        name: w + 0.3 * w.std() * torch.randn(w.shape, generator=noise) for name, w in weights.items() if w.dim() == 2
    }
    save_file(weights | other, folder / "model.safetensors", {"format": "pt"})


def log_p(dense: LoadedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [dense.model(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in rows]


def mean_kl(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return torch.cat([(p.exp() * (p - q)).sum(-1).reshape(-1) for p, q in pairs]).mean().item()


def test_rungs_of_questions_are_brute_force(place: Path) -> None:
    """Over the vocabulary and over the options. Catches a rung of the wrong space, of other questions, and the target's KL in its place."""
    model, file = str(place / "model"), str(place / "questions.jsonl")
    found = prunescope.mcq(model, OTHER, questions=file, ladder="q8_0,q4_0", device="cpu")
    dense = load_model(model, device="cpu")
    encode = lambda text: dense.tokenizer(text)["input_ids"]  # noqa: E731
    prompts = [encode(row["text"]) for row in found.samples()]
    choices = [[encode(text) for text in row["option_strings"]] for row in found.samples()]

    def spaces() -> dict[str, list[torch.Tensor]]:
        """Log-probabilities of the next token, and of the options by the likelihood of their characters."""
        options = []
        for prompt, pieces in zip(prompts, choices, strict=True):
            scores = []
            for piece in pieces:
                row = log_p(dense, [prompt + piece])[0]
                scores.append(sum(row[len(prompt) - 1 + i, token] for i, token in enumerate(piece)))
            options.append(torch.stack(scores).log_softmax(-1))
        return {"global": [one[-1] for one in log_p(dense, prompts)], "options": options}

    base = spaces()
    for number, name in enumerate(("q8_0", "q4_0")):
        with quantising(dense, name):
            q = spaces()
        for space in ("global", "options"):
            rung, expected = found.info["ladder"][space][number], mean_kl(list(zip(base[space], q[space], strict=True)))
            assert (rung["name"], rung["kl"]) == (name, pytest.approx(expected, rel=1e-2, abs=1e-9)), space
    numbers = dict(judge({"mcq": found.info})[1].numbers)
    assert numbers["KL over the options, beside its own quantised types"] == found.info["like"]["options"]
    # the next run finds them in the cache, and another model's are not taken for its own
    again = prunescope.mcq(model, "drop:mlp=1", questions=file, device="cpu")
    usual = [rung for rung in found.info["ladder"]["global"] if rung["name"] in ("q8_0", "q4_0")]
    assert {rung["name"]: rung["kl"] for rung in again.info["ladder"]["global"]}["q8_0"] == usual[0]["kl"]
    another(place / "model", place / "other")
    assert prunescope.mcq(str(place / "other"), OTHER, questions=file, device="cpu").info["ladder"]["global"] == []


def test_evaluate_measures_the_kl_of_every_model(place: Path, tmp_path: Path) -> None:
    """Of a variant and of a model with a head of its own, on what the dense model writes. Catches the target's head on the dense states, and a model that
    is placed by another one's KL."""
    model = str(place / "model")
    another(place / "model", tmp_path / "second")
    names = [model, OTHER, str(tmp_path / "second")]
    found = prunescope.evaluate(names, tasks="reversal-mc", limit=2, shots=1, ladder="q8_0,q4_0", device="cpu")
    dense, second = load_model(model, device="cpu"), load_model(tmp_path / "second", device="cpu")
    texts: list[tuple[list[int], int]] = []
    for prompt in shipped_prompts(dense):
        with torch.no_grad():
            whole = dense.model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0].tolist()
        texts.append((whole, len(prompt)))

    def read(loaded: LoadedModel) -> list[torch.Tensor]:
        whole = log_p(loaded, [text for text, _ in texts])
        return [one[start - 1 : -1] for (_, start), one in zip(texts, whole, strict=True)]

    base = read(dense)
    with dense.dropping(DropSpec.parse("attn=1")):
        dropped = read(dense)
    expected = {OTHER: dropped, names[2]: read(second)}
    assert set(found.info["kl"]) == set(expected)
    for label, rows in expected.items():
        # means over steps
        assert found.info["kl"][label]["mean"] == pytest.approx(mean_kl(list(zip(base, rows, strict=True))), rel=2e-3)
        line = next(line for line in remarks(found.info) if line.startswith(f"{label}: KL"))
        assert found.info["like"][label] in line
    with quantising(dense, "q4_0"):
        rung = mean_kl(list(zip(base, read(dense), strict=True)))
    assert found.info["ladder"][1]["kl"] == pytest.approx(rung, rel=2e-3)


def shipped_prompts(dense: LoadedModel) -> list[list[int]]:
    return [dense.tokenizer(prompt.text)["input_ids"] for prompt in read_prompts(None)]


def argv(command: str, place: Path) -> list[str]:
    model = str(place / "model")
    prompts = ["--prompts", str(place / "prompts.txt"), "--max-new-tokens", "2"]
    small = ["--tasks", "reversal-mc", "--limit", "2", "--shots", "1"]
    return {
        "generate": ["generate", model, OTHER, *prompts],
        "mcq": ["mcq", model, OTHER, "--questions", str(place / "questions.jsonl")],
        "divergence": ["divergence", model, OTHER, "--text", str(place / "text.txt"), "--context", "8"],
        "evaluate": ["evaluate", model, OTHER, *small],
        "sweep": ["sweep", model, "--target", "attn", "--n", "1", "--samples", "2", "--seq-len", "8", *small, *prompts],
    }[command]


COMMANDS = ("generate", "mcq", "divergence", "evaluate", "sweep")


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_rungs_are_one_line(command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown type, a mixture, a file of another model, nothing at all. Catches a rung that is skipped without a word, and a run that is half done
    before the last name is read."""
    for text, says in (
        ("q9_0", "unknown"), ("q8_0,q3_K_M", "mixture"), ("q8_0,../other/model.gguf", "unknown"), ("", "unknown"), ("q8_0,", "unknown")
    ):  # fmt: skip
        assert main([*argv(command, place), "--ladder", text, "--out", str(tmp_path / "run")]) == 2, text
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunescope: ")]
        assert len(lines) == 1 and says in lines[0], (text, lines)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_one_rung_is_a_scale_with_one_mark(command: str, place: Path, tmp_path: Path) -> None:
    """Better or worse than it, never between. Catches an index past the end of a short ladder."""
    assert main([*argv(command, place), "--ladder", "q8_0", "--out", str(tmp_path / "run")]) == 0
    info = prunescope.open(tmp_path / "run").info
    like = info["summary"]["like"] if command == "sweep" else info["like"]
    words = list(like.values()) if isinstance(like, dict) else [like]
    assert words and all(word in ("worse than q8_0", "better than q8_0") for word in words)
