"""What the model refuses, and swapping classifiers: other bases, edited classes, bare models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forge, random_residual
from transformers import (
    CLIPModel,
)

from taskres_hf import (
    TaskResCLIPForImageClassification,
    TaskResConfig,
    TaskResTrainer,
    TaskResTrainingArguments,
)
from taskres_hf.errors import BaseMismatchError, BaseModelError, ClassNamesError, ConfigurationError

Model = TaskResCLIPForImageClassification


def test_a_base_that_is_no_dual_encoder(tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(BaseModelError, match=r"'vit'.*Supported"):
        Model.from_base(str(tmp_path), spec["classes"])


def test_an_artifact_as_base(trained: Path, spec: dict[str, Any]) -> None:
    with pytest.raises(BaseModelError, match="from_pretrained"):
        Model.from_base(str(trained), spec["classes"])


def test_bad_classes_before_anything_is_loaded() -> None:
    with pytest.raises(ClassNamesError):
        Model.from_base("there/is-no-such-model", ["one"])


def test_another_base_is_noticed(model: Model, base: str, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path / "a")
    other = CLIPModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        other.text_projection.weight.mul_(1.05).add_(0.01)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((Path(base) / name).read_bytes())
    with pytest.raises(BaseMismatchError, match="accept_base_mismatch"):
        Model.from_pretrained(tmp_path / "a", base_model=str(tmp_path / "other"))
    forced = Model.from_pretrained(tmp_path / "a", base_model=str(tmp_path / "other"), accept_base_mismatch=True)
    assert torch.equal(forced.classifier.residual, model.classifier.residual)


@pytest.mark.parametrize("change", ["order", "name", "template"])
def test_edited_classes_are_noticed(model: Model, tmp_path: Path, change: str) -> None:
    random_residual(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    labels = config["id2label"]
    if change == "order":
        labels["0"], labels["1"] = labels["1"], labels["0"]
    elif change == "name":
        labels["0"] = "wolf"
    else:
        config["templates"] = ["a sketch of a {}."]
    config["label2id"] = {name: int(index) for index, name in labels.items()}
    forge(tmp_path, **config)
    with pytest.raises(BaseMismatchError, match="class names, their order or the templates"):
        Model.from_pretrained(tmp_path)


def test_a_lost_base_folder_says_so(model: Model, base: str, tmp_path: Path) -> None:
    random_residual(model)
    model.config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(BaseModelError, match="base_model="):
        Model.from_pretrained(tmp_path / "a")
    assert Model.from_pretrained(tmp_path / "a", base_model=base).class_names == model.class_names


def test_a_bare_model_is_refused() -> None:
    with pytest.raises(BaseModelError, match="from_base"):
        Model(TaskResConfig())


def test_head_stays_on_zero_shot_when_training_is_skipped(model: Model, splits: Any) -> None:
    metrics = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True), eval_dataset=splits["test"]).evaluate()
    assert metrics["accuracy"] == metrics["zero_shot_accuracy"]
    assert metrics["accuracy"] == pytest.approx(0.4151, abs=5e-4)  # as the checkpoint's card says


def test_classifiers_are_swapped_on_a_live_model(model: Model, base: str, pixel_values: torch.Tensor) -> None:
    other = Model.from_base(base, ["cat", "dog", "fish"])
    expected = other(pixel_values=pixel_values).logits
    model.use_classifier(other)
    assert torch.equal(model(pixel_values=pixel_values).logits, expected)
    assert model.class_names == ["cat", "dog", "fish"]
    other.config.base_model_name_or_path = "another/base"
    with pytest.raises(ConfigurationError, match="different bases"):
        Model.from_base(base, ["a", "b"]).use_classifier(other)


def test_each_classifier_brings_its_own_strength(model: Model, base: str) -> None:
    other = random_residual(Model.from_base(base, ["cat", "dog", "fish"]))
    other.strength = 0.5
    images = torch.randn(4, 192)
    expected = other(image_embeds=images).logits
    model.use_classifier(other)
    assert model.strength == 0.5
    assert torch.equal(model(image_embeds=images).logits, expected)
    model.strength = 0.0
    assert torch.equal(model(image_embeds=images).logits, model.zero_shot_logits(image_embeds=images))


def test_a_class_bias_moves_with_the_model(model: Model) -> None:
    model.classifier.set_weight(torch.randn(8, 192), class_bias=torch.ones(8))
    model.to("meta")
    assert model.classifier.class_bias is not None
    assert model.classifier.class_bias.device.type == "meta"
