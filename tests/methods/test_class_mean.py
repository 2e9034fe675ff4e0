from __future__ import annotations

import numpy as np
import torch
from formulas import assert_close, flat, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.class_mean import ClassMean
from taskres_hf.residual import TaskResClassifier


def test_formula(views: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    embeds, labels = flat(views)
    means = np.stack([embeds[labels == label].mean(axis=0) for label in range(8)])
    expected = classifier.logit_scale * unit(images) @ unit(means).T
    assert_close(ClassMean().fit(views, classifier).logits(images), expected, 1e-6)


def test_a_class_without_shots_keeps_its_text(
    shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    rest = shots.select([row for row, label in enumerate(shots.labels.tolist()) if label != 3])
    fitted = ClassMean().fit(rest, classifier)
    torch.testing.assert_close(fitted.logits(images)[:, 3], classifier.zero_shot_logits(images)[:, 3])
    assert fitted.trained_parameters == 7 * images.shape[1]
