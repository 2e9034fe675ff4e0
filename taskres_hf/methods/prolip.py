"""The linear adapter of ProLIP (arXiv 2410.05270): one square map of the image embeddings, kept near the identity.

    logits = s * norm(M f).u_k
    loss   = cross-entropy + (1 / shots) * |M - I|^2

ProLIP itself trains the image tower's last projection, from the embeddings before it. Those are not at hand where
embeddings are cached, as here: this is the form that the paper compares with it as the linear adapter, the same loss on
a D x D map after the projection. The length of `f` does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .method import Fitted, Method, register_method
from .tip_adapter import Shots, in_parts

_STEPS = 300
_LEARNING_RATE = 1e-3


class ProLIP(Method):
    """ProLIP's loss on a D x D map after the projection.

    Published, validation-free: penalty 1 / shots, Adam with eps 1e-4, 300 steps of a full batch, cosine; the learning
    rate may be any of 1e-5 to 1e-2. Here it is 1e-3, with which 300 steps reach the loss's minimum; step i takes view
    i mod V. Nothing is selected.
    """

    name = "prolip"
    title = "ProLIP (linear adapter form)"
    source = "Fahes et al., arXiv 2410.05270"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        shots = Shots.of(features, classifier)
        matrix = _train(shots)

        def logits(images: Tensor) -> Tensor:
            return shots.zero_shot(F.normalize(images @ matrix.T, dim=-1))

        return Fitted(
            in_parts(logits, shots.keys), matrix.numel(), not_linear=(
                "The mapped embedding is brought to unit length for each picture. A weight per class gives the same "
                "predictions, but other probabilities."
            ),
        )  # fmt: skip


def _train(shots: Shots) -> Tensor:
    """M [D, D]."""
    identity = torch.eye(shots.text.shape[1]).to(shots.text)
    matrix = identity.clone().requires_grad_()
    penalty = len(shots.labels.unique()) / len(shots.labels)  # 1 / (shots of a class, on average)
    optimizer = torch.optim.Adam([matrix], lr=_LEARNING_RATE, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for step in range(_STEPS):
        images = shots.views[step % len(shots.views)]
        optimizer.zero_grad()
        with torch.enable_grad():
            logits = shots.zero_shot(F.normalize(images @ matrix.T, dim=-1))
            loss = F.cross_entropy(logits, shots.labels) + penalty * (matrix - identity).pow(2).sum()
            loss.backward()
        optimizer.step()
        schedule.step()
    return matrix.detach()


register_method(ProLIP.name, ProLIP)
