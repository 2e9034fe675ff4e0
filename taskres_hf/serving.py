"""Head and config as one: which classifier a thread's latest answer came from.

`use_classifier` may exchange the head while other threads classify. The config is the head's, so both change in one
step. A thread that holds an answer (its logits) goes on seeing the config that belongs to it, so names are those of the
head that gave the logits; everybody else sees the config of the head that serves now.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base_classifier import check_same_bases
from .residual import TaskResClassifier

_LATEST = threading.local()
_Output = TypeVar("_Output")


def forget_answer() -> None:
    """This thread has exchanged the classifier itself, and sees the new one at once."""
    _LATEST.answer = None


def _of_answer(model: Any) -> Any:
    """The config that this thread's latest answer belongs to; None where it holds none of this model."""
    answer = getattr(_LATEST, "answer", None)
    if answer is None or answer[0]() is not model or answer[1]() is None:
        return None
    return answer[2]


class ServedConfig:
    """The attribute `config` of a model whose head brings its own, and the exchange of both."""

    classifier: TaskResClassifier
    _modules: Any
    _config: Any = None

    @property
    def config(self) -> Any:
        """The config of the head that serves; of the one that gave them, in a thread that holds logits."""
        head = self._modules.get("classifier")
        return _of_answer(self) or getattr(head, "config", None) or self._config

    @config.setter
    def config(self, value: Any) -> None:
        self._config = value
        if "classifier" in self._modules:
            self._modules["classifier"].config = value

    def _answer(
        self,
        kind: Callable[..., _Output],
        embeds: Tensor,
        loss_of: tuple[Any, Any],
        features: Any,
        kept: Any,
        as_dict: Any,
    ) -> _Output | tuple[Tensor, ...]:
        """What `forward` returns for embeddings [N, D]: an output of a `kind`, or a tuple.

        Args:
            loss_of: labels, None for no loss, and what the loss is divided by. features: what the base returned.
            kept: by name, which of its parts are passed on. as_dict: False for a tuple, None as the config says.
        """
        head = self.classifier
        logits = head(embeds)
        if not torch.compiler.is_compiling():
            _LATEST.answer = weakref.ref(self), weakref.ref(logits), getattr(head, "config", None)
        loss = None if loss_of[0] is None else head.loss(logits, *loss_of)
        parts = {name: getattr(features, name, None) for name, wanted in kept.items() if wanted}
        output: Any = kind(loss=loss, logits=logits, **parts)
        as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
        return output if as_dict else output.to_tuple()  # type: ignore[no-any-return]

    def use_classifier(self, other: Any) -> None:
        """Serve another task over the same backbone: its head and config take the place of these, in one step.

        A thread that holds logits sees config and class names of the head they are from, until it drops them.

        Args:
            other: another `TaskResCLIPForImageClassification`.

        Raises:
            ConfigurationError: the other model was made for another base.
        """
        check_same_bases(self.config, other.config)
        forget_answer()
        self._config, self.classifier = other.config, other.classifier
