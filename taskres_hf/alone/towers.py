"""One tower alone: a classifier of transformers' apart into embeddings and head, loaded whole and told from others."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from ..base_classifier import PreparedBase, check_fingerprint, fingerprint, image_sketch
from ..base_model import advise_on_dtype, check_own_code, from_files, torch_dtype
from ..encoders import BaseSource, EncoderFamily, config_file, read_config
from ..errors import ArtifactError, BaseModelError
from .labels import CLASS_MEANS, HEAD, match_labels
from .linear_head import LENGTH, SCALE

_Tower = TypeVar("_Tower", bound="Tower")


class Head(NamedTuple):
    """A pretrained head: weight [C, D] and bias [C] or None, fp32 on the CPU; labels, C of them."""

    weight: Tensor
    bias: Tensor | None
    labels: list[str]


class Tower(PreTrainedModel):
    """A frozen model that gives embeddings [N, D].

    Attributes:
        model: without its head, sharing all other weights with what was given. head: its pretrained head, or None.
    """

    encoder_family = EncoderFamily()
    head: Head | None
    model: Any
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def _take(self, model: PreTrainedModel, name: str | None, untrained: bool) -> None:
        """Take a model over without the linear layer `name`, which is the head unless it holds random numbers."""
        self.model = model if name is None else without(model, name)
        # No part of the module: neither the tower's dtype nor its device is the head's.
        self.__dict__["head"] = None if name is None or untrained else read_head(model, name)
        self.hf_device_map = getattr(model, "hf_device_map", None)

    def init_weights(self) -> None:
        """Nothing to do: the weights are there."""


def linear_layers(model: PreTrainedModel, inner: str) -> list[str]:
    """Names of the linear layers outside the submodule `inner` that give as many numbers as the model has labels."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and not (inner and name.startswith(f"{inner}."))
    ]


def read_head(model: PreTrainedModel, name: str) -> Head:
    """The head that the linear layer `name` of a classifier is."""
    layer: Any = model.get_submodule(name)
    weight, bias = (None if one is None else one.detach().float().cpu() for one in (layer.weight, layer.bias))
    assert weight is not None
    labels = {int(number): str(label) for number, label in (model.config.id2label or {}).items()}
    return Head(weight, bias, [labels.get(number, f"LABEL_{number}") for number in range(len(weight))])


def without(model: Any, name: str) -> Any:
    """A copy that shares all but the submodule `name`, which passes on what it is given; the original stays."""
    return _with(model, name.split("."), nn.Identity())


def _with(module: Any, path: Sequence[str], leaf: nn.Module) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._modules[path[0]] = leaf if len(path) == 1 else _with(module._modules[path[0]], path[1:], leaf)
    return clone


# ---------------------------------------------------------------------- loading


def load_model(
    source: BaseSource,
    dtype: Any,
    options: Mapping[str, Any],
    choose: Callable[[Mapping[str, Any]], Any],
    check: Callable[[str, bool], None],
) -> tuple[PreTrainedModel, list[str], str | None]:
    """A model in fp32 unless placed or quantised, the weights that its files lack, and the commit it came from.

    Args:
        choose: gives the Auto class for a config.json. check: refuses a `model_type`; told whether it has own code.

    Raises:
        BaseModelError: what `check` refuses (before any weight is read), or its weights are not whole.
        HubError: not found, not to be read or not reachable.
    """
    path = config_file(source)
    commit = None if os.path.isdir(source.name) else extract_commit_hash(path, None)
    config = read_config(source, path)
    if "auto_map" in config:
        check_own_code(source)
    placed = "device_map" in options or "quantization_config" in options
    model, missing = from_files(
        source, commit, choose(config), dtype if placed else torch.float32, options,
        lambda found: check(found.model_type, "auto_map" in config),
    )  # fmt: skip
    return model, missing, commit


