"""`taskres predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    MODEL,
    OUTPUT,
    Artifact,
    BaseModel,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Engine,
    Json,
    Precision,
    Quiet,
    emit,
    quiet_libraries,
)


def predict(
    model: Artifact,
    images: Annotated[list[Path], typer.Argument(help="Pictures and folders of pictures (searched in depth).")],
    top_k: Annotated[int, typer.Option(help="Classes per picture.", min=1)] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write .csv, .jsonl or .parquet instead.", rich_help_panel=OUTPUT),
    ] = None,
    allow_skipped: Annotated[
        bool,
        typer.Option("--allow-skipped", help="End with 0 although pictures were skipped.", rich_help_panel=OUTPUT),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the classifier.", rich_help_panel=MODEL)] = None,
    base_model: BaseModel = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Classify pictures. Unreadable ones are reported and skipped; the exit code is then 3.

    Example:  taskres predict my-classifier holiday/ cat.jpg --top-k 3 --output labels.csv
    """
    from ..predicting import check_output, classify_files, write_predictions

    if output is not None:
        check_output(output)
    quiet_libraries(quiet or as_json)
    from ..errors import DataError
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..pictures import find_images

    files = find_images(images)
    if not files:
        raise DataError(f"There are no pictures in {', '.join(map(str, images))}.")
    classifier = TaskResCLIPForImageClassification.from_pretrained(
        model, revision=revision, base_model=base_model, dtype=dtype
    )
    if device:
        classifier.to(device)
    rows = list(
        classify_files(
            classifier, files, top_k=top_k, batch_size=batch_size, engine=engine, precision=precision,
            progress=not (quiet or as_json),
        )
    )  # fmt: skip
    skipped = [row for row in rows if row["error"]]
    for row in skipped:
        typer.echo(f"Skipped: {row['error']}", err=True)
    if output is not None:
        write_predictions(output, rows, top_k=min(top_k, len(classifier.class_names)))
        summary = {"output": str(output), "classified": len(rows) - len(skipped), "skipped": len(skipped)}
        emit(as_json, summary, lambda: typer.echo(f"{summary['classified']} pictures classified in {output}"))
    else:

        def show() -> None:
            for row in rows:
                if row["error"] is None:
                    found = ", ".join(f"{top['label']} {100 * top['score']:.1f} %" for top in row["predictions"])
                    typer.echo(f"{row['file']}: {found}")

        emit(as_json, rows, show)
    if skipped:
        typer.echo(f"{len(skipped)} of {len(rows)} pictures were skipped.", err=True)
        if not allow_skipped:
            raise typer.Exit(3)
