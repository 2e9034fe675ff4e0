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
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigurationError

LARGEST_ALPHA, SMALLEST_ALPHA = 1e4, 1e-4  # beyond them fp32 overflows, or Adam cannot move the residual
_LARGEST_LOGIT = 1e5


def checked_alpha(alpha: Any) -> float:
    """`alpha` as a float: 0, or 1e-4 to 1e4 in size.

    Raises:
        ConfigurationError: it is something else.
    """
    number = type(alpha) is not bool and isinstance(alpha, Real) and math.isfinite(alpha)
    if not number or (alpha != 0 and not SMALLEST_ALPHA <= abs(alpha) <= LARGEST_ALPHA):
        raise ConfigurationError(
            f"`alpha` must be a finite number, 0 or from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g} in size (the paper's "
            f"is 0.5); got {alpha!r}."
        )
    return float(alpha)


class TaskResClassifier(nn.Module):
    """A linear classifier over image embeddings: a frozen base plus a scaled, trainable residual.

    Args:
        base: `t` [K, D], raw (not normalised) text embeddings, one row per class.
        alpha: scale of the residual, 0 or 1e-4 to 1e4 in size (paper: 0.5, 1.0 for Flowers102).
        logit_scale: factor on the cosine, already exponentiated (100.0 for OpenAI's CLIP); above 0, at most 1e5.
        logit_bias: constant added to every logit (0 for CLIP, learned in SigLIP).
        side: `"text"` (published TaskRes) or `"image"` (TaskRes-Image).

    Attributes:
        base: buffer [K, D] fp32, not part of the state dict (it is recomputed from the base model).
        shift: buffer [K, D] fp32 or None: what the enhanced base (TaskRes*) adds to `base`; frozen.
        residual: parameter [K, D] ([1, D] on the image side) fp32, same units as `base`, zeros at the start.
        facts: the alpha, and how the residual came to be (`few_shot`, `training`, `metrics`, `data`, `enhanced_base`).
            A model's config reads and writes this very dict, so that the two never differ.

    Raises:
        ConfigurationError: `base` is not a finite matrix, or `alpha`, the scale or the bias is out of range.
    """

    base: Tensor
    shift: Tensor | None
    facts: dict[str, Any]

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
        if not 0.0 < logit_scale <= _LARGEST_LOGIT or not abs(logit_bias) <= _LARGEST_LOGIT:
            raise ConfigurationError(
                f"`logit_scale` must be above 0 and at most {_LARGEST_LOGIT:g}, `logit_bias` at most that in size; got "
                f"{logit_scale!r} and {logit_bias!r}: check the base model's logit scale."
            )
        self.facts = {"alpha": checked_alpha(alpha)}
        self.logit_scale = float(logit_scale)
        self.logit_bias = float(logit_bias)
        self.register_buffer("base", base.detach().to(torch.float32).clone(), persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.side = side
        self.residual = nn.Parameter(torch.zeros_like(self.base if side == "text" else self.base[:1]))

    @property
    def alpha(self) -> float:
        """Scale of the residual."""
        return float(self.facts["alpha"])

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.facts["alpha"] = checked_alpha(value)

    def frozen_weight(self) -> Tensor:
        """What the residual is added to [K, D]: the base classifier, enhanced if it was."""
        return self.base if self.shift is None else self.base + self.shift

    def weight(self) -> Tensor:
        """The classifier's rows before normalisation [K, D]: `t + alpha * x` on the text side."""
        frozen = self.frozen_weight()
        return frozen + self.alpha * self.residual if self.side == "text" else frozen

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the zero-shot classifier: a zero residual on the regular base, and nothing recorded about it."""
        self.residual.zero_()
        self.shift = None
        alpha = self.alpha
        self.facts.clear()
        self.alpha = alpha

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] for image embeddings [N, D]: any length on the text side, raw on the image side.

        Raises:
            ConfigurationError: a logit is NaN or infinite (not checked while torch traces or compiles).
        """
        if self.side == "image":
            image_embeds = image_embeds.to(self.residual) + self.alpha * self.residual
        return self._logits(image_embeds, self.weight())

    def zero_shot_logits(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] of the base classifier alone, as if the residual were zero."""
        return self._logits(image_embeds, self.base)

    def _logits(self, image_embeds: Tensor, weight: Tensor) -> Tensor:
        # fp32 throughout: a bf16 tower must not round the classifier.
        images = F.normalize(image_embeds.to(device=weight.device, dtype=weight.dtype), dim=-1)
        logits = self.logit_scale * images @ F.normalize(weight, dim=-1).T + self.logit_bias
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
            _check_finite(logits)
        return logits

    def extra_repr(self) -> str:
        classes, dim = self.base.shape
        return f"classes={classes}, dim={dim}, alpha={self.alpha}, logit_scale={self.logit_scale:.4g}"


def _check_finite(logits: Tensor) -> None:
    """An answer is never NaN."""
    if logits.device.type == "meta" or bool(torch.isfinite(logits.sum())):
        return
    bad = int((~torch.isfinite(logits)).any(dim=-1).sum())
    raise ConfigurationError(
        f"The logits of {bad} of {len(logits)} pictures are NaN or infinite: the pictures, the base model's weights or "
        "the residual hold values that are not finite. Check the pictures with another base, the base with other "
        "pictures (in fp32: dtype=torch.float32), or call classifier.reset()."
    )


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """Mean cross-entropy of logits [N, K] with class ids [N] or probabilities [N, K].

    Args:
        num_items: divide the sum by this instead of N (`num_items_in_batch` of `transformers.Trainer`).

    Raises:
        ConfigurationError: labels of another shape, outside the classes, or no probabilities.
    """
    labels = _checked_labels(labels.to(logits.device), logits)
    if num_items is None:
        return F.cross_entropy(logits, labels)
    total: Tensor = F.cross_entropy(logits, labels, reduction="sum") / num_items
    return total


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Class ids [N] or probabilities [N, K] as cross-entropy takes them.

    Raises:
        ConfigurationError: neither.
    """
    rows, classes = logits.shape
    hard = not labels.is_floating_point() and labels.dtype != torch.bool
    if tuple(labels.shape) != ((rows,) if hard else (rows, classes)):
        raise ConfigurationError(
            f"Labels must be {rows} class ids (integers), or probabilities (floats) of shape [{rows}, {classes}]; got "
            f"{labels.dtype} {list(labels.shape)}."
        )
    if labels.device.type != "cpu" or not labels.numel():
        return labels.long() if hard else labels.to(logits.dtype)
    if not hard:
        labels = labels.to(logits.dtype)
        sums = labels.sum(dim=1)
        if not bool(((labels >= 0).all(dim=1) & ((sums - 1).abs() <= 1e-2)).all()):
            raise ConfigurationError(
                "Labels given as floats must be probabilities: 0 or more, and each row with the sum 1. Several classes "
                "per picture (multi-label) are not supported."
            )
        return labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ConfigurationError(
            f"Labels must be class ids from 0 to {classes - 1}; got {low if low < 0 else high}. "
            "Check that the dataset has the model's classes in the model's order."
        )
    return labels.long()
