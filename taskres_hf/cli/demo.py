"""`taskres demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Debug,
    Json,
    Overwrite,
    Quiet,
    Recipe,
)
from .screen import console, emit, quiet_libraries, say, when_interrupted
from .values import check_output_folder, read_numbers

if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..modeling_taskres import TaskResCLIPForImageClassification

_SHIPPED = " (shipped)"  # after the name of a task, in the classifier's config


def demo(
    task: Annotated[str | None, typer.Option(help="One task of the shipped pictures instead of three.")] = None,
    all_tasks: Annotated[bool, typer.Option("--all", help="Every task, as one table.")] = False,
    hub: Annotated[
        bool, typer.Option("--hub", help="The same with a public CLIP and public photographs: about 800 MB to fetch.")
    ] = False,
    shots: Annotated[str, typer.Option(help="Comma list of shot counts.")] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Comma list of seeds.")] = "1,2,3,4,5",
    recipe: Annotated[
        Recipe, typer.Option(metavar="NAME", help="auto, auto-v1 (by epochs) or paper (as published).")
    ] = Recipe.AUTO,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the classifier is saved.")] = Path(
        "taskres-demo"
    ),
    overwrite: Overwrite = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train on the pictures shipped with the library: no network, under a minute on two CPU cores."""
    when_interrupted(lambda: "Embeddings of the pictures read so far are in the cache; the same command starts there.")
    quiet_libraries(quiet or as_json)
    from tqdm.auto import tqdm

    from ..demo import DEMO_TASKS, HUB_MODEL, check_task, demo_tasks
    from ..paper.reports import accuracy_table, summarise
    from ..paper.runner import task_runs

    if hub and (task is not None or all_tasks):
        raise typer.BadParameter("--hub has its own pictures: leave --task and --all out.", param_hint="--hub")
    counts, draws = read_numbers(shots, "--shots"), read_numbers(seeds, "--seeds")
    tasks = list(demo_tasks()) if all_tasks else list(DEMO_TASKS) if task is None else [check_task(task)]
    if not all_tasks:
        check_output_folder(output_dir, replace=overwrite or _is_of_the_demo(output_dir))
    grounds = [_of_the_hub()] if hub else [_shipped(name) for name in tasks]
    total = len(grounds) * len(counts) * len(draws)
    with tqdm(total=total, desc="Training", unit="run", disable=quiet or as_json) as bar:
        runs = [
            run
            for ground in grounds
            for run in task_runs(
                ground.model, ground.splits, ground.name, counts, draws, recipe.value, on_run=bar.update
            )
        ]
    table = accuracy_table(summarise(runs), len(draws), first="task")
    result: dict[str, Any] = {"recipe": recipe.value, "shots": counts, "seeds": draws, "tasks": _by_task(runs)}
    if hub:
        result["base_model"] = HUB_MODEL
    if not all_tasks:
        result |= _train_and_classify(grounds[0], output_dir, shots=max(counts), seed=draws[0], recipe=recipe)

    def show() -> None:
        if markdown:
            typer.echo(table.markdown())
        else:
            console().print(table.rich())
        if not all_tasks:
            say(_story(result))

    emit(as_json, result, show)


@dataclass(frozen=True)
class _Ground:
    """What a demo trains and measures on: the name, as it is recorded, the splits, and a zero-shot classifier."""

    name: str
    recorded: str
    splits: DatasetDict
    model: TaskResCLIPForImageClassification


def _shipped(task: str) -> _Ground:
    from ..demo import demo_dataset, demo_model, demo_tasks
    from ..modeling_taskres import TaskResCLIPForImageClassification

    spec = demo_tasks()[task]
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    return _Ground(task, f"{task}{_SHIPPED}", demo_dataset(task), model)


def _of_the_hub() -> _Ground:
    """Public photographs and a public CLIP; the error of a Hub out of reach says what to do."""
    from ..demo import HUB_DATASET, HUB_MODEL, HUB_TEMPLATE, hub_dataset
    from ..modeling_taskres import TaskResCLIPForImageClassification

    splits = hub_dataset()
    names = splits["train"].features["label"]
    model = TaskResCLIPForImageClassification.from_base(HUB_MODEL, names, HUB_TEMPLATE)
    return _Ground(HUB_DATASET.split("/")[1], HUB_DATASET, splits, model)


def _by_task(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Task to `{"zero_shot": accuracy, "trained": {shots: [accuracy per seed]}}`, from 0 to 1."""
    tasks: dict[str, Any] = {}
    for run in runs:
        task = tasks.setdefault(run["dataset"], {"zero_shot": run["zero_shot_accuracy"], "trained": {}})
        task["trained"].setdefault(run["shots"], []).append(run["accuracy"])
    return tasks


def _is_of_the_demo(folder: Path) -> bool:
    """Whether a folder holds a classifier of an earlier demo, which may be replaced without asking."""
    from ..artifact import CONFIG
    from ..demo import HUB_DATASET
    from ..errors import ArtifactError
    from ..storage import read_json

    try:
        data = read_json(folder / CONFIG).get("data")
    except ArtifactError:
        return False
    name = str(data.get("name")) if isinstance(data, dict) else ""
    return name.endswith(_SHIPPED) or name == HUB_DATASET


def _train_and_classify(ground: _Ground, output_dir: Path, *, shots: int, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Train one classifier as a user would, save it, and classify test pictures through `pipeline`.

    Returns:
        `output_dir`, its `bytes`, and `pictures`: what each is, and what the pipeline says.
    """
    from transformers import pipeline

    from ..training import TaskResTrainer, TaskResTrainingArguments

    ground.model.classifier.reset()
    arguments = TaskResTrainingArguments(
        output_dir=str(output_dir), recipe=recipe.value, shots=shots, seed=seed, on_short="ignore", disable_tqdm=True,
        dataset_name=ground.recorded,
    )  # fmt: skip
    trainer = TaskResTrainer(ground.model, arguments, ground.splits["train"], ground.splits["test"])
    trainer.train()
    trainer.evaluate()
    trainer.save_model(output_dir)
    classify = pipeline("image-classification", model=str(output_dir))
    test = ground.splits["test"]
    names = ground.model.class_names
    pictures = []
    for number in (round(position * (len(test) - 1) / 5) for position in range(6)):
        row = test[number]
        best = classify(row["image"].convert("RGB"), top_k=1)[0]
        shown = row.get("emoji_name") or f"test picture {number}"
        answer = {"prediction": best["label"], "score": best["score"]}
        pictures.append({"picture": shown, "label": names[row["label"]], **answer})
    size = sum(file.stat().st_size for file in Path(output_dir).iterdir() if file.is_file())
    return {"output_dir": str(output_dir), "bytes": size, "pictures": pictures}


def _story(result: dict[str, Any]) -> str:
    """What `_train_and_classify` did, in a few lines."""
    lines = [f"\nSaved the classifier in {result['output_dir']} ({result['bytes'] / 1000:.0f} kB)."]
    lines.append(f'pipeline("image-classification", model="{result["output_dir"]}") says:')
    for row in result["pictures"]:
        verdict = "right" if row["prediction"] == row["label"] else f"it is a {row['label']}"
        lines.append(f"  {row['picture']}: {row['prediction']} ({100 * row['score']:.0f} %), {verdict}")
    lines.append(f"Look at it: taskres info {result['output_dir']}")
    return "\n".join(lines)
