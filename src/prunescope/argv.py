"""How our command lines are written, in the words that jsonargparse takes.

jsonargparse makes options, help and config files from a function's signature. Four habits of the shell it does not know, and has no setting
for (4.53): ``--batch-size`` for ``--batch_size``; a bare ``--overwrite``; a second bare word that fills the next argument which may
stand without its name (``layerwise DENSE [TARGET]``); and bare words that make one list (``report RUN...``).
"""

from __future__ import annotations

import inspect
import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

__all__ = ["dashed", "for_jsonargparse", "plain"]


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its types evaluated. Left to jsonargparse, they would bring in what the module imports for type checkers: torch."""
    hints = get_type_hints(function)
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()]

    def call(**options: Any) -> Any:
        return function(**options)

    call.__name__, call.__doc__, call.__module__ = function.__name__, function.__doc__, function.__module__
    call.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    return call


def dashed(text: str) -> str:
    """Help with dashes in the names of its options; ``--print_config`` is jsonargparse's own."""
    return re.sub(r"--(?!print_config)[a-z_]+", lambda match: match[0].replace("_", "-"), text)


def for_jsonargparse(function: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """The words after the command's name as jsonargparse reads them."""
    parameters = inspect.signature(function).parameters
    places = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    several = bool(places) and get_type_hints(function).get(places[0].name) == list[str]
    result: list[str] = []
    listed: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        if word.startswith("--"):
            name, value = _option(word, left, parameters)
            places = [place for place in places if place.name != name]
            result.append(f"--{name}" if value is None else f"--{name}={value}")
        elif word.startswith("-"):
            result.append(word)
        elif several:
            listed.append(word)
        else:
            place = places.pop(0) if places else None
            result.append(word if place is None or place.default is place.empty else f"--{place.name}={word}")
    return [*result, json.dumps(listed)] if listed else result


def _option(word: str, left: deque[str], parameters: Mapping[str, inspect.Parameter]) -> tuple[str, str | None]:
    """Name and value of an option; a value that is the next word is taken from those that are left."""
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if equals:
        return name, value
    kind = str(parameters[name].annotation) if name in parameters else ""
    if kind.startswith("bool"):
        words = ("true", "false", "auto") if "auto" in kind else ("true", "false")
        return name, left.popleft() if left and left[0].lower() in words else "true"
    return name, left.popleft() if left and (name in parameters or name == "config") else None
