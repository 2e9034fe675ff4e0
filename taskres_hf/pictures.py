"""One picture from anything that can hold one.

Pictures are decoded in one place, `read_image`, through the same `transformers.image_utils.load_image` that
`pipeline` uses, so training and serving cannot see different pixels (EXIF rotation, alpha, CMYK).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import io
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import PurePath
from typing import IO, Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ExifTags, ImageOps, features
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from .errors import ImageError
from .tables import visible

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
_WITHOUT_MARK = ("DIB", "TGA")  # nothing in the content is sure to tell them: only with their own ending
_EXTRA = ("AVIF", "HEIF")  # formats that `pip install "taskres_hf[heif]"` adds where they are missing


def _is_decodable(name: str) -> bool:
    if name == "HEIF":
        return importlib.util.find_spec("pillow_heif") is not None
    if name == "AVIF" and "avif" not in features.modules:  # Pillow before 11.3
        return False
    return name not in _CODECS or bool(features.check(_CODECS[name]))


_FORMATS = tuple(name for name in _ENDINGS if _is_decodable(name))
IMAGE_EXTENSIONS = frozenset(ending for name in _FORMATS for ending in _ENDINGS[name])

_LARGEST_DOWNLOAD = _LARGEST_HELD = 256 << 20
_ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]+://")


def ending_status(suffix: str) -> Literal["readable", "needs extra", "unknown"]:
    """What can be done with files of an ending, such as `.jpg`; upper and lower case are the same.

    `"needs extra"` are those that `pip install "taskres_hf[heif]"` makes readable: HEIC, and AVIF with an old Pillow.
    """
    suffix = suffix.lower()
    if suffix in IMAGE_EXTENSIONS:
        return "readable"
    return "needs extra" if any(suffix in _ENDINGS[name] for name in _EXTRA) else "unknown"


def is_address(text: str) -> bool:
    """Whether text is an address (`https://`, `s3://`, `file://`, `data:`) and not a path."""
    return bool(_ADDRESS.match(text)) and not os.path.lexists(text)


def size_and_time(file: str | os.PathLike[str]) -> tuple[int, int]:
    """What tells a changed file without reading it, as a run that goes on would have to of all that are done."""
    try:
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # an address, or a file that is not there: reading it says so
        return -1, 0


class Remarks:
    """Counts what is odd about pictures, in any thread, to say it in one line of each kind instead of one a picture."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, dict[Any, str]] = {}  # kind -> what tells a picture from others -> its name

    def add(self, kind: str, key: Any, name: str) -> None:
        """Note one picture; noting it again, as another view of it, counts once."""
        with self._lock:
            self._seen.setdefault(kind, {}).setdefault(key, name)

    def warn(self, stacklevel: int = 2) -> None:
        """Give one warning of each kind that was met, and forget them."""
        with self._lock:
            seen, self._seen = self._seen, {}
        for kind, names in sorted(seen.items()):
            subject = next(iter(names.values()))
            if len(names) > 1:
                subject = f"{len(names)} pictures (one of them: {subject})"
            warnings.warn(_REMARKS[kind].format(subject), stacklevel=stacklevel + 1)


_REMARKS = {
    "deep": "More than 8 bits a channel in {}; values above 255 are clipped, as pipeline() does.",
    "transparent": "Transparent pixels in {}; what pipeline() makes of them is used, which may be a hidden colour.",
}


def read_image(source: Any, draft: tuple[int, int] | None = None, remarks: Remarks | None = None) -> PIL.Image.Image:
    """A picture as RGB, upright, exactly as `pipeline` would see it; of several frames or pages the first.

    Args:
        source: path, `http(s)://`, `file://` or `data:` address, bytes, `{"bytes": ..., "path": ...}` (a cell of an
            undecoded `datasets` column), PIL image, or uint8 array (or nested lists of whole numbers from 0 to 255)
            [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4.
        draft: let JPEG decoding stop at the smallest scale that still covers this height and width; faster on large
            pictures, and not exactly what `pipeline` would see.
        remarks: collects what is odd (transparency, more than 8 bits); None warns about each picture at once.

    Raises:
        ImageError: no regular file, not a picture in a format of `IMAGE_EXTENSIONS` (by its content, whatever its
            name), truncated, more pixels than Pillow's limit, or values whose range is unknown.
    """
    name = _name(source)
    try:
        with ExitStack() as stack:
            stream = _stream(source, name, stack)
            if stream is not None:
                picture: PIL.Image.Image = _identified(stream, name, _path(source))
            elif isinstance(source, PIL.Image.Image):
                picture = source
            else:
                picture = PIL.Image.fromarray(_as_bytes(source, name))
            _check_size(picture, name)
            if stream is not None and draft is not None:
                picture.draft("RGB", draft[::-1])
            mine = remarks or Remarks()
            for kind in _oddities(picture, name):
                mine.add(kind, _key(source), name)
            if remarks is None:
                mine.warn(stacklevel=2)
            if isinstance(picture.info.get("transparency"), bytes):
                # Pillow has a warning of its own about such palettes; converting to RGB makes no use of it.
                picture = picture if stream is not None else picture.copy()
                del picture.info["transparency"]
            if stream is None:
                return _without_key(load_image(picture))
            if picture.mode != "RGB" or "transparency" in picture.info:
                return _without_key(load_image(picture))
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # as `load_image`, without copying a large picture twice
            return picture
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise ImageError(f"{name} is damaged or cut short: {visible(str(error).strip())}") from error


