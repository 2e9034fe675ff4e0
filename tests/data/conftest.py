"""Real pictures under any names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Image


@pytest.fixture(scope="session")
def photos(splits: Any) -> list[bytes]:
    """The content of 60 different picture files."""
    rows = splits["test"].select(range(60)).cast_column("image", Image(decode=False))
    return [row["bytes"] for row in rows["image"]]


@pytest.fixture
def lay(tmp_path: Path, photos: list[bytes]) -> Callable[..., Path]:
    """Make a folder of these files: pictures where the name says so, else a line of text."""

    def make(*names: str, root: str = "d") -> Path:
        top = tmp_path / root
        top.mkdir(exist_ok=True)
        count = 0
        for name in names:
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".png", ".jpg"):
                path.write_bytes(photos[count % len(photos)])
                count += 1
            else:
                path.write_text("no picture\n")
        return top

    return make
