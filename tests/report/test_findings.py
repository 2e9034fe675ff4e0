"""What a report finds in answers: small cases with known outcomes."""

from __future__ import annotations

import pytest
import torch

from taskres_hf.evaluation import compare_with_zero_shot
from taskres_hf.report import findings
from taskres_hf.report.gathering import Measured

NAMES = ["a", "b", "c"]


def _measured(logits: list[list[float]], labels: list[int], zero_shot: list[list[float]] | None = None) -> Measured:
    tensors = torch.tensor(logits), torch.tensor(zero_shot or logits), torch.tensor(labels)
    return Measured(*tensors, NAMES, compare_with_zero_shot(*tensors, NAMES))


@pytest.fixture
def four() -> Measured:
    """Right; wrong and sure; wrong and less sure; right and hardly."""
    return _measured([[5, 0, 0], [0, 9, 0], [0, 2, 0], [0, 1.1, 1]], [0, 0, 0, 1])


def test_pictures_are_ranked_by_confidence(four: Measured) -> None:
    assert findings.confident_mistakes(four, 9) == [1, 2]
    assert findings.least_certain(four, 2) == [3, 2]
    assert findings.rows_of_cell(four, 0, 1) == [1, 2]
    assert findings.confusion_counts(four).tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert findings.confused_pairs(four, 5) == [{"label": 0, "predicted": 1, "count": 2, "share": 2 / 3}]


def test_gain_and_loss() -> None:
    measured = _measured([[1, 0, 0], [1, 0, 0], [0, 1, 0]], [0, 0, 2], [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    rows = findings.class_rows(measured.metrics)
    assert [(row["name"], row["gain"]) for row in rows] == [("a", 0.5), ("c", -1.0)]
    assert rows[0]["interval"][0] < 1.0 <= rows[0]["interval"][1]
    assert findings.paired(measured) == {"won": 1, "lost": 1, "p": 1.0}


def test_calibration_is_the_published_error_in_bins() -> None:
    sure = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35]]).log()
    found = findings.calibration("trained", sure, torch.tensor([0, 1, 0]))
    assert [(row["count"], row["accuracy"]) for row in found.bins] == [(1, 1.0), (2, 0.5)]
    assert found.error == pytest.approx((2 * 0.45 + 0.35) / 3, abs=1e-6)


def test_the_temperature_is_taken_back_where_it_is_known(four: Measured) -> None:
    recorded = {"recipe": "auto", "temperature": 0.5}
    names = [found.name for found in findings.calibrations(four, recorded)]
    assert names == ["trained", "before temperature", "zero-shot"]
    before = findings.calibrations(four, recorded)[1]
    assert before.error == findings.calibration("", four.logits * 2, four.labels).error
    assert len(findings.calibrations(four, {"recipe": "paper", "temperature": 0.5})) == 2


def test_wrong_labels_are_the_most_suspicious() -> None:
    pytest.importorskip("cleanlab", reason="suspicious labels need cleanlab")
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    logits = 3 * torch.eye(3)[truth] + torch.randn(300, 3, generator=generator)
    wrong, labels = set(range(5, 300, 10)), truth.clone()
    labels[5::10] = (truth[5::10] + 1) % 3
    found = findings.suspicious_labels(Measured(logits, logits, labels, NAMES, {}))
    assert {row["row"] for row in found[:10]} <= wrong
    assert len(wrong & {row["row"] for row in found}) >= 20
    assert found[0]["suggested"] == int(truth[found[0]["row"]])
    assert findings.suspicious_labels(Measured(logits, logits, torch.zeros(300).long(), NAMES, {})) == []


def test_least_certain_of_one_class() -> None:
    assert findings.least_certain(Measured(*[torch.ones(2, 1)] * 2, torch.zeros(2).long(), ["only"], {}), 5) == []