def _without_key(picture: PIL.Image.Image) -> PIL.Image.Image:
    """An RGB picture of which one colour may be transparent, as the image processors of this transformers convert it.

    An alpha channel is gone by then; of such a colour newer processors make white, older ones nothing.
    """
    if picture.info.get("transparency") is None:
        return picture
    newer: Any = {"return_numpy": True} if "return_numpy" in inspect.signature(convert_to_rgb).parameters else {}
    return PIL.Image.fromarray(np.asarray(convert_to_rgb(picture, **newer)))


def read_once(source: Any) -> tuple[Any, str, os.stat_result | None]:
    """A picture's content, for `read_image` to decode without reading it again, and its `picture_digest`.

    Returns:
        The content, the digest, and the status of a file that did not change meanwhile, else None. A file above 256 MiB
        is not held, but read again when it is decoded.

    Raises:
        ImageError: there is nothing to read; whether it is a picture is not looked at.
    """
    name = _name(source)
    try:
        with ExitStack() as stack:
            stream = _stream(source, name, stack)
            if stream is None:
                pixels, shown = np.asarray(source), None
                if isinstance(source, PIL.Image.Image):  # what else decides which picture it is
                    palette = source.getpalette() if source.mode in ("P", "PA") else None
                    turned = source.getexif().get(ExifTags.Base.Orientation)
                    shown = (source.mode, palette, source.info.get("transparency"), turned)
                kind = f"{shown} {pixels.dtype} {pixels.shape}"
                return source, hashlib.sha256(kind.encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest(), None
            before = None if isinstance(stream, io.BytesIO) else os.fstat(stream.fileno())
            if before is not None and before.st_size > _LARGEST_HELD:
                digest = hashlib.sha256()
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
                return source, digest.hexdigest(), None
            content = stream.read()
            states = () if before is None else (before, os.fstat(stream.fileno()))
            if len({(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states}) > 1:
                before = None
            return {"bytes": content, "path": _path(source)}, hashlib.sha256(content).hexdigest(), before
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name} cannot be read: {visible(str(error))}") from error


def picture_digest(source: Any) -> str:
    """SHA-256, hexadecimal, of a file's content, or of an array's or PIL image's pixels and size; see `read_once`."""
    return read_once(source)[1]


def _path(source: Any) -> str | None:
    """The path or address of a picture, as text; None for what has none."""
    path = source.get("path") if isinstance(source, Mapping) else source
    return os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else None


def _name(source: Any) -> str:
    """What an error calls a picture: no control characters, no password or signature of an address, not too long."""
    path = _path(source)
    if not path:
        return "the picture"
    if _ADDRESS.match(path) and not path.startswith("data:"):
        parts = urlsplit(path)
        path = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    shown = visible(path)
    return f"'{shown if len(shown) <= 300 else shown[:120] + ' ... ' + shown[-120:]}'"


def _key(source: Any) -> Any:
    """What tells a picture from others: its bytes or its path."""
    content = source.get("bytes") if isinstance(source, Mapping) else source
    if isinstance(content, (bytes, bytearray)):
        return hashlib.sha256(content).digest()
    return _path(source) or object()


def _stream(source: Any, name: str, stack: ExitStack) -> IO[bytes] | None:
    """The bytes of a picture, closed with `stack`; None for an array or PIL image.

    A file is not given to Pillow by its name: it would be mapped into memory, and cutting it short meanwhile would end
    the process.
    """
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ImageError(f"{name} is empty: neither bytes nor a path.")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.fsdecode(source)
    if is_address(path):
        scheme = path.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return io.BytesIO(_download(path, name))
        if scheme == "data":
            with urlopen(path) as reply:
                return io.BytesIO(reply.read())
        if scheme != "file":
            raise ImageError(
                f"{name} is an address of the kind {scheme}://, which is not read. Download the picture first; paths, "
                "http(s)://, file:// and data: are read."
            )
        path = url2pathname(urlsplit(path).path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise ImageError(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file.")
        return stack.enter_context(open(path, "rb"))
    except FileNotFoundError:
        raise ImageError(f"{name} cannot be read: there is no file of that name.") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be opened: {error.strerror}.") from error


def _download(url: str, name: str) -> bytes:
    """The content at an address, at most 256 MiB and within two minutes."""
    from huggingface_hub import get_session

    content, end = bytearray(), time.monotonic() + 120
    headers = {"User-Agent": "taskres_hf"}  # some servers refuse a library's default name
    try:
        with get_session().stream("GET", url, follow_redirects=True, timeout=30, headers=headers) as reply:
            if reply.status_code != 200:
                raise ImageError(f"{name} cannot be downloaded: {reply.status_code} {reply.reason_phrase}.")
            for chunk in reply.iter_bytes():
                content += chunk
                if len(content) > _LARGEST_DOWNLOAD or time.monotonic() > end:
                    raise ImageError(f"{name} cannot be downloaded: it is larger than 256 MiB or takes too long.")
    except ImageError:
        raise
    except Exception as error:  # whatever the Hub client's library of this version raises
        raise ImageError(f"{name} cannot be downloaded: {visible(str(error)) or type(error).__name__}.") from error
    return bytes(content)


def _identified(stream: IO[bytes], name: str, path: str | None) -> PIL.Image.Image:
    """The picture in a stream, not decoded yet, if its content is of a format that is read."""
    start = stream.read(32)
    stream.seek(0)
    if not start:
        raise ImageError(f"{name} is empty: 0 bytes.")
    ending = PurePath(path or "").suffix.lower()
    formats = [name for name in _FORMATS if name not in _WITHOUT_MARK or ending in _ENDINGS[name]]
    if "HEIF" in formats:
        if start[4:8] == b"ftyp":
            _register_heif()
        else:
            formats.remove("HEIF")
    try:
        return PIL.Image.open(stream, formats=formats)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has too many pixels: {error}") from error
    except PIL.UnidentifiedImageError:
        pass
    missing = _missing_format(start)
    if missing:
        raise ImageError(f'{name} is a picture in the format {missing}. To read it: pip install "taskres_hf[heif]"')
    PIL.Image.init()  # the other formats, whose marks are looked for, and no more
    others = {kind: accepts for kind, (_, accepts) in PIL.Image.OPEN.items() if kind not in _ENDINGS and accepts}
    kind = next((kind for kind, accepts in others.items() if accepts(start) is True), None)
    problem = f"it looks like {kind}, which is not read" if kind else "it is damaged or not a picture"
    raise ImageError(f"{name} cannot be read: {problem}. Formats that are read: {', '.join(_FORMATS)}.")


def _missing_format(start: bytes) -> str | None:
    """The format of a file that an extra would read, by how it starts."""
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    kind = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF", b"msf1": "HEIF",
            b"hevc": "HEIF", b"heim": "HEIF", b"heis": "HEIF"}.get(brand)  # fmt: skip
    return kind if kind not in _FORMATS else None


@lru_cache(maxsize=1)
def _register_heif() -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener()


def _as_bytes(source: Any, name: str) -> NDArray[np.uint8]:
    """Pixels [H, W] or [H, W, C] of an array whose values and order of dimensions leave no doubt."""
    nested = isinstance(source, (list, tuple))
    if not nested and not hasattr(source, "__array__"):
        raise ImageError(f"{name} cannot be read from {type(source).__name__}: expected a path, bytes or pixels.")
    pixels = np.asarray(source)
    whole = nested and pixels.dtype.kind in "iu" and pixels.size and pixels.min() >= 0 and pixels.max() <= 255
    if pixels.dtype != np.uint8 and not whole:
        kind = "floating-point pixels" if pixels.dtype.kind == "f" else f"pixels of the type {pixels.dtype}"
        raise ImageError(f"{name} has {kind} of unknown range. Convert it to 8 bits (uint8, 0 to 255) first.")
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4) for axis in (0, 2))
    if pixels.ndim != 2 and first == last:
        raise ImageError(
            f"{name} is an array of shape {pixels.shape}; expected [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4"
            f"{', and here both are possible' if first else ''}."
        )
    pixels = np.moveaxis(pixels, 0, 2) if first else pixels
    return np.ascontiguousarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels, np.uint8)


def _check_size(picture: PIL.Image.Image, name: str) -> None:
    if 0 in picture.size:
        raise ImageError(f"{name} has {picture.width}x{picture.height} pixels: there is nothing to see.")
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise ImageError(f"{name} has {picture.width}x{picture.height} pixels, more than the limit of {limit}.")


def _oddities(picture: PIL.Image.Image, name: str) -> list[str]:
    """Which of `_REMARKS` fit a picture."""
    if picture.mode == "F":
        raise ImageError(f"{name} has floating-point pixels of unknown range. Convert it to 8 bits first.")
    if picture.mode.startswith("I"):
        return ["deep"]
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        alpha = (picture if "A" in picture.mode else picture.convert("RGBA")).getchannel("A")
        lowest = alpha.getextrema()[0]
        return ["transparent"] if isinstance(lowest, (int, float)) and lowest < 255 else []
    return []
