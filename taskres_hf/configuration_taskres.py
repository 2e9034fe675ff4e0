"""`TaskResConfig`: what an artifact needs to know besides the residual."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from .errors import ConfigurationError
from .prompts import DEFAULT_TEMPLATE, class_prompts

FORMAT_VERSION = 1


class TaskResConfig(PreTrainedConfig):
    """Configuration of a `TaskResCLIPForImageClassification`.

    `id2label` and `label2id` are the only home of the classes; `class_names` reads them in label order.

    Args:
        base_model_name_or_path: Hub id or folder of the frozen dual encoder.
        base_model_revision: commit of the base on the Hub the residual was trained on; None for a folder.
        base_model_type: `model_type` of the base, such as `"clip"`.
        projection_dim: D, the length of an embedding.
        templates: prompt templates, each with one `{}`; empty when descriptions alone make the prompts.
        class_descriptions: sentences per class used as prompts (CuPL), or None.
        prompt_names: what stands in a prompt instead of a class name, or None.
        underscores: `"replace"` or `"keep"`, see `prompts.class_prompts`.
        prompt_average: `"raw"` (published) or `"normalized"`, see `base_classifier.base_embeddings`.
        alpha: scale of the residual (paper: 0.5).
        residual_side: `"text"` (published) or `"image"` (one shared residual on image embeddings).
        enhanced_base: how the base's shift was made (TaskRes*), or None for the regular base.
        logit_scale: factor on the cosine, exponentiated; logit_bias: constant on every logit.
        base_fingerprint: what the base classifier was made from, checked on loading.
        few_shot, training, metrics, data: how the residual came to be; shown by `taskres info` and the card.
        library_versions: versions of the packages that wrote the artifact.
        residual_sha256: checksum of the residual's bytes (integrity, not authenticity).
        format_version: version of the artifact's layout.

    Raises:
        ConfigurationError: a value of the wrong type or range.
    """

    model_type = "taskres"

    def __init__(
        self,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_type: str | None = None,
        projection_dim: int | None = None,
        templates: list[str] | None = None,
        class_descriptions: dict[str, list[str]] | None = None,
        prompt_names: dict[str, str] | None = None,
        underscores: str = "replace",
        prompt_average: str = "raw",
        alpha: float = 0.5,
        residual_side: str = "text",
        enhanced_base: dict[str, Any] | None = None,
        logit_scale: float | None = None,
        logit_bias: float = 0.0,
        base_fingerprint: dict[str, Any] | None = None,
        few_shot: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        library_versions: dict[str, str] | None = None,
        residual_sha256: str | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ConfigurationError(f"`alpha` must be a finite number; got {alpha!r}.")
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_type = base_model_type
        self.projection_dim = projection_dim
        self.templates = [DEFAULT_TEMPLATE] if templates is None else list(templates)
        self.class_descriptions = class_descriptions
        self.prompt_names = prompt_names
        self.underscores = underscores
        self.prompt_average = prompt_average
        self.alpha = float(alpha)
        self.residual_side = residual_side
        self.enhanced_base = enhanced_base
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.base_fingerprint = base_fingerprint
        self.few_shot = few_shot
        self.training = training
        self.metrics = metrics
        self.data = data
        self.library_versions = library_versions
        self.residual_sha256 = residual_sha256
        self.format_version = format_version
        super().__init__(**kwargs)

    @property
    def class_names(self) -> list[str]:
        """Class names in label order, K of them."""
        names = {int(index): name for index, name in (self.id2label or {}).items()}
        return [names[index] for index in sorted(names)]

    def class_prompts(self) -> list[list[str]]:
        """The prompts of each class, K lists."""
        return class_prompts(
            self.class_names,
            self.templates or None,
            underscores=self.underscores,
            descriptions=self.class_descriptions,
            prompt_names=self.prompt_names,
        )
