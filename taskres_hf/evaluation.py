"""From logits and labels to metrics: pure functions, computed by scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, K] whose largest entry is the label [N], from 0 to 1."""
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """How far confidence is from accuracy, from 0 to 1 (Guo et al. 2017, equation 3).

    The confidence of a row is its largest softmax probability. Rows are put into bins of equal width from 0 to 1, each
    closed at its upper end; the error is the mean over rows of |accuracy - mean confidence| of the row's bin.

    Args:
        logits: [N, K]. labels: [N] class ids. bins: at least 1.

    Raises:
        DataError: no rows, different lengths, or no bins.
    """
    if len(labels) == 0 or len(labels) != len(logits) or bins < 1:
        raise DataError(
            f"The calibration error needs as many labels as logits, at least one, and at least one bin; got "
            f"{len(labels)}, {len(logits)} and {bins}."
        )
    confidence, predicted = F.softmax(logits.double(), dim=1).max(dim=1)
    right = (predicted == labels.to(logits.device)).double()
    inside = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, inside, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def metrics_from_logits(logits: Tensor, labels: Tensor, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Accuracy, macro-F1, loss and per-class accuracy.

    Args:
        logits: [N, K]. labels: [N] class ids.
        class_names: K names; adds `per_class` with the accuracy and number of pictures of each class that occurs.

    Returns:
        `accuracy`, `macro_f1` (over classes that occur), `loss` (mean cross-entropy, nats), `num_images`.

    Raises:
        DataError: no rows, different lengths, a label outside the classes, or logits that are not finite.
    """
    if len(labels) == 0 or len(labels) != len(logits):
        raise DataError(f"Metrics need as many labels as logits, at least one; got {len(labels)} and {len(logits)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"Labels must be from 0 to {logits.shape[1] - 1}; got {int(labels.min())} to {int(labels.max())}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise DataError("Metrics need finite logits; some are NaN or infinite. Check the residual and the pictures.")
    from sklearn.metrics import f1_score, recall_score

    truth, predicted = labels.cpu().numpy(), logits.argmax(dim=1).cpu().numpy()
    present = sorted(set(truth.tolist()))
    result: dict[str, Any] = {
        "accuracy": accuracy(logits, labels),
        "macro_f1": float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0)),
        "loss": float(F.cross_entropy(logits.float(), labels.to(logits.device))),
        "num_images": len(labels),
    }
    if class_names is not None:
        recalls = recall_score(truth, predicted, labels=present, average=None, zero_division=0.0)
        counts = torch.bincount(labels.cpu(), minlength=len(class_names)).tolist()
        result["per_class"] = {
            class_names[label]: {"accuracy": float(recall), "support": counts[label]}
            for label, recall in zip(present, recalls, strict=True)
        }
    return result


def compare_with_zero_shot(
    logits: Tensor, zero_shot_logits: Tensor, labels: Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """`metrics_from_logits` with zero-shot beside trained.

    Args:
        logits, zero_shot_logits: [N, K]. labels: [N] class ids. class_names: K names.

    Returns:
        The metrics, and `zero_shot_accuracy` (also in each row of `per_class`) and `accuracy_interval`: the 95 %
        interval of the accuracy that N pictures allow (Wilson).
    """
    metrics = metrics_from_logits(logits, labels, class_names)
    before = metrics_from_logits(zero_shot_logits, labels, class_names)
    for name, row in metrics["per_class"].items():
        row["zero_shot_accuracy"] = before["per_class"][name]["accuracy"]
    metrics["zero_shot_accuracy"] = before["accuracy"]
    metrics["accuracy_interval"] = share_interval(metrics["accuracy"], len(labels))
    return metrics


def share_interval(share: float, count: int) -> list[float]:
    """The 95 % interval (Wilson) of a share, from 0 to 1, that was found in `count` >= 1 cases."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def multi_label_log_odds(logits: Tensor) -> Tensor:
    """Log-odds [N, K] of each class against all others under softmax, plus log(K - 1): above 0 where a class is more
    likely than one drawn by chance. It makes yes or no of a zero-shot classifier, whose logits only compare classes.
    """
    logits = logits.double()
    return torch.logit(F.softmax(logits, dim=1), eps=1e-12) + math.log(max(logits.shape[1] - 1, 1))


def multi_label_metrics(
    logits: Tensor, labels: Tensor, class_names: Sequence[str] | None = None, threshold: float | Tensor = 0.5
) -> dict[str, Any]:
    """Metrics of a classifier that may give a picture several labels, or none.

    Args:
        logits: [N, K]. labels: [N, K], 1 for a class that the picture shows, else 0.
        class_names: K names; adds `per_class`.
        threshold: a label is given where the sigmoid of its logit is at least that; one for all, or [N, 1].

    Returns:
        `map` (mean average precision), `micro_f1`, `macro_f1`, `loss` (mean binary cross-entropy, nats), `num_images`;
        in `per_class` `ap`, `f1` and `support`. `map` and `macro_f1` are over the classes that some of the pictures
        show and some do not; `unmeasured_classes` names the others.

    Raises:
        DataError: no rows, another shape, labels other than 0 and 1, logits that are not finite, or no class that can
            be measured.
    """
    if labels.ndim != 2 or labels.shape != logits.shape or not len(labels):
        raise DataError(
            f"Metrics of several labels a picture need labels of the shape of the logits, at least one row; got "
            f"{list(labels.shape)} and {list(logits.shape)}."
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise DataError("Labels must be 0 and 1 alone; some are not.")
    if not bool(torch.isfinite(logits).all()):
        raise DataError("Metrics need finite logits; some are NaN or infinite. Check the residual and the pictures.")
    from sklearn.metrics import average_precision_score, f1_score

    scores = torch.sigmoid(logits.double().cpu())
    truth, given = labels.cpu().numpy() > 0, (scores >= threshold).numpy()
    support = truth.sum(axis=0).tolist()
    measured = [place for place, count in enumerate(support) if 0 < count < len(truth)]
    if not measured:
        raise DataError("Nothing can be measured: every class is on all of the pictures or on none. Measure on others.")
    ranked = logits.double().cpu().numpy()
    aps = {place: float(average_precision_score(truth[:, place], ranked[:, place])) for place in measured}
    each = f1_score(truth, given, average=None, zero_division=0.0)
    result: dict[str, Any] = {
        "map": sum(aps.values()) / len(aps),
        "micro_f1": float(f1_score(truth, given, average="micro", zero_division=0.0)),
        "macro_f1": sum(float(each[place]) for place in measured) / len(measured),
        "loss": float(F.binary_cross_entropy_with_logits(logits.double().cpu(), labels.double().cpu())),
        "num_images": len(labels),
    }
    if class_names is not None:
        result["per_class"] = {
            class_names[place]: {"ap": aps[place], "f1": float(each[place]), "support": support[place]}
            for place in measured
        }
        result["unmeasured_classes"] = [name for place, name in enumerate(class_names) if place not in aps]
    return result


def compare_multi_label(
    logits: Tensor,
    zero_shot_logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    threshold: float | Tensor = 0.5,
) -> dict[str, Any]:
    """`multi_label_metrics` with zero-shot beside trained: `zero_shot_map`, `zero_shot_micro_f1`, `zero_shot_macro_f1`,
    and `zero_shot_ap` of each class. Zero-shot is judged by `multi_label_log_odds`, at 0.5.
    """
    metrics = multi_label_metrics(logits, labels, class_names, threshold)
    before = multi_label_metrics(multi_label_log_odds(zero_shot_logits), labels, class_names)
    for name, row in metrics["per_class"].items():
        row["zero_shot_ap"] = before["per_class"][name]["ap"]
    return metrics | {f"zero_shot_{key}": before[key] for key in ("map", "micro_f1", "macro_f1")}


_WHERE_ZERO_SHOT_IS_BETTER = {
    None: "Try more pictures or other prompts, or serve zero-shot.",
    "class_names": "Try more texts or other templates, or serve zero-shot.",
    "head": "Zero-shot is the pretrained head alone: try more pictures, or serve that (strength 0).",
    "class_means": "Zero-shot is giving every picture the first class: try more pictures, or another base.",
}


def loss_to_zero_shot(
    metrics: Mapping[str, Any], base_classifier: str | None = None, noun: str = "picture"
) -> str | None:
    """A sentence that names the classes that lost, where training made the classifier worse than zero-shot.

    Args:
        base_classifier: of the config; what zero-shot is over one tower alone. noun: what was classified.
    """
    if "map" in metrics:
        if metrics["map"] >= metrics["zero_shot_map"]:
            return None
        lost = [name for name, row in metrics["per_class"].items() if row["ap"] < row["zero_shot_ap"]]
        return (
            f"The trained classifier is below zero-shot: mAP {100 * metrics['map']:.1f} % against "
            f"{100 * metrics['zero_shot_map']:.1f} % on {metrics['num_images']} pictures. Classes that lost: "
            f"{', '.join(lost[:10])}. Try more pictures or other prompts."
        )
    if metrics["accuracy"] >= metrics["zero_shot_accuracy"]:
        return None
    rows = sorted(metrics["per_class"].items(), key=lambda item: item[1]["accuracy"] - item[1]["zero_shot_accuracy"])
    lost = [
        f"{name} ({100 * row['accuracy']:.1f} % against {100 * row['zero_shot_accuracy']:.1f} %)"
        for name, row in rows
        if row["accuracy"] < row["zero_shot_accuracy"]
    ]
    more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
    return (
        f"The trained classifier is below zero-shot: {100 * metrics['accuracy']:.1f} % against "
        f"{100 * metrics['zero_shot_accuracy']:.1f} % of {metrics['num_images']} {noun}s. Classes that lost: "
        f"{', '.join(lost[:10])}{more}. {_WHERE_ZERO_SHOT_IS_BETTER[base_classifier].replace('picture', noun)}"
    )
