"""Callbacks of a run: what happens after each epoch, its bar, its trackers."""

from __future__ import annotations

import atexit
from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from .arguments import TaskResTrainingArguments


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
    """Reports to the trackers of `report_to` through Accelerate: every epoch, and what is measured afterwards.

    A run stays open for measurements after training, until another begins or the process ends.
    """

    _open: ClassVar[Trackers | None] = None  # of the process: trackers know of one run at a time

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._trains = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end_tracking()
        self.accelerator.init_trackers("taskres", config=args.to_sanitized_dict())
        self._trains, Trackers._open = True, self

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.accelerator.log(logs, step=round(state.epoch))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if Trackers._open is self and not self._trains:  # within training on_log has them
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=round(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trains = False


def end_tracking() -> None:
    """End the run of this process that trackers are still told of, if there is one."""
    current, Trackers._open = Trackers._open, None
    if current is not None:
        for tracker in current.accelerator.trackers:  # `end_training` would also end the group of processes
            tracker.finish()
        current.accelerator.trackers.clear()  # Accelerate would start them again beside the new ones


atexit.register(end_tracking)
OWN = (EpochFlow, EpochBar, Trackers)  # none of them looks at single steps


class Events:
    """Callbacks of transformers with the state and control that they share."""

    def __init__(self, args: TaskResTrainingArguments, model: Any, callbacks: list[Any]) -> None:
        self.args, self.handler = args, CallbackHandler(callbacks, model, None, None, None)
        self.state, self.control = TrainerState(), TrainerControl()

    def __call__(self, name: str, **values: Any) -> None:
        self.control = getattr(self.handler, name)(self.args, self.state, self.control, **values)
