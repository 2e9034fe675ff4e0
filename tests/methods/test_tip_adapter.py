from __future__ import annotations

import numpy as np
import pytest
import torch
from adam import adam
from formulas import Array, assert_close, loss, softmax, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.selection import shot_folds
from taskres_hf.methods.tip_adapter import ALPHAS, BETAS, TipAdapter, TipAdapterF
from taskres_hf.residual import TaskResClassifier

which_shots = pytest.mark.parametrize("which", ["shots", "views"])


def _keys(features: ImageFeatures) -> Array:
    return unit(features.image_embeds.numpy().astype(np.float64).mean(axis=0))


def _logits(queries: Array, keys: Array, labels: Array, head: TaskResClassifier, alpha: float, beta: float) -> Array:
    affinity = np.exp(-beta * (1 - queries @ keys.T))
    zero_shot = head.logit_scale * queries @ unit(head.base).T
    return zero_shot + alpha * head.logit_scale / 100 * affinity @ np.eye(8)[labels]


@which_shots
def test_formula(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    features: ImageFeatures = request.getfixturevalue(which)
    fitted = TipAdapter().fit(features, classifier)
    keys, labels = _keys(features), features.labels.numpy()
    expected = _logits(unit(images), keys, labels, classifier, fitted.selected["alpha"], fitted.selected["beta"])
    assert_close(fitted.logits(images), expected)
    assert float((fitted.logits(images) - classifier.zero_shot_logits(images)).std(dim=1).min()) > 0.01


def test_the_numbers_with_the_lowest_loss_on_held_out_shots(
    shots: ImageFeatures, classifier: TaskResClassifier
) -> None:
    keys, labels, folds = _keys(shots), shots.labels.numpy(), shot_folds(shots.labels).numpy()
    losses = {}
    for alpha in ALPHAS:
        for beta in BETAS:
            total = 0.0
            for fold in range(folds.max() + 1):
                train, held = folds != fold, folds == fold
                logits = _logits(keys[held], keys[train], labels[train], classifier, alpha, beta)
                total += loss(logits, labels[held]) * held.sum()
            losses[alpha, beta] = total
    fitted = TipAdapter().fit(shots, classifier)
    assert (fitted.selected["alpha"], fitted.selected["beta"]) == min(losses, key=losses.__getitem__)
    assert fitted.selected_on == "cross-validation on the shots"


@which_shots
def test_training_the_keys(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    """Published: AdamW 1e-3, eps 1e-4, decay 0.01, 20 epochs, one batch here; a = b = 1 while it trains."""
    features: ImageFeatures = request.getfixturevalue(which)
    views, labels = unit(features.image_embeds.numpy()), features.labels.numpy()

    def gradients(step: int, values: list[Array]) -> list[Array]:
        seen = views[step % len(views)]
        error = softmax(_logits(seen, values[0], labels, classifier, 1.0, 1.0)) - np.eye(8)[labels]
        affinity = np.exp(seen @ values[0].T - 1)
        return [(error[:, labels] * affinity * classifier.logit_scale / 100).T @ seen / len(labels)]

    history = adam([_keys(features)], gradients, 20, 1e-3, 1e-4, 0.01)
    fitted = TipAdapterF().fit(features, classifier)
    chosen = fitted.selected
    keys = history[chosen["epoch"] - 1][0]
    expected = _logits(unit(images), keys, labels, classifier, chosen["alpha"], chosen["beta"])
    assert_close(fitted.logits(images), expected)
    untrained = _logits(unit(images), _keys(features), labels, classifier, chosen["alpha"], chosen["beta"])
    assert np.abs(expected - untrained).max() > 0.01
    assert chosen["epoch"] in (5, 10, 15, 20)
    assert fitted.trained_parameters == keys.size


@pytest.mark.parametrize("method", [TipAdapter, TipAdapterF])
def test_one_shot_takes_the_start_values(
    method: type[TipAdapter] | type[TipAdapterF], shots: ImageFeatures, classifier: TaskResClassifier
) -> None:
    rows = [shots.labels.tolist().index(label) for label in range(8)]
    fitted = method().fit(shots.select(rows), classifier)
    assert {"epoch": 20, **fitted.selected} == {"epoch": 20, "alpha": 1.0, "beta": 1.0}
    assert fitted.selected_on == "nothing (one shot a class)"
    assert fitted.linear is None
    assert "shot" in fitted.not_linear
