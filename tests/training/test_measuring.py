"""An honest number: never on pictures that the residual was trained on, and always one where one can be had."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from support import random_residual

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.evaluation import accuracy
from taskres_hf.training import measuring
from taskres_hf.training.measuring import fold_of_each_picture


def _arguments(**options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(**{"disable_tqdm": True, "on_short": "ignore", "shots": 4, **options})


@pytest.fixture
def embedded(model: Model, splits: DatasetDict) -> dict[str, ImageFeatures]:
    trainer = TaskResTrainer(model, _arguments())
    return {name: trainer.embed(splits[name]) for name in splits}


# ---------------------------------------------------------------------- training pictures are not measured on


def test_a_saved_classifier_knows_its_training_pictures(
    model: Model, splits: DatasetDict, tmp_path: Path, base: str
) -> None:
    trainer = TaskResTrainer(model, _arguments(), splits["train"])
    trainer.train()
    trainer.save_model(tmp_path / "artifact")
    loaded = Model.from_pretrained(tmp_path / "artifact")
    drawn = splits["train"].select(model.config.few_shot["indices"])
    anew = Dataset.from_dict(drawn.to_dict(), features=drawn.features)  # other rows, the same files
    with pytest.raises(DataError, match=r"32 of 32 pictures are ones .* trained on.*cross-validation"):
        TaskResTrainer(loaded, _arguments(), eval_dataset=anew).evaluate()
    mixed = concatenate_datasets([splits["test"], drawn.cast(splits["test"].features)])
    with pytest.warns(UserWarning, match=r"32 of 191 pictures are ones .* they are left out"):
        metrics = TaskResTrainer(loaded, _arguments(), eval_dataset=mixed).evaluate()
    assert metrics["train_pictures_left_out"] == 32
    one = concatenate_datasets([drawn.select([3]).cast(splits["test"].features), splits["test"]])
    with pytest.warns(UserWarning, match=r"1 of 160 pictures are ones .* trained on \(.*\.webp\)"):
        TaskResTrainer(loaded, _arguments(), eval_dataset=one).evaluate()
    clean = TaskResTrainer(loaded, _arguments(), eval_dataset=splits["test"]).evaluate()
    assert metrics["accuracy"] == clean["accuracy"]
    assert "train_pictures_left_out" not in clean


def test_measuring_on_training_pictures_is_a_choice_and_is_not_recorded(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(shots=None), splits["train"], splits["train"])
    trainer.train()
    metrics = trainer.evaluate(include_train_pictures=True)
    assert metrics["num_images"] == 179
    assert model.config.metrics is None
    with pytest.raises(DataError, match="179 of 179"):
        trainer.evaluate()


def test_embeddings_without_pictures_are_told_by_the_whole_set(
    model: Model, embedded: dict[str, ImageFeatures]
) -> None:
    bare = replace(embedded["train"], digests=())
    trainer = TaskResTrainer(model, _arguments(shots=None), bare, bare)
    trainer.train()
    with pytest.raises(DataError, match="179 of 179"):
        trainer.evaluate()


def test_a_residual_of_zero_was_trained_on_nothing(model: Model, splits: DatasetDict) -> None:
    TaskResTrainer(model, _arguments(), splits["train"]).train()
    model.classifier.reset()
    assert TaskResTrainer(model, _arguments(), eval_dataset=splits["train"]).evaluate()["num_images"] == 179


def test_at_strength_zero_nothing_was_trained_and_another_strength_is_recorded(
    model: Model, splits: DatasetDict
) -> None:
    trainer = TaskResTrainer(model, _arguments(), splits["train"], splits["test"])
    trainer.train()
    model.strength = 0.0
    assert TaskResTrainer(model, _arguments()).evaluate(splits["train"])["num_images"] == len(splits["train"])
    model.strength = 0.5
    metrics = trainer.evaluate()
    assert metrics["strength"] == model.config.metrics["strength"] == 0.5
    model.strength = 1.0
    assert "strength" not in trainer.evaluate()


def test_epochs_are_not_chosen_on_training_pictures(model: Model, splits: DatasetDict) -> None:
    both = concatenate_datasets([splits["validation"], splits["train"].cast(splits["validation"].features)])
    trainer = TaskResTrainer(model, _arguments(shots=None, early_stopping_patience=2), splits["train"], both)
    with pytest.warns(UserWarning, match="179 of 224 pictures"):
        trainer.train()
    assert trainer.log_history[-1]["eval_num_images"] == 45


def test_many_training_pictures_take_bounded_room(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [f"{n * 2654435761 % 2**40:010x}{n:054x}" for n in range(1000)]
    data = ImageFeatures(
        torch.zeros(1, 1000, 2), torch.zeros(1000, dtype=torch.long), ["a", "b"], "x", (), tuple(digests)
    )
    stored = json.loads(json.dumps({"train_pictures": measuring.remember(digests)}))
    assert len(json.dumps(stored)) < 7000
    assert measuring.known_rows(data, stored) == (list(range(1000)), True)
    other = replace(data, digests=(digests[7], *(f"{n:064x}"[::-1] for n in range(1, 1000))))
    assert measuring.known_rows(other, stored) == ([0], True)
    monkeypatch.setattr(measuring, "_MOST", 100)
    rows, complete = measuring.known_rows(data, {"train_pictures": measuring.remember(digests)})
    assert len(rows) == 100
    assert not complete


def test_a_held_out_picture_under_two_labels_is_named_and_counted(
    model: Model, embedded: dict[str, ImageFeatures]
) -> None:
    digests, labels = list(embedded["test"].digests), embedded["test"].labels.tolist()
    other = next(row for row, label in enumerate(labels) if label != labels[0])
    digests[0] = digests[other]
    trainer = TaskResTrainer(model, _arguments(), eval_dataset=replace(embedded["test"], digests=tuple(digests)))
    with pytest.warns(UserWarning, match=f"1 pictures are there under .*: row 0 as .* and row {other} as "):
        metrics = trainer.evaluate()
    assert metrics["conflicting_pictures"] == 1


# ---------------------------------------------------------------------- always a number


def test_with_a_held_out_split_the_number_is_its_own(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(), splits["train"], splits["test"])
    trainer.train()
    metrics = trainer.measure()
    assert (metrics["method"], metrics["split"], metrics["num_images"]) == ("held-out", "test", 159)
    assert model.config.metrics == metrics == trainer.evaluate()


def test_the_split_is_the_one_that_came_with_the_data(model: Model, splits: DatasetDict) -> None:
    nameless = Dataset.from_dict(splits["test"].to_dict(), features=splits["test"].features)
    trainer = TaskResTrainer(model, _arguments(), splits["train"], nameless)
    trainer.train()
    assert "split" not in trainer.measure()
    pictures = LabelledImages(splits["validation"])
    assert trainer.measure(pictures)["split"] == "validation"
    assert model.config.metrics["split"] == "validation"


def test_without_one_it_is_cross_validated_and_recorded(model: Model, splits: DatasetDict, tmp_path: Path) -> None:
    trainer = TaskResTrainer(model, _arguments(), splits["train"])
    trainer.train()
    trained = model.classifier.residual.detach().clone()
    metrics = trainer.measure()
    assert (metrics["method"], metrics["split"], metrics["num_images"]) == ("cross-validation", "train", 32)
    assert model.config.metrics == metrics
    assert torch.equal(model.classifier.residual, trained)
    trainer.save_model(tmp_path / "artifact")
    assert Model.from_pretrained(tmp_path / "artifact").config.metrics["method"] == "cross-validation"
    with pytest.raises(DataError, match=r"measure\(\) or cross_validate\(\)"):
        trainer.evaluate()


def test_training_pictures_as_evaluation_set_give_a_cross_validated_number(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(shots=None), splits["train"], splits["train"])
    trainer.train()
    with pytest.warns(UserWarning, match="Cross-validation takes its place"):
        metrics = trainer.measure()
    assert metrics["method"] == "cross-validation"
    optimistic = trainer.evaluate(include_train_pictures=True)["accuracy"]
    assert metrics["accuracy"] < optimistic - 0.1


def test_after_early_stopping_the_number_is_not_that_of_the_chosen_epoch(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(early_stopping_patience=3), splits["train"], splits["validation"])
    trainer.train()
    assert trainer.evaluate()["method"] == "validation"
    metrics = trainer.measure()
    assert metrics["method"] == "cross-validation"
    assert model.config.training["best_epoch"] <= model.config.training["epochs_run"]
    assert trainer.measure(splits["test"])["method"] == "held-out"


def test_where_nothing_can_be_measured_nothing_is_claimed(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(shots=1), splits["train"])
    trainer.train()
    with pytest.warns(UserWarning, match="Nothing was measured. No class has two different pictures"):
        assert trainer.measure() == {}
    assert model.config.metrics is None
    with pytest.raises(DataError, match="train_dataset"):
        TaskResTrainer(model, _arguments()).measure()


def test_training_anew_forgets_the_old_number(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(num_train_epochs=1), splits["train"], splits["test"])
    trainer.train()
    trainer.evaluate()
    assert model.config.metrics is not None
    trainer.train()
    assert model.config.metrics is None


# ---------------------------------------------------------------------- below zero-shot


@pytest.mark.parametrize("how", ["evaluate", "measure"])
def test_below_zero_shot_the_trainer_says_so(model: Model, splits: DatasetDict, how: str) -> None:
    random_residual(model)
    with torch.no_grad():
        model.classifier.residual.mul_(20)
    trainer = TaskResTrainer(model, _arguments(), eval_dataset=splits["test"])
    with pytest.warns(UserWarning, match=r"below zero-shot: .* of 159 pictures. Classes that lost: "):
        metrics = getattr(trainer, how)()
    assert all("zero_shot_accuracy" in row for row in metrics["per_class"].values())


def test_further_metrics_are_the_users(model: Model, splits: DatasetDict) -> None:
    def top_3(prediction: Any) -> dict[str, float]:
        best = prediction.predictions.argsort(axis=1)[:, -3:]
        return {"top_3": float((best == prediction.label_ids[:, None]).any(axis=1).mean())}

    trainer = TaskResTrainer(
        model, _arguments(num_train_epochs=2), splits["train"], splits["test"], compute_metrics=top_3
    )
    trainer.train()
    assert trainer.evaluate(metric_key_prefix="eval")["eval_top_3"] > trainer.evaluate()["accuracy"]
    assert "top_3" in trainer.cross_validate()
    assert model.config.metrics["top_3"] == trainer.measure()["top_3"]


def test_further_metrics_can_be_stored_and_do_not_replace_ours(
    model: Model, splits: DatasetDict, tmp_path: Path
) -> None:
    def count(prediction: Any) -> dict[str, Any]:
        right = prediction.predictions.argmax(axis=1) == prediction.label_ids
        return {"accuracy": 100 * right.mean(), "right": right.sum(), "half": np.float32(0.5), "t": torch.tensor(2.0)}

    trainer = TaskResTrainer(model, _arguments(), eval_dataset=splits["test"], compute_metrics=count)
    metrics = trainer.evaluate()
    assert metrics["accuracy"] < 1
    assert trainer.predict(splits["test"]).metrics["right"] == metrics["right"]
    model.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).config.metrics["half"] == 0.5
    wrong: Any = lambda _: None  # noqa: E731
    with pytest.raises(ConfigurationError, match="compute_metrics must return a dict"):
        TaskResTrainer(model, _arguments(), eval_dataset=splits["test"], compute_metrics=wrong).evaluate()


# ---------------------------------------------------------------------- cross-validation


def _all_shots(**options: Any) -> TaskResTrainingArguments:
    return _arguments(**{"shots": None, **options})


@pytest.fixture
def train(model: Model, splits: DatasetDict) -> ImageFeatures:
    return TaskResTrainer(model, _all_shots()).embed(splits["train"])


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
    with pytest.raises(DataError, match="No class has two different texts"):
        fold_of_each_picture([0, 0, 1], ["a", "a", "b"], 2, 1, "text")


def test_each_fold_is_a_training_of_its_own(model: Model, train: ImageFeatures, base: str) -> None:
    """The same as training and measuring each fold by hand."""
    trainer = TaskResTrainer(model, _all_shots(), train)
    metrics = trainer.cross_validate(folds=3)
    assert bool((model.classifier.residual == 0).all())
    folds = torch.tensor(fold_of_each_picture(train.labels.tolist(), train.digests, 3, 1))
    right = 0.0
    for fold in range(3):
        model.classifier.reset()
        inside, outside = (torch.nonzero(mask).flatten().tolist() for mask in (folds != fold, folds == fold))
        TaskResTrainer(model, _all_shots(), train.select(inside)).train()
        part = train.select(outside)
        right += accuracy(model.classifier(part.image_embeds[0]), part.labels) * len(part)
    assert metrics["accuracy"] == pytest.approx(right / 179)
    assert (metrics["folds"], metrics["num_images"], metrics["untested_classes"]) == (3, 179, [])


def test_it_foretells_the_accuracy_on_pictures_of_the_same_kind(model: Model, train: ImageFeatures) -> None:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = TaskResTrainer(model, _all_shots(), train.select(order[:90]), train.select(order[90:]))
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
    trainer = TaskResTrainer(model, _all_shots(**{"shots": 4, **options}), splits["train"])
    before = model.classifier.weight().detach().clone()
    metrics = trainer.cross_validate()
    assert 0.2 < metrics["accuracy"] <= 1
    assert torch.equal(model.classifier.weight(), before)
    assert model.classifier.shift is None


def test_the_image_side_too(base: str, spec: dict[str, Any], splits: DatasetDict) -> None:
    model = Model.from_base(base, spec["classes"], spec["template"], residual_side="image")
    trainer = TaskResTrainer(model, _all_shots(shots=2, num_train_epochs=5), splits["train"])
    assert trainer.cross_validate()["num_images"] == 16


def test_single_pictures_are_named(model: Model, train: ImageFeatures) -> None:
    rows = [n for n in range(len(train)) if int(train.labels[n]) != 2 or n == train.labels.tolist().index(2)]
    trainer = TaskResTrainer(model, _all_shots(num_train_epochs=2), train.select(rows))
    with pytest.warns(UserWarning, match="1 of 8 classes have a single picture.*nothing was measured of .*reptile"):
        metrics = trainer.cross_validate()
    assert metrics["untested_classes"] == ["reptile or frog"]
    assert "reptile or frog" not in metrics["per_class"]
    assert metrics["num_images"] == len(rows) - 1


@pytest.mark.parametrize("folds", [1, 0, -1, 2.5, True])
def test_bad_folds(model: Model, train: ImageFeatures, folds: Any) -> None:
    with pytest.raises(ConfigurationError, match="folds"):
        TaskResTrainer(model, _all_shots(), train).cross_validate(folds)
