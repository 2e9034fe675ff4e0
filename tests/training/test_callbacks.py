"""Callbacks as in `transformers.Trainer`, early stopping, and trackers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from transformers import TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError
from taskres_hf.training.callbacks import end_tracking


def _arguments(**options: Any) -> TaskResTrainingArguments:
    return TaskResTrainingArguments(**{"disable_tqdm": True, "on_short": "ignore", "shots": 4, **options})


@pytest.fixture
def embedded(model: Model, splits: DatasetDict) -> dict[str, ImageFeatures]:
    trainer = TaskResTrainer(model, _arguments())
    return {name: trainer.embed(splits[name]) for name in splits}


class Recorder(TrainerCallback):
    """Writes down every event."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []
        self.metrics: list[dict[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **values: self._note(name, state, values)
        return super().__getattribute__(name)

    def _note(self, name: str, state: Any, values: dict[str, Any]) -> None:
        assert values["model"] is not None
        self.seen.append((name.removeprefix("on_"), state.epoch))
        self.metrics += [values["metrics"]] if "metrics" in values else []


def test_events_come_as_in_transformers(model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path) -> None:
    recorder = Recorder()
    arguments = _arguments(
        output_dir=str(tmp_path), num_train_epochs=2, train_batch_size=16, save_epochs=2, eval_strategy="epoch"
    )
    trainer = TaskResTrainer(model, arguments, embedded["train"], embedded["validation"], callbacks=[recorder])
    trainer.train()
    step = [("step_begin", "step_end")] * 2
    names = [name for name, _ in recorder.seen]
    epoch = ["epoch_begin", *(name for pair in step for name in pair), "epoch_end", "evaluate", "log"]
    assert names == ["init_end", "train_begin", *epoch, *epoch, "save", "train_end"]
    assert [epoch for name, epoch in recorder.seen if name == "step_end"] == [0.5, 1.0, 1.5, 2.0]
    assert recorder.metrics[0]["eval_accuracy"] == trainer.log_history[0]["eval_accuracy"]
    state = trainer.state
    assert (state.global_step, state.max_steps, state.num_train_epochs, state.epoch) == (4, 4, 2, 2)
    trainer.evaluate()
    assert recorder.metrics[-1]["eval_num_images"] == 45


@pytest.mark.parametrize(("event", "epochs", "steps"), [("on_epoch_end", 3, 6), ("on_step_end", 3, 5)])
def test_a_callback_can_stop_the_run(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path, event: str, epochs: int, steps: int
) -> None:
    class Stop(TrainerCallback):
        pass

    def stop(self: Any, args: Any, state: Any, control: Any, **values: Any) -> None:
        if state.global_step >= 5:
            control.should_training_stop = True

    setattr(Stop, event, stop)
    arguments = _arguments(output_dir=str(tmp_path), num_train_epochs=9, train_batch_size=16, save_epochs=1)
    trainer = TaskResTrainer(model, arguments, embedded["train"], callbacks=[Stop])
    assert trainer.train().global_step == steps
    assert len(trainer.log_history) == epochs
    # A checkpoint stands at the end of an epoch: none of the one that was cut short.
    assert len(list(tmp_path.iterdir())) == steps // 2
    trainer.callback_handler.remove_callback(Stop)
    assert trainer.train().global_step == 18


def test_a_callback_can_ask_for_a_checkpoint_and_a_measurement(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path
) -> None:
    class AskAtEpochTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
            control.should_save = control.should_evaluate = state.global_step == 3

    trainer = TaskResTrainer(
        model, _arguments(output_dir=str(tmp_path), num_train_epochs=3, train_batch_size=16), embedded["train"],
        embedded["validation"], callbacks=[AskAtEpochTwo()],
    )  # fmt: skip
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert ["eval_accuracy" in row for row in trainer.log_history] == [False, True, False]


def test_callbacks_of_transformers_work(
    model: Model, embedded: dict[str, ImageFeatures], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(
        eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=5.0,
        num_train_epochs=60,
    )  # fmt: skip
    callbacks = [EarlyStoppingCallback(early_stopping_patience=3), PrinterCallback]
    trainer = TaskResTrainer(model, arguments, embedded["train"], embedded["validation"], callbacks=callbacks)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.log_history]
    assert len(losses) < 60
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["loss"] == pytest.approx(min(losses))
    assert capsys.readouterr().out.count("eval_loss") == len(losses)


def test_early_stopping_keeps_the_best(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    arguments = _arguments(early_stopping_patience=3, learning_rate=5.0, num_train_epochs=60)
    trainer = TaskResTrainer(model, arguments, embedded["train"], embedded["validation"])
    trainer.train()
    seen = [entry["eval_accuracy"] for entry in trainer.log_history]
    assert len(seen) < 60
    assert trainer.evaluate()["accuracy"] == pytest.approx(max(seen))
    assert model.config.training["best_epoch"] == seen.index(max(seen)) + 1
    assert model.config.training["epochs_run"] == len(seen)
    with pytest.raises(ConfigurationError, match="eval_dataset"):
        TaskResTrainer(model, arguments, embedded["train"]).train()
    unknown = _arguments(early_stopping_patience=3, metric_for_best_model="f2")
    with pytest.raises(ConfigurationError, match="'f2' is not among"):
        TaskResTrainer(model, unknown, embedded["train"], embedded["validation"]).train()


def test_the_best_may_be_a_metric_of_the_user(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    calls = iter(range(100))
    trainer = TaskResTrainer(
        model, _arguments(early_stopping_patience=2, metric_for_best_model="badness_loss"), embedded["train"],
        embedded["validation"], compute_metrics=lambda prediction: {"badness_loss": abs(4 - next(calls))},
    )  # fmt: skip
    trainer.train()
    assert (model.config.training["best_epoch"], model.config.training["epochs_run"]) == (5, 7)


@pytest.mark.parametrize(
    ("options", "callbacks"),
    [
        ({"early_stopping_patience": 3}, []), ({"load_best_model_at_end": True}, []),
        ({"eval_strategy": "epoch"}, [EarlyStoppingCallback]),
    ],
)  # fmt: skip
def test_the_epoch_is_not_chosen_on_the_test_split(
    model: Model, splits: DatasetDict, options: dict[str, Any], callbacks: list[Any]
) -> None:
    for test in (splits["test"], LabelledImages(splits["test"])):
        with pytest.raises(ConfigurationError, match=r"split 'test'.*validation split"):
            TaskResTrainer(model, _arguments(**options), splits["train"], test, callbacks=callbacks).train()
    assert bool((model.classifier.residual == 0).all())
    watched = _arguments(eval_strategy="epoch", num_train_epochs=1)  # looking on chooses nothing
    TaskResTrainer(model, watched, splits["train"], splits["test"]).train()


def test_trackers_get_every_epoch_and_no_token(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import GeneralTracker

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None
        rows: list[Any] = []  # noqa: RUF012
        config: dict[str, Any] = {}  # noqa: RUF012

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.config.update(values)

        def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            self.rows.append((step, values))

    tracker: Any = Memory(_blank=False)
    arguments = _arguments(num_train_epochs=3, report_to=[tracker], hub_token="hf_secret")
    trainer = TaskResTrainer(model, arguments, embedded["train"])
    trainer.train()
    assert [(step, row["loss"]) for step, row in tracker.rows] == [
        (row["epoch"], row["loss"]) for row in trainer.log_history
    ]
    assert tracker.config["shots"] == 4
    assert "hf_secret" not in str(tracker.config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow", "wandb"])
def test_what_is_measured_after_training_reaches_the_tracker(
    model: Model, embedded: dict[str, ImageFeatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of each tracker that is installed, through its own files: settings, the epochs, accuracy beside zero-shot."""
    pytest.importorskip(name, reason=f"{name} is optional (pip install {name})")
    end_tracking()
    for variable in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "WANDB_DIR"):
        monkeypatch.setenv(variable, f"file:{tmp_path}" if variable.startswith("MLFLOW") else str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the package without a database has no other
    monkeypatch.chdir(tmp_path)
    arguments = _arguments(report_to=name, output_dir=str(tmp_path), hub_token="hf_secret")
    trainer = TaskResTrainer(model, arguments, embedded["train"], embedded["test"])
    seen: list[dict[str, Any]] = []
    trainer.train()
    real = trainer.accelerator.trackers[0].log
    monkeypatch.setattr(
        trainer.accelerator.trackers[0], "log",
        lambda values, step=None, **options: (seen.append(values), real(values, step=step, **options)),
    )  # fmt: skip
    metrics = trainer.measure()
    trainer.train()  # which ends the run before it begins another
    assert seen[0]["eval_accuracy"] == metrics["accuracy"]
    assert seen[0]["eval_zero_shot_accuracy"] == metrics["zero_shot_accuracy"]
    assert len(trainer.accelerator.trackers) == 1
    end_tracking()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files or name == "trackio"  # which chose its folder when it was imported
    assert not any(b"hf_secret" in path.read_bytes() for path in files)


def test_a_callback_changes_nothing_by_being_there(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    results = []
    for callbacks in ([], [TrainerCallback]):
        model.classifier.reset()
        TaskResTrainer(model, _arguments(), embedded["train"], callbacks=callbacks).train()
        results.append(model.classifier.residual.detach().clone())
    assert torch.equal(*results)


def test_early_stopping_of_transformers_stops_and_its_number_is_no_held_out_one(
    model: Model, embedded: dict[str, ImageFeatures]
) -> None:
    arguments = _arguments(eval_strategy="epoch", learning_rate=5.0, num_train_epochs=60)
    trainer = TaskResTrainer(
        model, arguments, embedded["train"], embedded["validation"], callbacks=[EarlyStoppingCallback(3)]
    )
    trainer.train()
    assert len(trainer.log_history) < 60
    assert trainer.evaluate()["method"] == "validation"
    assert trainer.measure()["method"] == "cross-validation"
    assert trainer.measure(embedded["test"])["method"] == "held-out"
    # The same pictures as another object, or in another process.
    again = replace(embedded["validation"])
    assert TaskResTrainer(model, _arguments()).evaluate(again)["method"] == "validation"


@pytest.mark.parametrize("evaluation", ["validation", None])
def test_early_stopping_of_transformers_needs_something_to_look_at(
    model: Model, embedded: dict[str, ImageFeatures], evaluation: str | None
) -> None:
    held_out = embedded[evaluation] if evaluation else None
    trainer = TaskResTrainer(model, _arguments(), embedded["train"], held_out, callbacks=[EarlyStoppingCallback])
    with pytest.raises(ConfigurationError, match="EarlyStoppingCallback needs"):
        trainer.train()


def test_a_number_that_is_none_is_no_gain(model: Model, embedded: dict[str, ImageFeatures]) -> None:
    values = iter([float("nan"), 0.5, float("nan"), 0.4])
    arguments = _arguments(num_train_epochs=4, load_best_model_at_end=True, metric_for_best_model="mine")
    sets = embedded["train"], embedded["validation"]
    trainer = TaskResTrainer(model, arguments, *sets, compute_metrics=lambda _: {"mine": next(values)})
    trainer.train()
    assert model.config.training["best_epoch"] == 2
    with pytest.raises(ConfigurationError, match="'mine' is not among the numbers"):
        TaskResTrainer(model, arguments, *sets, compute_metrics=lambda _: {"mine": "high"}).train()


def test_arguments_of_transformers_are_refused_by_name(model: Model, tmp_path: Path) -> None:
    wrong: Any = TrainingArguments(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"got TrainingArguments.*transformers.Trainer"):
        TaskResTrainer(model, wrong)
