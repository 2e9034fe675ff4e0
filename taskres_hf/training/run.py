"""One run of training: its epochs, the callbacks around them, its checkpoints and how it goes on from one."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.trainer_callback import EarlyStoppingCallback, ExportableState, TrainerControl, TrainerState

from ..base_classifier import same_base
from ..embedding import Embedder, ImageFeatures, TextEmbedder
from ..errors import ArtifactError, ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import (
    SEAL,
    check_can_write,
    read_sealed,
    read_tensors,
    staging_folder,
    sync_folder,
    write_sealed,
    write_tensors,
)
from .arguments import TaskResTrainingArguments, is_test_split
from .callbacks import OWN, Events
from .measuring import Metrics
from .recipes import Recipe
from .shots import TrainingPictures
from .steps import Batches, Step, make_optimizer, set_learning_rate

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
_ATTEMPTS = 100  # at replacing a checkpoint that other processes replace too


class BestResidual:
    """The residual of the best epoch on the evaluation set, and whether patience has run out."""

    def __init__(self, args: TaskResTrainingArguments) -> None:
        self.active, self.patience = args.keeps_best, args.early_stopping_patience
        self.metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        self.sign = 1.0 if args.greater_is_better else -1.0
        self.score: float | None = None
        self.epoch, self.waited = 0, 0
        self.residual: Tensor | None = None

    def update(self, epoch: int, metrics: Mapping[str, Any], residual: Tensor) -> None:
        """Take an epoch's measurement into account; NaN is no gain. Without a choice only the score is kept."""
        score = metrics.get("eval_map" if self.metric == "eval_accuracy" else self.metric, metrics.get(self.metric))
        if not isinstance(score, (int, float)):
            if not self.active:
                return
            numbers = sorted(name for name, value in metrics.items() if isinstance(value, (int, float)))
            name = self.metric.removeprefix("eval_")
            raise ConfigurationError(f"metric_for_best_model {name!r} is not among the numbers {numbers}.")
        if not math.isnan(score) and (self.score is None or self.sign * score > self.sign * self.score):
            self.score, self.epoch, self.waited = float(score), epoch, 0
            self.residual = residual.detach().clone() if self.active else None
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def restore(self, residual: Tensor) -> None:
        """Put the best residual back."""
        if self.residual is not None:
            with torch.no_grad():
                residual.copy_(self.residual)

    def state(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "waited": self.waited}

    def load(self, state: Mapping[str, Any], residual: Tensor | None) -> None:
        self.score, self.epoch, self.waited = state["score"], state["epoch"], state["waited"]
        self.residual = residual


