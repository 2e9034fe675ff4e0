"""Pictures to pixel values, the same as the stock image processor's to two grey levels, in less time.

The stock processors resize a whole picture with Pillow, crop, and normalise in floating-point numpy, one step at a
time. Here torch resizes most of what shrinks, which is the same arithmetic on bytes with wider instructions, and Pillow
the rest; values are looked up in a table, or left as bytes to a tower that takes them. Which processors this fits is
not assumed but tried: probe pictures go both ways, and the stock processor stays where they differ.

Of very long pictures only what the crop keeps is resized: 10000 x 1 pixels, scaled to 224 rows, would be two million
columns, nearly all of which are cut off again.

The published augmentation, random resized crop and flip, is here too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ImageOps
from torch import Tensor

from ..errors import ConfigurationError, ImageError

_MODES = {PIL.Image.Resampling.BILINEAR: "bilinear", PIL.Image.Resampling.BICUBIC: "bicubic"}
_STRIP = 1 << 21  # bytes of a large picture that are handled at once, to stay near the processor
_TOLERANCE = 2.01 / 255.0  # two grey levels, before normalisation
_LARGEST_WHOLE = 1 << 22  # pixels of a resized picture from which only what the crop keeps is made
_LARGEST_STOCK = 1 << 25  # pixels that the stock processor may make of a picture: about a gigabyte while it works
CROPS = ("processor", "torchvision")


class Preprocessor:
    """Prepares pictures for an image tower.

    Args:
        image_processor: of the base model.
        exact: always use the stock processor.
        crop: where the centre crop is: `"processor"` (rounded down) or `"torchvision"` (half to even), see `Embedder`.

    Raises:
        ConfigurationError: an unknown `crop`.

    Attributes:
        fast: whether the short way is used.
    """

    def __init__(self, image_processor: Any, exact: bool = False, crop: str = "processor") -> None:
        if crop not in CROPS:
            raise ConfigurationError(f"`crop` must be one of {CROPS}; got {crop!r}.")
        self.stock, self.crop = image_processor, crop
        self._plan = None if exact else _Plan.of(image_processor)
        self.fast = self._plan is not None and self._agrees()
        if self._plan is not None:
            self._plan.half_to_even = crop == "torchvision"

    def check(self, picture: PIL.Image.Image) -> None:
        """Refuse a picture so long and thin that scaling it would take all memory.

        Raises:
            ImageError: such a picture, where it is scaled whole.
        """
        if self.fast and self._plan is not None and (self._plan.crop or self._plan.size):
            return
        size = _whole_size(self.stock, picture.size)
        if size[0] * size[1] > _LARGEST_STOCK:
            raise ImageError(
                f"A picture of {picture.width}x{picture.height} would be scaled to {size[0]}x{size[1]} pixels, which "
                "takes gigabytes. Crop it, or leave it out."
            )

    def prepare(self, picture: PIL.Image.Image, augmented: bool = False, as_bytes: bool = False) -> Any:
        """What can be done for an RGB picture alone, in any thread; an `augmented` one has the tower's size.

        `as_bytes` leaves to `finisher` what the short way does after resizing: a quarter to send to a device.
        """
        if self.fast and self._plan is not None:
            cropped = self._plan.cropped(picture, augmented)
            return cropped if as_bytes else self._plan.normalised(cropped)
        if augmented:
            return picture
        self.check(picture)
        if self.crop == "torchvision" and getattr(self.stock, "do_center_crop", False):
            size = self.stock.crop_size
            return _centre_of(self._scaled(picture), int(size["height"]), int(size["width"]))
        return picture

    def _scaled(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """The picture as the stock processor scales it, neither cropped nor normalised."""
        options = {"do_center_crop": False, "do_rescale": False, "do_normalize": False}
        pixels = self.stock(images=[picture], return_tensors="pt", **options)["pixel_values"][0]
        return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8))

    def collate(self, prepared: Sequence[Any], augmented: bool = False, pin: bool = False) -> dict[str, Tensor]:
        """Inputs of the tower from what `prepare` gave; in pinned memory if wanted, from which devices copy.

        Raises:
            ImageError: the image processor leaves pictures in sizes of their own, which no table holds.
        """
        try:
            return self._collated(prepared, augmented, pin)
        except ValueError as error:
            name, sizes = type(self.stock).__name__, sorted({" x ".join(map(str, np.shape(one))) for one in prepared})
            if len(sizes) == 1:
                raise ImageError(f"{name} cannot prepare pictures of {sizes[0]} numbers: {error}") from error
            raise ImageError(
                f"{name} leaves pictures in sizes of their own, here from {' and '.join(sizes[:3])} numbers, which "
                "cannot pass the image tower together. Give it one, by a `size` of height and width or by "
                "`do_center_crop=True`, or give pictures of one size."
            ) from error

    def _collated(self, prepared: Sequence[Any], augmented: bool, pin: bool) -> dict[str, Tensor]:
        if self.fast and not pin:
            return {"pixel_values": torch.from_numpy(np.stack(prepared))}
        if self.fast:
            dtype = torch.uint8 if prepared[0].dtype == np.uint8 else torch.float32
            values = torch.empty((len(prepared), *prepared[0].shape), dtype=dtype, pin_memory=True)
            np.stack(prepared, out=values.numpy())
            return {"pixel_values": values}
        cropped = self.crop == "torchvision" and getattr(self.stock, "do_center_crop", False)
        options = {"do_resize": False, "do_center_crop": False} if augmented or cropped else {}
        inputs = self.stock(images=list(prepared), return_tensors="pt", **options)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        return {name: value.pin_memory() for name, value in tensors.items()} if pin else tensors

    def finisher(self, device: torch.device) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """What makes inputs of the tower of collated bytes on a device, by the same table and so to the same bits."""
        if not self.fast or self._plan is None:
            return lambda inputs: inputs
        table = torch.from_numpy(self._plan.table).flatten().to(device)
        starts = 256 * torch.arange(3, dtype=torch.int32, device=device).view(3, 1, 1)

        def finish(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            places = inputs["pixel_values"].permute(0, 3, 1, 2).int() + starts
            return {"pixel_values": table.index_select(0, places.flatten()).view(places.shape)}

        return finish

    def __call__(self, pictures: Sequence[PIL.Image.Image], augmented: bool = False) -> dict[str, Tensor]:
        """Inputs of the tower for RGB pictures."""
        return self.collate([self.prepare(picture, augmented) for picture in pictures], augmented)

    def target_size(self) -> tuple[int, int] | None:
        """Height and width a picture is resized to at least, for coarser decoding; None if not known."""
        if self._plan is None:
            return None
        return (self._plan.shortest, self._plan.shortest) if self._plan.shortest else self._plan.size

    def _agrees(self) -> bool:
        """Whether pictures of awkward sizes come out the same both ways.

        One has strong edges. Of two, neighbours have nothing in common: one as tall as torch takes them, one hardly
        larger than what the tower takes.
        """
        assert self._plan is not None
        generator = np.random.default_rng(0)

        def noise(*size: int) -> PIL.Image.Image:
            return PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))

        try:
            side = self._plan.shortest or max(self._plan.size or ())
            edges = noise(9, 13).resize((333, 211), PIL.Image.Resampling.BILINEAR)
            return all(map(self._agrees_on, [edges, noise(2 * side, side * 8 // 7), noise(side + 26, side + 36)]))
        except Exception:  # a processor of another kind: whatever it refuses, the stock way is right
            return False

    def _agrees_on(self, probe: PIL.Image.Image) -> bool:
        assert self._plan is not None
        expected = self.stock(images=[probe], return_tensors="pt")
        if set(expected) != {"pixel_values"}:
            return False
        pixels = torch.from_numpy(self._plan.normalised(self._plan.cropped(probe, False)))
        if pixels.shape != expected["pixel_values"][0].shape:
            return False
        gap = (pixels - expected["pixel_values"][0]).abs().amax(dim=(1, 2)) * self._plan.std
        return bool((gap <= _TOLERANCE).all())


class _Plan:
    """What a processor does, as numbers: resize, crop, and a value for every byte of every channel."""

    def __init__(self, processor: Any) -> None:
        size = processor.size
        self.shortest = size.get("shortest_edge") if isinstance(size, Mapping) or hasattr(size, "get") else None
        self.size = None if self.shortest else (int(size["height"]), int(size["width"]))
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        self.crop = (int(crop["height"]), int(crop["width"])) if crop else None
        self.half_to_even = False
        self.resample = PIL.Image.Resampling(int(processor.resample))
        self.mode = _MODES[self.resample]
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        mean, self.std = (torch.tensor(value).expand(3) for value in (mean, std))  # one number is for every channel
        factor = float(processor.rescale_factor)
        values = torch.arange(256, dtype=torch.float32) * factor
        self.table = ((values - mean[:, None]) / self.std[:, None]).numpy()  # [3, 256]

    @staticmethod
    def of(processor: Any) -> _Plan | None:
        """The plan of a processor, or None if it does something else."""
        try:
            return _Plan(processor) if processor.do_resize and processor.do_rescale else None
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def cropped(self, picture: PIL.Image.Image, augmented: bool) -> NDArray[np.uint8]:
        """Bytes [H, W, 3] of the tower's size."""
        if augmented:
            return np.asarray(picture)
        width, height = picture.size
        if self.shortest:
            wide, high = _scaled_to(self.shortest, width, height)
        else:
            assert self.size is not None
            high, wide = self.size
        crop_high, crop_wide = self.crop or (high, wide)
        if crop_wide > wide or crop_high > high:
            raise ValueError("the crop is larger than the picture")
        left, top = self._offset(wide - crop_wide), self._offset(high - crop_high)
        if wide * high > max(_LARGEST_WHOLE, width * height):
            across, down = width / wide, height / high
            box = (left * across, top * down, (left + crop_wide) * across, (top + crop_high) * down)
            box = (box[0], box[1], min(box[2], width), min(box[3], height))
            return np.asarray(picture.resize((crop_wide, crop_high), self.resample, box))
        # Both go across first, then down, with bytes between; Pillow 13 goes the other way where most of what goes is
        # height, and a picture of sharp edges would differ.
        if width >= wide and 0 <= height - high <= 2 * (width - wide):
            resized = self._shrunk(picture, wide, high)
        else:
            resized = np.asarray(picture.resize((wide, high), self.resample))
        return np.ascontiguousarray(resized[top : top + crop_high, left : left + crop_wide])

    def _offset(self, surplus: int) -> int:
        """Rows or columns cut off before a centre crop, of `surplus` that are too many."""
        return round(surplus / 2) if self.half_to_even else surplus // 2

    def _shrunk(self, picture: PIL.Image.Image, wide: int, high: int) -> NDArray[np.uint8]:
        """Bytes [high, wide, 3] of a picture that is larger both ways; of a large one, strip after strip."""
        rows = max(1, _STRIP // (4 * picture.width))
        if rows >= picture.height:
            resized = self._resized(_in_torch(picture), high, wide)
        else:
            strips = []
            for top in range(0, picture.height, rows):
                strip = _in_torch(picture.crop((0, top, picture.width, min(top + rows, picture.height))))
                strips.append(self._resized(strip, strip.shape[2], wide))
            resized = self._resized(torch.cat(strips, dim=2), high, wide)
        pixels: NDArray[np.uint8] = resized[0, :3].permute(1, 2, 0).numpy()
        return pixels

    def _resized(self, pixels: Tensor, high: int, wide: int) -> Tensor:
        return F.interpolate(pixels, (high, wide), mode=self.mode, antialias=True)

    def normalised(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float pixel values [3, H, W]: a byte has 256 values, so a table of them is all the arithmetic there is."""
        out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel in range(3):
            np.take(self.table[channel], pixels[:, :, channel], out=out[channel], mode="clip")
        return out


def _scaled_to(shortest: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter edge gets this length."""
    longer = int(shortest * max(width, height) / min(width, height))
    return (shortest, longer) if width <= height else (longer, shortest)


def _whole_size(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that a stock processor scales a picture to before it crops; its own size where not known."""
    wanted = getattr(processor, "size", None)
    shortest = None if wanted is None or not hasattr(wanted, "get") else wanted.get("shortest_edge")
    return _scaled_to(int(shortest), *size) if shortest and getattr(processor, "do_resize", False) else size


def _centre_of(picture: PIL.Image.Image, high: int, wide: int) -> PIL.Image.Image:
    """The centre of a picture as torchvision crops it, rounding half to even."""
    left, top = round((picture.width - wide) / 2), round((picture.height - high) / 2)
    return picture.crop((left, top, left + wide, top + high))


def _in_torch(picture: PIL.Image.Image) -> Tensor:
    """Bytes [1, 4, H, W] of an RGB picture, a fourth byte beside each three, as Pillow keeps them and torch is fast."""
    pixels = torch.frombuffer(bytearray(picture.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 4).permute(0, 3, 1, 2)


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
