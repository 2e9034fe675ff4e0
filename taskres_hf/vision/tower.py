"""Image towers alone: a classifier of transformers' apart into embeddings and head; class names to the head's rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils.hub import extract_commit_hash

from ..base_classifier import PreparedBase, check_fingerprint, fingerprint, image_sketch
from ..base_model import advise_on_dtype, check_own_code, check_weights, from_files, torch_dtype
from ..encoders import FAMILIES, BaseSource, EncoderFamily, config_file, read_config
from ..errors import ArtifactError, BaseModelError
from .labels import CLASS_MEANS, HEAD, match_labels
from .linear_head import LENGTH, SCALE

_IMAGE_TOWERS = ("vision", "dinov3")  # in a `model_type` that is in transformers' table of models, not of classifiers


class Head(NamedTuple):
    """A pretrained head: weight [C, D] and bias [C] or None, fp32 on the CPU; labels, C of them."""

    weight: Tensor
    bias: Tensor | None
    labels: list[str]


class VisionTower(PreTrainedModel):
    """An image tower that gives embeddings [N, D]: what the head of its own classifier is given, or what it pools.

    Args:
        model: a model of images alone, which is left as it is. untrained: its head holds random numbers.

    Attributes:
        model: the same without its head, sharing all other weights. head: its pretrained head, or None.

    Raises:
        BaseModelError: no model of images alone, or one with several heads.
    """

    encoder_family = EncoderFamily()
    head: Head | None
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model: PreTrainedModel, untrained: bool = False) -> None:
        super().__init__(model.config)
        name = _head_of(model)
        self.model = model if name is None else _with(model, name.split("."), nn.Identity())
        # No part of the module: neither the tower's dtype nor its device is the head's.
        self.__dict__["head"] = None if name is None or untrained else _read_head(model, model.get_submodule(name))
        self.hf_device_map = getattr(model, "hf_device_map", None)

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

    def init_weights(self) -> None:
        """Nothing to do: the weights are there."""


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
    inner = "" if model.config.model_type == "timm_wrapper" else f"{model.base_model_prefix}."
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and not (inner and name.startswith(inner))
    ]
    if model.config.model_type == "timm_wrapper":
        last = getattr(model, "timm_model").get_classifier()  # noqa: B009 (no attribute that its class declares)
        found = [name for name in found if model.get_submodule(name) is last]
    if len(found) > 1:
        raise BaseModelError(
            f"{type(model).__name__} has {len(found)} heads ({', '.join(found)}), whose logits it brings together: no "
            "row of one linear classifier gives those. Give the variant with one head, or the bare model."
        )
    return found[0] if found else None


def _read_head(model: PreTrainedModel, layer: Any) -> Head:
    weight, bias = (None if one is None else one.detach().float().cpu() for one in (layer.weight, layer.bias))
    assert weight is not None
    labels = {int(number): str(label) for number, label in (model.config.id2label or {}).items()}
    return Head(weight, bias, [labels.get(number, f"LABEL_{number}") for number in range(len(weight))])


def _with(module: Any, path: Sequence[str], leaf: nn.Module) -> Any:
    """A copy that shares all but one submodule, and leaves the original as it is."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._modules[path[0]] = leaf if len(path) == 1 else _with(module._modules[path[0]], path[1:], leaf)
    return clone


# ---------------------------------------------------------------------- loading


def load_tower(source: BaseSource, dtype: Any, options: Mapping[str, Any]) -> tuple[VisionTower, str | None]:
    """An image tower, frozen and in eval mode, in fp32 unless placed or quantised, and the commit it came from.

    Raises:
        BaseModelError: no model of images alone (found before any weight is read), or its weights are not whole.
        HubError: not found, not to be read or not reachable.
    """
    path = config_file(source)
    commit = None if os.path.isdir(source.name) else extract_commit_hash(path, None)
    config = read_config(source, path)
    if "auto_map" in config:
        check_own_code(source)
    seen: list[str] = []

    def check(found: Any) -> None:
        seen.append(found.model_type)
        check_is_tower(found.model_type, source.name, code="auto_map" in config)

    kind = "timm_wrapper" if _of_timm(config) else config.get("model_type")
    headless = kind == "timm_wrapper" and _classes_of_timm(config) == 0
    auto: Any = AutoModelForImageClassification if kind in CLASSIFIERS and not headless else AutoModel
    placed = "device_map" in options or "quantization_config" in options
    first = dtype if placed else torch.float32
    model, missing = from_files(source, commit, auto, first, options, check)
    name = _head_of(model)
    lost = [key for key in missing if name is None or not key.startswith(f"{name}.")]
    if lost:
        raise BaseModelError(
            f"The base model {source.name!r} lacks {len(lost)} weights, such as {lost[0]}: transformers would fill "
            "them with random numbers. Give a whole checkpoint."
        )
    tower = VisionTower(model, untrained=bool(missing))
    check_weights(tower, source.name)
    return frozen(tower), commit


def frozen(tower: VisionTower) -> VisionTower:
    """In eval mode, without gradients."""
    tower.train(False)
    tower.requires_grad_(False)
    return tower


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


# ---------------------------------------------------------------------- a base ready to classify


def head_rows(tower: VisionTower, config: Any) -> tuple[Tensor, Tensor | None]:
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


@torch.no_grad()
def embedding_length(tower: VisionTower) -> int:
    """D: of the head, or of what a black picture gives."""
    if tower.head is not None:
        return int(tower.head.weight.shape[1])
    size = getattr(tower.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    device, channels = next(tower.parameters()).device, getattr(tower.config, "num_channels", 3)
    pixels = torch.zeros(1, channels, height, width, device=device, dtype=tower.dtype)
    return int(tower.get_image_features(pixels).pooler_output.shape[1])


def tower_fingerprint(tower: VisionTower, config: Any, table: Tensor) -> dict[str, Any]:
    """What the base classifier was made from, as `base_classifier.fingerprint`; the head's own rows are in it too."""
    weights = dict(tower.state_dict())
    if tower.head is not None and config.base_classifier == HEAD:
        weights |= {"head.weight": tower.head.weight}
        weights |= {} if tower.head.bias is None else {"head.bias": tower.head.bias}
    image = image_sketch(weights, str(tower.dtype).removeprefix("torch."))
    scale = 1.0 if config.base_classifier == HEAD else SCALE / LENGTH
    return fingerprint(table, config.class_prompts(), config.prompt_average, image, (scale, 0.0))


def prepared(
    tower: VisionTower, config: Any, source: BaseSource, dtype: torch.dtype | None, stored: Any = None
) -> PreparedBase:
    """A tower ready to classify, in the dtype it will run in, and what tells it from another.

    Args:
        dtype: to convert it to; None to leave it. stored: a fingerprint that it must have, or None.

    Raises:
        BaseMismatchError: it has another.
    """
    table, _ = head_rows(tower, config)
    now = tower_fingerprint(tower, config, table)
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


def target_dtype(tower: VisionTower, dtype: Any, options: Mapping[str, Any]) -> torch.dtype | None:
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
