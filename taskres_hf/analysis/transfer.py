"""Tasks x shots x seeds x recipes, each trained once: how hard each was for zero-shot, and how far its residual went.

`analyse_transfer` is behind `taskres analyze DATA...`; `measure_transfer` is one run of it, on embeddings.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError
from ..evaluation import compare_with_zero_shot
from ..paper.cells import CHANGE_NOTHING, plain, run_cells
from ..paper.compare import MethodCell, TaskRun
from ..paper.comparison import failures, finished
from ..paper.tasks import open_tasks
from ..residual import TaskResClassifier
from ..storage import json_bytes, write_bytes
from ..tables import Table, markdown_text
from ..training.arguments import TaskResTrainingArguments
from ..training.recipes import recipe_for
from ..training.steps import fit
from .magnitude import (
    DIFFICULTIES,
    MAGNITUDES,
    PUBLISHED_DIFFICULTY,
    PUBLISHED_MAGNITUDE,
    RankCorrelation,
    changed_answers,
    difficulties,
    magnitudes,
    rank_correlation,
    rank_correlation_within,
)
from .transfer_figures import can_draw, write_transfer_figure

RECIPES = ("paper", "auto")
KNOWN_RECIPES = ("paper", "auto", "auto-v1")
# Beside the magnitudes: what of the classifier's answers changed, whatever the recipe.
MEASURES = {**MAGNITUDES, "changed": "answers changed"}
SHOWN = ("mean_abs", "relative_length", "turn", "turn_apart", "changed", "gain")  # of them in tables; all are in files
_PER_CLASS = ("zero_shot_accuracy", "accuracy", *MAGNITUDES)
Result = Mapping[str, Any]


# ---------------------------------------------------------------------- one run


def trained_head(
    head: TaskResClassifier, train: ImageFeatures, recipe: str, *, shots: int, seed: int, alpha: float | None = None
) -> TaskResClassifier:
    """A copy of a zero-shot classifier, trained by a recipe on embedded shots.

    Args:
        shots: asked for, which recipe `paper` takes its epochs from. alpha: scale of the residual; that of `head`.
    """
    made = copy.deepcopy(head).cpu()
    made.reset()
    if alpha is not None:
        made.alpha = alpha
    arguments = TaskResTrainingArguments(recipe=recipe, shots=shots)  # type: ignore[arg-type]
    fit(made, train, recipe_for(arguments, made, train.labels, False), seed)
    return made


@torch.no_grad()
def measure_transfer(trained: TaskResClassifier, test: ImageFeatures) -> dict[str, Any]:
    """Accuracy beside zero-shot, and the magnitude of the residual.

    Args:
        trained: with the residual on the text side. test: pictures that it was not trained on.

    Returns:
        `accuracy`, `zero_shot_accuracy`, `num_classes`, `num_images`; `magnitude`: the mean over classes of each
        measure of `magnitude.magnitudes`, and `changed`, see `changed_answers`; `classes`: a row a class with `name`,
        `support`, both accuracies (None for a class without a picture) and every measure.
    """
    embeds = test.image_embeds[0]
    metrics = compare_with_zero_shot(
        trained(embeds), trained.zero_shot_logits(embeds), test.labels, list(test.class_names)
    )
    sizes = magnitudes(trained)
    empty = {"support": 0, "zero_shot_accuracy": None, "accuracy": None}
    classes = [
        {"name": name, **empty, **metrics["per_class"].get(name, {}), **{key: row[k] for key, row in sizes.items()}}
        for k, name in enumerate(test.class_names)
    ]
    size = {key: mean(values) for key, values in sizes.items()} | {"changed": changed_answers(trained, embeds)}
    facts = {key: metrics[key] for key in ("accuracy", "zero_shot_accuracy", "num_images")}
    return {**facts, "num_classes": len(classes), "magnitude": size, "classes": classes}


# ---------------------------------------------------------------------- many runs


class _Run(TaskRun):
    """The runs on one task; a cell's method is the recipe."""

    def _measured(self, cell: MethodCell, train: ImageFeatures, test: ImageFeatures) -> dict[str, Any]:
        trained = trained_head(self.model.classifier, train, cell.method, shots=cell.shots, seed=cell.seed)
        return {"recipe": cell.method, **measure_transfer(trained, test)}


