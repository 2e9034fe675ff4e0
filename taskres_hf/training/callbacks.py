"""What happens around an epoch, as callbacks of transformers: when to log, measure and save, the bar, the trackers."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import DefaultFlowCallback, EarlyStoppingCallback, TrainerCallback

from ..errors import ConfigurationError
from .arguments import TaskResTrainingArguments, is_test_split


class EpochFlow(DefaultFlowCallback):
    """After every epoch a log; a measurement and a checkpoint where the settings say so."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log = True
        control.should_evaluate = control.should_evaluate or args.evaluates_epochs
        due = bool(args.save_epochs) and round(state.epoch) % args.save_epochs == 0
        control.should_save = control.should_save or due
        return control


class EpochBar(TrainerCallback):
    """One bar over the epochs."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.num_train_epochs, initial=round(state.epoch or 0), desc="Training", unit="epoch",
            disable=args.disable_tqdm or not state.is_world_process_zero,
        )  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {key: f"{logs[key]:.3f}" for key in ("loss", "accuracy", "eval_accuracy") if key in logs}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class Trackers(TrainerCallback):
    """Reports to the trackers of `report_to` through Accelerate."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accelerator.init_trackers("taskres", config=args.to_sanitized_dict())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.accelerator.log(logs, step=round(state.epoch))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accelerator.end_training()


OWN = (EpochFlow, EpochBar, Trackers)  # none of them looks at single steps


def check_epoch_choice(args: TaskResTrainingArguments, eval_dataset: Any, split: str | None, callbacks: Any) -> bool:
    """Whether the evaluation set chooses the epoch; refused without one, or on the pictures of the final measurement.

    Args:
        split: name of the evaluation set's split, or None where it is unknown.
    """
    if args.evaluates_epochs and eval_dataset is None:
        reason = "early_stopping_patience" if args.early_stopping_patience is not None else "eval_strategy='epoch'"
        raise ConfigurationError(f"{reason} needs an eval_dataset: give a validation split.")
    stops = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    if stops and (eval_dataset is None or not args.evaluates_epochs):
        raise ConfigurationError(
            "EarlyStoppingCallback needs an eval_dataset, a validation split, and eval_strategy='epoch'. Simpler and "
            "with the best residual kept: early_stopping_patience=N, without the callback."
        )
    stops_early = args.keeps_best or stops
    if stops_early and eval_dataset is not None and is_test_split(split):
        raise ConfigurationError(
            f"The evaluation set is the split {split!r}: an epoch chosen on it makes its accuracy too good. Give a "
            "validation split as eval_dataset and measure on the test split afterwards, with trainer.measure(test); or "
            "train without early_stopping_patience and load_best_model_at_end."
        )
    return stops_early
