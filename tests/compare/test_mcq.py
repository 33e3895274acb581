"""Multiple choice against sums by hand in float64, against lm-evaluation-harness, and against scipy."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import prunescope
from families import VOCAB, tiny_model
from prunescope.cli import main
from prunescope.compare.mcq import ask, mcq_rows
from prunescope.compare.metrics import FLOOR_COLUMNS
from prunescope.compare.summary import calibration, mcq_summary
from prunescope.data.questions import Question, cue_prompt, option_strings, question_text, read_questions
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.stats import mcnemar

SPEC = DropSpec(attn=(6, 13, 20), mlp=(22,))
BIOLOGY = "high_school_biology"
ITEMS = int(os.environ.get("PRUNESCOPE_HARNESS_ITEMS", "2"))  # 60 for the acceptance run
CHARACTERS = "ABCDabcd .:)\nwx0123456789tQ?hecorasnim"


def letters_folder(folder: Path, *, whole_words: bool) -> Path:
    """A tiny model whose tokenizer knows the letters of the options: as words (" A" is one token), or character by character (" A" is two
    tokens, and all options share the first)."""
    tiny_model("llama").save_pretrained(folder)
    words = [*"ABCDabcd", "Answer:", *(f"w{i}" for i in range(30))] if whole_words else list(CHARACTERS)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    assert len(vocabulary) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit() if whole_words else pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def few(count: int = 5, options: int = 4) -> list[Question]:
    return [
        Question(f"q{i}", "w1 " * (i + 1) + f"w{i}", tuple(f"w{i + k}" for k in range(options)), i % options)
        for i in range(count)
    ]


# --- numbers -----------------------------------------------------------------------------------------------------------


def test_both_divergences_are_sums_by_hand_on_the_real_model(smollm2: LoadedModel) -> None:
    """KL over the vocabulary and over the options, option mass, log-likelihoods, ranks and margins from a plain forward pass in float64.

    Would catch a KL divided by V or by the options, options that are not renormalised, and tokens of another option.
    """
    questions = read_questions()[0][::15]
    asked = ask(smollm2, questions, "cue", {})
    temperature = 0.7
    rows = mcq_rows(smollm2, SPEC, asked, batch_size=3, temperature=temperature).table.to_pylist()
    weight = smollm2.model.lm_head.weight.detach().double()
    for i, question in enumerate(asked):
        ids = torch.tensor([smollm2.tokenizer(question.text)["input_ids"]])
        letters = [smollm2.tokenizer.convert_tokens_to_ids(f"\u0120{letter}") for letter in "ABCD"]
        z = []
        for spec in (None, SPEC):
            with torch.no_grad(), smollm2.dropping(spec or DropSpec()):
                z.append(smollm2.model.model(input_ids=ids).last_hidden_state[0, -1].double() @ weight.T)
        whole, options = rows[2 * i], rows[2 * i + 1]
        assert (whole["space"], options["space"]) == ("global", "options")
        for row, chosen in ((whole, slice(None)), (options, letters)):
            log_p, log_q = ((x[chosen] / temperature).log_softmax(-1) for x in z)
            assert row["kl_dense_target"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=2e-4)
            assert row["kl_target_dense"] == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=2e-4)
            cosine = torch.nn.functional.cosine_similarity(log_p.exp(), log_q.exp(), dim=-1)
            assert row["p_cos"] == pytest.approx(float(cosine), abs=1e-4)
            assert row["z_cos"] == pytest.approx(
                float(torch.nn.functional.cosine_similarity(z[0][chosen], z[1][chosen], dim=-1)), abs=1e-4
            )
        gold = question.question.answer
        for side, x in zip(("dense", "target"), z, strict=True):
            scores = x.log_softmax(-1)[letters]
            assert whole[f"loglik_{side}"] == pytest.approx(scores.tolist(), rel=1e-4)
            assert whole[f"choice_{side}"] == int(scores.argmax())
            assert whole[f"option_mass_{side}"] == pytest.approx(float(scores.exp().sum()), rel=2e-4)
            others = [float(s) for k, s in enumerate(scores) if k != gold]
            assert whole[f"margin_{side}"] == pytest.approx(float(scores[gold]) - max(others), abs=2e-4)
            assert whole[f"option_rank_{side}"] == sum(s > scores[gold] for s in others)
            assert abs(whole[f"gold_rank_{side}"] - int((x > x[letters[gold]]).sum())) <= 1


def test_the_choices_are_those_of_the_evaluation_harness(smollm2: LoadedModel, shared_data: Path) -> None:
    """MMLU high-school biology, 5 shots, item by item: the same options, prompts, log-likelihoods and choices, for a dropped model too.

    Two items here; PRUNESCOPE_HARNESS_ITEMS=60 is the acceptance run. Would catch another prompt, other shots, other option tokens.
    """
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install -r requirements-dev.txt")
    questions, shots = read_questions(shared_data / "mmlu", shots=5, subjects=[BIOLOGY])
    asked = ask(smollm2, questions[:ITEMS], "cue", shots)
    rows = mcq_rows(smollm2, SPEC, asked, batch_size=4).table
    rows = rows.filter(pc.equal(rows["space"], "global")).to_pylist()
    for side, spec in (("dense", DropSpec()), ("target", SPEC)):
        with smollm2.dropping(spec):
            samples = harness(smollm2, shared_data / "mmlu", ITEMS)
        assert len(samples) == ITEMS
        for row, question, sample in zip(rows, asked, samples, strict=True):
            assert [tuple(pair) for pair in sample["arguments"]] == [
                (question.text, option) for option in question.options
            ]
            scores = [score for score, _ in sample["filtered_resps"]]
            assert row[f"loglik_{side}"] == pytest.approx(scores, abs=2e-3)
            assert row[f"choice_{side}"] == int(np.argmax(scores))
            assert (row[f"choice_{side}"] == row["gold"]) == bool(sample["acc"])


def harness(loaded: LoadedModel, mmlu: Path, items: int) -> list[dict[str, Any]]:
    """What lm-evaluation-harness says of each item, its `mmlu` task pointed at local files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        files = {split: str(mmlu / split / f"{BIOLOGY}_{split}.csv") for split in ("test", "dev")}
        options = "\n".join(f"{letter}. {{{{choice{i}}}}}" for i, letter in enumerate("ABCD"))
        task = {
            "task": "local_biology", "dataset_path": "csv", "dataset_kwargs": {"data_files": files}, "test_split": "test", "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 5, "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}],
            "description": "The following are multiple choice questions (with answers) about high school biology.\n\n",
            "doc_to_text": f"{{{{question.strip()}}}}\n{options}\nAnswer:", "doc_to_choice": list("ABCD"), "doc_to_target": "answer",
        }  # fmt: skip
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
        found = simple_evaluate(
            model=model, tasks=[task], limit=items, log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),  # its own tasks are thousands of files
        )  # fmt: skip
    samples: list[dict[str, Any]] = found["samples"]["local_biology"]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def test_dense_against_itself(smollm2: LoadedModel) -> None:
    asked = ask(smollm2, read_questions()[0][:6], "cue", {})
    found = mcq_rows(smollm2, copy.copy(smollm2), asked)
    for column in FLOOR_COLUMNS:
        assert {value for value in found.table[column].to_pylist() if value is not None} == {0.0}, column
    summary = mcq_summary(found.table, 0)
    assert summary["flips"]["questions"] == []
    assert summary["flips"]["mcnemar_p"] == 1.0
    assert summary["agreement"]["same_choice"] == 1.0
    assert summary["accuracy"]["dense"] == summary["accuracy"]["target"]