def analyse_transfer(
    base_model: str,
    data: Any,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    recipes: Sequence[str] = RECIPES,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    templates: str | Sequence[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    allow_other_split: bool = False,
    holdout: float | None = None,
    reading: Mapping[str, Any] | None = None,
    revision: str | None = None,
    views: int = 0,
    arguments: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_cell: Callable[[MethodCell, dict[str, Any], bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and measure every recipe x dataset x shots x seed; what is finished is not run again.

    Draws, embeddings and what is measured on are those of `paper.compare.compare_methods`, whose arguments these are.

    Args:
        recipes: of `paper`, `auto` and `auto-v1`. Recipe `paper` is trained on plain pictures, or on `views`.

    Returns:
        One dict a cell: `dataset`, `shots`, `seed`, `recipe` (also as `method`), and either `error` or what
        `measure_transfer` gives, and what ran: `settings`, `base`, `pictures`, `engine`, `notes`.

    Raises:
        DataError: before the first run, if a dataset cannot be read.
        ConfigurationError: there is no such recipe, or it is named twice; or `output_dir` holds runs of other settings,
            pictures, base or engine.
    """
    check_recipes(recipes)
    tasks = open_tasks(
        data, root=root, allow_other_split=allow_other_split, templates=templates, holdout=holdout, reading=reading
    )
    options = dict(arguments or {})
    settings = plain({
        "base_model": str(base_model), "revision": revision, "views": views, "analysis": "transfer",
        "arguments": {key: value for key, value in options.items() if key not in CHANGE_NOTHING},
    })  # fmt: skip
    folder = None if output_dir is None else Path(output_dir)
    results: list[dict[str, Any]] = []
    shared = None
    if on_start is not None:
        on_start(len(tasks) * len(shots) * len(seeds) * len(recipes))
    for task in tasks:
        run = _Run(task, settings, options, shots, seeds, shared)
        shared = run.model
        cells = [MethodCell(name, task.name, count, seed) for count in shots for seed in seeds for name in recipes]
        for cell, result, was_done in run_cells(cells, folder, run.stored, run.cell):
            results.append(result)
            if on_cell is not None:
                on_cell(cell, result, was_done)
    return results


def check_recipes(names: Sequence[str]) -> None:
    """Refuse recipes that are unknown or named twice.

    Raises:
        ConfigurationError: says which.
    """
    wrong = [name for name in names if name not in KNOWN_RECIPES or list(names).count(name) > 1]
    if wrong or not names:
        raise ConfigurationError(
            f"Name recipes once each, of {', '.join(KNOWN_RECIPES)}; got {', '.join(map(repr, names)) or 'none'}."
        )


# ---------------------------------------------------------------------- what they say


def task_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each recipe, number of shots and dataset: the mean over seeds.

    Returns:
        `recipe`, `shots`, `dataset`, `num_classes`, `seeds`, `zero_shot_accuracy`, `accuracy` and `gain` (shares), the
        difficulties of the mean zero-shot accuracy, and the measures.
    """
    rows = []
    for (recipe, shots, dataset), own in _grouped(results, "recipe", "shots", "dataset").items():
        before, after = (mean(one[key] for one in own) for key in ("zero_shot_accuracy", "accuracy"))
        classes = own[0]["num_classes"]
        rows.append({
            "recipe": recipe, "shots": shots, "dataset": dataset, "num_classes": classes, "seeds": len(own),
            "zero_shot_accuracy": before, "accuracy": after, "gain": after - before,
            **(difficulties(before, classes) if classes > 1 else dict.fromkeys(DIFFICULTIES)),
            **{name: mean(one["magnitude"][name] for one in own) for name in MEASURES},
        })  # fmt: skip
    return rows


def class_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each recipe, number of shots, dataset and class that was measured: the mean over seeds."""
    rows = []
    for (recipe, shots, dataset), own in _grouped(results, "recipe", "shots", "dataset").items():
        for place, first in enumerate(own[0]["classes"]):
            parts = [one["classes"][place] for one in own if one["classes"][place]["accuracy"] is not None]
            if parts:
                means = {key: mean(part[key] for part in parts) for key in _PER_CLASS}
                facts = {"recipe": recipe, "shots": shots, "dataset": dataset, "class": first["name"]}
                rows.append({**facts, "support": mean(part["support"] for part in parts), **means})
    return rows


def correlations(rows: Sequence[Mapping[str, Any]], by: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rank correlations over tasks of every difficulty with every measure and with the gain.

    Args:
        rows: of `task_rows`. by: dataset to a group, such as its base model: then the mean of the correlations within
            the groups, see `rank_correlation_within`.

    Returns:
        A row for each recipe, number of shots, measure and difficulty: `tasks`, and `correlation`.
    """
    found = []
    for (recipe, shots), own in _grouped(rows, "recipe", "shots").items():
        for measure in (*MEASURES, "gain"):
            for difficulty in DIFFICULTIES:
                told = [row for row in own if row[difficulty] is not None]
                x, y = [row[difficulty] for row in told], [row[measure] for row in told]
                value = (
                    rank_correlation(x, y)
                    if by is None
                    else rank_correlation_within(x, y, [by[row["dataset"]] for row in told])
                )
                facts = {"recipe": recipe, "shots": shots, "measure": measure, "difficulty": difficulty}
                found.append({**facts, "tasks": len(told), "correlation": value})
    return found


def class_correlations(rows: Sequence[Mapping[str, Any]], against: str = "zero_shot_error") -> list[dict[str, Any]]:
    """Rank correlations over the classes within each dataset of every measure and of the gain with one number a class.

    Args:
        rows: of `class_rows`. against: `"zero_shot_error"`, the class's zero-shot error; or another key of the rows.
    """
    found = []
    for (recipe, shots), own in _grouped(rows, "recipe", "shots").items():
        x = [1.0 - row["zero_shot_accuracy"] if against == "zero_shot_error" else row[against] for row in own]
        groups = [row["dataset"] for row in own]
        for measure in (*MAGNITUDES, "gain"):
            y = [row["accuracy"] - row["zero_shot_accuracy"] if measure == "gain" else row[measure] for row in own]
            value = rank_correlation_within(x, y, groups)
            found.append({"recipe": recipe, "shots": shots, "measure": measure, "correlation": value})
    return found


def _grouped(rows: Sequence[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Finished rows by the values of some keys, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in finished(rows):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


# ---------------------------------------------------------------------- tables


def measure_name(key: str) -> str:
    """A measure in the words of tables."""
    return "gain over zero-shot" if key == "gain" else MEASURES[key]


def task_table(rows: Sequence[Mapping[str, Any]], recipe: str, shots: int) -> Table:
    """Difficulty and magnitude of each task, the hardest first."""
    chosen = [row for row in rows if (row["recipe"], row["shots"]) == (recipe, shots)]
    chosen.sort(key=lambda row: -(row["zero_shot_error"] or 0.0))
    columns = ["task", "K", "zero-shot", "accuracy", "RTD", "error / chance's"]
    columns += [MEASURES[name] for name in SHOWN if name != "gain"]
    cells = [
        [
            row["dataset"], row["num_classes"], 100 * row["zero_shot_accuracy"], 100 * row["accuracy"],
            _number(row["rtd"]), _number(row["normalised_error"]), f"{row['mean_abs']:.3f}",
            f"{row['relative_length']:.3f}", f"{row['turn']:.1f}", f"{row['turn_apart']:.1f}",
            f"{100 * row['changed']:.1f}",
        ]
        for row in chosen
    ]  # fmt: skip
    seeds = max((row["seeds"] for row in chosen), default=0)
    title = f"Recipe {recipe}, {shots} shot{'s' * (shots > 1)}, mean over {seeds} seed{'s' * (seeds > 1)}"
    caption = "RTD: (1 / K) / zero-shot accuracy, as published. Accuracies and answers changed in percent."
    return Table(columns, cells, title, caption)


def correlation_table(found: Sequence[Mapping[str, Any]], shots: Sequence[int], title: str = "") -> Table:
    """Rank correlations over tasks: a row a recipe, number of shots and measure, a column a difficulty."""
    places: dict[tuple[Any, ...], dict[str, RankCorrelation]] = {}
    for row in found:
        if row["shots"] in shots and row["measure"] in SHOWN:
            place = places.setdefault((row["recipe"], row["shots"], row["measure"]), {})
            place[row["difficulty"]] = row["correlation"]
    cells = [
        [recipe, count, measure_name(measure), *(str(place[name]) for name in DIFFICULTIES)]
        for (recipe, count, measure), place in places.items()
    ]
    caption = (
        "Spearman, 95 % interval by resampling the tasks, p by permuting them; "
        f"{len(cells) * len(DIFFICULTIES)} correlations, for which p is not corrected."
    )
    return Table(["recipe", "shots", "with", *DIFFICULTIES.values()], cells, title or _OVER_TASKS, caption)


_OVER_TASKS = "Rank correlation over tasks of difficulty with magnitude and gain"


def class_correlation_table(found: Sequence[Mapping[str, Any]], shots: Sequence[int], title: str = "") -> Table:
    """Rank correlations over the classes within each task: a column a recipe."""
    chosen = [row for row in found if row["shots"] in shots and row["measure"] in SHOWN]
    recipes = list(dict.fromkeys(row["recipe"] for row in chosen))
    places: dict[tuple[int, str], dict[str, str]] = {}
    for row in chosen:
        places.setdefault((row["shots"], row["measure"]), {})[row["recipe"]] = str(row["correlation"])
    cells = [
        [count, measure_name(measure), *(place.get(recipe, "") for recipe in recipes)]
        for (count, measure), place in places.items()
    ]
    caption = "Mean over tasks of Spearman within each; 95 % interval by resampling tasks, p by permuting classes."
    return Table(
        ["shots", "with", *recipes],
        cells,
        title or "Rank correlation over classes, within each task, of zero-shot error with magnitude and gain",
        caption,
    )


def _number(value: float | None) -> str:
    return "" if value is None else "infinite" if math.isinf(value) else f"{value:.3f}"


# ---------------------------------------------------------------------- files


def write_transfer(results: Sequence[Result], folder: Path, base_model: str) -> list[Path]:
    """Write `tasks.csv`, `classes.csv`, `correlations.csv`, `transfer.json`, `report.md` and, with matplotlib,
    `transfer.png` and `transfer.svg`.

    Args:
        results: of `analyse_transfer`. base_model: its name, as it is to be read.

    Returns:
        The files written; none where no run has a result.
    """
    rows = task_rows(results)
    if not rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    value = summary(results, base_model)
    parts = {"tasks": rows, "classes": value["classes"], "correlations": _flat(value["correlations"])}
    files = []
    for name, part in parts.items():
        table = Table(list(part[0]), [[_finite(cell) for cell in row.values()] for row in part]) if part else None
        if table is not None:
            files.append(_written(folder / f"{name}.csv", table.csv().encode("utf-8")))
    files.append(_written(folder / "transfer.json", json_bytes(value)))
    files += write_transfer_figure(rows, folder)
    figures = [file.name for file in files if file.suffix == ".png"]
    files.append(_written(folder / "report.md", _markdown(results, rows, base_model, figures).encode("utf-8")))
    return files


def _written(path: Path, content: bytes) -> Path:
    write_bytes(path, content)
    return path


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**{k: v for k, v in row.items() if k != "correlation"}, **row["correlation"]} for row in rows]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(results: Sequence[Result], base_model: str) -> dict[str, Any]:
    """All of it as one JSON value; an infinite relative transfer difficulty is null."""
    rows, classes = task_rows(results), class_rows(results)

    def told(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "correlation": vars(row["correlation"])} for row in found]

    return {
        "base_model": base_model,
        "tasks": [{key: _finite(value) for key, value in row.items()} for row in rows],
        "correlations": told(correlations(rows)), "classes": classes,
        "class_correlations": told(class_correlations(classes)), "failures": failures(results),
        "notes": notes(results),
    }  # fmt: skip


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the numbers has to know, a line each."""
    lines = [
        f"{PUBLISHED_DIFFICULTY.upper()} and {MAGNITUDES[PUBLISHED_MAGNITUDE]} are the paper's, as far as is known.",
        "Under recipe auto, and between base models, only the turns and the answers changed can be compared.",
    ]
    for name, own in _grouped(results, "dataset").items():
        lines += [f"{name[0]}: {note}" for note in own[0].get("notes") or []]
    count = len({result["dataset"] for result in finished(results)})
    if count < 4:
        lines.append(f"{count} task{'s' * (count != 1)}: no correlation over tasks is given below 4.")
    if not can_draw():
        lines.append('No figure without matplotlib: pip install "taskres_hf[plots]", then run again.')
    return lines


def shown_tables(results: Sequence[Result], shots: Sequence[int]) -> list[Table]:
    """The tables for these numbers of shots."""
    rows, classes = task_rows(results), class_rows(results)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    tables = [task_table(rows, recipe, count) for count in shots for recipe in recipes]
    if len({row["dataset"] for row in rows}) >= 4:
        tables.append(correlation_table(correlations(rows), shots))
    return [*tables, class_correlation_table(class_correlations(classes), shots)]


def _markdown(
    results: Sequence[Result], rows: Sequence[Mapping[str, Any]], base_model: str, figures: Sequence[str]
) -> str:
    lines = [f"Base model {base_model}", *notes(results)]
    lines += [f"{row['method']} has no result in {row['count']} runs: {row['reason']}" for row in failures(results)]
    parts = ["# Residual magnitude against transfer difficulty", "\n".join(f"- {markdown_text(x)}" for x in lines)]
    parts += [f"![{name}]({name})" for name in figures]
    counts = sorted({row["shots"] for row in rows}, reverse=True)
    return "\n\n".join([*parts, *(table.markdown() for table in shown_tables(results, counts))]) + "\n"
