"""The points of a sweep: the dense model, so many sublayers dropped of a target, so much sparsity by a method, a quantised format, and joined ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, get_args

from prunescope.errors import UserError
from prunescope.models import ggml
from prunescope.models.quantised import QuantSpec
from prunescope.prune.masks import Goal
from prunescope.prune.select import DropTarget

__all__ = ["DENSE", "DROP_SERIES", "METHODS", "Change", "Point", "read_points", "read_range"]

Change = Literal["dense", "drop", "sparsify", "quant", "joined", "healed"]  # what a point does to the model
DROP_SERIES: tuple[str, ...] = get_args(DropTarget)
METHODS = ("magnitude", "wanda", "sparsegpt")
_STEP = Decimal("0.1")
_MOST = 1000  # points; more is a slip of the pen


@dataclass(frozen=True)
class Point:
    """A point of a sweep. ``n`` sublayers or blocks are dropped, or weights are pruned to ``sparsity`` or a ``pattern`` N:M; what is left
    is quantised where ``quant`` names a format."""

    series: str  # dense, a target of drop, a method of sparsify (with N:M after it for patterns), or quant; joined ones have +FORMAT after it, healed ones +healed
    n: int | None = None
    method: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    quant: str | None = None
    healed: bool = False  # after the drop, see `prunescope.prune.heal`; measured from the folder that healing wrote

    @property
    def change(self) -> Change:
        """Which kind of point it is: the figures give each a colour."""
        if self.healed:
            return "healed"
        pruned = self.n or self.method
        if self.quant is not None:
            return "joined" if pruned else "quant"
        return "dense" if not pruned else "drop" if self.n else "sparsify"

    def with_quant(self, quant: str) -> Point:
        """This point with what is left of its weights quantised as well."""
        return replace(self, series=f"{self.series}+{quant}", quant=quant)

    def with_healing(self) -> Point:
        """This point, healed. Its sublayers must be dropped, and nothing else be done."""
        return replace(self, series=f"{self.series}+healed", healed=True)

    @property
    def drops_of(self) -> str | None:
        """The target of drop that its sublayers are chosen by."""
        return self.series.partition("+")[0] if self.n else None

    @property
    def goal(self) -> Goal:
        """What its matrices shall lose."""
        return Goal.parse(self.pattern or self.sparsity or 0.0)

    @property
    def name(self) -> str:
        """Short, unique in a sweep, and fit for the name of a file."""
        if self.change == "quant":
            return f"quant-{self.quant}"
        if self.n is not None:
            found = f"{self.drops_of}-{self.n:03d}" if self.n else "dense"
        else:
            found = f"{self.method}-{(self.pattern or f'{self.sparsity:g}').replace(':', 'of')}"
        return f"{found}+{self.quant}" if self.quant else f"{found}+healed" if self.healed else found

    @property
    def title(self) -> str:
        if self.change == "quant":
            return str(self.quant)
        if self.n is not None:
            found = f"{self.drops_of} {self.n}" if self.n else "dense"
        else:
            found = f"{self.method} {self.pattern or f'{self.sparsity:g}'}"
        return f"{found} + {self.quant}" if self.quant else f"{found}, healed" if self.healed else found

    @property
    def dropped(self) -> bool:
        return bool(self.n)

    def columns(self) -> dict[str, Any]:
        """What identifies it in the tables of a run."""
        return {
            "point": self.name,
            "series": self.series,
            "n": self.n,
            "method": self.method,
            "sparsity": self.sparsity,
            "pattern": self.pattern,
            "quant": self.quant,
            "change": self.change,
        }


DENSE = Point("dense", n=0)


def read_range(text: str, option: str) -> list[Decimal]:
    """Read ``4``, ``0,2,4``, ``0..12``, ``0..12..2``, ``0.3..0.7`` (steps of 1 between whole numbers, else of 0.1), or several with commas.

    Raises:
        UserError: what cannot be read, or a range that runs backwards.
    """
    found: list[Decimal] = []
    for part in str(text).split(","):
        pieces = part.strip().split("..")
        try:
            numbers = [Decimal(piece) for piece in pieces]
        except InvalidOperation:
            numbers = []
        if not 1 <= len(numbers) <= 3 or not all(number.is_finite() for number in numbers):
            raise UserError(
                f"{option} {text}: cannot read {part.strip()!r}; write numbers, or ranges such as 0..12 or 0.3..0.7..0.2"
            )
        low, high = numbers[0], numbers[min(1, len(numbers) - 1)]
        whole = all(number == number.to_integral_value() for number in (low, high))
        step = numbers[2] if len(numbers) == 3 else Decimal(1) if whole else _STEP
        if high < low or step <= 0:
            raise UserError(f"{option} {text}: {part.strip()} runs backwards or has no step; write it from low to high")
        count = int((high - low) / step) + 1
        if len(found) + count > _MOST:
            raise UserError(f"{option} {text}: that is more than {_MOST} points; take a larger step")
        found += [low + i * step for i in range(count)]
    return list(dict.fromkeys(found))


def read_points(
    target: str | None = None,
    n: str | None = None,
    method: str | None = None,
    sparsity: str | None = None,
    pattern: str | None = None,
    quant: str | None = None,
    join: str | None = None,
) -> list[Point]:
    """The points that the options of `sweep` name, the dense model first; it is always one of them.

    Sublayers are dropped if ``target`` or ``n`` is given, or nothing at all is (then of attn, mlp and block); weights are pruned if
    ``sparsity`` or ``pattern`` is; ``quant`` are formats alone, and ``join`` formats that every dropped or pruned point is measured in too.

    Raises:
        UserError: an unknown target, method, number, pattern or format, or a format whose quantiser is not installed.
    """
    weights = sparsity is not None or pattern is not None
    points = [DENSE]
    if target is not None or n is not None or not (weights or quant is not None):
        targets = _listed(target or "attn,mlp,block", "--target", DROP_SERIES)
        numbers = read_range(n or "0..12", "--n")
        wrong = [number for number in numbers if number != number.to_integral_value() or number < 0]
        if wrong:
            raise UserError(f"--n {n}: {wrong[0]} sublayers cannot be dropped; write whole numbers from 0")
        points += [Point(name, n=int(number)) for name in targets for number in numbers if number]
    if method is not None and not weights:
        raise UserError("--method prunes weights; say how much with --sparsity 0.3..0.7 or --pattern 2:4")
    for name in _listed(method or "sparsegpt", "--method", METHODS) if weights else ():
        if sparsity is not None:
            shares = read_range(sparsity, "--sparsity")
            if any(not 0 <= share < 1 for share in shares):
                raise UserError(f"--sparsity {sparsity}: give shares from 0 up to, not including, 1")
            points += [Point(name, method=name, sparsity=float(share)) for share in shares if share]
        for goal in _patterns(str(pattern)) if pattern is not None else ():
            points.append(Point(f"{name} N:M", method=name, sparsity=goal.sparsity, pattern=str(goal)))
    pruned = list(dict.fromkeys(points[1:]))
    alone = [Point("quant", quant=name) for name in _formats(quant, "--quant")]
    joined = [point.with_quant(name) for name in _formats(join, "--join") for point in pruned]
    if join is not None and not pruned:
        raise UserError(
            f"--join {join}: there is no point to join it with; say what with --target, --n, --sparsity or --pattern"
        )
    if not pruned and not alone:
        raise UserError("the sweep has no point but the dense model; raise --n or --sparsity")
    return [DENSE, *pruned, *alone, *joined]


def _formats(text: str | None, option: str) -> list[str]:
    """The formats in an option, each once and in its own words."""
    found = []
    for name in str(text).split(",") if text is not None else ():
        try:
            spec = QuantSpec.parse(name)
        except UserError as error:
            raise UserError(f"{option} {text}: {error}") from error
        ggml.check(spec.scheme)
        found.append(str(spec))
    return list(dict.fromkeys(found))


def _patterns(text: str) -> list[Goal]:
    found = []
    for one in text.split(","):
        try:
            goal = Goal.parse(one)
        except UserError:
            goal = Goal(0.0)
        if not goal.of:
            raise UserError(f"--pattern {text}: cannot read {one.strip()!r}; write N:M with N below M, such as 2:4,4:8")
        found.append(goal)
    return found


def _listed(text: str, option: str, known: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in str(text).split(",")))
    wrong = [name for name in names if name not in known]
    if wrong:
        reshaping = next((name for name in ("structured", "experts") if name in wrong), None)
        more = f"; {reshaping} pruning changes shapes and is not swept, use sparsify" if reshaping else ""
        raise UserError(f"{option} {text}: {wrong[0]!r} is unknown; choose among {', '.join(known)}{more}")
    return names
