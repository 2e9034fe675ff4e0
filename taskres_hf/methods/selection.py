"""What takes a validation split's place: cross-validation on the shots themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError

CROSS_VALIDATION = "cross-validation on the shots"
NOTHING = "nothing (one shot a class)"
_MOST_FOLDS = 5
_ROUNDING = 1e-6
_ALWAYS_TRAINS = -1

Candidate = TypeVar("Candidate")


def shot_folds(labels: Tensor, folds: int | None = None) -> Tensor:
    """The fold [N] in which each shot is held out: the j-th shot of a class in fold j mod `folds`.

    The only shot of a class is never held out (-1): without it nothing would be known of the class. Every other class
    keeps a shot to train on in every fold.

    Args:
        labels: [N] class ids.
        folds: by default the median number of shots of the classes that have at least two, 2 to 5.
    """
    counts = torch.bincount(labels)
    if not bool((counts > 1).any()):
        return torch.full_like(labels, _ALWAYS_TRAINS)
    folds = folds or min(_MOST_FOLDS, int(counts[counts > 1].median()))
    seen = torch.zeros_like(counts)
    result = torch.full_like(labels, _ALWAYS_TRAINS)
    for row, label in enumerate(labels.tolist()):
        if counts[label] > 1:
            result[row] = seen[label] % folds
            seen[label] += 1
    return result


def cross_validated(
    labels: Tensor,
    candidates: Sequence[Candidate],
    logits_of: Callable[[Candidate, Tensor, Tensor], Tensor],
    by: str = "log loss",
) -> Candidate | None:
    """The candidate that does best on shots it was not fitted on.

    Args:
        labels: [N] class ids.
        candidates: at least one; of equal ones the earliest is taken.
        logits_of: `(candidate, train_rows, held_rows)` to the logits [len(held_rows), K] of the held rows from a fit
            on the others.
        by: `"log loss"`, the mean over all held-out shots, or `"accuracy"` (of equals, the lower log loss).

    Returns:
        None where no class has two shots: nothing can be cross-validated then.

    Raises:
        ConfigurationError: unknown `by`.
    """
    if by not in ("log loss", "accuracy"):
        raise ConfigurationError(f"`by` must be 'log loss' or 'accuracy'; got {by!r}.")
    fold = shot_folds(labels)
    tested = int((fold != _ALWAYS_TRAINS).sum())
    if not tested:
        return None
    loss, errors = [0.0] * len(candidates), [0] * len(candidates)
    for held_fold in range(int(fold.max()) + 1):
        train_rows = torch.nonzero(fold != held_fold).flatten()
        held_rows = torch.nonzero(fold == held_fold).flatten()
        truth = labels[held_rows]
        for number, candidate in enumerate(candidates):
            logits = logits_of(candidate, train_rows, held_rows)
            loss[number] += float(F.cross_entropy(logits.double(), truth, reduction="sum")) / tested
            errors[number] += int((logits.argmax(dim=1) != truth).sum())
    worst = (float("inf"),) * 2
    best, chosen = worst, 0
    for number in range(len(candidates)):
        score: Any = (loss[number], 0.0) if by == "log loss" else (errors[number], loss[number])
        nearly = (score[0] + _ROUNDING, 0.0) if by == "log loss" else (score[0], score[1] + _ROUNDING)
        if nearly < best:  # rounding alone is not better, nor is a loss that is not a number
            best, chosen = score, number
    return candidates[chosen]
