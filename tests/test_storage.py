"""Files that prove themselves on reading, whole or absent; what killed processes leave; places without room."""

from __future__ import annotations

import json
import os
import random
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification, storage
from taskres_hf.artifact import read_checked, write_artifact
from taskres_hf.base_classifier import read_table, write_table
from taskres_hf.embedding.cache import KeptRows
from taskres_hf.errors import ArtifactError
from taskres_hf.paper.cells import read_cell
from taskres_hf.storage import read_sealed, read_tensors, write_sealed, write_tensors


def _flipped(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def _cell(path: Path) -> Path:
    write_sealed(path, {"accuracy": 0.5, "seed": 1, "settings": {"a": [1, 2.5, None]}})
    return path


def _table(path: Path) -> Path:
    write_table(path, torch.arange(12.0).reshape(3, 4))
    return path


_KEYS = [bytes([row]) * 32 for row in range(3)]


def _embeddings(path: Path) -> Path:
    cache = KeptRows(path.parent / "table")
    cache.add(_KEYS, torch.arange(12.0).reshape(3, 4))
    cache.close()
    return next(cache.folder.iterdir()) if cache.folder else path


def _read_embeddings(path: Path) -> torch.Tensor | None:
    found = list(KeptRows(path.parent).take(_KEYS))
    return found[0][1] if found and len(found[0][1]) == 3 else None


KINDS: dict[str, Any] = {
    "cell.json": (_cell, read_cell), "t.safetensors": (_table, read_table),
    "embeddings.safetensors": (_embeddings, _read_embeddings),
}  # fmt: skip


def _same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_with_any_changed_bit_is_no_answer(tmp_path: Path, name: str) -> None:
    """It is made again, with a warning; or what changed says nothing, such as a space."""
    make, read = KINDS[name]
    path = make(tmp_path / name)
    content, expected, generator, noticed = path.read_bytes(), read(path), random.Random(0), 0
    assert expected is not None
    for _ in range(100):
        path.write_bytes(content)
        _flipped(path, generator)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read(path)
        assert (found is None and caught) or _same(found, expected)
        noticed += found is None
    assert noticed > 80
    path.write_bytes(content)
    (tmp_path / "other").mkdir()
    os.rename(path, tmp_path / "other" / f"of-another-{name}")
    if name != "cell.json":  # a run says itself what it is of, which is compared where it is used
        with pytest.warns(UserWarning, match="another|other"):
            assert read(tmp_path / "other" / f"of-another-{name}") is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"a": ' * 5000, b"\xff", b'{"a": 1, "a": 1}'])
def test_what_holds_no_checksum_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError):
        read_sealed(tmp_path / "x.json")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="holds no checksum"):
        read_tensors(tmp_path / "x.safetensors")


def test_the_checksum_covers_metadata_and_names(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2), "b": torch.zeros(2)}, {"of": "x"})
    assert first != write_tensors(tmp_path / "b.safetensors", {"b": torch.ones(2), "a": torch.zeros(2)}, {"of": "x"})
    assert first != write_tensors(tmp_path / "c.safetensors", {"a": torch.ones(2), "b": torch.zeros(2)}, {"of": "y"})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata["sha256"] == first
    assert tensors["a"].tolist() == [1, 1]


def test_numbers_that_are_not_finite_and_odd_text_survive(tmp_path: Path) -> None:
    value = {"loss": float("inf"), "names": ["\udcff", "\u2028", "日本"], "big": 10**18, "pair": (1, 2), 3: 4}
    write_sealed(tmp_path / "x.json", value)
    assert read_sealed(tmp_path / "x.json") == {
        "loss": float("inf"), "names": ["\udcff", "\u2028", "日本"], "big": 10**18, "pair": [1, 2], "3": 4,
    }  # fmt: skip


