"""`taskres train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigurationError, DataError, HubError
from . import options as opt
from .run_config import RUN_FILE, read_run, training_only, write_run
from .screen import (
    emit,
    percent,
    quiet_libraries,
    rejection_line,
    say,
    say_loading,
    show_table,
    warn,
    when_interrupted,
)
from .texts import Pooling, TextColumn, TextPrompt, base_is_of_texts, make_text_model
from .values import (
    check_device,
    check_output_folder,
    default_output,
    one_dataset,
    public_name,
    read_class_names,
    read_descriptions,
    read_indices,
    read_label_map,
    read_mapping,
    read_templates,
    resolve_base,
    use_device,
    without_base,
)

if TYPE_CHECKING:
    from ..data import LabelledImages, TrainingData
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..training import TaskResTrainer, TaskResTrainingArguments


def train(
    context: typer.Context,
    dataset: opt.DatasetArgument = None,
    output_dir: opt.OutputDir = None,
    base_model: opt.TrainBase = None,
    shots: opt.Shots = None,
    seed: opt.Seed = 1,
    templates: opt.Templates = None,
    class_names: opt.ClassNames = None,
    device: opt.Device = None,
    config: opt.Config = None,
    # ---- dataset
    dataset_option: opt.DatasetOption = None,
    train_split: opt.TrainSplit = None,
    eval_split: opt.EvalSplit = None,
    holdout: opt.Holdout = None,
    folds: opt.Folds = 5,
    indices: opt.Indices = None,
    on_short: opt.OnShort = opt.ShortClass.WARN,
    on_error: opt.OnError = opt.BrokenPicture.RAISE,
    drop_unlabelled: opt.DropUnlabelled = False,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    multi_label: opt.MultiLabel = False,
    label_separator: opt.LabelSeparator = None,
    label_columns: opt.LabelColumns = None,
    class_folder: opt.ClassFolder = None,
    config_name: opt.ConfigName = None,
    dataset_revision: opt.DatasetRevision = None,
    # ---- class names and prompts
    class_descriptions: opt.Descriptions = None,
    prompt_names: opt.PromptNames = None,
    prompt_average: opt.PromptAverage = opt.Average.RAW,
    underscores: opt.UnderscoresOption = opt.Underscores.REPLACE,
    keep_underscores: opt.KeepUnderscores = False,
    # ---- base model
    from_classifier: opt.FromClassifier = None,
    base_revision: opt.BaseRevision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    dtype: opt.Dtype = None,
    alpha: opt.Alpha = 0.5,
    residual_side: opt.ResidualSide = opt.Side.TEXT,
    base_classifier: opt.BaseClassifier = None,
    # ---- texts
    text_column: TextColumn = None,
    pooling: Pooling = None,
    text_prompt: TextPrompt = None,
    # ---- training
    recipe: opt.RecipeOption = opt.Recipe.AUTO,
    num_train_epochs: opt.Epochs = None,
    learning_rate: opt.LearningRate = None,
    views: opt.Views = 0,
    augment_online: opt.AugmentOnline = None,
    enhanced_base: opt.EnhancedBase = False,
    early_stopping_patience: opt.Patience = None,
    reject: opt.Reject = None,
    save_epochs: opt.SaveEpochs = 0,
    resume: opt.Resume = False,
    report_to: opt.ReportTo = None,
    # ---- speed and device
    use_cpu: opt.Cpu = False,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    crop: opt.Crop = None,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    # ---- output
    fp16_residual: opt.Fp16Residual = False,
    include_code: opt.IncludeCode = False,
    report: opt.Report = None,
    overwrite: opt.Overwrite = False,
    hub_model_id: opt.PushTo = None,
    hub_private_repo: opt.Private = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a classifier from a few labelled pictures, measure it and save it.

    Example:  taskres train photos/ --shots 16 -o my-classifier
    """
    quiet_libraries(quiet or as_json, collect=as_json)
    run = read_run(context, config)
    run["dataset"] = one_dataset(context, run["dataset"] if dataset_option is None else dataset, dataset_option)
    _settle(run)
    run["texts"] = base_is_of_texts(run)
    arguments = _arguments(run)
    report = run["report"] and Path(run["report"])
    if report:
        from ..report import check_report_output, write_report

        check_report_output(report)
    when_interrupted(lambda: _what_is_kept(arguments))
    data = _open(run)
    validation = _validation(run, data) if arguments.keeps_best else None
    if not as_json:
        say("\n".join(data.account.lines()))
    model = _make_model(run, data.train.class_names)
    from ..training import TaskResTrainer

    if report:
        model.classifier.check_has_text("The report")
        model.classifier.check_one_label("The report")
    trainer = TaskResTrainer(model, arguments, data.train, validation or data.held_out)
    if report and trainer.accelerator.num_processes > 1:
        raise ConfigurationError("--report is for one process: run `taskres report` on the classifier afterwards.")
    trainer.train(resume_from_checkpoint=run["resume"] or None)
    _remember_rows(model, run, data.train)
    metrics = _measure(trainer, run, data.held_out)
    if trainer.accelerator.is_main_process:
        result = _save(model, run) | metrics | {"account": data.account.as_dict()}
        if report:
            name = run["output_dir"]
            write_report(model, report, data, folds=run["folds"], args=arguments, name=name)
            result["report"] = str(report)
        failure = _upload(run) if run["hub_model_id"] else {}
        result |= failure
        emit(as_json, result, lambda: _show(result))
        if "error" in failure:
            warn(f"Error: {failure['error']}")
            raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------- before training


