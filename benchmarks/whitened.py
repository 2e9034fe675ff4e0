"""`python -m benchmarks.whitened`: what each part of recipe `auto` is worth.

On the photographs (see `benchmarks.photos`) and the shipped emoji, on whose test accuracy its constants were chosen.
How it fares where shots are poor: `benchmarks.stress`; on tasks not chosen on: `benchmarks.methods --swap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from taskres_hf.tables import Table
from taskres_hf.training import whitened

from . import options as opt
from .tasks import Task, draws, tasks

# Name to what of `training.whitened` is another.
PARTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "without the class means": {"SHARE": 0.0},
    "without the residual": {"iterations": 0},
    "the same share of the means in every task": {
        "SHARE": 0.06,
        "_FOR_MEANS": 0.0,
        "information": lambda *_: (0.0, 1.0),
    },
    "nothing held out": {"_MOST_FOLDS": 1},
    "copies count as pictures": {"_NEAR": -1.0},
    "4 iterations": {"iterations": 4},
    "60 iterations": {"iterations": 60, "_SETTLED": 0.0},
}


def score(task: Task, embeds: Tensor, labels: Tensor, iterations: int = 8) -> float:
    """Accuracy in percent of recipe `auto`."""
    fitted = whitened.fit_whitened(embeds, labels, task.head.base, task.head.logit_scale, iterations=iterations)
    images = torch.nn.functional.normalize(task.test.image_embeds[0].double(), dim=1)
    return 100.0 * float(((images @ fitted.weight.T + fitted.bias).argmax(1) == task.test.labels).double().mean())


def rows(found: Mapping[str, Task], shots: list[int], seeds: list[int]) -> list[list[Any]]:
    """Mean accuracy over tasks and seeds of each part left out."""
    table: list[list[Any]] = []
    for name, changes in PARTS.items():
        values = dict(changes)
        iterations = values.pop("iterations", 8)
        with ExitStack() as stack:
            for attribute, value in values.items():
                stack.enter_context(mock.patch.object(whitened, attribute, value))
            cells = [
                mean(
                    score(task, task.train.image_embeds[0, drawn], task.train.labels[drawn], iterations)
                    for task in found.values()
                    for drawn in draws(task, count, seeds)
                )
                for count in shots
            ]
        table.append([name, *cells])
    return table


def main() -> None:
    options = opt.read(opt.parser(__doc__, seeds=3))
    columns = ["", *(f"{count} shot{'s' * (count > 1)}" for count in options.shots)]
    for kind in opt.kinds(options):
        lines = [
            [row[0], *(f"{value:.1f}" for value in row[1:])] for row in rows(tasks(kind), options.shots, options.seeds)
        ]
        over = f"{len(options.seeds)} seeds"
        title = f"Accuracy on the test split in percent, mean over tasks and {over}, {kind}"
        print(Table(columns, lines, title).markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
