"""Pictures read by processes beside a device: what threads would give, and none left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from support import beside_a_device, pictures_that_settle

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.data.reading import FileCells
from taskres_hf.embedding import workers
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, _Pass, embed_images
from taskres_hf.errors import ConfigurationError, ImageError

Model = TaskResCLIPForImageClassification
COUNT = 30


@pytest.fixture
def folder(splits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of which two are the same, one is no picture, one is cut short, one empty, one transparent."""
    place = pictures_that_settle(splits["test"], COUNT, tmp_path / "pictures", monkeypatch)
    shutil.copy(place / "001.png", place / "017.png")
    (place / "004.png").write_bytes(b"not a picture")
    (place / "011.png").write_bytes((place / "010.png").read_bytes()[:900])
    (place / "012.png").write_bytes(b"")
    PIL.Image.new("RGBA", (90, 80), (200, 30, 4, 100)).save(place / "020.png")
    PIL.Image.new("RGBA", (90, 70), (200, 30, 4, 100)).save(place / "021.png")
    time.sleep(0.02)  # further than a tick of the file system's clock
    return place


@pytest.fixture
def embedder(model: Model, monkeypatch: pytest.MonkeyPatch) -> Embedder:
    beside_a_device(monkeypatch)
    return Embedder(model.clip, model.image_processor)


def _images(place: Path) -> LabelledImages:
    names = [*sorted(str(path) for path in place.iterdir()), str(place / "missing.png")]
    return LabelledImages.from_cells(FileCells(names), [row % 2 for row in range(len(names))], ["a", "b"])


def _embed(
    embedder: Embedder, images: LabelledImages, monkeypatch: pytest.MonkeyPatch, count: int, **options: Any
) -> tuple[ImageFeatures, list[str], list[int]]:
    """Embeddings made with so many processes; what was warned of; rows that another process was to read."""
    monkeypatch.setenv(workers.WORKERS, str(count))
    asked: list[int] = []
    take = _Pass._take_read
    monkeypatch.setattr(_Pass, "_take_read", lambda work, row, *read: asked.append(row) or take(work, row, *read))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = embed_images(embedder, images, **{"batch_size": 4, "progress": False, "on_error": "skip", **options})
    monkeypatch.setattr(_Pass, "_take_read", take)
    said = [re.sub(r"one of them: '[^']*'", "one of them", str(one.message)) for one in told]  # whichever came first
    return found, sorted(said), asked


def _children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


