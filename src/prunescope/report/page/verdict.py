"""What the figures of a target mean for each use, in plain words, with the rule behind each.

The uses are those of the paper's discussion (section 8): retrieval reads the hidden state h; multiple choice reads a few option tokens; generation
reads the full distribution p, again and again. The thresholds are this project's, a choice, and stated with every verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["FEW_PROMPTS", "Verdict", "judge", "warnings_of"]

FEW_PROMPTS = 30
KEPT, RISK, BROKEN, UNCLEAR = "kept", "at risk", "broken", "not shown"
TOO_FEW = 5  # prompts or questions
_H = (0.95, 0.80)  # mean cosine of the final h
_SAME = (0.90, 0.70)  # same choice
_NDCG = (0.95, 0.80)  # nDCG@10, share of the dense model's
_AGREE, _KL = (0.95, 0.80), 0.05  # same most likely token a step; nats a step


@dataclass(frozen=True)
class Verdict:
    """One use of a model: ``level`` is kept, at risk, broken or not shown; ``numbers`` are (name, value) as shown."""

    use: str
    space: str
    level: str
    sentence: str
    rule: str
    numbers: list[tuple[str, str]] = field(default_factory=list)


def judge(runs: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts on one target.

    Args:
        runs: command (``generate``, ``mcq``, ``retrieve``) -> run.json of that command on the target.
    """
    generate, mcq = runs.get("generate"), runs.get("mcq")
    return [
        _unless_few(_retrieval(runs), runs.get("retrieve") or generate or mcq),
        _unless_few(_choice(mcq), mcq),
        _unless_few(_generation(generate), generate),
    ]


def _count(info: Mapping[str, Any]) -> tuple[int, str]:
    """How many prompts or questions a run has, and these words."""
    if info["command"] == "retrieve":
        return info["queries"], f"{info['queries']} quer{'y' if info['queries'] == 1 else 'ies'}"
    count, what = (info["questions"], "question") if info["command"] == "mcq" else (len(info["prompts"]), "prompt")
    return count, f"{count} {what}{'' if count == 1 else 's'}"


def _unless_few(verdict: Verdict, info: Mapping[str, Any] | None) -> Verdict:
    """No word is said on a handful of prompts; the numbers are shown all the same."""
    if info is None or verdict.level == UNCLEAR or _count(info)[0] >= TOO_FEW:
        return verdict
    sentence = f"Only {_count(info)[1]}: too few for a verdict, which needs {TOO_FEW}."
    return replace(verdict, level=UNCLEAR, sentence=sentence)


