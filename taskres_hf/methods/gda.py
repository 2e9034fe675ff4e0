"""GDA: Gaussian discriminant analysis of the shots beside the text classifier, in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .inputs import class_sums, samples, text_rows
from .method import Fitted, Linear, Method, register_method
from .selection import CROSS_VALIDATION, NOTHING, cross_validated

FACTORS = tuple(10.0**power for power in range(-4, 3))
ONE_SHOT_FACTOR, TWO_SHOTS_FACTOR = 1e-3, 0.1  # what the authors' validation sets chose most often at so many shots


class GDA(Method):
    """logits = s f . u_k + a (f . w_k + b_k), with `w`, `b` of Gaussians that share one covariance.

    `mu_k` are the class means of M unit-length samples (each view is one), S is their scatter around them, and
    P = D (S + trace(S) / (M - 1) I)^-1; then w_k = P mu_k and b_k = -log K - mu_k . P mu_k / 2. Without scatter (one
    plain picture a class) P is zero and the classifier is zero-shot. A class without shots gets the mean of the
    others' `w` and `b`, so that its text alone speaks for or against it.

    The published code chooses `a` on a full validation split; here the same grid, by cross-validation on the shots.
    With two plain pictures a class the Gaussians have no scatter without those held out: nothing can be chosen then.
    """

    name = "gda"
    title = "GDA"
    source = "Wang et al. 2024, arXiv 2402.04087, section 3.2"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        factor, selected_on = self._factor(features, classifier)
        linear = _combine(classifier, discriminant(features, len(classifier.base)), factor)
        trained = linear.weight.numel() + len(linear.weight)
        return Fitted.of(linear, trained, selected={"factor": factor}, selected_on=selected_on)

    def _factor(self, features: ImageFeatures, classifier: TaskResClassifier) -> tuple[float, str]:
        fitted: dict[tuple[int, ...], Linear] = {}

        def logits_of(factor: float, train_rows: Tensor, held_rows: Tensor) -> Tensor:
            fold = tuple(held_rows.tolist())
            if fold not in fitted:
                fitted[fold] = discriminant(features.select(train_rows.tolist()), len(classifier.base))
            return _combine(classifier, fitted[fold], factor).logits(features.image_embeds[0, held_rows])

        # As published; the log loss would judge how large the logits are, and takes factors far too small.
        chosen = cross_validated(features.labels, FACTORS, logits_of, by="accuracy")
        if chosen is None:
            return ONE_SHOT_FACTOR, NOTHING
        if not any(bool(gaussians.weight.any()) for gaussians in fitted.values()):
            return TWO_SHOTS_FACTOR, "nothing (two plain shots a class)"
        return chosen, CROSS_VALIDATION


def discriminant(features: ImageFeatures, classes: int) -> Linear:
    """`w` [K, D] and `b` [K] of the Gaussians alone, fp64."""
    images, labels = samples(features)
    images = images.double()
    sums, counts = class_sums(images, labels, classes)
    means = sums / counts.clamp_min(1)[:, None]
    centred = images - means[labels]
    scatter = centred.T @ centred
    ridge = float(scatter.trace()) / max(len(images) - 1, 1)
    if ridge <= torch.finfo(torch.float32).eps ** 2:  # rounding of equal pictures is no scatter
        weight = torch.zeros_like(means)
    else:
        scatter.diagonal().add_(ridge)
        weight = images.shape[1] * torch.linalg.solve(scatter, means.T).T
    bias = -math.log(classes) - (weight * means).sum(dim=1) / 2
    weight[counts == 0], bias[counts == 0] = weight[counts > 0].mean(dim=0), bias[counts > 0].mean()
    return Linear(weight, bias)


def _combine(classifier: TaskResClassifier, gaussians: Linear, factor: float) -> Linear:
    assert gaussians.bias is not None
    text = text_rows(classifier, gaussians.weight)
    weight = classifier.logit_scale * text + factor * gaussians.weight
    return Linear(weight.float(), (classifier.logit_bias + factor * gaussians.bias).float())


register_method(GDA.name, GDA)
