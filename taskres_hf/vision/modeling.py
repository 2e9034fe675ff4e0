"""`TaskResForImageClassification`: a task residual over an image tower alone, on its head's rows or on class means."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..alone.labels import CLASS_MEANS, HEAD, choose_labels
from ..alone.linear_head import LinearHead
from ..alone.towers import head_rows, located, prepared, target_dtype
from ..base_classifier import PreparedBase
from ..configuration_taskres import TaskResConfig
from ..encoders import BaseSource
from ..errors import ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from .tower import VisionTower, as_tower, embedding_length, load_tower, made_of


def _base_for_artifact(
    config: TaskResConfig,
    source: BaseSource,
    shared: PreTrainedModel | None,
    dtype: Any,
    options: Mapping[str, Any],
    *,
    text_tower: bool = False,
    accept_mismatch: bool = False,
) -> PreparedBase:
    """As `base_classifier.base_for_artifact`, of an image tower alone: of text there is nothing to load."""
    tower, commit = (as_tower(shared), None) if shared is not None else load_tower(source, dtype, options)
    target = None if shared is not None else target_dtype(tower, dtype, options)
    stored = None if accept_mismatch else config.base_fingerprint or {}
    return prepared(tower, config, located(source, shared, commit), made_of(tower, config), target, stored)


class TaskResForImageClassification(TaskResCLIPForImageClassification):
    """Image classifier over a frozen image tower: ViT, DINOv2, ConvNeXt, ResNet, Swin and the like.

    Where the tower comes with a head that knows the classes by name, the residual is added to those rows; with a zero
    residual the logits are the model's own, bit for bit. Elsewhere it knows nothing before it has seen pictures.
    Everything that reads text (templates, descriptions, adding classes by name) is refused.

    Attributes:
        clip, backbone: the base, a `vision.tower.VisionTower`; frozen, always in eval mode.
        classifier: the head, a `alone.linear_head.LinearHead`.
    """

    _head_class, _base_for_artifact = LinearHead, staticmethod(_base_for_artifact)
    clip: VisionTower
    classifier: LinearHead

    def __init__(
        self, config: TaskResConfig, base: PreTrainedModel | None = None, base_classifier: Tensor | None = None
    ) -> None:
        super().__init__(config, base, base_classifier)
        self.classifier.base_bias = head_rows(self.clip, config)[1]

    @classmethod
    def from_base(  # type: ignore[override]
        cls,
        base_model: str | os.PathLike[str] | PreTrainedModel,
        class_names: Sequence[str] | Mapping[Any, Any] | Any,
        alpha: float = 0.5,
        *,
        base_classifier: str | None = None,
        prompt_names: Mapping[str, str] | None = None,
        text_encoder: str | PreTrainedModel | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        image_processor: Any = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> TaskResForImageClassification:
        """A classifier ready to be trained; over a pretrained head that knows the classes, also to be used.

        Args:
            base_model: Hub id or folder of what `AutoModelForImageClassification` or `AutoModel` loads, with pooled
                features; or such a model already loaded, which is left as it is.
            class_names: K names in label order, or a `datasets.ClassLabel`. Matched to the head's labels by name, else
                by name without case, underscores and hyphens, else to one of a label's synonyms between commas.
            alpha: scale of the residual (paper: 0.5).
            base_classifier: `"head"`, `"class_means"`, or None: the head if it knows all classes, else class means of
                the shots, with a warning if it knows some.
            prompt_names: the head's label for classes that are called otherwise, {"my cat": "tabby, tabby cat"}.
            text_encoder: Hub id or folder of a dual encoder (or one loaded), whose text tower finds the nearest label
                for the classes without one. It is not needed again.
            revision, dtype, image_processor, trust_remote_code, kwargs: see `TaskResCLIPForImageClassification`.

        Raises:
            ClassNamesError: the head is asked for and lacks a class, or two classes are one label.
            ConfigurationError: a head is asked for where there is none, or an argument that text alone makes use of.
            BaseModelError: the base is a dual encoder, has several heads, or its weights are not whole.
            HubError: the base is not found on the Hub or not to be read; says what to do.
        """
        of_text = sorted(set(kwargs) & set(_OF_TEXT))
        if of_text:
            raise ConfigurationError(
                f"{', '.join(of_text)}: over an image tower alone no text is read. Leave it out, or use "
                "TaskResCLIPForImageClassification with a dual encoder."
            )
        if kwargs.pop("problem_type", None) not in (None, "single_label_classification"):
            raise ConfigurationError("Over an image tower alone a picture has one label: leave problem_type out.")
        config = TaskResConfig.for_classes(
            class_names, "{}", prompt_names=prompt_names, alpha=alpha, underscores="keep", base_classifier=HEAD
        )
        config.class_prompts()  # names in `prompt_names` that are no class

        def make(loaded: Any, source: BaseSource, dtype: Any, options: Mapping[str, Any]) -> PreparedBase:
            tower, commit = (loaded, None) if loaded is not None else load_tower(source, dtype, options)
            known = tower.head and tower.head.labels
            words = choose_labels(config.class_names, prompt_names or {}, known, base_classifier, text_encoder)
            config.base_classifier = CLASS_MEANS if words is None else HEAD
            if words is not None:
                config.prompt_names = {name: word for name, word in words.items() if name != word} or None
            config.projection_dim = embedding_length(tower)
            target = None if loaded is not None else target_dtype(tower, dtype, options)
            return prepared(tower, config, located(source, loaded, commit), made_of(tower, config), target)

        base: Any = as_tower(base_model) if isinstance(base_model, PreTrainedModel) else base_model
        made: TaskResForImageClassification = cls._on_base(
            config, make, base, revision, dtype, trust_remote_code, kwargs
        )
        made._image_processor = image_processor
        return made

    @classmethod
    def from_pretrained(
        cls, *args: Any, base_model: str | os.PathLike[str] | PreTrainedModel | None = None, **kwargs: Any
    ) -> Any:
        """As in `TaskResCLIPForImageClassification`; a loaded `base_model` is one of images alone.

        Raises:
            ConfigurationError: the classifier is over a dual encoder.
        """
        base: Any = as_tower(base_model) if isinstance(base_model, PreTrainedModel) else base_model
        return super().from_pretrained(*args, base_model=base, **kwargs)

    @property
    def backbone(self) -> VisionTower:
        """The frozen image tower."""
        return self.clip

    def base_again(self) -> tuple[Tensor, dict[str, Any]]:
        """The base classifier [K, D] made anew, and its fingerprint."""
        return made_of(self.clip, self.config)

    @property
    def tokenizer(self) -> NoReturn:
        raise ConfigurationError("The classifier is over an image tower alone, which reads no text: no tokenizer.")

    def save_pretrained(self, *args: Any, include_code: bool = False, **kwargs: Any) -> None:
        """As in `TaskResCLIPForImageClassification`; `include_code` is not to be had."""
        _refuse_code(include_code)
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self, *args: Any, include_code: bool = False, **kwargs: Any
    ) -> Any:
        """As in `TaskResCLIPForImageClassification`; `include_code` is not to be had."""
        _refuse_code(include_code)
        return super().push_to_hub(*args, **kwargs)


_OF_TEXT = (
    "templates", "class_descriptions", "underscores", "prompt_average", "residual_side", "tokenizer",
)  # fmt: skip


def _refuse_code(include_code: bool) -> None:
    if include_code:
        raise ConfigurationError(
            "The module that include_code adds is for dual encoders: without the library a classifier over an image "
            "tower alone cannot be loaded."
        )
