"""Classes added with pictures, and training that goes on from a trained classifier."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding import ImageFeatures
from taskres_hf.errors import DataError

OLD = 5


def _arguments(**options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(**{"disable_tqdm": True, "on_short": "ignore", **options})


def _part(
    features: ImageFeatures, names: list[str], labels: list[int], every: int = 1, start: int = 0
) -> ImageFeatures:
    """Pictures of some classes, under other names or fewer."""
    rows = [row for row, label in enumerate(features.labels.tolist()) if label in labels][start::every]
    part = features.select(rows)
    return ImageFeatures(part.image_embeds, part.labels, names, part.digest, (), part.digests)


@pytest.fixture
def parts(model: Model, splits: Any) -> Any:
    trainer = TaskResTrainer(model, _arguments())
    return trainer.embed(splits["train"]), trainer.embed(splits["test"])


@pytest.fixture
def started(base: str, spec: Any, parts: Any) -> Model:
    """Trained on the first five of eight classes."""
    model = Model.from_base(base, spec["classes"][:OLD], spec["template"])
    TaskResTrainer(model, _arguments(), _part(parts[0], spec["classes"][:OLD], list(range(OLD)))).train()
    return model


def _accuracy(model: Model, data: ImageFeatures, labels: list[int]) -> float:
    with torch.no_grad():
        answers = model(image_embeds=data.image_embeds[0]).logits.argmax(1)
    chosen = torch.isin(data.labels, torch.tensor(labels))
    return float((answers == data.labels)[chosen].double().mean())


def test_pictures_of_the_new_classes_help_and_old_rows_stay(started: Model, spec: Any, parts: Any) -> None:
    names, new = spec["classes"], list(range(OLD, len(spec["classes"])))
    train, test = parts
    gain = started.config.training["gain"]
    assert gain > 0
    with torch.no_grad():
        before = started(image_embeds=test.image_embeds[0]).logits
    seen = set(started.config.data["train_pictures"]["sha256_prefixes"])
    started.add_classes(names[OLD:])
    by_text = _accuracy(started, test, new)
    started.remove_classes(names[OLD:]).add_classes(names[OLD:], dataset=_part(train, names, new))
    with torch.no_grad():
        after = started(image_embeds=test.image_embeds[0]).logits
    torch.testing.assert_close(after[:, :OLD], before, atol=1e-3, rtol=1e-4)
    assert _accuracy(started, test, new) > by_text
    assert _accuracy(started, test, list(range(OLD))) > 0.2
    told = started.config.training["changes"][-1]
    assert (told["from"], told["num_images"]) == ("pictures", len(_part(train, names, new)))
    assert started.config.data["train_pictures"]["count"] > len(seen) // 10
    assert started.config.few_shot["num_images"] == len(train)


def test_pictures_of_all_classes_train_all_anew(started: Model, base: str, spec: Any, parts: Any) -> None:
    started.add_classes(spec["classes"][OLD:], dataset=parts[0])
    fresh = Model.from_base(base, spec["classes"], spec["template"])
    TaskResTrainer(fresh, _arguments(), parts[0]).train()
    torch.testing.assert_close(started.classifier.weight(), fresh.classifier.weight(), atol=1e-3, rtol=1e-3)
    assert "changes" not in started.config.training


def test_what_cannot_be_learned_leaves_the_classifier_alone(started: Model, spec: Any, parts: Any) -> None:
    names = [*spec["classes"][:OLD], "tractor", spec["classes"][OLD]]
    config, head = started.config, started.classifier
    with pytest.raises(DataError, match="no picture: 'tractor'"):
        started.add_classes(names[OLD:], dataset=_part(parts[0], names, [0, 6]))
    assert started.config is config
    assert started.classifier is head
    with pytest.warns(UserWarning, match="do not say what sets it apart"):
        started.add_classes([spec["classes"][OLD]], dataset=_part(parts[0], spec["classes"][: OLD + 1], [OLD]))
    assert started.config.training["changes"][-1]["from"] == "text"


def test_some_old_pictures_are_not_enough(started: Model, spec: Any, parts: Any) -> None:
    with pytest.warns(UserWarning, match="some of the old classes"):
        started.add_classes(spec["classes"][OLD:], dataset=_part(parts[0], spec["classes"], [0, 5, 6, 7]))


def test_auto_says_that_it_forgets(started: Model, spec: Any, parts: Any) -> None:
    names = spec["classes"][:OLD]
    other = _part(parts[1], names, list(range(OLD)))
    with pytest.warns(UserWarning, match="those are forgotten"):
        TaskResTrainer(started, _arguments(), other).train()
    fresh = started.classifier.weight().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskResTrainer(started, _arguments(), other).train()  # the same pictures again: nothing is lost
    assert torch.equal(started.classifier.weight(), fresh)
    back = _part(parts[0], names, list(range(OLD)))
    with pytest.warns(UserWarning, match="not gone on from"):
        TaskResTrainer(started, _arguments(recipe="auto-v1", num_train_epochs=2), back).train()


@pytest.mark.parametrize("recipe", ["auto-v1", "paper"])
def test_epochs_go_on_and_remember_both(recipe: str, model: Model, parts: Any, tmp_path: Any) -> None:
    options = {"recipe": recipe, "num_train_epochs": 3, "augment_online": False}
    first, second = (_part(parts[0], model.class_names, list(range(8)), 2, start) for start in (0, 1))
    TaskResTrainer(model, _arguments(**options), first).train()
    model.save_pretrained(tmp_path / "first")
    learned = model.classifier.residual.detach().clone()
    again = Model.from_pretrained(tmp_path / "first")
    trainer = TaskResTrainer(again, _arguments(**options), second)
    trainer.train()
    apart = Model.from_base(model.config.base_model_name_or_path, model.class_names, model.config.templates)
    TaskResTrainer(apart, _arguments(**options), second).train()
    moved = (again.classifier.residual - learned).norm()
    assert 0 < moved < (again.classifier.residual - apart.classifier.residual).norm() + learned.norm()
    assert not torch.allclose(again.classifier.residual, apart.classifier.residual, atol=1e-4)
    assert again.config.training["continued_from"] == {"recipe": recipe, "train_images": len(first)}
    assert again.config.data["train_images"] == len(first) + len(second)
    again.save_pretrained(tmp_path / "second")
    loaded = Model.from_pretrained(tmp_path / "second")
    with pytest.raises(DataError, match="trained on"):  # pictures of the first training are known too
        TaskResTrainer(loaded, _arguments(), eval_dataset=first).evaluate()
    with pytest.warns(UserWarning, match="went on from another"):
        assert trainer.measure() == {}


def test_all_is_trained_anew_by_the_recipe_of_before_unless_told(base: str, spec: Any, parts: Any) -> None:
    for args, recipe in ((None, "auto-v1"), (_arguments(), "auto")):
        model = Model.from_base(base, spec["classes"][:OLD], spec["template"])
        few = _part(parts[0], spec["classes"][:OLD], list(range(OLD)))
        TaskResTrainer(model, _arguments(recipe="auto-v1", num_train_epochs=2, learning_rate=3e-3), few).train()
        model.add_classes(spec["classes"][OLD:], dataset=parts[0], args=args)
        assert model.config.training["recipe"] == recipe
        assert args is not None or model.config.training["learning_rate"] == 3e-3


def test_a_trainer_follows_a_change_of_classes(model: Model, splits: Any) -> None:
    """Labels of what it has embedded already are those of the old order."""
    names = model.class_names
    trainer = TaskResTrainer(model, _arguments(shots=4), splits["train"], splits["test"])
    trainer.train()
    before, embedded = trainer.evaluate()["accuracy"], trainer.embed(splits["test"])
    assert trainer.embed(splits["test"]) is embedded
    model.reorder_classes(names[::-1])
    assert trainer.evaluate()["accuracy"] == pytest.approx(before)
    trainer.train()
    assert trainer.evaluate()["accuracy"] == pytest.approx(before)
    assert trainer.embed(splits["test"]).labels.tolist() == [
        len(names) - 1 - label for label in splits["test"]["label"]
    ]
    model.remove_classes(names[:1])
    with pytest.raises(DataError, match=names[0]):
        trainer.evaluate()
