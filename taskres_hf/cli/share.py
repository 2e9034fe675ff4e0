"""`taskres info` and `taskres push`."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .screen import emit, plain, quiet_libraries, say, when_interrupted


def info(
    model: opt.Artifact,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of it.")] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a classifier is: base, classes, prompts, shots, accuracy, sizes, versions. The base is not loaded."""
    quiet_libraries(True, heavy=False, collect=as_json)
    from ..description import describe

    facts = describe(model, revision=revision)

    def show() -> None:
        rows = [(key.replace("_", " "), plain(value)) for key, value in facts.items() if value is not None]
        margin = max(len(key) for key, _ in rows) + 2
        fold = textwrap.TextWrapper(  # a path or digest is never cut
            shutil.get_terminal_size().columns, subsequent_indent=" " * margin, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        say("\n".join(fold.fill(f"{key:<{margin}}{value}") for key, value in rows))

    emit(as_json, facts, show)


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained classifier.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository on the Hub, such as me/pets-taskres.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch, or refs/pr/1, to upload to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    include_code: Annotated[
        bool, typer.Option("--include-code", help="Add the module trust_remote_code needs.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Commit message.")] = None,
    parent_commit: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Refuse if the branch has moved on from this one.")
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Upload the files of a trained classifier to the Hub as they are. Log in first with `hf auth login`.

    Example:  taskres push my-classifier me/pets-taskres
    """
    when_interrupted(lambda: f"{model} is as it was. An upload appears on the Hub whole or not at all: push it again.")
    quiet_libraries(quiet or as_json, heavy=False, collect=as_json)
    from ..hub import push_folder
    from ..report import figure_for_card

    commit = push_folder(
        model,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        parent_commit=parent_commit,
        include_code=include_code,
        figure=figure_for_card(model),
    )
    result = {"repo_id": repo_id, "url": str(commit.repo_url), "commit": commit.oid, "pr_url": commit.pr_url}
    emit(as_json, result, lambda: say(f"Uploaded to {result['pr_url'] or result['url']}"))
