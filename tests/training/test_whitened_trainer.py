"""Recipe `auto` through the trainer: saving, giving way to epochs, cross-validation, views, several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import TrainerCallback

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.training.whitened import fit_whitened


def _arguments(**options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(**{"disable_tqdm": True, "on_short": "ignore", "shots": 4, **options})


class _Saves(TrainerCallback):
    """Asks for a checkpoint where there is nothing to resume."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = True
        return control


def test_trained_saved_and_loaded(tasks: Any, model: Model, tmp_path: Path) -> None:
    parts = tasks["animals-plants"][1]
    trainer = TaskResTrainer(model, _arguments(shots=16), parts["train"], parts["test"], callbacks=[_Saves()])
    output = trainer.train()
    assert output.global_step == 1
    metrics = trainer.evaluate()
    assert metrics["accuracy"] > metrics["zero_shot_accuracy"] + 0.02
    stored = model.config.training
    assert (stored["recipe"], stored["share"] > 0, stored["temperature"] > 0) == ("auto", True, True)
    images = parts["test"].image_embeds[0]
    fitted = fit_whitened(*_chosen(model, parts["train"]), model.classifier.logit_scale)
    torch.testing.assert_close(
        model.classifier(images).double(),
        torch.nn.functional.normalize(images.double(), dim=1) @ fitted.weight.T
        + fitted.bias
        + model.classifier.logit_bias,
        atol=1e-3,
        rtol=1e-4,
    )
    trainer.save_model(tmp_path / "artifact")
    loaded = Model.from_pretrained(tmp_path / "artifact")
    assert torch.equal(loaded.classifier(images), model.classifier(images))
    assert loaded.config.training == stored
    loaded.classifier.strength = 0.0
    assert torch.equal(loaded.classifier(images), model.classifier.zero_shot_logits(images))


def _chosen(model: Model, train: ImageFeatures) -> tuple[Tensor, Tensor, Tensor]:
    rows = model.config.few_shot["indices"]
    return train.image_embeds[0, rows], train.labels[rows], model.classifier.base


@pytest.mark.parametrize(
    "options", [{"num_train_epochs": 3}, {"early_stopping_patience": 1}, {"save_epochs": 50}, {"learning_rate": 1e-3}]
)
def test_settings_of_epochs_take_the_recipe_that_has_them(
    tasks: Any, model: Model, tmp_path: Path, options: dict[str, Any]
) -> None:
    train, test = tasks["animals-plants"][1].values()
    validation = None if "early_stopping_patience" not in options else test
    arguments = _arguments(output_dir=str(tmp_path), shots=1, **options)
    TaskResTrainer(model, arguments, train, validation).train()
    assert model.config.training["recipe"] == "auto-v1"
    assert model.classifier.normalize_weight
    model.classifier.reset()
    TaskResTrainer(model, _arguments(shots=1), train).train()
    assert model.config.training["recipe"] == "auto"


def test_cross_validation_fits_each_fold(tasks: Any, model: Model) -> None:
    trainer = TaskResTrainer(model, _arguments(shots=8), tasks["animals-plants"][1]["train"])
    metrics = trainer.cross_validate(4)
    assert (metrics["method"], metrics["num_images"]) == ("cross-validation", 64)
    assert metrics["accuracy"] > metrics["zero_shot_accuracy"]
    assert model.classifier.is_zero_shot


def test_views_count_as_one_picture(model: Model, splits: DatasetDict) -> None:
    trainer = TaskResTrainer(model, _arguments(shots=2, views=2), splits["train"], splits["test"])
    trainer.train()
    assert model.config.training["recipe"] == "auto"
    assert trainer.evaluate()["accuracy"] > 0.4


_ON_TWO = """
import sys
from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
spec, splits = demo_tasks()["food"], demo_dataset("food")
model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
arguments = TaskResTrainingArguments(shots=4, on_short="ignore", disable_tqdm=True, cache_dir=False, use_cpu=True)
trainer = TaskResTrainer(model, arguments, splits["train"])
trainer.train()
assert trainer.accelerator.num_processes == int(sys.argv[2])
if trainer.accelerator.is_main_process:
    print(model.config.training["recipe"])
model.save_pretrained(sys.argv[1] + str(trainer.accelerator.process_index))
"""


def test_two_processes_fit_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_ON_TWO)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, count in ((two, "2"), ([sys.executable], "1")):
        command = [*launcher, str(script), str(tmp_path / f"of-{count}-"), count]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "auto"
    heads = [Model.from_pretrained(tmp_path / name).classifier for name in ("of-1-0", "of-2-0", "of-2-1")]
    assert torch.equal(heads[1].residual, heads[2].residual)
    assert torch.equal(heads[1].class_bias, heads[2].class_bias)
    torch.testing.assert_close(heads[0].residual, heads[1].residual, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(heads[0].class_bias, heads[1].class_bias, atol=1e-3, rtol=1e-3)
