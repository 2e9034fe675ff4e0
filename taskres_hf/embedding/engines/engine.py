"""What an engine is: a way to run the frozen image tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...encoders import encode_images
from .rewriting import rewritten

FORMAT = 4  # of converted towers kept on disk


@dataclass(frozen=True)
class ImageEngine:
    """A way to run the tower: call it with pixel values [B, 3, H, W] to get embeddings [B, D] fp32 on the CPU.

    Attributes:
        engine, precision: what was chosen. batch_size: pictures a pass at which it is fastest.
        prepare: converts the tower and returns what runs it; called when the first pictures come.
        takes_bytes: whether the pixel values it takes are bytes, uint8, not yet normalised.
        is_stock: whether it is the tower as it is, so that there is nothing to compare it with.
    """

    engine: str
    precision: str
    batch_size: int
    prepare: Callable[[], Callable[[Mapping[str, Tensor]], Tensor]]
    takes_bytes: bool = False
    is_stock: bool = False

    def get_ready(self) -> None:
        """Convert the tower now rather than when the first pictures come."""
        _ = self._run

    @cached_property
    def _run(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return self.prepare()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.takes_bytes and inputs["pixel_values"].dtype != torch.uint8:
            raise TypeError(f"This engine takes pictures as bytes; got {inputs['pixel_values'].dtype}.")
        return self._run(inputs)

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"


class Tower(nn.Module):
    """Pixel values to embeddings, as one module to convert."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = rewritten(base)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return encode_images(self.base, {"pixel_values": pixel_values})


def picture_size(base: PreTrainedModel) -> tuple[int, int]:
    size = base.config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)
