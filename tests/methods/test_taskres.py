from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import assert_close, flat, unit

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.taskres import TaskResAutoV1, TaskResEnhanced, TaskResPaper
from taskres_hf.residual import TaskResClassifier
from taskres_hf.training.enhanced_base import enhance


def _train(
    features: ImageFeatures, frozen: torch.Tensor, scale: float, rate: float, decay: float, penalty: float
) -> torch.Tensor:
    """100 epochs of one batch; the trained rows [K, D]."""
    embeds, labels = map(torch.from_numpy, flat(features))
    residual = torch.zeros_like(frozen, requires_grad=True)
    optimizer = torch.optim.Adam([residual], weight_decay=decay)
    for epoch in range(100):
        now = 1e-5 if epoch == 0 else rate * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 100))
        optimizer.param_groups[0]["lr"] = now
        logits = scale * embeds @ torch.nn.functional.normalize(frozen + 0.5 * residual, dim=1).T
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(logits, labels) + penalty * (0.5 * residual).pow(2).sum()).backward()
        optimizer.step()
    return (frozen + 0.5 * residual).detach()


def test_auto_v1(shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    text = classifier.base.double()
    penalty = 3 / (len(shots) / 8) / float(text.pow(2).sum(dim=1).mean())
    rate = 0.035 * float(text.pow(2).mean().sqrt()) / 0.5
    weight = _train(shots, text, classifier.logit_scale, rate, 0.0, penalty)
    expected = classifier.logit_scale * unit(images) @ unit(weight).T
    assert np.abs(expected - classifier.logit_scale * unit(images) @ unit(text).T).max() > 0.5
    assert_close(TaskResAutoV1().fit(shots, classifier).logits(images), expected)


def test_as_published(shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    weight = _train(shots, classifier.base.double(), classifier.logit_scale, 2e-3, 5e-4, 0.0)
    expected = classifier.logit_scale * unit(images) @ unit(weight).T
    assert_close(TaskResPaper().fit(shots, classifier).logits(images), expected)


def test_on_an_enhanced_base(
    shots: ImageFeatures, whole_model: TaskResCLIPForImageClassification, images: torch.Tensor
) -> None:
    classifier = whole_model.classifier
    head = TaskResClassifier(classifier.base, 0.5, classifier.logit_scale)
    enhance(whole_model, head, shots, 1)
    weight = _train(shots, head.frozen_weight().double(), classifier.logit_scale, 2e-3, 5e-4, 0.0)
    expected = classifier.logit_scale * unit(images) @ unit(weight).T
    fitted = TaskResEnhanced().fit(shots, classifier, model=whole_model)
    assert_close(fitted.logits(images), expected)
    projection = whole_model.clip.text_projection.weight
    assert fitted.trained_parameters == classifier.base.numel() + projection.numel()


@pytest.mark.parametrize("alpha", [0.5, 0.05])
def test_alpha_is_the_classifiers_own(shots: ImageFeatures, classifier: TaskResClassifier, alpha: float) -> None:
    other = TaskResClassifier(classifier.base, alpha, classifier.logit_scale)
    moved = TaskResPaper().fit(shots, other).linear
    assert moved is not None
    apart = float((moved.weight - classifier.logit_scale * torch.nn.functional.normalize(classifier.base)).abs().max())
    assert (apart > 0.1) == (alpha == 0.5)
