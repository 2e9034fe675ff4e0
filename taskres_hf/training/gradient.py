"""The loss of a batch and its gradient with respect to the residual, by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..embedding.engines.onednn import product
from ..residual import TaskResClassifier
from .recipes import Recipe


def penalty_factor(recipe: Recipe, head: TaskResClassifier) -> float:
    """Factor `c` such that the penalty is `c * |x|^2`."""
    if not recipe.penalty:
        return 0.0
    return recipe.penalty * head.alpha**2 / float(head.base.pow(2).sum(dim=1).mean())


@torch.no_grad()
def loss_and_gradient(
    head: TaskResClassifier, images: Tensor, labels: Tensor, penalty: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, number of correct predictions, and the gradient with respect to the residual, by hand.

    With `u_k = norm(t_k + alpha x_k)` and `G = dL/du` [K, D], the chain rule through the normalisation is
    `dL/dx_k = alpha / |w_k| * (G_k - (G_k . u_k) u_k)`. Two matrix products instead of autograd's graph; a test
    holds it to autograd.

    Args:
        images: [B, D] embeddings of unit length. labels: [B]. penalty: see `penalty_factor`.

    Returns:
        loss (scalar), correct (scalar, integer), gradient [K, D].
    """
    weight = head.weight()  # a fresh tensor: reused below
    length = weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = weight.div_(length)
    logits = product(images, unit).mul_(head.logit_scale).add_(head.logit_bias)
    correct = (logits.argmax(dim=1) == labels).sum()
    log_probabilities = F.log_softmax(logits, dim=1)
    rows = labels.unsqueeze(1)
    loss = -log_probabilities.gather(1, rows).mean()
    error = log_probabilities.exp_()
    error.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=error.dtype))
    gradient = product(error.T, images.T).mul_(head.logit_scale / len(labels))
    gradient.sub_(unit * (gradient * unit).sum(dim=1, keepdim=True)).mul_(head.alpha / length)
    if penalty:
        loss = loss + penalty * head.residual.pow(2).sum()
        gradient.add_(head.residual, alpha=2.0 * penalty)
    return loss, correct, gradient
