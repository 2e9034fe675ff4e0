"""`python -m benchmarks.learned`: does what the rows say they learned hold for pictures they have not seen?

On the test pictures of each task, after training on `shots` pictures a class:

- words: the rank correlation, over the words, of what was added to a class's row with where the class's test pictures
  lie against those of the other classes; how many words stand out for a class, and which share of them those pictures
  confirm (half, by chance);
- classes: the rank correlation, over the classes, of how much of its row is no longer text with what it gained;
- pairs: the rank correlation, over the pairs that zero-shot or the trained classifier confuses, of how far their rows
  were turned apart with how many confusions fewer there are.

Means over classes, draws and tasks; in brackets 95 % intervals from 2,000 draws of tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.analysis.learned import (
    Learned,
    default_words,
    embed_words,
    picture_directions,
    separated_pairs,
    word_scores,
)
from taskres_hf.demo import demo_model
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training.recipes import make_recipe
from taskres_hf.training.steps import fit

from . import options as opt
from .photos import photo_model_path
from .tasks import Task, draws, tasks

COLUMNS = ["recipe", "shots", "words, correlation", "words a class", "confirmed (%)", "classes", "pairs"]
_FEWEST = 4  # points of a correlation


def _correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's; None of too few points, or where all are equal."""
    one, two = first.double().numpy(), second.double().numpy()
    if len(one) < _FEWEST or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    return float(spearmanr(one, two).statistic)


def _trained(task: Task, shots: int, seed: int, recipe: str) -> TaskResClassifier:
    own = task.head
    head = TaskResClassifier(own.base, own.alpha, own.logit_scale, own.logit_bias)
    data = task.train.select(next(draws(task, shots, [seed])))
    fit(head, data, make_recipe(recipe, head, shots, len(data)), seed)
    return head


@torch.no_grad()
def measured(task: Task, shots: int, seed: int, recipe: str, words: Tensor) -> list[float | None]:
    """Correlation of words, words a class, share confirmed, correlation of classes and of pairs."""
    head = _trained(task, shots, seed, recipe)
    learned, images, labels = Learned(head), task.test.image_embeds[0], task.test.labels
    added = word_scores(learned.directions(), words)
    seen = word_scores(picture_directions(images, labels, len(added)), words)
    found = [_correlation(one, two) for one, two in zip(added, seen, strict=True)]
    out = added.abs() >= 2.0
    confirmed = float(((added * seen)[out] > 0).double().mean()) if bool(out.any()) else None
    logits, zero_shot = head(images), head.zero_shot_logits(images)
    right, was = (logits.argmax(1) == labels).double(), (zero_shot.argmax(1) == labels).double()
    count = torch.bincount(labels, minlength=len(added)).clamp_min(1)
    gain = torch.zeros(len(added), dtype=torch.float64).index_add_(0, labels, right - was) / count
    before, after = (torch.nn.functional.normalize(rows, dim=1) for rows in (learned.text, learned.rows))
    pairs = separated_pairs(logits, zero_shot, labels)
    turned = torch.tensor(
        [float(before[a] @ before[b] - after[a] @ after[b]) for a, b in (p["classes"] for p in pairs)]
    )
    fewer = torch.tensor([float(pair["before"] - pair["after"]) for pair in pairs])
    rows = [value for value in found if value is not None]
    return [
        mean(rows) if rows else None, float(out.sum()) / len(out), confirmed and 100 * confirmed,
        _correlation(1 - learned.kept, gain), _correlation(turned, fewer),
    ]  # fmt: skip


def _with_interval(values: Sequence[float], places: int) -> str:
    """The mean over tasks, and its 95 % interval from draws of tasks."""
    if not values:
        return "-"
    drawn = np.random.default_rng(1).choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{mean(values):.{places}f} ({low:.{places}f} to {high:.{places}f})"


def table(kind: str, shots: Sequence[int], seeds: Sequence[int], recipes: Sequence[str]) -> Table:
    base = photo_model_path() if kind == opt.PHOTOGRAPHS else demo_model()
    words = embed_words(TaskResCLIPForImageClassification.from_base(base, ["cat", "dog"]), default_words())
    found, lines = tasks(kind), []
    for recipe in recipes:
        for count in shots:
            per_task: list[list[float]] = [[] for _ in COLUMNS[2:]]
            for task in found.values():
                values = defaultdict(list)
                for seed in seeds:
                    for place, value in enumerate(measured(task, count, seed, recipe, words)):
                        if value is not None:
                            values[place].append(value)
                for place, entries in values.items():
                    per_task[place].append(mean(entries))
            places = (2, 1, 0, 2, 2)
            lines.append([recipe, count, *(_with_interval(v, p) for v, p in zip(per_task, places, strict=True))])
    return Table(COLUMNS, lines, f"Mean over {len(found)} tasks and {len(seeds)} draws, {kind}")


def main() -> None:
    parser = opt.parser(__doc__, shots=(1, 4, 16))
    parser.add_argument("--recipes", nargs="+", default=["auto", "paper"], choices=["auto", "auto-v1", "paper"])
    options = opt.read(parser)
    for kind in opt.kinds(options):
        print(table(kind, options.shots, options.seeds, options.recipes).markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
