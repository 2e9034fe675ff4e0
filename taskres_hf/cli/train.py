"""`taskres train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    MODEL,
    OUTPUT,
    TRAINING,
    BatchSize,
    CacheDir,
    DatasetConfig,
    DatasetOption,
    DatasetRevision,
    Debug,
    DropUnlabelled,
    Dtype,
    Engine,
    ImageColumn,
    Json,
    LabelColumn,
    OnError,
    Precision,
    Quiet,
    console,
    emit,
    open_splits,
    pick_eval_split,
    pick_split,
    public_name,
    quiet_libraries,
    read_class_names,
    read_indices,
    read_json_option,
    read_templates,
)


def train(
    base_model: Annotated[str, typer.Option(help="Hub id or folder of a CLIP-like model.", rich_help_panel=MODEL)],
    dataset: DatasetOption,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write.", rich_help_panel=OUTPUT)],
    shots: Annotated[
        int | None, typer.Option(help="Pictures per class; all by default.", min=1, rich_help_panel=DATA)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw and of training.", rich_help_panel=TRAINING)] = 1,
    recipe: Annotated[
        str,
        typer.Option(help="'auto' (one setting for every task) or 'paper' (as published).", rich_help_panel=TRAINING),
    ] = "auto",
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt with {} for the class name, or the name of a set such as 'imagenet'. Repeat for an ensemble.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Scale of the residual.", rich_help_panel=MODEL)] = 0.5,
    class_names: Annotated[
        str | None,
        typer.Option(help="File (.txt, .json) or comma list, in label order.", rich_help_panel=DATA),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(help="JSON file of sentences per class, used as prompts.", rich_help_panel=MODEL),
    ] = None,
    prompt_names: Annotated[
        Path | None, typer.Option(help="JSON file {class: what prompts call it}.", rich_help_panel=MODEL)
    ] = None,
    prompt_average: Annotated[
        str, typer.Option(help="'raw' (published) or 'normalized'.", rich_help_panel=MODEL)
    ] = "raw",
    keep_underscores: Annotated[
        bool, typer.Option("--keep-underscores", help="As the published code does.", rich_help_panel=MODEL)
    ] = False,
    residual_side: Annotated[str, typer.Option(help="'text' or 'image'.", rich_help_panel=MODEL)] = "text",
    enhanced_base: Annotated[
        bool,
        typer.Option("--enhanced-base", help="Tune the text projection first (TaskRes*).", rich_help_panel=TRAINING),
    ] = False,
    views: Annotated[
        int, typer.Option(help="Augmented views cached per picture.", min=0, rich_help_panel=TRAINING)
    ] = 0,
    augment_online: Annotated[
        bool,
        typer.Option("--augment-online", help="Augment afresh each epoch, as published.", rich_help_panel=TRAINING),
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Override the recipe.", min=1, rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Override the recipe.", rich_help_panel=TRAINING),
    ] = None,
    save_epochs: Annotated[
        int, typer.Option(help="Checkpoint every so many epochs.", min=0, rich_help_panel=TRAINING)
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=TRAINING)
    ] = False,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            help="Epochs without gain on the validation split; off by default.",
            min=1,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    train_split: Annotated[str, typer.Option(help="Split to learn from.", rich_help_panel=DATA)] = "train",
    eval_split: Annotated[
        str | None,
        typer.Option(help="Split to measure on: test, else validation; 'none'.", rich_help_panel=DATA),
    ] = None,
    indices: Annotated[
        Path | None,
        typer.Option(help="Replay a draw: JSON list of rows, or a trained folder.", rich_help_panel=DATA),
    ] = None,
    on_short: Annotated[
        str, typer.Option(help="Too few pictures in a class: warn, raise or ignore.", rich_help_panel=DATA)
    ] = "warn",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    drop_unlabelled: DropUnlabelled = False,
    on_error: OnError = "raise",
    base_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the base.", rich_help_panel=MODEL)
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the base run its own code.", rich_help_panel=MODEL),
    ] = False,
    dtype: Dtype = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.", rich_help_panel=MODEL)] = False,
    batch_size: BatchSize = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    cache_dir: CacheDir = None,
    fp16_residual: Annotated[
        bool, typer.Option("--fp16-residual", help="Half the file.", rich_help_panel=OUTPUT)
    ] = False,
    include_code: Annotated[
        bool,
        typer.Option("--include-code", help="Add the modules trust_remote_code needs.", rich_help_panel=OUTPUT),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a classifier in OUTPUT_DIR.", rich_help_panel=OUTPUT)
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload to this repository afterwards.", rich_help_panel=OUTPUT)
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository private.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a classifier from a few labelled pictures and save it.

    Example:  taskres train --base-model openai/clip-vit-base-patch32 --dataset my-photos --shots 16 -o my-classifier
    """
    from ..errors import ArtifactError, ConfigurationError

    if (output_dir / "config.json").exists() and not (overwrite or resume):
        raise ArtifactError(
            f"{output_dir} already holds a model. Pass --overwrite to replace it, or another --output-dir."
        )
    quiet_libraries(quiet or as_json)
    from ..data.labelled import LabelledImages, class_counts
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..training.arguments import TaskResTrainingArguments
    from ..training.trainer import TaskResTrainer

    arguments = TaskResTrainingArguments(
        output_dir=str(output_dir), recipe=recipe, shots=None if indices else shots, seed=seed, on_short=on_short,
        num_train_epochs=epochs, learning_rate=learning_rate, views=views, enhanced_base=enhanced_base,
        augment_online=augment_online, embed_batch_size=batch_size, cache_dir=str(cache_dir) if cache_dir else None,
        save_epochs=save_epochs, early_stopping_patience=early_stopping_patience, on_error=on_error,
        dataset_name=public_name(dataset), engine=engine, precision=precision, use_cpu=cpu,
        disable_tqdm=quiet or as_json,
    )  # fmt: skip
    splits = open_splits(dataset, dataset_config, dataset_revision)
    names = read_class_names(class_names)
    options: dict[str, Any] = {
        "image_column": image_column,
        "label_column": label_column,
        "drop_unlabelled": drop_unlabelled,
    }
    source = pick_split(splits, train_split)
    if indices is not None:
        source = source.select(read_indices(indices, len(source)))
    pictures = LabelledImages(source, class_names=names, **options)
    chosen = pick_eval_split(splits, eval_split, train_split)
    if early_stopping_patience is not None and chosen == "test" and "validation" in splits:
        chosen = "validation"
    held_out = None
    if chosen is not None:
        held_out = LabelledImages(
            pick_split(splits, chosen), class_names=names, default_names=pictures.class_names, **options
        )
    if held_out is None and early_stopping_patience is not None:
        raise ConfigurationError("--early-stopping-patience needs a validation split; choose one with --eval-split.")
    model = TaskResCLIPForImageClassification.from_base(
        base_model, pictures.class_names, read_templates(template), alpha, residual_side=residual_side,
        class_descriptions=read_json_option(descriptions), underscores="keep" if keep_underscores else "replace",
        prompt_names=read_json_option(prompt_names), prompt_average=prompt_average,
        revision=base_revision, trust_remote_code=trust_remote_code, dtype=dtype or "float32",
    )  # fmt: skip
    trainer = TaskResTrainer(model, arguments, pictures, held_out)
    trainer.train(resume_from_checkpoint=resume or None)
    metrics = trainer.evaluate() if held_out is not None else {}
    if model.config.metrics is not None:
        model.config.metrics["split"] = chosen
    if trainer.accelerator.is_main_process:
        import torch

        half = torch.float16 if fp16_residual else torch.float32
        model.save_pretrained(output_dir, residual_dtype=half, include_code=include_code)
        if push_to_hub:
            model.push_to_hub(push_to_hub, private=private or None, residual_dtype=half, include_code=include_code)
        size = sum(file.stat().st_size for file in output_dir.iterdir() if file.is_file())
        count = (model.config.few_shot or {}).get("num_images")
        result = {
            "output_dir": str(output_dir),
            "train_images": count,
            "bytes": size,
            "classes": len(model.class_names),
        }
        result |= {"split": chosen, **metrics}
        few = class_counts(pictures.labels, pictures.class_names)
        emit(as_json, result, lambda: _show_training(result, few, push_to_hub))


def _show_training(result: dict[str, Any], counts: dict[str, int], pushed: str | None) -> None:
    from rich.table import Table

    screen = console()
    table = Table(title=f"{result['classes']} classes from {result['train_images']} pictures", title_justify="left")
    table.add_column("measured on")
    table.add_column("zero-shot", justify="right")
    table.add_column("trained", justify="right", style="bold")
    if "accuracy" in result:
        label = f"{result['split']} ({result['num_images']} pictures)"
        table.add_row(label, f"{100 * result['zero_shot_accuracy']:.1f} %", f"{100 * result['accuracy']:.1f} %")
        screen.print(table)
        if result["accuracy"] < result["zero_shot_accuracy"]:
            screen.print("Training did not help here: try more pictures, other prompts, or serve zero-shot.")
    else:
        screen.print(f"Trained on {result['train_images']} pictures; there is no other split to measure on.")
    screen.print(f"Saved {result['bytes'] / 1000:.0f} kB in {result['output_dir']}", soft_wrap=True)
    if pushed:
        screen.print(f"Uploaded to {pushed}")
    screen.print(f"Next: taskres predict {result['output_dir']} PICTURES", soft_wrap=True)
