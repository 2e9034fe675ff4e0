"""The head over one tower alone: a linear classifier as it is, beside which the residual is learned.

    logits = f @ (W + s * alpha * x).T + b + s * class_bias          over a pretrained head W [K, D], b [K]
    logits = S * norm(f) @ (s * (m + alpha * x)).T + s * class_bias  over a tower without one

Nothing of a pretrained head is normalised, so that a zero residual gives the model's own logits, bit for bit. A tower
without a head says nothing about any class before it has seen pictures: its rows are zero. What training by epochs
starts from there, the class means m of the shots, is stored as the base's shift; recipe `auto` needs none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..residual import TaskResClassifier, check_finite, finite

# Of towers without a head: class means are made as long as CLIP's text embeddings and their cosines count as much, so
# that published step sizes mean what they mean there.
LENGTH, SCALE = 10.0, 100.0


class LinearHead(TaskResClassifier):
    """A `TaskResClassifier` whose rows count as they are.

    Args:
        base: W [K, D], rows of a pretrained head; zeros where there is none. alpha: scale of the residual.
        logit_scale: S, 1 over a pretrained head. logit_bias, side: 0 and `"text"`, as there is no other.

    Attributes:
        base_bias: buffer [K] fp32 or None: b, frozen; set by the model.
        takes_raw_embeddings: over a pretrained head, where the length of an embedding counts.
    """

    def __init__(
        self, base: Tensor, alpha: float = 0.5, logit_scale: float = 1.0, logit_bias: float = 0.0, side: str = "text"
    ) -> None:
        super().__init__(base, alpha, logit_scale, logit_bias, side)
        self.takes_raw_embeddings = bool(base.any())

    def check_has_text(self, what: str, or_texts: bool = False) -> None:
        super().check_has_text(what, or_texts)
        if getattr(self.config, "text_encoding", None) is not None:
            raise ConfigurationError(
                f"{what} is for classifiers whose rows are made of class names; the rows of this one are those of a "
                "pretrained head, or class means."
            )
        raise ConfigurationError(
            f"{what} is for classifiers over a dual encoder; this one is over an image tower alone, which reads no "
            "text."
        )

    def mean_square(self) -> float:
        return super().mean_square() if self.takes_raw_embeddings else LENGTH**2

    def like(self, base: Tensor) -> LinearHead:
        made = LinearHead(base.cpu(), self.alpha, self.logit_scale)
        made.takes_raw_embeddings = self.takes_raw_embeddings
        return made

    @torch.no_grad()
    def set_weight(
        self,
        weight: Any,
        *,
        class_bias: Any = None,
        normalize_weight: bool = False,
        logit_scale_factor: float = 1.0,
    ) -> None:
        """Write a linear classifier as the residual; what was there before goes.

            logits = f @ weight.T + base_bias + class_bias            over a pretrained head
            logits = logit_scale * norm(f) @ weight.T + class_bias    over a tower without one

        Args:
            weight: [K, D]. class_bias: [K] or None.

        Raises:
            ConfigurationError: of another shape, not finite, `alpha` 0, or what only heads over text have.
        """
        rows = finite(weight, tuple(self.base.shape), "weight")
        bias = None if class_bias is None else finite(class_bias, (len(self.base),), "class_bias")
        if normalize_weight or logit_scale_factor != 1.0:
            self.check_has_text("A classifier of rows of one length or with a factor (set_weight)")
        if self.alpha == 0.0:
            raise ConfigurationError("A classifier can be written only with an alpha other than 0.")
        residual = finite((rows - self.base.cpu().double()).float() / self.alpha, tuple(rows.shape), "weight")
        self.reset()
        self.residual.copy_(residual)
        self.class_bias = None if bias is None else bias.to(self.base)

    @torch.no_grad()
    def start_from_means(self, image_embeds: Tensor, labels: Tensor) -> None:
        """Where there is no pretrained head: the class means of the shots as the frozen rows, all of one length.

        Args:
            image_embeds: [N, D] of any length. labels: [N]. A class without a picture keeps a row of zeros.
        """
        if self.takes_raw_embeddings:
            return
        images = F.normalize(image_embeds.to(self.base), dim=-1)
        sums = torch.zeros_like(self.base).index_add_(0, labels.to(images.device), images)
        self.shift = LENGTH * F.normalize(sums, dim=-1)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] for image embeddings [N, D] as the tower gives them.

        Raises:
            ConfigurationError: a logit is NaN or infinite (not checked while torch traces or compiles).
        """
        bias = self.base_bias
        if self.class_bias is not None:
            bias = self.strength * self.class_bias + (0.0 if bias is None else bias)
        return self._linear(image_embeds, self.weight(), bias)

    def zero_shot_logits(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] of the pretrained head alone; all zero where there is none."""
        return self._linear(image_embeds, self.base, self.base_bias)

    def _linear(self, image_embeds: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        images = image_embeds.to(device=weight.device, dtype=weight.dtype)
        if self.takes_raw_embeddings:  # the very call of the model's own head
            logits = F.linear(images, weight, bias)
        else:
            logits = self.logit_scale * F.linear(F.normalize(images, dim=-1), weight)
            logits = logits if bias is None else logits + bias
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
            check_finite(logits)
        return logits

    def extra_repr(self) -> str:
        classes, dim = self.base.shape
        length = math.sqrt(self.mean_square())
        kind = f"pretrained rows of length {length:.4g}" if self.takes_raw_embeddings else "no pretrained head"
        return f"classes={classes}, dim={dim}, alpha={self.alpha}, {kind}"
