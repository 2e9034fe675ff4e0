"""What the faults are tried on: the shipped checkpoint, a few shipped pictures, classifiers of three classes."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.demo import demo_dataset, demo_model

CLASSES = ["apple", "banana", "cherry"]
_PLACE = "some/base"  # an address of no machine, in files that may be kept


@cache
def base() -> Any:
    """The shipped checkpoint, loaded once."""
    return zero_shot().clip


@cache
def zero_shot() -> TaskResCLIPForImageClassification:
    return TaskResCLIPForImageClassification.from_base(demo_model(), CLASSES)


def classifier(seed: int = 0, classes: list[str] | None = None, **options: Any) -> TaskResCLIPForImageClassification:
    """A classifier over the shared base, with a residual drawn from `seed`."""
    first = zero_shot()
    model = TaskResCLIPForImageClassification.from_base(
        first.clip, classes or CLASSES, tokenizer=first.tokenizer, image_processor=first.image_processor, **options
    )
    model.config.base_model_name_or_path = _PLACE
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.classifier.residual.copy_(torch.randn(model.classifier.residual.shape, generator=generator))
    return model


def png(shade: int) -> bytes:
    """A small picture, another for each shade."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (shade * 37 % 256, shade * 11 % 256, shade % 256)).save(sink, "PNG")
    return sink.getvalue()


def picture_files(folder: Path, count: int) -> list[str]:
    """`count` files of shipped pictures, each of another content."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = demo_dataset("animals-plants")["test"]
    files = []
    for number in range(count):
        file = folder / f"{number:06d}.png"
        if not file.exists():
            picture = rows[number % len(rows)]["image"].convert("RGB")
            picture.putpixel((0, 0), (number % 256, number // 256 % 256, number // 65536))
            picture.save(file, compress_level=1)
        files.append(str(file))
    return files


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
