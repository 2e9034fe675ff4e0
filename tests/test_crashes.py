"""Killed processes and full disks: old content or new, nothing lost, nothing left lying about."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fuzz import full, kills, small_disk
from fuzz.full import SAVES, Disk, Save, check, record, unsafe_renames

_SLOW = ("a new artifact", "an artifact over another", "a checkpoint")


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.name)
def test_a_disk_that_is_full_at_any_write(save: Save) -> None:
    outcome = check(save, 2 if save.name in _SLOW else 8)  # of all calls: `python -m fuzz full`
    assert not outcome.findings
    assert outcome.inputs >= 4


def test_every_rename_is_after_its_content_and_before_what_relies_on_it() -> None:
    for save in SAVES:
        disk = record(save)
        assert {"write", "rename"} <= {what for what, _, _ in disk.calls}
        if save.ordered:
            assert not unsafe_renames(disk)


@pytest.mark.parametrize("lost", ["fsync of the file", "fsync of the folder"])
def test_an_order_that_a_power_cut_breaks_is_noticed(lost: str) -> None:
    disk = record(next(save for save in SAVES if save.name == "a cell"))
    folders = {str(Path(target).parent) for what, _, target in disk.calls if what == "rename"}
    left = [call for call in disk.calls if call[0] != "fsync" or (call[1] in folders) == (lost == "fsync of the file")]
    assert unsafe_renames(Disk(disk.root, calls=left))


def _write(path: Path, text: str) -> None:
    with open(path, "w") as stream:  # of Python 3.10 `Path.write_text` is not seen
        stream.write(text)


def test_a_save_that_writes_in_place_is_noticed() -> None:
    careless = Save(
        "in place",
        lambda folder: _write(folder / "cell.json", "old" * 100),
        lambda folder: _write(folder / "cell.json", "new" * 100),
        lambda folder: (folder / "cell.json").read_text(),
    )
    assert any("neither the old content nor the new" in text or "OSError" in text for text in check(careless).findings)


_WORKS = [work for work in kills.WORKS if work.name != "comparing"]  # which takes longest: `python -m fuzz kills`


@pytest.mark.parametrize("work", _WORKS, ids=lambda work: work.name)
def test_a_killed_process_loses_nothing(work: kills.Work) -> None:
    expected = kills.reference(work)
    assert expected.calls > 5
    assert not kills.one_kill(work, expected, random.Random(work.name))


def test_a_loss_would_be_noticed() -> None:
    """Work that begins anew after a kill, and one whose result depends on it."""

    def act(folder: Path) -> tuple[str, int]:
        begun = (folder / "a").exists()
        _write(folder / "a", "x")
        _write(folder / "b", "x")
        return ("again" if begun else "first", 2)

    work = kills.Work("careless", act, lambda folder: int((folder / "a").exists()), 2)
    found = [text for seed in range(12) for text in kills.one_kill(work, kills.reference(work), random.Random(seed))]
    assert any("another result" in text for text in found)
    assert any("1 units were kept, 2 done anew" in text for text in found)


def test_rows_of_a_disk_that_filled_with_the_first_line(tmp_path: Path) -> None:
    """Half of the line that says what the run is: there is nothing to go on from, and nothing is in the way."""
    predictions = next(save for save in SAVES if save.name == "predictions")
    full._predict(tmp_path)
    expected = predictions.read(tmp_path)
    (tmp_path / "a.csv").unlink()
    line = b'0123456789abcdef {"files": "0123'
    for length in range(len(line) + 1):
        (tmp_path / "a.csv.partial").write_bytes(line[:length])
        full._predict(tmp_path)
        assert predictions.read(tmp_path) == expected


@pytest.mark.parametrize("mounted", [True, False], ids=["small disk", "limit on files"])
@pytest.mark.parametrize("name", ["an artifact over another", "a cell", "predictions"])
def test_a_disk_that_really_is_full(name: str, mounted: bool) -> None:
    if mounted and not small_disk.can_mount():
        pytest.skip("mounting a small disk takes the rights of the superuser")
    outcome = small_disk.check(next(save for save in SAVES if save.name == name), mounted, steps=3)
    assert not outcome.findings
    assert outcome.inputs >= 2
