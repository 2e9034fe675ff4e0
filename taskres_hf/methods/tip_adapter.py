"""Tip-Adapter and Tip-Adapter-F (ECCV 2022, arXiv 2207.09519, sections 3.1 and 3.2): the shots as a cache.

    logits = s * f.u_k + a * sum of exp(-b * (1 - f.key_i)) over the shots i of class k

`f` is a picture's embedding, `u_k` a class's text embedding, both of unit length, `s` the logit scale. The key of a
shot is the mean of its views' raw embeddings, then of unit length. Tip-Adapter trains nothing; Tip-Adapter-F starts
there and trains the keys. Published are a and b for s = 100; for another scale `a` is taken in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

# Within the limits of the published search (b from 0.1 to 7 ... 13 and a from 0.1 to 3 ... 13, by dataset), with its
# start values a = b = 1, which hold where nothing can be selected.
ALPHAS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 7.0, 13.0)
BETAS = (0.5, 1.0, 2.0, 4.0, 7.0, 12.0)
START_ALPHA, START_BETA = 1.0, 1.0
_EPOCHS = 20
_KEPT_EPOCHS = (5, 10, 15, 20)
_BATCH = 256
_MOST_AT_ONCE = 2**25  # similarities of pictures and keys in memory


@dataclass(frozen=True)
class Shots:
    """The shots and the text, as cache methods take them.

    Attributes:
        views: [V, N, D] of unit length. keys: [N, D], the mean of the raw views, of unit length. labels: [N].
        text: `u` [K, D] of unit length. scale, bias: of the logits.
    """

    views: Tensor
    keys: Tensor
    labels: Tensor
    text: Tensor
    scale: float
    bias: float

    @classmethod
    def of(cls, features: ImageFeatures, classifier: TaskResClassifier) -> Shots:
        """On the classifier's device, in fp32."""
        raw = features.image_embeds.to(classifier.base)
        return cls(
            F.normalize(raw, dim=-1), F.normalize(raw.mean(dim=0), dim=-1), features.labels.to(raw.device),
            F.normalize(classifier.base, dim=-1), classifier.logit_scale, classifier.logit_bias,
        )  # fmt: skip

    def at(self, rows: Tensor) -> Shots:
        """Some of the shots."""
        return replace(self, views=self.views[:, rows], keys=self.keys[rows], labels=self.labels[rows])

    def zero_shot(self, images: Tensor) -> Tensor:
        """Logits [M, K] of images [M, D] of unit length."""
        return self.scale * images @ self.text.T + self.bias

    def weight(self, alpha: float) -> float:
        """The cache's weight beside logits of this scale."""
        return alpha * self.scale / 100.0


def cache_sums(similarity: Tensor, labels: Tensor, classes: int, beta: float, values: Tensor | None = None) -> Tensor:
    """The sum [M, K] of `values_i * exp(-beta * (1 - similarity_i))` over the keys i of each class.

    Args:
        similarity: of N keys and M images, [N, M]. labels: of the keys, [N]. classes: K. values: [N], by default ones.
    """
    affinity = torch.exp(beta * similarity - beta)
    if values is not None:
        affinity = affinity * values[:, None]
    return affinity.new_zeros(classes, affinity.shape[1]).index_add(0, labels, affinity).T


def cached_logits(shots: Shots, keys: Tensor, alpha: float, beta: float, images: Tensor) -> Tensor:
    """Logits [M, K] of images [M, D] of unit length, with keys [N, D]."""
    sums = cache_sums(keys @ images.T, shots.labels, len(shots.text), beta)
    return shots.zero_shot(images) + shots.weight(alpha) * sums


def not_linear(
    logits: Callable[[Tensor], Tensor], trained: int, selected: dict[str, Any], was_selected: bool
) -> Fitted:
    """A fitted cache, which cannot be saved as a residual.

    Args:
        selected: its numbers. was_selected: whether by cross-validation; they are the start values otherwise.
    """
    why = (
        "Each logit holds an exponential of the similarity to every shot, which no weight per class gives: the shots "
        "would have to be kept beside the classifier."
    )
    selected_on = CROSS_VALIDATION if was_selected else NOTHING
    return Fitted(logits, trained, not_linear=why, selected=selected, selected_on=selected_on)


