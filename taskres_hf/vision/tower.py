"""Image towers alone: what is one, and a classifier of transformers' as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ..alone.towers import Tower, frozen, head_rows, linear_layers, load_model, refuse_lost, tower_fingerprint
from ..base_model import check_weights
from ..encoders import FAMILIES, BaseSource, config_file, picture_size, read_config
from ..errors import BaseModelError

_IMAGE_TOWERS = ("vision", "dinov3")  # in a `model_type` that is in transformers' table of models, not of classifiers


class VisionTower(Tower):
    """An image tower that gives embeddings [N, D]: what the head of its own classifier is given, or what it pools.

    Args:
        model: a model of images alone, which is left as it is. untrained: its head holds random numbers.

    Attributes:
        model: the same without its head, sharing all other weights. head: its pretrained head, or None.

    Raises:
        BaseModelError: no model of images alone, or one with several heads.
    """

    main_input_name = "pixel_values"

    def __init__(self, model: PreTrainedModel, untrained: bool = False) -> None:
        super().__init__(model.config)
        self._take(model, _head_of(model), untrained)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """What the model returns, with the embeddings [N, D] as `pooler_output`."""
        output = self.model(pixel_values=pixel_values, **kwargs)
        found = output.logits if "logits" in output else output.get("pooler_output")
        if found is not None and found.ndim == 4 and found.shape[2:] == (1, 1):
            found = found.flatten(1)
        if found is None or found.ndim != 2:
            raise BaseModelError(
                f"{type(self.model).__name__} gives no single embedding for a picture, so there is nothing to put a "
                "linear classifier on. Give a model that pools."
            )
        output["pooler_output"] = found
        return output


def is_image_tower(model_type: str | None) -> bool:
    """Whether transformers knows a `model_type` as a model of images alone."""
    if model_type in FAMILIES:
        return False
    alone = any(part in str(model_type) for part in _IMAGE_TOWERS) and model_type in MODEL_MAPPING_NAMES
    return model_type in CLASSIFIERS or alone


def is_image_tower_at(source: BaseSource) -> bool:
    """The same of a Hub id or folder, by its config.json alone."""
    config = read_config(source, config_file(source))
    return is_image_tower(config.get("model_type")) or _of_timm(config)


def _of_timm(config: Mapping[str, Any]) -> bool:
    return "model_type" not in config and "architecture" in config and "pretrained_cfg" in config


def _classes_of_timm(config: Mapping[str, Any]) -> Any:
    """How many classes the head of a timm model has, 0 where there is none; as timm or transformers saved it."""
    return config.get("num_classes", (config.get("pretrained_cfg") or {}).get("num_classes"))


def _head_of(model: PreTrainedModel) -> str | None:
    """The name of the linear layer that a classifier ends with; None where it has none."""
    if "ForImageClassification" not in type(model).__name__:
        return None
    inner = "" if model.config.model_type == "timm_wrapper" else model.base_model_prefix
    found = linear_layers(model, inner)
    if model.config.model_type == "timm_wrapper":
        last = getattr(model, "timm_model").get_classifier()  # noqa: B009 (no attribute that its class declares)
        found = [name for name in found if model.get_submodule(name) is last]
    if len(found) > 1:
        raise BaseModelError(
            f"{type(model).__name__} has {len(found)} heads ({', '.join(found)}), whose logits it brings together: no "
            "row of one linear classifier gives those. Give the variant with one head, or the bare model."
        )
    return found[0] if found else None


# ---------------------------------------------------------------------- loading


def load_tower(source: BaseSource, dtype: Any, options: Mapping[str, Any]) -> tuple[VisionTower, str | None]:
    """An image tower, frozen and in eval mode, in fp32 unless placed or quantised, and the commit it came from.

    Raises:
        BaseModelError: no model of images alone (found before any weight is read), or its weights are not whole.
        HubError: not found, not to be read or not reachable.
    """

    def choose(config: Mapping[str, Any]) -> Any:
        kind = "timm_wrapper" if _of_timm(config) else config.get("model_type")
        headless = kind == "timm_wrapper" and _classes_of_timm(config) == 0
        return AutoModelForImageClassification if kind in CLASSIFIERS and not headless else AutoModel

    def check(model_type: str, code: bool) -> None:
        check_is_tower(model_type, source.name, code)

    model, missing, commit = load_model(source, dtype, options, choose, check)
    name = _head_of(model)
    refuse_lost(source, [key for key in missing if name is None or not key.startswith(f"{name}.")])
    tower = VisionTower(model, untrained=bool(missing))
    check_weights(tower, source.name)
    return frozen(tower), commit


def check_is_tower(model_type: str, name: str, code: bool = False) -> None:
    """Refuse a model that is none of images alone.

    Raises:
        BaseModelError: says what to use instead.
    """
    if is_image_tower(model_type) or (code and model_type not in FAMILIES):
        return
    advice = "Give a model that AutoModelForImageClassification loads, such as facebook/dinov2-small."
    if model_type in FAMILIES:
        advice = "It reads text too: use TaskResCLIPForImageClassification, whose classes need no pictures to begin."
    if model_type == "taskres":
        advice = "It is a saved TaskRes classifier: load it with from_pretrained."
    raise BaseModelError(f"The base model {name!r} is no image tower alone (model_type {model_type!r}). {advice}")


def as_tower(base_model: PreTrainedModel) -> VisionTower:
    """A loaded model as a tower.

    Raises:
        BaseModelError: no model of images alone.
    """
    if isinstance(base_model, VisionTower):
        return base_model
    check_is_tower(base_model.config.model_type, str(base_model.config._name_or_path))
    return frozen(VisionTower(base_model))


@torch.no_grad()
def embedding_length(tower: VisionTower) -> int:
    """D: of the head, or of what a black picture gives."""
    if tower.head is not None:
        return int(tower.head.weight.shape[1])
    height, width = picture_size(tower)
    device, channels = next(tower.parameters()).device, getattr(tower.config, "num_channels", 3)
    pixels = torch.zeros(1, channels, height, width, device=device, dtype=tower.dtype)
    return int(tower.get_image_features(pixels).pooler_output.shape[1])


def made_of(tower: VisionTower, config: Any) -> tuple[Tensor, dict[str, Any]]:
    """The base classifier [K, D] of a config's classes, and its fingerprint."""
    table, _ = head_rows(tower, config)
    return table, tower_fingerprint(tower, config, table)
