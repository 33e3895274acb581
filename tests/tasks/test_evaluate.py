"""Quick tasks against arithmetic of their own and plain transformers; harness tasks against lm-evaluation-harness run by itself; paired
statistics; the run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

import prunescope
from families import tiny_folder
from prunescope.cli import main
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.stats import newcombe, paired
from prunescope.tasks import quick
from prunescope.tasks.answering import Asking, answer
from prunescope.tasks.evaluate import evaluate_model, expand_tasks
from prunescope.tasks.harness import own_files
from prunescope.tasks.scores import at_floor, compare_scores, score

SPEC = DropSpec(attn=(22, 25), mlp=(14,))
ITEMS = int(os.environ.get("PRUNESCOPE_EVALUATE_ITEMS", "2"))  # 20 for the acceptance run
TOKENS = int(os.environ.get("PRUNESCOPE_EVALUATE_TOKENS", "12"))  # 256 there


# --- quick tasks -------------------------------------------------------------------------------------------------------


def by_hand(pair: str, question: str) -> str:
    """The right end of a line, worked out from its text alone."""
    text = question.rpartition("->")[0].split() if "->" in question else []
    if pair == "arithmetic":
        a, b = question.removesuffix(" =").split(" + ")
        return str(int(a) + int(b))
    if pair == "reversal":
        return " ".join(text[::-1])
    if pair == "brackets":
        return " ".join({"(": ")", "[": "]", "{": "}"}[c] for c in text[::-1])
    if pair == "substitution":
        order, _, phrase = question.removesuffix(" ->").partition(": ")
        new, old = order.removeprefix("Put ").split(" for ")
        return phrase.replace(old, new)
    listed, name = question.removesuffix(":").split("; ")
    return dict(entry.split() for entry in listed.split(", "))[name]


@pytest.mark.parametrize("pair", quick.PAIRS)
def test_items_are_right_and_their_wrong_options_are_wrong(pair: str) -> None:
    """Would catch a gold index that moved in shuffling, options twice the same, and items that depend on how many there are."""
    items = quick.items(pair, 150, 3)
    assert items[:40] == quick.items(pair, 40, 3)
    assert items[:40] != quick.items(pair, 40, 4)
    assert len({item.question for item in items}) > 140 and len({item.key for item in items}) == 150
    for item in items:
        assert item.answer == f" {by_hand(pair, item.question)}"
        assert len(set(item.options)) == quick.OPTIONS
    share = np.bincount([item.gold for item in items], minlength=4) / len(items)
    assert share.min() > 0.12  # the right one has no favourite place


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("dropped", ["", "attn=0;mlp=1", "attn=0-2"])
def test_both_ways_of_answering_are_those_of_plain_transformers(family: str, dropped: str, tmp_path: Path) -> None:
    """Against one uncached forward pass a sequence, float32. Would catch a cache shared between items or options, wrong positions behind
    the common prefix, an option's first or last token left out, and a batch that changes anything."""
    loaded = load_model(tiny_folder(family, tmp_path / "m"), device="cpu", dtype="float32")
    rng = random.Random(0)
    words = lambda n: [rng.randrange(4, 60) for _ in range(n)]  # noqa: E731
    head = words(5)
    asked = [Asking(head + words(n), [words(k) for k in (1, 3, 2, 2)]) for n in (2, 4, 2, 2, 3)]
    spec = DropSpec.parse(dropped) if dropped else DropSpec()
    with loaded.dropping(spec), torch.no_grad():
        found = [
            answer(loaded, asked, write=True, choose=True, ended=lambda t: t[-1] < 20, max_new_tokens=4, batch_size=size)
            for size in (1, 3)
        ]  # fmt: skip
        for number, question in enumerate(asked):
            for option, value in zip(question.options, found[0][number].scores, strict=True):
                ids = torch.tensor([question.tokens + option])
                log_p = loaded.model(ids, use_cache=False).logits[0].log_softmax(-1)
                at = range(len(question.tokens) - 1, ids.shape[1] - 1)
                expected = sum(float(log_p[i, ids[0, i + 1]]) for i in at)
                assert value == pytest.approx(expected, abs=2e-4)
            written: list[int] = []
            while len(written) < 4 and (not written or written[-1] >= 20):
                ids = torch.tensor([question.tokens + written])
                written.append(int(loaded.model(ids, use_cache=False).logits[0, -1].argmax()))
            assert found[0][number].written == written == found[1][number].written
            assert found[0][number].scores == pytest.approx(found[1][number].scores, abs=2e-4)


