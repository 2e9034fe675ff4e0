"""`taskres info` and `taskres push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Artifact,
    BaseModel,
    Debug,
    Json,
    console,
    emit,
    plain,
    quiet_libraries,
)


def info(
    model: Artifact,
    revision: Annotated[str | None, typer.Option(help="Revision of the classifier.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a classifier is: base, classes, prompts, shots, accuracy, sizes, versions. The base is not loaded."""
    quiet_libraries(True)
    from ..artifact import describe

    facts = describe(model, revision=revision)

    def show() -> None:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in facts.items():
            if value is not None:
                table.add_row(key.replace("_", " "), plain(value))
        console().print(table)

    emit(as_json, facts, show)


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained classifier.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/pets-taskres.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    include_code: Annotated[
        bool, typer.Option("--include-code", help="Add the modules trust_remote_code needs.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    base_model: BaseModel = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a trained classifier to the Hub (kilobytes). Log in first with `hf auth login`."""
    quiet_libraries(True)
    from ..modeling_taskres import TaskResCLIPForImageClassification

    classifier = TaskResCLIPForImageClassification.from_pretrained(model, base_model=base_model)
    commit = classifier.push_to_hub(
        repo_id, private=private or None, revision=revision, create_pr=create_pr, commit_message=message,
        include_code=include_code,
    )  # fmt: skip
    result = {"repo_id": repo_id, "url": str(commit.repo_url), "commit": commit.oid, "pr_url": commit.pr_url}
    emit(as_json, result, lambda: typer.echo(f"Uploaded to {result['pr_url'] or result['url']}"))
