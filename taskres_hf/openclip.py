"""Models of open_clip as base models: its own files read by open_clip itself, without any pickle.

A folder or Hub repository with open_clip_config.json, and no config.json of transformers' beside it, is one: CLIP, CoCa
(both towers, without its decoder), SigLIP, MobileCLIP, EVA and what else open_clip builds. How it and timm prepare
pictures is said by image processors of transformers, which can be saved and need neither package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_torchvision_available

from .errors import BaseModelError, MissingExtraError

CONFIG_FILE = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
_TOKENIZER_FILES = (
    *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
# What a config may say to a tokenizer: others, such as trust_remote_code, are not a repository's to decide.
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of CLIP, open_clip's default
_CONVERT = (
    "If you trust it, convert it once: safetensors.torch.save_file(open_clip.create_model('local-dir:FOLDER')"
    ".state_dict(), 'FOLDER/open_clip_model.safetensors'), and give that folder."
)


def need_open_clip() -> Any:
    """The package open_clip.

    Raises:
        MissingExtraError: it is not installed, or does not import.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError, OSError) as error:  # torchvision of another torch raises a RuntimeError
        raise MissingExtraError(
            "The base model is an open_clip checkpoint, which needs the package open_clip: pip install "
            f'"taskres_hf[open_clip]", with a torchvision that fits your torch ({" ".join(str(error).split()):.150}). '
            "Or take the same model in transformers' format; many have one on the Hub."
        ) from error
    return open_clip


def plain_name(name: str) -> str:
    """A Hub id or folder as open_clip's users write it, without `hf-hub:` or `local-dir:`.

    Raises:
        BaseModelError: the name and tag of a checkpoint, which are no place.
    """
    if name.startswith("open_clip:"):
        raise BaseModelError(
            f"{name!r} is no Hub id: give the repository that open_clip has for it, "
            "open_clip.get_pretrained_cfg(NAME, TAG)['hf_hub'], such as hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K."
        )
    return name.removeprefix("hf-hub:").removeprefix("local-dir:")


def open_clip_config(source: Any, path: str | None) -> str | None:
    """The open_clip_config.json of a `BaseSource` that is to be read by open_clip; None where it is another model.

    Args:
        path: its config.json, or None. Of transformers' it comes first.
    """
    if path is not None:
        try:
            if "model_type" in json.loads(Path(path).read_text("utf-8")):
                return None
        except (ValueError, OSError, TypeError):
            return None  # damaged, as whoever reads it will say
    found: str | None = source.file(CONFIG_FILE)
    return found


def _settings(source: Any) -> dict[str, Any]:
    """`model_cfg` and `preprocess_cfg`, checked as far as they are used here.

    Raises:
        BaseModelError: damaged.
    """
    try:
        values = json.loads(Path(source.file(CONFIG_FILE)).read_text("utf-8"))
        found = {"preprocess_cfg": {}, **values}
        if not all(isinstance(found["model_cfg"][key], dict) for key in ("vision_cfg", "text_cfg")):
            raise ValueError("vision_cfg and text_cfg must be objects")
        if not isinstance(found["preprocess_cfg"], dict):
            raise ValueError("preprocess_cfg must be an object")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BaseModelError(
            f"The {CONFIG_FILE} of the base model {source.name!r} is damaged ({error!s:.100}): it must hold model_cfg "
            "with vision_cfg and text_cfg, as open_clip writes it."
        ) from error
    return found


# ---------------------------------------------------------------------- the model


class OpenCLIPConfig(PreTrainedConfig):
    """What is asked of a base's config, of a model of open_clip."""

    model_type = "open_clip"


