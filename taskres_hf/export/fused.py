"""A classifier as one plain module: image tower, then a normalisation and a linear layer into which all else is fused.

    logits = norm(f + o) @ A.T + b     A = s * rows, b = logit bias + strength * class bias, o = 0 on the text side

`s` is the logit scale times its factor, `rows` what `TaskResClassifier.forward` multiplies with, `o` the shared row of
a residual on the image side. Alpha, strength, an enhanced base and rows of lengths of their own are in `A` and `o`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding.engines.choose import Tower
from ..embedding.engines.rewriting import watched_module
from ..encoders import family_of
from ..errors import ConfigurationError
from ..residual import label_threshold

if TYPE_CHECKING:
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..residual import TaskResClassifier


class FusedHead(nn.Module):
    """Image embeddings [B, D], of any length, to logits [B, K] and probabilities [B, K], in fp32.

    Probabilities are the softmax of the logits or, of a classifier of several labels per picture, their sigmoid.

    Attributes:
        linear: A [K, D] and b [K]. offset: o [1, D], or None where it is zero.
        threshold: the probability from which on one of several labels is given; None where each picture has one.

    Raises:
        ConfigurationError: several labels per picture, of a classifier that was never trained.
    """

    offset: Tensor | None

    def __init__(self, head: TaskResClassifier) -> None:
        super().__init__()
        head.check_has_text("Export")
        head.check_can_say_no()
        self.threshold = label_threshold(head.facts) if head.several_labels else None
        weight, bias, offset = head.fused()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data, self.linear.bias.data = weight, bias
        self.register_buffer("offset", offset)
        self.requires_grad_(False)

    def forward(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        embeds = image_embeds.float()
        embeds = embeds if self.offset is None else embeds + self.offset
        logits = self.linear(F.normalize(embeds, dim=-1))
        return logits, logits.softmax(dim=-1) if self.threshold is None else logits.sigmoid()

    def given(self, logits: Tensor) -> Tensor:
        """The classes that pictures get for these logits [B, K], bool [B, K]."""
        if self.threshold is None:
            return F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
        return logits.sigmoid() >= self.threshold


class FusedClassifier(nn.Module):
    """Pixel values [B, 3, H, W] fp32 to logits [B, K] and probabilities [B, K] fp32: what is exported.

    Args:
        model: the classifier; it is left as it is.
        half: keep the tower in fp16; what follows it stays in fp32.

    Attributes:
        base: the base on the CPU, in fp32 or fp16 whatever the model runs in.

    Raises:
        ConfigurationError: the tower needs more than pixel values, a hook takes part in it, or its weights are not
            all there as numbers (quantised, or left on a disk).
    """

    base: Any

    def __init__(self, model: TaskResCLIPForImageClassification, half: bool = False) -> None:
        super().__init__()
        base: Any = _plain_base(model)
        # Not a part of this module: the text side would be exported with it.
        self.__dict__["base"] = base.to(torch.float16 if half else torch.float32)
        self.tower, self.head = Tower(self.base), FusedHead(model.classifier)
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = self.head(self.tower(pixel_values))
        return logits, probabilities


def _plain_base(model: TaskResCLIPForImageClassification) -> Any:
    """A copy of the base on the CPU, which conversions and other number types may change."""
    base = model.clip
    needed = family_of(base).image_inputs
    if needed != ("pixel_values",):
        raise ConfigurationError(
            f"A classifier over {base.config.model_type!r} cannot be exported: its image tower also needs "
            f"{', '.join(needed[1:])}. Serve it with this library, or train over a base that takes plain pixels."
        )
    if (name := watched_module(base)) is not None:
        raise ConfigurationError(
            f"A hook or a replaced forward on {name} takes part in the image tower and would be lost: remove it, or "
            "load the classifier without device_map."
        )
    odd = [name for name, tensor in base.named_parameters() if tensor.is_meta or not tensor.is_floating_point()]
    if odd:
        raise ConfigurationError(
            f"The base's weights are not at hand as plain numbers (such as {odd[0]}): load the classifier without "
            "quantization_config and device_map to export it."
        )
    copied: Any = copy.deepcopy(base)
    return copied.to("cpu")
