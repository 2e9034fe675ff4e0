"""Checkpoints: resumed equals uninterrupted, another run is refused by name, a broken one is passed over."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ArtifactError, ConfigurationError
from taskres_hf.training.run import list_checkpoints


def _arguments(folder: Path, **options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(
        **{"output_dir": str(folder), "disable_tqdm": True, "on_short": "ignore", "shots": 2, **options}
    )


class InterruptAfterSaving(TrainerCallback):
    """Ends the process, so to say, after a number of checkpoints."""

    def __init__(self, saves: int = 1) -> None:
        self.saves = saves

    def on_save(self, *values: Any, **options: Any) -> None:
        self.saves -= 1
        if not self.saves:
            raise KeyboardInterrupt


@pytest.fixture
def embedded(model: Model, splits: DatasetDict) -> dict[str, ImageFeatures]:
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    return {name: trainer.embed(splits[name]) for name in ("train", "validation")}


def _interrupted_and_resumed(
    model: Model, folder: Path, data: Any, evaluation: Any = None, saves: int = 1, callbacks: Any = (), **options: Any
) -> tuple[TaskResTrainer, TaskResTrainer, torch.Tensor]:
    """An uninterrupted run, and one resumed after so many checkpoints; the residual of the first."""
    whole = TaskResTrainer(
        model, _arguments(folder / "a", **options), data, evaluation, callbacks=[make() for make in callbacks]
    )
    whole.train()
    expected = model.classifier.residual.detach().clone()
    arguments = _arguments(folder / "b", save_epochs=2, **options)
    model.classifier.reset()
    cut = [make() for make in callbacks] + [InterruptAfterSaving(saves)]
    with pytest.raises(KeyboardInterrupt):
        TaskResTrainer(model, arguments, data, evaluation, callbacks=cut).train()
    model.classifier.reset()
    resumed = TaskResTrainer(model, arguments, data, evaluation, callbacks=[make() for make in callbacks])
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed, expected


@pytest.mark.parametrize(
    "options", [{}, {"views": 2}, {"closed_form": False}, {"enhanced_base": True}, {"augment_online": True}]
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    model: Model, splits: DatasetDict, tmp_path: Path, options: dict[str, Any]
) -> None:
    settings = {"num_train_epochs": 4, "train_batch_size": 8, **options}
    whole, resumed, expected = _interrupted_and_resumed(model, tmp_path, splits["train"], **settings)
    assert torch.equal(model.classifier.residual, expected)
    assert resumed.log_history == whole.log_history
    assert resumed.state.global_step == whole.state.global_step == 8
    assert Model.from_pretrained(tmp_path / "b" / "checkpoint-2").class_names == model.class_names


@pytest.mark.parametrize("saves", [1, 3, 5])
def test_early_stopping_resumes_bit_for_bit(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path, saves: int
) -> None:
    """The best residual and the patience used up so far are in the checkpoint."""
    options = {"early_stopping_patience": 6, "learning_rate": 5.0, "num_train_epochs": 40, "shots": 4}
    data = (embedded["train"], embedded["validation"])
    whole, resumed, expected = _interrupted_and_resumed(model, tmp_path, *data, saves=saves, **options)
    scores = [row["eval_accuracy"] for row in whole.log_history]
    assert 2 * saves <= len(scores) < 40
    assert torch.equal(model.classifier.residual, expected)
    assert resumed.log_history == whole.log_history
    assert resumed.evaluate()["accuracy"] == max(scores)


def test_a_checkpoint_of_the_last_epoch_goes_on_to_nothing_more(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    """Also where patience ran out at the very epoch of the checkpoint."""
    options = {"early_stopping_patience": 2, "learning_rate": 5.0, "num_train_epochs": 40, "save_epochs": 1, "shots": 4}
    arguments = _arguments(tmp_path, **options)
    trainer = TaskResTrainer(model, arguments, embedded["train"], embedded["validation"])
    trainer.train()
    expected, epochs = model.classifier.residual.detach().clone(), len(trainer.log_history)
    assert epochs < 40
    model.classifier.reset()
    again = TaskResTrainer(model, arguments, embedded["train"], embedded["validation"])
    again.train(resume_from_checkpoint=True)
    assert len(again.log_history) == epochs
    assert torch.equal(model.classifier.residual, expected)


def test_callbacks_with_a_state_resume_too(model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "learning_rate": 5.0, "num_train_epochs": 30, "shots": 4}
    callbacks = [lambda: EarlyStoppingCallback(early_stopping_patience=6)]
    options["eval_strategy"] = "epoch"
    data = (embedded["train"], embedded["validation"])
    whole, resumed, expected = _interrupted_and_resumed(model, tmp_path, *data, saves=3, callbacks=callbacks, **options)
    assert len(whole.log_history) < 30
    assert resumed.log_history == whole.log_history
    assert torch.equal(model.classifier.residual, expected)


# ---------------------------------------------------------------------- another run


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 9}, "seed"), ({"enhanced_base": True}, "enhanced_base"), ({"views": 1}, "views"),
        ({"learning_rate": 1.0}, "recipe"), ({"early_stopping_patience": 3}, "early_stopping_patience"),
        ({"augment_online": True}, "augment_online"), ({"closed_form": False}, "closed_form"),
        ({"shots": 3}, "data"), ({"exact_preprocessing": True}, "image tower or preprocessing"),
        ({"precision": "bf16"}, "precision"),
    ],
)  # fmt: skip
def test_resuming_with_other_settings_is_refused_by_name(
    model: Model, splits: DatasetDict, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    arguments = _arguments(tmp_path, num_train_epochs=2, save_epochs=1)
    TaskResTrainer(model, arguments, splits["train"]).train()
    other = TaskResTrainer(model, replace(arguments, **change), splits["train"], splits["validation"])
    with pytest.raises(ConfigurationError, match=f"checkpoint of another run: [^.]*{named}[^.]* differ"):
        other.train(resume_from_checkpoint=True)


def test_resuming_with_other_prompts_or_another_base_is_refused_by_name(
    model: Model, splits: DatasetDict, tmp_path: Path, base: str
) -> None:
    arguments = _arguments(tmp_path, num_train_epochs=2, save_epochs=1)
    TaskResTrainer(model, arguments, splits["train"]).train()
    names, template = model.class_names, model.config.templates
    others = {"templates": Model.from_base(base, names, "a {}."), "alpha": Model.from_base(base, names, template, 0.7)}
    others["residual_side"] = Model.from_base(base, names, template, residual_side="image")
    clip, tokenizer = Model.from_base(base, names, template).clip, model.tokenizer
    with torch.no_grad():
        for parameter in clip.text_model.parameters():
            parameter.mul_(1.1)
    others["base model"] = Model.from_base(
        clip, names, template, tokenizer=tokenizer, image_processor=model.image_processor
    )
    for named, other in others.items():
        with pytest.raises(ConfigurationError, match=f"another run: [^.]*{named}[^.]* differ"):
            TaskResTrainer(other, arguments, splits["train"]).train(resume_from_checkpoint=True)
    with torch.no_grad():
        for parameter in model.clip.vision_model.parameters():
            parameter.mul_(1.1)
    with pytest.raises(ConfigurationError, match=r"another run: [^.]*(image tower|base model)[^.]* differ"):
        TaskResTrainer(model, arguments, splits["train"]).train(resume_from_checkpoint=True)


def test_another_evaluation_set_is_another_early_stopped_run(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    arguments = _arguments(tmp_path, num_train_epochs=2, save_epochs=1, early_stopping_patience=5)
    TaskResTrainer(model, arguments, embedded["train"], embedded["validation"]).train()
    part = embedded["validation"].select(range(20))
    with pytest.raises(ConfigurationError, match="eval_data"):
        TaskResTrainer(model, arguments, embedded["train"], part).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- which folders, and broken ones


def _three(model: Model, data: Any, folder: Path, **options: Any) -> TaskResTrainingArguments:
    arguments = _arguments(folder, num_train_epochs=3, save_epochs=1, **options)
    TaskResTrainer(model, arguments, data).train()
    return arguments


def test_other_folders_are_nobodys_checkpoints(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-1-old", "checkpoint-99"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    arguments = _three(model, embedded["train"], tmp_path, save_total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-best" / "mine.txt").exists()
    TaskResTrainer(model, arguments, embedded["train"]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("limit", [None, 0, -1, 2, 5])
def test_checkpoints_are_kept_to_a_limit(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path, limit: int | None
) -> None:
    _three(model, embedded["train"], tmp_path, save_total_limit=limit)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"checkpoint-{epoch}" for epoch in range(2 if limit == 2 else 1, 4)]


def test_what_an_earlier_run_left_makes_room_for_this_one(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    _three(model, embedded["train"], tmp_path)
    TaskResTrainer(
        model,
        _arguments(tmp_path, num_train_epochs=1, save_epochs=1, save_total_limit=1),
        embedded["train"],
    ).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("file", ["trainer_state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "garbage"])
def test_the_checkpoint_before_a_broken_one_is_taken(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path, file: str, how: str
) -> None:
    arguments = _three(model, embedded["train"], tmp_path)
    expected = model.classifier.residual.detach().clone()
    path = tmp_path / "checkpoint-3" / file
    content = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    elif how == "flip":
        place = content.rindex(b'"loss": ') + 9 if file.endswith("json") else len(content) - 5
        content[place] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if how == "truncate" else b"\0garbage")
    model.classifier.reset()
    trainer = TaskResTrainer(model, arguments, embedded["train"])
    if file.endswith("json") and how == "remove":  # not complete, so no checkpoint
        trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(ArtifactError):
            trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
        with pytest.warns(UserWarning, match="The checkpoint before it is tried"):
            trainer.train(resume_from_checkpoint=True)
    assert torch.equal(model.classifier.residual, expected)


def test_where_all_are_broken_it_is_said(model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, num_train_epochs=1, save_epochs=1)
    trainer = TaskResTrainer(model, arguments, embedded["train"])
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    state["epoch"] = 0
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ArtifactError, match="checkpoint-1 is damaged"):
        trainer.train(resume_from_checkpoint=True)


def test_what_an_interrupted_run_left_is_swept(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    old, fresh = tmp_path / ".checkpoint-7.abc.taskres.tmp", tmp_path / ".checkpoint-8.abc.taskres.tmp"
    old.mkdir()
    fresh.mkdir()
    os.utime(old, (0, 0))
    _three(model, embedded["train"], tmp_path)
    assert not old.exists()
    assert fresh.exists()  # perhaps another process's
