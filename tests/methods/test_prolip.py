from __future__ import annotations

import numpy as np
import pytest
import torch
from adam import adam
from formulas import Array, assert_close, softmax, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.prolip import ProLIP
from taskres_hf.residual import TaskResClassifier


@pytest.mark.parametrize("which", ["shots", "views"])
def test_formula(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    """Adam by hand, 300 steps of all shots; 33 shots of 8 classes."""
    features: ImageFeatures = request.getfixturevalue(which)
    views, text, scale = unit(features.image_embeds.numpy()), unit(classifier.base), classifier.logit_scale
    own = np.eye(8)[features.labels.numpy()]
    assert len(own) == 33

    def gradients(step: int, values: list[Array]) -> list[Array]:
        seen = views[step % len(views)]
        mapped = seen @ values[0].T
        to_unit = scale * (softmax(scale * unit(mapped) @ text.T) - own) @ text / len(own)
        along = (to_unit * unit(mapped)).sum(axis=1, keepdims=True) * unit(mapped)
        to_mapped = (to_unit - along) / np.linalg.norm(mapped, axis=1, keepdims=True)
        return [to_mapped.T @ seen + 2 * 8 / 33 * (values[0] - np.eye(192))]

    matrix = adam([np.eye(192)], gradients, 300, 1e-3, 1e-4)[-1][0]
    fitted = ProLIP().fit(features, classifier)
    expected = scale * unit(unit(images) @ matrix.T) @ text.T
    assert_close(fitted.logits(images), expected, 2e-3)
    assert np.abs(expected - scale * unit(images) @ text.T).max() > 1
    assert fitted.trained_parameters == 192 * 192
    assert fitted.selected_on == ""
    # What `not_linear` says: a weight a class would predict the same.
    same = (unit(images) @ (text @ matrix).T).argmax(axis=1)
    assert (same == fitted.logits(images).argmax(dim=1).numpy()).mean() > 0.99
