"""`python -m benchmarks.labelling`: how many labels each strategy of `taskres suggest` saves.

The training pictures of a task are the pool, their labels hidden: each seed leaves out another fifth of them. The first
round starts from the zero-shot classifier with no label; after each round, recipe `auto` is trained on all labels there
are, and its probabilities go into the next. Rounds end at 1, 2, 4, 8 and 16 labels a class on average, and a class may
well have none. Accuracy is that on the test pictures, all of them.

`random` is a plain draw. `stratified` draws as many of each class, which needs the labels: nobody can do that, it is
here to compare with. "times" is how many times the labels of `random` at the same accuracy: its curve of accuracy
against the logarithm of labels is interpolated, from curves that are means over tasks and seeds. Intervals are 95 % of
2,000 bootstrap draws of tasks and of seeds within them. No more labels can be read off than the last budget.

    python -m benchmarks.labelling --tail       # pools in which the most frequent class has ten times the rarest
    python -m benchmarks.labelling --classes    # whether the classes said to need pictures are those with errors
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from taskres_hf.analysis.labelling import STRATEGIES, choose, expected_misses, make_pool
from taskres_hf.tables import Table
from taskres_hf.training.whitened import fit_whitened

from . import options as opt
from .tasks import Task, tasks

PLAIN, ORACLE = "random", "stratified"
_KEPT = 0.8  # of the training pictures are in the pool of a seed
_TAIL = 10.0  # how many times the rarest class the most frequent one has, under --tail
_DRAWS = 2000


def pool_rows(labels: Tensor, seed: int, tail: bool) -> Tensor:
    """Rows of the training pictures that a seed keeps."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    if not tail:
        return order[: math.ceil(_KEPT * len(labels))]
    classes = int(labels.max()) + 1
    rank = torch.randperm(classes, generator=draw)
    most = torch.bincount(labels).double() * _TAIL ** (-rank / max(classes - 1, 1))
    seen, rows = [0] * classes, []
    for row in order.tolist():
        if seen[int(labels[row])] < max(1, round(float(most[labels[row]]))):
            seen[int(labels[row])] += 1
            rows.append(row)
    return torch.tensor(rows)


def _next(name: str, images: Tensor, y: Tensor, known: list[int], chances: Tensor, count: int, seed: int) -> list[int]:
    """Rows that a strategy has labelled next."""
    left = sorted(set(range(len(y))) - set(known))
    if name in (PLAIN, ORACLE):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).tolist()
        fresh = [row for row in order if row not in set(known)]
        if name == PLAIN:
            return fresh[:count]
        shots = (len(known) + count) // chances.shape[1]
        of_class = [[row for row in order if int(y[row]) == one][:shots] for one in range(chances.shape[1])]
        return [row for rows in of_class for row in rows if row in set(fresh)]
    pool = make_pool(images[left], chances[left], images[known], y[known])
    return [left[place] for place in choose(pool, count, name, seed)]


def simulate(task: Task, name: str, budgets: Sequence[int], seed: int, tail: bool = False) -> np.ndarray:
    """[B, 4] after each round: labels a class, accuracy, share of classes with a label, and the rank correlation of
    the expected misses of classes with their errors; NaN for budgets of more than four fifths of the pool."""
    rows = pool_rows(task.train.labels, seed, tail)
    images, y = F.normalize(task.train.image_embeds[0][rows].double(), dim=1), task.train.labels[rows]
    test, truth = F.normalize(task.test.image_embeds[0].double(), dim=1), task.test.labels
    scale, classes = float(task.head.logit_scale), len(task.head.base)
    weight, bias = scale * F.normalize(task.head.base.double(), dim=1), torch.zeros(classes, dtype=torch.float64)
    numbers = torch.bincount(truth, minlength=classes)
    known: list[int] = []
    found = np.full((len(budgets), 4), np.nan)
    for place, budget in enumerate(budgets):
        if budget * classes > _KEPT * len(y):
            break
        chances = (images @ weight.T + bias).softmax(1)
        known += _next(name, images, y, known, chances, budget * classes - len(known), seed)
        fit = fit_whitened(images[known], y[known], task.head.base, scale)
        weight, bias = fit.weight, fit.bias
        right = ((test @ weight.T + bias).argmax(1) == truth).double()
        errors = 1.0 - torch.bincount(truth, right, minlength=classes) / numbers
        left = sorted(set(range(len(y))) - set(known))
        misses = expected_misses((images[left] @ weight.T + bias).softmax(1))
        there = numbers > 0
        constant = len(set(errors[there].tolist())) < 2 or len(set(misses[there].tolist())) < 2
        ranks = np.nan if constant else spearmanr(misses[there], errors[there]).statistic
        found[place] = len(known) / classes, float(right.mean()), len(set(y[known].tolist())) / classes, ranks
    return found


def measured(kind: str, material: Mapping[str, Task], name: str, options: argparse.Namespace) -> np.ndarray:
    """[T, S, B, 4] of one strategy; with a folder, what was finished there is taken from it."""
    rows = []
    for task, one in material.items():
        file = None
        if options.output_dir:
            tail = "-tail" if options.tail else ""
            file = options.output_dir / f"{kind}{tail}-{name}-{task}-{options.shots}-{len(options.seeds)}.json"
        if file is None or not file.exists():
            values = [simulate(one, name, options.shots, seed, options.tail).tolist() for seed in options.seeds]
            if file is not None:
                file.write_text(json.dumps({"rounds": values}))
        else:
            values = json.loads(file.read_text())["rounds"]
        rows.append(values)
    return np.array(rows, dtype=float)