def test_quick_tasks_on_the_real_model(smollm2: LoadedModel) -> None:
    """A pair's two ways ask the same items, together as apart and whatever the batch; dropping is seen and undone."""
    tasks = ["substitution-gen", "substitution-mc"]
    options: Any = {"limit": 10, "shots": 3, "advance": lambda done: None}
    whole = evaluate_model(smollm2, tasks, batch_size=10, **options)
    again = [evaluate_model(smollm2, [task], batch_size=3, **options) for task in tasks]
    rows = whole.items.to_pylist()
    assert rows == [row for one in again for row in one.items.to_pylist()]
    assert [row["key"] for row in rows[:10]] == [row["key"] for row in rows[10:]]
    assert whole.scores["substitution-gen"]["value"] >= 0.3 and whole.scores["substitution-mc"]["value"] >= 0.5
    with smollm2.dropping(DropSpec.parse("block=10-16")):
        broken = evaluate_model(smollm2, tasks, **options)
    assert broken.scores["substitution-gen"]["value"] == 0.0
    assert evaluate_model(smollm2, tasks, batch_size=10, **options).items.equals(whole.items)


def test_names_of_tasks() -> None:
    assert expand_tasks(["quick-mc", "gsm8k", "lookup-mc"])[-2:] == ["lookup-mc", "gsm8k"]
    assert len(expand_tasks(["quick"])) == 10
    with pytest.raises(UserError, match="no task named"):
        expand_tasks([""])


# --- statistics --------------------------------------------------------------------------------------------------------


def test_the_paired_interval_is_newcombes_and_covers() -> None:
    """Against the published interval of Bentur et al.'s table (Fagerland, Lydersen and Laake 2014: 0.026 to 0.507 for 1, 1, 7, 12), and by
    its coverage of correlated pairs. Would catch swapped cells and a wrong sign of the correlation."""
    assert newcombe(1, 1, 7, 12) == pytest.approx([0.026, 0.507], abs=5e-4)
    assert newcombe(1, 7, 1, 12) == pytest.approx([-0.507, -0.026], abs=5e-4)
    assert newcombe(0, 0, 0, 0) is None
    rng, p, inside = np.random.default_rng(0), [0.45, 0.2, 0.05, 0.3], 0
    for _ in range(2000):
        low, high = newcombe(*map(int, rng.multinomial(60, p)))  # type: ignore[misc]
        inside += low <= p[2] - p[1] <= high
    assert 0.935 <= inside / 2000 <= 0.975


def test_paired_statistics() -> None:
    from scipy.stats import binomtest

    first, second = [1, 1, 1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1, 0, 0]
    found = paired(first, second)
    assert (found["right_to_wrong"], found["wrong_to_right"], found["difference"]) == (4, 1, -3 / 8)
    assert found["mcnemar_p"] == pytest.approx(binomtest(1, 5).pvalue)
    graded = paired([0.5, 0.2, 0.9, 0.4] * 10, [0.6, 0.3, 1.0, 0.5] * 10)
    assert graded["interval"] == "bootstrap" and graded["mcnemar_p"] is None
    assert graded["ci95"] == pytest.approx([0.1, 0.1])
    row = {"task": "t", "item": 0, "key": "a", "metric": "acc", "score": 1.0}
    with pytest.raises(ValueError, match="not the same"):
        compare_scores([row], [row | {"key": "b"}])


def test_what_says_nothing() -> None:
    assert at_floor(score([0.0] * 99 + [1.0], "exact_match", "generative", 0.0, 8))
    assert not at_floor(score([0.0] * 7 + [1.0] * 3, "exact_match", "generative", 0.0, 8))
    assert at_floor(score([0.0] * 14 + [1.0] * 6, "acc", "choice", 0.25, 8))
    assert not at_floor(score([0.0] * 5 + [1.0] * 15, "acc", "choice", 0.25, 8))


# --- the harness -------------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
import lm_eval
from pathlib import Path
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
folder, data, items, tokens, out = sys.argv[1:]
def subject(row):
    return {"question": row["question"], "choices": [str(row[f"choice{i}"]) for i in range(4)], "answer": int(row["answer"])}
def own(path):
    return load_yaml(Path(lm_eval.__file__).parent / "tasks" / path, resolve_func=False)
tasks = []
for name in ("mmlu_anatomy", "mmlu_astronomy"):
    short = name.removeprefix("mmlu_")
    files = {s: f"{data}/mmlu/{s}/{short}_{s}.csv" for s in ("test", "dev")}
    tasks.append({**own(f"mmlu/default/{name}.yaml"), "task": name, "dataset_path": "csv", "dataset_name": None,
        "dataset_kwargs": {"data_files": files}, "process_docs": lambda docs: docs.map(subject), "fewshot_config": {"sampler": "first_n", "process_docs": lambda docs: docs.map(subject)}})
