"""Recipe `auto` beside a pretrained head, whose logits take the place of what text says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alone.linear_head import SCALE
from .whitened import WhitenedFit, fit_beside, number_type, refuse_broken

# A head's logits are smaller than CLIP's, so a fit beside them is too sure of itself by more, and must not be thrown
# away for that: at 4 it was, see docs/vision-only.md.
_RELUCTANCE = 0.3


@torch.no_grad()
def fit_whitened_beside(
    images: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, views: int = 1, iterations: int = 8
) -> WhitenedFit:
    """Recipe `auto` beside a linear classifier over embeddings as they come, in the place of text.

    Their lengths count, in units of their root mean square. The residual may be as wide as over CLIP, whose logit scale
    is 100: how sure a pretrained head is of other pictures says nothing about that.

    Args:
        images: [V * N, D] raw embeddings; labels, views, iterations as in `fit_whitened`.
        weight: [K, D], not all zero. bias: [K] or None.

    Returns:
        The classifier: logits = f @ weight.T + bias for raw embeddings f.

    Raises:
        ConfigurationError: an embedding is NaN or infinite.
    """
    refuse_broken(images)
    dtype = number_type(len(images) * len(weight))
    f, w = (one.detach().to("cpu", dtype) for one in (images, weight))
    length = max(float(f.pow(2).sum(1).mean().sqrt()), 1e-12)
    own = torch.zeros(len(w), dtype=dtype) if bias is None else bias.detach().to("cpu", dtype)
    unit = F.normalize(f, dim=1)
    rows, more, chosen = fit_beside(
        f / length, unit, labels.cpu(), f @ w.T + own, SCALE, views, iterations, _RELUCTANCE
    )
    return WhitenedFit(
        (chosen["temperature"] * (w + rows / length)).double(), (chosen["temperature"] * own).double() + more, chosen
    )
