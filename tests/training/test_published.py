"""`recipe="paper"` is one switch: augmentation, underscores, fp32 and the constants of the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, DatasetDict

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.errors import ConfigurationError


def _arguments(**options: Any) -> TaskResTrainingArguments:
    quick = {"recipe": "paper", "disable_tqdm": True, "on_short": "ignore", "shots": 2, "num_train_epochs": 2}
    return TaskResTrainingArguments(**{**quick, **options})


@pytest.fixture(scope="module")
def underscored(splits: DatasetDict) -> Any:
    """The same pictures, with names as the paper's datasets write them."""
    names = [name.replace(" ", "_") for name in splits["train"].features["label"].names]
    return splits["train"].cast_column("label", ClassLabel(names=names))


def test_pictures_are_augmented_afresh(model: Model, splits: DatasetDict) -> None:
    residuals = []
    for options in ({}, {"augment_online": True}, {"augment_online": False}, {"views": 2}):
        model.classifier.reset()
        TaskResTrainer(model, _arguments(**options), splits["train"]).train()
        residuals.append(model.classifier.residual.detach().clone())
        assert model.config.training["augment_online"] is (not options or options == {"augment_online": True})
        assert model.config.training["views"] == options.get("views", 0)
    assert torch.equal(residuals[0], residuals[1])
    assert not torch.equal(residuals[0], residuals[2])
    assert not torch.equal(residuals[0], residuals[3])
    embedded = TaskResTrainer(model, _arguments()).embed(splits["train"])
    TaskResTrainer(model, _arguments(), embedded).train()
    assert model.config.training["augment_online"] is False  # there is nothing to augment, and it is said
    model.classifier.reset()
    TaskResTrainer(model, _arguments(recipe="auto"), splits["train"]).train()
    assert model.config.training["augment_online"] is False


def test_underscores_stay_in_prompts(base: str, underscored: Any, tmp_path: Path) -> None:
    names = underscored.features["label"].names
    expected = Model.from_base(base, names, "a drawing of a {}.", underscores="keep")
    model = Model.from_base(base, names, "a drawing of a {}.")
    assert not torch.allclose(model.classifier.base, expected.classifier.base, atol=1e-3)
    trainer = TaskResTrainer(model, _arguments(), underscored)
    trainer.train()
    torch.testing.assert_close(model.classifier.base, expected.classifier.base, atol=1e-5, rtol=1e-5)
    assert model.config.underscores == model.config.training["underscores"] == "keep"
    assert model.class_prompts() == expected.class_prompts()
    trainer.save_model(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.classifier.weight(), model.classifier.weight(), atol=1e-5, rtol=1e-5)


def test_auto_leaves_prompts_alone(base: str, underscored: Any) -> None:
    model = Model.from_base(base, underscored.features["label"].names)
    before = model.classifier.base.clone()
    TaskResTrainer(model, _arguments(recipe="auto"), underscored).train()
    assert torch.equal(model.classifier.base, before)
    assert model.config.underscores == "replace"


def test_prompts_from_a_half_precision_base_are_made_in_fp32(base: str, underscored: Any) -> None:
    names = underscored.features["label"].names
    expected = Model.from_base(base, names, underscores="keep").classifier.base
    model = Model.from_base(base, names, dtype=torch.bfloat16)
    TaskResTrainer(model, _arguments(augment_online=False), underscored).train()
    torch.testing.assert_close(model.classifier.base, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dataset", "alpha", "rate"), [("oxford_flowers", 1.0, 2e-3), ("imagenet", 0.5, 2e-4), ("oxford_pets", 0.5, 2e-3)]
)
def test_constants_of_the_dataset(model: Model, splits: DatasetDict, dataset: str, alpha: float, rate: float) -> None:
    TaskResTrainer(model, _arguments(dataset_name=dataset, augment_online=False), splits["train"]).train()
    assert model.classifier.alpha == model.config.alpha == alpha
    assert model.config.training["learning_rate"] == rate
    model.classifier.alpha = model.config.alpha = 0.5
    TaskResTrainer(model, _arguments(dataset_name=dataset, recipe="auto"), splits["train"]).train()
    assert model.classifier.alpha == 0.5


def test_the_tower_runs_in_fp32_in_torch(model: Model, splits: DatasetDict) -> None:
    TaskResTrainer(model, _arguments(augment_online=False), splits["train"]).train()
    assert model.config.training["engine"] == "torch-fp32"


def test_resuming_goes_on_with_the_published_setting(base: str, underscored: Any, tmp_path: Path) -> None:
    names = underscored.features["label"].names
    options = {"output_dir": str(tmp_path), "save_epochs": 1, "dataset_name": "oxford_flowers"}
    TaskResTrainer(Model.from_base(base, names), _arguments(**options), underscored).train()
    model = Model.from_base(base, names)
    trainer = TaskResTrainer(model, _arguments(**options), underscored)
    trainer.train(resume_from_checkpoint=True)
    assert model.config.underscores == "keep"


def test_cross_validation_has_the_published_setting_and_leaves_the_model(base: str, underscored: Any) -> None:
    names = underscored.features["label"].names
    model = Model.from_base(base, names)
    before = model.classifier.base.clone()
    arguments = _arguments(dataset_name="oxford_flowers", augment_online=False, num_train_epochs=20, shots=4)
    metrics = TaskResTrainer(model, arguments, underscored).cross_validate()
    assert torch.equal(model.classifier.base, before)
    assert (model.classifier.alpha, model.config.underscores) == (0.5, "replace")
    kept = Model.from_base(base, names, underscores="keep", alpha=1.0)
    expected = TaskResTrainer(kept, arguments, underscored).cross_validate()
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_a_processor_without_a_fixed_size_says_what_to_do(model: Model, splits: DatasetDict) -> None:
    class Flexible:
        crop_size = size = None

    model.image_processor = Flexible()
    with pytest.raises(ConfigurationError, match="augment_online=False"):
        TaskResTrainer(model, _arguments(), splits["train"]).train()
