"""Built-in quick tasks: small, made by us from a seed, in matched pairs that differ only in how they are answered.

Every item is a line whose end is missing, after a few solved ones. ``NAME-gen`` lets the model write the end (exact match), ``NAME-mc``
compares the log-likelihoods of four ends, of which one is right. Prompts and items of a pair are the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "DEFAULT_ITEMS",
    "DEFAULT_SHOTS",
    "GROUPS",
    "PAIRS",
    "QUICK",
    "Item",
    "items",
    "kind_of",
    "pair_of",
    "prompt",
]

DEFAULT_ITEMS = 100
DEFAULT_SHOTS = 8
OPTIONS = 4
Line = tuple[str, str, list[str]]  # what is asked, the right end, wrong ends

_WORDS = [
    "cat",
    "dog",
    "sun",
    "cup",
    "hat",
    "box",
    "key",
    "pen",
    "bus",
    "map",
    "car",
    "bed",
    "egg",
    "fox",
    "jar",
    "log",
    "net",
    "owl",
    "pig",
    "rug",
]
_NAMES = ["Tom", "Ann", "Bob", "Sue", "Max", "Eva", "Ben", "Amy", "Sam", "Kim"]
_COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "gold"]


@dataclass(frozen=True)
class Item:
    """A line without its end. ``options`` are four ends, ``options[gold]`` the right one; all begin with a space."""

    question: str
    options: tuple[str, ...]
    gold: int

    @property
    def answer(self) -> str:
        return self.options[self.gold]

    @property
    def key(self) -> str:
        """The same for the same item, whatever its place."""
        return hashlib.sha256("\x1f".join((self.question, self.answer)).encode()).hexdigest()[:16]


def _arithmetic(rng: random.Random) -> Line:
    """A sum; wrong ends are near it and have as many digits."""
    a, b = rng.randint(2, 29), rng.randint(2, 29)
    near = [str(a + b + d) for d in (1, -1, 2, -2, 3, -3, 10, -10)]
    return f"{a} + {b} =", f"{a + b}", [n for n in near if len(n) == len(str(a + b))]


def _reversal(rng: random.Random) -> Line:
    """Three digits backwards; wrong ends are the same digits in another order."""
    digits = rng.sample("123456789", 3)
    others = [[digits[i] for i in order] for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))]
    return f"{' '.join(digits)} ->", " ".join(reversed(digits)), [" ".join(o) for o in others]


def _brackets(rng: random.Random) -> Line:
    """Close five brackets; wrong ends have one bracket of another kind."""
    closing = {"(": ")", "[": "]", "{": "}"}
    opened = [rng.choice("([{") for _ in range(5)]
    right = [closing[o] for o in reversed(opened)]
    wrong = [[*right[:i], other, *right[i + 1 :]] for i in range(5) for other in ")]}" if other != right[i]]
    return f"{' '.join(opened)} ->", " ".join(right), [" ".join(w) for w in wrong]


def _substitution(rng: random.Random) -> Line:
    """Copy a phrase with one word replaced; wrong ends replace nothing, the wrong word, or mix up the rest."""
    old, new = rng.sample(_COLOURS, 2)
    other = rng.choice([c for c in _COLOURS if c not in (old, new)])
    a, b = rng.sample(_WORDS, 2)
    third = rng.choice([w for w in _WORDS if w not in (a, b)])
    text = f"{old} {a} and {b}"
    wrong = [text, f"{new} {b} and {a}", f"{other} {a} and {b}", f"{new} {a} and {third}"]
    return f"Put {new} for {old}: {text} ->", f"{new} {a} and {b}", wrong


def _lookup(rng: random.Random) -> Line:
    """The value of one of four keys; wrong ends are the values of the others."""
    names, values = rng.sample(_NAMES, 4), rng.sample(range(10, 100), 4)
    at = rng.randrange(4)
    listed = ", ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))
    return f"{listed}; {names[at]}:", str(values[at]), [str(v) for i, v in enumerate(values) if i != at]


PAIRS: dict[str, Callable[[random.Random], Line]] = {
    "arithmetic": _arithmetic,
    "reversal": _reversal,
    "brackets": _brackets,
    "substitution": _substitution,
    "lookup": _lookup,
}
QUICK = tuple(f"{pair}-{way}" for pair in PAIRS for way in ("gen", "mc"))
GROUPS = {
    "quick": QUICK,
    "quick-gen": tuple(name for name in QUICK if name.endswith("-gen")),
    "quick-mc": tuple(name for name in QUICK if name.endswith("-mc")),
}


def pair_of(task: str) -> str:
    return task.rpartition("-")[0]


def kind_of(task: str) -> str:
    return "generative" if task.endswith("-gen") else "choice"


def items(pair: str, count: int, seed: int, *, what: str = "item") -> list[Item]:
    """The first ``count`` items of a pair: item i follows from the seed and i alone, and no two are the same."""
    found: dict[str, Item] = {}
    number = 0
    while len(found) < count:
        rng = random.Random(f"{pair}/{what}/{seed}/{number}")
        question, right, wrong = PAIRS[pair](rng)
        others = list(dict.fromkeys(w for w in wrong if w != right))
        options = [right, *rng.sample(others, OPTIONS - 1)]
        rng.shuffle(options)
        item = Item(question, tuple(f" {option}" for option in options), options.index(right))
        found.setdefault(item.key, item)
        number += 1
    return list(found.values())


def prompt(item: Item, solved: Sequence[Item]) -> str:
    return "".join(f"{shot.question}{shot.answer}\n" for shot in solved) + item.question
