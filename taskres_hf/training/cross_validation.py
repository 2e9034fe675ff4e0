"""An honest number without a held-out split: stratified cross-validation on cached embeddings."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.account import shorten
from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError, DataError
from ..residual import TaskResClassifier
from .measuring import ComputeMetrics, Metrics, both_logits, full_metrics

_ALWAYS_TRAINS = -1


def fold_of_each_picture(labels: Sequence[int], digests: Sequence[str], folds: int, seed: int) -> list[int]:
    """The fold in which each picture is tested, from 0; -1 for pictures that only ever train.

    Classes are spread evenly (scikit-learn's `StratifiedKFold`). Equal pictures are in the same fold, whatever their
    labels. A class with one picture cannot be tested: without it nothing would be known of the class.

    Args:
        labels: N class ids. digests: N digests of the pictures, or none where they are not known.

    Raises:
        DataError: no class has two different pictures.
    """
    from sklearn.model_selection import StratifiedKFold

    keys = list(digests) if digests else [str(row) for row in range(len(labels))]
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    counts = Counter(labels[row] for row in first.values())
    tested = [row for row in first.values() if counts[labels[row]] > 1]
    if not tested:
        raise DataError(
            "No class has two different pictures, so nothing can be measured honestly by cross-validation: the only "
            "picture of a class is needed to train it. Add pictures, or measure on a held-out split."
        )
    truth = [labels[row] for row in tested]
    splitter = StratifiedKFold(min(folds, max(Counter(truth).values())), shuffle=True, random_state=seed)
    fold_of_key: dict[str, int] = {}
    with warnings.catch_warnings():
        # Classes with fewer pictures than folds are what few shots are: each picture is then tested by itself.
        warnings.filterwarnings("ignore", message="The least populated class")
        for fold, (_, held_out) in enumerate(splitter.split(truth, truth)):
            fold_of_key |= {keys[tested[place]]: fold for place in held_out.tolist()}
    return [fold_of_key.get(key, _ALWAYS_TRAINS) for key in keys]


def cross_validate(
    head: TaskResClassifier,
    train: ImageFeatures,
    plain: ImageFeatures,
    folds: int,
    seed: int,
    fit: Callable[[TaskResClassifier, ImageFeatures], None],
    compute: ComputeMetrics | None = None,
) -> Metrics:
    """Train on all folds but one and test on that one, in turn; the head that is given does not change.

    Args:
        head: whose base, scale and `alpha` each fold starts from, with a zero residual.
        train: N embeddings to train on. plain: the same N pictures, not augmented, to test on.
        folds: at least 2; fewer are made where no class has so many pictures.
        fit: trains a head on a part of `train`.
        compute: further metrics, see `TaskResTrainer`.

    Returns:
        Metrics over all tested pictures, each classified by a head that was not trained on it; `folds`;
        `untested_classes`, the names of those with a single picture.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ConfigurationError(f"`folds` must be a whole number of at least 2; got {folds!r}.")
    assigned = torch.tensor(fold_of_each_picture(train.labels.tolist(), plain.digests, folds, seed))
    count = int(assigned.max()) + 1
    logits: list[Tensor] = []
    zero_shot: list[Tensor] = []
    rows: list[int] = []
    for fold in range(count):
        apart = copy.deepcopy(head)
        apart.reset()
        fit(apart, train.select(torch.nonzero(assigned != fold).flatten().tolist()))
        held_out = torch.nonzero(assigned == fold).flatten().tolist()
        for found, some in zip((logits, zero_shot), both_logits(apart, plain.select(held_out)), strict=True):
            found.append(some)
        rows += held_out
    labels = plain.labels[rows]
    metrics = full_metrics(torch.cat(logits), torch.cat(zero_shot), labels, train.class_names, compute)
    single = sorted(set(train.labels.tolist()) - set(labels.tolist()))
    untested = [train.class_names[label] for label in single]
    if untested:
        warnings.warn(
            f"{len(untested)} of {len(train.class_names)} classes have a single picture, which is needed to train "
            f"them: nothing was measured of {shorten(untested)}. The accuracy is that of the others alone.",
            stacklevel=3,
        )
    return metrics | {"folds": count, "untested_classes": untested}
