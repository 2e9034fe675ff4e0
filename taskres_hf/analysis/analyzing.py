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
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArtifactError, ConfigurationError
from ..evaluation import compare_with_zero_shot
from ..paper import compare, comparison, datasets, tasks
from ..storage import is_path, json_bytes, read_json, write_bytes
from ..tables import Table, markdown_text, visible
from ..training import TaskResTrainingArguments, recipes, steps
from .magnitude import (
    DIFFICULTIES,
    LEAST,
    MAGNITUDES,
    MEASURES,
    PUBLISHED_DIFFICULTY,
    PUBLISHED_MAGNITUDE,
    changed_answers,
    describe_residual,
    difficulties,
    magnitudes,
    rank_correlation,
    rank_correlation_within,
)
from .showing import can_draw, class_correlation_table, correlation_table, draw_transfer, task_table

if TYPE_CHECKING:
    from ..embedding import ImageFeatures
    from ..residual import TaskResClassifier

RECIPES = ("paper", "auto")
KNOWN_RECIPES = ("paper", "auto", "auto-v1")
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
    steps.fit(made, train, recipes.recipe_for(arguments, made, train.labels, False), seed)
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


class _Run(compare.TaskRun):
    """The runs on one task; a cell's method is the recipe."""

    def _measured(self, cell: compare.MethodCell, train: ImageFeatures, test: ImageFeatures) -> dict[str, Any]:
        trained = trained_head(self.model.classifier, train, cell.method, shots=cell.shots, seed=cell.seed)
        fewest = int(train.labels.bincount(minlength=len(train.class_names)).min())
        return {"recipe": cell.method, "fewest": fewest, **measure_transfer(trained, test)}


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
    on_cell: Callable[[compare.MethodCell, dict[str, Any], bool], None] | None = None,
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
    opened = tasks.open_tasks(
        data, root=root, allow_other_split=allow_other_split, templates=templates, holdout=holdout, reading=reading
    )
    folder = None if output_dir is None else Path(output_dir)
    settings = {"base_model": str(base_model), "revision": revision, "views": views, "analysis": "transfer"}
    results: list[dict[str, Any]] = []
    ran = compare.run_tasks(opened, recipes, folder, settings, arguments, shots, seeds, on_start, _Run)
    for cell, result, was_done in ran:
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
        `recipe`, `shots` asked for, `dataset`, `num_classes`, `seeds`, `fewest` pictures drawn of a class, where some
        have fewer than the shots, `zero_shot_accuracy`, `accuracy` and `gain` (shares), the
        difficulties of the mean zero-shot accuracy, and the measures.
    """
    rows = []
    for (recipe, shots, dataset), own in _grouped(results, "recipe", "shots", "dataset").items():
        before, after = (mean(one[key] for one in own) for key in ("zero_shot_accuracy", "accuracy"))
        classes = own[0]["num_classes"]
        rows.append({
            "recipe": recipe, "shots": shots, "dataset": dataset, "num_classes": classes, "seeds": len(own),
            "fewest": min(one.get("fewest", shots) for one in own),
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
                facts["fewest"] = min(one.get("fewest", shots) for one in own)
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
                facts["fewest"] = min(row.get("fewest", shots) for row in own)
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
            fewest = min(row.get("fewest", shots) for row in own)
            facts = {"recipe": recipe, "shots": shots, "measure": measure, "fewest": fewest}
            found.append({**facts, "correlation": value})
    return found


def _grouped(rows: Sequence[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Finished rows by the values of some keys, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in comparison.finished(rows):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


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
        if part:
            cells = [
                [visible(cell) if isinstance(cell, str) else finite(cell) for cell in row.values()] for row in part
            ]
            table = Table(list(part[0]), cells)
            files.append(_written(folder / f"{name}.csv", table.csv().encode("utf-8")))
    files.append(_written(folder / "transfer.json", json_bytes(value)))
    files += [_written(folder / name, content) for name, content in draw_transfer(rows).items()]
    figures = [file.name for file in files if file.suffix == ".png"]
    files.append(_written(folder / "report.md", _markdown(results, rows, base_model, figures).encode("utf-8")))
    return files


def _written(path: Path, content: bytes) -> Path:
    write_bytes(path, content)
    return path


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**{k: v for k, v in row.items() if k != "correlation"}, **row["correlation"]} for row in rows]


def finite(value: Any) -> Any:
    """A value as JSON has it: what is infinite as None, also within a dict."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(results: Sequence[Result], base_model: str) -> dict[str, Any]:
    """All of it as one JSON value; an infinite relative transfer difficulty is null."""
    rows, classes = task_rows(results), class_rows(results)

    def told(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "correlation": vars(row["correlation"])} for row in found]

    return {
        "base_model": base_model,
        "tasks": [finite(row) for row in rows],
        "correlations": told(correlations(rows)), "classes": classes,
        "class_correlations": told(class_correlations(classes)), "failures": comparison.failures(results),
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
    count = len({result["dataset"] for result in comparison.finished(results)})
    if count < LEAST:
        lines.append(f"{count} task{'s' * (count != 1)}: no correlation over tasks is given below {LEAST}.")
    if not can_draw():
        lines.append('No figure without matplotlib: pip install "taskres_hf[plots]", then run again.')
    return lines


def shown_tables(results: Sequence[Result], shots: Sequence[int]) -> list[Table]:
    """The tables for these numbers of shots."""
    rows, classes = task_rows(results), class_rows(results)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    tables = [task_table(rows, recipe, count) for count in shots for recipe in recipes]
    if len({row["dataset"] for row in rows}) >= LEAST:
        tables.append(correlation_table(correlations(rows), shots))
    return [*tables, class_correlation_table(class_correlations(classes), shots)]


def _markdown(
    results: Sequence[Result], rows: Sequence[Mapping[str, Any]], base_model: str, figures: Sequence[str]
) -> str:
    lines = [f"Base model {base_model}", *notes(results)]
    lines += [
        f"{row['method']} has no result in {row['count']} runs: {row['reason']}" for row in comparison.failures(results)
    ]
    parts = ["# Residual magnitude against transfer difficulty", "\n".join(f"- {markdown_text(x)}" for x in lines)]
    parts += [f"![{name}]({name})" for name in figures]
    counts = sorted({row["shots"] for row in rows}, reverse=True)
    return "\n\n".join([*parts, *(table.markdown() for table in shown_tables(results, counts))]) + "\n"


# ---------------------------------------------------------------------- one classifier, or data


def analyse_model(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, base_model: str | None = None
) -> dict[str, Any]:
    """Difficulty and magnitude of a saved classifier, from what is recorded in it.

    Args:
        name_or_path: folder or Hub id. revision: branch, tag or commit of it. base_model: another place of its base.

    Returns:
        `artifact`, `recipe`, `alpha`, `strength`, `measured_by` and `split` (what the recorded accuracies are of), and
        what `magnitude.describe_residual` gives.

    Raises:
        ArtifactError, HubError, BaseMismatchError: it cannot be loaded. ConfigurationError: its residual is on the
            image side, or its pictures have several labels each.
    """
    from ..modeling_taskres import TaskResCLIPForImageClassification

    model = TaskResCLIPForImageClassification.from_pretrained(name_or_path, revision=revision, base_model=base_model)
    model.classifier.check_one_label("The analysis")
    metrics = model.config.metrics or {}
    return {
        "artifact": os.fspath(name_or_path), "recipe": (model.config.training or {}).get("recipe"),
        "alpha": model.config.alpha, "strength": model.strength, "measured_by": metrics.get("method"),
        "split": metrics.get("split"), **describe_residual(model.classifier, model.class_names, metrics),
    }  # fmt: skip


def kind_of(sources: Sequence[str]) -> str:
    """Whether sources are a trained classifier (`"model"`) or something to train on (`"data"`).

    Raises:
        ConfigurationError: one can be either, or is a Hub id and the Hub could not be asked; or both are named.
    """
    kinds = {source: _kind_of(source) for source in dict.fromkeys(sources)}
    if len(set(kinds.values())) > 1:
        model = next(source for source, kind in kinds.items() if kind == "model")
        raise ConfigurationError(f"{model} is a trained classifier and the rest is data: analyze one or the other.")
    return next(iter(kinds.values()))


def _kind_of(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir() and _is_artifact(path):
        if _has_pictures_below(path):
            raise _either(f"{source} holds a trained classifier and folders of pictures")
        return "model"
    described = source in datasets.suite_datasets() or tasks.named_sources(source) != [(None, source)]
    if is_path(source) or "=" in source or described:
        return "data"
    from huggingface_hub import HfApi

    try:
        found = [kind for kind in ("model", "dataset") if HfApi().repo_exists(source, repo_type=kind)]
    except Exception as error:  # the client's errors of the network have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _either(f"{source} is no path here, and the Hub could not be asked ({reason})") from error
    if len(found) > 1:
        raise _either(f"{source} is a model and a dataset on the Hub")
    return "model" if found == ["model"] else "data"


def _either(why: str) -> ConfigurationError:
    return ConfigurationError(f"{why}: say which is meant, with --kind model or --kind data.")


def _is_artifact(folder: Path) -> bool:
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return False
    try:
        return read_json(folder / "config.json").get("model_type") == "taskres"
    except ArtifactError:
        return True  # a damaged one; loading it says what is wrong


def _has_pictures_below(folder: Path) -> bool:
    from ..picture_files import find_images, is_ignored

    return any(find_images([entry]) for entry in folder.iterdir() if entry.is_dir() and not is_ignored(entry.name))
