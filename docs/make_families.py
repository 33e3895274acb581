"""Write docs/families.md from what tests/family_checks.py found, `docs/families.json`.

    python docs/make_families.py [RESULTS.json ...]

Files that are given are merged into docs/families.json first: a check that was run takes the place of what is there, others stay.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "families.md"
CHECKS = ("load", "drop attn", "drop mlp", "cache", "layerwise", "zeroed", "compact", "magnitude", "wanda", "sparsegpt", "structured")  # fmt: skip
EXPERTS = "experts"  # of families that have them; a section of its own
MAY_REFUSE = ("compact", "structured", EXPERTS)

Results = dict[str, dict[str, str]]


def state_of(results: dict[str, str]) -> str:
    """Where a family stands: ``works``, ``in part``, ``wrong``, ``traceback``, ``refused``, ``not made``."""
    load = results["load"]
    for word in ("not made", "refused"):
        if load.startswith(word):
            return word
    for word in ("traceback", "wrong"):
        if any(result.startswith(word) for result in results.values()):
            return word
    fine = all(r == "works" or (name in MAY_REFUSE and r.startswith("refused")) for name, r in results.items())
    return "works" if fine and set(results) >= set(CHECKS) else "in part"


def page_of(found: Results) -> str:
    """The document."""
    states = {family: state_of(results) for family, results in sorted(found.items())}
    count = Counter(states.values())
    lines = [
        "# Families of models",
        "",
        "Written by `python docs/make_families.py` from `docs/families.json`, which `make test-families` measures. A tiny random model of every",
        "class in transformers' own lists of causal and image-text models is saved with a small tokenizer, and everything is compared with plain",
        "transformers, with hooks that zero a sublayer. In a multimodal model the text decoder is pruned and measured; what is saved keeps the towers.",
        "",
        f"**{count['works']} of {len(found)} classes work in everything that is checked**, {count['in part']} in part; {count['refused']} are refused when they are loaded, with",
        f"the reason; {count['wrong']} give a wrong number, {count['traceback']} a traceback. Of {count['not made']} no tiny model could be made that runs on text alone, so nothing",
        "is said of them. `compact` and `structured` may be refused for a reason that lies in the architecture; that counts as working.",
        "",
        "## What is checked",
        "",
        "| check | what must hold |",
        "|---|---|",
        "| load | logits equal those of plain transformers, bit for bit |",
        "| drop attn, drop mlp | logits equal those with a hook that zeroes the sublayer; `restore` gives the dense logits, bit for bit |",
        "| cache | cached logits of a dropped model equal uncached ones, where the dense model's own do |",
        "| layerwise | KL at the last sublayer equals that of the two plain models |",
        "| zeroed, compact | the folder loads in transformers' own class, with the logits of the hooks |",
        "| magnitude, wanda, sparsegpt, structured, experts | the folder loads in transformers' own class, with the logits that prunescope gives it; experts: with fewer weights |",
    ]
    for state, title in (
        ("works", "Work"), ("in part", "Work in part"), ("wrong", "Wrong"), ("traceback", "Tracebacks"), ("refused", "Refused"), ("not made", "Not made"),
    ):  # fmt: skip
        families = [family for family, found_state in states.items() if found_state == state]
        if not families:
            continue
        lines += ["", f"## {title}: {len(families)}", ""]
        if state == "works":
            lines += ["| family | refused, and why |", "|---|---|"]
        else:
            lines += ["| family | result |", "|---|---|"]
        for family in families:
            said = "; ".join(
                f"{name}: {_cell(result.removeprefix('refused: ') if state == 'works' else result)}"
                for name, result in found[family].items()
                if result != "works" and name != EXPERTS
            )
            lines.append(f"| {family} | {said} |")
    lines += _experts(found)
    return "\n".join(lines) + "\n"


def _experts(found: Results) -> list[str]:
    """The section on families whose experts can be removed."""
    having = {family: results[EXPERTS] for family, results in sorted(found.items()) if EXPERTS in results}
    work = [family for family, result in having.items() if result == "works"]
    lines = [
        "",
        "## Removing experts",
        "",
        f"`sparsify --method experts` works for {len(work)} of the {len(having)} classes above that have routed experts. Their tiny models have four a block, of which one is removed;",
        "the block's output without it must be that with a router that cannot choose it. Classes without routed experts are refused.",
        "",
        f"Work: {', '.join(work)}.",
        "",
        "| family | refused, and why |",
        "|---|---|",
    ]
    for family, result in having.items():
        if result != "works":
            lines.append(f"| {family} | {_cell(result.removeprefix('refused: '))} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    found: Results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    for path in sys.argv[1:]:
        for family, results in json.loads(Path(path).read_text("utf-8")).items():
            found[family] = (found.get(family, {}) if results["load"] == "works" else {}) | results
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    PAGE.write_text(page_of(found), "utf-8")


if __name__ == "__main__":
    main()
