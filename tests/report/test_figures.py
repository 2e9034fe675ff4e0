"""Figures that other pages can use too."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import PIL.Image
import pytest

from taskres_hf.errors import DataError
from taskres_hf.report import accuracy_figure

pytest.importorskip("matplotlib", reason="figures need matplotlib")


def _metrics(names: list[str]) -> dict[str, object]:
    rows = {
        name: {"accuracy": 0.5 + 0.001 * number, "zero_shot_accuracy": 0.5, "support": 8}
        for number, name in enumerate(names)
    }
    return {"accuracy": 0.6, "zero_shot_accuracy": 0.5, "num_images": 8 * len(names), "per_class": rows}


def test_the_main_figure_is_a_png_or_an_svg() -> None:
    names = ["cat", "$\\frac{$ <script>", "猫"]
    picture = PIL.Image.open(io.BytesIO(accuracy_figure(_metrics(names))))
    assert picture.format == "PNG"
    assert picture.size[0] > 800
    drawn = accuracy_figure(_metrics(names), "svg")
    assert drawn == accuracy_figure(_metrics(names), "svg")  # the same file for the same numbers
    texts = {(node.text or "") for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("}text")}
    assert {"cat (8)", "$\\frac{$ <script> (8)", "猫 (8)", "all pictures (24)"} <= texts


def test_of_many_classes_those_that_changed_most() -> None:
    drawn = accuracy_figure(_metrics([f"class {number}" for number in range(200)]), "svg").decode()
    assert "class 199 (8)" in drawn
    assert "class 100 (8)" not in drawn
    assert "40 of 200 classes" in drawn


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(DataError, match="per_class"):
        accuracy_figure({"accuracy": 0.5})
