"""Embeddings kept on disk: in parts, by several processes, whole or absent, and never the wrong ones."""

from __future__ import annotations

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
from taskres_hf.embedding.cache import EmbeddingCache
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, embed_images

Model = TaskResCLIPForImageClassification


@pytest.fixture
def images(splits: Any) -> LabelledImages:
    return LabelledImages(splits["test"].select(range(30)))


@pytest.fixture
def embedder(model: Model) -> Embedder:
    return Embedder(model.clip, model.image_processor)


def _embed(embedder: Embedder, images: LabelledImages, **options: Any) -> ImageFeatures:
    return embed_images(embedder, images, **{"progress": False, "batch_size": 4, **options})


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
    jobs = 30 * max(views, 1)
    monkeypatch.setattr("taskres_hf.embedding.embedder._PREPARED_AHEAD", 4)
    with monkeypatch.context() as patch:
        _stop_after(patch, jobs - 8, error)
        with pytest.raises(type(error)):
            _embed(embedder, images, views=views, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    decoded = _stop_after(monkeypatch, 10**6, error)
    found = _embed(embedder, images, views=views, cache_dir=tmp_path)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert len(decoded) <= 12  # what was in the making
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # the parts are gone
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
    while child.is_alive() and len(list(tmp_path.glob("*.parts/*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join()
    kept = EmbeddingCache(next(tmp_path.glob("*.parts")).with_suffix(".safetensors"), 30).done
    assert 8 <= int(kept.sum()) <= 30
    assert torch.equal(_embed(embedder, images, cache_dir=tmp_path).image_embeds, expected.image_embeds)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("first", ["one", "other"])
def test_several_processes_may_work_on_the_same_set(tmp_path: Path, first: str) -> None:
    """Each writes parts of its own; who is through first cleans up, which harms nobody."""
    table = torch.randn(6, 3)
    caches = {name: EmbeddingCache(tmp_path / "a.safetensors", 6) for name in ("one", "other")}
    for rows in torch.arange(6).split(2):
        for cache in caches.values():
            cache.add(rows, table[rows])
            cache.flush()
        later = EmbeddingCache(tmp_path / "a.safetensors", 6)
        assert later.table is not None
        assert int(later.done.sum()) == int(rows[-1]) + 1
    for name in sorted(caches, key=lambda name: name != first):
        caches[name].merge()
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    last = EmbeddingCache(tmp_path / "a.safetensors", 6)
    assert torch.equal(last.table, table) if last.table is not None else False
    assert last.is_complete


@pytest.mark.parametrize("place", ["file", "part"])
def test_no_changed_byte_goes_unnoticed(
    embedder: Embedder, images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = _embed(embedder, images)
    with monkeypatch.context() as patch:
        if place == "part":
            patch.setattr(EmbeddingCache, "merge", EmbeddingCache.flush)
        _embed(embedder, images, cache_dir=tmp_path)
    file = next(tmp_path.rglob("*.safetensors"))
    content = file.read_bytes()
    for position in range(0, len(content), len(content) // 7):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = _embed(embedder, images, cache_dir=tmp_path)
        assert torch.equal(found.image_embeds, expected.image_embeds)
        assert any("computed again" in str(warning.message) for warning in seen)
        if place == "part":
            next(tmp_path.glob("*.safetensors")).unlink()


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


def test_parts_are_few_in_a_long_run_and_swept_when_nobody_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(caching.time, "monotonic", lambda: now)
    cache = EmbeddingCache(tmp_path / "a.safetensors", 20_000)
    for row in range(19_999):
        now += 1.0  # five and a half hours, a picture a second
        cache.add(torch.tensor([row]), torch.ones(1, 2))
    parts = list((tmp_path / "a.parts").iterdir())
    assert 50 < len(parts) < 500
    stale = tmp_path / "b.parts"
    stale.mkdir()
    (stale / "x.safetensors").write_bytes(b"")
    for path in (stale / "x.safetensors", stale):
        os.utime(path, (1, 1))
    cache.add(torch.tensor([19_999]), torch.ones(1, 2))
    cache.merge()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert bool(EmbeddingCache(tmp_path / "a.safetensors", 20_000).done.all())
