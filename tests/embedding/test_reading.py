"""Pictures on their way to the tower: each is read once, and what is known is not made again."""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import ImageFile
from support import pictures_that_settle

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.data.reading import FileCells
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, content_digest, embed_images
from taskres_hf.errors import ImageError

Model = TaskResCLIPForImageClassification
COUNT = 24


@pytest.fixture(scope="module")
def embedder(base: str) -> Embedder:
    model = Model.from_base(base, ["a", "b"])
    return Embedder(model.clip, model.image_processor)


@pytest.fixture
def folder(splits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures that were put there long ago."""
    place = pictures_that_settle(splits["test"], COUNT, tmp_path / "pictures", monkeypatch)
    time.sleep(0.02)  # further than a tick of the file system's clock
    return place


def _images(place: Path, labels: int = 2) -> LabelledImages:
    names = sorted(str(path) for path in place.rglob("*") if path.suffix == ".png")
    return LabelledImages.from_cells(FileCells(names), [row % labels for row in range(len(names))], ["a", "b"])


class _Seen:
    """What was done: reads of each file, decoded pictures, pictures that passed the tower in each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: Counter[str] = Counter()
        self.decoded: list[int] = []
        self.batches: list[int] = []
        lock, image, collate = threading.Lock(), LabelledImages.image, type(_anything).collate

        def opened(path: str, mode: str) -> Any:
            with lock:
                self.reads[os.path.basename(path)] += 1
            return open(path, mode)

        def decode(images: LabelledImages, index: int, *rest: Any) -> Any:
            self.decoded.append(index)
            return image(images, index, *rest)

        def collated(preprocess: Any, prepared: Any, *rest: Any) -> Any:
            self.batches.append(len(prepared))
            return collate(preprocess, prepared, *rest)

        monkeypatch.setattr("taskres_hf.pictures.open", opened, raising=False)
        monkeypatch.setattr(LabelledImages, "image", decode)
        monkeypatch.setattr(type(_anything), "collate", collated)

    def clear(self) -> None:
        self.reads.clear()
        del self.decoded[:], self.batches[:]

    @property
    def nothing(self) -> bool:
        return not self.reads and not self.decoded and not self.batches


_anything: Any = None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, embedder: Embedder) -> _Seen:
    global _anything
    embedder.get_ready()
    _anything = embedder.preprocess
    return _Seen(monkeypatch)


def _embed(embedder: Embedder, images: LabelledImages, cache: Path | None = None, **options: Any) -> ImageFeatures:
    return embed_images(embedder, images, cache_dir=cache, **{"batch_size": 4, "progress": False, **options})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("views", [0, 3])