def _settle(run: dict[str, Any]) -> None:
    """Fill in what the options leave open, read the files they name and refuse what contradicts itself.

    Everything that can be wrong without looking at a picture is found here.
    """
    from ..errors import ConfigurationError

    if run["shots"] is not None and run["indices"] is not None:
        raise ConfigurationError("--indices replays a draw and --shots makes one: leave one of them out.")
    if run["indices"] is not None and run["holdout"] is not None:
        raise ConfigurationError("--indices names the rows to train on and --holdout leaves some out: drop one.")
    if run["folds"] < 0 or run["folds"] == 1:
        raise ConfigurationError(f"--folds must be at least 2, or 0 to measure nothing; it is {run['folds']}.")
    single = {"--reject": run["reject"], "--report": run["report"]}
    given = [name for name, value in single.items() if value is not None]
    if run["multi_label"] and given:
        raise ConfigurationError(
            f"{given[0]} is for classifiers that give each picture one label, and --multi-label gives several: leave "
            "one of them out."
        )
    if run.pop("keep_underscores"):
        run["underscores"] = "keep"
    if run["from_classifier"] is not None:
        _check_from(run)
    else:
        run["base_model"] = run["base_model"] or opt.default_base_model()
    run["output_dir"] = str(run["output_dir"] or default_output(run["dataset"]))
    run["device"] = check_device(run["device"], run.pop("use_cpu"))
    use_device(run["device"])
    run["class_names"] = read_class_names(run["class_names"])
    run["templates"] = read_templates(run["templates"])
    run["class_descriptions"] = read_descriptions(run["class_descriptions"])
    run["prompt_names"] = read_mapping(run["prompt_names"], "--prompt-names")
    run["label_map"] = read_label_map(run.get("label_map"))
    check_output_folder(Path(run["output_dir"]), replace=run["overwrite"] or run["resume"])


_OF_A_NEW_ONE = {
    "templates": None, "class_descriptions": None, "prompt_names": None, "prompt_average": "raw",
    "underscores": "replace", "alpha": 0.5, "residual_side": "text", "base_classifier": None,
}  # fmt: skip
# Of those, what has no meaning over a model of images alone.
_OF_TEXT = {
    key: _OF_A_NEW_ONE[key]
    for key in ("templates", "class_descriptions", "prompt_average", "underscores", "residual_side")
}


def _check_from(run: dict[str, Any]) -> None:
    """Classes, prompts and the like belong to the classifier that is gone on from."""
    given = [name for name, default in _OF_A_NEW_ONE.items() if run[name] not in (default, [])]
    if given:
        raise ConfigurationError(
            f"--from takes prompts and settings of the classifier it names; leave out {', '.join(given)}, or train a "
            "new one without --from."
        )


def _arguments(run: dict[str, Any]) -> TaskResTrainingArguments:
    from ..training import TaskResTrainingArguments

    report_to = run["report_to"]
    values = {**training_only(run), "dataset_name": run.get("dataset_name") or public_name(run["dataset"])}
    values |= {"use_cpu": run["device"] == "cpu", "disable_tqdm": run["quiet"] or run["as_json"]}
    values |= {"shots": None if run["indices"] else run["shots"], "report_to": report_to or None}
    values["hub_model_id"] = values["hub_private_repo"] = None  # uploaded once, after it is saved
    return TaskResTrainingArguments(**{name: value for name, value in values.items() if value is not None})


