"""The pictures and the checkpoint shipped with the library, and the demo that trains on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from tqdm.auto import tqdm

from .data.sources import load_splits
from .embedding.features import ImageFeatures
from .errors import ConfigurationError
from .few_shot import few_shot_indices
from .modeling_taskres import TaskResCLIPForImageClassification
from .training.arguments import TaskResTrainingArguments
from .training.trainer import TaskResTrainer

_DATA = Path(__file__).parent / "demo_data"


def demo_model() -> str:
    """Folder of the shipped checkpoint, a small `CLIPModel` (64x64 pictures, D = 192)."""
    return str(_DATA / "tiny-clip")


def demo_tasks() -> dict[str, dict[str, Any]]:
    """Task name to its classes, template, styles and sizes."""
    tasks: dict[str, dict[str, Any]] = json.loads((_DATA / "tasks.json").read_text(encoding="utf-8"))
    return tasks


def demo_dataset(task: str = "animals-plants") -> DatasetDict:
    """Splits `train`, `validation` and `test` of a shipped task; `"dg"` gives the other styles, one split each.

    Raises:
        ConfigurationError: there is no such task.
    """
    return load_splits(_DATA / (task if task == "dg" else check_task(task)))


def check_task(task: str) -> str:
    """The task's name if it exists.

    Raises:
        ConfigurationError: it does not.
    """
    if task not in demo_tasks():
        raise ConfigurationError(f"There is no task {task!r} among the shipped ones: {', '.join(demo_tasks())}.")
    return task


def _model(task: str) -> TaskResCLIPForImageClassification:
    spec = demo_tasks()[task]
    return TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])


def _arguments(recipe: str, seed: int, progress: bool) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(recipe=recipe, seed=seed, on_short="ignore", disable_tqdm=not progress)


def accuracy_table(
    tasks: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    *,
    recipe: str = "auto",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Accuracy on the test split, zero-shot and trained, for every task, number of shots and seed.

    Every picture is embedded once; a run is then a few hundred steps on a small matrix.

    Returns:
        Task to `{"zero_shot": accuracy, "trained": {shots: [accuracy per seed]}}`, from 0 to 1.
    """
    table = {}
    bar = tqdm(total=len(tasks) * len(shots) * len(seeds), desc="Training", unit="run", disable=not progress)
    for task in tasks:
        splits, model = demo_dataset(task), _model(task)
        trainer = TaskResTrainer(model, _arguments(recipe, 1, False))
        train, test = (trainer.embed(splits[name]) for name in ("train", "test"))
        row: dict[str, Any] = {"trained": {}}
        for count in shots:
            results = [_one_run(model, train, test, count, seed, recipe, bar) for seed in seeds]
            row["zero_shot"] = results[0]["zero_shot_accuracy"]
            row["trained"][count] = [result["accuracy"] for result in results]
        table[task] = row
    bar.close()
    return table


def _one_run(
    model: TaskResCLIPForImageClassification,
    train: ImageFeatures,
    test: ImageFeatures,
    shots: int,
    seed: int,
    recipe: str,
    bar: Any,
) -> dict[str, Any]:
    model.classifier.reset()
    rows = few_shot_indices(train.labels.tolist(), shots, seed, on_short="ignore")
    trainer = TaskResTrainer(model, _arguments(recipe, seed, False), train.select(rows), test)
    trainer.train()
    bar.update()
    return trainer.evaluate()


def train_and_classify(task: str, output_dir: Path, *, shots: int, seed: int, recipe: str) -> dict[str, Any]:
    """Train one classifier as a user would, save it, and classify test pictures through `pipeline`.

    Returns:
        `output_dir`, its `bytes`, and `pictures`: what each is, and what the pipeline says.
    """
    from transformers import pipeline

    splits = demo_dataset(task)
    arguments = _arguments(recipe, seed, False)
    arguments.shots, arguments.dataset_name, arguments.output_dir = (
        shots,
        f"{task} (shipped)",
        str(output_dir),
    )
    trainer = TaskResTrainer(_model(task), arguments, splits["train"], splits["test"])
    trainer.train()
    trainer.evaluate()
    trainer.save_model(output_dir)
    classify = pipeline("image-classification", model=str(output_dir))
    test = splits["test"]
    chosen = [round(position * (len(test) - 1) / 5) for position in range(6)]
    names = test.features["label"].names
    pictures = []
    for row in test.select(chosen):
        best = classify(row["image"].convert("RGB"), top_k=1)[0]
        found = {"prediction": best["label"], "score": best["score"]}
        pictures.append({"picture": row["emoji_name"] or row["style"], "label": names[row["label"]], **found})
    size = sum(file.stat().st_size for file in Path(output_dir).iterdir() if file.is_file())
    return {"output_dir": str(output_dir), "bytes": size, "pictures": pictures}


# ---------------------------------------------------------------------- showing it


def _rows(table: dict[str, dict[str, Any]], shots: Sequence[int]) -> list[list[str]]:
    """Cells in percent: mean over seeds; the last row is the mean over tasks."""

    def mean(values: Sequence[float]) -> float:
        return 100 * sum(values) / len(values)

    rows = []
    for task, row in table.items():
        rows.append(
            [
                task,
                f"{100 * row['zero_shot']:.1f}",
                *(f"{mean(row['trained'][count]):.1f}" for count in shots),
            ]
        )
    if len(table) > 1:
        means = [mean([row["zero_shot"] for row in table.values()])]
        means += [mean([value for row in table.values() for value in row["trained"][count]]) for count in shots]
        rows.append(["mean", *(f"{value:.1f}" for value in means)])
    return rows


def _header(shots: Sequence[int]) -> list[str]:
    return ["task", "zero-shot", *(f"{count} shot{'s' if count > 1 else ''}" for count in shots)]


def as_markdown(table: dict[str, dict[str, Any]], shots: Sequence[int], seeds: int) -> str:
    """The table of `accuracy_table` as Markdown."""
    header = _header(shots)
    lines = [
        f"Accuracy on the test split in percent, mean of {seeds} seeds.",
        "",
        "| " + " | ".join(header) + " |",
    ]
    lines.append("|---|" + "---:|" * (len(header) - 1))
    lines += ["| " + " | ".join(row) + " |" for row in _rows(table, shots)]
    return "\n".join(lines)


def as_rich_table(table: dict[str, dict[str, Any]], shots: Sequence[int], seeds: int) -> Any:
    """The table of `accuracy_table` for a terminal."""
    from rich.table import Table

    shown = Table(title=f"Accuracy on the test split (%), mean of {seeds} seeds", title_justify="left")
    for number, name in enumerate(_header(shots)):
        shown.add_column(name, justify="right" if number else "left")
    for row in _rows(table, shots):
        shown.add_row(*row, style="bold" if row[0] == "mean" else None)
    return shown


def as_story(result: dict[str, Any]) -> str:
    """What `train_and_classify` did, in a few lines."""
    lines = [f"\nSaved the classifier in {result['output_dir']} ({result['bytes'] / 1000:.0f} kB)."]
    lines.append(f'pipeline("image-classification", model="{result["output_dir"]}") says:')
    for row in result["pictures"]:
        verdict = "right" if row["prediction"] == row["label"] else f"it is a {row['label']}"
        lines.append(f"  {row['picture']}: {row['prediction']} ({100 * row['score']:.0f} %), {verdict}")
    lines.append(f"Look at it: taskres info {result['output_dir']}")
    return "\n".join(lines)