def test_each_file_is_read_once(
    embedder: Embedder, folder: Path, seen: _Seen, monkeypatch: pytest.MonkeyPatch, threads: int, views: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = _embed(embedder, _images(folder), views=views)
    assert set(seen.reads.values()) == {1}
    assert len(seen.reads) == len(seen.decoded) == COUNT
    assert seen.batches == [4] * (COUNT * max(views, 1) // 4)
    assert found.digest == content_digest(_images(folder))


def test_an_unchanged_folder_is_neither_read_nor_decoded(
    embedder: Embedder, folder: Path, tmp_path: Path, seen: _Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _embed(embedder, _images(folder), tmp_path / "cache")
    seen.clear()
    monkeypatch.setattr(Embedder, "get_ready", lambda *a: pytest.fail("the tower is not needed"))
    again = _embed(embedder, _images(folder), tmp_path / "cache")
    assert seen.nothing
    assert torch.equal(again.image_embeds, first.image_embeds)
    assert (again.digest, again.digests) == (first.digest, first.digests)


@pytest.mark.parametrize("threads", [1, 2])
def test_added_pictures_alone_are_embedded_in_full_batches(
    embedder: Embedder, folder: Path, tmp_path: Path, seen: _Seen, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    new = sorted(folder.iterdir())[::3]  # all over the folder
    (tmp_path / "later").mkdir()
    for path in new:
        path.rename(tmp_path / "later" / path.name)
    _embed(embedder, _images(folder), tmp_path / "cache")
    for path in new:
        (tmp_path / "later" / path.name).rename(path)
    seen.clear()
    found = _embed(embedder, _images(folder), tmp_path / "cache")
    assert seen.batches == [4, 4]
    assert seen.reads == dict.fromkeys([path.name for path in new], 1)
    seen.clear()
    assert torch.equal(found.image_embeds, _embed(embedder, _images(folder)).image_embeds)


def test_what_pillow_was_told_to_complete_is_still_named_as_broken(
    embedder: Embedder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:900])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert not _embed(embedder, _images(folder), tmp_path / "cache").skipped
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with pytest.raises(ImageError, match=r"003\.png' is damaged or cut short"):
        _embed(embedder, _images(folder), tmp_path / "cache")


@pytest.mark.parametrize("change", ["renamed", "moved", "reordered", "relabelled", "copied", "as bytes"])
def test_what_is_not_a_change_of_a_picture_costs_no_pass(
    embedder: Embedder, folder: Path, tmp_path: Path, seen: _Seen, change: str
) -> None:
    first = _embed(embedder, _images(folder), tmp_path / "cache")
    order, images = list(range(COUNT)), _images(folder)
    if change == "renamed":
        for row, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"z{COUNT - row:03d}.png")
        order, images = order[::-1], _images(folder)
    elif change == "moved":
        images = _images(folder.rename(tmp_path / "elsewhere"))
    elif change == "reordered":
        order = order[1:] + order[:1]
        images = images.select(order)
    elif change == "relabelled":
        images = _images(folder, labels=1)
    elif change == "copied":
        images = _images(Path(shutil.copytree(folder, tmp_path / "copy")))
    else:
        rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]}
        rows["label"] = ["a", "b"] * (COUNT // 2)
        images = LabelledImages(Dataset.from_dict(rows, Features({"image": Image(), "label": Value("string")})))
    seen.clear()
    found = _embed(embedder, images, tmp_path / "cache")
    assert not seen.decoded
    assert not seen.batches
    assert torch.equal(found.image_embeds, first.image_embeds[:, order])


def test_the_same_picture_twice_is_embedded_once(embedder: Embedder, folder: Path, tmp_path: Path, seen: _Seen) -> None:
    for row in range(COUNT):
        shutil.copy(folder / f"{row % 4:03d}.png", folder / f"{row:03d}.png") if row >= 4 else None
    for cache, views in ((None, 0), (tmp_path / "cache", 2), (tmp_path / "cache", 2)):
        seen.clear()
        found = _embed(embedder, _images(folder), cache, views=views)
        assert len(seen.decoded) in (0, 4)
        assert len(set(found.digests)) == 4
        assert all(torch.equal(found.image_embeds[:, row], found.image_embeds[:, row % 4]) for row in range(COUNT))


def test_more_views_of_the_same_draw_are_added(embedder: Embedder, folder: Path, tmp_path: Path, seen: _Seen) -> None:
    expected = _embed(embedder, _images(folder), views=3)
    _embed(embedder, _images(folder), tmp_path / "cache", views=2)
    seen.clear()
    found = _embed(embedder, _images(folder), tmp_path / "cache", views=3)
    assert sum(seen.batches) == COUNT
    assert torch.equal(found.image_embeds, expected.image_embeds)


@pytest.mark.parametrize("times", ["kept", "put back"])
def test_a_changed_picture_never_gets_the_old_embedding(
    embedder: Embedder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: str
) -> None:
    """Of the same size and, at most, time: changed right after it was read, by a clock too coarse to tell."""
    monkeypatch.undo()  # the ten seconds
    before, target = _embed(embedder, _images(folder), tmp_path / "cache"), folder / "005.png"
    status, content = target.stat(), bytearray((folder / "006.png").read_bytes())
    target.write_bytes(content + b"\0" * max(0, status.st_size - len(content)))
    target.write_bytes(target.read_bytes()[: status.st_size] if len(content) <= status.st_size else content)
    if times == "put back":
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        real = os.fstat

        def coarse(handle: int) -> Any:
            """As if both times were those of before."""
            found = real(handle)
            if found.st_ino != status.st_ino:
                return found
            return os.stat_result((*found[:6], status.st_size, *found[7:10]), _times_of(status))

        monkeypatch.setattr(os, "fstat", coarse)
    after = _embed(embedder, _images(folder), tmp_path / "cache")
    assert torch.equal(after.image_embeds[0, 5], before.image_embeds[0, 6])
    rows = [row for row in range(COUNT) if row != 5]
    assert torch.equal(after.image_embeds[:, rows], before.image_embeds[:, rows])


def _times_of(status: os.stat_result) -> dict[str, Any]:
    return {name: getattr(status, name) for name in ("st_mtime_ns", "st_ctime_ns", "st_mtime", "st_ctime")}


def test_what_is_decoded_is_what_was_digested(
    embedder: Embedder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced between the two: before, its new pixels went under the old name."""
    expected = _embed(embedder, _images(folder))
    real = LabelledImages.image

    def late(images: LabelledImages, index: int, *rest: Any) -> Any:
        shutil.copy(folder / "000.png", str(images.source(index)) + ".new")
        os.replace(str(images.source(index)) + ".new", str(images.source(index)))
        return real(images, index, *rest)

    monkeypatch.setattr(LabelledImages, "image", late)
    found = _embed(embedder, _images(folder), tmp_path / "cache")
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert found.digests == expected.digests


@pytest.mark.parametrize("threads", [1, 2])
def test_few_whole_pictures_are_held_at_once(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("taskres_hf.embedding.features.os.cpu_count", lambda: 2)
    lock, real, held, most = threading.Lock(), LabelledImages.image, 0, 0

    def gone() -> None:
        nonlocal held
        held -= 1

    def image(images: LabelledImages, index: int, *rest: Any) -> PIL.Image.Image:
        nonlocal held, most
        picture = real(images, index, *rest)
        with lock:
            held += 1
            most = max(most, held)
        weakref.finalize(picture, gone)
        return picture

    monkeypatch.setattr(LabelledImages, "image", image)
    _embed(embedder, _images(folder), batch_size=8)
    assert most <= 5  # two threads that read, with one more at hand each, and one about to be freed
