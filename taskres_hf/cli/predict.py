"""`taskres predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .screen import emit, percent, quiet_libraries, say, warn, when_interrupted
from .values import check_device, resolve_base

Images = Annotated[
    list[str], typer.Argument(help="Pictures, folders of pictures (searched in depth) and URLs.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write .csv, .jsonl or .parquet instead of printing."),
]
AllowSkipped = Annotated[
    bool,
    typer.Option("--allow-skipped", help="End with 0 although pictures were skipped.", rich_help_panel=opt.OUTPUT),
]
ResumeOutput = Annotated[
    bool, typer.Option("--resume", help="Go on with the rows that an interrupted run left.", rich_help_panel=opt.OUTPUT)
]


def predict(
    model: opt.Artifact,
    images: Images,
    top_k: Annotated[int, typer.Option(help="Classes per picture.", min=1, metavar="N")] = 1,
    output: Output = None,
    device: opt.Device = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    dtype: opt.Dtype = None,
    use_cpu: opt.Cpu = False,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    batch_size: opt.BatchSize = None,
    resume: ResumeOutput = False,
    allow_skipped: AllowSkipped = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Classify pictures. Unreadable ones are reported and skipped; the exit code is then 3.

    Example:  taskres predict my-classifier holiday/ cat.jpg --top-k 3 --output labels.csv
    """
    when_interrupted(lambda: _what_is_kept(output))
    quiet_libraries(quiet or as_json)
    from ..errors import DataError
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..pictures import find_images
    from ..predicting import check_output, classify_files, write_predictions

    if output is not None:
        check_output(output)
    device = check_device(device, use_cpu)
    files = find_images(images)
    if not files:
        raise DataError(f"There are no pictures in {', '.join(map(str, images))}.")
    classifier = TaskResCLIPForImageClassification.from_pretrained(
        model, revision=revision, base_model=base_model and resolve_base(base_model), dtype=dtype and dtype.value
    )
    if device:
        classifier.to(device)
    rows = list(
        classify_files(
            classifier, files, top_k=top_k, batch_size=batch_size, engine=engine.value, precision=precision.value,
            progress=not (quiet or as_json),
        )
    )  # fmt: skip
    skipped = [row for row in rows if row["error"]]
    for row in skipped:
        warn(f"Skipped: {row['error']}")
    if output is not None:
        write_predictions(output, rows, top_k=min(top_k, len(classifier.class_names)))
        summary = {"output": str(output), "classified": len(rows) - len(skipped), "skipped": len(skipped)}
        emit(as_json, summary, lambda: say(f"{summary['classified']} pictures classified in {output}"))
    else:
        emit(as_json, rows, lambda: _show(rows))
    if skipped:
        warn(f"{len(skipped)} of {len(rows)} pictures were skipped.")
        if not allow_skipped:
            raise typer.Exit(3)


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["error"] is None:
            listed = ", ".join(f"{top['label']} {percent(top['score'])}" for top in row["predictions"])
            say(f"{row['file']}: {listed}")


def _what_is_kept(output: Path | None) -> str:
    return "Nothing was written." if output is None else f"{output} is as it was."