def _load(run: dict[str, Any], **changes: Any) -> TrainingData:
    from ..data import load_training_data

    names: tuple[str, ...] = (
        "train_split",
        "eval_split",
        "config_name",
        "image_column",
        "label_column",
        "class_names",
        "holdout",
    )
    names += ("class_folder", "drop_unlabelled", "seed", "multi_label", "label_separator", "label_columns")
    options = {name: run[name] for name in names} | changes
    if run["texts"]:
        options |= {"texts": True, "image_column": run["text_column"]}
    return load_training_data(run["dataset"], revision=run["dataset_revision"], **options)


def _open(run: dict[str, Any]) -> TrainingData:
    """What to train on, what to measure on, and how the dataset was read."""
    data = _load(run)
    if run["indices"] is None:
        return data
    place = {row: position for position, row in enumerate(data.train.indices)}
    run["indices"] = read_indices(run["indices"], max(place) + 1)
    unusable = [row for row in run["indices"] if row not in place]
    if unusable:
        raise ConfigurationError(f"--indices: row {unusable[0]} has no label, so it cannot be trained on.")
    return data._replace(train=data.train.select([place[row] for row in run["indices"]]))


def _validation(run: dict[str, Any], data: TrainingData) -> LabelledImages | None:
    """The split to choose the epoch on, where `data` holds out the test split; None where it holds out another.

    Raises:
        ConfigurationError: there is nothing but the test split to choose on.
    """
    if data.held_out is not None and data.held_out.split != "test":
        return None
    try:
        if data.held_out is not None:
            return _load(run, eval_split="validation").held_out
    except DataError:
        pass
    raise ConfigurationError(
        f"--early-stopping-patience chooses the epoch on held-out pictures, and {run['dataset']} has no validation "
        "split (a test split must not choose). Set a part of the training pictures aside with --holdout 0.2."
    )


def _make_model(run: dict[str, Any], class_names: list[str]) -> TaskResCLIPForImageClassification:
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..residual import MULTI_LABEL

    if run["from_classifier"] is not None:
        say_loading(run["from_classifier"], run["quiet"] or run["as_json"])
        loaded: TaskResCLIPForImageClassification = TaskResCLIPForImageClassification.from_pretrained(
            run["from_classifier"], base_model=run["base_model"] and resolve_base(run["base_model"]),
            base_revision=run["base_revision"], base_trust_remote_code=run["trust_remote_code"], dtype=run["dtype"],
        )  # fmt: skip
        return loaded
    names = ("residual_side", "class_descriptions", "underscores", "prompt_names", "prompt_average")
    try:
        say_loading(f"the base model {run['base_model']}", run["quiet"] or run["as_json"])
        if run["texts"]:
            return make_text_model(run, class_names)
        if (alone := _over_image_tower(run, class_names)) is not None:
            return alone
        return TaskResCLIPForImageClassification.from_base(
            resolve_base(run["base_model"]), class_names, run["templates"], run["alpha"],
            revision=run["base_revision"], trust_remote_code=run["trust_remote_code"],
            dtype=run["dtype"] or "float32", problem_type=MULTI_LABEL if run["multi_label"] else None,
            **{name: run[name] for name in names},
        )  # fmt: skip
    except OSError as error:
        raise without_base(run["base_model"], error) from error


def _over_image_tower(run: dict[str, Any], class_names: list[str]) -> TaskResCLIPForImageClassification | None:
    """The classifier where the base is a model of images alone; None where it reads text too."""
    from ..encoders import BaseSource
    from ..vision.modeling import TaskResForImageClassification
    from ..vision.tower import is_image_tower_at

    name = resolve_base(run["base_model"])
    if not is_image_tower_at(BaseSource(name, run["base_revision"])):
        if run["base_classifier"] is not None:
            raise ConfigurationError(
                f"--base-classifier is for models of images alone; {run['base_model']} reads text, which makes its "
                "base classifier. Leave it out."
            )
        return None
    given = [f"--{key.replace('_', '-')}" for key, default in _OF_TEXT.items() if run[key] not in (default, [])]
    if given or run["multi_label"]:
        what = ", ".join(given) or "--multi-label"
        raise ConfigurationError(
            f"{run['base_model']} is a model of images alone, over which {what} has no meaning. Leave it out, or take "
            "a base that reads text too."
        )
    return TaskResForImageClassification.from_base(
        name, class_names, run["alpha"], base_classifier=run["base_classifier"], prompt_names=run["prompt_names"],
        revision=run["base_revision"], trust_remote_code=run["trust_remote_code"], dtype=run["dtype"] or "float32",
    )  # fmt: skip


