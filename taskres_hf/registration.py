"""Make transformers' Auto classes and `pipeline` know TaskRes models, without importing transformers early.

`import taskres_hf` must stay light and yet be enough for `pipeline("image-classification", model=ARTIFACT)`. So the
classes are registered right after transformers' own registries have been imported, or at once if they already were.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_taskres import TaskResConfig

    AutoConfig.register(TaskResConfig.model_type, TaskResConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    from . import (
        TaskResCLIPForImageClassification,
        TaskResConfig,
        TaskResForImageClassification,
        TaskResForSequenceClassification,
    )

    # Its `from_pretrained` gives the class that a saved classifier is of. Two classes of one config, which transformers
    # knows too, break `pipeline` in transformers 5.2; so the other stands under a config that no file names, and only
    # tells `pipeline` that its models are for images.
    AutoModelForImageClassification.register(TaskResConfig, TaskResCLIPForImageClassification, exist_ok=True)
    mapping: Any = AutoModelForImageClassification._model_mapping
    mapping.register(type("_OtherTaskResConfig", (TaskResConfig,), {}), TaskResForImageClassification, exist_ok=True)
    AutoModelForSequenceClassification.register(TaskResConfig, TaskResForSequenceClassification, exist_ok=True)


def _register_tokenizer() -> None:
    from transformers import AutoTokenizer

    from .language.modeling import TaskResTokenizer

    AutoTokenizer.register(TaskResTokenizer.config_class, TaskResTokenizer, exist_ok=True)


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}
_READY: set[str] = set()  # registries that have been executed


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs each action once, right after the module it waits for, but never while a module of ours is half imported."""

    depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.startswith(f"{__package__}.")
        if not ours and fullname not in _ACTIONS:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in finders if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            self.depth += ours
            try:
                execute(module)
            finally:
                self.depth -= ours
            if not ours:
                _READY.add(fullname)
            if self.depth == 0:
                _run_ready()

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec


def _run_ready() -> None:
    for name in list(_READY):
        action = _ACTIONS.pop(name, None)  # popped first: an action imports our modules, which end up here again
        if action is not None:
            action()


def register() -> None:
    """Register now what can be, and the rest when transformers gets there."""
    _READY.update(name for name in _ACTIONS if name in sys.modules)
    _run_ready()
    if _ACTIONS and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
