"""Pages side by side do not mix, and what a page sent goes with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from taskres_hf.app.looking import Backbone
from taskres_hf.app.registry import Registry
from taskres_hf.errors import DataError


@pytest.fixture
def registry(backbone: Backbone, tmp_path: Path) -> Registry:
    (tmp_path / "root").mkdir()
    return Registry(backbone, tmp_path / "root")


def _sent(registry: Registry, file: Path, name: str = "a1b2") -> Path:
    """A file where Gradio puts uploads."""
    target = registry.root / name / file.name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
    return target


def test_two_pages_do_not_mix(registry: Registry, food: Path) -> None:
    first, second = registry.session("first"), registry.session("second")
    assert registry.session("first") is first
    first.set_classes(["fruit", "vegetable"])
    second.set_classes(["hat", "shoe"])
    first.add_files(sorted((food / "class" / "fruit").iterdir()), "fruit")
    assert second.pictures == {}
    assert second.class_names == ["hat", "shoe"]
    assert first.folder != second.folder
    assert [name for name, _ in second.classify([food / "new" / "fruit" / "0.png"])[0].classes] != ["fruit"]


def test_what_a_page_sent_goes_with_it(registry: Registry, food: Path) -> None:
    file = food / "new" / "fruit" / "0.png"
    shared, own = _sent(registry, file), _sent(registry, food / "new" / "fruit" / "1.png", "c3d4")
    registry.uploads("first", [str(shared), str(own)])
    registry.uploads("second", [str(shared)])
    folder = registry.session("first").folder
    registry.end("first")
    assert not folder.exists()
    assert not own.parent.exists()
    assert shared.exists()  # the other page has sent it too
    registry.end("second")
    registry.end("never there")
    assert not shared.parent.exists()
    registry.close()
    assert not registry.root.exists()


def test_only_uploads_are_read(registry: Registry, tmp_path: Path, food: Path) -> None:
    other = registry.session("second").folder / "classifier.zip"
    other.write_bytes(b"x")
    outside = tmp_path / "secret.png"
    shutil.copyfile(food / "new" / "fruit" / "0.png", outside)
    link = registry.root / "link.png"
    link.symlink_to(outside)
    for path in (outside, other, link, registry.root / ".." / "secret.png", registry.root):
        with pytest.raises(DataError, match="not uploaded here"):
            registry.uploads("first", [str(path)])
