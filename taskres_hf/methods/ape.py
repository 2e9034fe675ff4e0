"""APE and APE-T (ICCV 2023, arXiv 2304.01195, sections 3.2 to 3.4): a cache over the channels that tell classes apart.

Channels are ranked, for text and shots of unit length, by

    score_d = -w1 * (mean of x_d * y_d over all pairs x, y of two classes) + w2 * (variance over classes of u_kd)

APE keeps the Q highest, cuts text, keys and picture to them, all of unit length again (primes below), and weighs each
shot by how little the text agrees with its label:

    logits = s * f.u_k + a * sum of r_i * exp(-b * (1 - f'.key'_i)) over the shots i of class k
    r_i    = exp(g * log2(1 / p_i)),  p_i = softmax over classes of key'_i.u'_k, at the label (no logit scale)

APE-T trains one residual per class on the kept channels, added to the class's text and to all its keys (no
normalisation after it), and a weight for each shot:

    logits = s * f.(u_k + x_k) + a * sum of v_i * exp(-b * (1 - f.(key_i + x_k))) over the shots i of class k
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .method import Fitted, Method, register_method
from .selection import cross_validated
from .tip_adapter import START_ALPHA, START_BETA, Shots, cache_sums, in_parts, not_linear, train_with_adamw

# The published numbers of channels are set by dataset, for RN50's 1,024: 400, 500, 500, 700 (4 sets) and 800 (4 sets)
# for APE; 500, 700, 800 (5 sets) and 900 (4 sets) for APE-T. The median of the eleven, as a share of D.
_SHARE, _SHARE_TRAINED = 700 / 1024, 800 / 1024
_WEIGHTS, _WEIGHTS_TRAINED = (0.5, 0.5), (0.2, 0.8)
# The published search: b and a from 0.1 to 7, g from 0 to 1; start values 1, 1 and 0.1.
_ALPHAS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 7.0)
_BETAS = (0.5, 1.0, 2.0, 4.0, 7.0)
_GAMMAS = (0.0, 0.1, 0.3, 0.6, 0.9)
_START_GAMMA = 0.1
_TINY = 1e-6  # keeps the logarithm finite, as published
_KEPT_EPOCHS = (10, 20, 30)


def kept_channels(shots: Shots, share: float, weights: tuple[float, float], text_only: bool) -> Tensor:
    """The channels with the highest score, ascending.

    Args:
        share: of all D. weights: `w1`, `w2`. text_only: the first term over the text alone, without the shots.
    """
    classes, dim = shots.text.shape
    sums, counts = shots.text.clone(), shots.text.new_ones(classes)
    if not text_only:
        sums.index_add_(0, shots.labels, shots.keys)
        counts += torch.bincount(shots.labels, minlength=classes)
    pairs = (counts.sum() ** 2 - counts.pow(2).sum()).clamp_min(1.0)
    between = (sums.sum(dim=0).pow(2) - sums.pow(2).sum(dim=0)) / pairs
    variance = shots.text.var(dim=0, correction=min(1, classes - 1))
    score = -weights[0] * between + weights[1] * variance
    return score.topk(max(1, round(share * dim))).indices.sort().values


class APE(Method):
    """APE, training-free.

    The published code sets Q by dataset and searches a, b and g on the full validation split. Here Q is 700 / 1024 of
    the channels for all, the median of what is published, and a, b and g are selected by cross-validation on the shots.
    The published text is templates and sentences of a language model; here it is the base classifier's, as for all.
    """

    name = "ape"
    title = "APE"
    source = "Zhu et al., ICCV 2023, arXiv 2304.01195"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        fit = lru_cache(maxsize=1)(lambda rows: _Refined(shots.at(rows)))

        @lru_cache(maxsize=1)  # candidates of one b and g are together
        def parts(beta: float, gamma: float, train_rows: Tensor, held_rows: Tensor) -> tuple[Tensor, Tensor]:
            images = shots.keys[held_rows]
            return shots.zero_shot(images), fit(train_rows).sums(images, beta, gamma)

        def logits_of(candidate: tuple[float, float, float], train_rows: Tensor, held_rows: Tensor) -> Tensor:
            zero_shot, sums = parts(*candidate[:2], train_rows, held_rows)
            return zero_shot + shots.weight(candidate[2]) * sums

        chosen = cross_validated(shots.labels, list(product(_BETAS, _GAMMAS, _ALPHAS)), logits_of)
        beta, gamma, alpha = chosen or (START_BETA, _START_GAMMA, START_ALPHA)
        refined = _Refined(shots)

        def logits(images: Tensor) -> Tensor:
            return shots.zero_shot(images) + shots.weight(alpha) * refined.sums(images, beta, gamma)

        selected = {"alpha": alpha, "beta": beta, "gamma": gamma}
        return not_linear(in_parts(logits, shots.keys), 0, selected, chosen is not None)


class _Refined:
    """The cache on the kept channels."""

    def __init__(self, shots: Shots) -> None:
        self.channels = kept_channels(shots, _SHARE, _WEIGHTS, text_only=False)
        self.labels, self.classes = shots.labels, len(shots.text)
        self.keys = self._cut(shots.keys)
        agreement = (self.keys @ self._cut(shots.text).T).softmax(dim=1).gather(1, shots.labels[:, None])[:, 0]
        self.divergence = torch.log2((1 + _TINY) / (agreement + _TINY))

    def _cut(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors[:, self.channels], dim=-1)

    def sums(self, images: Tensor, beta: float, gamma: float) -> Tensor:
        values = torch.exp(gamma * self.divergence)
        return cache_sums(self.keys @ self._cut(images).T, self.labels, self.classes, beta, values)


class APET(Method):
    """APE-T: a residual on the kept channels, shared by a class's text and its keys.

    Published: AdamW, weight decay 0.1, batch 256, a fresh augmented pass an epoch, cosine; by dataset the learning rate
    (1e-3, four sets 1e-4), eps (mostly 1e-3), Q and the epochs (20 to 200). Here 1e-3, 1e-3, 800 / 1024 of the channels
    (the median) and at most 30 epochs for all. The published code keeps the best epoch and searches a and b on the full
    validation split; here the epoch (10, 20 or 30), a and b are selected by cross-validation on the shots.
    """

    name = "ape-t"
    title = "APE-T"
    source = "Zhu et al., ICCV 2023, arXiv 2304.01195"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        trained = lru_cache(maxsize=1)(lambda rows: _train(shots.at(rows), seed))

        @lru_cache(maxsize=1)
        def parts(epoch: int, beta: float, train_rows: Tensor, held_rows: Tensor) -> tuple[Tensor, Tensor]:
            return _terms(shots.at(train_rows), beta, shots.keys[held_rows], *trained(train_rows)[epoch])

        def logits_of(candidate: tuple[int, float, float], train_rows: Tensor, held_rows: Tensor) -> Tensor:
            text, sums = parts(*candidate[:2], train_rows, held_rows)
            return text + shots.weight(candidate[2]) * sums

        chosen = cross_validated(shots.labels, list(product(_KEPT_EPOCHS, _BETAS, _ALPHAS)), logits_of)
        epoch, beta, alpha = chosen or (_KEPT_EPOCHS[-1], START_BETA, START_ALPHA)
        residual, values, channels = _train(shots, seed)[epoch]

        def logits(images: Tensor) -> Tensor:
            text, sums = _terms(shots, beta, images, residual, values, channels)
            return text + shots.weight(alpha) * sums

        selected = {"epoch": epoch, "alpha": alpha, "beta": beta}
        trained_parameters = residual.numel() + values.numel()
        return not_linear(in_parts(logits, shots.keys), trained_parameters, selected, chosen is not None)


def _terms(
    shots: Shots, beta: float, images: Tensor, residual: Tensor, values: Tensor, channels: Tensor
) -> tuple[Tensor, Tensor]:
    """The text's logits [M, K] and the cache's sums [M, K], residual [K, Q] and values [N] applied."""
    shift = residual @ images[:, channels].T  # of the similarity to a class's text, and to each of its keys
    similarity = shots.keys @ images.T + shift[shots.labels]
    sums = cache_sums(similarity, shots.labels, len(shots.text), beta, values)
    return shots.zero_shot(images) + shots.scale * shift.T, sums


def _train(shots: Shots, seed: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Residual [K, Q], values [N] and channels [Q] after each of the epochs that are kept."""
    channels = kept_channels(shots, _SHARE_TRAINED, _WEIGHTS_TRAINED, text_only=True)

    def logits_of(images: Tensor, residual: Tensor, values: Tensor) -> Tensor:
        text, sums = _terms(shots, START_BETA, images, residual, values, channels)
        return text + shots.weight(START_ALPHA) * sums

    start = [shots.text.new_zeros(len(shots.text), len(channels)), shots.text.new_ones(len(shots.keys))]
    kept = train_with_adamw(
        start, logits_of, shots, _KEPT_EPOCHS, seed=seed, learning_rate=1e-3, eps=1e-3, weight_decay=0.1
    )
    return {epoch: (residual, values, channels) for epoch, (residual, values) in kept.items()}


register_method(APE.name, APE)
register_method(APET.name, APET)
