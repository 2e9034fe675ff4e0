"""`taskres suggest`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .screen import console, emit, quiet_libraries, say, say_loading, warn, when_interrupted
from .values import check_device, read_class_names, read_templates, resolve_base, zero_shot_model

if TYPE_CHECKING:
    from ..analysis.suggesting import Suggestions
    from ..modeling_taskres import TaskResCLIPForImageClassification


class StrategyName(opt.Choice):
    COVER = "cover"
    BALANCED = "balanced"
    TYPICLUST = "typiclust"
    PROBCOVER = "probcover"
    K_MEANS = "k-means"
    K_CENTER = "k-center"
    BADGE = "badge"
    MARGIN = "margin"
    ENTROPY = "entropy"
    LEAST_CONFIDENCE = "least-confidence"
    RANDOM = "random"


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PICTURES...", show_default=False,
        help="A classifier (none with --class-names), then pictures, folders of pictures (searched in depth) and URLs.",
    ),
]  # fmt: skip
Count = Annotated[int, typer.Option("--count", "-n", min=1, metavar="N", help="How many pictures to suggest.")]
Labelled = Annotated[
    str | None,
    typer.Option(metavar="DATASET", help="Pictures that have labels already; see: taskres train --help"),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write a table to fill in, .csv, .jsonl or .parquet, for taskres train."
    ),
]
AllowSkipped = Annotated[
    bool,
    typer.Option("--allow-skipped", help="End with 0 although pictures were skipped.", rich_help_panel=opt.OUTPUT),
]
Strategies = Annotated[
    StrategyName, typer.Option(metavar="NAME", help=f"How to choose: {', '.join(map(str, StrategyName))}.")
]


def suggest(
    context: typer.Context,
    inputs: Inputs,
    count: Count = 50,
    output: Output = None,
    labelled: Labelled = None,
    class_names: opt.ClassNames = None,
    base_model: opt.BaseModel = None,
    templates: opt.Templates = None,
    strategy: Strategies = StrategyName.COVER,
    seed: opt.Seed = 1,
    device: opt.Device = None,
    label_map: opt.LabelMap = None,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    class_folder: opt.ClassFolder = None,
    revision: opt.Revision = None,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    allow_skipped: AllowSkipped = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Say which pictures to label next. Unreadable ones are reported and skipped; the exit code is then 3.

    With no label at all, give --class-names and no MODEL. Then fill in the table of --output: see docs/label-next.md

    Example:  taskres suggest photos/ --class-names cat,dog -n 20 -o to-label.csv
    """
    when_interrupted(lambda: f"{output} was not changed." if output else "Nothing was written.")
    if class_names is None and len(inputs) < 2:
        raise typer.BadParameter(
            "give a classifier and pictures, or pictures with --class-names.", param_hint="[MODEL] PICTURES..."
        )
    if class_names is None and templates:
        raise typer.BadParameter("a classifier has its own: use it with --class-names.", param_hint="--template")
    quiet_libraries(quiet or as_json, collect=as_json)
    from ..analysis.suggesting import check_table, suggest_pictures

    if output is not None:
        check_table(output, None if labelled else 0)
    device = check_device(device)
    model = _load(inputs[0], class_names, base_model, templates, revision, quiet or as_json)
    arguments = opt.measuring_arguments(context, device, label_map, quiet or as_json, on_error="skip")
    found = suggest_pictures(
        model, inputs[class_names is None :], count, labelled=labelled, strategy=strategy.value, seed=seed,
        args=arguments, class_folder=class_folder and class_folder.value, image_column=image_column,
        label_column=label_column,
    )  # fmt: skip
    for note in [*found.notes, *(f"Skipped: {problem}" for problem in found.skipped)]:
        warn(note)
    if output is not None:
        found.save(output)
    result: dict[str, Any] = found.as_dict() | {"output": output and str(output)}
    how = ["--from", inputs[0]] if class_names is None else _options(class_names, base_model, templates)
    forgets = labelled is None and bool(model.config.data)
    emit(as_json, result, lambda: _show(found, output, count, how, forgets))
    if found.skipped:
        warn(f"{len(found.skipped)} pictures were skipped.")
        if not allow_skipped:
            raise typer.Exit(3)


def _load(
    name: str, class_names: str | None, base: str | None, templates: list[str] | None, revision: str | None, quiet: bool
) -> TaskResCLIPForImageClassification:
    """The classifier, or a zero-shot one for the class names."""
    from ..modeling_taskres import TaskResCLIPForImageClassification

    if class_names is None:
        say_loading(name, quiet)
        loaded: TaskResCLIPForImageClassification = TaskResCLIPForImageClassification.from_pretrained(
            name, revision=revision, base_model=base and resolve_base(base)
        )
        return loaded
    names = read_class_names(class_names) or []
    listed = list(names.values()) if isinstance(names, dict) else names
    made: TaskResCLIPForImageClassification = zero_shot_model(
        base or opt.default_base_model(), listed, quiet, templates=read_templates(templates)
    )
    return made


def _options(class_names: str, base_model: str | None, templates: Sequence[str] | None) -> list[str]:
    """Options of the training that follows a first round."""
    base = ["--base-model", base_model] if base_model else []
    return ["--class-names", class_names, *base, *(part for one in templates or () for part in ("--template", one))]


def _show(found: Suggestions, output: Path | None, count: int, how: Sequence[str], forgets: bool) -> None:
    """Both tables, and what to do with them.

    Args:
        how: options of the training to come. forgets: the table lacks what the classifier was trained on.
    """
    console().print(found.class_table().rich())
    if len(found.classes) > 20:
        say(f"... and {len(found.classes) - 20} more classes; --json lists all.")
    if output is None:
        console().print(found.table().rich())
    told = f"{len(found.pictures)} of {found.pool} pictures without a label"
    known = f", {found.trained_on} more have one" if found.trained_on else ""
    say(f"Suggested {told}{known}.")
    if len(found.pictures) < min(count, found.pool):
        say("The others look nearly the same as one of these or as a labelled one.")
    if output is not None:
        say(f"Fill in the column label of {output}, then:")
        say(shlex.join(["taskres", "train", str(output), "--drop-unlabelled", "--on-short", "ignore", *how]))
        if forgets:
            say("Pictures that it was trained on are not in that table: name them with --labelled, and they are.")
