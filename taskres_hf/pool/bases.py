"""The base that the classifiers of a pool share, and heads that are read without loading a base again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..artifact import CLASS_BIAS, RESIDUAL, SHIFT, prompts_of
from ..base_classifier import (
    base_embeddings,
    cached_table_path,
    check_fingerprint,
    checked_tokens,
    fingerprint,
    image_sides_differ,
    image_sketch,
    read_table,
    same_base,
    write_table,
)
from ..base_model import check_weights, load_base_fp32, load_image_tower, torch_dtype, unrounded_text_side
from ..configuration_taskres import RECORDED
from ..encoders import BaseSource, base_name, load_image_processor, load_tokenizer, score_parameters
from ..errors import BaseMismatchError, ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import AS_PUBLISHED, TaskResClassifier
from ..storage import json_digest

_HINT = " Pass accept_base_mismatch"  # of `from_pretrained`, which a pool has not


def _image_side(base: PreTrainedModel) -> dict[str, Any] | None:
    """What tells its image tower from another, in whatever dtype it runs."""
    return image_sketch(base.state_dict(), str(base.dtype).removeprefix("torch."), base.config)


class PoolBase:
    """A base, its image processor, and what tells it from another.

    Args:
        model: the dual encoder; with or without its text tower. image_processor: its processor.
        source: where it came from: the prompts of classifiers are embedded with what lies there.
        score: its logit scale and bias, unrounded; read from the model by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        source: BaseSource,
        score: tuple[float, float] | None = None,
    ) -> None:
        self.model, self.image_processor, self.source = model, image_processor, source
        self.score = score or score_parameters(model)
        self._image = _image_side(model)
        self._processors: dict[str, bool] = {}  # digests of such as were compared
        self._text: tuple[Any, str, Any] | None = None

    @classmethod
    def of_model(cls, model: TaskResCLIPForImageClassification) -> PoolBase:
        """That of a classifier."""
        head, name = model.classifier, base_name(model.clip)
        source = model._base_source or BaseSource(name, getattr(model.clip.config, "_commit_hash", None))
        return cls(model.clip, model.image_processor, source, (head.logit_scale, head.logit_bias))

    @classmethod
    def load(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        dtype: Any,
        source: BaseSource,
        image_processor: Any = None,
        **options: Any,
    ) -> PoolBase:
        """That of a name or of a loaded dual encoder; of a name, without its text tower where that lies apart.

        Raises:
            BaseModelError: it is none that can be used. HubError: it cannot be downloaded.
        """
        score = None
        if isinstance(base, PreTrainedModel):
            check_weights(base, source.name)
            model, commit = base.eval().requires_grad_(False), getattr(base.config, "_commit_hash", None)
        else:
            attention = options.get("attn_implementation")
            light = None if set(options) - {"attn_implementation"} else load_image_tower(
                source, torch_dtype(dtype), attention
            )  # fmt: skip
            if light is not None:
                model, score, commit = light.base, light.score, getattr(light.base.config, "_commit_hash", None)
            else:
                model, commit, target = load_base_fp32(source, dtype, options)
                score = score_parameters(model)
                if model.dtype != target:
                    model.to(target)  # type: ignore[arg-type]
        source = replace(source, revision=commit or source.revision)
        return cls(model, image_processor or load_image_processor(source), source, score)

    @property
    def name(self) -> str:
        """Its Hub id or folder; empty where it has none."""
        return self.source.name

    def head(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        processor: Mapping[str, Any] | None,
        where: str,
        table: Tensor | None = None,
    ) -> TaskResClassifier:
        """The head of an artifact, after checking that it was made for this base.

        Args:
            values, tensors, processor: as `read_artifact` gives them. where: what to call it in messages.
            table: `t` [K, D] where it is at hand; it is held against the artifact's fingerprint.

        Raises:
            BaseMismatchError: it was made for another base. ConfigurationError: it prepares pictures otherwise.
        """
        try:
            self._check(values)
            table = self._table(values, table)
        except BaseMismatchError as error:
            reason = str(error).partition(_HINT)[0]
            raise BaseMismatchError(
                f"The classifier {where} was not made for the base of this pool, {self.name!r}. {reason}"
            ) from error
        self._check_processor(processor, where)
        head = TaskResClassifier(table, values["alpha"], *self.score, values.get("residual_side") or "text")
        with torch.no_grad():
            head.residual.copy_(tensors[RESIDUAL])
        head.shift, head.class_bias = tensors.get(SHIFT), tensors.get(CLASS_BIAS)
        head.facts |= {key: values[key] for key, plain in AS_PUBLISHED.items() if values.get(key, plain) != plain}
        head.facts |= {key: values[key] for key in RECORDED if values.get(key) is not None}
        names = values["id2label"]
        head.config = SimpleNamespace(  # a `TaskResConfig` takes longer than all the rest
            class_names=[names[str(index)] for index in range(len(names))],
            text_encoding=None,
            problem_type=values.get("problem_type"),
            base_model_name_or_path=values["base_model_name_or_path"],
            base_model_revision=values.get("base_model_revision"),
            residual_sha256=values.get("residual_sha256"),
        )
        return head

    def head_of(self, model: TaskResCLIPForImageClassification, where: str) -> TaskResClassifier:
        """That of a loaded classifier, after checking that its base is this one.

        Raises:
            BaseMismatchError, ConfigurationError: as in `head`.
        """
        if model.clip is not self.model:
            other = _image_side(model.clip)
            if not other or not self._image or image_sides_differ(self._image, other):
                raise BaseMismatchError(
                    f"The classifier {where} was not made for the base of this pool, {self.name!r}: the weights of its "
                    "image tower are others. Put it into a pool of its own."
                )
        if model.image_processor is not self.image_processor:
            self._same(model.image_processor, where)
        return model.classifier

    def _check(self, values: Mapping[str, Any]) -> None:
        stored = values["base_fingerprint"]
        if image_sides_differ(self._image, stored.get("image")):
            raise BaseMismatchError("The weights or settings of their image towers differ.")
        if not (stored.get("image") and self._image):  # then nothing but names tells
            ours = self.source.revision or getattr(self.model.config, "_commit_hash", None)
            theirs = values["base_model_name_or_path"], values.get("base_model_revision") or ours
            if theirs != (self.name, ours):
                raise BaseMismatchError(f"It names {theirs[0]!r} at {theirs[1]}; the pool's is at {ours}.")

    def _table(self, values: Mapping[str, Any], table: Tensor | None) -> Tensor:
        """`t` [K, D]: the one given, the one kept on this machine, or made by the text tower."""
        prompts, average = prompts_of(values), values.get("prompt_average") or "raw"
        stored = values["base_fingerprint"]
        for kept in (False, True):
            found = read_table(cached_table_path(self.source, prompts, average)) if kept else table
            if found is not None:
                now = fingerprint(found, prompts, average, self._image, self.score)
                if same_base(now, stored):
                    return found
                if now["prompts_sha256"] != stored.get("prompts_sha256") or now["shape"] != stored.get("shape"):
                    check_fingerprint(now, stored, self.name)  # before thousands of prompts are embedded
        if self._text is None:
            exact, dtype = unrounded_text_side(self.model, self.source)
            self._text = exact, dtype, load_tokenizer(self.source)
        exact, dtype, tokenizer = self._text
        tokens = checked_tokens(exact, tokenizer, prompts)
        made = base_embeddings(exact, tokenizer, prompts, average)
        check_fingerprint(
            fingerprint(made, prompts, average, self._image, self.score, dtype, tokens), stored, self.name
        )
        if dtype == "float32":
            write_table(cached_table_path(self.source, prompts, average), made)
        return made

    def forget_text_side(self) -> None:
        """Let go of what was loaded to embed prompts."""
        self._text = None

    def _check_processor(self, values: Mapping[str, Any] | None, where: str) -> None:
        digest = "" if values is None else json_digest(values)
        if digest not in self._processors:
            self._same(load_image_processor(self.source, values), where)
            self._processors[digest] = True

    def _same(self, processor: Any, where: str) -> None:
        if processor.to_json_string() != self.image_processor.to_json_string():
            raise ConfigurationError(
                f"The classifier {where} prepares pictures otherwise than the others of this pool: its image processor "
                "has other values. Put it into a pool of its own."
            )
