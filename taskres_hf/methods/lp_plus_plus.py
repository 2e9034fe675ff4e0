"""LP++: a linear probe with a learned share of the text per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .inputs import class_sums, samples, text_rows
from .method import Fitted, Linear, Method, register_method

STEPS, TEXT_EVERY, MOMENTUM = 300, 10, 0.9
START = 250.0  # of the text's share, times the mean cosine of shots and their text


class LPPlusPlus(Method):
    """logits = f . w_k + c_k + a_k f . u_k, cross-entropy, 300 steps on all shots.

    Start: w_k the sum of class k's shots, c = 0 (published: a small random draw), every a_k = 250 times the mean over
    classes of the mean cosine of a class's shots with its text. SGD with momentum 0.9 over w and c, learning rate
    4 N / lambda_max(F^T F); every tenth step a is lowered by N / (4 max_k sum_i (f_i . u_k)^2) times its gradient,
    summed over all steps so far, as the published code does. The published code reports the step with the best
    accuracy on a validation split; here the last step stands.
    """

    name = "lp++"
    title = "LP++"
    source = "Huang et al. 2024, arXiv 2404.02285, section 3"

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        images, labels = samples(features)
        text = text_rows(classifier, images)
        weight, bias, share = self._descend(images, labels, text)
        linear = Linear(weight + share[:, None] * text, bias)
        return Fitted.of(linear, weight.numel() + bias.numel() + share.numel())

    def _descend(self, images: Tensor, labels: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, cosines = len(images), images @ text.T
        weight, counts = class_sums(images, labels, len(text))
        own = torch.zeros_like(weight[:, 0]).index_add_(0, labels, cosines.gather(1, labels[:, None])[:, 0])
        share = torch.full_like(own, START * float((own / counts.clamp_min(1))[counts > 0].mean()))
        bias = torch.zeros_like(own)
        rate = 4 * count / float(_largest_eigenvalue(images))
        share_rate = count / (4 * float(cosines.pow(2).sum(dim=0).max()))
        speed, bias_speed, summed = torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(share)
        rows = torch.arange(count)
        for step in range(1, self.steps + 1):
            error = torch.softmax(images @ weight.T + bias + share * cosines, dim=1)
            error[rows, labels] -= 1
            error /= count
            speed.mul_(MOMENTUM).add_(error.T @ images)
            bias_speed.mul_(MOMENTUM).add_(error.sum(dim=0))
            summed += (error * cosines).sum(dim=0)
            weight -= rate * speed
            bias -= rate * bias_speed
            if step % TEXT_EVERY == 0:
                share -= share_rate * summed
        return weight, bias, share


def _largest_eigenvalue(images: Tensor) -> Tensor:
    smaller = images if images.shape[0] < images.shape[1] else images.T
    largest: Tensor = torch.linalg.eigvalsh((smaller @ smaller.T).double())[-1]
    return largest


register_method(LPPlusPlus.name, LPPlusPlus)
