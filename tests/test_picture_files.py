"""Picture files among files and folders: what is found, ignored, left out and said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import close_folder

from taskres_hf import pictures
from taskres_hf.errors import ImageError
from taskres_hf.picture_files import find_images, is_ignored, list_images, walk
from taskres_hf.pictures import read_image


@pytest.mark.parametrize(
    "path",
    [
        ".hidden.png", "._1.png", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", ".DS_Store",
        "a/__MACOSX/b.png", "a/.git/b.png", "a/@eaDir/1.png/x.jpg", "$RECYCLE.BIN", "/x/.thumbnail.jpg",
    ],
)  # fmt: skip
def test_hidden_and_system_files_are_ignored(path: str) -> None:
    assert is_ignored(path)
    assert is_ignored(Path(path))


@pytest.mark.parametrize("path", ["a.png", "./a.png", "../a/b.png", "a/b.c/d.png", "/home/.cache/a.png", "__init__"])
def test_other_files_are_not(path: str) -> None:
    assert not is_ignored(path)


def test_folders_are_searched_in_depth_and_accounted_for(tmp_path: Path) -> None:
    for name in (
        "2.png", "a/1.JPG", "b/c/d/3.webp", ".hidden.png", "a/._1.png", "__MACOSX/1.png", ".ipynb_checkpoints/1.png",
        "a/@eaDir/1.jpg/thumb.jpg", "notes.txt", "a/b.TXT", "x.heic2", "odd", "Thumbs.db",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listing = list_images([tmp_path])
    assert [os.path.relpath(file, tmp_path) for file in listing.files] == ["2.png", "a/1.JPG", "b/c/d/3.webp"]
    assert listing.left_out == {".txt": 2, ".heic2": 1, "": 1}
    assert listing.lines() == ["Left out by their ending: 2 .txt, 1 without an ending, 1 .heic2"]
    assert listing.ignored == 6
    assert list_images([tmp_path / "a" / "1.JPG"]).lines() == []
    assert find_images([tmp_path / "odd", tmp_path / ".hidden.png"]) == [  # named outright
        str(tmp_path / "odd"), str(tmp_path / ".hidden.png"),
    ]  # fmt: skip


def test_what_needs_the_extra_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "IMAGE_EXTENSIONS", frozenset({".jpg"}))
    for name in ("1.HEIC", "2.heic", "3.jpg", "4.txt"):
        (tmp_path / name).write_bytes(b"")
    listing = list_images([tmp_path])
    assert listing.left_out == {".heic": 2, ".txt": 1}
    assert listing.lines()[1] == 'Left out by their ending: 2 .heic; to read them: pip install "taskres_hf[heif]"'


def test_a_file_named_twice_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_images(["d", "d/1.png", tmp_path / "d", "./d/1.png"]) == ["d/1.png"]
    assert find_images(["d/1.png", "."]) == ["d/1.png"]
    assert find_images(["none.png", "none.png"]) == ["none.png"]


def test_files_up_from_a_link_and_up_from_here_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other" / "inside").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "other"):
        (place / "1.png").write_bytes(b"")
    (tmp_path / "link").symlink_to("other/inside")
    monkeypatch.chdir(tmp_path)
    assert find_images(["link/../1.png", "1.png"]) == ["link/../1.png", "1.png"]
    assert find_images(["other/1.png", "link/../1.png", "other/inside/../1.png"]) == ["other/1.png"]
    assert find_images(["link/..", "."]) == ["link/../1.png", "1.png"]


def test_of_a_folder_everything_is_said(tmp_path: Path) -> None:
    (tmp_path / "a" / ".git").mkdir(parents=True)
    for name in ("a/1.png", "a/.git/2.png", "b"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    assert sorted((name, kind) for name, kind, _ in walk(str(tmp_path))) == [
        ("a", "folder"), ("a/.git", "ignored"), ("a/1.png", "file"), ("a/gone", "odd"), ("a/up", "above"), ("b", "file")
    ]  # fmt: skip
    assert [(name, kind) for name, kind, _ in walk(str(tmp_path / "b"))] == [("", "closed")]
    deep = tmp_path / "deep"
    for _ in range(210):
        deep = deep / "d"
    deep.mkdir(parents=True)
    assert [one.kind for one in walk(str(tmp_path / "deep"))].count("closed") == 1


def test_links_pipes_and_odd_folders_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"")
    root = tmp_path / "root"
    (root / "folder.png").mkdir(parents=True)
    (root / "folder.png" / "2.png").write_bytes(b"")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "round").symlink_to(root)
    (root / "broken.png").symlink_to("nowhere")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "locked").mkdir()
    close_folder(monkeypatch, "locked")
    names = [os.path.relpath(file, root) for file in find_images([root])]
    assert names == ["broken.png", "folder.png/2.png", "linked/1.png", "locked", "loop.png", "pipe.png"]
    for file in find_images([root]):
        with pytest.raises(ImageError):
            read_image(file)
