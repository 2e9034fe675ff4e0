"""One run of training: its epochs, what surrounds them, its checkpoints and how it goes on from one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerControl, TrainerState

from ..embedding.embedder import Embedder
from ..embedding.features import ImageFeatures
from ..errors import ArtifactError, ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from .arguments import TaskResTrainingArguments
from .callbacks import OWN
from .checkpoints import BestResidual, check_same_run, read_checkpoint, write_checkpoint
from .measuring import Metrics
from .recipes import Recipe
from .shots import TrainingPictures
from .steps import Batches, Step, make_optimizer, set_learning_rate


class Events:
    """Callbacks of transformers with the state and control that they share."""

    def __init__(self, args: TaskResTrainingArguments, model: Any, callbacks: list[Any]) -> None:
        self.args, self.handler = args, CallbackHandler(callbacks, model, None, None, None)
        self.state, self.control = TrainerState(), TrainerControl()

    def __call__(self, name: str, **values: Any) -> None:
        self.control = getattr(self.handler, name)(self.args, self.state, self.control, **values)


class TrainingRun:
    """The epochs of one run.

    Args:
        model: whose residual is trained. recipe: the numbers. chosen: what it learns from.
        description: everything the outcome depends on, compared on resuming.
        measure: metrics of the evaluation set with the prefix `eval_`, or None without one.
    """

    def __init__(
        self,
        model: TaskResCLIPForImageClassification,
        args: TaskResTrainingArguments,
        recipe: Recipe,
        chosen: TrainingPictures,
        description: dict[str, Any],
        events: Events,
        accelerator: Any,
        measure: Callable[[], Metrics] | None,
    ) -> None:
        self.args, self.recipe, self.model, self.description = args, recipe, model, description
        self.events, self.accelerator, self.measure = events, accelerator, measure
        self.residual = model.classifier.residual
        self.optimizer, self.best = make_optimizer(model.classifier, recipe), BestResidual(args)
        self.epoch = 0
        # Calling nobody after every step would take longer than a small step does.
        self.watched = any(not isinstance(callback, OWN) for callback in events.handler.callbacks)
        count, size = len(chosen.data), recipe.train_batch_size
        steps = max(count // size, 1)
        self.examples = min(count, steps * size)  # of an epoch
        events.handler.optimizer, events.control = self.optimizer, TrainerControl()
        events.state = TrainerState(
            num_train_epochs=recipe.num_train_epochs, max_steps=steps * recipe.num_train_epochs, train_batch_size=size,
            is_world_process_zero=accelerator.is_main_process, is_local_process_zero=accelerator.is_local_main_process,
        )  # fmt: skip

    @property
    def log_history(self) -> list[Metrics]:
        return self.events.state.log_history

    def train(self, batches: Batches, step: Step) -> None:
        """All epochs that are left."""
        self.events("on_train_begin")
        while self.epoch < self.recipe.num_train_epochs:
            if self.best.exhausted or self.events.control.should_training_stop:
                break
            self._one_epoch(batches, step)
        self.best.restore(self.residual)
        self.residual.grad = None
        self.events("on_train_end")

    def _one_epoch(self, batches: Batches, step: Step) -> None:
        events, rate = self.events, set_learning_rate(self.optimizer, self.recipe, self.epoch)
        events("on_epoch_begin")
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, examples
        asked = {"should_evaluate": False, "should_save": False}
        for batch in batches(self.epoch):
            if self.watched:
                events("on_step_begin")
            totals += step(*batch)
            events.state.global_step += 1
            if not self.watched:
                continue
            events.state.epoch = self.epoch + float(totals[2]) / self.examples
            events("on_step_end")
            asked = {name: wanted or getattr(events.control, name) for name, wanted in asked.items()}
            if events.control.should_epoch_stop or events.control.should_training_stop:
                break
        for name, wanted in asked.items():
            setattr(events.control, name, wanted)
        # A checkpoint stands at the end of an epoch: there is none of an epoch that a callback cut short.
        whole = float(totals[2]) >= self.examples
        self.epoch += 1
        events.state.epoch = self.epoch if whole else events.state.epoch
        loss, correct = (totals[:2] / totals[2]).tolist()
        if not math.isfinite(loss):
            raise ConfigurationError(
                f"Training diverged in epoch {self.epoch} (loss {loss}): lower learning_rate ({rate:g}) and check "
                "the pictures. The model on disk is untouched."
            )
        events("on_epoch_end")
        self._after_epoch({"epoch": self.epoch, "loss": loss, "accuracy": correct, "learning_rate": rate}, whole)

    def _after_epoch(self, log: Metrics, whole: bool) -> None:
        """Measure, log and save, as the callbacks ask for."""
        events = self.events
        if events.control.should_evaluate and self.measure is not None:
            measured = self.measure()
            log |= {key: value for key, value in measured.items() if isinstance(value, (int, float))}
            events("on_evaluate", metrics=measured)
            self.best.update(self.epoch, measured, self.residual)
            events.state.best_metric = self.best.score
        self.log_history.append(log)
        if events.control.should_log:
            events("on_log", logs=dict(log))
        if events.control.should_save and whole:
            self._save()
            events("on_save")

    # ------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            moments = self.optimizer.state[self.residual]
            tensors = {name: moments[name] for name in _MOMENTS} | {"residual": self.residual}
            if self.best.residual is not None:
                tensors["best_residual"] = self.best.residual
            stateful = [callback for callback in self.events.handler.callbacks if isinstance(callback, ExportableState)]
            state = {
                "epoch": self.epoch, "global_step": self.events.state.global_step, "run": self.description,
                "best": self.best.state(), "log_history": self.log_history,
                "callbacks": {type(callback).__name__: callback.state() for callback in stateful},
            }  # fmt: skip
            limit = self.args.save_total_limit
            write_checkpoint(self.model, self.args.output_dir, self.epoch, tensors, state, limit)
        self.accelerator.wait_for_everyone()

    def resume(self, source: Any) -> None:
        """Go on from a checkpoint: a folder, or True for the newest.

        Raises:
            ConfigurationError: there is none, or it is of another run. ArtifactError: it is damaged.
        """
        folder, stored, tensors = read_checkpoint(source, self.args.output_dir)
        check_same_run(folder, stored["run"], self.description)
        if tensors["residual"].shape != self.residual.shape:
            raise ArtifactError(
                f"{folder} holds a residual {list(tensors['residual'].shape)}, the model {list(self.residual.shape)}."
            )
        with torch.no_grad():
            self.residual.copy_(tensors["residual"])
        device = self.residual.device
        moments = {name: tensors[name].to(device if name != "step" else "cpu") for name in _MOMENTS}
        self.optimizer.state[self.residual] = moments
        best = tensors.get("best_residual")
        self.best.load(stored["best"], None if best is None else best.to(self.residual))
        for callback in self.events.handler.callbacks:
            for name, value in stored["callbacks"].get(type(callback).__name__, {}).get("attributes", {}).items():
                setattr(callback, name, value)
        state = self.events.state
        state.log_history, state.best_metric = list(stored["log_history"]), self.best.score
        state.global_step, state.epoch = stored["global_step"], stored["epoch"]
        self.epoch = int(stored["epoch"])


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def describe_run(
    model: TaskResCLIPForImageClassification,
    args: TaskResTrainingArguments,
    recipe: Recipe,
    chosen: TrainingPictures,
    embedder: Embedder | None,
    held_out: ImageFeatures | None,
) -> dict[str, Any]:
    """Everything the outcome of a run depends on, under the names that a refusal uses.

    Args:
        embedder: what embeds the pictures, or None where embeddings were given.
        held_out: what epochs are measured on.
    """
    config, best = model.config, args.keeps_best
    run: dict[str, Any] = {
        "recipe": asdict(recipe), "data": chosen.data.digest, "seed": args.seed, "alpha": model.classifier.alpha,
        "residual_side": config.residual_side, "views": args.views, "augment_online": chosen.online,
        "enhanced_base": args.enhanced_base, "closed_form": args.closed_form, "base": config.base_fingerprint,
        "templates": (config.base_fingerprint or {}).get("prompts_sha256"),
        "early_stopping_patience": args.early_stopping_patience, "load_best_model_at_end": best,
        "metric_for_best_model": args.metric_for_best_model if best else None,
        "eval_data": held_out.digest if held_out is not None and best else None,
    }  # fmt: skip
    if embedder is not None:
        run |= {"engine": embedder.engine.engine, "precision": embedder.engine.precision}
        run["image tower or preprocessing"] = hashlib.sha256(json.dumps(embedder.key).encode()).hexdigest()
    return run
