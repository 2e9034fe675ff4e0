"""Embeddings as the methods take them: unit length, every view a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier


def samples(features: ImageFeatures) -> tuple[Tensor, Tensor]:
    """Every view of every picture, unit length [V * N, D] fp32, and its label [V * N]."""
    embeds = F.normalize(features.image_embeds.float(), dim=-1)
    return embeds.flatten(0, 1), features.labels.repeat(len(embeds))


def text_rows(classifier: TaskResClassifier, like: Tensor) -> Tensor:
    """The base classifier's rows `u` [K, D], unit length, on the device and in the dtype of another tensor."""
    return F.normalize(classifier.base.detach(), dim=-1).to(like)


def class_sums(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The sum [K, D] of each class's samples and how many [K] there are."""
    sums = images.new_zeros(classes, images.shape[1]).index_add_(0, labels, images)
    return sums, torch.bincount(labels, minlength=classes)


def constant_bias(classifier: TaskResClassifier, like: Tensor) -> Tensor | None:
    """The base's own bias (SigLIP's), the same for all classes [K]; None where it has none (CLIP)."""
    bias = classifier.logit_bias
    return like.new_full((len(classifier.base),), bias) if bias else None