@pytest.mark.parametrize("views", [0, 2])
def test_processes_give_what_threads_give(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    images = _images(folder)
    expected, told, none = _embed(embedder, images, monkeypatch, 0, views=views)
    found, told_too, asked = _embed(embedder, images, monkeypatch, 2, views=views)
    assert not none
    assert set(asked) >= set(range(8, COUNT + 1))  # but for what was looked at before the tower was needed
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert (found.digest, found.digests, found.skipped) == (expected.digest, expected.digests, expected.skipped)
    assert found.skipped == (4, 11, 12, COUNT)
    assert told_too == told
    assert any("Row 4: " in text and "Row 12: " in text and "missing.png" in text for text in told)
    assert any("2 pictures" in text for text in told) or any("Transparent" in text for text in told)
    assert not _children()
    with pytest.raises(ImageError) as one:
        _embed(embedder, images, monkeypatch, 0, views=views, on_error="raise")
    with pytest.raises(ImageError) as other:
        _embed(embedder, images, monkeypatch, 2, views=views, on_error="raise")
    assert str(one.value) == str(other.value)


@pytest.mark.parametrize("count", [0, 2])
def test_a_copy_that_can_be_read_is_not_given_up_with_one_that_cannot(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """TGA has no mark of its own: only with its ending is it told from what is no picture."""
    PIL.Image.open(folder / "001.png").save(folder / "028.tga")
    shutil.copy(folder / "028.tga", folder / "018.png")
    found, _, _ = _embed(embedder, _images(folder), monkeypatch, count)
    names = sorted(path.name for path in folder.iterdir())
    assert names.index("028.tga") not in found.skipped
    assert {names[row] for row in found.skipped[:-1]} <= {"004.png", "011.png", "012.png", "018.png"}


def test_known_pictures_are_not_read_again(
    embedder: Embedder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = [folder / f"{row:03d}.png" for row in (2, 9, 25, 26)]
    (tmp_path / "later").mkdir()
    for path in later:
        path.rename(tmp_path / "later" / path.name)
    _embed(embedder, _images(folder), monkeypatch, 2, cache_dir=tmp_path / "cache")
    for path in later:
        (tmp_path / "later" / path.name).rename(path)
    images = _images(folder)
    found, _, asked = _embed(embedder, images, monkeypatch, 2, cache_dir=tmp_path / "cache")
    unreadable = {4, 11, 12, COUNT}  # tried again in every run
    assert set(asked) <= {2, 9, 25, 26} | unreadable
    assert torch.equal(found.image_embeds, _embed(embedder, images, monkeypatch, 0)[0].image_embeds)


def test_pictures_of_a_dataset_go_to_processes_as_files(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.iterdir())]
    rows = {"image": cells, "label": ["a", "b"] * (COUNT // 2)}
    images = LabelledImages(Dataset.from_dict(rows, Features({"image": Image(), "label": Value("string")})))
    expected, told, _ = _embed(embedder, images, monkeypatch, 0)
    found, told_too, asked = _embed(embedder, images, monkeypatch, 1)
    assert asked
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert (found.digests, told_too) == (expected.digests, told)


@pytest.mark.parametrize("how", ["cannot start", "dies"])
def test_threads_go_on_where_processes_fail(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    expected, _, _ = _embed(embedder, _images(folder), monkeypatch, 0)
    if how == "cannot start":
        monkeypatch.setattr(workers.PictureReader, "__reduce__", lambda reader: pickle.dumps(_children))  # not a tuple
    else:
        taken, take = [], _Pass._take_read

        def kill(work: Any, row: int, *read: Any) -> Any:
            taken.append(row)
            for pid in _children() if len(taken) == 3 else []:
                os.kill(pid, signal.SIGKILL)
            return take(work, row, *read)

        monkeypatch.setattr(_Pass, "_take_read", kill)
    found, told, _ = _embed(embedder, _images(folder), monkeypatch, 1)
    assert any("read by threads, as processes fail" in text for text in told)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert found.digests == expected.digests
    assert not _children()


def test_an_interrupt_ends_processes_though_its_traceback_is_held(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = _Pass._take_read

    def interrupted(work: Any, row: int, *read: Any) -> Any:
        taken.append(row)
        if len(taken) == 3:
            assert _children()
            raise KeyboardInterrupt
        return take(work, row, *read)

    monkeypatch.setattr(_Pass, "_take_read", interrupted)
    with pytest.raises(KeyboardInterrupt) as held:
        _embed(embedder, _images(folder), monkeypatch, 1)
    assert held.tb is not None
    assert not _children()


_SCRIPT = """
import sys
from pathlib import Path
import pytest
from support import beside_a_device
from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.data.reading import FileCells
from taskres_hf.embedding import features
from taskres_hf.embedding.embedder import Embedder

print("begun", flush=True)
beside_a_device(pytest.MonkeyPatch())  # no `if __name__ == "__main__"`: a plain script, as people write them
base, folder = sys.argv[1:3]
names = sorted(str(path) for path in Path(folder).iterdir()) * 40
images = LabelledImages.from_cells(FileCells(names), [0] * len(names), ["a"])
model = TaskResCLIPForImageClassification.from_base(base, ["a", "b"])
take = features._Pass._take_read
def slowly(work, row, *read):
    import multiprocessing, time
    if row > 60:
        print("children", *[process.pid for process in multiprocessing.active_children()], flush=True)
        time.sleep(60)
    return take(work, row, *read)
features._Pass._take_read = slowly
features.embed_images(Embedder(model.clip, model.image_processor), images, progress=False, on_error="skip")
"""


def _errors(running: subprocess.Popen[str]) -> str:
    os.killpg(running.pid, signal.SIGKILL)
    return running.communicate()[1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_ctrl_c_leaves_no_process_behind_and_scripts_need_no_guard(base: str, folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    running = subprocess.Popen(
        [sys.executable, str(script), base, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, workers.WORKERS: "2"}, start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n", _errors(running)
    line = running.stdout.readline().split()  # a process that ran the script again would have begun too
    assert line[:1] == ["children"], _errors(running)
    assert len(line) == 3
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = running.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert errors.count("Traceback") == 1
    assert not [pid for pid in line[1:] if Path("/proc", pid).exists()]


def test_when_processes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workers.WORKERS, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert workers.worker_count(100) == 0
    assert workers.worker_count(10**6) == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes of torchrun share the cores
    assert workers.worker_count(10**6) == 3
    for unset in ("", " ", "0", "several"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", unset)
        assert workers.worker_count(10**6) == 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    assert workers.worker_count(10**6) == 0
    monkeypatch.setenv(workers.WORKERS, "5")
    assert workers.worker_count(1) == 5
    for wrong in ("many", "-1", "1000000"):
        monkeypatch.setenv(workers.WORKERS, wrong)
        with pytest.raises(ConfigurationError, match=f"TASKRES_WORKERS.*'{wrong}'"):
            workers.worker_count(1)


def test_what_is_no_file_is_read_here() -> None:
    readable = workers.is_readable_elsewhere
    assert all(map(readable, ["a.png", Path("a.png"), {"bytes": b"x", "path": None}, {"bytes": None, "path": "a"}]))
    others = [PIL.Image.new("RGB", (1, 1)), "https://example.org/a.png", {"bytes": None, "path": None}, None]
    assert not any(map(readable, others))
