"""The pictures and the checkpoint shipped with the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from .data.sources import load_splits
from .errors import ConfigurationError

_DATA = Path(__file__).parent / "demo_data"


def demo_model() -> str:
    """Folder of the shipped checkpoint, a small `CLIPModel` (64x64 pictures, D = 192)."""
    return str(_DATA / "tiny-clip")


def demo_tasks() -> dict[str, dict[str, Any]]:
    """Task name to its classes, template, styles and sizes."""
    tasks: dict[str, dict[str, Any]] = json.loads((_DATA / "tasks.json").read_text(encoding="utf-8"))
    return tasks


def demo_styles() -> list[str]:
    """Names of the other styles in which the classes of `all-categories` are drawn."""
    return sorted(file.stem for file in (_DATA / "dg").glob("*.parquet"))


def demo_dataset(task: str = "animals-plants") -> DatasetDict:
    """Splits `train`, `validation` and `test` of a shipped task; `"dg"` gives the other styles, one split each.

    Raises:
        ConfigurationError: there is no such task.
    """
    if task == "dg":
        files = {style: _DATA / "dg" / f"{style}.parquet" for style in demo_styles()}
        return DatasetDict({style: load_splits(file)["train"] for style, file in files.items()})
    return load_splits(_DATA / check_task(task))


def check_task(task: str) -> str:
    """The task's name if it exists.

    Raises:
        ConfigurationError: it does not.
    """
    if task not in demo_tasks():
        raise ConfigurationError(f"There is no task {task!r} among the shipped ones: {', '.join(demo_tasks())}.")
    return task
