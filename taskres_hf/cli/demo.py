"""`taskres demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    Debug,
    Json,
    Quiet,
    console,
    emit,
    quiet_libraries,
    read_numbers,
)
from .screen import when_interrupted


def demo(
    task: Annotated[str, typer.Option(help="Task of the shipped pictures.")] = "animals-plants",
    all_tasks: Annotated[bool, typer.Option("--all", help="Every task, as one table.")] = False,
    shots: Annotated[str, typer.Option(help="Comma list of shot counts.")] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Comma list of seeds.")] = "1,2,3",
    recipe: Annotated[str, typer.Option(help="'auto' or 'paper'.")] = "auto",
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the classifier is saved.")] = Path(
        "taskres-demo"
    ),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train on the pictures shipped with the library: no network, under a minute on two CPU cores."""
    when_interrupted(lambda: "Embeddings of the pictures read so far are in the cache; the same command starts there.")
    quiet_libraries(quiet or as_json)
    from .. import demo as shipped

    counts, draws = read_numbers(shots, "--shots"), read_numbers(seeds, "--seeds")
    tasks = list(shipped.demo_tasks()) if all_tasks else [shipped.check_task(task)]
    table = shipped.accuracy_table(tasks, counts, draws, recipe=recipe, progress=not (quiet or as_json))
    result: dict[str, Any] = {"recipe": recipe, "shots": counts, "seeds": draws, "tasks": table}
    if not all_tasks:
        result |= shipped.train_and_classify(task, output_dir, shots=max(counts), seed=draws[0], recipe=recipe)

    def show() -> None:
        if markdown:
            typer.echo(shipped.as_markdown(table, counts, len(draws)))
        else:
            console().print(shipped.as_rich_table(table, counts, len(draws)))
        if not all_tasks:
            typer.echo(shipped.as_story(result))

    emit(as_json, result, show)