def in_parts(logits_of: Callable[[Tensor], Tensor], keys: Tensor) -> Callable[[Tensor], Tensor]:
    """From a function of unit-length images [B, D] to one of any length and number.

    Args:
        keys: [N, D], whose device and dtype the images are brought to; N similarities of each are in memory.
    """
    size = max(1, _MOST_AT_ONCE // max(len(keys), 1))

    @torch.no_grad()
    def logits(image_embeds: Tensor) -> Tensor:
        return torch.cat([logits_of(F.normalize(part.to(keys), dim=-1)) for part in image_embeds.split(size)])

    return logits


def train_with_adamw(
    start: Sequence[Tensor],
    logits_of: Callable[..., Tensor],
    shots: Shots,
    keep: Sequence[int],
    *,
    seed: int,
    learning_rate: float,
    eps: float,
    weight_decay: float,
) -> dict[int, list[Tensor]]:
    """Train with cross-entropy: AdamW, a cosine down to 0 stepped once a batch of 256; view e mod V in epoch e.

    Args:
        start: what is trained; not changed. logits_of: images [B, D] and what is trained to logits [B, K].
        keep: epochs, ascending; the last is the number of epochs.

    Returns:
        What was trained, after each epoch of `keep`.
    """
    parameters = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, eps=eps, weight_decay=weight_decay, fused=True)
    count = len(shots.labels)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, keep[-1] * -(-count // _BATCH))
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for epoch in range(keep[-1]):
        images = shots.views[epoch % len(shots.views)]
        for rows in torch.randperm(count, generator=generator).to(images.device).split(_BATCH):
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(logits_of(images[rows], *parameters), shots.labels[rows]).backward()
            optimizer.step()
            schedule.step()
        if epoch + 1 in keep:
            kept[epoch + 1] = [parameter.detach().clone() for parameter in parameters]
    return kept


class TipAdapter(Method):
    """Tip-Adapter, training-free.

    The published code searches a and b on the full validation split (ImageNet: on the test split); here they are
    selected by cross-validation on the shots.
    """

    name = "tip-adapter"
    title = "Tip-Adapter"
    source = "Zhang et al., ECCV 2022, arXiv 2207.09519"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        classes = len(shots.text)

        @lru_cache(maxsize=1)  # the rows of a fold are the same tensors for all candidates; those of one b are together
        def parts(beta: float, train_rows: Tensor, held_rows: Tensor) -> tuple[Tensor, Tensor]:
            images, known = shots.keys[held_rows], shots.at(train_rows)
            return shots.zero_shot(images), cache_sums(known.keys @ images.T, known.labels, classes, beta)

        def logits_of(candidate: tuple[float, float], train_rows: Tensor, held_rows: Tensor) -> Tensor:
            zero_shot, sums = parts(candidate[0], train_rows, held_rows)
            return zero_shot + shots.weight(candidate[1]) * sums

        chosen = cross_validated(shots.labels, list(product(BETAS, ALPHAS)), logits_of)
        beta, alpha = chosen or (START_BETA, START_ALPHA)
        logits = in_parts(lambda images: cached_logits(shots, shots.keys, alpha, beta, images), shots.keys)
        return not_linear(logits, 0, {"alpha": alpha, "beta": beta}, chosen is not None)


class TipAdapterF(Method):
    """Tip-Adapter-F: the keys are trained.

    Published: AdamW, learning rate 1e-3, eps 1e-4, weight decay 0.01 (torch's default), 20 epochs (EuroSAT: 100), batch
    256, a fresh augmented pass an epoch. It keeps the epoch with the best test accuracy, then searches a and b on the
    full validation split; here the epoch (5, 10, 15 or 20), a and b are selected by cross-validation on the shots.
    """

    name = "tip-adapter-f"
    title = "Tip-Adapter-F"
    source = "Zhang et al., ECCV 2022, arXiv 2207.09519"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        classes = len(shots.text)

        @lru_cache(maxsize=1)
        def trained(train_rows: Tensor) -> dict[int, Tensor]:
            return self._train(shots.at(train_rows), seed)

        @lru_cache(maxsize=1)
        def parts(epoch: int, beta: float, train_rows: Tensor, held_rows: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = shots.keys[held_rows], shots.labels[train_rows]
            similarity = trained(train_rows)[epoch] @ images.T
            return shots.zero_shot(images), cache_sums(similarity, labels, classes, beta)

        def logits_of(candidate: tuple[int, float, float], train_rows: Tensor, held_rows: Tensor) -> Tensor:
            zero_shot, sums = parts(*candidate[:2], train_rows, held_rows)
            return zero_shot + shots.weight(candidate[2]) * sums

        chosen = cross_validated(shots.labels, list(product(_KEPT_EPOCHS, BETAS, ALPHAS)), logits_of)
        epoch, beta, alpha = chosen or (_EPOCHS, START_BETA, START_ALPHA)
        keys = self._train(shots, seed)[epoch]
        logits = in_parts(lambda images: cached_logits(shots, keys, alpha, beta, images), keys)
        return not_linear(logits, keys.numel(), {"epoch": epoch, "alpha": alpha, "beta": beta}, chosen is not None)

    def _train(self, shots: Shots, seed: int) -> dict[int, Tensor]:
        def logits_of(images: Tensor, keys: Tensor) -> Tensor:
            return cached_logits(shots, keys, START_ALPHA, START_BETA, images)

        kept = train_with_adamw(
            [shots.keys], logits_of, shots, _KEPT_EPOCHS, seed=seed, learning_rate=1e-3, eps=1e-4, weight_decay=0.01
        )
        return {epoch: tensors[0] for epoch, tensors in kept.items()}


register_method(TipAdapter.name, TipAdapter)
register_method(TipAdapterF.name, TipAdapterF)
