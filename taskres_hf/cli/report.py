"""`taskres report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .screen import emit, percent, quiet_libraries, say, say_loading, when_interrupted
from .values import check_device, read_words, resolve_base

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .html file to write.")]
Figures = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also write the figures there, as PNG and SVG.")]
Thumbnails = Annotated[
    int, typer.Option(min=0, metavar="N", help="Most pictures shown of each confusion; 0: none anywhere.")
]
Folds = Annotated[
    int, typer.Option(min=0, metavar="N", help="Folds of the cross-validation on the training pictures; 0: none.")
]
Words = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Words to tell what was learned in, one a line or with commas between; '' for none."
    ),
]


def report(
    context: typer.Context,
    model: opt.Artifact,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="DATASET", help="Labelled pictures; see: taskres train --help")
    ] = None,
    output: Output = Path("report.html"),
    split: opt.Split = None,
    figures: Figures = None,
    thumbnails: Thumbnails = 8,
    folds: Folds = 5,
    words: Words = None,
    device: opt.Device = None,
    label_map: opt.LabelMap = None,
    drop_unlabelled: opt.DropUnlabelled = False,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    class_folder: opt.ClassFolder = None,
    config_name: opt.ConfigName = None,
    dataset_revision: opt.DatasetRevision = None,
    strength: opt.Strength = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    crop: opt.Crop = None,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write one HTML page that shows what a classifier does: accuracy, confusions, mistakes, its training.

    Also calibration, suspicious labels, duplicates and what it learned. It needs no network and no other file.

    Example:  taskres report my-classifier --dataset photos/ -o report.html
    """
    when_interrupted(lambda: f"Nothing was written to {output}.")
    quiet_libraries(quiet or as_json, collect=as_json)
    device = check_device(device)
    from ..report import check_report_output, write_report

    check_report_output(output, figures)
    told_in = read_words(words)
    arguments = opt.measuring_arguments(context, device, label_map, quiet or as_json, on_error="skip")
    say_loading(model, quiet or as_json)
    result = write_report(
        model, output, dataset, split=split, folds=folds, thumbnails=thumbnails, figures_dir=figures, args=arguments,
        revision=revision, base_model=base_model and resolve_base(base_model), strength=strength,
        config_name=config_name, image_column=image_column, label_column=label_column,
        class_folder=class_folder and class_folder.value, dataset_revision=dataset_revision, words=told_in,
    )  # fmt: skip
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    """What a report says, in a few lines."""
    metrics = result["metrics"] or {}
    if "accuracy" in metrics:
        before = metrics.get("zero_shot_accuracy")
        beside = "" if before is None else f", zero-shot {percent(before)}"
        say(f"Accuracy {percent(metrics['accuracy'])}{beside}, on {result['measured_on']}")
    for what, rows in (
        ("Suspicious labels", result["label_issues"]),
        ("Pictures in several splits or under several labels", result["equal_pictures"]),
        ("Pictures that cannot be read", result["unreadable"]),
    ):
        if rows:
            say(f"{what}: {len(rows)}")
    for note in result["notes"]:
        say(note)
    say(f"Wrote {result['output']} ({result['bytes'] / 1000:.0f} kB)")
    if result["figures"]:
        say(f"Figures: {', '.join(result['figures'])}")
