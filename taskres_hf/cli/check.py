"""`taskres verify` and `taskres sign`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .screen import emit, plain, quiet_libraries, say, when_interrupted
from .values import resolve_base


def verify(
    model: opt.Artifact,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="DATASET", help="What it was trained and measured on.")
    ] = None,
    train_split: opt.TrainSplit = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split it was measured on; as recorded.")] = None,
    holdout: opt.Holdout = None,
    config_name: opt.ConfigName = None,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Derive again what a classifier claims: checksums, base classifier; with the dataset, draw and accuracy.

    Ends with 1 where something differs.

    Example:  taskres verify my-classifier --dataset photos/
    """
    when_interrupted(lambda: "Nothing was changed.")
    quiet_libraries(quiet or as_json, collect=as_json)
    from ..checking.verifying import DIFFERS
    from ..checking.verifying import verify as derive

    rows = derive(
        model, dataset, revision=revision, base_model=base_model and resolve_base(base_model), train_split=train_split,
        split=split, holdout=holdout, config_name=config_name, image_column=image_column, label_column=label_column,
    )  # fmt: skip
    same = all(row["result"] != DIFFERS for row in rows)
    emit(as_json, {"matches": same, "rows": rows}, lambda: say("\n".join(map(_line, rows))))
    if not same:
        raise typer.Exit(1)


def _line(row: dict[str, Any]) -> str:
    values = ""
    if row["result"] == "differs" and (row["recorded"] is not None or row["found"] is not None):
        values = f"recorded {plain(row['recorded'])[:60]}, found {plain(row['found'])[:60]}"
    elif row["result"] == "matches" and isinstance(row["found"], (int, float)):
        values = plain(row["found"])
    details = "; ".join(text for text in (values, row["note"]) if text)
    return f"{row['result']:<12} {row['what']}" + (f" ({details})" if details else "")


def sign(
    model: Annotated[Path, typer.Argument(help="Folder of a classifier that was edited.", show_default=False)],
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Accept an edited config.json or preprocessor_config.json after checking that it loads; says what changed.

    Example:  taskres sign my-classifier
    """
    when_interrupted(lambda: f"{model} is as it was, or signed.")
    quiet_libraries(True, collect=as_json)
    from ..checking.signing import sign as accept

    changes = accept(model)

    def show() -> None:
        for row in changes:
            say(f"{row['file']}: {row['key']} {plain(row['before'])[:60]} -> {plain(row['after'])[:60]}")
        say(f"Signed {model}." if changes else f"Nothing was edited in {model}.")

    emit(as_json, {"changes": changes}, show)
