"""Difficulty, magnitude and their rank correlation: the published numbers, and what companions do not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from taskres_hf.analysis.magnitude import (
    changed_answers,
    describe_residual,
    difficulties,
    magnitudes,
    rank_correlation,
    rank_correlation_within,
)
from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.residual import TaskResClassifier

CLASSES, DIM = 5, 12


def _head(seed: int = 0, size: float = 1.0, alpha: float = 0.5) -> TaskResClassifier:
    generator = torch.Generator().manual_seed(seed)
    head = TaskResClassifier(10 * torch.randn(CLASSES, DIM, generator=generator), alpha)
    head.residual.data.copy_(size * torch.randn(CLASSES, DIM, generator=generator))
    return head


# ---------------------------------------------------------------------- difficulty


@pytest.mark.parametrize(
    ("accuracy", "classes", "published"),
    [(0.3752, 10, 0.2665), (0.8583, 37, 0.0315), (0.5574, 196, 0.0092), (0.6032, 1000, 0.0017)],
)
def test_the_relative_transfer_difficulty_is_chance_over_zero_shot(
    accuracy: float, classes: int, published: float
) -> None:
    """Zero-shot accuracies of a public log of CLIP RN50 on EuroSAT, Pets, Cars and ImageNet."""
    assert difficulties(accuracy, classes)["rtd"] == pytest.approx(published, abs=5e-5)


def test_the_published_difficulty_is_mostly_the_number_of_classes_and_its_companions_are_not() -> None:
    pets, cars = difficulties(0.8583, 37), difficulties(0.5574, 196)
    assert pets["rtd"] > cars["rtd"]
    assert pets["zero_shot_error"] < cars["zero_shot_error"]
    assert pets["normalised_error"] < cars["normalised_error"]


def test_difficulty_at_its_ends() -> None:
    assert difficulties(0.25, 4) == {"rtd": 1.0, "zero_shot_error": 0.75, "normalised_error": 1.0}
    assert difficulties(1.0, 4)["normalised_error"] == 0.0
    assert difficulties(0.0, 4)["rtd"] == math.inf
    for wrong in ((1.2, 4), (-0.1, 4), (float("nan"), 4), (0.5, 1)):
        with pytest.raises(DataError, match=r"share|classes"):
            difficulties(*wrong)


# ---------------------------------------------------------------------- magnitude


def test_each_measure_is_its_formula() -> None:
    head = _head()
    x, t = head.residual.detach().double(), head.base.double()
    found = magnitudes(head)
    assert found["mean_abs"] == pytest.approx(x.abs().mean(1).tolist())
    assert found["length"] == pytest.approx(x.norm(dim=1).tolist())
    assert found["scaled_mean_abs"] == pytest.approx((0.5 * x).abs().mean(1).tolist())
    assert found["relative_length"] == pytest.approx((0.5 * x.norm(dim=1) / t.norm(dim=1)).tolist(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(t, t + 0.5 * x)
    assert found["turn"] == pytest.approx(cosine.arccos().rad2deg().tolist(), rel=1e-4)


def test_small_turns_are_exact() -> None:
    head = _head(size=1e-4)
    expected = [math.degrees(value) for value in magnitudes(head)["relative_length"]]
    for turn, most in zip(magnitudes(head)["turn"], expected, strict=True):
        assert 0.5 * most < turn <= most * 1.001  # an arccos in fp32 would give 0


def test_what_is_common_to_all_rows_is_no_turn_among_classes() -> None:
    """A longer or common row changes no answer where rows are not normalised, and recipe auto has both."""
    head = _head()
    unit = torch.nn.functional.normalize(head.base, dim=1)
    head.set_weight(0.3 * unit + torch.ones(DIM), normalize_weight=False)
    found = magnitudes(head)
    assert max(found["turn_apart"]) < 1e-3
    assert min(found["turn"]) > 1
    assert min(found["relative_length"]) > 0.5
    head.set_weight(0.3 * unit, normalize_weight=False)  # a temperature alone
    assert max(magnitudes(head)["turn"]) < 1e-3
    assert magnitudes(head)["relative_length"] == pytest.approx([0.7] * CLASSES, rel=1e-4)


def test_zero_shot_has_no_magnitude_and_strength_counts() -> None:
    head = _head()
    whole = magnitudes(head)["relative_length"]
    head.strength = 0.5
    assert magnitudes(head)["relative_length"] == pytest.approx([0.5 * value for value in whole], rel=1e-4)
    assert magnitudes(head)["mean_abs"] == magnitudes(_head())["mean_abs"]  # of x itself
    head.reset()
    assert all(value == 0 for values in magnitudes(head).values() for value in values)
    assert magnitudes(TaskResClassifier(torch.ones(1, 4)))["turn_apart"] == [0.0]


def test_a_residual_on_the_image_side_has_no_classes() -> None:
    with pytest.raises(ConfigurationError, match="image side"):
        magnitudes(TaskResClassifier(torch.eye(4), side="image"))


def test_changed_answers() -> None:
    head = TaskResClassifier(torch.eye(3), alpha=1.0)
    pictures = torch.eye(3)
    assert changed_answers(head, pictures) == 0.0
    head.set_weight(torch.eye(3)[[1, 0, 2]])
    assert changed_answers(head, pictures) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="no"):
        changed_answers(head, torch.zeros(0, 3))


# ---------------------------------------------------------------------- correlation


def test_the_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, generator=generator).tolist()
    y = [value + float(torch.randn(1, generator=generator)) for value in x]
    found, expected = rank_correlation(x, y, resamples=2000), spearmanr(x, y)
    assert found.rho == pytest.approx(float(expected.statistic))
    assert found.p == pytest.approx(max(float(expected.pvalue), 1 / 2001), abs=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.low < expected.statistic < found.high
    assert rank_correlation(x, y, resamples=2000) == found  # the same numbers, the same interval


def test_few_pairs_promise_nothing() -> None:
    none = rank_correlation([1, 2, 3], [1, 2, 3])
    assert (none.rho, none.low, none.p) == (None, None, None)
    assert "3 of at least 4" in str(none)
    perfect = rank_correlation([1, 2, 3, 4], [10, 20, 30, 40])
    assert perfect.rho == pytest.approx(1.0)
    assert perfect.p == pytest.approx(2 / 24)  # of all orders; no four tasks reach 5 %
    assert perfect.low is None
    assert "every resample" in perfect.note
    tied = rank_correlation([1, 1, 1, 2], [1, 2, 3, 4])  # a third of the resamples have three equal values
    assert tied.p == pytest.approx(0.5)
    assert (tied.low, tied.high) == (None, None)
    assert "of the resamples all values are equal" in tied.note
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).rho is None
    assert rank_correlation([1, 2, 3, math.inf], [1, 2, 3, 4]).rho == pytest.approx(1.0)
    with pytest.raises(DataError, match="NaN"):
        rank_correlation([1, 2, 3, math.nan], [1, 2, 3, 4])
    with pytest.raises(DataError, match="one length"):
        rank_correlation([1, 2], [1, 2, 3])


def test_what_differs_between_groups_alone_is_no_correlation_within_them() -> None:
    x = [0, 1, 2, 3, 10, 11, 12, 13]
    y = [3, 2, 1, 0, 23, 22, 21, 20]
    assert (rank_correlation(x, y).rho or 0) > 0.3
    within = rank_correlation_within(x, y, "aaaabbbb", resamples=500)
    assert within.rho == pytest.approx(-1.0)
    assert within.count == 2
    assert within.low is None  # of two groups
    many = rank_correlation_within(x * 3, y * 3, [f"{place // 4}" for place in range(24)], resamples=500)
    assert many.count == 6
    assert many.p is not None
    assert many.p < 0.01
    assert rank_correlation_within([1, 2], [1, 2], "ab").rho is None
    with pytest.raises(DataError, match="group for each"):
        rank_correlation_within([1, 2], [1, 2], "a")


# ---------------------------------------------------------------------- one classifier


def test_a_classifier_is_described_with_and_without_measurements() -> None:
    names = [*"abcd", "never seen"]
    per_class = {
        name: {"accuracy": 0.9, "support": 10, "zero_shot_accuracy": place / 10} for place, name in enumerate("abcd")
    }
    found = describe_residual(_head(), names, {"zero_shot_accuracy": 0.15, "accuracy": 0.9, "per_class": per_class})
    assert found["difficulty"]["rtd"] == pytest.approx(0.2 / 0.15)
    turns = [row["turn_apart"] for row in found["classes"]]
    assert turns == sorted(turns, reverse=True)
    unmeasured = next(row for row in found["classes"] if row["name"] == "never seen")
    assert unmeasured["zero_shot_accuracy"] is None
    assert found["correlations"]["turn_apart"].count == 4
    assert found["magnitude"]["mean_abs"] == pytest.approx(float(_head().residual.detach().abs().mean()))
    bare = describe_residual(_head(), names)
    assert bare["difficulty"] is None
    assert bare["correlations"]["turn"].rho is None
