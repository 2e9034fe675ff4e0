"""What every method has in common, and the list of them.

A method sees the shots' embeddings and the base classifier, nothing else: no validation split and no test picture. What
a paper selects on such a split is selected here by cross-validation on the shots, or fixed; each file says which.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..data.labelled import LabelledImages
from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError
from ..residual import TaskResClassifier


@dataclass(frozen=True)
class Linear:
    """A linear classifier over unit-length image embeddings: logits = images @ weight.T + bias.

    Attributes:
        weight: [K, D], the logit scale included. bias: [K] or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] of image embeddings [N, D] of any length."""
        logits = F.normalize(image_embeds.to(self.weight), dim=-1) @ self.weight.T
        return logits if self.bias is None else logits + self.bias


@dataclass
class Fitted:
    """A fitted classifier and what fitting took.

    Attributes:
        logits: image embeddings [N, D] as the base gives them (or `embed`, where there is one) to logits [N, K].
        trained_parameters: how many numbers were fitted.
        linear: the same logits as a linear classifier, which can be saved as a residual; None where there is none.
        not_linear: why not, for people.
        selected: what was chosen, such as `{"C": 0.316}`.
        selected_on: `""` (nothing) or `"cross-validation on the shots"`.
        fit_seconds: wall seconds of `fit`, embedding not included.
        embed: pictures (`LabelledImages` or PIL pictures) to the embeddings [N, D] that `logits` takes, where fitting
            changed the image tower; None where those of the base are the ones.
    """

    logits: Callable[[Tensor], Tensor]
    trained_parameters: int
    linear: Linear | None = None
    not_linear: str = ""
    selected: dict[str, Any] = field(default_factory=dict)
    selected_on: str = ""
    fit_seconds: float = 0.0
    embed: Callable[[LabelledImages | Sequence[Any]], Tensor] | None = None

    @classmethod
    def of(cls, linear: Linear, trained_parameters: int, **facts: Any) -> Fitted:
        """A fitted classifier that is linear."""
        return cls(linear.logits, trained_parameters, linear, **facts)


class Method(ABC):
    """A few-shot method.

    Attributes:
        name: in tables, on the command line and in `results.csv`.
        title: for people. source: the paper. needs: what it needs besides embeddings: `"text tower"`, `"pictures"`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        """What `fit` does; a method that needs the pictures takes `images: LabelledImages | None = None` too."""

    def fit(
        self,
        features: ImageFeatures,
        classifier: TaskResClassifier,
        *,
        seed: int = 1,
        model: Any = None,
        images: LabelledImages | None = None,
    ) -> Fitted:
        """Fit on the shots.

        Args:
            features: embeddings [V, N, D] of N pictures in V views (view 0 alone where V is 1), and their labels [N].
            classifier: the zero-shot classifier: base `t` [K, D], logit scale and bias. It is not changed.
            seed: of whatever is drawn. model: the whole model, for methods that need its text tower or the pictures.
            images: the N pictures themselves, in the order of `features`, for methods that need them.

        Raises:
            ConfigurationError: pictures have several labels each, the method needs what was not given, or the pictures
                are not those of `features`.
        """
        classifier.check_has_text(f"The method {self.name}")
        if features.labels.ndim != 1:
            raise ConfigurationError(
                f"{self.name} gives one label per picture; these pictures have several each. Train with "
                "TaskResTrainer, on a model of problem_type='multi_label_classification'."
            )
        if self.needs and model is None:
            raise ConfigurationError(f"{self.name} needs the {' and the '.join(sorted(self.needs))}: pass model=.")
        pictures: dict[str, Any] = {}
        if "pictures" in self.needs:
            pictures["images"] = _checked_pictures(self.name, images, features)
        start = time.perf_counter()
        fitted = self._fit(features, classifier, seed, model, **pictures)
        fitted.fit_seconds = time.perf_counter() - start
        return fitted


def _checked_pictures(name: str, images: LabelledImages | None, features: ImageFeatures) -> LabelledImages:
    if images is None:
        raise ConfigurationError(f"{name} needs the pictures of the shots: pass images=, in the order of the features.")
    if images.labels != features.labels.tolist():
        raise ConfigurationError(
            f"The {len(images)} pictures of images= are not those of the {len(features)} embeddings, or in another "
            "order: their labels differ. Select the same rows of both."
        )
    return images


METHODS: dict[str, Callable[[], Method]] = {}


def register_method(name: str, make: Callable[[], Method]) -> None:
    """Make a method known to `compare` and the command line.

    Args:
        name: in tables and on the command line. make: gives a `Method`, such as its class.

    Raises:
        ConfigurationError: the name is taken by another.
    """
    if METHODS.get(name, make) is not make:
        raise ConfigurationError(f"There is a method called {name!r} already; choose another name.")
    METHODS[name] = make
