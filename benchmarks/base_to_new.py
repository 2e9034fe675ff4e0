"""`python -m benchmarks.base_to_new`: classes added to a trained classifier, from text or from pictures.

Half of a task's classes are trained on (base); the other half (new) is added afterwards, after the base-to-new protocol
of CoCoOp (Zhou et al. 2022, arXiv 2203.05557). There, base pictures are told among base classes and new pictures among
new ones; here that is `apart`, and `together` tells all pictures among all classes, where trained rows can swamp
untrained ones or be swamped by them. H is the harmonic mean of the accuracies on base and new pictures, each taken of a
task, draw and split of classes first. On the photographs (see `benchmarks.photos`) and the shipped emoji, on which the
calibration was chosen.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taskres_hf.classes.changing import fill_from_text
from taskres_hf.classes.rows import Rows, join_rows, rows_of
from taskres_hf.embedding import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training.recipes import make_recipe
from taskres_hf.training.steps import fit

from . import options as opt
from .tasks import Task, tasks

LEAST, MOST = 4, 150  # classes


class Split(NamedTuple):
    """Classes of a task in two halves, and one draw of its shots."""

    task: Task
    base: list[int]
    new: list[int]
    shots: ImageFeatures
    seed: int

    def trained(self, classes: Sequence[int], recipe: str) -> TaskResClassifier:
        """A head for some of the classes, trained on their shots."""
        own, place = self.task.head, {label: number for number, label in enumerate(classes)}
        head = TaskResClassifier(own.base[list(classes)], own.alpha, own.logit_scale, own.logit_bias)
        rows = [row for row, label in enumerate(self.shots.labels.tolist()) if label in place]
        labels = torch.tensor([place[int(self.shots.labels[row])] for row in rows])
        data = replace(self.shots.select(rows), labels=labels, class_names=[str(label) for label in classes])
        head.facts["training"] = {"recipe": recipe}
        fit(head, data, make_recipe(recipe, head, len(rows) / len(classes), len(rows)), self.seed)
        return head


def _zero_shot(split: Split, recipe: str) -> Rows:
    return rows_of(_head(split, split.base + split.new))


def _head(split: Split, classes: Sequence[int]) -> TaskResClassifier:
    own = split.task.head
    return TaskResClassifier(own.base[list(classes)], own.alpha, own.logit_scale, own.logit_bias)


def _text_row(split: Split, recipe: str) -> Rows:
    """The new rows are `t_k`, nothing else."""
    trained, new = rows_of(split.trained(split.base, recipe)), rows_of(_head(split, split.new))
    return Rows(torch.cat([trained.weight, new.weight]), torch.cat([trained.bias, new.bias]), 1.0, 0.0)


def _scaled(split: Split, recipe: str) -> Rows:
    """At the scale of the text in the trained rows."""
    trained, new = rows_of(split.trained(split.base, recipe)), rows_of(_head(split, split.new))
    return Rows(torch.cat([trained.weight, trained.text * new.weight]), torch.cat([trained.bias, new.bias]), 1.0, 0.0)


def _added(split: Split, recipe: str, forget: bool = False) -> Rows:
    head = split.trained(split.base, recipe)
    if forget:
        head.facts["training"].pop("gain", None)
    wider = _head(split, split.base + split.new)
    wider.facts.update(head.facts)
    fill_from_text(wider, head, None)
    return rows_of(wider)


def _pictures(split: Split, recipe: str) -> Rows:
    return join_rows([rows_of(split.trained(split.base, recipe)), rows_of(split.trained(split.new, "auto"))])


def _retrained(split: Split, recipe: str) -> Rows:
    return rows_of(split.trained(split.base + split.new, recipe))


VARIANTS: dict[str, Callable[[Split, str], Rows]] = {
    "zero-shot": _zero_shot,
    "text row as it is": _text_row,
    "text row, scale alone": _scaled,
    "add_classes, no gain recorded": lambda split, recipe: _added(split, recipe, forget=True),
    "add_classes": _added,
    "add_classes, pictures of the new classes": _pictures,
    "trained on pictures of all": _retrained,
}


def _harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0


def _accuracies(logits: Tensor, truth: Tensor, count: int) -> tuple[float, float]:
    """On pictures of the first `count` classes and of the others."""
    right, first = (logits.argmax(1) == truth).double(), truth < count
    return 100 * float(right[first].mean()), 100 * float(right[~first].mean())


def scores(split: Split, rows: Rows) -> list[float]:
    """Apart: base, new, H; together: base, new, H, all pictures."""
    order = split.base + split.new
    place = torch.tensor([order.index(label) for label in range(len(order))])
    truth, count = place[split.task.test.labels], len(split.base)
    images = F.normalize(split.task.test.image_embeds[0].double(), dim=1)
    logits = split.task.head.logit_scale * images @ rows.weight.T + rows.bias
    apart = logits.clone()
    apart[truth < count, count:] = apart[truth >= count, :count] = -torch.inf
    values: list[float] = []
    for some in (apart, logits):
        base, new = _accuracies(some, truth, count)
        values += [base, new, _harmonic(base, new)]
    return [*values, 100 * float((logits.argmax(1) == truth).double().mean())]


def splits(found: dict[str, Task], shots: int, seeds: Sequence[int]) -> Iterator[Split]:
    for task in found.values():
        count = len(task.head.base)
        if not LEAST <= count <= MOST:
            continue
        for seed in seeds:
            order = list(range(count))
            random.Random(seed).shuffle(order)
            half = (count + 1) // 2
            drawn = few_shot_indices(task.train.labels.tolist(), shots, seed, on_short="ignore")
            yield Split(task, sorted(order[:half]), sorted(order[half:]), task.train.select(drawn), seed)


def main() -> None:
    parser = opt.parser(__doc__, seeds=3, shots=(1, 4, 16))
    parser.add_argument("--recipe", choices=["auto", "auto-v1", "paper"], default="auto", help="of the base classes")
    options = opt.read(parser)
    columns = ["shots", "new classes", "base", "new", "H", "base, together", "new, together", "H, together", "all"]
    for kind in opt.kinds(options):
        found, lines = tasks(kind), []
        for shots in options.shots:
            values: dict[str, list[list[float]]] = defaultdict(list)
            for split in splits(found, shots, options.seeds):
                for name, make in VARIANTS.items():
                    values[name].append(scores(split, make(split, options.recipe)))
            for name, rows in values.items():
                lines.append([shots, name, *(f"{mean(column):.1f}" for column in zip(*rows, strict=True))])
        over = f"recipe {options.recipe}, mean over tasks and {len(options.seeds)} seeds, {kind}"
        print(Table(columns, lines, f"Accuracy in percent, {over}").markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
