"""From answers to what is worth looking at: pure functions over logits and labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis.difficulty import margins
from ..evaluation import expected_calibration_error, share_interval
from .gathering import Measured, Pictures

Row = dict[str, Any]
BINS = 10


def class_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """A row for each class that occurs, the largest gain first.

    Args:
        metrics: with `per_class`, as of `TaskResTrainer.evaluate` or in an artifact's config.

    Returns:
        `name`, `support`, `before` (zero-shot; None where it is not recorded), `after`, `gain`, and `interval` (95 %)
        of `after`; shares from 0 to 1.
    """
    rows = []
    for name, row in (metrics.get("per_class") or {}).items():
        before, after, support = row.get("zero_shot_accuracy"), float(row["accuracy"]), int(row["support"])
        gain = None if before is None else after - float(before)
        interval = share_interval(after, support)
        rows.append(
            {"name": name, "support": support, "before": before, "after": after, "gain": gain, "interval": interval}
        )
    return sorted(rows, key=lambda row: -(row["gain"] or 0.0))


def overall_row(metrics: Mapping[str, Any]) -> Row:
    """`support`, `before` (zero-shot; None where it is not recorded), `after`, and the interval (95 %) of each, None
    where it is not known of how many pictures; shares from 0 to 1.
    """
    count = metrics.get("num_images") or sum(int(row["support"]) for row in (metrics.get("per_class") or {}).values())
    before, after = metrics.get("zero_shot_accuracy"), float(metrics["accuracy"])
    row = {"support": count, "before": before, "after": after, "interval_before": None, "interval": None}
    if count:
        row["interval"] = share_interval(after, count)
        row["interval_before"] = None if before is None else share_interval(before, count)
    return row


def paired(measured: Measured) -> Row:
    """On the same pictures: how many only training got right, how many only zero-shot, and the exact test of McNemar.

    Returns:
        `won`, `lost`, and `p`: how often so uneven a split of those came about if neither were better.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    after = measured.predicted == measured.labels
    before = measured.zero_shot.argmax(dim=1) == measured.labels
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"won": won, "lost": lost, "p": p}


# ---------------------------------------------------------------------- pictures


def confusion_counts(measured: Measured) -> Tensor:
    """How many pictures of each class (row) were taken for each class (column) [K, K]."""
    classes = measured.logits.shape[1]
    flat = measured.labels * classes + measured.predicted
    return torch.bincount(flat, minlength=classes * classes).view(classes, classes)


def confused_pairs(measured: Measured, most: int) -> list[Row]:
    """The classes most often taken for one another.

    Returns:
        At most `most` rows: `label`, `predicted` (class ids), `count`, and `share` of the pictures of `label`.
    """
    counts = confusion_counts(measured)
    totals = counts.sum(dim=1).tolist()
    wrong = counts.clone().fill_diagonal_(0)
    found = [(int(wrong[a, b]), a, b) for a, b in wrong.nonzero().tolist()]
    found.sort(key=lambda entry: (-entry[0], entry[1:]))
    return [{"label": a, "predicted": b, "count": n, "share": n / totals[a]} for n, a, b in found[:most]]


def rows_of_cell(measured: Measured, label: int, predicted: int) -> list[int]:
    """Pictures of a class that were taken for a class, the most confident first."""
    inside = (measured.labels == label) & (measured.predicted == predicted)
    rows: list[int] = inside.nonzero().flatten().tolist()
    return sorted(rows, key=lambda row: -measured.confidence[row])


def confident_mistakes(measured: Measured, most: int) -> list[int]:
    """Wrong answers, the most confident first."""
    rows: list[int] = (measured.predicted != measured.labels).nonzero().flatten().tolist()
    return sorted(rows, key=lambda row: -measured.confidence[row])[:most]


def least_certain(measured: Measured, most: int) -> list[int]:
    """Pictures whose two likeliest classes are closest in probability, the closest first; none with a single class."""
    if measured.logits.shape[1] < 2:
        return []
    order: list[int] = margins(F.softmax(measured.logits.double(), dim=1)).argsort(stable=True).tolist()
    return order[:most]


