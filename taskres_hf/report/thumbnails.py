"""Pictures small enough to lie in a page, within a bound for all of them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import PIL.Image

from ..errors import ImageError
from ..pictures import Remarks

if TYPE_CHECKING:
    from .gathering import Pictures

SIZE = 96  # pixels, the longer side
_QUALITY = 72


class Thumbnails:
    """Makes `data:` addresses of pictures until `most_bytes` are spent.

    Attributes:
        left_out: how many pictures were asked for after that.
    """

    def __init__(self, most_bytes: int = 5_000_000) -> None:
        self.left_out = 0
        self._rest = most_bytes
        self._remarks = Remarks()  # what is odd about a picture was said when it was embedded
        self._made: dict[tuple[str, int], str | None] = {}

    def of(self, pictures: Pictures, position: int) -> str | None:
        """A picture as JPEG in a `data:` address; None where it cannot be read or the bound is reached."""
        key = (pictures.split, position)
        if key not in self._made:
            self._made[key] = self._make(pictures, position)
        address = self._made[key]
        if address is None:
            return None
        if len(address) > self._rest:
            self.left_out += 1
            return None
        self._rest -= len(address)
        return address

    def _make(self, pictures: Pictures, position: int) -> str | None:
        try:
            picture = pictures.images.image(position, (SIZE, SIZE), self._remarks)
        except ImageError:
            return None
        picture.thumbnail((SIZE, SIZE))
        small = PIL.Image.new("RGB", picture.size)  # without the original's comments, place and time
        small.paste(picture)
        stream = io.BytesIO()
        small.save(stream, format="JPEG", quality=_QUALITY, optimize=True)
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
