"""The classifier of Task Residual tuning (TaskRes, CVPR 2023, arXiv 2211.10277, section 3.2).

    weight_k = t_k + alpha * x_k
    logits   = scale * norm(image) @ norm(weight).T + bias

On the image side instead (TaskRes-Image, an ablation of the paper) one shared `x` [1, D] is added to every image
embedding: logits = scale * norm(image + alpha * x) @ norm(t).T + bias.

`t` [K, D] is the base classifier: the text embedding of each class's prompts, not normalised, frozen.
`x` [K, D] is the task residual: zero at the start, the only thing trained. Normalisation comes after the
addition, so the same `alpha` and learning rate mean a smaller turn where the raw text embedding is longer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigurationError


class TaskResClassifier(nn.Module):
    """A linear classifier over image embeddings: a frozen base plus a scaled, trainable residual.

    Args:
        base: `t` [K, D], raw (not normalised) text embeddings, one row per class.
        alpha: scale of the residual, a finite number (paper: 0.5, 1.0 for Flowers102).
        logit_scale: factor on the cosine, already exponentiated (100.0 for OpenAI's CLIP).
        logit_bias: constant added to every logit (0 for CLIP, learned in SigLIP).
        side: `"text"` (published TaskRes) or `"image"` (TaskRes-Image).

    Attributes:
        base: buffer [K, D] fp32, not part of the state dict (it is recomputed from the base model).
        shift: buffer [K, D] fp32 or None: what the enhanced base (TaskRes*) adds to `base`; frozen.
        residual: parameter [K, D] ([1, D] on the image side) fp32, same units as `base`, zeros at the start.

    Raises:
        ConfigurationError: `base` is not a finite matrix, or `alpha` or the scale is not finite.
    """

    base: Tensor
    shift: Tensor | None

    def __init__(
        self,
        base: Tensor,
        alpha: float = 0.5,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        side: str = "text",
    ) -> None:
        super().__init__()
        if side not in ("text", "image"):
            raise ConfigurationError(f"`side` must be 'text' or 'image'; got {side!r}.")
        if base.ndim != 2 or base.shape[0] < 1:
            raise ConfigurationError(
                f"The base classifier must be a matrix [K, D] with K >= 1; got shape {tuple(base.shape)}."
            )
        if not bool(torch.isfinite(base).all()):
            raise ConfigurationError(
                "The base classifier holds NaN or infinite values: check the base model's text tower."
            )
        for name, value in (("alpha", alpha), ("logit_scale", logit_scale), ("logit_bias", logit_bias)):
            if not math.isfinite(value):
                raise ConfigurationError(f"`{name}` must be a finite number; got {value!r}.")
        self.alpha = float(alpha)
        self.logit_scale = float(logit_scale)
        self.logit_bias = float(logit_bias)
        self.register_buffer("base", base.detach().to(torch.float32).clone(), persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.side = side
        self.residual = nn.Parameter(torch.zeros_like(self.base if side == "text" else self.base[:1]))

    def anchor(self) -> Tensor:
        """The frozen classifier the residual is added to [K, D]: the base, or the enhanced base."""
        return self.base if self.shift is None else self.base + self.shift

    def weight(self) -> Tensor:
        """The classifier's rows before normalisation [K, D]: `t + alpha * x` on the text side."""
        return self.anchor() + self.alpha * self.residual if self.side == "text" else self.anchor()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the zero-shot classifier: a zero residual on the regular base."""
        self.residual.zero_()
        self.shift = None

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] for image embeddings [N, D]: any length on the text side, raw on the image side."""
        if self.side == "image":
            image_embeds = image_embeds.to(self.residual) + self.alpha * self.residual
        return self._logits(image_embeds, self.weight())

    def zero_shot_logits(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] of the base classifier alone, as if the residual were zero."""
        return self._logits(image_embeds, self.base)

    def _logits(self, image_embeds: Tensor, weight: Tensor) -> Tensor:
        # fp32 throughout: a bf16 tower must not round the classifier.
        images = F.normalize(image_embeds.to(device=weight.device, dtype=weight.dtype), dim=-1)
        return self.logit_scale * images @ F.normalize(weight, dim=-1).T + self.logit_bias

    def extra_repr(self) -> str:
        classes, dim = self.base.shape
        return f"classes={classes}, dim={dim}, alpha={self.alpha}, logit_scale={self.logit_scale:.4g}"
