"""Small classifiers to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_config
from transformers import AutoModel

from taskres_hf import TaskResCLIPForImageClassification, TaskResConfig
from taskres_hf.encoders import BaseSource, load_image_processor

HOSTILE = ["<script>alert(1)</script>", "=cmd()|' /C calc'!A0", "\x1b[31mred & <b>bold</b>"]
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.5], "image_std": [0.3, 0.3, 0.2], "do_convert_rgb": True,
}  # fmt: skip


def use_everything(model: TaskResCLIPForImageClassification) -> TaskResCLIPForImageClassification:
    """All that an artifact of the third format may have: a bias, rows of their own lengths, a factor, a strength."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(model.classifier.base.shape, generator=generator)
    bias = torch.linspace(-2, 2, len(rows))
    model.classifier.set_weight(rows, class_bias=bias, normalize_weight=False, logit_scale_factor=0.75)
    model.strength = 0.625
    return model


@pytest.fixture
def tiny() -> Callable[[str], TaskResCLIPForImageClassification]:
    """A random classifier of a family, for pictures of 32x32, with everything that a head may have."""

    def make(family: str = "clip", names: list[str] = HOSTILE) -> TaskResCLIPForImageClassification:
        torch.manual_seed(0)
        base = AutoModel.from_config(tiny_config(family)).eval()
        with torch.no_grad():  # untrained scales and biases are too plain to tell formulas apart
            for name, value in (("logit_bias", -3.0), ("logit_scale", 1.7), ("temperature", 0.6)):
                if hasattr(base, name):
                    getattr(base, name).fill_(value)
        config: Any = TaskResConfig.for_classes(names, "a photo of a {}.")
        config.projection_dim = {"align": 8, "siglip": 32, "siglip2": 32, "tipsv2": 32}.get(family, 16)
        config.base_model_type, config.base_model_name_or_path = family, "/home/somebody/models/tiny"
        model = TaskResCLIPForImageClassification(config, base, torch.randn(len(names), config.projection_dim))
        model.image_processor = load_image_processor(BaseSource(""), PROCESSOR)
        return use_everything(model)

    return make


@pytest.fixture(scope="session")
def pictures(splits: Any) -> list[Any]:
    """Six shipped pictures, RGB, some resized to odd sizes."""
    sizes = [None, (333, 211), (97, 400), None, (40, 50), (64, 65)]
    rows = [splits["test"][number * 25]["image"].convert("RGB") for number in range(len(sizes))]
    return [row if size is None else row.resize(size) for row, size in zip(rows, sizes, strict=True)]


@pytest.fixture(scope="session")
def full(trained: Path) -> TaskResCLIPForImageClassification:
    """The trained classifier over the shipped base with everything that a head may have; do not change it."""
    return use_everything(TaskResCLIPForImageClassification.from_pretrained(trained))


@pytest.fixture(scope="session")
def values(full: TaskResCLIPForImageClassification, pictures: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values of the pictures, and the classifier's own logits of them."""
    pixels = full.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return pixels, full(pixels).logits
