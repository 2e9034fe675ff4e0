"""`taskres difficulty`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .screen import console, emit, percent, quiet_libraries, say, when_interrupted
from .values import (
    check_device,
    one_dataset,
    read_class_names,
    read_numbers,
    read_templates,
    zero_shot_model,
)

if TYPE_CHECKING:
    from ..analysis import TransferDifficulty

_READING = ("train_split", "drop_unlabelled", "image_column", "label_column", "config_name")
_Shots = Annotated[str, typer.Option(metavar="LIST", help="Pictures per class to train on, a comma list.")]
_At = Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Pictures per class that classes are listed for.")]
_Level = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of tasks that intervals are to hold: 0.5, 0.8 or 0.9.")
]
_Unlabelled = Annotated[bool, typer.Option("--unlabelled", help="Do not look at labels.", rich_help_panel=opt.DATA)]


def difficulty(
    context: typer.Context,
    dataset: opt.DatasetArgument = None,
    base_model: opt.TrainBase = None,
    class_names: opt.ClassNames = None,
    shots: _Shots = "1,2,4,8,16",
    at: _At = 4,
    level: _Level = 0.8,
    templates: opt.Templates = None,
    device: opt.Device = None,
    # ---- dataset
    dataset_option: opt.DatasetOption = None,
    unlabelled: _Unlabelled = False,
    train_split: opt.TrainSplit = None,
    on_error: opt.OnError = opt.BrokenPicture.RAISE,
    drop_unlabelled: opt.DropUnlabelled = False,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    class_folder: opt.ClassFolder = None,
    config_name: opt.ConfigName = None,
    dataset_revision: opt.DatasetRevision = None,
    seed: opt.Seed = 1,
    # ---- base model, speed, output
    base_revision: opt.BaseRevision = None,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    crop: opt.Crop = None,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """How hard a task is for a base model, before training, and what training is expected to reach.

    Works on a few labelled pictures, or on pictures without labels and the names of the classes.

    Example:  taskres difficulty photos/ --class-names cat,dog,horse
    """
    when_interrupted(lambda: "Embeddings of the pictures read so far are in the cache; the same command starts there.")
    quiet_libraries(quiet or as_json, collect=as_json)
    source, wanted = one_dataset(context, dataset, dataset_option), read_numbers(shots, "--shots")
    # `shots` here says what is asked about, not what is drawn.
    arguments = opt.measuring_arguments(context, check_device(device), None, quiet or as_json, shots=None)
    from ..analysis.transfer import read_pictures, transfer_difficulty

    reading = {name: context.params[name] for name in _READING if context.params[name] is not None}
    reading |= {"revision": dataset_revision, "class_folder": class_folder and class_folder.value}
    pictures, labelled = read_pictures(source, read_class_names(class_names), False if unlabelled else None, reading)
    if pictures.account and not (quiet or as_json):
        say("\n".join(pictures.account.lines()))
    model = _model(base_model, base_revision, pictures.class_names, templates, quiet or as_json)
    told = transfer_difficulty(
        model, pictures, labelled=labelled, shots=wanted, at=at, level=level, seed=seed, arguments=arguments
    )
    emit(as_json, told.as_dict(), lambda: _show(told))


def _model(name: str | None, revision: str | None, classes: list[str], templates: list[str] | None, quiet: bool) -> Any:
    name = name or opt.default_base_model()
    return zero_shot_model(name, classes, quiet, templates=read_templates(templates), revision=revision)


def _show(told: TransferDifficulty) -> None:
    made, (low, high) = told.made_from, told.difficulty_interval
    say(
        f"Difficulty at {told.shots} pictures a class: {told.difficulty:.2f}, {100 * told.level:.0f} % interval "
        f"{low:.2f} to {high:.2f}\n(0: no mistakes left, 1: as many as chance). From {made['pictures']} pictures, "
        f"{made['mode']}."
    )
    for table in (told.table(), told.class_table()):
        console().print(table.rich())
    held = {name: percent(share["task"]) for name, share in told.coverage.items()}
    say(
        "On tasks left out of what this comes from (13 of photographs and emoji, two small\nencoders) intervals held "
        f"{held['accuracy']} of accuracies, {held['gain']} of gains, {held['class_accuracy']} of classes."
    )
