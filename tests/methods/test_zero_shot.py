from __future__ import annotations

import torch
from formulas import assert_close, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.zero_shot import ZeroShot
from taskres_hf.residual import TaskResClassifier


def test_formula(shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    fitted = ZeroShot().fit(shots, classifier)
    assert_close(fitted.logits(images), classifier.logit_scale * unit(images) @ unit(classifier.base).T, 1e-6)


def test_with_the_bias_of_siglip(shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    biased = TaskResClassifier(classifier.base, logit_bias=-12.5)
    torch.testing.assert_close(ZeroShot().fit(shots, biased).logits(images), biased.zero_shot_logits(images))
