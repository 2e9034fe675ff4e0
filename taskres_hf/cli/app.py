"""`taskres`: parse, call the library, print. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 an error (the message says what to do), 2 wrong usage, 3 done but pictures were skipped.
Tables and progress are for people; with `--json` the standard output holds one JSON value and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .demo import demo
from .evaluate import evaluate
from .paper import benchmark, import_checkpoint
from .predict import predict
from .share import info, push
from .train import train

app = typer.Typer(
    name="taskres",
    help="Few-shot image classifiers as kilobyte residuals over frozen CLIP-like models.\n\n"
    "Start with [bold]taskres demo[/bold], then [bold]taskres train[/bold] on your own pictures.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .._version import __version__

        typer.echo(f"taskres_hf {__version__}")
        raise typer.Exit


_USE, _SHARE, _PAPER = "Make and use a classifier", "Look at a classifier and share it", "Reproduce experiments"
app.command(rich_help_panel=_USE)(train)
app.command(rich_help_panel=_USE)(evaluate)
app.command(rich_help_panel=_USE)(predict)
app.command(rich_help_panel=_USE)(demo)
app.command(rich_help_panel=_SHARE)(info)
app.command(rich_help_panel=_SHARE)(push)
app.command(rich_help_panel=_PAPER)(benchmark)
app.command("import", rich_help_panel=_PAPER)(import_checkpoint)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors end in one readable message and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(arguments)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from ..errors import TaskResError

        # Errors of ours, of files and of the Hub say what to do; anything else is a bug worth a traceback.
        if "--debug" in arguments or not isinstance(error, (TaskResError, OSError)):
            raise
        if "--json" in arguments:
            typer.echo(json.dumps({"error": str(error), "type": type(error).__name__}))
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
