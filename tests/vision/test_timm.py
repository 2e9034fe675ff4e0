"""Models of timm under an image classifier, as timm and as transformers save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import same_predictions
from transformers import AutoConfig, AutoModel, pipeline

from taskres_hf import TaskResForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments


@pytest.fixture(scope="module")
def timm() -> Any:
    pytest.importorskip("torchvision", reason="timm needs a torchvision that fits torch", exc_type=Exception)
    return pytest.importorskip("timm", reason="needs timm", exc_type=Exception)


@pytest.fixture(scope="module")
def folders(timm: Any, labels: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """A random model as timm saves it for the Hub, with a head of our labels or without one."""

    def make(architecture: str, head: bool) -> Path:
        folder: Path = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=len(labels) if head else 0)
        if head:
            torch.nn.init.normal_(model.get_classifier().weight, 0.0, 0.5)
        named = {"label_names": labels} if head else None
        timm.models.save_for_hf(model, str(folder), model_config=named, safe_serialization=True)
        return folder

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext"])
def test_from_timm_to_pipeline(
    architecture: str, head: bool, timm: Any, folders: Any, labels: list[str], splits: Any, spec: Any, tmp_path: Path
) -> None:
    folder = folders(architecture, head)
    own = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model = Model.from_base(str(folder), spec["classes"])
    assert model.config.base_classifier == ("head" if head else "class_means")
    pictures = [row["image"].convert("RGB") for row in splits["train"].select(range(3))]
    pixels = model.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = own.forward_head(own.forward_features(pixels), pre_logits=True)
        assert torch.equal(model.clip.get_image_features(pixels).pooler_output, embeddings)
        if head:
            every = Model.from_base(str(folder), labels)
            assert torch.equal(every(pixels).logits, own(pixels))
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(model=own))
    assert float((pixels - torch.stack([prepare(one) for one in pictures])).abs().max()) < 0.02
    trainer = TaskResTrainer(model, TaskResTrainingArguments(shots=2, disable_tqdm=True), splits["train"])
    trainer.train()
    model.save_pretrained(tmp_path / "trained")
    again = Model.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    classify = pipeline("image-classification", model=model, image_processor=model.image_processor)
    loaded = pipeline("image-classification", model=str(tmp_path / "trained"))
    assert same_predictions(loaded(pictures[0]), classify(pictures[0]))


@pytest.mark.filterwarnings("ignore")
def test_as_transformers_saves_it(timm: Any, spec: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = timm.create_model("test_resnet", num_classes=0)
    timm.models.save_for_hf(bare, str(tmp_path / "timm"), safe_serialization=True)
    config = AutoConfig.from_pretrained(tmp_path / "timm")
    config.model_args = None
    AutoModel.from_pretrained(tmp_path / "timm", config=config).save_pretrained(tmp_path / "saved")
    first, second = (Model.from_base(str(tmp_path / name), spec["classes"]) for name in ("timm", "saved"))
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        found = [model.clip.get_image_features(pixels).pooler_output for model in (first, second)]
    assert torch.equal(*found)
