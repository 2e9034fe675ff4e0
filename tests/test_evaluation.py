"""Metrics from logits and labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from taskres_hf.errors import DataError
from taskres_hf.evaluation import (
    compare_with_zero_shot,
    expected_calibration_error,
    loss_to_zero_shot,
    metrics_from_logits,
)

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


def test_calibration_error_by_hand() -> None:
    shares = torch.tensor([[0.72, 0.28], [0.68, 0.32], [0.31, 0.69], [0.05, 0.95]])
    # Two bins are taken: 10/15 to 11/15 holds three rows, two of them right; 14/15 to 1 one, which is wrong.
    expected = abs(2 - (0.72 + 0.68 + 0.69)) / 4 + 0.95 / 4
    assert expected_calibration_error(shares.log(), torch.tensor([0, 1, 1, 0])) == pytest.approx(expected, abs=1e-6)
    assert expected_calibration_error(shares.log(), torch.tensor([0, 0, 1, 1]), bins=1) == pytest.approx(
        1 - (0.72 + 0.68 + 0.69 + 0.95) / 4, abs=1e-6
    )
    sure = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])  # a confidence of exactly 1 is in the last bin
    assert expected_calibration_error(sure, torch.tensor([0, 1])) == 0.0
    assert expected_calibration_error(sure, torch.tensor([1, 1])) == pytest.approx(0.5)


def test_calibration_error_is_that_of_a_loop(splits: Any, model: Any) -> None:
    from taskres_hf import TaskResTrainer, TaskResTrainingArguments

    test = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(splits["test"])
    with torch.no_grad():
        logits = model.classifier.zero_shot_logits(test.image_embeds[0])
    shares = logits.double().softmax(dim=1)
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        rows = [i for i, row in enumerate(shares) if low < float(row.max()) <= high]
        right = sum(int(shares[i].argmax()) == int(test.labels[i]) for i in rows)
        total += abs(right - sum(float(shares[i].max()) for i in rows))
    assert expected_calibration_error(logits, test.labels) == pytest.approx(total / len(test))
    with pytest.raises(DataError, match="as many labels as logits"):
        expected_calibration_error(logits, test.labels[1:])
