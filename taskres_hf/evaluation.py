"""From logits and labels to metrics: pure functions, computed by scikit-learn and SciPy."""

from __future__ import annotations

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


def loss_to_zero_shot(metrics: Mapping[str, Any]) -> str | None:
    """A sentence that names the classes that lost, where training made the classifier worse than zero-shot."""
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
        f"{100 * metrics['zero_shot_accuracy']:.1f} % of {metrics['num_images']} pictures. Classes that lost: "
        f"{', '.join(lost[:10])}{more}. Try more pictures or other prompts, or serve zero-shot."
    )