class OpenCLIPModel(PreTrainedModel):
    """A model of open_clip with transformers' methods.

    Args:
        config: its sizes. model: `CustomTextCLIP` or `CoCa`, whose two towers and score are taken.
    """

    config_class = OpenCLIPConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: OpenCLIPConfig, model: Any) -> None:
        super().__init__(config)
        self.vision_model, self.text_model = model.visual, model.text
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))
        bias = model.logit_bias
        self.logit_bias = nn.Parameter(torch.zeros(()) if bias is None else bias.detach().reshape(()))

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Image embeddings [N, D], projected and not normalised."""
        return _first(self.vision_model(pixel_values))

    def get_text_features(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Text embeddings [P, D], projected and not normalised, of tokens [P, L]."""
        return _first(self.text_model(input_ids))

    def init_weights(self) -> None:
        """Nothing to do: the weights are there."""


def _first(features: Any) -> Tensor:
    """The pooled feature; CoCa's towers give all tokens beside it."""
    found: Tensor = features[0] if isinstance(features, tuple | list) else features
    return found


def load_open_clip(source: Any, commit: str | None, dtype: Any, options: Mapping[str, Any]) -> OpenCLIPModel:
    """A model from safetensors.

    Args:
        source: a `BaseSource`. commit: of it. dtype: `"auto"` is fp32. options: `device_map` with one device; no other.

    Raises:
        BaseModelError: no safetensors, weights missing or damaged, a config that open_clip does not build, or an option
            that is not to be had. MissingExtraError: open_clip is not installed. HubError: not to be downloaded.
    """
    unknown = sorted(key for key, value in options.items() if key != "device_map" and value is not None)
    device = options.get("device_map")
    if unknown or not (device is None or (isinstance(device, str | int | torch.device) and device != "auto")):
        what = unknown[0] if unknown else f"device_map={device!r}"
        raise BaseModelError(f"Over a model of open_clip {what} is not to be had. Leave it out, or give one device.")
    source = replace(source, revision=commit or source.revision)
    settings, open_clip = _settings(source), need_open_clip()
    with source.asking():
        weights = next((path for path in map(source.file, _WEIGHTS) if path is not None), None)
    if weights is None:
        raise BaseModelError(
            f"The base model {source.name!r} has no {_WEIGHTS[0]}. Weights in other files (.bin, .pt) can run code "
            f"when opened and are not read here. {_CONVERT}"
        )
    try:
        # Of its own class both towers have names of their own; open_clip renames the weights of older files.
        model = open_clip.create_model(
            f"local-dir:{Path(weights).parent}", pretrained_text=False, force_custom_text=True, require_pretrained=True
        )
    except Exception as error:  # whatever it makes of a config or of weights that are not as they must be
        raise BaseModelError(
            f"The base model {source.name!r} cannot be loaded by open_clip {open_clip.__version__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    text = settings["model_cfg"]["text_cfg"]
    sizes: dict[str, Any] = {"vocab_size": model.text.vocab_size}
    sizes["max_position_embeddings"] = text.get("context_length", 77)
    config = OpenCLIPConfig(**sizes)
    config._name_or_path, config._commit_hash = source.name, commit
    made: Any = OpenCLIPModel(config, model)
    made.to(device=device, dtype=torch.float32 if dtype == "auto" else dtype)
    return made  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- its tokenizer and its image processor


class OpenCLIPTokenizer:
    """A tokenizer of open_clip, called as one of transformers'.

    Attributes:
        model_max_length: tokens that the text tower reads.
    """

    vocab_files_names: Mapping[str, str] = {}

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.model_max_length = tokenizer, length
        self._pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0

    def __call__(
        self,
        texts: Sequence[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """`{"input_ids"}`: with `return_tensors` padded [P, max_length], else a list for each text."""
        length = max_length or self.model_max_length
        ids: Tensor = self.tokenizer(list(texts), context_length=length if truncation else max(512, 4 * length))
        if return_tensors is not None:
            return {"input_ids": ids}
        counts = [int((row != self._pad).nonzero().max()) + 1 if bool((row != self._pad).any()) else 0 for row in ids]
        return {"input_ids": [row[:count].tolist() for row, count in zip(ids, counts, strict=True)]}


def load_open_clip_tokenizer(source: Any) -> OpenCLIPTokenizer:
    """The tokenizer of a checkpoint, as open_clip makes it.

    Raises:
        BaseModelError: its files are not there, or its options are none of ours. MissingExtraError: no open_clip.
    """
    text, open_clip = _settings(source)["model_cfg"]["text_cfg"], need_open_clip()
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or set(options) - _TOKENIZER_OPTIONS:
        raise BaseModelError(
            f"The {CONFIG_FILE} of the base model {source.name!r} has tokenizer_kwargs {options!r:.100}, of which "
            f"only {', '.join(sorted(_TOKENIZER_OPTIONS))} are read. Pass tokenizer=."
        )
    own = bool(text.get("hf_tokenizer_name"))
    if own:
        with source.asking():
            found = {file: source.file(file) for file in _TOKENIZER_FILES}
        if not any(found[file] for file in _VOCABULARIES):
            raise BaseModelError(
                f"The base model {source.name!r} has no tokenizer: its {CONFIG_FILE} names "
                f"{text['hf_tokenizer_name']!r}, whose files belong beside it (tokenizer.json)."
            )
    folder = Path(source.file(CONFIG_FILE)).parent
    try:
        # Code of its own never runs.
        made = open_clip.get_tokenizer(f"local-dir:{folder}", **({"trust_remote_code": False} if own else {}))
    except Exception as error:
        raise BaseModelError(
            f"The tokenizer of the base model {source.name!r} cannot be loaded by open_clip: {error!s:.200}"
        ) from error
    return OpenCLIPTokenizer(made, int(text.get("context_length", 77)))


def open_clip_image_processor(source: Any) -> Any:
    """An image processor of transformers that prepares pictures as open_clip does; it needs no open_clip.

    Raises:
        BaseModelError: a way of resizing that transformers does not have.
    """
    settings = _settings(source)
    given = settings["preprocess_cfg"]
    size = settings["model_cfg"]["vision_cfg"].get("image_size", given.get("size", 224))
    height, width = (size, size) if isinstance(size, int) else size
    mode, kind = given.get("resize_mode") or "shortest", given.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise BaseModelError(
            f"The base model {source.name!r} prepares pictures by resize_mode {mode!r} to {height} x {width}, which no "
            "image processor of transformers does. Pass image_processor=."
        )
    mean, std = given.get("mean") or _MEAN, given.get("std") or _STD
    return _processor(
        {"shortest_edge": height} if mode == "shortest" else {"height": height, "width": width},
        (height, width) if mode == "shortest" else None,
        kind,
        list(mean) if isinstance(mean, list | tuple) else [mean] * 3,
        list(std) if isinstance(std, list | tuple) else [std] * 3,
    )


def of_transformers(processor: Any) -> Any:
    """An image processor as it is; where it is timm's own, which cannot be saved, one of transformers' that does the
    same.

    Raises:
        BaseModelError: a way of resizing that transformers does not have.
    """
    facts = getattr(processor, "data_config", None)
    if facts is None:
        return processor
    (_, height, width), mode = facts["input_size"], facts.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise BaseModelError(
            f"timm prepares pictures for this model by crop_mode {mode!r} to {height} x {width}, which no image "
            "processor of transformers does. Pass image_processor=."
        )
    edges = [math.floor(edge / facts["crop_pct"]) for edge in (height, width)]
    size = {"shortest_edge": edges[0]} if mode == "center" else {"height": edges[0], "width": edges[1]}
    return _processor(size, (height, width), facts["interpolation"], list(facts["mean"]), list(facts["std"]))


_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def _processor(
    size: dict[str, int], crop: tuple[int, int] | None, interpolation: str, mean: list[float], std: list[float]
) -> Any:
    """One of transformers' that resizes, crops in the middle and normalises."""
    made = getattr(transformers, "CLIPImageProcessorPil", None)
    if made is None or is_torchvision_available():
        made = transformers.CLIPImageProcessor
    height, width = crop or (size["height"], size["width"])
    return made(
        size=size,
        do_center_crop=crop is not None,
        crop_size={"height": height, "width": width},
        resample=_INTERPOLATIONS.get(interpolation, 3),
        image_mean=mean,
        image_std=std,
    )
