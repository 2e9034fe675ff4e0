"""`taskres plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from . import options as opt
from .screen import console, emit, percent, quiet_libraries, say, say_loading, when_interrupted
from .values import (
    check_device,
    one_dataset,
    read_class_names,
    read_descriptions,
    read_templates,
    resolve_base,
    zero_shot_model,
)

if TYPE_CHECKING:
    from ..analysis.planning import Plan
    from ..modeling_taskres import TaskResCLIPForImageClassification


class Metric(opt.Choice):
    ACCURACY = "accuracy"
    BALANCED = "balanced"


_Target = Annotated[float, typer.Option(metavar="SHARE", help="Accuracy to reach: 0.9 is 90 %.")]
_Metric = Annotated[Metric, typer.Option(help="Of all pictures alike, or balanced: of all classes alike.")]
_Figure = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw the curve, .png or .svg; its numbers go beside it as .csv."),
]
_Draws = Annotated[int, typer.Option(min=1, metavar="N", help="Draws of each number of pictures.")]
_ClassRows = Annotated[int, typer.Option("--class-rows", min=0, metavar="N", help="Most classes in the table.")]


def plan(
    context: typer.Context,
    dataset: opt.DatasetArgument = None,
    target: _Target = 0.9,
    base_model: opt.TrainBase = None,
    metric: _Metric = Metric.ACCURACY,
    figure: _Figure = None,
    class_rows: _ClassRows = 12,
    draws: _Draws = 6,
    seed: opt.Seed = 1,
    templates: opt.Templates = None,
    class_names: opt.ClassNames = None,
    device: opt.Device = None,
    # ---- dataset
    dataset_option: opt.DatasetOption = None,
    train_split: opt.TrainSplit = None,
    eval_split: opt.EvalSplit = None,
    holdout: opt.Holdout = None,
    on_error: opt.OnError = opt.BrokenPicture.RAISE,
    drop_unlabelled: opt.DropUnlabelled = False,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    class_folder: opt.ClassFolder = None,
    config_name: opt.ConfigName = None,
    dataset_revision: opt.DatasetRevision = None,
    # ---- class names and prompts, base model
    class_descriptions: opt.Descriptions = None,
    from_classifier: opt.FromClassifier = None,
    base_revision: opt.BaseRevision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    # ---- speed and output
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    crop: opt.Crop = None,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """How many more labelled pictures a target takes, foretold from those at hand; which classes are weakest.

    Trains on growing parts of them, tests on others, and draws the curve on, with its uncertainty.

    Example:  taskres plan photos/ --target 0.9
    """
    quiet_libraries(quiet or as_json, collect=as_json)
    source = one_dataset(context, dataset, dataset_option)
    device = check_device(device)
    from ..analysis.planning import check_figure, check_target, write_figure

    check_target(target, metric.value)
    if figure is not None:
        check_figure(figure)
    arguments = opt.measuring_arguments(context, device, None, quiet or as_json)
    when_interrupted(lambda: "Embeddings of the pictures read so far are in the cache; nothing else was written.")
    found = _plan(context, source, arguments, quiet or as_json)
    written = [] if figure is None else [str(path) for path in write_figure(found, figure)]
    emit(as_json, {**found.as_dict(), "files": written}, lambda: _show(found, class_rows, written))


def _plan(context: typer.Context, source: str, arguments: Any, quiet: bool) -> Plan:
    """Read, embed, and train on growing parts."""
    from tqdm.auto import tqdm

    from ..analysis.planning import plan_pictures
    from ..data import load_training_data
    from ..training import TaskResTrainer

    given = context.params
    names = ("train_split", "eval_split", "config_name", "image_column", "label_column", "holdout", "drop_unlabelled")
    options = {name: given[name] for name in names}
    folder = given["class_folder"]
    data = load_training_data(
        source, revision=given["dataset_revision"], class_names=read_class_names(given["class_names"]),
        class_folder=None if folder is None else folder.value, seed=given["seed"], **options,
    )  # fmt: skip
    if not quiet:
        say("\n".join(data.account.lines()))
    model = _model(given, data.train.class_names, quiet)
    model.classifier.check_one_label("A plan")
    trainer = TaskResTrainer(model, arguments)
    train = trainer.embed(data.train)
    held_out = None if data.held_out is None else trainer.embed(data.held_out)
    with tqdm(desc="Training on growing parts", unit="fit", disable=quiet, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update()

        return plan_pictures(
            model.classifier, train, held_out, target=given["target"], metric=given["metric"].value,
            draws=given["draws"], seed=given["seed"], on_fit=show,
        )  # fmt: skip


_OF_A_NEW_ONE = ("templates", "class_descriptions", "base_revision")


def _model(given: dict[str, Any], class_names: list[str], quiet: bool) -> TaskResCLIPForImageClassification:
    from ..modeling_taskres import TaskResCLIPForImageClassification

    trained = given["from_classifier"]
    if trained is not None:
        say_loading(trained, quiet)
        if wrong := [option for option in _OF_A_NEW_ONE if given[option]]:
            raise ConfigurationError(f"--from takes prompts and base of the classifier it names; leave out {wrong[0]}.")
        loaded: TaskResCLIPForImageClassification = TaskResCLIPForImageClassification.from_pretrained(
            trained, base_model=given["base_model"] and resolve_base(given["base_model"]),
            base_trust_remote_code=given["trust_remote_code"],
        )  # fmt: skip
        return loaded
    made: TaskResCLIPForImageClassification = zero_shot_model(
        given["base_model"] or opt.default_base_model(), class_names, quiet, revision=given["base_revision"],
        templates=read_templates(given["templates"]), trust_remote_code=given["trust_remote_code"],
        class_descriptions=read_descriptions(given["class_descriptions"]),
    )  # fmt: skip
    return made


def _show(found: Plan, class_rows: int, written: list[str]) -> None:
    where = f"{found.tested} held-out pictures" if found.method == "held-out" else f"{found.tested} pictures left out"
    console().print(found.table().rich())
    if class_rows and len(found.classes) > 1:
        console().print(found.class_table(class_rows).rich())
        if len(found.classes) > class_rows:
            say(f"{len(found.classes) - class_rows} more classes; --class-rows {len(found.classes)} shows all.")
    say(f"Measured on {where}; zero-shot {percent(found.zero_shot)}.")
    for note in found.notes:
        say(f"Note: {note}")
    say(found.sentence())
    for path in written:
        say(f"Wrote {path}")
