"""Command name -> function, nothing else: options, help and config files follow from the functions' signatures and docstrings."""

from __future__ import annotations

import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from prunescope import commands
from prunescope.errors import UserError
from prunescope.runs.folder import NO_SPACE

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": commands.demo,
    "drop": commands.drop,
    "sparsify": commands.sparsify,
    "layerwise": commands.layerwise,
    "generate": commands.generate,
    "mcq": commands.mcq,
    "retrieve": commands.retrieve,
    "evaluate": commands.evaluate,
    "sweep": commands.sweep,
    "speed": commands.speed,
    "report": commands.report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit codes: 0 done, 2 the user's mistake (one line), 1 anything else."""
    argv = _with_flags(list(sys.argv[1:] if argv is None else argv))
    try:
        command, options = _parse(argv)
        if command == "sparsify" and options["out"] is None and not options["dry_run"]:
            raise UserError("sparsify: say where the checkpoint goes, with --out DIR (or look first, with --dry-run)")
        COMMANDS[command](**options)
    except UserError as error:
        return _complain(str(error), 2)
    except OSError as error:
        if error.errno not in NO_SPACE:
            traceback.print_exc()
            return 1
        return _complain(
            f"no space left on the disk ({error.filename or 'while writing'}); free some or choose another --out", 2
        )
    except KeyboardInterrupt:
        resumable = "resume" in inspect.signature(COMMANDS[argv[0]]).parameters if argv[0] in COMMANDS else False
        return _complain(f"interrupted; {'continue with --resume' if resumable else 'nothing was written'}", 1)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _complain(message: str, code: int) -> int:
    print(f"prunescope: {message}", file=sys.stderr)
    return code


def _parse(argv: list[str]) -> tuple[str, dict[str, Any]]:
    from argparse import ArgumentError

    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

    class Dashes(DefaultHelpFormatter):
        def format_help(self) -> str:
            return re.sub(r"--[a-z_]+", lambda match: match[0].replace("_", "-"), super().format_help()).replace(
                "--print-config", "--print_config"
            )

    parser = ArgumentParser(
        prog="prunescope", exit_on_error=False, formatter_class=Dashes, description=commands.__doc__
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"prunescope {version('prunescope')}")
    subcommands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function) or ""
        sub = ArgumentParser(exit_on_error=False, formatter_class=Dashes, description=text.split("Args:")[0].strip())
        sub.add_argument(
            "--config", action=ActionConfigFile, help="YAML file with options, as --print_config writes it"
        )
        if name in argv[:1]:  # the types of the others need not be looked at
            sub.add_function_arguments(function, as_positional=True)
        subcommands.add_subcommand(name, sub, help=text.split("\n")[0])
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        name = f" {argv[0]}" if argv and argv[0] in COMMANDS else ""
        message = str(error).replace(f"{argv[0]}." if argv else "", "").rstrip(".")
        raise UserError(f"{message}; see prunescope{name} --help") from error
    options = parsed[parsed.command].as_dict()
    options.pop("config", None)
    return parsed.command, options


def _with_flags(argv: list[str]) -> list[str]:
    """What jsonargparse does not know: ``--batch-size`` is ``--batch_size``, a bare ``--overwrite`` is ``--overwrite=true``, and
    a second bare word fills the next optional argument that may stand without its name (``layerwise DENSE [TARGET]``), and all bare words
    make one list where the first argument is one (``report RUN...``)."""
    if not argv or argv[0] not in COMMANDS:
        return argv
    parameters = inspect.signature(COMMANDS[argv[0]]).parameters
    places = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    several = places and places[0].annotation == "list[str]"
    result, words, listed = [argv[0]], list(reversed(argv[1:])), []
    while words:
        word = words.pop()
        if word.startswith("-") and not word.startswith("--"):
            result.append(word)
            continue
        if several and not word.startswith("--"):
            listed.append(word)
            continue
        if not word.startswith("--"):
            place = places.pop(0) if places else None
            result += [word] if place is None or place.default is place.empty else [f"--{place.name}={word}"]
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        parameter = parameters.get(name)
        if parameter is not None and parameter in places:
            places.remove(parameter)
        if (
            not equals
            and parameter is not None
            and parameter.annotation == "bool"
            and (not words or words[-1].lower() not in ("true", "false"))
        ):
            value = "true"
        elif not equals and words and (parameter is not None or name == "config"):
            value = words.pop()
        result.append(f"--{name}={value}" if equals or value else f"--{name}")
    return [*result, json.dumps(listed)] if listed else result
