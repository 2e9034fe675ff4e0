"""Odd, broken and hostile picture files: training, measuring, `taskres predict` and `pipeline` say the same of each."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments, load_training_data
from taskres_hf.cli import main
from taskres_hf.data import load_evaluation_data
from taskres_hf.errors import ImageError
from taskres_hf.picture_files import list_images
from taskres_hf.pictures import IMAGE_EXTENSIONS, picture_digest, read_image

Picture = PIL.Image.Image
CLASSES = ["odd", "plain", "other"]


def _bytes(picture: Picture, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.copy().save(stream, kind, **options)
    return stream.getvalue()


def _png(size: tuple[int, int], rows: bytes, depth: int = 8, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of RGB rows as its header and chunks are given, true or not."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _rows(picture: Picture, kind: str = ">u1") -> bytes:
    return b"".join(b"\0" + (row.astype(kind) * (257 if kind == ">u2" else 1)).tobytes() for row in np.asarray(picture))


def _of(mode: str, kind: str, **options: Any) -> Callable[[Picture], bytes]:
    return lambda photo: _bytes(photo.convert(mode), kind, **options)


def _frames(kind: str) -> Callable[[Picture], bytes]:
    return lambda photo: _bytes(photo, kind, save_all=True, append_images=[photo.rotate(180)])


def _cut(kind: str, share: float = 0.7, **options: Any) -> Callable[[Picture], bytes]:
    def content(photo: Picture) -> bytes:
        whole = _bytes(photo, kind, **options)
        return whole[: int(len(whole) * share)]

    return content


def _clear(mode: str, kind: str, **options: Any) -> Callable[[Picture], bytes]:
    """With an alpha channel that takes every value."""

    def content(photo: Picture) -> bytes:
        picture = photo.convert(mode)
        picture.putalpha(photo.getchannel(0))
        return _bytes(picture, kind, **options)

    return content


def _palette(kind: str, transparency: int | bytes) -> Callable[[Picture], bytes]:
    return lambda photo: _bytes(photo.quantize(16), kind, transparency=transparency)


def _turned(orientation: int) -> Callable[[Picture], bytes]:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return lambda photo: _bytes(photo, "JPEG", exif=exif)


def _heic(photo: Picture) -> bytes:
    from pillow_heif import from_pillow

    stream = io.BytesIO()
    from_pillow(photo).save(stream, quality=95)
    return stream.getvalue()


def _floats(photo: Picture) -> bytes:
    return _bytes(PIL.Image.fromarray((np.asarray(photo.convert("L")) / 255).astype(np.float32)), "TIFF")


def _deep(kind: str) -> Callable[[Picture], bytes]:
    return lambda photo: _bytes(PIL.Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), kind)


def _psd(photo: Picture) -> bytes:
    header = b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, photo.height, photo.width, 8, 3)
    return header + bytes(14) + np.asarray(photo).transpose(2, 0, 1).tobytes()


@dataclass(frozen=True)
class Odd:
    """A file: how it is made, and what is wrong with it (None: it is read). `differs`: `pipeline` is not asked."""

    content: Callable[[Picture], bytes] | bytes
    problem: str | None = None
    differs: str = ""


NO_PICTURE = "damaged or not a picture"
NOT_LISTED = "Pillow knows more formats than are read here, and pipeline takes what Pillow takes"
BLACK = "pipeline reads values from 0 to 1 as black"

READ = {
    "plain.jpg": Odd(_of("RGB", "JPEG")),
    "progressive.jpg": Odd(_of("RGB", "JPEG", progressive=True)),
    "grey.jpg": Odd(_of("L", "JPEG")),
    "cmyk.jpg": Odd(_of("CMYK", "JPEG")),
    "cmyk.tif": Odd(_of("CMYK", "TIFF")),
    # Pillow before 13 writes others than it reads back.
    "ycbcr.tif": Odd(_of("YCbCr", "TIFF", **({} if PIL.__version__ >= "13" else {"compression": "tiff_lzw"}))),
    "lab.tif": Odd(_of("LAB", "TIFF")),
    "trailing.jpg": Odd(lambda photo: _bytes(photo, "JPEG") + b"<html>" * 50),
    "jpeg called.png": Odd(_of("RGB", "JPEG")),
    "webp called.jpg": Odd(_of("RGB", "WEBP")),
    "no exif.jpg": Odd(lambda photo: b"\xff\xd8\xff\xe1\0\x10Exif\0\0junkjunk" + _bytes(photo, "JPEG")[2:]),
    **{f"exif {number}.jpg": Odd(_turned(number)) for number in (2, 3, 4, 5, 6, 7, 8, 99)},
    "grey16.png": Odd(_deep("PNG")),
    "grey16.tif": Odd(_deep("TIFF")),
    "grey32.tif": Odd(_of("I", "TIFF")),
    "rgb16.png": Odd(lambda photo: _png(photo.size, _rows(photo, ">u2"), 16)),
    "la.png": Odd(_clear("L", "PNG")),
    "rgba.png": Odd(_clear("RGB", "PNG")),
    "rgba.webp": Odd(_clear("RGB", "WEBP", lossless=True)),
    "rgba.tif": Odd(_clear("RGB", "TIFF")),
    "rgba.bmp": Odd(_clear("RGB", "BMP")),
    "rgba.tga": Odd(_clear("RGB", "TGA")),
    "rgba.jp2": Odd(_clear("RGB", "JPEG2000")),
    "palette, one colour clear.png": Odd(_palette("PNG", 3)),
    "palette, one colour clear.gif": Odd(_palette("GIF", 3)),
    "palette with alpha.png": Odd(_palette("PNG", bytes(range(0, 256, 16)))),
    "grey, one colour clear.png": Odd(
        lambda photo: _bytes(photo.convert("L"), "PNG", transparency=photo.convert("L").getpixel((5, 5)))
    ),
    "bits, one colour clear.png": Odd(_of("1", "PNG", transparency=0)),
    "one colour clear.png": Odd(lambda photo: _bytes(photo, "PNG", transparency=photo.getpixel((5, 5)))),
    "bits.png": Odd(_of("1", "PNG")),
    "fax.tif": Odd(_of("1", "TIFF", compression="group4")),
    "lzw.tif": Odd(_of("RGB", "TIFF", compression="tiff_lzw")),
    "jpeg.tif": Odd(_of("RGB", "TIFF", compression="jpeg")),
    "one pixel.png": Odd(
        lambda photo: _bytes(photo.resize((1, 1)), "PNG"), differs="pipeline of older transformers fails"
    ),
    "line.png": Odd(lambda photo: _bytes(photo.resize((1, 200)), "PNG")),
    "long line.png": Odd(lambda photo: _bytes(photo.resize((1, 20000)), "PNG"), differs="pipeline takes gigabytes"),
    "plain.gif": Odd(_of("RGB", "GIF")),
    "moving.gif": Odd(_frames("GIF")),
    "moving.webp": Odd(_frames("WEBP")),
    "moving.png": Odd(_frames("PNG")),
    "moving.avif": Odd(_frames("AVIF")),
    "two.mpo": Odd(_frames("MPO")),
    "two.jpg": Odd(_frames("MPO")),
    "pages.tif": Odd(_frames("TIFF")),
    "plain.avif": Odd(_of("RGB", "AVIF")),
    "plain.heic": Odd(_heic),
    "plain.jp2": Odd(_of("RGB", "JPEG2000")),
    "stamp.ico": Odd(_of("RGB", "ICO")),
    "packed.tga": Odd(_of("RGB", "TGA", compression="tga_rle")),
    "bad profile.png": Odd(lambda photo: _png(photo.size, _rows(photo), 8, (b"iCCP", b"x\0\0" + zlib.compress(b"?")))),
    "new\nline.png": Odd(_of("RGB", "PNG")),
    "\x1b[31mred.png": Odd(_of("RGB", "PNG")),
    os.fsdecode(b"not utf-8 \xff.png"): Odd(_of("RGB", "PNG")),
    "=SUM(A1).png": Odd(_of("RGB", "PNG")),
}
REFUSED = {
    "cut.jpg": Odd(_cut("JPEG"), "cut short"),
    "cut, progressive.jpg": Odd(_cut("JPEG", progressive=True), "cut short"),
    "cut.png": Odd(_cut("PNG"), "cut short"),
    "cut.gif": Odd(_cut("GIF"), "cut short"),
    "cut.webp": Odd(_cut("WEBP"), "cut short"),
    "cut.tif": Odd(_cut("TIFF"), "cut short"),
    "no more than a start.jpg": Odd(_cut("JPEG", 0.02), "cut short"),
    "web page.jpg": Odd(b"<!DOCTYPE html><html><body>404</body></html>", NO_PICTURE),
    "empty.jpg": Odd(b"", "is empty: 0 bytes"),
    "zeros.jpg": Odd(bytes(2000), NO_PICTURE),
    "archive.jpg": Odd(b"PK\x03\x04" + bytes(100), NO_PICTURE),
    "drawing.jpg": Odd(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', NO_PICTURE),
    "document.jpg": Odd(_of("RGB", "PDF"), NO_PICTURE),
    "empty box.heic": Odd(b"\0\0\0\x18ftypheic" + bytes(100), NO_PICTURE),
    "script.jpg": Odd(_of("RGB", "EPS"), "looks like EPS"),
    "layers.jpg": Odd(_psd, "looks like PSD", NOT_LISTED),
    "texture.jpg": Odd(_of("RGB", "DDS"), "looks like DDS", NOT_LISTED),
    "pcx.png": Odd(_of("RGB", "PCX"), "looks like PCX", NOT_LISTED),
    "measured.tif": Odd(_of("F", "TIFF"), "floating-point", BLACK),
    "measured from 0 to 1.tif": Odd(_floats, "floating-point", BLACK),
    "no pixels.png": Odd(_png((0, 0), b""), NO_PICTURE),
    "bomb.png": Odd(_png((60000, 60000), bytes(1000)), "too many pixels"),
    "large.png": Odd(_png((11000, 11000), bytes(1000)), "more than the limit"),
    "text bomb.png": Odd(
        lambda photo: _png(photo.size, _rows(photo), 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))),
        "Decompressed data too large",
    ),
    "locked.png": Odd(_of("RGB", "PNG"), "Permission denied"),
}
# No regular files: training's listing leaves them out and says so, `predict` has a row that says so.
NO_FILES = {
    "pipe.png": "is a pipe or a device",
    "socket.png": "is a pipe or a device",
    "loop.jpg": "cannot be opened",
    "broken link.jpg": "there is no file",
}
FILES = READ | REFUSED


def _missing(name: str) -> str | None:
    ending = Path(name).suffix
    return None if ending in IMAGE_EXTENSIONS else f"this Pillow does not read {ending}"


@pytest.fixture(scope="module")
def folder(splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Class folders, one with all odd files that this Pillow can read or that nothing should read."""
    folder = tmp_path_factory.mktemp("data")
    odd = folder / "odd"
    odd.mkdir()
    (folder / "plain").mkdir()
    photo = splits["test"][0]["image"].convert("RGB").resize((90, 60))
    photo.rotate(180).save(folder / "plain" / "good.png")
    for name, file in FILES.items():
        if _missing(name) is None:
            (odd / name).write_bytes(file.content if isinstance(file.content, bytes) else file.content(photo))
    (odd / "folder.jpg").mkdir()
    os.mkfifo(odd / "pipe.png")
    (odd / "loop.jpg").symlink_to("loop.jpg")
    (odd / "broken link.jpg").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as end, pytest.MonkeyPatch.context() as patch:
        patch.chdir(odd)  # the name of a socket is at most 108 bytes long
        end.bind("socket.png")
        patch.undo()
        yield folder