def _what_is_kept(arguments: TaskResTrainingArguments) -> str:
    from ..training.run import list_checkpoints

    checkpoints = list_checkpoints(arguments.output_dir)
    if checkpoints:
        newest = checkpoints[-1]
        return f"{newest} is kept: run the same command with --resume to go on from there."
    return (
        "Embeddings of the pictures read so far are in the cache, so the same command starts from there; nothing was "
        f"written to {arguments.output_dir}."
    )


# ---------------------------------------------------------------------------------------------------- after training


def _remember_rows(model: TaskResCLIPForImageClassification, run: dict[str, Any], pictures: LabelledImages) -> None:
    """A replayed draw can be replayed from the new classifier too."""
    if run["indices"] is not None:
        model.config.few_shot = {**(model.config.few_shot or {}), "indices": list(pictures.indices)}


def _measure(trainer: TaskResTrainer, run: dict[str, Any], held_out: LabelledImages | None) -> dict[str, Any]:
    """An honest number: on held-out pictures, else by cross-validation."""
    if held_out is None and run["folds"] == 0:
        return {"split": None, "method": None}
    metrics = trainer.measure(held_out, folds=run["folds"] or 2)
    return {"split": None, "method": None, **metrics}


def _save(model: TaskResCLIPForImageClassification, run: dict[str, Any]) -> dict[str, Any]:
    """Save, read back and write the settings beside it; what was done."""
    import torch

    from ..description import rejection_in_short

    folder = Path(run["output_dir"])
    half = torch.float16 if run["fp16_residual"] else torch.float32
    model.save_pretrained(folder, residual_dtype=half, include_code=run["include_code"])
    type(model).from_pretrained(folder, base_model=model.clip)  # what does not load again is no result
    stored = {key: value for key, value in dict(run, dataset=_portable(run["dataset"])).items() if key != "texts"}
    stored |= {name: _portable(run[name]) for name in ("base_model", "from_classifier") if run[name] is not None}
    if model.config.base_model_revision and run["from_classifier"] is None:
        stored["base_revision"] = model.config.base_model_revision
    write_run(folder, stored)
    result: dict[str, Any] = {"noun": "text"} if run["texts"] else {}
    result |= {"output_dir": str(folder), "run": str(folder / RUN_FILE), "classes": len(model.class_names)}
    result["train_images"] = (model.config.few_shot or {}).get("num_images")
    result["rejection"] = rejection_in_short(model.config.rejection)
    result["bytes"] = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))
    return result


def _upload(run: dict[str, Any]) -> dict[str, Any]:
    """Upload what was saved: where it is now, or why it is not there. The result of the training stands either way."""
    from ..hub import push_folder
    from ..report import figure_for_card

    folder = run["output_dir"]
    when_interrupted(lambda: f"The classifier is saved in {folder}; upload it with: taskres push {folder} REPO")
    try:
        commit = push_folder(
            folder, run["hub_model_id"], private=run["hub_private_repo"] or None, include_code=run["include_code"],
            figure=figure_for_card(folder),
        )  # fmt: skip
    except (HubError, ConfigurationError) as error:
        return {"error": str(error), "type": type(error).__name__}
    return {"url": str(commit.repo_url)}


def _portable(name: str) -> str:
    """A path that holds from any folder; a Hub id or `shipped` as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _show(result: dict[str, Any]) -> None:
    classes, images = result["classes"], result["train_images"]
    noun = result.get("noun", "picture")
    title = f"{classes} classes from {images} {noun}s"
    if "map" in result:
        from ..description import measured_on

        rows = [
            [name, percent(result[f"zero_shot_{key}"]), percent(result[key])]
            for key, name in (("map", "mAP"), ("micro_f1", "micro-F1"), ("macro_f1", "macro-F1"))
        ]
        show_table(["measured", "zero-shot", "trained"], rows, title=f"{title}; on {measured_on(result)}")
    elif "accuracy" not in result:
        say(f"{title}; nothing was measured.")
    else:
        from ..description import measured_on

        row = [measured_on(result), percent(result["zero_shot_accuracy"]), percent(result["accuracy"])]
        show_table(["measured on", "zero-shot", "trained"], [row], title=title)
    if result["rejection"]:
        say(rejection_line(result["rejection"], result))
    say(f"Saved {result['bytes'] / 1000:.0f} kB in {result['output_dir']}")
    if "report" in result:
        say(f"Report: {result['report']}")
    if "url" in result:
        say(f"Uploaded to {result['url']}")
    say(f"Next: taskres predict {_quoted(result['output_dir'])} {noun.upper()}S")


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text) if os.name == "posix" else text