@pytest.mark.parametrize("whole_words", [True, False], ids=["one token an option", "options of two tokens"])
def test_options_of_a_tiny_model_by_hand(whole_words: bool, tmp_path: Path) -> None:
    """Where " A" is one token its probability decides; where it is two, the sum of both log-likelihoods, and `scoring` says so.

    Would catch a score from the first token alone, which all options share there.
    """
    loaded = load_model(letters_folder(tmp_path / "m", whole_words=whole_words), device="cpu")
    questions = [*few(3), *few(2, options=3)]
    asked = ask(loaded, questions, "cue", {})
    found = mcq_rows(loaded, DropSpec(attn=(1, 4)), asked, batch_size=5)
    assert {len(ids) for question in asked for ids in question.option_tokens} == {1 if whole_words else 2}
    rows = [row for row in found.table.to_pylist() if row["space"] == "global"]
    assert {row["scoring"] for row in rows} == {"token" if whole_words else "sequence"}
    for row, question in zip(rows, asked, strict=True):
        for side, spec in (("dense", DropSpec()), ("target", DropSpec(attn=(1, 4)))):
            expected = []
            with loaded.dropping(spec), torch.no_grad():
                for tokens in question.option_tokens:
                    log_p = loaded.model(torch.tensor([question.tokens + tokens])).logits[0].double().log_softmax(-1)
                    places = range(len(question.tokens) - 1, len(question.tokens) + len(tokens) - 1)
                    expected.append(
                        sum(float(log_p[place, token]) for place, token in zip(places, tokens, strict=True))
                    )
            assert row[f"loglik_{side}"] == pytest.approx(expected, abs=1e-5)
            assert row[f"choice_{side}"] == int(np.argmax(expected))
    summary = mcq_summary(found.table, 0)
    assert summary["scored_by_sequence"] == (0 if whole_words else 5)
    for size in (1, 2):
        other = mcq_rows(loaded, DropSpec(attn=(1, 4)), asked, batch_size=size).table
        for column in ("kl_dense_target", "margin_target", "z_cos"):
            np.testing.assert_allclose(other[column].to_numpy(), found.table[column].to_numpy(), rtol=1e-3, atol=1e-5)


