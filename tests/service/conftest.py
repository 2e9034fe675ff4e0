"""Three classifiers over the shipped base, pictures that differ, and what `pipeline` says of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from support import random_residual

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.demo import demo_dataset

CLASSES = {
    "animals": ["cat", "dog", "bird"],
    "food": ["fruit", "bread", "soup", "<script>alert(1)</script>"],
    "signs": ["letter", "digit", "=cmd()", "arrow", "star", "\x1b[31mred", "heart"],
}


@pytest.fixture(scope="session")
def artifacts(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders by name."""
    root, found = tmp_path_factory.mktemp("served"), {}
    for seed, (name, classes) in enumerate(CLASSES.items()):
        model = TaskResCLIPForImageClassification.from_base(base, classes)
        random_residual(model, seed).save_pretrained(root / name)
        found[name] = str(root / name)
    return found


def encoded(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Twelve files: PNG and JPEG, grey, transparent, turned by EXIF, of several sizes."""
    rows = [row["image"].convert("RGB") for row in demo_dataset("food")["test"].select(range(8))]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    odd = [
        encoded(rows[0].convert("L"), "PNG"),
        encoded(rows[1].convert("RGBA"), "PNG"),
        encoded(rows[2].resize((150, 40)), "JPEG", exif=exif),
        encoded(rows[3].convert("P"), "GIF"),
    ]
    return [*(encoded(row, "PNG" if number % 2 else "JPEG") for number, row in enumerate(rows)), *odd]


@pytest.fixture(scope="session")
def expected(artifacts: dict[str, str], pictures: list[bytes]) -> dict[str, Any]:
    """What `pipeline` says of each picture, by classifier: its five best classes."""
    from transformers import pipeline

    opened = [PIL.Image.open(io.BytesIO(content)) for content in pictures]
    return {name: pipeline("image-classification", model=folder)(opened) for name, folder in artifacts.items()}


@pytest.fixture(scope="session")
def folder_of_other_base(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier over a base that gives other embeddings."""
    import shutil

    import torch
    from transformers import CLIPModel

    other = Path(shutil.copytree(base, tmp_path_factory.mktemp("bases") / "other-clip"))
    clip = CLIPModel.from_pretrained(base)
    with torch.no_grad():
        clip.visual_projection.weight += 0.05 * torch.randn(clip.visual_projection.weight.shape)
    clip.save_pretrained(other)
    model = TaskResCLIPForImageClassification.from_base(str(other), ["red", "green", "blue"])
    folder = tmp_path_factory.mktemp("served-other") / "colours"
    random_residual(model, 9).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def client(artifacts: dict[str, str]) -> Iterator[Any]:
    """A client of an app over all three."""
    from starlette.testclient import TestClient

    from taskres_hf.service import create_app

    with TestClient(create_app(artifacts, timeout_s=600), raise_server_exceptions=False) as found:
        yield found
