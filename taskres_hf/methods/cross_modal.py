"""The cross-modal linear probe: a class's text is one more sample of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .inputs import constant_bias, samples, text_rows
from .method import Fitted, Linear, Method, register_method

STEPS, WARMUP_STEPS, WARMUP_RATE = 12_800, 50, 1e-5
RATE, DECAY, BATCH = 1e-3, 1e-2, 32
_BLOCK = 64  # steps whose inputs are gathered at once


class CrossModal(Method):
    """logits = s f . W_k, W not normalised and from u: cross-entropy over batches of half pictures, half texts.

    AdamW, 12,800 steps, 50 of them a linear warm-up from 1e-5, then a cosine. The published code chooses learning rate
    (1e-3, 1e-4), decay (0, 1e-4, 1e-2), batch (8, 32) and step on a validation split of a few pictures a class; here
    they are fixed at 1e-3, 1e-2, 32 and the last step. A class's text sample is its row of the base classifier.

    Args:
        steps: how many, warm-up included.
    """

    name = "cross-modal"
    title = "Cross-modal linear probe"
    source = "Lin et al. 2023, arXiv 2301.06267, section 3; its code for the constants"

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        images, labels = samples(features)
        text, scale = text_rows(classifier, images), classifier.logit_scale
        weight = _train(text, images, labels, scale, self.steps, torch.Generator().manual_seed(seed))
        fitted = scale * weight
        return Fitted.of(Linear(fitted, constant_bias(classifier, fitted)), fitted.numel())


@torch.no_grad()
def _train(
    text: Tensor, images: Tensor, labels: Tensor, scale: float, steps: int, generator: torch.Generator
) -> Tensor:
    """W [K, D]. Steps are so small that calls are what they cost: no graph, no optimizer, inputs gathered in blocks."""
    both, all_labels = torch.cat([images, text]), torch.cat([labels, torch.arange(len(text))])
    picked = zip(_turns(len(images), generator), _turns(len(text), generator), strict=True)
    weight, step = text.clone(), torch.zeros(())
    gradient, first, second = (torch.zeros_like(weight) for _ in range(3))
    while (start := int(step)) < steps:
        batches = islice(picked, min(_BLOCK, steps - start))
        rows = torch.stack([torch.cat([pictures, texts + len(images)]) for pictures, texts in batches])
        inputs, truth = both[rows], F.one_hot(all_labels[rows], len(text)).to(both)
        scaled, shares = scale * inputs, (scale / rows.shape[1]) * inputs
        for number in range(len(rows)):
            error = torch.softmax(scaled[number] @ weight.T, dim=1).sub_(truth[number])
            torch.mm(error.T, shares[number], out=gradient)
            adamw(
                [weight], [gradient], [first], [second], [], [step], fused=True, amsgrad=False, maximize=False,
                lr=rate_at(start + number, steps), beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=DECAY,
            )  # fmt: skip
    return weight


def _turns(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Half batches without end: all rows in a new order each time round, what fills no half batch left out."""
    size = min(BATCH // 2, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step: 1e-5 first, a straight line to 1e-3 at step 50, then a cosine."""
    if step < WARMUP_STEPS:
        return RATE * step / WARMUP_STEPS if step else WARMUP_RATE
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / steps))


register_method(CrossModal.name, CrossModal)
