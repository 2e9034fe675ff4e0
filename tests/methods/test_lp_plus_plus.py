from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import assert_close, flat, softmax, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.lp_plus_plus import LPPlusPlus
from taskres_hf.residual import TaskResClassifier


@pytest.mark.parametrize("steps", [1, 9, 10, 40, 300])
def test_formula(steps: int, shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    embeds, labels = flat(shots)
    text, one_hot, count = unit(classifier.base), np.eye(8)[labels], len(labels)
    cosines = embeds @ text.T
    weight, bias = one_hot.T @ embeds, np.zeros(8)
    share = np.full(8, 250 * np.mean([cosines[labels == label, label].mean() for label in range(8)]))
    rate = 4 * count / np.linalg.eigvalsh(embeds.T @ embeds)[-1]
    share_rate = count / (4 * (cosines**2).sum(axis=0).max())
    velocity, bias_velocity, share_gradient = 0.0, 0.0, 0.0
    for step in range(steps):
        error = (softmax(embeds @ weight.T + bias + cosines * share) - one_hot) / count
        velocity = 0.9 * velocity + error.T @ embeds
        bias_velocity = 0.9 * bias_velocity + error.sum(axis=0)
        share_gradient = share_gradient + (error * cosines).sum(axis=0)
        weight, bias = weight - rate * velocity, bias - rate * bias_velocity
        if (step + 1) % 10 == 0:
            share = share - share_rate * share_gradient
    queries = unit(images)
    expected = queries @ weight.T + bias + queries @ text.T * share
    assert_close(LPPlusPlus(steps).fit(shots, classifier).logits(images), expected)
