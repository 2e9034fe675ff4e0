"""CLIP-Adapter (IJCV 2024, arXiv 2110.04544, section 3.2): a bottleneck after the image tower, mixed with what it gets.

    g      = r * relu(B relu(A f)) + (1 - r) * f
    logits = s * norm(g).u_k

`f` is a picture's embedding, A [D / 4, D], B [D, D / 4], no biases. The length of `f` does not matter: g follows it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from ..training.recipes import Recipe, epoch_batches, learning_rate
from .method import Fitted, Method, register_method
from .tip_adapter import Shots, in_parts

_RATIO = 0.2
_MANY_CLASSES = 1000


class ClipAdapter(Method):
    """CLIP-Adapter on the image side.

    The paper chooses the ratio r by dataset; the published code has r = 0.2, which is taken here for all. It is trained
    by CoOp's trainer, and no settings of its own are published with the code: these are CoOp's (SGD, learning rate
    2e-3, momentum 0.9, weight decay 5e-4, batch 32, a warm-up epoch at 1e-5, cosine, 50, 100 or 200 epochs for 1, for
    2 and 4, for 8 and 16 shots; with ImageNet's 1,000 classes 50). The last epoch is kept: nothing is selected. A and
    B start as `torch.nn.Linear` does, drawn from the seed.
    """

    name = "clip-adapter"
    title = "CLIP-Adapter (ratio 0.2)"
    source = "Gao et al., IJCV 2024, arXiv 2110.04544"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        down, up = _train(shots, seed)

        def logits(images: Tensor) -> Tensor:
            return shots.zero_shot(_adapted(images, down, up))

        return Fitted(
            in_parts(logits, shots.keys), down.numel() + up.numel(), not_linear=(
                "Two layers with a ReLU change the picture's embedding before it meets the text: no weight per class "
                "gives these logits."
            ),
        )  # fmt: skip


def _adapted(images: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.normalize(_RATIO * F.relu(F.relu(images @ down.T) @ up.T) + (1 - _RATIO) * images, dim=-1)


def _epochs(shots: int, classes: int) -> int:
    """CoOp's."""
    if shots <= 1 or classes >= _MANY_CLASSES:
        return 50
    return 100 if shots < 8 else 200


def _train(shots: Shots, seed: int) -> tuple[Tensor, Tensor]:
    """A and B."""
    dim = shots.text.shape[1]
    hidden = max(1, dim // 4)
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for outputs, inputs in ((hidden, dim), (dim, hidden)):
        drawn = (2 * torch.rand(outputs, inputs, generator=generator) - 1) / inputs**0.5
        parameters.append(drawn.to(shots.text).requires_grad_())
    epochs = _epochs(int(torch.bincount(shots.labels).max()), len(shots.text))
    recipe = Recipe("clip-adapter", 2e-3, 5e-4, epochs, train_batch_size=32)
    optimizer = torch.optim.SGD(parameters, lr=recipe.warmup_lr, momentum=0.9, weight_decay=recipe.weight_decay)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, epoch)
        for rows, views in epoch_batches(len(shots.labels), len(shots.views), recipe.train_batch_size, seed, epoch):
            images, labels = shots.views[views, rows], shots.labels[rows]
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(shots.zero_shot(_adapted(images, *parameters)), labels).backward()
            optimizer.step()
    down, up = (parameter.detach() for parameter in parameters)
    return down, up


register_method(ClipAdapter.name, ClipAdapter)
