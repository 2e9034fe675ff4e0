"""taskres_hf: few-shot image classifiers as kilobyte residuals over frozen CLIP-like models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .registration import register as _register

# Public name -> module. Nothing heavy is imported until a name is used.
_PUBLIC = {
    "TaskResConfig": "configuration_taskres",
    "TaskResClassifier": "residual",
    "TaskResCLIPForImageClassification": "modeling_taskres",
    "ClassifierPool": "pool",
    "TaskResForImageClassification": "vision.modeling",
    "TaskResForSequenceClassification": "language.modeling",
    "TaskResTrainer": "training",
    "TaskResTrainingArguments": "training",
    "sample_few_shot": "few_shot",
    "load_splits": "data",
    "load_training_data": "data",
    "TaskResError": "errors",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from .configuration_taskres import TaskResConfig as TaskResConfig
    from .data import load_splits as load_splits
    from .data import load_training_data as load_training_data
    from .errors import TaskResError as TaskResError
    from .few_shot import sample_few_shot as sample_few_shot
    from .language.modeling import TaskResForSequenceClassification as TaskResForSequenceClassification
    from .modeling_taskres import TaskResCLIPForImageClassification as TaskResCLIPForImageClassification
    from .pool import ClassifierPool as ClassifierPool
    from .residual import TaskResClassifier as TaskResClassifier
    from .training import TaskResTrainer as TaskResTrainer
    from .training import TaskResTrainingArguments as TaskResTrainingArguments
    from .vision.modeling import TaskResForImageClassification as TaskResForImageClassification


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