# ---------------------------------------------------------------------- calibration


class Calibration(NamedTuple):
    """Confidence beside accuracy.

    Attributes:
        name: of whom. error: expected calibration error, from 0 to 1. bins: `confidence`, `accuracy` and `count` of
            each bin of equal width that has pictures.
    """

    name: str
    error: float
    bins: list[Row]


def calibration(name: str, logits: Tensor, labels: Tensor) -> Calibration:
    """The reliability diagram of logits [N, K] and labels [N], in bins as of `expected_calibration_error`."""
    sure, predicted = F.softmax(logits.double(), dim=1).max(dim=1)
    right = (predicted == labels).double()
    inside = (sure * BINS).ceil().long().clamp(1, BINS) - 1
    bins = []
    for number in range(BINS):
        here = inside == number
        if bool(here.any()):
            means = float(sure[here].mean()), float(right[here].mean())
            bins.append({"confidence": means[0], "accuracy": means[1], "count": int(here.sum())})
    return Calibration(name, expected_calibration_error(logits, labels, BINS), bins)


def calibrations(measured: Measured, training: Mapping[str, Any] | None) -> list[Calibration]:
    """Of the trained classifier, of it without the temperature that recipe `auto` fitted where that is known, and of
    zero-shot.
    """
    training = training or {}
    found = [calibration("trained", measured.logits, measured.labels)]
    factor = training.get("temperature") if training.get("recipe") == "auto" else None
    whole = measured.metrics.get("method") != "cross-validation" and measured.metrics.get("strength", 1.0) == 1.0
    if isinstance(factor, (int, float)) and factor > 0 and whole:  # each fold has a temperature of its own
        found.append(calibration("before temperature", measured.logits / factor, measured.labels))
    return [*found, calibration("zero-shot", measured.zero_shot, measured.labels)]


# ---------------------------------------------------------------------- labels


def can_judge_labels() -> bool:
    """Whether cleanlab is installed."""
    return find_spec("cleanlab") is not None


def suspicious_labels(measured: Measured) -> list[Row]:
    """Pictures whose label may be wrong, by confident learning (Northcutt et al. 2021), the likeliest first.

    Confident learning says how many labels of a class are wrong; those with the least probable labels are named, which
    finds more of them than naming those that it counted where the classifier is weak.

    Returns:
        `row`, `label` and `suggested` (class ids), and `quality`: the probability of the given label. Empty with
        fewer than two classes.
    """
    if measured.logits.shape[1] < 2 or len(measured.labels.unique()) < 2:
        return []
    from cleanlab.filter import find_label_issues

    probabilities, labels = F.softmax(measured.logits.double(), dim=1).numpy(), measured.labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without pictures, which few shots have
        found = find_label_issues(
            labels, probabilities, return_indices_ranked_by="self_confidence", filter_by="low_self_confidence", n_jobs=1
        )
    rows = []
    for row in map(int, found):
        suggested, label = int(probabilities[row].argmax()), int(labels[row])
        if suggested != label:
            rows.append({"row": row, "label": label, "suggested": suggested, "quality": probabilities[row][label]})
    return rows


def equal_pictures(splits: Sequence[Pictures]) -> list[list[tuple[int, int]]]:
    """Groups of pictures with the same content that lie in several splits, or have several labels.

    Returns:
        Groups of (number of the split, position in it).
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for number, pictures in enumerate(splits):
        for position, digest in enumerate(pictures.digests):
            if digest is not None:
                places.setdefault(digest, []).append((number, position))

    def matters(group: list[tuple[int, int]]) -> bool:
        labels = {splits[number].images.labels[position] for number, position in group}
        return len({number for number, _ in group}) > 1 or len(labels) > 1

    return [group for group in places.values() if len(group) > 1 and matters(group)]
