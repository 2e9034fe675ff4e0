"""What several test files use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.artifact import whole, with_checksums
from taskres_hf.cli import main
from taskres_hf.encoders import FAMILIES
from taskres_hf.storage import read_stored, write_tensors

TASK = "animals-plants"  # the one that most tests use


def random_residual(model: TaskResCLIPForImageClassification, seed: int = 0) -> TaskResCLIPForImageClassification:
    """The same model with a residual that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.classifier.residual.copy_(torch.randn(model.classifier.residual.shape, generator=generator))
    return model


def tagger(model: TaskResCLIPForImageClassification, threshold: float = 0.4) -> TaskResCLIPForImageClassification:
    """The same model as a trained one of several labels per picture, whose sigmoids are neither all 0 nor all 1."""
    model.config.problem_type = "multi_label_classification"
    base = torch.nn.functional.normalize(model.classifier.base, dim=1)
    bias = torch.linspace(-1.5, 1.5, len(base)) - model.classifier.logit_bias
    model.classifier.set_weight(base / model.classifier.logit_scale, class_bias=bias, normalize_weight=False)
    model.config.training = {"recipe": "auto", "threshold": threshold}
    return model


def copied(artifact: Path, to: Path) -> Path:
    """A copy of an artifact, to change."""
    shutil.copytree(artifact, to)
    return to


def golden_v3(model: TaskResCLIPForImageClassification, folder: Path) -> Path:
    """How the golden artifact of the third format was made; the base's name was shortened afterwards."""
    rows = torch.sin(torch.arange(8 * 192, dtype=torch.float64)).reshape(8, 192) * torch.arange(1, 9)[:, None] / 20
    bias = torch.linspace(-2, 2, 8)
    model.classifier.set_weight(rows, class_bias=bias, normalize_weight=False, logit_scale_factor=0.75)
    model.config.training = {"method": "linear-probe"}
    model.strength = 0.625
    model.save_pretrained(folder)
    return folder


def forge(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, drop: str = "", **changes: Any) -> Path:
    """An artifact changed as whoever knows the checksums would: config, tensors or both, without any check."""
    weights = folder / "model.safetensors"
    write_tensors(weights, tensors if tensors is not None else load_file(weights))
    processor = folder / "preprocessor_config.json"
    prepared = json.loads(processor.read_text()) if processor.is_file() else None
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config.pop(drop, None)
    config = with_checksums(config, read_stored(weights)[0], prepared)
    write_tensors(weights, load_file(weights), whole(config, prepared, {}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_predictions(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Whether these are the same labels in the same order, and the same scores but for rounding."""
    labels, scores = ([[row[key] for row in rows] for rows in (found, wanted)] for key in ("label", "score"))
    return labels[0] == labels[1] and scores[0] == pytest.approx(scores[1], abs=2e-5)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


PAPER = {
    "imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "oxford_flowers": 102, "food101": 101,
    "fgvc_aircraft": 100, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101,
}  # fmt: skip

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


# Those whose code is in the transformers that is installed.
TINY_FAMILIES = sorted(set(FAMILIES) & set(CONFIG_MAPPING_NAMES))
ENDS_AT_EOS = ("clip", "metaclip_2", "clipseg", "groupvit", "aimv2", "owlvit", "owlv2")  # they read the text there


def tiny_config(family: str) -> Any:
    """A config of a family, small enough to make at once."""
    text, vision = dict(_TEXT), dict(_VISION)
    if family in ("siglip", "siglip2"):
        text["projection_size"] = 32
        if family == "siglip2":
            vision["num_patches"] = 16
    if family == "altclip":
        text |= {"project_dim": 32, "max_position_embeddings": 70, "type_vocab_size": 1}
    if family == "chinese_clip":
        text |= {"type_vocab_size": 2, "eos_token_id": None}
    if family == "align":
        vision = {
            "image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32,
            "in_channels": [16], "out_channels": [32], "strides": [1], "kernel_sizes": [3], "expand_ratios": [1],
            "num_block_repeats": [1], "depthwise_padding": [], "squeeze_expansion_ratio": 0.25,
        }  # fmt: skip
    if family == "groupvit":
        vision |= {
            "depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0],
        }  # fmt: skip
    if family == "flava":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
        return AutoConfig.for_model(
            family, text_config=text, image_config=vision, multimodal_config=sizes, hidden_size=32, projection_dim=16
        )
    if family == "vision-text-dual-encoder":
        from transformers import BertConfig, VisionTextDualEncoderConfig, ViTConfig

        text_config = BertConfig(**{k: v for k, v in text.items() if k not in ("projection_dim", "eos_token_id")})
        vision_config = ViTConfig(**{k: v for k, v in vision.items() if k != "projection_dim"})
        return VisionTextDualEncoderConfig.from_vision_text_configs(vision_config, text_config, projection_dim=16)
    dim = 8 if family == "align" else 16  # ALIGN's image embedding has the tower's own size
    options: dict[str, Any] = {"text_config": text, "vision_config": vision, "projection_dim": dim}
    if family == "blip":
        options["image_text_hidden_size"] = 16
    return AutoConfig.for_model(family, **options)


def pil_processor(kind: str, **options: Any) -> Any:
    """An image processor of transformers that resizes with Pillow, by its name there or before 5.3."""
    name = f"{kind}ImageProcessor"
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**options)


def tiny_images(family: str) -> dict[str, Any]:
    """What three prepared pictures are for it."""
    if family == "siglip2":
        return {
            "pixel_values": torch.randn(3, 16, 8 * 8 * 3),
            "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * 3),
        }
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


def beside_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what embeds take the processor for an accelerator: the ways of a GPU, on the CPU."""
    for module in ("embedder", "engines.choose"):
        monkeypatch.setattr(f"taskres_hf.embedding.{module}.is_accelerator", lambda device: True)


def pictures_that_settle(rows: Any, count: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the first pictures, of which the cache believes that they do not change once the clock has ticked."""
    monkeypatch.setattr("taskres_hf.embedding.cache._UNSETTLED", 0)
    place.mkdir()
    for row in range(count):
        rows[row]["image"].convert("RGB").save(place / f"{row:03d}.png")
    return place


def close_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders of this name may not be looked into, whoever runs the tests."""
    scandir = os.scandir

    def refused(path: str) -> Any:
        if os.path.basename(os.path.normpath(path)) == name:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
