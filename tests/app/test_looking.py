"""What is handed over is read once; tables and archives give cells of several kinds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from taskres_hf.app.looking import Backbone, Source, read_pictures
from taskres_hf.errors import ImageError
from taskres_hf.pictures import picture_digest


def test_any_cell_gives_the_picture_under_its_name(backbone: Backbone, food: Path) -> None:
    file = food / "class" / "fruit" / "0.png"
    content, pixels = file.read_bytes(), np.asarray(PIL.Image.open(io.BytesIO(file.read_bytes())).convert("RGB"))
    cells = [str(file), {"bytes": content, "path": "deep/in/0.png"}, {"bytes": None, "path": str(file)}, pixels]
    keys = [Source(cell, "0.png").key() for cell in cells]
    assert keys == [picture_digest(file)] * 3 + [picture_digest(pixels)]
    problems: list[str] = []
    found = read_pictures(backbone, {str(n): Source(cell, "0.png") for n, cell in enumerate(cells)}, problems)
    assert not problems
    first, *others = (embeds for embeds, _ in found.values())
    assert all(float((first - other).abs().max()) < 1e-4 for other in others)


def test_the_error_of_a_cell_is_told_when_it_is_read(backbone: Backbone) -> None:
    lost = Source(ImageError("member 3 is damaged"), "row 3")
    with pytest.raises(ImageError, match="member 3"):
        lost.key()
    problems: list[str] = []
    assert read_pictures(backbone, {"x": lost}, problems) == {}
    assert problems == ["row 3: member 3 is damaged"]


def test_a_picture_that_the_tower_cannot_take_is_named(backbone: Backbone, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (1, 60_000)).save(tmp_path / "thin.png")
    problems: list[str] = []
    found = read_pictures(backbone, {"x": Source(str(tmp_path / "thin.png"), "thin.png")}, problems)
    assert bool(found) != bool(problems)
    assert all("thin.png" in problem for problem in problems)
