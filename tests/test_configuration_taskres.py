"""What a config takes over, refuses and writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual
from transformers import AutoModelForImageClassification, CLIPModel, pipeline

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResConfig
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


# ---------------------------------------------------------------------- the head's settings


def test_strength_is_given_on_loading(saved: Path) -> None:
    for loader in (Model, AutoModelForImageClassification):
        loaded = loader.from_pretrained(saved, strength=0.5)
        assert loaded.strength == loaded.classifier.strength == loaded.config.strength == 0.5
        with pytest.raises(ConfigurationError, match="`strength`"):
            loader.from_pretrained(saved, strength=2)
    assert Model.from_pretrained(saved, strength=None).strength == 1.0
    served = pipeline("image-classification", model=str(saved), model_kwargs={"strength": 0.25})
    assert served.model.strength == 0.25


def test_a_strength_that_was_saved_can_be_given_anew(model: Model, tmp_path: Path) -> None:
    random_residual(model).strength = 0.5
    model.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).strength == 0.5
    assert AutoModelForImageClassification.from_pretrained(tmp_path, strength=1.0).strength == 1.0
    assert AutoModelForImageClassification.from_pretrained(tmp_path, strength=0).strength == 0.0


@pytest.mark.parametrize(("name", "value"), [("logit_scale_factor", 2.0), ("normalize_weight", False)])
def test_what_belongs_to_the_residual_is_not_given(saved: Path, name: str, value: Any) -> None:
    given = TaskResConfig.from_pretrained(saved, **{name: value})
    with pytest.raises(ConfigurationError, match=f"differs from the artifact's in {name}"):
        Model.from_pretrained(saved, config=given)
    with pytest.raises(ConfigurationError, match=f"differs from the artifact's in {name}"):
        AutoModelForImageClassification.from_pretrained(saved, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", 2), ("strength", "1"), ("strength", None), ("logit_scale_factor", 0), ("logit_scale_factor", -1),
        ("logit_scale_factor", float("nan")), ("logit_scale_factor", "1"), ("normalize_weight", "yes"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        TaskResConfig(**{name: value})
    config = TaskResConfig()
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        setattr(config, name, value)


def test_head_and_config_have_one_strength(model: Model) -> None:
    model.config.strength = 0.5
    assert model.classifier.strength == model.strength == 0.5
    model.classifier.normalize_weight = False
    assert model.config.normalize_weight is False
    assert model.config.to_dict()["strength"] == 0.5
    assert TaskResConfig.from_dict(model.config.to_dict()).strength == 0.5
    model.classifier.reset()
    assert model.config.strength == 1.0