gsm = own("gsm8k/gsm8k.yaml")
gsm.pop("training_split")
tasks.append({**gsm, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": f"{data}/gsm8k_test.jsonl"}}, "fewshot_split": "test"})
code = own("humaneval/humaneval.yaml")
code = {k: v for k, v in code.items() if k not in ("metric_list", "filter_list", "unsafe_code")}
tasks.append({**code, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{data}/humaneval.jsonl.gz"}},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]})
for one in tasks:
    for key in ("tag", "group"):
        one.pop(key, None)
found = lm_eval.simple_evaluate(model="hf", model_args=f"pretrained={folder},dtype=float32", device="cpu", batch_size=1, tasks=tasks,
    task_manager=TaskManager(include_defaults=False), num_fewshot=2, limit=int(items), gen_kwargs={"max_gen_toks": int(tokens)}, bootstrap_iters=0)
rows = {t: [[s["doc_id"], s["filter"], [list(a) for a in s["arguments"]], s["resps"], s.get("acc", s.get("exact_match")), s["doc"]] for s in rows] for t, rows in found["samples"].items()}
json.dump(rows, open(out, "w"), default=str)
"""


def passes(program: str) -> bool:
    """A program run plainly; it is ours or the bundled model's, a minute at most."""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def test_item_by_item_the_numbers_are_those_of_the_harness_by_itself(
    smollm2: LoadedModel, shared_data: Path, tmp_path: Path
) -> None:
    """The exported model (zeroed), in another process, loaded by the harness from its folder, its own tasks over datasets' own readers of the
    same files; ours with the sublayers dropped in memory, and in batches. Would catch another prompt, other shots, padding or
    truncation that changes an answer, and a program judged otherwise than by running it."""
    pytest.importorskip("lm_eval")
    from prunescope.models.saving import save_dropped

    folder, out = tmp_path / "zeroed", tmp_path / "alone.json"
    folder.mkdir()
    save_dropped(smollm2, SPEC, folder, "zeroed", {"command": "drop", "config": {}})
    arguments = [str(folder), str(shared_data), str(ITEMS), str(TOKENS), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, env=environment, capture_output=True)
    alone = json.loads(out.read_text())
    tasks = ["mmlu_anatomy", "mmlu_astronomy", "gsm8k", "humaneval"]
    with smollm2.dropping(SPEC):
        ours = evaluate_model(
            smollm2, tasks, limit=ITEMS, shots=2, batch_size=3, max_new_tokens=TOKENS, data=shared_data, allow_code_execution=True,
            advance=lambda done: None,
        )  # fmt: skip
    rows = {(row["task"], row["item"]): row for row in ours.items.to_pylist()}
    compared = 0
    for task in tasks:
        mine = {(s["doc_id"], s["filter"]): s for s in ours.harness[task]["samples"][task]}
        for doc, name, arguments_alone, answers, value, content in alone[task]:
            filter_name = "create_test" if task == "humaneval" else name
            sample = mine[doc, filter_name]
            assert [argument[0] for argument in sample["arguments"]] == [a[0] for a in arguments_alone]
            if task.startswith("mmlu"):
                theirs = [float(one[0][0]) for one in answers]
                assert [one[0][0] for one in sample["resps"]] == pytest.approx(theirs, abs=2e-3)
                assert sample["acc"] == value == rows[task, doc]["score"]
            else:
                assert sample["resps"] == answers
                compared += len(answers[0][0])
            if task == "gsm8k":
                assert sample["exact_match"] == value
            if task == "humaneval":
                program = f"{content['prompt']}{answers[0][0]}\n{content['test']}\ncheck({content['entry_point']})"
                assert rows[task, doc]["score"] == passes(program)
    assert compared > ITEMS * TOKENS and len(rows) == 4 * ITEMS
    assert ours.scores["gsm8k"]["note"] and not ours.scores["mmlu_anatomy"]["note"]


def test_files_of_the_user_and_groups(smollm2: LoadedModel, shared_data: Path, tmp_path: Path) -> None:
    """Solutions that are right pass and those that are wrong do not; a group's score is the mean over its items."""
    pytest.importorskip("lm_eval")
    lines = [{"question": f"What is {a} plus 1?", "answer": a + 1} for a in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [{"question": "Which is a colour?", "choices": ["red", "seven", "walk"], "answer": 0}] * 2
    (tmp_path / "pick.jsonl").write_text("".join(json.dumps(line) + "\n" for line in options))
    found = evaluate_model(
        smollm2, ["sums.jsonl", "pick.jsonl"], data=tmp_path, max_new_tokens=5, advance=lambda done: None
    )
    assert found.scores["sums"]["kind"] == "generative" and found.scores["pick"]["kind"] == "choice"
    assert found.scores["pick"]["chance"] == pytest.approx(1 / 3)
    assert [row["gold"] for row in found.items.to_pylist()] == ["1", "2", "3", "red", "red"]
    before = own_files(["quick", "sums.jsonl", "pick.jsonl"], tmp_path)
    (tmp_path / "pick.jsonl").write_text("".join(json.dumps(line) + "\n" for line in options[:1]))
    after = own_files(["sums.jsonl", "pick.jsonl"], tmp_path)
    assert list(before) == ["sums", "pick"] and before["sums"] == after["sums"] and before["pick"] != after["pick"]


# --- the run -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(
    smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same table as in one go, finished tasks not measured again; a model that changed meanwhile is refused."""
    from prunescope.jobs import evaluate as job

    real, calls = job.evaluate_model, []

    def failing(loaded: LoadedModel, unit: Any, **options: Any) -> Any:
        calls.append((str(loaded.dropped), *unit))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(loaded, unit, **options)

    monkeypatch.setattr(job, "evaluate_model", failing)
    arguments: Any = {"tasks": "arithmetic-mc,lookup-gen,arithmetic-gen", "limit": 3, "shots": 1}
    models: Any = [smollm2, "drop:mlp=14"]
    with pytest.raises(KeyboardInterrupt):
        prunescope.evaluate(models, out=str(tmp_path / "run"), **arguments)
    assert len(list((tmp_path / "run.partial").glob("part-*.parquet"))) == 2
    with pytest.raises(UserError, match="--resume"):
        prunescope.evaluate(models, out=str(tmp_path / "run"), **arguments)
    found = prunescope.evaluate(models, out=str(tmp_path / "run"), resume=True, **arguments)
    assert len(calls) == 5 and calls[2] == calls[3]
    assert calls[0] == ("", "arithmetic-mc", "arithmetic-gen")
    whole = prunescope.evaluate(models, **arguments)
    assert whole.table().equals(found.table()) and len(whole.table()) == 2 * 3 * 3
    run = prunescope.open(tmp_path / "run")
    assert run.command == "evaluate" and run.table().equals(found.table())
    assert run.summary["drop:mlp=14"]["lookup-gen"]["n"] == 3
    kept = run.table().filter(pc.equal(run.table()["model"], "drop:mlp=14"))
    scores = [row["score"] for row in kept.to_pylist() if row["task"] == "arithmetic-mc"]
    pair = run.info["paired"]["drop:mlp=14"]["arithmetic-mc"]
    dense = [row["score"] for row in run.table().to_pylist()[:3]]
    assert pair["difference"] == pytest.approx(np.mean(scores) - np.mean(dense))
    assert "| arithmetic-mc | choice | acc | 3 |" in (tmp_path / "run" / "summary.md").read_text()
    assert prunescope.evaluate(models, out=str(tmp_path / "run"), resume=True, **arguments).table().equals(run.table())
    with pytest.raises(UserError, match="other models, tasks or options"):
        prunescope.evaluate(models, out=str(tmp_path / "run"), resume=True, **arguments | {"seed": 1})
    shown = capfd.readouterr().out
    assert "2: drop:mlp=14" in shown and max(map(len, shown.splitlines())) <= 80 and "..." not in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["m", "--tasks", "gsm9k"], "neither a quick task nor one of lm-evaluation-harness; near it are gsm8k"),
        (["m", "--tasks", "humaneval"], "allow it with --allow-code-execution"),
        (["m", "--tasks", "none.jsonl"], "no such file"),
        (["m", "--limit", "0"], "--limit 0: it must be at least 1"),
        (["m", "--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["drop:attn=1", "m"], "the first model is the dense one"),
        (["m", "drop:attn"], "cannot read 'attn'"),
        ([], "the following arguments are required: models"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and len(lines) == 1
    assert not list(tmp_path.iterdir())


def test_data_that_is_not_there_is_named(smollm2: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for task, message in (
        ("gsm8k", "its data set openai/gsm8k is not in --data"),
        ("mmlu_anatomy", "anatomy_test.csv"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_model(smollm2, [task], data=tmp_path, advance=lambda done: None)
