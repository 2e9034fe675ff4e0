"""`taskres`: parse, call the library, print. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 an error (the message says what to do), 2 wrong usage, 3 done but pictures were skipped,
130 interrupted with Ctrl-C, 143 ended by SIGTERM.
Tables and progress are for people; with `--json` the standard output holds one JSON value and nothing else.
"""

from __future__ import annotations

import importlib
import os
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
# What the list of commands shows without loading them: the first paragraph of each function's docstring.
SUMMARIES = {
    "train": "Train a classifier from a few labelled pictures, measure it and save it.",
    "difficulty": "How hard a task is for a base model, before training, and what training is expected to reach.",
    "plan": "How many more labelled pictures a target takes, foretold from those at hand; which classes are weakest.",
    "compare": "Compare few-shot methods on your own pictures: accuracy, harm, calibration, cost, significance.",
    "evaluate": "Accuracy of a trained classifier beside zero-shot, overall and per class; mAP, F1 of several labels.",
    "predict": "Classify pictures. Unreadable ones are reported and skipped; the exit code is then 3.",
    "embed": "Embed a data set into parquet files, each picture once; run it again to go on where it stopped.",
    "suggest": "Say which pictures to label next. Unreadable ones are reported and skipped; the exit code is then 3.",
    "serve": "Serve classifiers over HTTP. Those of one base share it: a picture passes it once, batched with others.",
    "demo": "Train on the pictures shipped with the library: no network, under a minute on two CPU cores.",
    "app": "Train a classifier in the browser: name classes, drop pictures, train, look at mistakes, download.",
    "info": "What a classifier is: base, classes, prompts, shots, accuracy, sizes, versions. The base is not loaded.",
    "classes": "List the classes of a classifier; add, remove, rename or reorder them.",
    "merge": "Average classifiers of the same base, prompts and classes; or unite the classes of several (--union).",
    "pack": "Put many classifiers over one base into one file; list one, or unpack it again.",
    "report": "Write one HTML page that shows what a classifier does: accuracy, confusions, mistakes, its training.",
    "analyze": "Set how far residuals went against how hard the tasks are for zero-shot.",
    "push": "Upload the files of a trained classifier to the Hub as they are. Log in first with `hf auth login`.",
    "verify": "Derive again what a classifier claims: checksums, base classifier; with the dataset, draw and accuracy.",
    "sign": "Accept an edited config.json or preprocessor_config.json after checking that it loads; says what changed.",
    "export": "Write a classifier in a form that runs without this library.",
    "engines": "Which form of an image tower is right and fastest on this machine; remembers it for `--engine auto`.",
    "benchmark": "Run datasets x shots x seeds x recipes with resume; write CSV, Markdown and a figure.",
    "import": "Turn a checkpoint of the published TaskRes code into an artifact. Nothing in it is executed.",
}


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .._version import __version__

        typer.echo(f"taskres_hf {__version__}")
        raise typer.Exit


def _unloaded() -> None:
    """Stands for a command that is only listed."""


def make_app(only: str | None = None, listed: bool = False) -> typer.Typer:
    """The command line.

    Args:
        only: the one command to make, which is faster than all of them; any other name makes all.
        listed: make all, but only to be listed or named: what they do is not loaded, which is faster too.
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
        command = _unloaded if listed else getattr(importlib.import_module(f".{module}", __package__), function)
        app.command(name, rich_help_panel=panel, short_help=SUMMARIES[name])(command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors end in one readable message and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with Interruption() as interruption:
        _run(arguments)
    interruption.finish()


def _run(arguments: list[str]) -> None:
    try:
        name = next((argument for argument in arguments if not argument.startswith("-")), None)
        completing = any(key.startswith("_") and key.endswith("_COMPLETE") for key in os.environ)
        app = make_app(name, listed=name not in COMMANDS and not completing)
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