@pytest.fixture(scope="module")
def artifact(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("artifact") / "artifact"
    TaskResCLIPForImageClassification.from_base(base, CLASSES).save_pretrained(path)
    return str(path)


@dataclass
class Verdicts:
    """Probabilities of the classes by digest of the file, or the message; `predicted` by the file's name."""

    trained: dict[str, list[float] | str]
    measured: dict[str, list[float] | str]
    predicted: dict[str, list[float] | str]
    account: str


def _by_digest(model: TaskResCLIPForImageClassification, images: Any, files: list[str]) -> dict[str, list[float] | str]:
    trainer = TaskResTrainer(model, TaskResTrainingArguments(on_error="skip", disable_tqdm=True), images)
    embedded = trainer.embed(images)
    with torch.no_grad():
        scores = model.classifier(embedded.image_embeds[0]).softmax(dim=1).tolist()
    verdicts: dict[str, list[float] | str] = dict(zip(embedded.digests, scores, strict=True))
    for row in embedded.skipped:
        with pytest.raises(ImageError) as error:
            images.image(row)
        name = next(file for file in files if f"/{_shown(file)}'" in str(error.value))
        verdicts[name] = str(error.value)
    return verdicts


def _shown(path: str) -> str:
    from taskres_hf.tables import visible

    return visible(Path(path).name)


@pytest.fixture(scope="module")
def verdicts(folder: Path, artifact: str, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """What three ways of the library say of every file, in one run each."""
    model = TaskResCLIPForImageClassification.from_pretrained(artifact)
    output = tmp_path_factory.mktemp("output") / "rows.jsonl"
    files = list_images([folder / "odd"]).files
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TASKRES_CACHE", str(output.parent / "cache"))
        _lock(patch)
        train = load_training_data(str(folder))
        trained = _by_digest(model, train.train, files)
        measured = _by_digest(model, load_evaluation_data(str(folder), class_names=CLASSES), files)
        options = ["--top-k", "3", "--output", str(output), "--quiet", "--allow-skipped", "--engine", "torch"]
        with pytest.raises(SystemExit) as end:
            main(["predict", artifact, str(folder / "odd"), *options])
        assert not end.value.code
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    predicted: dict[str, list[float] | str] = {}
    for file, row in zip(files, rows, strict=True):
        scores = {top["label"]: top["score"] for top in row["predictions"]}
        predicted[Path(file).name] = row["error"] or [scores[name] for name in CLASSES]
    return Verdicts(trained, measured, predicted, "\n".join(train.account.lines()))


def _lock(patch: pytest.MonkeyPatch) -> None:
    """Refuse one file as the system would; to a superuser no file is refused."""
    real = open

    def refusing(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str) and file.endswith("locked.png"):
            raise PermissionError(13, "Permission denied", file)
        return real(file, *arguments, **options)

    patch.setattr("builtins.open", refusing)


@pytest.fixture(scope="module")
def pipe(artifact: str) -> Any:
    from transformers import pipeline

    return pipeline("image-classification", model=artifact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES, ids=[name.encode("ascii", "backslashreplace").decode() for name in FILES])
def test_every_way_says_the_same(
    name: str, folder: Path, verdicts: Verdicts, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := _missing(name):
        pytest.skip(reason)
    file, path = FILES[name], folder / "odd" / name
    if path.suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()  # which `pipeline` leaves to its user
    _lock(monkeypatch)
    predicted = verdicts.predicted[name]
    if file.problem is not None:
        for verdict in (predicted, verdicts.trained[str(path)], verdicts.measured[str(path)]):
            assert isinstance(verdict, str)
            assert file.problem in verdict
            assert verdict.removeprefix(verdict.partition("'")[0]) == predicted  # beside "Row 3: "
            assert verdict.isprintable()
        if not file.differs:
            with pytest.raises(Exception):  # noqa: B017, PT011 (Pillow raises many types)
                pipe(str(path))
        return
    assert not isinstance(predicted, str), predicted
    digest = picture_digest(path)
    for verdict in (verdicts.trained[digest], verdicts.measured[digest]):
        assert verdict == pytest.approx(predicted, abs=1e-4)
    if not file.differs:
        scores = {top["label"]: top["score"] for top in pipe(str(path), top_k=3)}
        assert [scores[label] for label in CLASSES] == pytest.approx(predicted, abs=2e-3)  # two grey levels


@pytest.mark.parametrize(("name", "problem"), NO_FILES.items())
def test_what_is_no_regular_file_is_named_everywhere(
    name: str, problem: str, folder: Path, verdicts: Verdicts, pipe: Any
) -> None:
    assert f"odd/{name}" in verdicts.account
    verdict = verdicts.predicted[name]
    assert isinstance(verdict, str)
    assert problem in verdict
    with pytest.raises(Exception):  # noqa: B017, PT011
        pipe(str(folder / "odd" / name))


def test_nothing_is_lost_and_a_folder_is_no_picture(folder: Path, verdicts: Verdicts) -> None:
    there = {name for name in FILES if _missing(name) is None}
    assert set(verdicts.predicted) == there | set(NO_FILES)
    assert f"{len(there) + 1} pictures of 2 classes" in verdicts.account
    with pytest.raises(ImageError, match=r"folder.jpg' is a folder"):
        read_image(folder / "odd" / "folder.jpg")


@pytest.mark.parametrize("name", ["one colour clear.png", "grey, one colour clear.png", "bits, one colour clear.png"])
def test_a_clear_colour_is_pointed_out_in_every_mode(name: str, folder: Path) -> None:
    with pytest.warns(UserWarning, match="Transparent pixels in"):
        read_image(folder / "odd" / name)


def test_a_clear_colour_makes_another_picture(splits: Any) -> None:
    """Decoded, the pixels are equal; what they are embedded as is not."""
    picture = splits["test"][0]["image"].convert("RGB").quantize(16)
    clear = picture.copy()
    clear.info["transparency"] = 3
    assert picture_digest(picture) != picture_digest(clear)
