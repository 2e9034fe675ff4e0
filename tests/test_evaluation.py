"""Metrics from logits and labels."""

from __future__ import annotations

import pytest
import torch

from taskres_hf.errors import DataError
from taskres_hf.evaluation import compare_with_zero_shot, loss_to_zero_shot, metrics_from_logits

NAMES = ["cat", "dog", "bird"]
LABELS = torch.tensor([0, 0, 1, 1])


def _logits(predicted: list[int]) -> torch.Tensor:
    return 5.0 * torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()


def test_by_hand() -> None:
    metrics = metrics_from_logits(_logits([0, 1, 1, 1]), LABELS, NAMES)
    assert (metrics["accuracy"], metrics["num_images"]) == (0.75, 4)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert metrics["per_class"] == {
        "cat": {"accuracy": 0.5, "support": 2},
        "dog": {"accuracy": 1.0, "support": 2},
    }


def test_zero_shot_stands_beside_trained_for_every_class() -> None:
    metrics = compare_with_zero_shot(_logits([0, 1, 1, 1]), _logits([0, 0, 1, 2]), LABELS, NAMES)
    assert (metrics["accuracy"], metrics["zero_shot_accuracy"]) == (0.75, 0.75)
    assert metrics["per_class"]["cat"] == {"accuracy": 0.5, "support": 2, "zero_shot_accuracy": 1.0}
    low, high = metrics["accuracy_interval"]
    assert (low, high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))  # Wilson, 3 of 4
    assert loss_to_zero_shot(metrics) is None


def test_below_zero_shot_names_the_classes_that_lost() -> None:
    metrics = compare_with_zero_shot(_logits([1, 1, 1, 1]), _logits([0, 0, 1, 2]), LABELS, NAMES)
    message = loss_to_zero_shot(metrics)
    assert message is not None
    assert "50.0 % against 75.0 % of 4 pictures" in message
    assert "cat (0.0 % against 100.0 %)" in message
    assert "dog" not in message


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "at least one"),
        (torch.zeros(2, 3), LABELS, "as many"),
        (torch.zeros(1, 3), torch.tensor([3]), "from 0 to 2"),
        (torch.zeros(1, 3), torch.tensor([-1]), "from 0 to 2"),
        (torch.full((1, 3), float("nan")), torch.tensor([0]), "finite"),
    ],
)
def test_what_cannot_be_measured(logits: torch.Tensor, labels: torch.Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        metrics_from_logits(logits, labels)
