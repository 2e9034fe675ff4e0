"""`taskres evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    MODEL,
    Artifact,
    BaseModel,
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
    LabelMap,
    OnError,
    Precision,
    Quiet,
    console,
    emit,
    open_splits,
    pick_split,
    quiet_libraries,
    read_json_option,
)


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
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..training.arguments import TaskResTrainingArguments
    from ..training.trainer import TaskResTrainer

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
