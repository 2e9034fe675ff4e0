"""ProKeR (CVPR 2025, arXiv 2501.11175): kernel ridge regression of what zero-shot gets wrong on the shots.

    logits = s * (f.u_k + k(f, shots) A)
    A      = (K / c + I)^-1 (Y - Z),   k(x, y) = exp(-b * (1 - x.y))

K [N, N] is the kernel of the shots with each other, Y their labels as 0 and 1, Z their cosines with the text. This is
what the published code computes, save for `s`, which changes no prediction. Each view is a sample of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .method import Fitted, Method, register_method
from .selection import CROSS_VALIDATION, NOTHING, cross_validated
from .tip_adapter import Shots, in_parts

# The published search for RN50: b from 0.5 to 3 in 20 steps, c from 0.001 to 1 in 10 (SUN397: both to 10).
_BETAS = (0.5, 1.0, 1.7, 3.0)
_LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_START = (3.0, 0.05)  # published for one shot, found on ImageNet
_MOST_SAMPLES = 16_000
_MOST_TO_SELECT_ON = 4_000


class ProKeR(Method):
    """ProKeR, training-free, in closed form.

    The published code searches b and c on the full validation split of each dataset, or takes ImageNet's (one shot: 3
    and 0.05, which is taken here where nothing can be selected). Here they are selected by cross-validation on the
    shots; with more than 4,000 of them, on those of as many classes, drawn from the seed, as have about 4,000. Of
    views, as many are used as make at most 16,000 samples, at least one.
    """

    name = "proker"
    title = "ProKeR"
    source = "Bendou et al., CVPR 2025, arXiv 2501.11175"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        shots = _with_views(shots, max(1, _MOST_SAMPLES // len(shots.labels)))
        chosen = _select(_few_classes(shots, seed))
        beta, penalty = chosen or _START
        support = shots.views.flatten(0, 1)
        kernel = _kernel(support, support, beta)
        coefficients = _coefficients(shots, kernel.double(), penalty).to(support.dtype)

        def logits(images: Tensor) -> Tensor:
            return shots.zero_shot(images) + shots.scale * _kernel(images, support, beta) @ coefficients

        return Fitted(
            in_parts(logits, support), coefficients.numel(), not_linear=(
                "Each logit holds a Gaussian kernel of the picture and every shot, which no weight per class gives: "
                "the shots would have to be kept beside the classifier."
            ),
            selected={"beta": beta, "lambda": penalty}, selected_on=CROSS_VALIDATION if chosen else NOTHING,
        )  # fmt: skip


def _kernel(images: Tensor, others: Tensor, beta: float) -> Tensor:
    return torch.exp(beta * (images @ others.T) - beta)


def _coefficients(shots: Shots, kernel: Tensor, penalty: float) -> Tensor:
    """A [V * N, K] in the kernel's dtype: fp32 is enough to select by, and takes half the time of fp64."""
    samples = shots.views.flatten(0, 1)
    labels = F.one_hot(shots.labels, len(shots.text)).repeat(len(shots.views), 1)
    error = (labels - samples @ shots.text.T).to(kernel.dtype)
    system = kernel / penalty
    system.diagonal().add_(1.0)
    return torch.cholesky_solve(error, torch.linalg.cholesky(system))


def _select(shots: Shots) -> tuple[float, float] | None:
    @lru_cache(maxsize=1)  # candidates of one b are together
    def kernels(beta: float, train_rows: Tensor, held_rows: Tensor) -> tuple[Tensor, Tensor]:
        support = shots.at(train_rows).views.flatten(0, 1)
        return _kernel(support, support, beta), _kernel(shots.keys[held_rows], support, beta)

    def logits_of(candidate: tuple[float, float], train_rows: Tensor, held_rows: Tensor) -> Tensor:
        known, held = kernels(candidate[0], train_rows, held_rows)
        error = held @ _coefficients(shots.at(train_rows), known, candidate[1])
        return shots.zero_shot(shots.keys[held_rows]) + shots.scale * error

    return cross_validated(shots.labels, list(product(_BETAS, _LAMBDAS)), logits_of)


def _with_views(shots: Shots, views: int) -> Shots:
    return replace(shots, views=shots.views[:views])


def _few_classes(shots: Shots, seed: int) -> Shots:
    """The shots of some classes, and only their text, where there are too many to solve for often."""
    samples = shots.views.shape[0] * shots.views.shape[1]
    present, classes = shots.labels.unique(return_inverse=True)
    if samples <= _MOST_TO_SELECT_ON:
        return shots
    count = max(2, len(present) * _MOST_TO_SELECT_ON // samples)
    order = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed)).to(classes.device)
    rank = order.argsort()[classes]  # a class's place in the draw, for each shot
    rows = torch.nonzero(rank < count).flatten()
    some = shots.at(rows)
    return replace(some, labels=rank[rows], text=shots.text[present[order[:count]]])


register_method(ProKeR.name, ProKeR)
