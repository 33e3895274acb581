"""Command name -> function, nothing else: options, help and config files follow from the functions' signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from prunescope import commands
from prunescope.argv import dashed, for_jsonargparse, plain
from prunescope.demo import demo
from prunescope.errors import UserError, first_line, shortened
from prunescope.runs.folder import NO_SPACE

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "drop": commands.drop,
    "sparsify": commands.sparsify,
    "heal": commands.heal,
    "export": commands.export,
    "layerwise": commands.layerwise,
    "generate": commands.generate,
    "mcq": commands.mcq,
    "divergence": commands.divergence,
    "retrieve": commands.retrieve,
    "evaluate": commands.evaluate,
    "sweep": commands.sweep,
    "advise": commands.advise,
    "speed": commands.speed,
    "report": commands.report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit codes: 0 done, 2 invalid input (one line), 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    function = COMMANDS.get(words[0]) if words else None
    if words[:1] == ["export"]:  # `for` cannot be the name of a parameter, and `check` is a method of all options
        words = [re.sub(r"^--for(?==|$)", "--engine", word) for word in words]
        words = [re.sub(r"^--check(?==|$)", "--run-check", word) for word in words]
    try:
        options = _parse(words, function)
        if words[0] == "sparsify" and options["out"] is None and not options["dry_run"]:
            raise UserError("sparsify: say where the checkpoint goes, with --out DIR (or look first, with --dry-run)")
        if words[0] == "heal" and options["out"] is None:
            raise UserError("heal: say where the checkpoint goes, with --out DIR")
        COMMANDS[words[0]](**options)
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
        resumable = function is not None and "resume" in inspect.signature(function).parameters
        return _complain(f"interrupted; {'continue with --resume' if resumable else 'nothing was written'}", 1)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _complain(message: str, code: int) -> int:
    print(f"prunescope: {message}", file=sys.stderr)
    return code


def _parse(words: list[str], chosen: Callable[..., Any] | None) -> dict[str, Any]:
    """The options of the command that the first word names. Raises UserError, and SystemExit after help."""
    from argparse import ArgumentError

    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

    class Dashes(DefaultHelpFormatter):
        def format_help(self) -> str:
            return dashed(super().format_help())

    parser = ArgumentParser(
        prog="prunescope", exit_on_error=False, formatter_class=Dashes, description=commands.__doc__
    )
    parser.add_argument("--version", action="version", version=f"prunescope {version('prunescope')}")
    subcommands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function) or ""
        sub = ArgumentParser(exit_on_error=False, formatter_class=Dashes, description=text.split("Args:")[0].strip())
        sub.add_argument(
            "--config", action=ActionConfigFile, help="YAML file with options, as --print_config writes it"
        )
        if function is chosen:  # the types of the others need not be looked at
            sub.add_function_arguments(plain(function), as_positional=True)
        subcommands.add_subcommand(name, sub, help=text.split("\n")[0])
    try:
        parsed = parser.parse_args(words if chosen is None else [words[0], *for_jsonargparse(chosen, words[1:])])
    except (UnicodeError, RecursionError) as error:  # of a config file, which jsonargparse lets through
        raise UserError(f"--config: not a YAML file in UTF-8 ({first_line(error)}); see --print_config") from error
    except ArgumentError as error:
        name = "" if chosen is None else f" {words[0]}"
        message = shortened(str(error).replace(f"{words[0]}." if words else "", "").rstrip("."), 500)
        raise UserError(f"{message}; see prunescope{name} --help") from error
    options: dict[str, Any] = parsed[parsed.command].as_dict()
    options.pop("config", None)
    return options
