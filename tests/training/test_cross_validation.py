"""Cross-validation: every picture by a head that never saw it, whatever the classes look like."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from datasets import DatasetDict

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.evaluation import accuracy
from taskres_hf.training.cross_validation import fold_of_each_picture


def _arguments(**options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(**{"disable_tqdm": True, "on_short": "ignore", **options})


@pytest.fixture
def train(model: Model, splits: DatasetDict) -> ImageFeatures:
    return TaskResTrainer(model, _arguments()).embed(splits["train"])


def test_classes_are_spread_evenly() -> None:
    labels = [0] * 10 + [1] * 5 + [2] * 2
    folds = fold_of_each_picture(labels, [], 5, 1)
    assert sorted(Counter(folds[:10]).values()) == [2] * 5
    assert sorted(folds[10:15]) == [0, 1, 2, 3, 4]  # one picture at a time
    assert len(set(folds[15:])) == 2
    assert folds == fold_of_each_picture(labels, [], 5, 1) != fold_of_each_picture(labels, [], 5, 2)


def test_a_class_with_one_picture_always_trains() -> None:
    assert fold_of_each_picture([0, 0, 1, 0], [], 5, 1)[2] == -1
    assert max(fold_of_each_picture([0, 0, 1, 0], [], 5, 1)) == 2  # no more folds than pictures of a class


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]])
def test_equal_pictures_are_in_one_fold_whatever_their_labels(labels: list[int]) -> None:
    digests = ["a", "b", "c", "d", "e", "f", "a"]
    folds = fold_of_each_picture(labels, digests, 3, 1)
    assert folds[0] == folds[6] >= 0


def test_a_class_of_one_picture_many_times_cannot_be_tested() -> None:
    assert fold_of_each_picture([0, 0, 1, 1], ["a", "a", "b", "c"], 2, 1)[:2] == [-1, -1]
    with pytest.raises(DataError, match="No class has two different pictures"):
        fold_of_each_picture([0, 0, 1], ["a", "a", "b"], 2, 1)


def test_each_fold_is_a_training_of_its_own(model: Model, train: ImageFeatures, base: str) -> None:
    """The same as training and measuring each fold by hand."""
    trainer = TaskResTrainer(model, _arguments(), train)
    metrics = trainer.cross_validate(folds=3)
    assert bool((model.classifier.residual == 0).all())
    folds = torch.tensor(fold_of_each_picture(train.labels.tolist(), train.digests, 3, 1))
    right = 0.0
    for fold in range(3):
        model.classifier.reset()
        inside, outside = (torch.nonzero(mask).flatten().tolist() for mask in (folds != fold, folds == fold))
        TaskResTrainer(model, _arguments(), train.select(inside)).train()
        part = train.select(outside)
        right += accuracy(model.classifier(part.image_embeds[0]), part.labels) * len(part)
    assert metrics["accuracy"] == pytest.approx(right / 179)
    assert (metrics["folds"], metrics["num_images"], metrics["untested_classes"]) == (3, 179, [])


def test_it_foretells_the_accuracy_on_pictures_of_the_same_kind(model: Model, train: ImageFeatures) -> None:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = TaskResTrainer(model, _arguments(), train.select(order[:90]), train.select(order[90:]))
    trainer.train()
    low, high = trainer.cross_validate()["accuracy_interval"]
    assert low < trainer.evaluate()["accuracy"] < high


@pytest.mark.parametrize(
    "options",
    [
        {"enhanced_base": True, "num_train_epochs": 5}, {"views": 2}, {"recipe": "paper", "shots": 2},
        {"closed_form": False, "num_train_epochs": 5}, {"augment_online": True, "shots": 2},
    ],
)  # fmt: skip
def test_every_way_to_train_can_be_cross_validated(model: Model, splits: DatasetDict, options: dict[str, Any]) -> None:
    trainer = TaskResTrainer(model, _arguments(**{"shots": 4, **options}), splits["train"])
    before = model.classifier.weight().detach().clone()
    metrics = trainer.cross_validate()
    assert 0.2 < metrics["accuracy"] <= 1
    assert torch.equal(model.classifier.weight(), before)
    assert model.classifier.shift is None


def test_the_image_side_too(base: str, spec: dict[str, Any], splits: DatasetDict) -> None:
    model = Model.from_base(base, spec["classes"], spec["template"], residual_side="image")
    trainer = TaskResTrainer(model, _arguments(shots=2, num_train_epochs=5), splits["train"])
    assert trainer.cross_validate()["num_images"] == 16


def test_single_pictures_are_named(model: Model, train: ImageFeatures) -> None:
    rows = [n for n in range(len(train)) if int(train.labels[n]) != 2 or n == train.labels.tolist().index(2)]
    trainer = TaskResTrainer(model, _arguments(num_train_epochs=2), train.select(rows))
    with pytest.warns(UserWarning, match="1 of 8 classes have a single picture.*nothing was measured of .*reptile"):
        metrics = trainer.cross_validate()
    assert metrics["untested_classes"] == ["reptile or frog"]
    assert "reptile or frog" not in metrics["per_class"]
    assert metrics["num_images"] == len(rows) - 1


@pytest.mark.parametrize("folds", [1, 0, -1, 2.5, True])
def test_bad_folds(model: Model, train: ImageFeatures, folds: Any) -> None:
    with pytest.raises(ConfigurationError, match="folds"):
        TaskResTrainer(model, _arguments(), train).cross_validate(folds)
