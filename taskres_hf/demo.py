"""The pictures and the checkpoint shipped with the library, and those of the Hub that `taskres demo --hub` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from .data.sources import load_splits
from .errors import ConfigurationError, DataError

_DATA = Path(__file__).parent / "demo_data"
# A task the text says little about, one it says nothing about, and one where shots add little.
DEMO_TASKS = ("people", "digits", "food")
HUB_MODEL = "openai/clip-vit-base-patch32"
HUB_DATASET = "AI-Lab-Makerere/beans"  # photographs of leaves, healthy or with one of two diseases; MIT, 180 MB
HUB_TEMPLATE = "a photo of a bean leaf, {}."
_PATIENCE = 10.0  # seconds until a Hub that does not answer counts as out of reach


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


def hub_dataset() -> DatasetDict:
    """Splits `train`, `validation` and `test` of `HUB_DATASET`, with the columns `image` and `label`.

    Raises:
        DataError: the Hub cannot be reached, or does not hand the pictures out.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(HUB_DATASET, timeout=_PATIENCE)  # `load_dataset` would try for minutes
        splits = load_splits(HUB_DATASET)
    except Exception as error:  # the client's errors of the network have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"The Hub cannot be reached or does not give {HUB_DATASET} ({reason}). `taskres demo` without --hub runs "
            "on what is shipped and needs no network."
        ) from error
    return splits.select_columns(["image", "labels"]).rename_column("labels", "label")