def write_checkpoint(
    model: Any, output_dir: str, epoch: int, tensors: Mapping[str, Tensor], state: dict[str, Any], limit: int | None
) -> Path:
    """Write `checkpoint-<epoch>`, whole or absent: the artifact, and what resuming needs; each file has a checksum.

    Args:
        tensors: residual, Adam's moments and, where epochs are measured, the best residual.
        state: the run's description and history, for JSON.
        limit: newest checkpoints kept; None, 0 or less for all.
    """
    folder = Path(output_dir) / f"checkpoint-{epoch}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_checkpoint(folder, model, tensors, state)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {folder}: {error.strerror or error}. Make room, or choose another output_dir; earlier "
            "checkpoints stay."
        ) from error
    if limit is not None and limit > 0:
        # Later epochs than this one are of an earlier run: they go first, and what was just written never.
        found = sorted(list_checkpoints(output_dir), key=lambda path: (_epoch(path) <= epoch, _epoch(path)))
        for old in found[:-limit]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _write_checkpoint(folder: Path, model: Any, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    with staging_folder(folder.parent, folder.name) as staging:
        model.save_pretrained(staging)
        optimizer = write_tensors(staging / OPTIMIZER, tensors)
        write_sealed(staging / STATE, {**state, "optimizer_sha256": optimizer})
        staging.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp gives 0700
        for attempt in range(_ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(staging, folder)
                break
            except OSError as error:  # another process was faster with this epoch
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _ATTEMPTS - 1:
                    raise
        sync_folder(folder.parent)


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Folders `checkpoint-<epoch>`, oldest first; other names are somebody else's."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdecimal()]
    complete = [path for path in folders if (path / STATE).is_file() and path.name.count("-") == 1]
    return sorted(complete, key=_epoch)


def _epoch(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def read_checkpoint(
    source: str | os.PathLike[str] | Literal[True], output_dir: str
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's folder, state and tensors.

    Args:
        source: its folder; or True for the newest in `output_dir` that is whole.

    Raises:
        ConfigurationError: there is none. ArtifactError: damaged.
    """
    if source is not True:
        return Path(source), *_read(Path(source))
    folders = list_checkpoints(output_dir)
    if not folders:
        raise ConfigurationError(
            f"There is no checkpoint in {output_dir} to resume from. Train with save_epochs=N to have some."
        )
    for folder in reversed(folders):
        try:
            return folder, *_read(folder)
        except ArtifactError as error:
            if folder == folders[0]:
                raise
            warnings.warn(f"{error} The checkpoint before it is tried.", stacklevel=4)
    raise AssertionError


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        state, (tensors, metadata) = read_sealed(folder / STATE), read_tensors(folder / OPTIMIZER)
        _check_checkpoint(state, tensors, metadata)
    except ArtifactError as error:
        raise ArtifactError(
            f"{folder} is damaged or of another version ({error}). Resume from another checkpoint, or start anew "
            "without resume_from_checkpoint."
        ) from error
    return state, tensors


# What each entry of a checkpoint's state must be.
_STATE_TYPES: dict[str, tuple[type, ...]] = {
    "epoch": (int,), "global_step": (int,), "run": (dict,), "best": (dict,), "log_history": (list,),
    "callbacks": (dict,), "optimizer_sha256": (str,),
}  # fmt: skip


def _check_checkpoint(state: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    wrong = [key for key, types in _STATE_TYPES.items() if not isinstance(state.get(key), types)]
    best = state.get("best")
    wrong += [key for key in ("score", "epoch", "waited") if not isinstance(best, dict) or key not in best]
    wrong += sorted({"residual", *_MOMENTS} - set(tensors))
    if wrong:
        raise ArtifactError(f"{', '.join(wrong)} missing or of another kind")
    if state["optimizer_sha256"] != metadata[SEAL]:
        raise ArtifactError(f"its {OPTIMIZER} is of another checkpoint")


def check_same_run(folder: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Whether a checkpoint is of the run that goes on.

    Raises:
        ConfigurationError: names what differs.
    """
    now: dict[str, Any] = json.loads(json.dumps(run))
    different = [key for key in now if key != "base" and stored.get(key) != now[key]]
    # With other prompts the text sides cannot be compared: the prompts are what differs then.
    if "templates" not in different and not same_base(stored.get("base") or {}, now.get("base") or {}):
        different.append("base model")
    if different:
        raise ConfigurationError(
            f"{folder} is a checkpoint of another run: {', '.join(different)} differ. Resume with the same settings, "
            "base model and data, or start anew without resume_from_checkpoint."
        )


def check_epoch_choice(args: TaskResTrainingArguments, eval_dataset: Any, split: str | None, callbacks: Any) -> bool:
    """Whether the evaluation set chooses the epoch; refused without one, or on the pictures of the final measurement.

    Where checkpoints are asked for, their folder is tried too.

    Args:
        split: name of the evaluation set's split, or None where it is unknown.
    """
    if args.save_epochs:
        check_can_write(args.output_dir)  # before hours of embedding
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
        if events.control.should_save and whole and self.recipe.name != "auto":  # which is over then
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
    embedder: Embedder | TextEmbedder | None,
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
