from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import Array, assert_close, flat, loss, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.gda import FACTORS, GDA, ONE_SHOT_FACTOR, TWO_SHOTS_FACTOR
from taskres_hf.methods.selection import shot_folds
from taskres_hf.residual import TaskResClassifier


def _gaussians(embeds: Array, labels: Array, queries: Array) -> Array:
    """Logits of the Gaussians, with the covariance and its pseudo-inverse as published."""
    means = np.stack([embeds[labels == label].mean(axis=0) for label in range(8)])
    count, dim = embeds.shape
    covariance = np.cov((embeds - means[labels]).T)  # divisor M - 1
    precision = dim * np.linalg.pinv((count - 1) * covariance + np.trace(covariance) * np.eye(dim))
    own = np.einsum("kd,de,ke->k", means, precision, means)
    return queries @ (precision @ means.T) - np.log(8) - own / 2


@pytest.mark.parametrize("which", ["shots", "views"])
def test_formula(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    features: ImageFeatures = request.getfixturevalue(which)
    fitted = GDA().fit(features, classifier)
    queries = unit(images)
    text = classifier.logit_scale * queries @ unit(classifier.base).T
    expected = text + fitted.selected["factor"] * _gaussians(*flat(features), queries)
    assert np.abs(expected - text).max() > 0.1
    assert_close(fitted.logits(images), expected)


def test_the_factor_is_right_most_often_on_shots_held_out(shots: ImageFeatures, classifier: TaskResClassifier) -> None:
    embeds, labels = flat(shots)
    folds = shot_folds(shots.labels).numpy()
    text = classifier.logit_scale * embeds @ unit(classifier.base).T
    scores = []
    assert list(map(math.log10, FACTORS)) == [-4, -3, -2, -1, 0, 1, 2]
    for factor in FACTORS:
        errors, total = 0, 0.0
        for fold in range(folds.max() + 1):
            train, held = folds != fold, folds == fold
            gaussians = _gaussians(embeds[train], labels[train], embeds[held])
            logits = text[held] + factor * gaussians
            errors += int((logits.argmax(axis=1) != labels[held]).sum())
            total += loss(logits, labels[held]) * held.sum()
        scores.append((errors, total))
    fitted = GDA().fit(shots, classifier)
    assert fitted.selected["factor"] == FACTORS[scores.index(min(scores))]
    assert min(scores)[1] > min(total for _, total in scores)  # of equals the lower loss, but accuracy first
    assert fitted.selected_on == "cross-validation on the shots"


def test_one_shot(
    shots: ImageFeatures, views: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    """Plain pictures have no scatter, their views do; the factor is fixed."""
    rows = [shots.labels.tolist().index(label) for label in range(8)]
    fitted = GDA().fit(shots.select(rows), classifier)
    assert fitted.selected == {"factor": ONE_SHOT_FACTOR} == {"factor": 0.001}
    assert fitted.selected_on == "nothing (one shot a class)"
    logits, zero_shot = fitted.logits(images), classifier.zero_shot_logits(images)
    constant = -ONE_SHOT_FACTOR * float(np.log(8))
    torch.testing.assert_close(logits, zero_shot + constant, atol=1e-4, rtol=0)
    logits = GDA().fit(views.select(rows), classifier).logits(images)
    assert float((logits - zero_shot - constant).abs().max()) > 0.01


def test_a_class_without_shots_is_left_to_its_text(
    shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    rest = shots.select([row for row, label in enumerate(shots.labels.tolist()) if label != 3])
    moved = GDA().fit(rest, classifier).logits(images) - classifier.zero_shot_logits(images)
    assert float(moved.std(dim=1).min()) > 0.01
    others = moved[:, [0, 1, 2, 4, 5, 6, 7]]
    torch.testing.assert_close(moved[:, 3], others.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_two_plain_shots(
    shots: ImageFeatures, views: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    """Without one of two there is no scatter, so that all factors would seem equal; with views there is."""
    labels = shots.labels.tolist()
    rows = [row for row, label in enumerate(labels) if labels[:row].count(label) < 2]
    fitted = GDA().fit(shots.select(rows), classifier)
    assert fitted.selected == {"factor": TWO_SHOTS_FACTOR} == {"factor": 0.1}
    assert fitted.selected_on.startswith("nothing (two plain")
    assert float((fitted.logits(images) - classifier.zero_shot_logits(images)).std()) > 0.01
    assert GDA().fit(views.select(rows), classifier).selected_on == "cross-validation on the shots"