def test_mcnemar_is_scipys_exact_binomial() -> None:
    stats = pytest.importorskip("scipy.stats")
    for lost in (0, 1, 3, 10, 40):
        for won in (0, 1, 2, 12, 55):
            expected = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
            assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-12)


def test_calibration_by_hand() -> None:
    found = calibration([0.95, 0.91, 0.35, 0.3, 1.0], [True, False, False, True, True], bins=10)
    # bin 0.9-1: confidence 0.95333, accuracy 2/3; bin 0.3-0.4: 0.325 and 1/2
    assert found["ece"] == pytest.approx((3 * abs(2.86 / 3 - 2 / 3) + 2 * abs(0.325 - 0.5)) / 5)
    assert [row["questions"] for row in found["bins"]] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 3]


def test_flips_and_accuracy_are_counted(tmp_path: Path) -> None:
    loaded = load_model(letters_folder(tmp_path / "m", whole_words=True), device="cpu")
    table = mcq_rows(loaded, DropSpec(mlp=(0, 3)), ask(loaded, few(40), "cue", {})).table
    rows = [row for row in table.to_pylist() if row["space"] == "options"]
    before, after = ([row[f"choice_{side}"] == row["gold"] for row in rows] for side in ("dense", "target"))
    fates = Counter(zip(before, after, strict=True))
    summary = mcq_summary(table, 0)
    assert fates[True, False] + fates[False, True] > 3, "the drop is chosen so that answers flip"
    assert summary["flips"]["right_to_wrong"] == fates[True, False]
    assert summary["flips"]["wrong_to_right"] == fates[False, True]
    assert summary["accuracy"]["dense"]["accuracy"] == sum(before) / 40
    changed = [row["question"] for row in rows if row["choice_dense"] != row["choice_target"]]
    assert summary["flips"]["questions"] == changed
    wrong = sum(not b and not a for b, a, row in zip(before, after, rows, strict=True) if row["question"] in changed)
    assert summary["flips"]["wrong_to_wrong"] == wrong


