"""Checkpoints of a training run, what makes it the same run, and the best residual of an early-stopped one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ArtifactError, ConfigurationError
from ..fingerprint import same_base
from ..storage import read_json, read_tensors, write_json, write_tensors
from .arguments import TaskResTrainingArguments

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
_STALE = 24 * 3600  # seconds after which a checkpoint that was never finished is swept


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
        score = metrics.get(self.metric)
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
    """Write `checkpoint-<epoch>`, whole or absent: the artifact, and what resuming needs with a checksum of it.

    Args:
        tensors: residual, Adam's moments and, where epochs are measured, the best residual.
        state: the run's description and history, for JSON.
        limit: newest checkpoints kept; None, 0 or less for all.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    _sweep(Path(output_dir))
    folder = Path(output_dir) / f"checkpoint-{epoch}"
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=output_dir))
    try:
        model.save_pretrained(staging)
        write_tensors(staging / OPTIMIZER, tensors)
        write_json(staging / STATE, {**state, "sha256": _checksum(state, staging / OPTIMIZER)})
        staging.chmod(Path(output_dir).stat().st_mode & 0o777)  # mkdtemp gives 0700
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if limit is not None and limit > 0:
        # Later epochs than this one are of an earlier run: they go first, and what was just written never.
        found = sorted(list_checkpoints(output_dir), key=lambda path: (_epoch(path) <= epoch, _epoch(path)))
        for old in found[:-limit]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


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
    state, (tensors, _) = read_json(folder / STATE), read_tensors(folder / OPTIMIZER)
    stored = state.pop("sha256", None)
    names = {"residual", "exp_avg", "exp_avg_sq", "step"}
    if stored != _checksum(state, folder / OPTIMIZER) or not names <= set(tensors) or "run" not in state:
        raise ArtifactError(
            f"{folder} is damaged or of another version: its checksum is not that of its content. Resume from another "
            "checkpoint, or start anew without resume_from_checkpoint."
        )
    return state, tensors


def _checksum(state: Mapping[str, Any], tensors: Path) -> str:
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    digest.update(tensors.read_bytes())
    return digest.hexdigest()


def _sweep(output_dir: Path) -> None:
    """Remove what an interrupted run left of a checkpoint; a fresh one may be another process's."""
    for path in output_dir.glob(".checkpoint-*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                shutil.rmtree(path, ignore_errors=True)


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
