"""Nearest class mean: a class is where its shots are, whatever its name says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .inputs import class_sums, constant_bias, samples, text_rows
from .method import Fitted, Linear, Method, register_method


class ClassMean(Method):
    """logits = s f . m_k / |m_k|, with `m_k` the mean of class k's unit-length shots, all views.

    A class without shots keeps its text row, which is seldom the nearest: texts lie apart from all pictures.
    """

    name = "class-mean"
    title = "Nearest class mean"
    source = "Wang et al. 2019 (SimpleShot), arXiv 1911.04623, its variant L2N"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        images, labels = samples(features)
        sums, counts = class_sums(images, labels, len(classifier.base))
        rows = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), text_rows(classifier, images))
        weight = classifier.logit_scale * rows
        trained = int((counts > 0).sum()) * weight.shape[1]
        return Fitted.of(Linear(weight, constant_bias(classifier, weight)), trained)


register_method(ClassMean.name, ClassMean)