# --- questions and prompts ---------------------------------------------------------------------------------------------


def test_the_shipped_questions() -> None:
    questions, _ = read_questions()
    assert len(questions) >= 60
    assert (
        len({question.id for question in questions})
        == len({question.question for question in questions})
        == len(questions)
    )
    assert len({question.subject for question in questions}) == 3
    assert {len(question.choices) for question in questions} == {4}
    counts = Counter(question.answer for question in questions)
    assert max(counts.values()) - min(counts.values()) <= 1
    longest = sum(max(question.choices, key=len) == question.choices[question.answer] for question in questions)
    assert longest <= 0.4 * len(questions), "the right option must not be told by its length"


def test_templates_write_what_they_say() -> None:
    question = Question("q", " Which is a bird? ", ("Cow", "Owl", "Ant", "Cod"), 1, "high_school_biology")
    shot = Question("s", "Which is red?", ("Sky", "Blood"), 1, "high_school_biology")
    assert cue_prompt(question, [shot]) == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Which is red?\nA. Sky\nB. Blood\nAnswer: B\n\nWhich is a bird?\nA. Cow\nB. Owl\nC. Ant\nD. Cod\nAnswer:"
    )
    paper = question_text(question, "paper")
    assert paper == "Which is a bird?\nChoose the correct answer:\na) Cow\nb) Owl\nc) Ant\nd) Cod"
    assert option_strings("cue", 3) == [" A", " B", " C"]
    assert option_strings("paper", 2) == [" a", " b"]
    assert option_strings("chat", 2) == ["A", "B"]


@pytest.mark.parametrize(("template", "pieces"), [("cue", " A"), ("paper", " a"), ("chat", "A")])
def test_option_tokens_of_the_real_tokenizer(smollm2: LoadedModel, template: Any, pieces: str) -> None:
    asked = ask(smollm2, read_questions()[0][:2], template, {})
    for question in asked:
        assert question.by_token
        assert smollm2.tokenizer.decode(question.option_tokens[0]) == pieces
    if template == "chat":
        assert asked[0].text.endswith("<|im_start|>assistant\n")


