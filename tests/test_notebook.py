"""What a notebook shows of a model and of its metrics."""

from __future__ import annotations

import json
import pickle

import pytest
from datasets import DatasetDict

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.notebook import ShownMetrics
from taskres_hf.tables import Table


@pytest.fixture
def trainer(model: Model, splits: DatasetDict) -> TaskResTrainer:
    arguments = TaskResTrainingArguments(shots=4, disable_tqdm=True, on_short="ignore")
    return TaskResTrainer(model, arguments, splits["train"], splits["test"])


@pytest.mark.filterwarnings("ignore")
def test_a_model_says_what_it_is_before_and_after_training(trainer: TaskResTrainer) -> None:
    model = trainer.model
    before = model._repr_html_()
    assert "not yet: zero-shot" in before
    assert all(name in before for name in model.class_names)
    trainer.train()
    metrics = trainer.measure()
    after = model._repr_html_()
    assert "auto, " in after
    assert f"{100 * metrics['accuracy']:.1f} %, zero-shot {100 * metrics['zero_shot_accuracy']:.1f} %" in after
    model.strength = 0.5
    assert "0.5 (1 as trained" in model._repr_html_()


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_a_dict_that_shows_tables(trainer: TaskResTrainer) -> None:
    trainer.train()
    metrics = trainer.evaluate()
    assert isinstance(metrics, dict)
    assert json.loads(json.dumps(metrics)) == metrics == pickle.loads(pickle.dumps(metrics))
    page = metrics._repr_html_()
    for name, row in metrics["per_class"].items():
        assert name in page
        assert f"{100 * row['accuracy']:.1f} %" in page
    assert "test (159 pictures)" in page
    assert "eval_accuracy" in trainer.evaluate(metric_key_prefix="eval")._repr_html_()


def test_of_many_classes_those_that_gained_least_are_shown() -> None:
    rows = {f"class-{n}": {"accuracy": n / 100, "zero_shot_accuracy": 0.0, "support": 3} for n in range(80)}
    page = ShownMetrics(accuracy=0.5, per_class=rows, num_images=240)._repr_html_()
    assert "class-49<" in page
    assert "class-50<" not in page
    assert "30 more" in page


def test_names_are_text() -> None:
    hostile = "<script>alert(1)</script>"
    row = {"accuracy": 1.0, "support": 1}
    page = ShownMetrics(accuracy=1.0, split=hostile, num_images=1, per_class={hostile: row})._repr_html_()
    page += Table([hostile], [[hostile]], hostile, hostile).html()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 6
