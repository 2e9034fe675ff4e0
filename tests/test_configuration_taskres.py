"""What a config takes over, refuses and writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual
from transformers import AutoModelForImageClassification, CLIPModel

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.errors import ConfigurationError


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    random_residual(model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_hidden_states", True), ("problem_type", "multi_label_classification"), ("label2id", {"no": 0})],
)
def test_what_nothing_obeys_is_not_taken_in_silence(saved: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        Model.from_pretrained(saved, **{name: value})
    with pytest.raises(ConfigurationError, match=f"differs from the artifact's in {name}"):
        AutoModelForImageClassification.from_pretrained(saved, **{name: value})
    AutoModelForImageClassification.from_pretrained(saved, problem_type="single_label_classification")


def test_a_config_is_given_by_its_folder(saved: Path) -> None:
    assert Model.from_pretrained(saved, config=str(saved)).classifier.residual.any()


def test_a_classifier_in_float64_loads_again(model: Model, tmp_path: Path) -> None:
    model.double().save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).clip.dtype == torch.float32


def test_classifiers_of_bases_of_one_name_are_not_swapped(model: Model, base: str) -> None:
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():  # as LoRA weights merged in memory
        clip.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    with pytest.raises(ConfigurationError, match="image towers differ"):
        model.use_classifier(Model.from_base(clip, ["cat", "dog"]))
