"""Checkpoints of a training run, and early stopping."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

STATE = "trainer_state.json"


OPTIMIZER = "optimizer.safetensors"


class EarlyStopping:
    """Keeps the best residual and says when patience has run out; does nothing without a patience."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.best, self.waited = patience, -1.0, 0
        self.residual: Tensor | None = None

    def stop(self, score: float | None, residual: Tensor) -> bool:
        if self.patience is None or score is None:
            return False
        if score > self.best:
            self.best, self.waited, self.residual = score, 0, residual.detach().clone()
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self, residual: Tensor) -> None:
        if self.residual is not None:
            with torch.no_grad():
                residual.copy_(self.residual)


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))