def refuse_lost(source: BaseSource, lost: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights, which transformers fills with random numbers.

    Raises:
        BaseModelError: names the first.
    """
    if lost:
        raise BaseModelError(
            f"The base model {source.name!r} lacks {len(lost)} weights, such as {lost[0]}: transformers would fill "
            "them with random numbers. Give a whole checkpoint."
        )


def frozen(tower: _Tower) -> _Tower:
    """In eval mode, without gradients."""
    tower.train(False)
    tower.requires_grad_(False)
    return tower


def target_dtype(tower: Tower, dtype: Any, options: Mapping[str, Any]) -> torch.dtype | None:
    """What a tower loaded here will run in; None to leave it as it is."""
    if "device_map" in options or "quantization_config" in options:
        return None
    stored = getattr(tower.config, "dtype", None)
    return torch_dtype(stored or torch.float32 if dtype == "auto" else dtype)


def located(source: BaseSource, base_model: PreTrainedModel | None, commit: str | None) -> BaseSource:
    """A source at the commit that was loaded."""
    if base_model is None:
        return replace(source, revision=commit)
    return replace(source, revision=getattr(base_model.config, "_commit_hash", None) or source.commit())


# ---------------------------------------------------------------------- a base ready to classify


def head_rows(tower: Tower, config: Any) -> tuple[Tensor, Tensor | None]:
    """Rows [K, D] and bias [K] of a config's classes; zeros, without a bias, where class means take their place.

    Raises:
        BaseModelError: the base has no head, or none with these labels.
    """
    words = [group[0] for group in config.class_prompts()]
    if config.base_classifier == CLASS_MEANS:
        return torch.zeros(len(words), config.projection_dim), None
    if tower.head is None:
        raise BaseModelError("The classifier is made on a pretrained head, and the base given has none.")
    places = match_labels(words, tower.head.labels)
    if None in places:
        raise BaseModelError(f"The base's head has no label {words[places.index(None)]!r}: it is another base.")
    rows = torch.tensor(places)
    return tower.head.weight[rows], None if tower.head.bias is None else tower.head.bias[rows]


def tower_fingerprint(
    tower: Tower, config: Any, table: Tensor, scale: float = SCALE / LENGTH, tokens: str | None = None
) -> dict[str, Any]:
    """What the base classifier was made from, as `base_classifier.fingerprint`; the head's own rows are in it too.

    Args:
        scale: of the logits, where no pretrained head says it. tokens: a digest of the prompts' tokens.
    """
    weights, dtype = dict(tower.state_dict()), str(tower.dtype).removeprefix("torch.")
    if tower.head is not None and config.base_classifier == HEAD:
        weights |= {"head.weight": tower.head.weight}
        weights |= {} if tower.head.bias is None else {"head.bias": tower.head.bias}
    score = (1.0 if config.base_classifier == HEAD else scale, 0.0)
    image = image_sketch(weights, dtype, tower.config)
    of_table = "float32" if tokens is None else dtype  # rows of a head or zeros are not rounded
    return fingerprint(table, config.class_prompts(), config.prompt_average, image, score, of_table, tokens)


def prepared(
    tower: Tower,
    config: Any,
    source: BaseSource,
    made: tuple[Tensor, dict[str, Any]],
    dtype: torch.dtype | None,
    stored: Any = None,
) -> PreparedBase:
    """A tower ready to classify, in the dtype it will run in, and what tells it from another.

    Args:
        made: the base classifier [K, D] and its fingerprint.
        dtype: to convert the tower to; None to leave it. stored: a fingerprint that it must have, or None.

    Raises:
        BaseMismatchError: it has another.
    """
    table, now = made
    if stored is not None:
        check_fingerprint(now, stored, source.name)
    if table.shape[1] != config.projection_dim:
        raise ArtifactError(
            f"The residual is for embeddings of length {config.projection_dim}, the base {source.name!r} gives "
            f"{table.shape[1]}: they can never fit. Choose a base with the same embedding size."
        )
    if dtype is not None and tower.dtype != dtype:
        tower.to(dtype)  # type: ignore[arg-type]
    advise_on_dtype(tower)
    return PreparedBase(tower, table, now, source)
