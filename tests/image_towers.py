"""Image towers with random weights, small enough to make at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageClassification

TRANSFORMER = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
# Of each family what makes it small.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "vit": TRANSFORMER, "deit": TRANSFORMER, "beit": TRANSFORMER, "data2vec-vision": TRANSFORMER,
    "vit_msn": TRANSFORMER, "ijepa": TRANSFORMER,
    "dinov2": {**TRANSFORMER, "mlp_ratio": 2}, "dinov2_with_registers": {**TRANSFORMER, "mlp_ratio": 2},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "swin": SWIN, "swinv2": SWIN,
    "efficientnet": {
        "image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128,
        "in_channels": [16], "out_channels": [32], "strides": [1], "kernel_sizes": [3], "expand_ratios": [1],
        "num_block_repeats": [1], "depthwise_padding": [], "squeeze_expansion_ratio": 0.25,
    },
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25, "finegrained_output": False},
    "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "focalnet": {"image_size": 32, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "focal_levels": [1, 1],
                 "focal_windows": [3, 3]},
}  # fmt: skip
# Models without a head of their own, by the class that makes them.
BARE: dict[str, dict[str, Any]] = {
    "clip_vision_model": TRANSFORMER, "siglip_vision_model": TRANSFORMER, "dinov3_vit": TRANSFORMER,
    "dinov3_convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
}  # fmt: skip


def tiny_classifier(family: str, labels: Sequence[str]) -> Any:
    """A classifier of a family with random weights, its head large enough to have an opinion."""
    names = dict(enumerate(labels))
    ids = {label: number for number, label in names.items()}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CLASSIFIERS[family], id2label=names, label2id=ids)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForImageClassification"]
    model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "classifier" in name:
                weight.normal_(0.0, 0.5)
    return model


def save_processor(folder: Path) -> None:
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    kind(size={"height": 32, "width": 32}).save_pretrained(folder)


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
