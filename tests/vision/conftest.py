"""Random checkpoints of image towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from image_towers import save_processor, tiny_classifier


@pytest.fixture(scope="session")
def labels(spec: dict[str, Any]) -> list[str]:
    """The head's: those of a task in other words and order, among others."""
    own = [f"{name.title().replace(' ', '_')}, n0{place}" for place, name in enumerate(spec["classes"])]
    return [f"thing {number}" for number in range(4)] + own[::-1]


@pytest.fixture(scope="session")
def classifier(labels: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a random classifier of a family, with an image processor."""
    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_classifier(family, labels).save_pretrained(folder)
            save_processor(folder)
            made[family] = str(folder)
        return made[family]

    return make
