"""`taskres evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options as opt
from .screen import emit, percent, quiet_libraries, rejection_line, say, say_loading, show_table, when_interrupted
from .texts import TextColumn, reading_texts
from .values import check_device, label_options, one_dataset, resolve_base

if TYPE_CHECKING:
    from ..data import LabelledImages


def evaluate(
    context: typer.Context,
    model: opt.Artifact,
    dataset: opt.DatasetArgument = None,
    split: opt.Split = None,
    device: opt.Device = None,
    dataset_option: opt.DatasetOption = None,
    include_train_pictures: opt.IncludeTrainPictures = False,
    label_map: opt.LabelMap = None,
    drop_unlabelled: opt.DropUnlabelled = False,
    on_error: opt.OnError = opt.BrokenPicture.RAISE,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    text_column: TextColumn = None,
    label_separator: opt.LabelSeparator = None,
    label_columns: opt.LabelColumns = None,
    class_folder: opt.ClassFolder = None,
    config_name: opt.ConfigName = None,
    dataset_revision: opt.DatasetRevision = None,
    strength: opt.Strength = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    dtype: opt.Dtype = None,
    use_cpu: opt.Cpu = False,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    crop: opt.Crop = None,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    report: opt.Report = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Accuracy of a trained classifier beside zero-shot, overall and per class; mAP, F1 of several labels.

    Pictures that it was trained on are recognised and left out.

    Example:  taskres evaluate my-classifier photos/ --split test
    """
    when_interrupted(lambda: "Embeddings of the pictures read so far are in the cache; the same command starts there.")
    quiet_libraries(quiet or as_json, collect=as_json)
    source = one_dataset(context, dataset, dataset_option)
    arguments = opt.measuring_arguments(context, check_device(device, use_cpu), label_map, quiet or as_json)
    _check_report(report)
    from ..data import load_evaluation_data
    from ..training import TaskResTrainer

    where = {"revision": revision, "base_model": base_model and resolve_base(base_model)}
    classifier = _loaded(model, quiet or as_json, **where, dtype=dtype and dtype.value, strength=strength)
    _check_report(report, classifier.classifier)
    options: dict[str, Any] = {
        "config_name": config_name, "image_column": image_column, "label_column": label_column,
        "class_folder": class_folder and class_folder.value, "drop_unlabelled": drop_unlabelled,
        "default_names": classifier.class_names,
    }  # fmt: skip
    labels = label_options(classifier.config, label_separator, label_columns) | reading_texts(classifier, text_column)
    pictures = load_evaluation_data(source, split, revision=dataset_revision, **{**options, **labels})
    if not as_json and pictures.account:
        say("\n".join(pictures.account.lines()))
    trainer = TaskResTrainer(classifier, arguments, eval_dataset=pictures)
    result = {"split": pictures.split, **trainer.evaluate(include_train_pictures=include_train_pictures)}
    result |= {"train_pictures_included": include_train_pictures, **_background(classifier, pictures)}
    options |= {"dataset_revision": dataset_revision, "name": model, "split": split, "args": arguments}
    result |= _write_report(report, classifier, source, options)
    emit(as_json, result, lambda: (_show_several if "map" in result else _show)(result))


def _loaded(model: str, quiet: bool, **options: Any) -> Any:
    from ..modeling_taskres import TaskResCLIPForImageClassification

    say_loading(model, quiet)
    return TaskResCLIPForImageClassification.from_pretrained(model, **options)


def _background(classifier: Any, pictures: LabelledImages) -> dict[str, Any]:
    """How the pictures were read, and the threshold that pictures of no class are rejected by."""
    from ..description import rejection_in_short

    account = pictures.account.as_dict() if pictures.account else None
    return {"account": account, "rejection": rejection_in_short(classifier.config.rejection)}


def _check_report(report: Path | None, head: Any = None) -> None:
    """Refuse a report that cannot be written, or of a classifier that has none."""
    if report is not None and head is not None:
        head.check_one_label("The report")
        head.check_has_text("The report")
    elif report is not None:
        from ..report import check_report_output

        check_report_output(report)


def _write_report(report: Path | None, classifier: Any, source: str, options: dict[str, Any]) -> dict[str, str]:
    if report is None:
        return {}
    from ..report import write_report

    return {"report": write_report(classifier, report, source, **options)["output"]}


def _show(metrics: dict[str, Any]) -> None:
    images = metrics["num_images"]
    rows: list[list[Any]] = [
        [name, row["support"], percent(row["accuracy"])] for name, row in metrics["per_class"].items()
    ]
    rows += [["all, trained", images, percent(metrics["accuracy"])]]
    rows += [["all, zero-shot", images, percent(metrics["zero_shot_accuracy"])]]
    rows += [["macro-F1, trained", images, percent(metrics["macro_f1"])]]
    show_table(["class", f"{metrics.get('noun', 'picture')}s", "accuracy"], rows, title=_title(metrics), bold=[-3])
    if metrics["rejection"]:
        say(rejection_line(metrics["rejection"], metrics))
    if "report" in metrics:
        say(f"Report: {metrics['report']}")


def _title(metrics: dict[str, Any]) -> str:
    title = f"{metrics['split']}: {metrics['num_images']} {metrics.get('noun', 'picture')}s"
    title += f", at strength {metrics['strength']:g}" if metrics.get("strength", 1.0) != 1.0 else ""
    return title + (", those it was trained on included" if metrics["train_pictures_included"] else "")


def _show_several(metrics: dict[str, Any]) -> None:
    """Of several labels per picture: average precision per class, and what sums all up."""
    rows: list[list[Any]] = [
        [name, row["support"], percent(row["zero_shot_ap"]), percent(row["ap"]), percent(row["f1"])]
        for name, row in metrics["per_class"].items()
    ]
    images = metrics["num_images"]
    rows += [["all: mAP, macro-F1", images, percent(metrics["zero_shot_map"]), percent(metrics["map"]),
              percent(metrics["macro_f1"])]]  # fmt: skip
    rows += [["all: micro-F1", images, "", "", percent(metrics["micro_f1"])]]
    columns = ["class", "pictures", "AP, zero-shot", "AP", "F1"]
    show_table(columns, rows, title=_title(metrics), bold=[-2])
    if metrics["unmeasured_classes"]:
        say(f"On all or none of the pictures, so not measured: {', '.join(metrics['unmeasured_classes'])}")
