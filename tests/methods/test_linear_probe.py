from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import Array, assert_close, flat, loss, softmax, unit
from scipy.optimize import minimize

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.linear_probe import FIXED_C, GRID, LinearProbe, LinearProbeCV
from taskres_hf.methods.selection import shot_folds
from taskres_hf.residual import TaskResClassifier


def _optimum(embeds: Array, labels: Array, classes: int, strength: float) -> tuple[Array, Array]:
    """Weights [K, D] and biases [K] that minimise C * sum of cross-entropies + |w|^2 / 2."""
    one_hot = np.eye(classes)[labels]

    def objective(packed: Array) -> tuple[float, Array]:
        weight, bias = packed[:-classes].reshape(classes, -1), packed[-classes:]
        logits = embeds @ weight.T + bias
        error = strength * (softmax(logits) - one_hot)
        value = strength * len(labels) * loss(logits, labels) + (weight**2).sum() / 2
        return value, np.concatenate([(error.T @ embeds + weight).ravel(), error.sum(axis=0)])

    start = np.zeros(classes * (embeds.shape[1] + 1))
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-9})
    return found.x[:-classes].reshape(classes, -1), found.x[-classes:]


def test_formula(views: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    weight, bias = _optimum(*flat(views), 8, FIXED_C)
    logits = LinearProbe().fit(views, classifier).logits(images)
    expected = unit(images) @ weight.T + bias
    # A constant added to every bias changes no probability, and nothing holds it.
    assert_close(logits - logits.mean(dim=1, keepdim=True), expected - expected.mean(axis=1, keepdims=True))


def test_two_classes(shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    """One row of weights is fitted; its penalty is on that row."""
    two = shots.select([row for row, label in enumerate(shots.labels.tolist()) if label in (2, 5)])
    embeds, labels = flat(two)
    side = np.where(labels == 5, 1.0, -1.0)

    def objective(packed: Array) -> float:
        return float(
            FIXED_C * np.log1p(np.exp(-side * (embeds @ packed[:-1] + packed[-1]))).sum() + (packed[:-1] ** 2).sum() / 2
        )

    found = minimize(objective, np.zeros(embeds.shape[1] + 1), method="L-BFGS-B", options={"ftol": 1e-14}).x
    with pytest.warns(UserWarning, match="6 of 8 classes have no shots"):
        logits = LinearProbe().fit(two, classifier).logits(images)
    assert_close(logits[:, 5] - logits[:, 2], unit(images) @ found[:-1] + found[-1], 1e-3)


def test_a_class_without_shots_is_said_to_be_impossible(
    shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    rest = shots.select([row for row, label in enumerate(shots.labels.tolist()) if label != 3])
    with pytest.warns(UserWarning, match=f"cannot predict.*{shots.class_names[3]}"):
        fitted = LinearProbe().fit(rest, classifier)
    assert bool((fitted.logits(images).softmax(dim=1)[:, 3] == 0).all())
    assert fitted.trained_parameters == 7 * (images.shape[1] + 1)
    only = shots.select([row for row, label in enumerate(shots.labels.tolist()) if label == 3])
    with pytest.warns(UserWarning, match="7 of 8"):
        assert bool((LinearProbe().fit(only, classifier).logits(images).argmax(dim=1) == 3).all())


def test_c_has_the_lowest_loss_on_shots_held_out(shots: ImageFeatures, classifier: TaskResClassifier) -> None:
    embeds, labels = flat(shots)
    folds = shot_folds(shots.labels).numpy()

    def held_out_loss(strength: float) -> float:
        total = 0.0
        for fold in range(folds.max() + 1):
            weight, bias = _optimum(embeds[folds != fold], labels[folds != fold], 8, strength)
            held = folds == fold
            total += loss(embeds[held] @ weight.T + bias, labels[held]) * held.sum()
        return total

    fitted = LinearProbeCV().fit(shots, classifier)
    assert fitted.selected_on == "cross-validation on the shots"
    chosen = fitted.selected["C"]
    assert held_out_loss(chosen) < 0.999 * min(map(held_out_loss, (chosen / 10**0.5, chosen * 10**0.5)))
    assert held_out_loss(chosen) <= 1.001 * min(map(held_out_loss, GRID[:5]))


def test_c_is_fixed_where_nothing_can_be_held_out(shots: ImageFeatures, classifier: TaskResClassifier) -> None:
    one = shots.select([shots.labels.tolist().index(label) for label in range(8)])
    fitted = LinearProbeCV().fit(one, classifier)
    assert fitted.selected == {"C": FIXED_C} == {"C": 0.316}
    assert fitted.selected_on == "nothing (one shot a class)"
