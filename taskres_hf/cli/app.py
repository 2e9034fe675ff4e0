"""`taskres`: parse, call the library, print. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 an error (the message says what to do), 2 wrong usage, 3 done but pictures were skipped,
130 interrupted with Ctrl-C, 143 ended by SIGTERM.
Tables and progress are for people; with `--json` the standard output holds one JSON value and nothing else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .screen import Interruption, emit, program, warn

_USE, _SHARE, _PAPER = "Make and use a classifier", "Look at a classifier and share it", "Measure and reproduce"
# Name: module, function, heading.
COMMANDS = {
    "train": ("train", "train", _USE),
    "difficulty": ("difficulty", "difficulty", _USE),
    "plan": ("plan", "plan", _USE),
    "compare": ("compare", "compare", _USE),
    "evaluate": ("evaluate", "evaluate", _USE),
    "predict": ("predict", "predict", _USE),
    "embed": ("embed", "embed", _USE),
    "suggest": ("suggest", "suggest", _USE),
    "serve": ("serve", "serve", _USE),
    "demo": ("demo", "demo", _USE),
    "app": ("browser", "app", _USE),
    "info": ("share", "info", _SHARE),
    "classes": ("classes", "classes", _SHARE),
    "merge": ("classes", "merge", _SHARE),
    "pack": ("pack", "pack", _SHARE),
    "report": ("report", "report", _SHARE),
    "analyze": ("analyze", "analyze", _SHARE),
    "push": ("share", "push", _SHARE),
    "verify": ("check", "verify", _SHARE),
    "sign": ("check", "sign", _SHARE),
    "export": ("export", "export", _SHARE),
    "engines": ("engines", "engines", _PAPER),
    "benchmark": ("paper", "benchmark", _PAPER),
    "import": ("paper", "import_checkpoint", _PAPER),
}


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .._version import __version__

        typer.echo(f"taskres_hf {__version__}")
        raise typer.Exit


def make_app(only: str | None = None) -> typer.Typer:
    """The command line.

    Args:
        only: the one command to make, which is faster than all of them; any other name makes all.
    """
    app = typer.Typer(
        name="taskres",
        help="Few-shot image classifiers as kilobyte residuals over frozen CLIP-like models.\n\n"
        "Start with [bold]taskres demo[/bold], then [bold]taskres train[/bold] on your own pictures.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for name in [only] if only in COMMANDS else COMMANDS:
        module, function, panel = COMMANDS[str(name)]
        command = getattr(importlib.import_module(f".{module}", __package__), function)
        app.command(name, rich_help_panel=panel)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors end in one readable message and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with Interruption() as interruption:
        _run(arguments)
    interruption.finish()


def _run(arguments: list[str]) -> None:
    try:
        app = make_app(next((argument for argument in arguments if not argument.startswith("-")), None))
        completion = any(argument.endswith("-completion") for argument in arguments)  # the shell knows us by one name
        app(arguments, prog_name="taskres" if completion else program())
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from ..errors import TaskResError

        # Errors of ours, of files and of the Hub say what to do; anything else is a bug worth a traceback.
        if "--debug" in arguments or not isinstance(error, (TaskResError, OSError)):
            raise
        if "--json" in arguments:
            emit(True, {"error": str(error), "type": type(error).__name__}, lambda: None)
        warn(f"Error: {error}")
        sys.exit(1)
