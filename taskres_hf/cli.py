"""`taskres`: parse, call the library, print. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 an error (the message says what to do), 2 wrong usage, 3 done but pictures were skipped.
Tables and progress are for people; with `--json` the standard output holds one JSON value and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    DATA,
    MODEL,
    OUTPUT,
    TRAINING,
    Artifact,
    BaseModel,
    BatchSize,
    CacheDir,
    DatasetConfig,
    DatasetOption,
    DatasetRevision,
    Debug,
    Device,
    DropUnlabelled,
    Dtype,
    Engine,
    ImageColumn,
    Json,
    LabelColumn,
    LabelMap,
    OnError,
    Precision,
    Quiet,
    console,
    emit,
    open_splits,
    pick_eval_split,
    pick_split,
    plain,
    public_name,
    quiet_libraries,
    read_class_names,
    read_indices,
    read_json_option,
    read_numbers,
    read_templates,
)
from .cli_research import add_commands

if TYPE_CHECKING:
    pass


app = typer.Typer(
    name="taskres",
    help="Few-shot image classifiers as kilobyte residuals over frozen CLIP-like models.\n\n"
    "Start with [bold]taskres demo[/bold], then [bold]taskres train[/bold] on your own pictures.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from ._version import __version__

        typer.echo(f"taskres_hf {__version__}")
        raise typer.Exit


# ---------------------------------------------------------------------- train


@app.command(rich_help_panel="Make and use a classifier")
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
    from .errors import ArtifactError, ConfigurationError

    if (output_dir / "config.json").exists() and not (overwrite or resume):
        raise ArtifactError(
            f"{output_dir} already holds a model. Pass --overwrite to replace it, or another --output-dir."
        )
    quiet_libraries(quiet or as_json)
    from .data import LabelledImages, class_counts
    from .modeling_taskres import TaskResCLIPForImageClassification
    from .training import TaskResTrainer, TaskResTrainingArguments

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


# ---------------------------------------------------------------------- evaluate


@app.command(rich_help_panel="Make and use a classifier")
def evaluate(
    model: Artifact,
    dataset: DatasetOption,
    split: Annotated[str, typer.Option(help="Split to measure on.", rich_help_panel=DATA)] = "test",
    revision: Annotated[str | None, typer.Option(help="Revision of the classifier.", rich_help_panel=MODEL)] = None,
    base_model: BaseModel = None,
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    label_map: LabelMap = None,
    drop_unlabelled: DropUnlabelled = False,
    on_error: OnError = "raise",
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    cache_dir: CacheDir = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.", rich_help_panel=MODEL)] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Accuracy of a trained classifier beside zero-shot, per class and overall."""
    quiet_libraries(quiet or as_json)
    from .modeling_taskres import TaskResCLIPForImageClassification
    from .training import TaskResTrainer, TaskResTrainingArguments

    splits = open_splits(dataset, dataset_config, dataset_revision)
    pictures = pick_split(splits, split)
    split = split if split in splits else next(iter(splits))
    classifier = TaskResCLIPForImageClassification.from_pretrained(
        model, revision=revision, base_model=base_model, dtype=dtype
    )
    mapping: Any = label_map if label_map in (None, "position") else read_json_option(Path(str(label_map)))
    arguments = TaskResTrainingArguments(
        embed_batch_size=batch_size, cache_dir=str(cache_dir) if cache_dir else None, label_map=mapping,
        image_column=image_column, label_column=label_column, drop_unlabelled=drop_unlabelled, on_error=on_error,
        engine=engine, precision=precision, use_cpu=cpu, disable_tqdm=quiet or as_json,
    )  # fmt: skip
    metrics = {"split": split, **TaskResTrainer(classifier, arguments, eval_dataset=pictures).evaluate()}

    def show() -> None:
        from rich.table import Table

        table = Table(title=f"{split}: {metrics['num_images']} pictures", title_justify="left")
        for column in ("class", "pictures", "accuracy"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for name, row in metrics["per_class"].items():
            table.add_row(name, str(row["support"]), f"{100 * row['accuracy']:.1f} %")
        table.add_section()
        table.add_row("all, trained", str(metrics["num_images"]), f"{100 * metrics['accuracy']:.1f} %", style="bold")
        table.add_row("all, zero-shot", str(metrics["num_images"]), f"{100 * metrics['zero_shot_accuracy']:.1f} %")
        table.add_row("macro-F1, trained", "", f"{100 * metrics['macro_f1']:.1f} %")
        console().print(table)

    emit(as_json, metrics, show)


# ---------------------------------------------------------------------- predict


@app.command(rich_help_panel="Make and use a classifier")
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
    from .predictions import check_output, classify_files, write_predictions

    if output is not None:
        check_output(output)
    quiet_libraries(quiet or as_json)
    from .data import find_images
    from .errors import DataError
    from .modeling_taskres import TaskResCLIPForImageClassification

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


# ---------------------------------------------------------------------- info, push, demo


@app.command(rich_help_panel="Look at a classifier and share it")
def info(
    model: Artifact,
    revision: Annotated[str | None, typer.Option(help="Revision of the classifier.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a classifier is: base, classes, prompts, shots, accuracy, sizes, versions. The base is not loaded."""
    quiet_libraries(True)
    from .artifact import describe

    facts = describe(model, revision=revision)

    def show() -> None:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in facts.items():
            if value is not None:
                table.add_row(key.replace("_", " "), plain(value))
        console().print(table)

    emit(as_json, facts, show)


@app.command(rich_help_panel="Look at a classifier and share it")
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained classifier.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/pets-taskres.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    include_code: Annotated[
        bool, typer.Option("--include-code", help="Add the modules trust_remote_code needs.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    base_model: BaseModel = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a trained classifier to the Hub (kilobytes). Log in first with `hf auth login`."""
    quiet_libraries(True)
    from .modeling_taskres import TaskResCLIPForImageClassification

    classifier = TaskResCLIPForImageClassification.from_pretrained(model, base_model=base_model)
    commit = classifier.push_to_hub(
        repo_id, private=private or None, revision=revision, create_pr=create_pr, commit_message=message,
        include_code=include_code,
    )  # fmt: skip
    result = {"repo_id": repo_id, "url": str(commit.repo_url), "commit": commit.oid, "pr_url": commit.pr_url}
    emit(as_json, result, lambda: typer.echo(f"Uploaded to {result['pr_url'] or result['url']}"))


@app.command(rich_help_panel="Make and use a classifier")
def demo(
    task: Annotated[str, typer.Option(help="Task of the shipped pictures.")] = "animals-plants",
    all_tasks: Annotated[bool, typer.Option("--all", help="Every task, as one table.")] = False,
    shots: Annotated[str, typer.Option(help="Comma list of shot counts.")] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Comma list of seeds.")] = "1,2,3",
    recipe: Annotated[str, typer.Option(help="'auto' or 'paper'.")] = "auto",
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the classifier is saved.")] = Path(
        "taskres-demo"
    ),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train on the pictures shipped with the library: no network, under a minute on two CPU cores."""
    quiet_libraries(quiet or as_json)
    from . import demo as shipped

    counts, draws = read_numbers(shots, "--shots"), read_numbers(seeds, "--seeds")
    tasks = list(shipped.demo_tasks()) if all_tasks else [shipped.check_task(task)]
    table = shipped.accuracy_table(tasks, counts, draws, recipe=recipe, progress=not (quiet or as_json))
    result: dict[str, Any] = {"recipe": recipe, "shots": counts, "seeds": draws, "tasks": table}
    if not all_tasks:
        result |= shipped.train_and_classify(task, output_dir, shots=max(counts), seed=draws[0], recipe=recipe)

    def show() -> None:
        if markdown:
            typer.echo(shipped.as_markdown(table, counts, len(draws)))
        else:
            console().print(shipped.as_rich_table(table, counts, len(draws)))
        if not all_tasks:
            typer.echo(shipped.as_story(result))

    emit(as_json, result, show)


add_commands(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors end in one readable message and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(arguments)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        from .errors import TaskResError

        # Errors of ours, of files and of the Hub say what to do; anything else is a bug worth a traceback.
        if "--debug" in arguments or not isinstance(error, (TaskResError, OSError)):
            raise
        if "--json" in arguments:
            typer.echo(json.dumps({"error": str(error), "type": type(error).__name__}))
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