def _steps(info: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    regime = "teacher-forced" if "teacher-forced" in info["regimes"] else info["regimes"][0]
    return regime, info["summary_by_regime"][regime]


def _mean(stats: Mapping[str, Any]) -> str:
    low, high = stats["ci95"]
    return f"{stats['mean']:.4g}" + ("" if low is None else f" ({low:.4g} to {high:.4g})")


def _searched(info: Mapping[str, Any]) -> Verdict:
    """By what was found in a corpus, where a run of `retrieve` shows it."""
    use, (high, low) = "Embedding and retrieval", _NDCG
    rule = f"nDCG@10, share of the dense model's: kept from {high:g} with no significant loss (95 % interval), broken below {low:g}."
    found = info["measures"]["ndcg_10"]
    share = found["target"] / found["dense"] if found["dense"] else 0.0
    numbers = [
        ("nDCG@10, dense", f"{found['dense']:.3f}"),
        ("nDCG@10, target", f"{found['target']:.3f}"),
        (
            "change, 95 % interval",
            f"{found['diff']:+.3f} ({found['diff_ci95'][0]:+.3f} to {found['diff_ci95'][1]:+.3f})",
        ),
        ("same first passage", _mean(info["summary"]["retrieval"]["top1_same"])),
    ]
    if not found["dense"]:
        return Verdict(use, "h", UNCLEAR, "The dense model finds nothing in this corpus.", rule, numbers)
    lost = found["diff_ci95"][1] < 0
    level = BROKEN if share < low else KEPT if share >= high and not lost else RISK
    words = {
        KEPT: "The target finds in the corpus what the dense model finds.",
        RISK: "The target finds somewhat less in the corpus, or too few queries show whether it does.",
        BROKEN: "The target finds much less in the corpus.",
    }[level]
    return Verdict(use, "h", level, words, rule, numbers)


def _retrieval(runs: Mapping[str, Mapping[str, Any]]) -> Verdict:
    if (info := runs.get("retrieve")) is not None:
        return _searched(info)
    rule = f"Mean cosine of the final hidden state: kept from {_H[0]:g}, broken below {_H[1]:g}."
    use = "Embedding and retrieval"
    if info := runs.get("generate"):
        where, summary = _steps(info)
    elif info := runs.get("mcq"):
        where, summary = "at the answer", info["summary_by_space"]["global"]
    else:
        return Verdict(
            use, "h", UNCLEAR, "No run of generate or mcq shows the final hidden state of this target.", rule
        )
    stats = summary["h"].get("h_cos")
    if stats is None:
        return Verdict(use, "h", UNCLEAR, "The two hidden states have different widths; there is no cosine.", rule)
    value = stats["mean"]
    level = KEPT if value >= _H[0] else RISK if value >= _H[1] else BROKEN
    words = {
        KEPT: "Hidden states point where they did; rankings by embedding should hold.",
        RISK: "Hidden states have turned; rankings by embedding will shift, test them.",
        BROKEN: "Hidden states have turned far; embeddings of the two models do not belong together.",
    }[level]
    return Verdict(use, "h", level, words, rule, [(f"cosine of h, {where}", _mean(stats))])


def _choice(info: Mapping[str, Any] | None) -> Verdict:
    use = "Multiple choice"
    rule = f"Same choice: kept from {_SAME[0]:g} with no significant loss (McNemar p at least 0.05), broken below {_SAME[1]:g}."
    if info is None:
        return Verdict(use, "options", UNCLEAR, "No mcq run of this target is on this page.", rule)
    same, flips, accuracy = info["agreement"]["same_choice"], info["flips"], info["accuracy"]
    lost = flips["mcnemar_p"] < 0.05 and flips["right_to_wrong"] > flips["wrong_to_right"]
    level = BROKEN if same < _SAME[1] else KEPT if same >= _SAME[0] and not lost else RISK
    words = {
        KEPT: "Among the options the target chooses as the dense model does.",
        RISK: "The target changes some choices.",
        BROKEN: "The target answers many questions differently from the dense model.",
    }[level]
    if accuracy["dense"]["ci95"][0] <= info["chance"]:
        words += " The dense accuracy is not above chance, so accuracies say nothing here; only agreement does."
    low, high = info["agreement"]["ci95"]
    kls = {space: info["summary_by_space"][space]["p"]["kl_dense_target"] for space in ("options", "global")}
    placed = []
    for space, where in (("options", "over the options"), ("global", "over the vocabulary")):
        placed.append((f"KL {where}", _mean(kls[space])))
        if like := (info.get("like") or {}).get(space):
            placed.append((f"KL {where}, beside its own quantised types", like))
    return Verdict(
        use,
        "options",
        level,
        words,
        rule,
        [
            ("same choice", f"{same:.3f} ({low:.3f} to {high:.3f})"),
            ("accuracy, dense", f"{accuracy['dense']['accuracy']:.3f}"),
            ("accuracy, target", f"{accuracy['target']['accuracy']:.3f}"),
            ("right to wrong / wrong to right", f"{flips['right_to_wrong']} / {flips['wrong_to_right']}"),
            ("McNemar p", f"{flips['mcnemar_p']:.3g}"),
            *placed,
        ],
    )


def _generation(info: Mapping[str, Any] | None) -> Verdict:
    use = "Generation"
    rule = (
        f"Same most likely token a step: kept from {_AGREE[0]:g} with a mean KL of at most {_KL:g} nats, broken below {_AGREE[1]:g}; "
        "kept is not said where the target's texts end in loops more often."
    )
    if info is None:
        return Verdict(use, "p", UNCLEAR, "No generate run of this target is on this page.", rule)
    where, summary = _steps(info)
    agree, kl = summary["p"]["top1_agree"], summary["p"]["kl_dense_target"]
    texts, parts, first = info.get("texts"), info.get("divergence"), info.get("first_difference")
    loops = bool(texts) and texts["target"]["looping"] > texts["dense"]["looping"]  # type: ignore[index]
    level = RISK
    if agree["mean"] < _AGREE[1]:
        level = BROKEN
    elif agree["mean"] >= _AGREE[0] and kl["mean"] <= _KL and not loops:
        level = KEPT
    words = {
        KEPT: "Step by step the target would write what the dense model writes.",
        RISK: "Single steps mostly agree, but the texts part; small errors add up over time.",
        BROKEN: "The full distribution has changed: the target writes other texts.",
    }[level]
    numbers = [(f"same most likely token, {where}", _mean(agree)), (f"KL a step, {where}", _mean(kl))]
    if like := info.get("like"):
        numbers.append(("KL on the dense model's texts, beside its own quantised types", str(like)))
    if parts:
        numbers.append(
            ("of the free-running KL, through its own history", f"{parts['history']:.4g} of {parts['total']:.4g}")
        )
    if first:
        numbers.append(("texts that stay the same to the end", f"{first['same_texts']} of {len(first['by_prompt'])}"))
    if texts:
        numbers.append(
            (
                "texts that end in a loop, dense / target",
                f"{texts['dense']['looping']:.2f} / {texts['target']['looping']:.2f}",
            )
        )
    return Verdict(use, "p", level, words, rule, numbers)


def warnings_of(name: str, info: Mapping[str, Any], under_floor: Mapping[str, float]) -> list[str]:
    """Why the numbers of a run deserve a second look: few prompts, values under the noise floor.

    Args:
        under_floor: space -> share of rows (of sublayers that the target changes) that lie under the noise floor.
    """
    found = []
    count, words = _count(info)
    if count < FEW_PROMPTS:
        found.append(f"{name}: only {words}; intervals are wide, means may move with other ones.")
    for space, share in under_floor.items():
        if share > 0.01:
            found.append(
                f"{name}: {100 * share:.0f} % of the {space} values lie under the noise floor, which is what the dense model gives against itself; read them as zero."
            )
    return found
