"""One picture from anything that holds one, as pipeline sees it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ExifTags
from transformers.image_utils import load_image

from taskres_hf import pictures
from taskres_hf.errors import ImageError
from taskres_hf.picture_files import find_images
from taskres_hf.pictures import (
    IMAGE_EXTENSIONS,
    Remarks,
    ending_status,
    picture_digest,
    read_image,
)


@pytest.fixture(scope="session")
def photo(splits: Any) -> PIL.Image.Image:
    """A real picture, not square."""
    picture: PIL.Image.Image = splits["test"][0]["image"].convert("RGB").resize((90, 60))
    return picture


def _bytes(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _same(source: Any, path: Path) -> bool:
    """Whether `read_image` and `pipeline` see the same pixels."""
    return np.array_equal(np.asarray(read_image(source)), np.asarray(load_image(str(path))))


# ---------------------------------------------------------------------- pixels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "LAB", "I;16", "I"])
def test_pictures_look_as_they_do_to_pipeline(tmp_path: Path, photo: PIL.Image.Image, mode: str) -> None:
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.tif" if mode in ("LAB", "I") else "p.png")
    deep = PIL.Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 3)
    (deep if mode == "I;16" else photo.convert(mode)).save(path)
    assert _same(path, path)
    assert _same({"bytes": path.read_bytes(), "path": None}, path)
    assert _same(PIL.Image.open(path), path)


_KINDS = {".apng": "PNG", ".avifs": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF", ".jpx": "JPEG2000"}


@pytest.mark.parametrize("ending", sorted(IMAGE_EXTENSIONS))
def test_every_ending_of_the_list_is_read(tmp_path: Path, photo: PIL.Image.Image, ending: str) -> None:
    path = tmp_path / f"p{ending.upper()}"
    if _KINDS.get(ending) == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    photo.save(path, _KINDS.get(ending))
    picture = read_image(path)
    assert picture.mode == "RGB"
    assert picture.size == (90, 60) or ending == ".ico"  # smaller there
    assert _same(path, path)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "mpo", "avif"])
def test_the_first_of_several_frames(tmp_path: Path, photo: PIL.Image.Image, kind: str) -> None:
    if f".{kind}" not in IMAGE_EXTENSIONS:
        pytest.skip(f"this Pillow cannot read {kind}")
    path = tmp_path / f"p.{kind}"
    options = {} if kind in ("tiff", "mpo") else {"duration": 100}
    photo.save(path, save_all=True, append_images=[photo.rotate(180), photo.rotate(90)], **options)
    assert _same(path, path)
    assert read_image(path).resize((9, 6)).size == (9, 6)  # although its file is closed


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied(tmp_path: Path, photo: PIL.Image.Image, kind: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / f"p.{kind}", exif=exif)
    assert read_image(tmp_path / f"p.{kind}").size == (60, 90)
    assert _same(tmp_path / f"p.{kind}", tmp_path / f"p.{kind}")


def test_arrays(photo: PIL.Image.Image) -> None:
    colour, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    in_grey = np.asarray(photo.convert("L").convert("RGB"))
    for source in (colour, colour.transpose(2, 0, 1), torch.from_numpy(colour.copy()), colour.tolist()):
        assert np.array_equal(np.asarray(read_image(source)), colour)
    for source in (grey, grey[..., None], grey[None], grey.tolist()):
        assert np.array_equal(np.asarray(read_image(source)), in_grey)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "floating-point pixels of unknown range"),
        ([[0.5, 1.0]], "floating-point"),
        (np.zeros((4, 4), np.uint16), "uint16 of unknown range.*uint8"),
        ([[0, 256]], "unknown range"),
        (np.zeros((3, 4, 3), np.uint8), r"\(3, 4, 3\).*both are possible"),
        (np.zeros((5, 5, 2), np.uint8), r"\(5, 5, 2\).*expected \[H, W\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "expected"),
        (np.zeros((0, 4), np.uint8), "4x0 pixels"),
        ([[1, 2], [3]], "inhomogeneous"),
        (3, "cannot be read from int"),
        (None, "neither bytes nor a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
    ],
)
def test_values_that_leave_doubt_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_image(source)


# ---------------------------------------------------------------------- files that are no pictures


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_a_truncated_file_is_one_clear_message(photo: PIL.Image.Image, kind: str) -> None:
    content = _bytes(photo, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"'p.x' is damaged or cut short"):
            read_image({"bytes": content[: len(content) * 2 // 3], "path": "p.x"})


@pytest.mark.parametrize("content", [b"<html></html>", b"\0" * 100, bytes(range(256)), b"%PDF-1.7 "])
def test_what_is_no_picture(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"damaged or not a picture. Formats that are read: JPEG, PNG"):
        read_image(content)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI", "DDS", "ICNS", "IM"])
def test_a_format_is_read_only_if_listed_whatever_the_name(
    tmp_path: Path, photo: PIL.Image.Image, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would start ghostscript for PostScript, whatever its name."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("another program was started")

    photo.save(tmp_path / "p.jpg", kind)
    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setattr(PIL.Image.Image, "load", never)
    with pytest.raises(ImageError, match="cannot be read: it" + ("" if kind == "IM" else f" looks like {kind}")):
        read_image(tmp_path / "p.jpg")


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("FITS", b"SIMPLE  = "),
        ("HDF5", b"\x89HDF\r\n\x1a\n"),
        ("MPEG", b"\0\0\x01\xb3"),
        ("WMF", b"\xd7\xcd\xc6\x9a\0\0"),
    ],
)
def test_what_pillow_only_recognises(kind: str, start: bytes) -> None:
    with pytest.raises(ImageError, match=f"looks like {kind}, which is not read"):
        read_image(start + b" " * 3000)


def test_formats_without_a_mark_need_their_ending(photo: PIL.Image.Image) -> None:
    content = _bytes(photo, "TGA")
    assert read_image({"bytes": content, "path": "x/p.TGA"}).size == (90, 60)
    with pytest.raises(ImageError):
        read_image({"bytes": content, "path": "x/p.png"})


def test_a_missing_codec_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_FORMATS", ("JPEG", "PNG"))
    monkeypatch.setattr(pictures, "IMAGE_EXTENSIONS", frozenset({".jpg"}))
    for brand, kind in ((b"heic", "HEIF"), (b"mif1", "HEIF"), (b"avif", "AVIF")):
        with pytest.raises(ImageError, match=rf'format {kind}. To read it: pip install "taskres_hf\[heif\]"'):
            read_image(b"\0\0\0\x18ftyp" + brand + b"\0" * 100)
    assert [ending_status(end) for end in (".JPG", ".HEIC", ".avif", ".txt", "")] == [
        "readable", "needs extra", "needs extra", "unknown", "unknown",
    ]  # fmt: skip


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, message in {
        "folder.jpg": "is a folder", "pipe.jpg": "is a pipe or a device", "loop.jpg": "cannot be opened",
        "broken.jpg": "cannot be read: there is no", "missing.jpg": "cannot be read: there is no",
        "empty.jpg": "is empty: 0 bytes",
    }.items():  # fmt: skip
        with pytest.raises(ImageError, match=rf"{name}' {message}"):
            read_image(tmp_path / name)
    for name in ("folder.jpg", "pipe.jpg", "missing.jpg"):
        with pytest.raises(ImageError):
            picture_digest(tmp_path / name)
    for path in (os.devnull, "a\0b", "x" * 5000):
        with pytest.raises(ImageError):
            read_image(path)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: PIL.Image.Image) -> None:
    photo.save(tmp_path / "p.png")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")  # a superuser is never refused

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ImageError, match=r"p.png' cannot be opened: Permission denied"):
        read_image(tmp_path / "p.png")


def test_a_file_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: PIL.Image.Image
) -> None:
    path = tmp_path / "p.bmp"
    photo.save(path)
    identified = pictures._identified

    def and_cut(*arguments: Any) -> Any:
        picture = identified(*arguments)
        os.truncate(path, 100)  # mapped into memory, this would end the process
        return picture

    monkeypatch.setattr(pictures, "_identified", and_cut)
    with pytest.raises(ImageError, match="cut short"):
        read_image(path)


def test_huge_and_floating_point_pictures(monkeypatch: pytest.MonkeyPatch, photo: PIL.Image.Image) -> None:
    with pytest.raises(ImageError, match="floating-point"):
        read_image(PIL.Image.new("F", (4, 4)))
    with pytest.raises(ImageError, match="floating-point"):
        read_image(_bytes(photo.convert("F"), "TIFF"))
    content = _bytes(photo, "PNG")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 5000)
    for source in (photo, np.asarray(photo)):
        with pytest.raises(ImageError, match="90x60 pixels, more than the limit of 5000"):
            read_image(source)
    with pytest.warns(PIL.Image.DecompressionBombWarning), pytest.raises(ImageError, match="limit of 5000"):
        read_image(content)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(content)


def test_names_in_messages_are_harmless(tmp_path: Path) -> None:
    name = os.fsdecode(b"\x1b[31m\xff\n.jpg")
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / name)
    assert r"\x1b[31m\udcff\x0a.jpg" in str(error.value)
    (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / name)
    assert str(error.value).isprintable()


# ---------------------------------------------------------------------- addresses


@pytest.fixture
def server(photo: PIL.Image.Image) -> Iterator[str]:
    """A web server with one picture, behind a redirection too."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", "/p.png")
                self.end_headers()
                return
            ok = self.path.startswith("/p.png")
            self.send_response(200 if ok else 404)
            self.end_headers()
            self.wfile.write(_bytes(photo, "PNG") if ok else b"no")

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_addresses_are_read(server: str, tmp_path: Path, photo: PIL.Image.Image) -> None:
    photo.save(tmp_path / "a b.png")
    data = f"data:image/png;base64,{base64.b64encode(_bytes(photo, 'PNG')).decode()}"
    for address in (f"{server}/p.png", f"{server}/moved", (tmp_path / "a b.png").as_uri(), data):
        assert np.array_equal(np.asarray(read_image(address)), np.asarray(photo))
        assert find_images([address]) == [address]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("SERVER/none.png?token=secret", r"/none.png' cannot be downloaded: 404"),
        ("http://user:secret@127.0.0.1:1/p.png", r"'http://127.0.0.1:1/p.png' cannot be downloaded"),
        ("s3://bucket/p.png", r"kind s3://, which is not read. Download"),
        ("gs://bucket/p.png?sig=secret", "kind gs://"),
        ("file:///nowhere/p.png", "there is no file"),
        ("data:image/png;base64,%%%", "is empty"),
        ("data:text/plain,hello", "not a picture"),
    ],
)
def test_addresses_that_cannot_be_read(server: str, address: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        read_image(address.replace("SERVER", server))
    assert "secret" not in str(error.value)


def test_a_download_has_a_limit(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_LARGEST_DOWNLOAD", 100)
    with pytest.raises(ImageError, match="larger than"):
        read_image(f"{server}/p.png")


# ---------------------------------------------------------------------- what is odd, said once


def test_transparency_is_pointed_out(photo: PIL.Image.Image) -> None:
    clear = photo.convert("RGBA")
    clear.putpixel((0, 0), (200, 0, 0, 0))
    palette = photo.quantize(8)
    for content in (
        _bytes(clear, "PNG"), _bytes(palette, "PNG", transparency=2), _bytes(palette, "GIF", transparency=2),
        _bytes(palette, "PNG", transparency=bytes([0] * 8)),
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_image(content)
        assert [str(warning.message).split(" in ")[0] for warning in caught] == ["Transparent pixels"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(photo.convert("RGBA"))  # nothing is transparent


def test_remarks_are_one_warning_of_a_kind_from_any_thread(tmp_path: Path, photo: PIL.Image.Image) -> None:
    clear = PIL.Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    for number in range(20):
        clear.putpixel((0, 0), (number, 0, 0, 0))
        clear.save(tmp_path / f"clear{number}.png")
    PIL.Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16)).save(tmp_path / "deep.png")
    files = find_images([tmp_path]) * 2  # as two views of each
    remarks = Remarks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda file: read_image(file, remarks=remarks), files))
        cells = [{"bytes": Path(file).read_bytes(), "path": "same.png"} for file in files if "clear" in file]
        for cell in cells:
            read_image(cell, remarks=remarks)
        assert not caught
        remarks.warn()
        remarks.warn()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "More than 8 bits a channel in '" in messages[0]
    assert "deep.png'; values above 255 are clipped" in messages[0]
    assert "Transparent pixels in 40 pictures (one of them: '" in messages[1]  # 20 files, 20 cells of one name


# ---------------------------------------------------------------------- digests


def test_a_digest_is_that_of_the_content(tmp_path: Path, photo: PIL.Image.Image) -> None:
    photo.save(tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    expected = hashlib.sha256(content).hexdigest()
    assert picture_digest(tmp_path / "p.png") == expected
    assert picture_digest({"bytes": content, "path": "gone.png"}) == expected
    assert picture_digest(content) == expected
    pixels = np.asarray(photo)
    digests = {picture_digest(source) for source in (pixels, pixels.reshape(90, 60, 3), photo.convert("L"))}
    assert len(digests) == 3


def test_pixels_that_are_shown_otherwise_are_another_picture(photo: PIL.Image.Image) -> None:
    upright, turned = photo.copy(), photo.copy()
    turned.getexif()[ExifTags.Base.Orientation] = 6
    palettes = [photo.convert("P").convert("PA") for _ in range(2)]
    palettes[1].putpalette(palettes[1].getpalette()[::-1])
    for one, other in ((upright, turned), palettes):
        assert np.array_equal(one, other)
        assert not np.array_equal(read_image(one), read_image(other))
        assert picture_digest(one) != picture_digest(other)
