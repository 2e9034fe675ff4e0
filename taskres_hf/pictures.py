"""One picture from anything that can hold one, and picture files among files and folders.

Pictures are decoded in one place, `read_image`, through the same `transformers.image_utils.load_image` that
`pipeline` uses, so training and serving cannot see different pixels (EXIF rotation, alpha, CMYK).
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import PIL.Image
from PIL import ImageOps, features
from transformers.image_utils import load_image

from .errors import ImageError

# Every format that is read, by Pillow's name for it. Pillow knows more: some start other programs (PostScript), some
# only recognise a file without decoding it (FITS, HDF5, GRIB, MPEG, WMF), most are met nowhere but in attacks.
_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    "ICO": (".ico",),
    "TGA": (".tga",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
}
_CODECS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # what Pillow can be built without
_EXTRA = ("AVIF", "HEIF")  # formats that `pip install "taskres_hf[heif]"` adds where they are missing


def _is_decodable(name: str) -> bool:
    if name == "HEIF":
        return importlib.util.find_spec("pillow_heif") is not None
    if name == "AVIF" and "avif" not in features.modules:  # Pillow before 11.3
        return False
    return name not in _CODECS or bool(features.check(_CODECS[name]))


_FORMATS = tuple(name for name in _ENDINGS if _is_decodable(name))
IMAGE_EXTENSIONS = frozenset(ending for name in _FORMATS for ending in _ENDINGS[name])

# What file managers, notebooks, archives and network drives leave in folders; names that start with a dot as well.
_SYSTEM_NAMES = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@recycle", "#recycle", "@__thumb",
        "$recycle.bin", "system volume information", "lost+found",
    }
)  # fmt: skip


def ending_status(suffix: str) -> Literal["readable", "needs extra", "unknown"]:
    """What can be done with files of an ending, such as `.jpg`; upper and lower case are the same.

    `"needs extra"` are pictures that `pip install "taskres_hf[heif]"` makes readable: HEIC, and AVIF with an old Pillow.
    """
    suffix = suffix.lower()
    if suffix in IMAGE_EXTENSIONS:
        return "readable"
    return "needs extra" if any(suffix in _ENDINGS[name] for name in _EXTRA) else "unknown"


def is_ignored(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is hidden or the system's own: `.x`, `._x`, `__MACOSX`, `@eaDir`, `Thumbs.db`, ...

    Args:
        path: a name, or a path relative to the folder that is searched, of which every part counts; of an absolute
            path only the last part, since a data set may well lie below a hidden folder.
    """
    pure = PurePath(path)
    parts = (pure.name,) if pure.is_absolute() else pure.parts
    return any((part[:1] == "." and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES for part in parts)


def read_image(source: Any, draft: tuple[int, int] | None = None) -> PIL.Image.Image:
    """A picture as RGB, upright, exactly as `pipeline` would see it.

    Args:
        source: path, URL, bytes, `{"bytes": ..., "path": ...}` (a cell of an undecoded `datasets` column), PIL image or
            uint8 array [H, W(, C)].
        draft: let JPEG decoding stop at the smallest scale that still covers this height and width; faster on large
            pictures, and not exactly what `pipeline` would see.

    Raises:
        ImageError: not a picture, truncated, more pixels than Pillow's limit, or floating-point pixels, whose range
            is unknown.
    """
    name = "the picture"
    try:
        if isinstance(source, Mapping):
            name = repr(source.get("path")) if source.get("path") else name
            source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
            name = repr(source)
            if source.startswith(("http://", "https://", "data:image/")):
                source = load_image(source)
            elif not os.path.isfile(source):
                raise ImageError(f"There is no file {name}.")
        if isinstance(source, (bytes, bytearray)):
            source = io.BytesIO(source)
        ours = isinstance(source, (str, io.BytesIO))
        if ours:
            source = PIL.Image.open(source)
        elif source is not None and not isinstance(source, PIL.Image.Image):
            source = PIL.Image.fromarray(source)
        if not isinstance(source, PIL.Image.Image):
            raise ImageError(f"{name} is empty: neither bytes nor a path.")
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and source.width * source.height > limit:
            raise ImageError(f"{name} has {source.width}x{source.height} pixels, more than the limit of {limit}.")
        if draft is not None:
            source.draft("RGB", draft[::-1])
        if source.mode == "F":
            raise ImageError(f"{name} has floating-point pixels of unknown range. Convert it to 8 bits first.")
        if source.mode.startswith("I"):
            warnings.warn(f"{name} has more than 8 bits a channel; values above 255 are clipped.", stacklevel=2)
        elif source.mode in ("RGBA", "LA") and source.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            warnings.warn(
                f"{name} has transparent pixels; their hidden colour is used, as pipeline() does.",
                stacklevel=2,
            )
        if not ours or source.mode != "RGB":
            return load_image(source)
        source.load()
        ImageOps.exif_transpose(source, in_place=True)  # as `load_image` does, without copying a large picture twice
        return source
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise ImageError(f"{name} cannot be read as a picture: {error}") from error


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Picture files among files and folders (searched in depth, sorted); a file named outright is always kept."""
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS and file.is_file())
            found += sorted(os.fspath(file) for file in inside)
        else:
            found.append(os.fspath(path))
    return found
