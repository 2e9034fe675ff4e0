"""What a config takes over, refuses and writes down."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from support import random_residual
from transformers import AutoModelForImageClassification, CLIPModel, pipeline

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResConfig
from taskres_hf.configuration_taskres import ServedConfig
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


# ---------------------------------------------------------------------- swapped while it answers


def test_an_answer_is_of_one_classifier_whoever_swaps_them(
    model: Model, base: str, pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    first, other = model.class_names, Model.from_base(base, ["cat", "dog", "fish"])
    with ThreadPoolExecutor(1) as elsewhere:
        logits = model(pixel_values=pixel_values).logits
        elsewhere.submit(model.use_classifier, other).result()
        assert (logits.shape[1], model.class_names, model.config.num_labels) == (len(first), first, len(first))
        assert elsewhere.submit(lambda: model.class_names).result() == other.class_names
        model.save_pretrained(tmp_path / "saved")  # what is there now, whole
        assert Model.from_pretrained(tmp_path / "saved").class_names == other.class_names == model.class_names
        assert model(pixel_values=pixel_values).logits.shape[1] == len(model.class_names) == 3


def test_no_answer_has_the_names_of_another_classifier_under_load(model: Model, base: str) -> None:
    first, other = Model.from_base(base, model.class_names), Model.from_base(base, ["cat", "dog", "fish"])
    picture, done, wrong = PIL.Image.new("RGB", (32, 32)), threading.Event(), []
    pipe = pipeline("image-classification", model=model, image_processor=model.image_processor)
    read = ServedConfig.__get__

    def slowly(self: ServedConfig, *arguments: Any) -> Any:
        time.sleep(1e-4)  # another thread's turn
        return read(self, *arguments)

    def swap() -> None:
        while not done.is_set():
            model.use_classifier(other)
            model.use_classifier(first)

    def ask() -> None:
        for _ in range(30):
            names = sorted(top["label"] for top in pipe(picture, top_k=99))
            if names not in (sorted(first.class_names), sorted(other.class_names)):
                wrong.append(names)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(ServedConfig, "__get__", slowly)
        swapping = pool.submit(swap)
        asking = [pool.submit(ask) for _ in range(3)]
        errors = [answer.exception() for answer in asking]
        done.set()
    assert (wrong, errors, swapping.exception()) == ([], [None] * 3, None)
