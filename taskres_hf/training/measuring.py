"""Measuring a classifier on pictures that it was not trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from ..data.account import shorten
from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError, DataError
from ..evaluation import compare_with_zero_shot, metrics_from_logits
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import TaskResClassifier
from .known_pictures import Name, known_rows

Metrics = dict[str, Any]
ComputeMetrics = Callable[[EvalPrediction], Metrics]


class OnlyTrainingPicturesError(DataError):
    """Nothing is left to measure on without the pictures that the residual was trained on."""


@torch.no_grad()
def both_logits(head: TaskResClassifier, data: ImageFeatures) -> tuple[Tensor, Tensor]:
    """Logits [N, K] of the trained and of the zero-shot classifier, on the CPU."""
    embeds = data.image_embeds[0]
    return head(embeds).cpu(), head.zero_shot_logits(embeds).cpu()


def full_metrics(
    logits: Tensor, zero_shot: Tensor, labels: Tensor, class_names: list[str], compute: ComputeMetrics | None
) -> Metrics:
    """`compare_with_zero_shot`, and what the user's function computes."""
    return _computed(logits, labels, compute) | compare_with_zero_shot(logits, zero_shot, labels, class_names)


def epoch_metrics(head: TaskResClassifier, data: ImageFeatures, compute: ComputeMetrics | None) -> Metrics:
    """What an epoch logs, with the prefix `eval_`: metrics of the trained classifier alone."""
    logits, _ = both_logits(head, data)
    return prefixed(own_metrics(logits, data.labels, compute))


def own_metrics(logits: Tensor, labels: Tensor, compute: ComputeMetrics | None) -> Metrics:
    """Metrics of one classifier, with what the user's function computes."""
    return _computed(logits, labels, compute) | metrics_from_logits(logits, labels)


def _computed(logits: Tensor, labels: Tensor, compute: ComputeMetrics | None) -> Metrics:
    """What the user's function adds, as JSON can hold it; names of ours keep our meaning."""
    if compute is None:
        return {}
    found = compute(EvalPrediction(logits.numpy(), labels.numpy()))
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"compute_metrics must return a dict of numbers; got {type(found).__name__}.")
    plain: Metrics = denumpify_detensorize(dict(found))
    return plain


def prefixed(metrics: Metrics, prefix: str = "eval") -> Metrics:
    """Metrics under the names that callbacks of transformers expect."""
    return {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in metrics.items()}


def without_training_pictures(
    model: TaskResCLIPForImageClassification, data: ImageFeatures, name: Name
) -> ImageFeatures:
    """The pictures that the residual was not trained on; leaving some out is said in a warning that names them.

    Raises:
        OnlyTrainingPicturesError: none is left, or of too many training pictures not all can be told.
    """
    rows, complete = known_rows(data, model.config.data)
    if not rows:
        return data
    listed = shorten(map(name, rows[:6]), 5) if len(rows) < 6 else f"{shorten(map(name, rows[:5]))} and so on"
    what = f"{len(rows)} of {len(data)} pictures are ones that this classifier was trained on ({listed})"
    ask = "To measure on them all the same: evaluate(include_train_pictures=True), or --include-train-pictures."
    if len(rows) == len(data) or not complete:
        reason = "" if complete else ", and of so many training pictures not all can be told"
        raise OnlyTrainingPicturesError(
            f"{what}{reason}: accuracy on them says nothing about others. Measure on pictures that were held out, "
            f"or by cross-validation (TaskResTrainer.cross_validate). {ask}"
        )
    warnings.warn(f"{what}; they are left out. {ask}", stacklevel=5)
    known = set(rows)
    return data.select([row for row in range(len(data)) if row not in known])


def split_name(dataset: Any) -> str | None:
    """The split's name that came with the data."""
    split = getattr(dataset, "split", None)
    return str(split) if split else None
