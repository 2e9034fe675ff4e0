"""CLAP: class rows trained from the text, each held to it as far as zero-shot does well on the class's shots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from ..training.recipes import Recipe, learning_rate
from ..training.steps import loss_and_gradient
from .inputs import class_sums, constant_bias, samples
from .method import Fitted, Linear, Method, register_method

RECIPE = Recipe("clap", learning_rate=0.1, weight_decay=0.0, num_train_epochs=300)
MOMENTUM = 0.9


class CLAP(Method):
    """logits = s f . W_k / |W_k|, W from t: cross-entropy + mean_k lambda_k |W_k - t_k|^2.

    `lambda_k` is the mean zero-shot probability of class k over its shots, all views, and stays fixed (the published
    command). SGD, learning rate 0.1, momentum 0.9, batches of 256, 300 epochs, the first at 1e-5, then a cosine; of
    the V * N samples an epoch takes as many batches as the N pictures fill. Nothing is selected. A class without shots
    is held with lambda 1: nothing speaks against its text.
    """

    name = "clap"
    title = "CLAP"
    source = "Silva-Rodríguez et al. 2024, arXiv 2312.12730, section 4"

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        self.recipe = recipe

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        images, labels = samples(features)
        base = classifier.base.detach().to(images)
        # With alpha 1 the residual is W - t.
        head = TaskResClassifier(base, 1.0, classifier.logit_scale, classifier.logit_bias).to(images.device)
        held = held_to_text(head, images, labels)
        moved, speed = head.residual.data, torch.zeros_like(base)
        for epoch in range(self.recipe.num_train_epochs):
            rate = learning_rate(self.recipe, epoch)
            for rows in self._batches(len(images), len(features), seed, epoch):
                gradient = loss_and_gradient(head, images[rows], labels[rows])[2]
                speed.mul_(MOMENTUM).add_(gradient).add_(2 / len(base) * held[:, None] * moved)
                moved.sub_(speed, alpha=rate)
        weight = classifier.logit_scale * torch.nn.functional.normalize(head.weight().detach(), dim=-1)
        return Fitted.of(Linear(weight, constant_bias(classifier, weight)), weight.numel())

    def _batches(self, samples: int, pictures: int, seed: int, epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        size = self.recipe.train_batch_size
        for batch in range(max(pictures // size, 1)):
            yield order[batch * size : (batch + 1) * size]


def held_to_text(classifier: TaskResClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """`lambda` [K]: the mean zero-shot probability of each class over its samples; 1 without any."""
    right = classifier.zero_shot_logits(images).softmax(dim=1).gather(1, labels[:, None])
    sums, counts = class_sums(right, labels, len(classifier.base))
    return torch.where(counts > 0, sums[:, 0] / counts.clamp_min(1), torch.ones_like(sums[:, 0]))


register_method(CLAP.name, CLAP)