# ---------------------------------------------------------------------- leftovers, power cuts, full and foreign places


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    names = (".a.json.x.taskres.tmp", ".folder.x.taskres.tmp", ".fresh.x.taskres.tmp", ".somebody.tmp", "a.taskres.tmp")
    for name in names:
        (tmp_path / name).mkdir() if "folder" in name else (tmp_path / name).touch()
        if "fresh" not in name:
            os.utime(tmp_path / name, (0, time.time() - 25 * 3600))
    storage._SWEPT.clear()
    write_sealed(tmp_path / "b.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"b.json", *names[2:]}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sealed(tmp_path / "a.json", {"old": 1})
    for error in (OSError("gone"), KeyboardInterrupt()):

        def fail(*args: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "replace", fail)
            with pytest.raises((ArtifactError, KeyboardInterrupt)):
                write_sealed(tmp_path / "a.json", {"new": 1})
    assert read_sealed(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_rename_lasts_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power-loss order: the file is synchronised, renamed, and the folder synchronised before anything that follows."""
    events: list[str] = []
    real = (os.replace, os.fsync)

    def replace(source: Any, target: Any) -> None:
        events.append(Path(target).name)
        real[0](source, target)

    def fsync(handle: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file"
        events.append(f"sync {kind}")
        real[1](handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to tell folders from files by")
    config = {
        "model_type": "taskres", "base_model_name_or_path": "some/base", "projection_dim": 3, "alpha": 1.0,
        "base_fingerprint": {"shape": [2, 3]}, "logit_scale": 100.0, "id2label": {"0": "a", "1": "b"},
    }  # fmt: skip
    files = {"preprocessor_config.json": b"{}"}
    write_artifact(tmp_path, config, {"residual": torch.zeros(2, 3)}, files)
    monkeypatch.setattr(storage.os, "replace", replace)
    monkeypatch.setattr(storage.os, "fsync", fsync)
    write_artifact(tmp_path, config, {"residual": torch.ones(2, 3)}, files)
    commit = events[-9:]
    assert commit == [
        "model.safetensors", "sync folder", "preprocessor_config.json", "sync folder", "config.json", "sync folder",
        "sync file", "model.safetensors", "sync folder",  # which no longer names what it replaced
    ]  # fmt: skip
    written = [event for event in events[:-9] if event != "sync folder"]
    assert written == [
        "sync file",
        "preprocessor_config.json",
        "sync file",
        "model.safetensors",
        "sync file",
        "config.json",
    ]


@pytest.mark.parametrize("kind", ["link", "empty", "dot", "not empty", "link to nothing", "below nothing"])
def test_every_kind_of_output_folder_works_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = folder = tmp_path / "real"
    if kind not in ("link to nothing", "below nothing"):
        target.mkdir(mode=0o750)
    if kind == "not empty":
        (target / "notes.txt").touch()
    if kind.startswith("link"):
        folder = tmp_path / "link"
        folder.symlink_to(target)
    if kind == "dot":
        monkeypatch.chdir(target)
        folder = Path(".")
    if kind == "below nothing":
        folder = target = tmp_path / "a" / "b"
    storage.check_can_write(folder)
    config = {
        "model_type": "taskres", "base_model_name_or_path": "some/base", "projection_dim": 3, "alpha": 1.0,
        "base_fingerprint": {"shape": [2, 3]}, "logit_scale": 100.0, "id2label": {"0": "a", "1": "b"},
    }  # fmt: skip
    for _ in range(2):
        write_artifact(folder, config, {"residual": torch.zeros(2, 3)}, {})
        assert read_checked(folder / "config.json", folder / "model.safetensors").config["alpha"] == 1.0
    assert folder.is_symlink() == kind.startswith("link")
    if kind not in ("link to nothing", "below nothing"):
        assert target.stat().st_mode & 0o777 == 0o750


def test_a_folder_that_cannot_be_renamed_over_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount point, or a folder that another process made a moment ago."""
    real = os.rename

    def made_meanwhile(source: Any, target: Any) -> None:
        Path(target).mkdir()
        (Path(target) / "another.txt").touch()
        real(source, target)

    monkeypatch.setattr(storage.os, "rename", made_meanwhile)
    config = {
        "model_type": "taskres", "base_model_name_or_path": "some/base", "projection_dim": 3, "alpha": 1.0,
        "base_fingerprint": {"shape": [2, 3]}, "logit_scale": 100.0, "id2label": {"0": "a", "1": "b"},
    }  # fmt: skip
    write_artifact(tmp_path / "a", config, {"residual": torch.zeros(2, 3)}, {})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"another.txt", "config.json", "model.safetensors"}


def test_a_place_that_cannot_be_written_is_told_before_work_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage.check_can_write(tmp_path / "new" / "below")
    for place in (tmp_path / "file" / "below", Path("/proc/taskres")):
        with pytest.raises(ArtifactError, match="Cannot write to"):
            storage.check_can_write(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(2):
            TaskResCLIPForImageClassification.from_base(base, ["a", f"b{number}"])
    assert len([one for one in caught if "The base classifier is not kept" in str(one.message)]) == 1


def test_a_full_disk_costs_the_cache_only(tmp_path: Path) -> None:
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.warns(UserWarning, match="not kept"):
            write_table(tmp_path / "t.safetensors", torch.zeros(100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_json_reads_back(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"b": 1})
    assert set(json.loads((tmp_path / "a.json").read_text())) == {"b", "sha256"}
