from __future__ import annotations

import numpy as np
import pytest
import torch
from adam import adam
from formulas import Array, assert_close, softmax, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.ape import APE, APET
from taskres_hf.residual import TaskResClassifier

which_shots = pytest.mark.parametrize("which", ["shots", "views"])


def _keys(features: ImageFeatures) -> Array:
    return unit(features.image_embeds.numpy().astype(np.float64).mean(axis=0))


def _channels(text: Array, members: list[list[Array]], weights: tuple[float, float], count: int) -> list[int]:
    """All pairs of two classes, one by one."""
    products = [
        one * other
        for here, first in enumerate(members)
        for there, second in enumerate(members)
        if here != there
        for one in first
        for other in second
    ]
    score = -weights[0] * np.mean(products, axis=0) + weights[1] * text.var(axis=0, ddof=1)
    return sorted(np.argsort(-score)[:count].tolist())


@which_shots
def test_formula(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    features: ImageFeatures = request.getfixturevalue(which)
    fitted = APE().fit(features, classifier)
    text, keys, labels = unit(classifier.base), _keys(features), features.labels.numpy()
    members = [[text[k], *keys[labels == k]] for k in range(8)]
    kept = _channels(text, members, (0.5, 0.5), round(192 * 700 / 1024))
    queries = unit(images)
    cut_keys = unit(keys[:, kept])
    agreement = softmax(cut_keys @ unit(text[:, kept]).T)[np.arange(len(labels)), labels]
    values = np.exp(fitted.selected["gamma"] * np.log2((1 + 1e-6) / (agreement + 1e-6)))
    affinity = np.exp(-fitted.selected["beta"] * (1 - unit(queries[:, kept]) @ cut_keys.T)) * values
    cache = fitted.selected["alpha"] * classifier.logit_scale / 100 * affinity @ np.eye(8)[labels]
    assert_close(fitted.logits(images), classifier.logit_scale * queries @ text.T + cache)
    assert np.abs(cache).max() > 0.01
    assert fitted.trained_parameters == 0


@which_shots
def test_training_the_residual(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    """AdamW 1e-3, eps 1e-3, decay 0.1, 30 epochs of one batch here; a = b = 1 while it trains."""
    features: ImageFeatures = request.getfixturevalue(which)
    text, keys, labels = unit(classifier.base), _keys(features), features.labels.numpy()
    kept = _channels(text, [[row] for row in text], (0.2, 0.8), round(192 * 800 / 1024))
    views, scale, own = unit(features.image_embeds.numpy()), classifier.logit_scale, np.eye(8)[labels]

    def parts(queries: Array, residual: Array, beta: float) -> tuple[Array, Array]:
        moved = np.zeros_like(text)
        moved[:, kept] = residual
        return scale * queries @ (text + moved).T, np.exp(-beta * (1 - queries @ (keys + moved[labels]).T))

    def gradients(step: int, values: list[Array]) -> list[Array]:
        seen = views[step % len(views)]
        zero_shot, affinity = parts(seen, values[0], 1.0)
        error = (softmax(zero_shot + scale / 100 * affinity * values[1] @ own) - own) / len(labels)
        by_key = error[:, labels] * affinity * scale / 100
        return [(scale * error + (by_key * values[1]) @ own).T @ seen[:, kept], by_key.sum(axis=0)]

    start = [np.zeros((8, len(kept))), np.ones(len(labels))]
    history = adam(start, gradients, 30, 1e-3, 1e-3, 0.1)
    fitted = APET().fit(features, classifier)
    residual, weights = history[fitted.selected["epoch"] - 1]
    zero_shot, affinity = parts(unit(images), residual, fitted.selected["beta"])
    expected = zero_shot + fitted.selected["alpha"] * scale / 100 * affinity * weights @ own
    assert_close(fitted.logits(images), expected)
    assert np.abs(zero_shot - scale * unit(images) @ text.T).max() > 0.1
    assert fitted.selected["epoch"] in (10, 20, 30)
    assert fitted.trained_parameters == 8 * 150 + len(labels)


@pytest.mark.parametrize("method", [APE, APET])
def test_one_shot_takes_the_start_values(
    method: type[APE] | type[APET], shots: ImageFeatures, classifier: TaskResClassifier
) -> None:
    rows = [shots.labels.tolist().index(label) for label in range(8)]
    fitted = method().fit(shots.select(rows), classifier)
    start = {"epoch": 30, "alpha": 1.0, "beta": 1.0, "gamma": 0.1}
    assert start == start | fitted.selected
    assert fitted.selected_on == "nothing (one shot a class)"
