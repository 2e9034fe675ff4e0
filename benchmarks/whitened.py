"""`python -m benchmarks.whitened`: what each part of recipe `auto` is worth, and how it fares where shots are poor.

On the photographs (see `benchmarks.photos`) and the shipped emoji; nothing here is used to choose anything.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from statistics import mean
from typing import Any, NamedTuple
from unittest import mock

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.embedding import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training import whitened

from .photos import missing, photo_dataset, photo_model_path, photo_tasks

# Name to what of `training.whitened` is another.
PARTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "without the class means (share 0)": {"_usual_share": lambda shots: 0.0},
    "without cross-validation (usual share and width)": {"_MOST_FOLDS": 1},
    "text counts in full (a = 1)": {"_trust": lambda text, labels, classes, views: (1.0, 0.0)},
    "5 iterations": {"iterations": 5},
    "60 iterations": {"iterations": 60},
}


class Task(NamedTuple):
    head: TaskResClassifier
    train: ImageFeatures
    test: ImageFeatures


def tasks(kind: str) -> dict[str, Task]:
    """Embedded tasks: `"photographs"` or `"emoji"`."""
    found = {}
    specs: Mapping[str, Any] = photo_tasks() if kind == "photographs" else demo_tasks()
    for name, spec in specs.items():
        base = photo_model_path() if kind == "photographs" else demo_model()
        splits = photo_dataset(name) if kind == "photographs" else demo_dataset(name)
        model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
        trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
        found[name] = Task(model.classifier, trainer.embed(splits["train"]), trainer.embed(splits["test"]))
    return found


def score(task: Task, embeds: Tensor, labels: Tensor, iterations: int = 15) -> float:
    """Accuracy in percent of recipe `auto`."""
    fitted = whitened.fit_whitened(embeds, labels, task.head.base, task.head.logit_scale, iterations=iterations)
    images = torch.nn.functional.normalize(task.test.image_embeds[0].double(), dim=1)
    return 100.0 * float(((images @ fitted.weight.T + fitted.bias).argmax(1) == task.test.labels).double().mean())


def probe(task: Task, embeds: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of a linear probe, C = 100 on embeddings of unit length."""
    unit = torch.nn.functional.normalize(embeds, dim=1)
    fitted = LogisticRegression(C=100.0, max_iter=300).fit(unit.numpy(), labels.numpy())
    found = fitted.predict(torch.nn.functional.normalize(task.test.image_embeds[0], dim=1).numpy())
    return 100.0 * float((torch.from_numpy(found) == task.test.labels).double().mean())


def wrong(share: float) -> Callable[[Tensor, Tensor, int, random.Random], tuple[Tensor, Tensor]]:
    def change(embeds: Tensor, labels: Tensor, classes: int, chance: random.Random) -> tuple[Tensor, Tensor]:
        moved = [
            (x + chance.randrange(1, classes)) % classes if chance.random() < share else x for x in labels.tolist()
        ]
        return embeds, torch.tensor(moved)

    return change


def imbalanced(embeds: Tensor, labels: Tensor, classes: int, chance: random.Random) -> tuple[Tensor, Tensor]:
    """From one picture of a class to all that were drawn, log-uniformly."""
    keep: list[int] = []
    for label in range(classes):
        rows = (labels == label).nonzero().flatten().tolist()
        keep += rows[: max(1, round(len(rows) ** chance.random()))]
    return embeds[keep], labels[keep]


POOR = {"20 % wrong labels": wrong(0.2), "40 % wrong labels": wrong(0.4), "1 to all shots a class": imbalanced}


def draws(task: Task, shots: int, seeds: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for seed in range(1, seeds + 1):
        rows = few_shot_indices(task.train.labels.tolist(), shots, seed, on_short="ignore")
        yield seed, task.train.image_embeds[0, rows], task.train.labels[rows]


def rows(found: Mapping[str, Task], shots: list[int], seeds: int) -> list[list[Any]]:
    """Mean accuracy over tasks and seeds of each part left out, then of each kind of poor shots."""
    table: list[list[Any]] = []
    for name, changes in PARTS.items():
        values = dict(changes)
        iterations = values.pop("iterations", 15)
        with ExitStack() as stack:
            for attribute, value in values.items():
                stack.enter_context(mock.patch.object(whitened, attribute, value))
            cells = [
                mean(score(task, e, y, iterations) for task in found.values() for _, e, y in draws(task, count, seeds))
                for count in shots
            ]
        table.append([name, *cells])
    for name, change in POOR.items():
        for method, fit in (("auto", score), ("linear probe, C = 100", probe)):
            cells = []
            for count in shots:
                some = []
                for task in found.values():
                    for seed, embeds, labels in draws(task, count, seeds):
                        poor = change(embeds, labels, len(task.head.base), random.Random(seed))
                        some.append(fit(task, *poor) if len(set(poor[1].tolist())) > 1 else float("nan"))
                cells.append(mean(some))
            table.append([f"{name}: {method}", *cells])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3, help="how many draws, 1 to this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = ["", *(f"{count} shot{'s' * (count > 1)}" for count in options.shots)]
    for kind in ("photographs", "emoji"):
        reason = missing() if kind == "photographs" else None
        if reason:
            print(f"Photographs are not measured: {reason}")
            continue
        lines = [
            [row[0], *(f"{value:.1f}" for value in row[1:])] for row in rows(tasks(kind), options.shots, options.seeds)
        ]
        print(f"\nAccuracy on the test split in percent, mean over tasks and {options.seeds} seeds, {kind}\n")
        print(Table(columns, lines).markdown(), flush=True)


if __name__ == "__main__":
    main()