# ---------------------------------------------------------------------- what the rounds say


def times(labels: np.ndarray, accuracy: np.ndarray, plain_labels: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """[B - 1]: how many times the labels `random` needs for the accuracy of a strategy, at all budgets but the last.

    Args:
        labels, accuracy: [T, S, B] of the strategy. plain_labels, plain: the same of `random`. Of each budget those
            tasks count that have the next one too.
    """
    found = np.full(labels.shape[2] - 1, np.nan)
    for place in range(len(found)):
        having = ~np.isnan(plain[..., place + 1]).any(1) & ~np.isnan(accuracy[..., place]).any(1)
        if not having.any():
            continue
        steps = int((~np.isnan(plain[having]).any((0, 1))).sum())
        known = np.maximum.accumulate(plain[having][..., :steps].mean((0, 1))) + 1e-9 * np.arange(steps)
        at = np.log2(plain_labels[having][..., :steps].mean((0, 1)))
        reached, own = accuracy[having][..., place].mean(), labels[having][..., place].mean()
        found[place] = 2.0 ** np.interp(reached, known, at) / own
    return found


def resampled(tasks_: int, seeds: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Tasks, and seeds of each, drawn with replacement: indices for the first two axes."""
    draw = np.random.default_rng(0)
    return [
        (draw.integers(0, tasks_, tasks_)[:, None], draw.integers(0, seeds, (tasks_, seeds))) for _ in range(_DRAWS)
    ]


def _cell(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def _spread(value: float, low: float, high: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def saved_table(found: Mapping[str, np.ndarray], budgets: Sequence[int], title: str) -> Table:
    """Accuracy at each budget, and labels of `random` for the same.

    Args:
        found: strategy to [T, S, B, 4], see `simulate`.
    """
    plain, rows = found[PLAIN], []
    samples = resampled(*plain.shape[:2])
    for name, values in found.items():
        cells = [_cell(100 * one, 1) for one in np.nanmean(values[..., 1], (0, 1))]
        made = times(values[..., 0], values[..., 1], plain[..., 0], plain[..., 1])
        drawn = np.array([
            times(values[one][..., 0], values[one][..., 1], plain[one][..., 0], plain[one][..., 1]) for one in samples
        ])  # fmt: skip
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
        more = [_spread(*cell) for cell in zip(made, low, high, strict=True)]
        rows.append(
            [f"{name}, an oracle" if name == ORACLE else name, *cells, *(more if name != PLAIN else "1" * len(more))]
        )
    columns = ["strategy", *(f"at {one}" for one in budgets), *(f"times at {one}" for one in budgets[:-1])]
    return Table(columns, rows, title)


def class_table(found: Mapping[str, np.ndarray], budgets: Sequence[int], title: str) -> Table:
    """Share of classes with a label, and how well expected misses rank the errors of classes."""
    rows = []
    for name, values in found.items():
        shares = [_cell(100 * one, 0) for one in np.nanmean(values[..., 2], (0, 1))]
        samples = [np.nanmean(values[one][..., 3], (0, 1)) for one in resampled(*values.shape[:2])]
        low, high = np.nanquantile(samples, [0.025, 0.975], axis=0)
        ranks = [
            f"{a:.2f} ({b:.2f} to {c:.2f})"
            for a, b, c in zip(np.nanmean(values[..., 3], (0, 1)), low, high, strict=True)
        ]
        rows.append([name, *shares, *ranks])
    columns = ["strategy", *(f"classes at {one}" for one in budgets), *(f"ranks at {one}" for one in budgets)]
    return Table(columns, rows, title)


def main() -> None:
    parser = opt.parser(__doc__)
    parser.add_argument("--strategies", nargs="+", default=[*STRATEGIES, ORACLE], help="default: all")
    parser.add_argument("--tail", action="store_true", help="pools with a long tail")
    parser.add_argument("--classes", action="store_true", help="also which classes were said to need pictures")
    parser.add_argument("--output-dir", type=Path, help="keep finished rounds here, and take them again")
    options = opt.read(parser)
    if options.output_dir:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([PLAIN, *options.strategies]))
    if unknown := sorted(set(names) - {*STRATEGIES, ORACLE}):
        parser.error(f"no such strategies: {', '.join(unknown)}")
    for kind in opt.kinds(options):
        material = tasks(kind)
        found = {name: measured(kind, material, name, options) for name in names}
        pool = "pools with a long tail" if options.tail else "pools as they are"
        having = (~np.isnan(found[PLAIN][..., 1]).any(1)).sum(0).tolist()
        title = (
            f"{kind}, {len(options.seeds)} seeds, {pool}; tasks that have each budget: {', '.join(map(str, having))}"
        )
        print(saved_table(found, options.shots, title).markdown(), "\n", flush=True)
        if options.classes:
            print(class_table(found, options.shots, title).markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
