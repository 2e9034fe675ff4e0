"""The published augmentation: random resized crop and flip."""

from __future__ import annotations

import math
import random
from typing import Any

import PIL.Image
from PIL import ImageOps

from ..errors import ConfigurationError

_CROP_AREA = (0.08, 1.0)  # published augmentation: random resized crop and flip


_CROP_RATIO = (3 / 4, 4 / 3)


def crop_size(image_processor: Any) -> tuple[int, int]:
    """Height and width of the pictures the tower sees, from the processor's `crop_size` or `size`.

    Raises:
        ConfigurationError: the processor gives no fixed size; augmented views need one.
    """
    for size in (getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)):
        if size is not None and "height" in size and size["height"]:
            return int(size["height"]), int(size["width"])
    raise ConfigurationError(f"{type(image_processor).__name__} has no fixed picture size: use views=0.")


def augment(picture: PIL.Image.Image, size: tuple[int, int], generator: random.Random) -> PIL.Image.Image:
    """The published augmentation: a random crop of 8 to 100 % of the area, resized (bicubic), flipped half the time."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * generator.uniform(*_CROP_AREA)
        ratio = math.exp(generator.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = generator.randint(0, width - wide), generator.randint(0, height - high)
            break
    else:  # very long pictures: the largest central crop of an allowed shape
        wide = min(width, max(1, round(height * _CROP_RATIO[1])))
        high = min(height, max(1, round(width / _CROP_RATIO[0])))
        left, top = (width - wide) // 2, (height - high) // 2
    picture = picture.crop((left, top, left + wide, top + high))
    picture = picture.resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC)
    return ImageOps.mirror(picture) if generator.random() < 0.5 else picture
