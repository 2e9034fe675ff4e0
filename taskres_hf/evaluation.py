"""From logits and labels to metrics: pure functions, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, K] whose largest entry is the label [N], from 0 to 1."""
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


def metrics_from_logits(logits: Tensor, labels: Tensor, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Accuracy, macro-F1, loss and per-class accuracy.

    Args:
        logits: [N, K]. labels: [N] class ids.
        class_names: K names; adds `per_class` with the accuracy and number of pictures of each class that occurs.

    Returns:
        `accuracy`, `macro_f1` (over classes that occur), `loss` (mean cross-entropy, nats), `num_images`.

    Raises:
        DataError: no rows, different lengths or a label outside the classes.
    """
    if len(labels) == 0 or len(labels) != len(logits):
        raise DataError(f"Metrics need as many labels as logits, at least one; got {len(labels)} and {len(logits)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"Labels must be from 0 to {logits.shape[1] - 1}; got {int(labels.min())} to {int(labels.max())}."
        )
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
