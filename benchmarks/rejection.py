"""`python -m benchmarks.rejection`: how well scores tell pictures of no class, and what a threshold on each keeps.

Recipe `auto` is trained on two thirds of a task's classes, another draw of them each seed. Known are test pictures of
those classes. Unknown are `near` the test pictures of its other classes, and `far` up to 60 test pictures of each other
task whose classes are others (of `all-categories`: the digits). Thresholds are chosen on the training pictures alone,
held out in five folds, as `TaskResTrainer.choose_rejection` does; with one picture a class none can be held out.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from taskres_hf.embedding import ImageFeatures
from taskres_hf.errors import FewShotError
from taskres_hf.rejection import check_enough, class_means, nearest_mean
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training import TaskResTrainingArguments
from taskres_hf.training.measuring import fold_of_each_picture
from taskres_hf.training.recipes import recipe_for
from taskres_hf.training.steps import fit
from taskres_hf.training.whitened import _moments, _Whitened

from . import options as opt
from .tasks import Task, draws, tasks

OURS = "largest cosine to a class mean (chosen)"
SUM = "cosine to the mean of all + largest logit"
EMPTY = "largest softmax, empty conformal set"
STORED = {
    "largest softmax": "nothing", EMPTY: "nothing", "largest logit": "nothing", "energy": "nothing",
    "margin of two logits": "nothing", "largest cosine to the text": "nothing", "cosine to the mean of all": "D",
    OURS: "K D", "cosine to the nearest picture": "N D", "Mahalanobis": "K D + D^2", SUM: "D",
}  # fmt: skip
_SUMMED = ("cosine to the mean of all", "largest logit")  # each in units of its spread over the held-out pictures
_FAR = 60
_SAME_THINGS = {"fruit": {"apples-pears"}, "apples-pears": {"fruit"}}  # two tasks of photographs of fruit

Scores = dict[str, Tensor]


@torch.no_grad()
def scores(head: TaskResClassifier, shots: ImageFeatures, embeds: Tensor, labels: Tensor | None = None) -> Scores:
    """Name to scores [N], higher for what is more like the classes; of all but `SUM`.

    Args:
        shots: what the head was trained on. embeds: [N, D]. labels: [N], where these are pictures to choose on.
    """
    images, own, y = (
        F.normalize(embeds.double(), dim=1),
        F.normalize(shots.image_embeds[0].double(), dim=1),
        shots.labels,
    )
    logits, count = head(embeds).double(), torch.bincount(y, minlength=len(head.base)).double()
    means = torch.zeros(len(count), own.shape[1], dtype=own.dtype).index_add_(0, y, own) / count[:, None]
    top = logits.max(1)[0]
    weights = torch.ones(len(y), dtype=own.dtype)
    sums, squares = _moments(own, y, len(count), weights)
    metric = _Whitened(own, y, weights[None], own.shape[1], (sums[None], squares[None]))
    two = logits.topk(2, dim=1)[0]
    chances = logits.softmax(1)
    return {
        "largest softmax": chances.max(1)[0],
        EMPTY: chances.max(1)[0] if labels is None else chances.gather(1, labels[:, None])[:, 0],
        "largest logit": top, "energy": logits.logsumexp(1), "margin of two logits": two[:, 0] - two[:, 1],
        "largest cosine to the text": (images @ F.normalize(head.base.double(), dim=1).T).max(1)[0],
        "cosine to the mean of all": images @ F.normalize(own.mean(0), dim=0),
        OURS: nearest_mean(embeds, class_means(shots.image_embeds[0], y)),
        "cosine to the nearest picture": (images @ own.T).max(1)[0],
        "Mahalanobis": -torch.cdist(metric.whiten(images)[0], metric.whiten(means)[0]).min(1)[0],
    }  # fmt: skip


def _fit(head: TaskResClassifier, data: ImageFeatures) -> None:
    fit(head, data, recipe_for(TaskResTrainingArguments(), head, data.labels, False), seed=1)


def held_out_scores(head: TaskResClassifier, train: ImageFeatures) -> Scores:
    """Scores of training pictures by heads that were not trained on them; none at one picture a class."""
    if len(train) == len(set(train.labels.tolist())):
        return {}
    parts = []
    folds = torch.tensor(fold_of_each_picture(train.labels.tolist(), train.digests, 5, 1))
    for fold in range(int(folds.max()) + 1):
        rest, out = (folds != fold).nonzero().flatten().tolist(), (folds == fold).nonzero().flatten().tolist()
        apart = copy.deepcopy(head)
        _fit(apart, train.select(rest))
        parts.append(scores(apart, train.select(rest), train.image_embeds[0][out], train.labels[out]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _only(data: ImageFeatures, rows: Sequence[int], classes: Sequence[int]) -> ImageFeatures:
    """Those of the rows that are of some classes, which become 0, 1, ..."""
    place = {old: new for new, old in enumerate(classes)}
    chosen = data.select([row for row in rows if int(data.labels[row]) in place])
    labels = torch.tensor([place[label] for label in chosen.labels.tolist()])
    return replace(chosen, labels=labels, class_names=[data.class_names[old] for old in classes])


def _far(found: Mapping[str, Task], name: str, seed: int) -> Tensor:
    others = ["digits"] if name == "all-categories" else [
        other for other in found if other not in {name, "all-categories", *_SAME_THINGS.get(name, ())}
    ]  # fmt: skip
    parts = []
    for other in others:
        embeds = found[other].test.image_embeds[0]
        order = torch.randperm(len(embeds), generator=torch.Generator().manual_seed(seed))
        parts.append(embeds[order[:_FAR]])
    return torch.cat(parts)


def measured(
    found: Mapping[str, Task], name: str, shots: int, seed: int, rates: Sequence[float]
) -> Iterator[tuple[str, list[float | None]]]:
    """Score and its AUROC near and far, then for each rate the share of known kept, of near and of far rejected."""
    task = found[name]
    total = len(task.head.base)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    classes = sorted(order[: max(2, round(total * 2 / 3))])
    rows = next(draws(task, shots, [seed]))
    train, known = _only(task.train, rows, classes), _only(task.test, range(len(task.test)), classes)
    unknown = [row for row, label in enumerate(task.test.labels.tolist()) if label not in classes]
    head = TaskResClassifier(task.head.base[classes], task.head.alpha, task.head.logit_scale, task.head.logit_bias)
    trained = copy.deepcopy(head)
    _fit(trained, train)
    held = held_out_scores(head, train)
    kinds = (known.image_embeds[0], task.test.image_embeds[0][unknown], _far(found, name, seed))
    parts = [scores(trained, train, embeds) for embeds in kinds]
    if held:
        for part in (*parts, held):
            part[SUM] = sum((part[one] / held[one].std() for one in _SUMMED), torch.zeros(()))
    for score in parts[0]:
        own, near, far = (part[score] for part in parts)
        line: list[float | None] = [
            float(roc_auc_score([1] * len(own) + [0] * len(other), torch.cat([own, other]))) for other in (near, far)
        ]
        for rate in rates:
            line += _at_threshold(held.get(score), rate, own, near, far)
        yield score, line


def _at_threshold(held: Tensor | None, rate: float, own: Tensor, near: Tensor, far: Tensor) -> list[float | None]:
    try:
        place = check_enough(0 if held is None else len(held), rate)
    except FewShotError:
        return [None, None, None]
    assert held is not None
    threshold = held.sort()[0][place - 1]
    return [float(part.double().mean()) for part in (own >= threshold, near < threshold, far < threshold)]


def _cell(values: Sequence[float | None], percent: bool) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    return f"{100 * mean(numbers):.1f}" if percent else f"{mean(numbers):.3f}"


def main() -> None:
    parser = opt.parser(__doc__, seeds=3, shots=(1, 4, 16))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1])
    options = opt.read(parser)
    columns = ["score", "stored", "shots", "AUROC near", "far"]
    columns += [f"{what} at {100 * rate:g} %" for rate in options.rates for what in ("kept", "near", "far")]
    for kind in opt.kinds(options):
        found = tasks(kind)
        lines: dict[tuple[str, int], list[list[float | None]]] = defaultdict(list)
        for name in found:
            for shots in options.shots:
                for seed in options.seeds:
                    for score, line in measured(found, name, shots, seed, options.rates):
                        lines[score, shots].append(line)
        rows: list[list[Any]] = [
            [score, STORED[score], shots]
            + [_cell(values, place > 1) for place, values in enumerate(zip(*lines[score, shots], strict=True))]
            for score in STORED for shots in options.shots if (score, shots) in lines
        ]  # fmt: skip
        title = f"AUROC, known kept and unknown rejected in percent: mean over tasks and {len(options.seeds)} seeds"
        print(Table(columns, rows, f"{title}, {kind}").markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
