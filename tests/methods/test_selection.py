"""Cross-validation on the shots."""

from __future__ import annotations

import math

import pytest
import torch

from taskres_hf.errors import ConfigurationError
from taskres_hf.methods.selection import cross_validated, shot_folds


def test_the_shots_of_a_class_are_dealt_out() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 1, 0, 1, 0])  # 5, 4 and 1
    assert shot_folds(labels).tolist() == [0, 0, 1, 1, -1, 2, 2, 3, 3, 0]
    assert shot_folds(labels, 2).tolist() == [0, 0, 1, 1, -1, 0, 0, 1, 1, 0]
    assert shot_folds(torch.tensor([0, 1, 2])).tolist() == [-1, -1, -1]
    assert int(shot_folds(torch.arange(3).repeat(16)).max()) == 4


def test_every_class_keeps_a_shot_in_every_fold() -> None:
    labels = torch.randint(7, (40,), generator=torch.Generator().manual_seed(1))
    folds = shot_folds(labels)
    for fold in range(int(folds.max()) + 1):
        assert set(labels[folds != fold].tolist()) == set(labels.tolist())


LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
SCORES = {"good": 2.0, "bad": -2.0, "sure": 9.0, "not a number": math.nan, "surer": 4.0, "timid": 0.1, "daring": 4.0}

WRONG = {"sure": 9.0, "daring": 1.0}  # how sure of another class


def _logits(candidate: str, train_rows: torch.Tensor, held_rows: torch.Tensor) -> torch.Tensor:
    """The right class, as sure as the candidate is; "sure" and "daring" err on one of the five."""
    assert not set(train_rows.tolist()) & set(held_rows.tolist())
    assert len(train_rows) + len(held_rows) == len(LABELS)
    assert 5 in train_rows.tolist()
    logits = torch.zeros(len(held_rows), 3)
    logits[torch.arange(len(held_rows)), LABELS[held_rows]] = SCORES[candidate]
    if candidate in WRONG and 3 in held_rows.tolist():
        logits[held_rows.tolist().index(3)] = torch.tensor([WRONG[candidate], 0.0, 0.0])
    return logits


def test_the_lowest_log_loss_is_chosen() -> None:
    assert cross_validated(LABELS, ["not a number", "bad", "sure", "good"], _logits) == "good"  # 0.24 against 1.8
    assert cross_validated(LABELS, ["bad", "sure"], _logits) == "sure"
    assert cross_validated(LABELS, ["good"] * 2, _logits) == "good"


def test_or_the_best_accuracy() -> None:
    assert cross_validated(LABELS, ["sure", "bad", "good"], _logits, by="accuracy") == "good"
    assert cross_validated(LABELS, ["timid", "daring"], _logits, by="accuracy") == "timid"
    assert cross_validated(LABELS, ["timid", "daring"], _logits) == "daring"
    assert cross_validated(LABELS, ["good", "surer"], _logits, by="accuracy") == "surer"  # of equals
    with pytest.raises(ConfigurationError, match="log loss"):
        cross_validated(LABELS, ["good"], _logits, by="f1")


def test_the_losses_of_all_held_out_shots_count_alike() -> None:
    """Folds of 4 and 3 shots: one loss each would choose the other candidate."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    assert torch.bincount(shot_folds(labels)).tolist() == [4, 3]

    def logits(candidate: int, train_rows: torch.Tensor, held_rows: torch.Tensor) -> torch.Tensor:
        first = 0 in held_rows.tolist()
        right = (1.0, 1.3)[first] if candidate == 0 else (1.4, 1.0)[first]
        result = torch.zeros(len(held_rows), 3)
        result[torch.arange(len(held_rows)), labels[held_rows]] = right
        return result

    assert cross_validated(labels, [1, 0], logits) == 0


def test_nothing_can_be_held_out_of_one_shot_a_class() -> None:
    assert cross_validated(torch.tensor([2, 0, 1]), ["good"], _logits) is None


def test_rounding_decides_nothing() -> None:
    labels = torch.tensor([0, 0, 1, 1])

    def logits(candidate: float, train_rows: torch.Tensor, held_rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(labels[held_rows], 2) * candidate

    for by in ("log loss", "accuracy"):
        assert cross_validated(labels, [1.0, 1.0 + 1e-7], logits, by=by) == 1.0
        assert cross_validated(labels, [1.0, 1.001], logits, by=by) == 1.001