def test_files_of_questions(tmp_path: Path) -> None:
    """JSONL with letters or indices, MMLU with and without header, shots from the dev file."""
    lines = [
        {"question": "w1?", "choices": ["w2", "w3"], "answer": "b"},
        {"question": "w1, \u00fcber?", "choices": ["w2", "w3", "w4"], "answer": 2, "id": "x", "subject": "s"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", "utf-8")
    found, _ = read_questions(path)
    assert [(q.answer, q.id, q.subject) for q in found] == [(1, "1", ""), (2, "x", "s")]
    for split, header in (("test", "question,choice0,choice1,answer\n"), ("dev", "")):
        (tmp_path / split).mkdir()
        answer = "1" if header else "B"
        (tmp_path / split / f"law_{split}.csv").write_text(
            f'{header}"What, then?\nSay.",yes,no,{answer}\nAnd?,a,b,{"0" if header else "A"}\n'
        )
    questions, shots = read_questions(tmp_path, shots=2)
    assert [(q.id, q.question, q.choices, q.answer) for q in questions] == [
        ("law-0", "What, then?\nSay.", ("yes", "no"), 1),
        ("law-1", "And?", ("a", "b"), 0),
    ]
    assert [(q.answer, q.subject) for q in shots["law"]] == [(1, "law"), (0, "law")]
    assert read_questions(tmp_path / "test" / "law_test.csv", shots=1)[1]["law"] == shots["law"][:1]


def write(folder: Path, *rows: object) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"question": "w1?", "choices": ["w2", "w3"], "answer": 0}
BAD_QUESTIONS: dict[str, tuple[object, str]] = {
    "no answer": ({"question": "w1?", "choices": ["a", "b"]}, "line 2: no 'answer'"),
    "answer out of range": (GOOD | {"answer": 2}, "the answer '2' is out of range; give 0 to 1 or A to B"),
    "letter out of range": (GOOD | {"answer": "D"}, "the answer 'D' is out of range"),
    "negative answer": (GOOD | {"answer": -1}, "out of range"),
    "answer is true": (GOOD | {"answer": True}, "out of range"),
    "answer is a fraction": (GOOD | {"answer": 0.5}, "out of range"),
    "duplicate options": (GOOD | {"choices": ["w2", "w3 ", "w3"]}, "the option 'w3' stands there twice"),
    "one option": (GOOD | {"choices": ["w2"]}, "1 choices"),
    "an empty option": (GOOD | {"choices": ["w2", " "]}, "none of them empty"),
    "options are a text": (GOOD | {"choices": "ab"}, "choices must be a list"),
    "no question": (GOOD | {"question": " "}, "no text"),
    "a list": ([1], "not a JSON object"),
}


@pytest.mark.parametrize("mistake", BAD_QUESTIONS)
def test_a_bad_question_is_named(mistake: str, tmp_path: Path) -> None:
    row, message = BAD_QUESTIONS[mistake]
    with pytest.raises(UserError) as caught:
        read_questions(write(tmp_path, GOOD, row))
    assert message in str(caught.value)
    assert "line 2" in str(caught.value)


def test_options_that_are_the_same_tokens_are_refused(tmp_path: Path) -> None:
    """A tokenizer that knows no letters gives every option the same unknown token."""
    from families import tiny_folder

    loaded = load_model(tiny_folder("llama", tmp_path / "m"), device="cpu")
    with pytest.raises(UserError, match=r"' A' and ' B' are the same tokens \[3\]"):
        ask(loaded, few(1), "cue", {})
    with pytest.raises(UserError, match="no chat template"):
        ask(loaded, few(1), "chat", {})


# --- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_a_run_folder_holds_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also interrupted and resumed: the same rows and samples as in one go."""
    from prunescope.compare import mcq

    folder = letters_folder(tmp_path / "m", whole_words=True)
    path = write(
        tmp_path,
        *(
            {"question": f"w{i} w{i + 1}", "choices": ["w1", "w2", "w3"], "answer": i % 3, "subject": "abc"[i % 2]}
            for i in range(7)
        ),
    )
    argv = ["mcq", str(folder), "drop:mlp=1;attn=2", "--questions", str(path), "--batch-size", "3", "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    real, calls = mcq._batch, []

    def failing(*args: Any) -> Any:
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(mcq, "_batch", failing)
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    assert "continue with --resume" in capfd.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert calls == [0, 3, 3, 6]
    whole, run = (prunescope.open(tmp_path / name) for name in ("whole", "run"))
    assert run.table().equals(whole.table())
    assert run.samples() == whole.samples()
    assert run.info["accuracy_by_subject"].keys() == {"a", "b"}
    assert run.info["chance"] == pytest.approx(1 / 3)
    assert "not above chance (0.333)" in capfd.readouterr().out
    table = run.table()
    assert table["question"].to_pylist() == [i for i in range(7) for _ in range(2)]
    mean = run.info["summary_by_space"]["options"]["p"]["kl_dense_target"]["mean"]
    options = table.filter(pc.equal(table["space"], "options"))
    assert mean == pytest.approx(pc.mean(options["kl_dense_target"]).as_py())
    sample = run.samples()[2]
    assert sample["option_tokens"] == [4, 5, 6]
    for side in ("dense", "target"):
        found = [token[f"p_{side}"] for token in sample[f"top_{side}"]]
        assert len(found) == 30 and found == sorted(found, reverse=True) and sum(found) < 1
    both = {token["token"]: token for token in sample["top_target"]}
    for token in sample["top_dense"]:
        if other := both.get(token["token"]):
            assert other["p_dense"] == pytest.approx(token["p_dense"]) and other["p_target"] == pytest.approx(
                token["p_target"]
            )
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"fig08_tokens_and_options.svg", "fig08_global_and_options.png", "margins.svg"} <= names
