"""The trainer on real pictures: what it learns, resumes, refuses and leaves alone."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from support import random_residual

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError, FewShotError
from taskres_hf.evaluation import metrics_from_logits
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.residual import cross_entropy
from taskres_hf.training.recipes import make_recipe
from taskres_hf.training.steps import make_optimizer

Model = TaskResCLIPForImageClassification


def _arguments(**options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(**{"disable_tqdm": True, "on_short": "ignore", "shots": 4, **options})


@pytest.fixture
def embedded(model: Model, splits: DatasetDict) -> dict[str, ImageFeatures]:
    trainer = TaskResTrainer(model, _arguments())
    return {name: trainer.embed(splits[name]) for name in splits}


def test_training_beats_zero_shot_and_leaves_the_base(model: Model, splits: DatasetDict) -> None:
    before = copy.deepcopy(model.clip.state_dict())
    trainer = TaskResTrainer(model, _arguments(shots=16), splits["train"], splits["test"])
    output = trainer.train()
    metrics = trainer.evaluate()
    assert metrics["accuracy"] > metrics["zero_shot_accuracy"] + 0.02
    assert metrics["zero_shot_accuracy"] == pytest.approx(0.4151, abs=5e-4)
    drawn = trainer.embed(splits["train"]).select(model.config.few_shot["indices"])
    zero_shot = cross_entropy(model.classifier.zero_shot_logits(drawn.image_embeds[0]), drawn.labels)
    assert output.training_loss == trainer.log_history[0]["loss"] < float(zero_shot)
    assert all(torch.equal(before[name], value) for name, value in model.clip.state_dict().items())
    assert model.config.metrics["accuracy"] == metrics["accuracy"]
    assert model.config.few_shot["num_images"] == len(model.config.few_shot["indices"])


@pytest.mark.parametrize("replaced", [False, True])
def test_an_image_processor_that_is_changed_counts_from_then_on(base: str, splits: DatasetDict, replaced: bool) -> None:
    model, few = Model.from_base(base, splits["test"].features["label"].names), splits["test"].select(range(20))
    trainer = TaskResTrainer(model, _arguments())
    before = trainer.embed(few)
    assert trainer.embed(few) is before
    if replaced:
        model.image_processor = copy.deepcopy(model.image_processor)
    model.image_processor.image_mean = [0.1, 0.2, 0.3]
    expected = TaskResTrainer(model, _arguments()).embed(few).image_embeds
    assert not torch.equal(before.image_embeds, expected)
    assert torch.equal(trainer.embed(few).image_embeds, expected)


def test_stored_indices_replay_the_run(model: Model, splits: DatasetDict, base: str) -> None:
    TaskResTrainer(model, _arguments(seed=3), splits["train"]).train()
    again = Model.from_base(base, model.class_names, model.config.templates)
    chosen = splits["train"].select(model.config.few_shot["indices"])
    TaskResTrainer(again, _arguments(seed=3, shots=None), chosen).train()
    assert torch.equal(again.classifier.residual, model.classifier.residual)


def test_pictures_and_their_embeddings_train_the_same(
    model: Model, splits: DatasetDict, embedded: dict[str, ImageFeatures]
) -> None:
    results = []
    for data in (splits["train"], embedded["train"]):
        model.classifier.reset()
        TaskResTrainer(model, _arguments(), data).train()
        results.append(model.classifier.residual.detach().clone())
    # The last bits of an embedding depend on what else is in its batch.
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("recipe", ["auto", "paper"])
def test_closed_form_equals_the_accelerate_loop(model: Model, embedded: dict[str, ImageFeatures], recipe: str) -> None:
    results = []
    for closed_form in (True, False):
        model.classifier.reset()
        trainer = TaskResTrainer(model, _arguments(recipe=recipe, closed_form=closed_form), embedded["train"])
        trainer.train()
        results.append((model.classifier.residual.detach().clone(), trainer.log_history[-1]["loss"]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-5)


def test_online_views_and_both_sides_learn(model: Model, base: str, splits: DatasetDict) -> None:
    image_side = Model.from_base(base, model.class_names, model.config.templates, residual_side="image")
    for classifier, options in ((model, {"augment_online": True}), (model, {"views": 2}), (image_side, {})):
        classifier.classifier.reset()
        trainer = TaskResTrainer(classifier, _arguments(shots=2, num_train_epochs=6, **options), splits["train"])
        trainer.train()
        assert classifier.classifier.residual.abs().max() > 0
        assert trainer.log_history[-1]["loss"] < trainer.log_history[0]["loss"] + 0.5


def test_what_auto_fitted_is_measured_and_fitted_again(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    trainer = TaskResTrainer(model, _arguments(), embedded["train"])
    trainer.train()
    assert model.config.training["recipe"] == "auto"
    first = copy.deepcopy(model.classifier)
    assert trainer.measure()["method"] == "cross-validation"
    trainer.train()
    assert torch.equal(model.classifier.residual, first.residual)
    assert torch.equal(model.classifier.class_bias, first.class_bias)


def test_epochs_start_from_zero_shot_after_auto(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    results = []
    for before in ([], [_arguments()]):
        model.classifier.reset()
        for arguments in [*before, _arguments(num_train_epochs=2)]:
            TaskResTrainer(model, arguments, embedded["train"]).train()
        assert model.config.training["recipe"] == "auto-v1"
        assert model.classifier.class_bias is None
        results.append(model.classifier.residual.detach().clone())
    assert torch.equal(*results)


def test_paper_recipe_takes_the_published_number_of_steps(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    trainer = TaskResTrainer(model, _arguments(recipe="paper", shots=16), embedded["train"])
    output = trainer.train()
    assert output.global_step == 200
    assert [entry["learning_rate"] for entry in trainer.log_history][:2] == [1e-5, 2e-3]


def test_divergence_is_an_error_not_a_classifier(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    data = replace(embedded["train"], image_embeds=embedded["train"].image_embeds * float("nan"))
    with pytest.raises(ConfigurationError, match="NaN"):
        TaskResTrainer(model, _arguments(), data).train()
    with pytest.raises(ConfigurationError, match="diverged"):
        TaskResTrainer(model, _arguments(recipe="auto-v1"), data).train()


def test_a_class_without_pictures(model: Model, splits: DatasetDict) -> None:
    part = splits["train"].filter(lambda label: label != 2, input_columns="label")
    with pytest.raises(FewShotError, match="reptile or frog"):
        TaskResTrainer(model, _arguments(on_short="warn"), part).train()
    with pytest.warns(UserWarning, match="fewer than 16"):
        TaskResTrainer(model, _arguments(shots=16, on_short="warn", num_train_epochs=1), splits["train"]).train()


def test_nothing_to_train_or_evaluate_on(model: Model) -> None:
    with pytest.raises(DataError, match="train_dataset"):
        TaskResTrainer(model, _arguments()).train()
    with pytest.raises(DataError, match="eval_dataset"):
        TaskResTrainer(model, _arguments()).evaluate()


def test_metrics_agree_with_counting(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    random_residual(model)
    trainer = TaskResTrainer(model, _arguments(), eval_dataset=embedded["test"])
    metrics = trainer.evaluate(metric_key_prefix="eval")
    prediction = trainer.predict(embedded["test"])
    right = (prediction.predictions.argmax(1) == prediction.label_ids).mean()
    assert metrics["eval_accuracy"] == pytest.approx(right)
    per_class = metrics["eval_per_class"]
    assert sum(row["accuracy"] * row["support"] for row in per_class.values()) / 159 == pytest.approx(right)
    with pytest.raises(DataError, match="from 0 to 7"):
        metrics_from_logits(torch.zeros(1, 8), torch.tensor([8]))
    with pytest.raises(DataError, match="as many"):
        metrics_from_logits(torch.zeros(0, 8), torch.zeros(0))


def test_enhanced_base_is_stored_and_beats_the_regular_one(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    accuracies: dict[bool, float] = {}
    for enhanced in (False, True):
        model.classifier.reset()
        data = embedded["train"].select(few_shot_indices(embedded["train"].labels.tolist(), 16, 1, on_short="ignore"))
        trainer = TaskResTrainer(
            model, _arguments(recipe="paper", shots=None, enhanced_base=enhanced), data, embedded["test"]
        )
        trainer.train()
        accuracies[enhanced] = trainer.evaluate()["accuracy"]
    assert accuracies[True] > accuracies[False]
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight(), model.classifier.weight())
    assert json.loads((tmp_path / "config.json").read_text())["enhanced_base"]["epochs"] == 50


@pytest.mark.parametrize("what", ["strength", "normalize_weight", "logit_scale_factor", "class_bias"])
def test_only_the_published_classifier_is_trained_by_epochs(
    model: Model, embedded: dict[str, ImageFeatures], what: str
) -> None:
    values = {"strength": 0.5, "normalize_weight": False, "logit_scale_factor": 2.0, "class_bias": torch.ones(8)}
    setattr(model.classifier, what, values[what])
    model.config.training = {"method": "gda"}
    trainer = TaskResTrainer(model, _arguments(recipe="auto-v1"), embedded["train"])
    with pytest.raises(ConfigurationError, match=f"another {what}"):
        trainer.train()
    with pytest.raises(ConfigurationError, match=f"another {what}"):
        make_optimizer(model.classifier, make_recipe("auto-v1", model.classifier, 4))
    assert model.config.training == {"method": "gda"}
    model.classifier.reset()
    trainer.train()
    assert model.classifier.residual.any()
