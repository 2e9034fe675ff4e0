from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import Array, assert_close, softmax, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.clip_adapter import ClipAdapter
from taskres_hf.residual import TaskResClassifier


def test_formula(shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    """Trained by hand: SGD, one batch of all eight shots an epoch, 50 epochs for one shot."""
    rows = [shots.labels.tolist().index(label) for label in range(8)]
    few = shots.select(rows)
    seen, text, scale = unit(few.image_embeds[0]), unit(classifier.base), classifier.logit_scale
    generator = torch.Generator().manual_seed(4)
    down = (2 * torch.rand(48, 192, generator=generator) - 1).double().numpy() / math.sqrt(192)
    up = (2 * torch.rand(192, 48, generator=generator) - 1).double().numpy() / math.sqrt(48)

    def forward(queries: Array) -> tuple[Array, Array, Array, Array]:
        hidden = np.maximum(queries @ down.T, 0)
        out = np.maximum(hidden @ up.T, 0)
        mixed = 0.2 * out + 0.8 * queries
        return hidden, out, mixed, scale * unit(mixed) @ text.T

    before = forward(unit(images))[3]
    momentum = [np.zeros_like(down), np.zeros_like(up)]
    for epoch in range(50):
        hidden, out, mixed, logits = forward(seen)
        to_unit = scale * (softmax(logits) - np.eye(8)) @ text / 8
        along = (to_unit * unit(mixed)).sum(axis=1, keepdims=True) * unit(mixed)
        to_out = 0.2 * (to_unit - along) / np.linalg.norm(mixed, axis=1, keepdims=True) * (out > 0)
        to_hidden = to_out @ up * (hidden > 0)
        rate = 1e-5 if epoch == 0 else 1e-3 * (1 + math.cos(math.pi * (epoch - 1) / 50))
        for place, gradient in enumerate((to_hidden.T @ seen + 5e-4 * down, to_out.T @ hidden + 5e-4 * up)):
            momentum[place] = 0.9 * momentum[place] + gradient
        down, up = down - rate * momentum[0], up - rate * momentum[1]
    fitted = ClipAdapter().fit(few, classifier, seed=4)
    expected = forward(unit(images))[3]
    assert np.abs(expected - before).max() > 0.01
    assert_close(fitted.logits(images), expected)
    assert fitted.trained_parameters == 2 * 48 * 192
    assert fitted.selected_on == ""
    assert fitted.linear is None


@pytest.mark.parametrize(("shots_a_class", "classes", "epochs"), [(1, 8, 50), (4, 8, 100), (8, 8, 200), (16, 1000, 50)])
def test_epochs(shots_a_class: int, classes: int, epochs: int) -> None:
    from taskres_hf.methods.clip_adapter import _epochs

    assert _epochs(shots_a_class, classes) == epochs
