"""Files of the user's own rows: what they may hold, and scores against plain transformers, row by row without cache or batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import prunescope
from prunescope.data.asked import read_asked
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.tasks.own import begins_with, evaluate_own, own_tasks

WRITTEN = [
    {"prompt": "The capital of France is", "answer": "Paris"},
    {"prompt": "The capital of Italy is", "answer": "rome"},
    {"question": "What is the colour of the sky?", "answer": "a very unlikely answer"},
]
CHOSEN = [
    {"question": "Which of these is a number?", "choices": ["seven and a half", "red", "run"], "answer": 0},
    {"question": "Where do fish live?", "choices": ["in water", "on the moon"], "answer": "B"},
]


def rows_in(folder: Path, rows: list[dict[str, object]], name: str = "mine.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(folder / name)


def test_scores_are_those_of_plain_transformers(smollm2: LoadedModel, tmp_path: Path) -> None:
    """Catches an option scored without its first token, options of the wrong question, a letter taken for an index, writing that stops too
    early, and a limit that is not each task's own."""
    source = rows_in(tmp_path, [*WRITTEN, *CHOSEN])
    table, scores = evaluate_own(smollm2, source, limit=None, batch_size=2, advance=lambda done: None)
    assert list(scores) == ["mine-chosen", "mine-written"] == list(own_tasks(source, read_asked(source)))
    assert scores["mine-chosen"]["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2) and scores["mine-chosen"]["n"] == 2
    tokenizer, model = smollm2.tokenizer, smollm2.model
    found = {(row["task"], row["item"]): row for row in table.to_pylist()}
    for number, row in enumerate(CHOSEN):
        prompt = f"Question: {row['question']}\nAnswer:"
        sums = []
        for option in row["choices"]:  # type: ignore[attr-defined]
            ids, start = tokenizer(f"{prompt} {option}")["input_ids"], len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                likely = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(likely[i - 1, ids[i]]) for i in range(start, len(ids))))
        best = row["choices"][sums.index(max(sums))]  # type: ignore[index]
        gold = {"in water": "on the moon", "seven and a half": "seven and a half"}[row["choices"][0]]  # type: ignore[index]
        mine = found["mine-chosen", number]
        assert (mine["prediction"], mine["gold"], mine["score"]) == (best, gold, float(best == gold))
    for number, row in enumerate(WRITTEN):
        prompt = row.get("prompt", f"Question: {row.get('question')}\nAnswer:")
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        text = ""
        for _ in range(4):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        text = tokenizer.decode(ids[0]).removeprefix(prompt).strip().partition("\n")[0]
        mine = found["mine-written", number]
        assert mine["prediction"].startswith(text) or text.startswith(mine["prediction"])
        assert mine["score"] == float(text.casefold().startswith(str(row["answer"]).casefold()))
    assert [found["mine-written", i]["score"] for i in range(3)] == [1.0, 1.0, 0.0]
    assert {row["item"] for row in evaluate_own(smollm2, source, limit=1, batch_size=2, advance=lambda done: None)[0].to_pylist()} == {0}  # fmt: skip


def test_where_an_answer_ends() -> None:
    """By hand. Catches 4 taken for 42, and a full stop or a unit after the answer taken for another answer."""
    assert all(
        begins_with(*pair) for pair in [(" Paris.", "paris"), ("42 km", "42"), ("42.\nSo", "42"), ("(a) x", "(a)")]
    )
    assert not any(begins_with(*pair) for pair in [("420", "42"), ("42.5", "42"), ("Parisian", "Paris"), ("", "x")])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([WRITTEN[0], {"prompt": "alone"}], "line 2: some rows of this file have an answer and some have none"),
        ([{"prompt": "x", "answer": " "}], "line 1: the answer is no text"),
        ([{"answer": "x"}], "line 1: no 'prompt' or 'question'"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 2}], "out of range"),
        ([{"id": 1, "prompt": "x", "answer": "y"}, {"id": 1, "prompt": "z", "answer": "y"}], "'1' stands there twice"),
        ([], "holds no prompt"),
    ],
)
def test_bad_files(rows: list[dict[str, object]], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_asked(rows_in(tmp_path, rows))


def test_evaluate_takes_a_file(smollm2: LoadedModel, tmp_path: Path) -> None:
    """A drop against the dense model on the same rows; prompts alone are refused before the model runs; a file that changed is not resumed."""
    source = rows_in(tmp_path, WRITTEN)
    out = str(tmp_path / "out")
    found = prunescope.evaluate([smollm2, "drop:attn=3"], tasks=source, out=out)
    assert found.info["tasks"] == ["mine-written"] and found.table().num_rows == 6
    rows_in(tmp_path, WRITTEN[:2])
    with pytest.raises(UserError, match="other models, tasks or options"):
        prunescope.evaluate([smollm2, "drop:attn=3"], tasks=source, out=out, resume=True)
    with pytest.raises(UserError, match="rows have no answer"):
        prunescope.evaluate([smollm2], tasks=rows_in(tmp_path, [{"prompt": "x"}], "alone.jsonl"))
