"""Pictures to pixel values, the same as the stock image processor's to two grey levels, in less time.

The stock processors resize a whole picture, crop, and normalise in floating-point numpy, one step at a time. Here only
what the crop keeps is resized, and normalised by looking bytes up in a table. Which processors this fits is not
assumed but tried: a probe picture goes both ways, and the stock processor stays where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

_MODES = {int(mode): mode for mode in (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC)}
_TOLERANCE = 2.01 / 255.0  # two grey levels, before normalisation


class Preprocessor:
    """Prepares pictures for an image tower.

    Args:
        image_processor: of the base model.
        exact: always use the stock processor.

    Attributes:
        fast: whether the short way is used.
    """

    def __init__(self, image_processor: Any, exact: bool = False) -> None:
        self.stock = image_processor
        self._plan = None if exact else _Plan.of(image_processor)
        self.fast = self._plan is not None and self._agrees()

    def one(self, picture: PIL.Image.Image, augmented: bool = False) -> Any:
        """What can be done for an RGB picture alone, in any thread; an `augmented` one has the tower's size."""
        if self.fast and self._plan is not None:
            return self._plan.normalised(self._plan.cropped(picture, augmented))
        return picture

    def together(self, prepared: Sequence[Any], augmented: bool = False) -> dict[str, Tensor]:
        """Inputs of the tower from what `one` gave."""
        if self.fast:
            return {"pixel_values": torch.from_numpy(np.stack(prepared))}
        options = {"do_resize": False, "do_center_crop": False} if augmented else {}
        inputs = self.stock(images=list(prepared), return_tensors="pt", **options)
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def __call__(self, pictures: Sequence[PIL.Image.Image], augmented: bool = False) -> dict[str, Tensor]:
        """Inputs of the tower for RGB pictures."""
        return self.together([self.one(picture, augmented) for picture in pictures], augmented)

    def target_size(self) -> tuple[int, int] | None:
        """Height and width a picture is resized to at least, for coarser decoding; None if not known."""
        if self._plan is None:
            return None
        return (self._plan.shortest, self._plan.shortest) if self._plan.shortest else self._plan.size

    def _agrees(self) -> bool:
        """Whether a picture of awkward size and strong edges comes out the same both ways."""
        assert self._plan is not None
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (9, 13, 3), dtype=np.uint8)
        probe = PIL.Image.fromarray(coarse).resize((333, 211), PIL.Image.Resampling.BILINEAR)
        try:
            expected = self.stock(images=[probe], return_tensors="pt")
            if set(expected) != {"pixel_values"}:
                return False
            found = torch.from_numpy(self._plan.normalised(self._plan.cropped(probe, False)))
            if found.shape != expected["pixel_values"][0].shape:
                return False
            gap = (found - expected["pixel_values"][0]).abs().amax(dim=(1, 2)) * self._plan.std
        except Exception:  # a processor of another kind: whatever it refuses, the stock way is right
            return False
        return bool((gap <= _TOLERANCE).all())


class _Plan:
    """What a processor does, as numbers: resize, crop, and a value for every byte of every channel."""

    def __init__(self, processor: Any) -> None:
        size = processor.size
        self.shortest = size.get("shortest_edge") if isinstance(size, Mapping) or hasattr(size, "get") else None
        self.size = None if self.shortest else (int(size["height"]), int(size["width"]))
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        self.crop = (int(crop["height"]), int(crop["width"])) if crop else None
        self.resample = _MODES[int(processor.resample)]
        mean = torch.tensor(processor.image_mean) if processor.do_normalize else torch.zeros(3)
        self.std = torch.tensor(processor.image_std) if processor.do_normalize else torch.ones(3)
        values = torch.arange(256, dtype=torch.float32) * float(processor.rescale_factor)
        self.table = ((values - mean[:, None]) / self.std[:, None]).numpy()  # [3, 256]

    @staticmethod
    def of(processor: Any) -> _Plan | None:
        """The plan of a processor, or None if it does something else."""
        try:
            return _Plan(processor) if processor.do_resize and processor.do_rescale else None
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def cropped(self, picture: PIL.Image.Image, augmented: bool) -> NDArray[np.uint8]:
        """Bytes [H, W, 3] of the tower's size: only what the crop keeps is resized."""
        if not augmented:
            width, height = picture.size
            if self.shortest:
                longer = int(self.shortest * max(width, height) / min(width, height))
                wide, high = (self.shortest, longer) if width <= height else (longer, self.shortest)
            else:
                assert self.size is not None
                high, wide = self.size
            crop_high, crop_wide = self.crop or (high, wide)
            left, top = (wide - crop_wide) // 2, (high - crop_high) // 2
            if left < 0 or top < 0:
                raise ValueError("the crop is larger than the picture")
            across, down = width / wide, height / high  # whole pixels of the result, so the same samples are taken
            box = (left * across, top * down, (left + crop_wide) * across, (top + crop_high) * down)
            picture = picture.resize((crop_wide, crop_high), self.resample, box=box)
        return np.asarray(picture)

    def normalised(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float pixel values [3, H, W]: a byte has 256 values, so a table of them is all the arithmetic there is."""
        out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel in range(3):
            np.take(self.table[channel], pixels[:, :, channel], out=out[channel], mode="clip")
        return out
