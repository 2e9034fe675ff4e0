"""Embeddings kept on disk: in shards, by several processes, whole or absent, and never the wrong ones."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding import cache as caching
from taskres_hf.embedding.cache import FileDigests, KeptRows
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, embed_images
from taskres_hf.pictures import read_once

Model = TaskResCLIPForImageClassification


@pytest.fixture
def images(splits: Any) -> LabelledImages:
    return LabelledImages(splits["test"].select(range(30)))


@pytest.fixture
def embedder(model: Model) -> Embedder:
    return Embedder(model.clip, model.image_processor)


def _embed(embedder: Embedder, images: LabelledImages, **options: Any) -> ImageFeatures:
    return embed_images(embedder, images, **{"progress": False, "batch_size": 4, **options})


def _shards(folder: Path) -> list[Path]:
    """The files of embeddings."""
    return sorted(path for path in folder.glob("*/*.safetensors") if path.parent.name != "files")


def _stop_after(monkeypatch: pytest.MonkeyPatch, pictures: int, error: BaseException) -> list[int]:
    """Positions of the pictures that are decoded; after so many comes the interrupt."""
    decoded: list[int] = []
    real = LabelledImages.image

    def image(self: LabelledImages, index: int, *rest: Any) -> Any:
        if len(decoded) == pictures:
            raise error
        decoded.append(index)
        return real(self, index, *rest)

    monkeypatch.setattr(LabelledImages, "image", image)
    return decoded


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "error"])
@pytest.mark.parametrize("views", [0, 3])
def test_an_interrupted_run_goes_on_and_ends_bit_equal(
    embedder: Embedder, images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int, error: Any
) -> None:
    expected = _embed(embedder, images, views=views)
    monkeypatch.setattr("taskres_hf.embedding.embedder._PREPARED_AHEAD", 4)
    with monkeypatch.context() as patch:
        _stop_after(patch, 22, error)
        with pytest.raises(type(error)):
            _embed(embedder, images, views=views, cache_dir=tmp_path)
    decoded = _stop_after(monkeypatch, 10**6, error)
    found = _embed(embedder, images, views=views, cache_dir=tmp_path)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert len(decoded) <= 12  # what was in the making
    assert len(_shards(tmp_path)) <= 2  # small ones are joined
    del decoded[:]
    assert torch.equal(_embed(embedder, images, views=views, cache_dir=tmp_path).image_embeds, expected.image_embeds)
    assert not decoded


def _embed_slowly(base: str, spec: dict[str, Any], images: LabelledImages, folder: str, pause: float) -> None:
    torch.set_num_threads(1)
    caching._SECONDS = 0.0
    model = Model.from_base(base, spec["classes"], spec["template"])
    real = LabelledImages.image
    LabelledImages.image = lambda self, *a: (time.sleep(pause), real(self, *a))[1]  # type: ignore[method-assign]
    _embed(Embedder(model.clip, model.image_processor), images, cache_dir=folder)


def test_a_killed_run_leaves_whole_parts(
    embedder: Embedder, base: str, spec: dict[str, Any], images: LabelledImages, tmp_path: Path
) -> None:
    expected = _embed(embedder, images)
    child = multiprocessing.get_context("spawn").Process(
        target=_embed_slowly, args=(base, spec, images, os.fspath(tmp_path), 0.05)
    )
    child.start()
    deadline = time.monotonic() + 60
    while child.is_alive() and len(_shards(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join()
    table = KeptRows(_shards(tmp_path)[0].parent)
    keys = [bytes.fromhex(images.digest(row)) for row in range(30)]
    assert 8 <= sum(len(positions) for positions, _ in table.take(keys)) <= 30
    assert torch.equal(_embed(embedder, images, cache_dir=tmp_path).image_embeds, expected.image_embeds)
    assert len(_shards(tmp_path)) <= 2


_KEYS = [bytes([row]) * 32 for row in range(40)]


def _taken(table: KeptRows, rows: int) -> torch.Tensor:
    """The first rows of a table, NaN where there is none."""
    found = torch.full((rows, 3), float("nan"))
    for positions, some in table.take(_KEYS[:rows]):
        found[positions] = some
    return found


def test_several_processes_may_work_on_the_same_rows(tmp_path: Path) -> None:
    """Each adds shards of its own; who is through first joins them, which harms nobody who reads or goes on."""
    rows = torch.randn(6, 3)
    tables = [KeptRows(tmp_path / "a") for _ in range(2)]
    for start in range(0, 6, 2):
        for table in tables:
            table.add(_KEYS[start : start + 2], rows[start : start + 2])
            table.flush()
        assert torch.equal(_taken(KeptRows(tmp_path / "a"), start + 2), rows[: start + 2])
    reader = KeptRows(tmp_path / "a")  # knows of six shards
    tables[0].close()
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert torch.equal(_taken(reader, 6), rows)
    tables[1].close()
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert torch.equal(_taken(KeptRows(tmp_path / "a"), 6), rows)


def test_a_process_that_dies_while_it_joins_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows = KeptRows(tmp_path / "a"), torch.randn(6, 3)
    for row in range(6):
        table.add(_KEYS[row : row + 1], rows[row : row + 1])
        table.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            table.close()
    assert len(list((tmp_path / "a").iterdir())) == 7
    again = KeptRows(tmp_path / "a")
    assert torch.equal(_taken(again, 6), rows)
    again.add(_KEYS[6:7], rows[:1])
    again.close()
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert torch.equal(_taken(KeptRows(tmp_path / "a"), 7), torch.cat([rows, rows[:1]]))


@pytest.mark.parametrize("shards", [1, 5])
def test_no_changed_byte_goes_unnoticed(
    embedder: Embedder, images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    expected = _embed(embedder, images)
    with monkeypatch.context() as patch:
        if shards > 1:
            patch.setattr(caching, "_SECONDS", 0.0)
            patch.setattr(KeptRows, "_join", lambda *a: None)
        _embed(embedder, images, cache_dir=tmp_path)
    assert len(_shards(tmp_path)) >= shards
    whole = {path: path.read_bytes() for path in _shards(tmp_path)}
    file = min(whole)
    content = whole[file]
    for position in range(0, len(content), len(content) // 7):
        for path in _shards(tmp_path):
            path.unlink()
        for path, kept in whole.items():
            path.write_bytes(kept)
        file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = _embed(embedder, images, cache_dir=tmp_path)
        assert torch.equal(found.image_embeds, expected.image_embeds)
        assert sum("computed again" in str(warning.message) for warning in seen) == 1
        assert not file.exists()  # it is made again, under another name


@pytest.mark.parametrize("full", [False, True])
def test_a_cache_that_cannot_be_written_costs_one_warning(
    embedder: Embedder, images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    folder = tmp_path / "cache"
    if full:
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    else:
        folder.write_text("")
        folder = folder / "below a file"
    monkeypatch.setattr(caching, "_SECONDS", 0.0)
    expected = _embed(embedder, images)
    with pytest.warns(UserWarning, match=os.fspath(folder)) as seen:
        found = [_embed(embedder, part, cache_dir=folder) for part in (images, images.select(range(8)))]
    assert len(seen) == 1
    assert torch.equal(found[0].image_embeds, expected.image_embeds)
    assert torch.equal(found[1].image_embeds, expected.image_embeds[:, :8])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_shards_are_few_in_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(caching.time, "monotonic", lambda: now)
    table, keys = KeptRows(tmp_path / "a"), [hashlib.sha256(b"%d" % row).digest() for row in range(20_000)]
    for key in keys:
        now += 1.0  # five and a half hours, a picture a second
        table.add([key], torch.ones(1, 2))
    assert 50 < len(list((tmp_path / "a").iterdir())) < 500
    table.close()
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert sum(len(positions) for positions, _ in KeptRows(tmp_path / "a").take(keys)) == 20_000


def test_shards_are_few_after_many_small_runs_and_none_grows_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    real = caching.write_tensors
    monkeypatch.setattr(
        caching,
        "write_tensors",
        lambda path, tensors, of: (written.append(len(tensors["rows"])), real(path, tensors, of)),
    )
    for number in range(40):
        table = KeptRows(tmp_path / "a")
        table.add([_KEYS[number]], torch.full((1, 3), float(number)))
        table.close()
    assert len(list((tmp_path / "a").iterdir())) <= 6
    assert sum(written) < 40 * 10  # a row is written anew a few times
    assert torch.equal(_taken(KeptRows(tmp_path / "a"), 40)[:, 0], torch.arange(40.0))
    size = caching._LARGEST
    sizes = {Path(str(number)): size - number for number in range(6)} | {Path("whole"): 2 * size}
    groups = caching._to_join(sizes)
    assert all(sum(sizes[path] for path in group) <= 2 * size for group in groups)
    assert not any(Path("whole") in group for group in groups)


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    left = tmp_path / "a" / ".b.safetensors.x.taskres.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    assert not list(KeptRows(tmp_path / "a").take(_KEYS))  # who only reads removes it too
    assert not left.exists()


# ---------------------------------------------------------------------- files that did not change


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(caching, "_UNSETTLED", 0)  # or tests would wait ten seconds
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    time.sleep(0.02)  # further than a tick of the file system's clock
    return path


def _noted(folder: Path, path: Path) -> FileDigests:
    files = FileDigests(folder / "files")
    content, digest, status = read_once(str(path))
    assert content["bytes"] == path.read_bytes()
    if status is not None:
        files.note(str(path), status, digest, time.time_ns())
    files.close()
    return FileDigests(folder / "files")


def test_an_unchanged_file_is_known(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _noted(tmp_path, picture)
    assert files.find(str(picture)) == hashlib.sha256(b"first").hexdigest()
    monkeypatch.chdir(tmp_path)
    assert files.find("a.jpg") == files.find(str(picture))  # the same file, named otherwise
    assert files.find(str(tmp_path / "none.jpg")) is files.find(str(tmp_path)) is None


@pytest.mark.parametrize("change", ["in place", "replaced", "moved over", "link", "longer"])
def test_a_file_that_changed_in_anything_is_not(tmp_path: Path, picture: Path, change: str) -> None:
    """Also of the same size, with the time of its content put back."""
    times, known = picture.stat(), _noted(tmp_path, picture)
    other = tmp_path / "other.jpg"
    other.write_bytes(b"other" + b"!" * (change == "longer"))
    if change == "in place":
        picture.write_bytes(b"other")
    elif change == "replaced":
        picture.unlink()
        picture.write_bytes(b"other")
    elif change == "link":
        picture.unlink()
        picture.symlink_to(other)
    else:
        other.replace(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known.find(str(picture)) is None


def test_a_file_that_was_just_changed_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within the same tick of the clock: size and times would be the same."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    assert _noted(tmp_path, path).find(str(path)) is None
    monkeypatch.setattr(caching, "_UNSETTLED", -(10**15))
    assert _noted(tmp_path, path).find(str(path)) is not None


def test_a_file_that_changes_while_it_is_read_is_not_trusted(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat
    calls: list[int] = []

    def fstat(handle: int) -> os.stat_result:
        if calls:
            picture.write_bytes(b"other")
        calls.append(handle)
        return real(handle)

    monkeypatch.setattr("taskres_hf.pictures.os.fstat", fstat)
    content, digest, status = read_once(str(picture))
    assert status is None
    assert digest == hashlib.sha256(content["bytes"]).hexdigest()  # of what will be decoded


def test_a_large_file_is_not_held(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskres_hf.pictures._LARGEST_HELD", 4)
    assert read_once(str(picture)) == (str(picture), hashlib.sha256(b"first").hexdigest(), None)
