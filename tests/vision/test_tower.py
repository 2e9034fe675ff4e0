"""Every family of image towers, from a checkpoint on disk to `pipeline`; and what is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_towers import BARE, CLASSIFIERS, TRANSFORMER, save_processor, tiny_classifier
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    pipeline,
)

from taskres_hf import TaskResForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.errors import BaseModelError
from taskres_hf.vision.tower import VisionTower

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_from_a_classifier_to_pipeline(
    family: str, classifier: Callable[[str], str], labels: list[str], splits: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    folder = classifier(family)
    own = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = own(PIXELS).logits
        assert torch.equal(Model.from_base(folder, labels)(PIXELS).logits, expected)
        assert expected.std() > 0
        model = Model.from_base(folder, spec["classes"])
        places = [labels.index(model.config.prompt_names[name]) for name in spec["classes"]]
        torch.testing.assert_close(model(PIXELS).logits, expected[:, places])
    TaskResTrainer(model, TaskResTrainingArguments(shots=2, disable_tqdm=True), splits["train"]).train()
    assert not model.classifier.is_zero_shot
    model.save_pretrained(tmp_path / "trained")
    again = Model.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again(PIXELS).logits, model(PIXELS).logits)
        again.strength = 0.0
        torch.testing.assert_close(again(PIXELS).logits, expected[:, places])
    picture = splits["train"][0]["image"].convert("RGB")
    (answer,) = pipeline("image-classification", model=str(tmp_path / "trained"))([picture], top_k=1)
    with torch.no_grad():
        logits = model(**model.image_processor(images=picture, return_tensors="pt")).logits
    assert answer[0]["label"] == model.class_names[int(logits.argmax())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", BARE)
def test_a_tower_without_a_head(family: str, splits: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = AutoModel.from_config(AutoConfig.for_model(family, **BARE[family])).eval()
    bare.save_pretrained(tmp_path / "bare")
    save_processor(tmp_path / "bare")
    model = Model.from_base(tmp_path / "bare", spec["classes"])
    assert model.config.base_classifier == "class_means"
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_features(PIXELS), bare(PIXELS).pooler_output.flatten(1))
        assert not model(PIXELS).logits.any()  # it says nothing yet, and says so
    TaskResTrainer(model, TaskResTrainingArguments(shots=2, disable_tqdm=True), splits["train"]).train()
    model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        again = Model.from_pretrained(tmp_path / "trained")(PIXELS).logits
        assert torch.equal(again, model(PIXELS).logits)
        assert again.std() > 0


def test_a_backbone_of_a_family_with_a_classifier_is_what_that_would_put_its_head_on(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone = AutoModel.from_config(AutoConfig.for_model("dinov2", **CLASSIFIERS["dinov2"])).eval()
    backbone.save_pretrained(tmp_path)
    model = Model.from_base(tmp_path, spec["classes"])
    assert model.config.base_classifier == "class_means"
    with torch.no_grad():
        tokens = backbone(PIXELS).last_hidden_state
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
        torch.testing.assert_close(model.get_image_features(PIXELS), expected)


def test_a_loaded_model_is_left_as_it_is(labels: list[str]) -> None:
    own = tiny_classifier("resnet", labels)
    with torch.no_grad():
        before = own(PIXELS).logits
        model = Model.from_base(own, labels)
        assert torch.equal(model(PIXELS).logits, before)
        assert torch.equal(own(PIXELS).logits, before)
    assert model.backbone.model.resnet is own.resnet  # shared, not copied


def test_in_bf16_the_head_stays_exact(classifier: Callable[[str], str], labels: list[str]) -> None:
    exact = Model.from_base(classifier("vit"), labels)
    half = Model.from_base(classifier("vit"), labels, dtype="bfloat16")
    assert half.clip.dtype == torch.bfloat16
    assert torch.equal(half.classifier.base, exact.classifier.base)


def test_what_is_no_image_tower(base: str, trained: Path, labels: list[str], tmp_path: Path) -> None:
    for given, why in ((base, "TaskResCLIPForImageClassification"), (trained, "from_pretrained")):
        with pytest.raises(BaseModelError, match=why):
            Model.from_base(given, labels)
    names = {number: label for number, label in enumerate(labels)}  # noqa: C416 (a config takes a dict)
    DeiTForImageClassificationWithTeacher(DeiTConfig(**TRANSFORMER, id2label=names)).save_pretrained(tmp_path / "two")
    with pytest.raises(BaseModelError, match="2 heads"):
        Model.from_base(tmp_path / "two", labels)


def test_lost_weights_are_not_filled_with_random_numbers(
    classifier: Callable[[str], str], labels: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(classifier("vit"), tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: value for name, value in tensors.items() if "layernorm.weight" not in name}, file, {"format": "pt"}
    )
    with pytest.raises(BaseModelError, match="lacks 1 weights"):
        Model.from_base(tmp_path / "vit", labels)


def test_code_of_its_own_does_not_run(classifier: Callable[[str], str], labels: list[str], tmp_path: Path) -> None:
    shutil.copytree(classifier("vit"), tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(BaseModelError, match="trust_remote_code"):
        Model.from_base(tmp_path / "vit", labels)


def test_a_tower_that_does_not_pool() -> None:
    class NoPool(CLIPVisionModel):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output["pooler_output"] = None
            return output

    with pytest.raises(BaseModelError, match="no single embedding"):
        VisionTower(NoPool(CLIPVisionConfig(**TRANSFORMER))).get_image_features(PIXELS)
