"""Dual encoders: their families, where one lies and what is none, and embeddings out of one.

Families differ in how text must be padded, how a cosine becomes a logit, where their text side is and what their image
towers are made of; each row says so, and a test compares every row with the model's own `logits_per_image`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.import_utils import is_torchvision_available

from .errors import ArtifactError, BaseModelError, ConfigurationError, asking_for, else_cached, warn_if_moved
from .openclip import load_open_clip_tokenizer, of_transformers, open_clip_config, open_clip_image_processor, plain_name
from .storage import is_path, read_json, write_json

_PADDINGS = ("longest", "max_length")
_SCORES = ("exp_scale", "exp_scale_clamped", "exp_scale_bias", "temperature")
# Text towers that count positions from after the padding index, by their own `model_type`.
POSITIONS_AFTER_PADDING = ("xlm-roberta", "altclip_text_model")


@dataclass(frozen=True)
class EncoderFamily:
    """What is particular to one `model_type`.

    Attributes:
        padding: `"longest"`, or `"max_length"` where padding changes the answer and must be as in pretraining.
        attention_mask: whether the text tower is given the mask.
        score: `"exp_scale"` (cosine times exp of a learned scale), `"exp_scale_clamped"` (of a scale between 0 and the
            model's `max_log_logit_scale`), `"exp_scale_bias"` (plus a learned bias) or `"temperature"` (cosine divided
            by a learned temperature).
        text_length: fixed number of tokens, or None for the text tower's own maximum.
        text_projection: path of the linear module that gives the text embedding.
        text_modules: attributes of the text side, left out where the image tower is loaded alone; none where the two
            are not loaded apart.
        image_inputs: names of the processor's outputs that the image tower needs.
        clip_layers: whether the image tower's layers have CLIP's parts (pre-norm, no attention mask), so that faster
            engines can rewrite them.
        reads_first_token: whether the image embedding is made of the last layer's first token alone.
    """

    padding: str = "longest"
    attention_mask: bool = True
    score: str = "exp_scale"
    text_length: int | None = None
    text_projection: str = "text_projection"
    text_modules: tuple[str, ...] = ()
    image_inputs: tuple[str, ...] = ("pixel_values",)
    clip_layers: bool = False
    reads_first_token: bool = False


_CLIP_TEXT = ("text_model", "text_projection")
# SigLIP pools the last token: short padding or a mask would pool another one.
_SIGLIP: dict[str, Any] = {
    "padding": "max_length", "attention_mask": False, "score": "exp_scale_bias", "text_length": 64,
    "text_projection": "text_model.head",
}  # fmt: skip

FAMILIES: dict[str, EncoderFamily] = {
    "clip": EncoderFamily(text_modules=_CLIP_TEXT, clip_layers=True, reads_first_token=True),
    "metaclip_2": EncoderFamily(text_modules=_CLIP_TEXT, clip_layers=True, reads_first_token=True),
    "altclip": EncoderFamily(clip_layers=True, reads_first_token=True),
    "chinese_clip": EncoderFamily(clip_layers=True, reads_first_token=True),
    "blip": EncoderFamily(),
    "vision-text-dual-encoder": EncoderFamily(),
    "clipseg": EncoderFamily(text_modules=_CLIP_TEXT),
    "groupvit": EncoderFamily(),
    "owlvit": EncoderFamily(text_modules=_CLIP_TEXT),
    "owlv2": EncoderFamily(text_modules=_CLIP_TEXT),
    # Without padding transformers hands SDPA no mask, and the text tower attends to what comes after.
    "aimv2": EncoderFamily(padding="max_length", score="exp_scale_clamped", text_modules=_CLIP_TEXT),
    "flava": EncoderFamily(),
    "tipsv2": EncoderFamily(score="temperature"),
    "jina_clip": EncoderFamily(),  # code of its own: runs only where trust_remote_code allows it
    "align": EncoderFamily(score="temperature"),
    "siglip": EncoderFamily(**_SIGLIP, text_modules=("text_model",), clip_layers=True),
    # Read by open_clip itself, see `openclip`: its tokenizers pad as in pretraining; without a bias theirs is 0.
    "open_clip": EncoderFamily(padding="max_length", attention_mask=False, score="exp_scale_bias"),
    "siglip2": EncoderFamily(**_SIGLIP, image_inputs=("pixel_values", "pixel_attention_mask", "spatial_shapes")),
}


def register_family(model_type: str, family: EncoderFamily) -> None:
    """Make a dual encoder of your own, or one that this library does not know, a base model.

    Its model must be what `AutoModel` loads for the `model_type`, and have `get_image_features(pixel_values)`,
    `get_text_features(input_ids, ...)` and the learned scale that `family.score` reads. Register it before a base or an
    artifact on it is loaded, in every process.

    Raises:
        ConfigurationError: the name is taken by another row, or a field has a value that nothing reads.
    """
    if not isinstance(model_type, str) or not model_type:
        raise ConfigurationError(f"`model_type` must be a name, as in config.json; got {model_type!r}.")
    if not isinstance(family, EncoderFamily):
        raise ConfigurationError(f"`family` must be an EncoderFamily; got a {type(family).__name__}.")
    for name, known in (("padding", _PADDINGS), ("score", _SCORES)):
        if getattr(family, name) not in known:
            raise ConfigurationError(
                f"`{name}` of a family must be one of {', '.join(known)}; got {getattr(family, name)!r}."
            )
    if FAMILIES.get(model_type, family) != family:
        raise ConfigurationError(
            f"The family {model_type!r} is known already, with other facts. Give your model another model_type."
        )
    FAMILIES[model_type] = family


def family_of(model_or_config: Any) -> EncoderFamily:
    """The row of a model or config.

    Raises:
        BaseModelError: its `model_type` is not a dual encoder in the table.
    """
    own = getattr(model_or_config, "encoder_family", None)  # of an image tower alone, see `vision`
    if isinstance(own, EncoderFamily):
        return own
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    hint = ""
    if model_type == "taskres":
        hint = " It is a TaskRes classifier: load it with from_pretrained, or give its base, .clip."
    raise BaseModelError(
        f"The base model must be a dual encoder (images and text in one space); {model_type!r} is not one this "
        f"library knows.{hint} Supported model types: {', '.join(sorted(FAMILIES))}."
    )


class HubOptions(dict[str, Any]):
    """Arguments of the Hub's client. The token among them is neither printed, copied nor pickled."""

    def __reduce__(self) -> Any:
        return type(self), ({key: value for key, value in self.items() if key != "token"},)

    def __repr__(self) -> str:
        return repr({key: "<HUB_TOKEN>" if key == "token" else value for key, value in self.items()})


@dataclass(frozen=True)
class BaseSource:
    """Where a base comes from.

    Attributes:
        name: Hub id or folder. revision: branch, tag or commit; None for `main` or a folder.
        hub: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`, `subfolder`.
        trust_remote_code: let the base run code from its repository.
        stored: an artifact names it, not the caller.
    """

    name: str
    revision: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    stored: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "hub", HubOptions(self.hub))  # which keeps the token to itself
        object.__setattr__(self, "name", plain_name(self.name))

    def asking(self) -> AbstractContextManager[None]:
        """Around downloads: a `HubError` that names the base, how it was asked for and what to do."""
        subject = f"The base model {self.name}" + (", which the classifier names," if self.stored else "")
        advice = "Name it by base_model (--base-model); a folder of this machine can be given too."
        if self.stored:
            advice = (
                "Pass base_revision= with a commit that is there, whose text embeddings are then compared with those "
                "of training, or base_model= (--base-model) with another place or a folder that has it."
            )
        return asking_for(subject, self.name, self.revision, advice)

    def file(self, name: str) -> str | None:
        """Path of one of its files, downloaded where needed; None where it has none."""
        if os.path.isdir(self.name):
            path = Path(self.name, self.hub.get("subfolder") or "", name)
            return str(path) if path.is_file() else None
        with suppress(OSError):
            options = {**self.hub, "revision": self.revision}
            fetch = partial(cached_file, self.name, name, _raise_exceptions_for_missing_entries=False)
            return else_cached(fetch, **options)
        return None

    def commit(self) -> str | None:
        """The commit its revision is now; the revision itself where that cannot be told, None for a folder."""
        if not self.name or is_path(self.name):
            return None
        path = self.file("config.json") or open_clip_config(self, None)
        return (extract_commit_hash(path, None) if path else None) or self.revision


# A file that tells what a folder or repository is instead, and what to do then.
_OTHER_FORMATS = {
    "model_index.json": ("a diffusers pipeline", "Give a CLIP model that has both towers, not a pipeline."),
    "open_clip_model.safetensors": ("an open_clip checkpoint", "{open_clip}"),
    "open_clip_pytorch_model.bin": ("an open_clip checkpoint", "{open_clip}"),
    "adapter_config.json": ("a PEFT adapter", "Merge it into its base model, save that, and give that folder."),
    "modules.json": ("a sentence-transformers model", "Give the CLIP model inside it, such as its folder 0_CLIPModel."),
}
OPEN_CLIP = (
    "Give it as open_clip saves it for the Hub, open_clip_config.json beside open_clip_model.safetensors, or the same "
    "model in transformers' format (many have one on the Hub)."
)


def config_file(source: BaseSource) -> str:
    """The base's config.json, or what open_clip has in its place."""
    name = source.name
    if is_path(name) and not os.path.isdir(name):
        kind = "is a file: give the folder of the model" if os.path.isfile(name) else "does not exist: check the path"
        raise BaseModelError(f"The base model {name!r} {kind}, or a Hub id such as openai/clip-vit-base-patch32.")
    if os.path.isdir(name):
        path = source.file("config.json")
        path = open_clip_config(source, path) or path
        if path is not None:
            return path
    else:
        at: dict[str, Any] = {"filename": "config.json", "revision": source.revision}
        try:
            with source.asking():
                known = try_to_load_from_cache(name, cache_dir=source.hub.get("cache_dir"), **at)
                found = else_cached(cached_file, path_or_repo_id=name, **at, **source.hub)
            if found is not None:
                if not isinstance(known, str) or source.revision is None:
                    warn_if_moved("base model", name, source.revision, source.hub)
                return str(open_clip_config(source, found) or found)
        except OSError as error:
            cause = error.__cause__  # of the two, the second says only that the Hub could not be asked
            if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
                raise
        with source.asking():
            found = open_clip_config(source, None)
        if found is not None:
            return found
    raise BaseModelError(
        other_format(source)
        or f"The base model {name!r} has no config.json; {content_of(source)}. Give a model in "
        "transformers' format: config.json, model.safetensors, tokenizer and image processor."
    )


def other_format(source: BaseSource) -> str | None:
    """What a folder or repository without a config.json of transformers is, and what to do then; None if unknown."""
    for file, (what, advice) in _OTHER_FORMATS.items():
        if source.file(file) is not None:
            return f"The base model {source.name!r} is {what} ({file}). {advice.format(open_clip=OPEN_CLIP)}"
    return None


def content_of(source: BaseSource) -> str:
    """What lies there, in a few words."""
    if not os.path.isdir(source.name):
        return "the repository holds something else"
    folder = Path(source.name, source.hub.get("subfolder") or "")
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(os.listdir(folder))
    return f"the folder holds {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}" if names else "it is empty"


def read_config(source: BaseSource, path: str) -> dict[str, Any]:
    """The base's config.json, read.

    Raises:
        BaseModelError: it is damaged.
    """
    try:
        return read_json(path)
    except ArtifactError as error:
        raise BaseModelError(f"The config.json of the base model {source.name!r} is damaged: {error}") from error


def base_name(base_model: Any) -> str:
    """The name of a base given as a Hub id, a folder or a loaded model (empty where it has none).

    Raises:
        BaseModelError: it is something else.
    """
    if isinstance(base_model, PreTrainedModel):
        family_of(base_model)
        return str(base_model.config._name_or_path)
    if isinstance(base_model, str | os.PathLike):
        return plain_name(str(os.fspath(base_model)))
    hint = ": give merge_and_unload() of it" if hasattr(base_model, "merge_and_unload") else ""
    raise BaseModelError(
        f"The base model must be a Hub id, a folder or a transformers model; got a {type(base_model).__name__}{hint}."
    )


def trusted_base_name(config: Any, base_model: Any, local: bool) -> str:
    """Where to load the base from; a path is taken from an artifact on this machine only, never from a download."""
    if hasattr(base_model, "config"):
        return str(base_model.config._name_or_path or config.base_model_name_or_path)
    if base_model is not None:
        return str(os.fspath(base_model))
    name = str(config.base_model_name_or_path)
    if local:
        if os.path.isabs(name) and not os.path.isdir(name):
            raise BaseModelError(
                f"The base model's folder {name} is gone. Pass base_model= with where it is now, or its Hub id."
            )
        return name
    if is_path(name):
        raise BaseModelError(
            f"The artifact was downloaded and names {name!r} as its base, which is not a plain Hub id; a path from a "
            "download is not followed. Pass base_model= with the base you trust."
        )
    return name


def load_tokenizer(source: BaseSource) -> Any:
    """The base's tokenizer.

    Raises:
        BaseModelError: its files are not there; transformers would make an empty one.
    """
    if open_clip_config(source, source.file("config.json")) is not None:
        return load_open_clip_tokenizer(source)
    try:
        with source.asking():
            at = {"pretrained_model_name_or_path": source.name, "revision": source.revision, **source.hub}
            tokenizer = else_cached(AutoTokenizer.from_pretrained, trust_remote_code=source.trust_remote_code, **at)
    except (OSError, ValueError, ImportError, AttributeError) as error:  # the last of 5.2, without sentencepiece
        if isinstance(error, OSError) and not os.path.isdir(source.name):
            raise
        reason = f"The tokenizer of the base model {source.name!r} cannot be loaded ({error!s:.200})."
        raise BaseModelError(
            f"{reason} Its files belong beside the model: save it there with tokenizer.save_pretrained(FOLDER)."
        ) from error
    whole = "tokenizer.json"
    files = getattr(tokenizer, "vocab_files_names", None) or {}
    parts = [file for key, file in files.items() if key != "tokenizer_file" and file != whole]
    missing = [file for file in parts if source.file(file) is None]
    if files and source.file(whole) is None and (missing or not parts):
        raise BaseModelError(
            f"The base model {source.name!r} has no tokenizer: {whole}{' is' if not parts else ', or'} "
            f"{' and '.join(missing)}{',' if parts else ''} missing. Copy the tokenizer's files of the original model "
            "there: tokenizer.save_pretrained(FOLDER)."
        )
    return tokenizer


def load_image_processor(source: BaseSource, values: Mapping[str, Any] | None = None) -> Any:
    """The image processor that lies beside a base or an artifact; of `values`, where its file was read before.

    Raises:
        BaseModelError: it is of no known kind, or has code of its own. HubError: it cannot be downloaded.
    """
    # Without torchvision the default would only warn before it takes the PIL one.
    options: dict[str, Any] = {"trust_remote_code": False, **({} if is_torchvision_available() else {"backend": "pil"})}
    if values is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder, "preprocessor_config.json"), values)
            try:
                return AutoImageProcessor.from_pretrained(folder, **options)
            except Exception as error:  # whatever transformers makes of values that are not as they must be
                reason = f"preprocessor_config.json makes no image processor ({type(error).__name__}: {error})."
                raise ArtifactError(f"{reason} Set model.image_processor, or mend the file and sign it.") from error
    try:
        with asking_for(f"The image processor of {source.name}", source.name, source.revision):
            load = partial(AutoImageProcessor.from_pretrained, source.name, **options)
            return of_transformers(else_cached(load, revision=source.revision, **source.hub))
    except (ValueError, OSError) as error:
        if open_clip_config(source, source.file("config.json")) is not None:
            return open_clip_image_processor(source)
        if isinstance(error, OSError):
            raise
        why = " ".join(str(error).split())[:200]
        raise BaseModelError(f"{source.name!r} has no image processor that loads (code is not run): {why}") from error


def text_length(base: Any, tokenizer: Any) -> int:
    """Most tokens a prompt may have: the family's fixed length, the tower's positions and the tokenizer's maximum."""
    config = getattr(base, "config", base)
    text_config = getattr(config, "text_config", config)
    limits = [family_of(config).text_length, getattr(text_config, "max_position_embeddings", None)]
    limits.append(tokenizer.model_max_length)
    if text_config.model_type in POSITIONS_AFTER_PADDING:
        limits[1] -= text_config.pad_token_id + 1
    return min(limit for limit in limits if limit)


def tokenize(base: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token tensors [P, L] for prompts, padded as the family needs; warns of prompts that had to be cut."""
    family = family_of(base)
    limit = text_length(base, tokenizer)
    lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
    if cut:
        warnings.warn(
            f"{len(cut)} prompts are longer than the text tower's {limit} tokens and are cut, such as {cut[0]!r}.",
            stacklevel=2,
        )
    tokens = tokenizer(list(prompts), padding=family.padding, truncation=True, max_length=limit, return_tensors="pt")
    wanted = ("input_ids", "attention_mask") if family.attention_mask else ("input_ids",)
    return {name: tokens[name] for name in wanted}


@torch.no_grad()
def encode_texts(base: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Text embeddings [P, D] fp32 of prompts, projected and not normalised."""
    device = text_device(base)
    model: Any = base
    embeddings = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenize(base, tokenizer, prompts[start : start + batch_size])
        features = model.get_text_features(**{name: value.to(device) for name, value in tokens.items()})
        embeddings.append(pooled(features).float().cpu())
    return torch.cat(embeddings)


def image_features(base: PreTrainedModel, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
    """What the base's `get_image_features` returns for processed images; `pooled` takes the embedding out."""
    family = family_of(base)
    tensors = {name: inputs[name] for name in family.image_inputs if inputs.get(name) is not None}
    tensors["pixel_values"] = tensors["pixel_values"].to(dtype=base.dtype)
    return base.get_image_features(**tensors, **kwargs)  # type: ignore[operator]


def picture_size(base: PreTrainedModel) -> tuple[int, int]:
    """Height and width of what an image tower takes; where its config does not say, of what most do."""
    size = getattr(getattr(base.config, "vision_config", base.config), "image_size", None) or 224
    return (size, size) if isinstance(size, int) else tuple(size[-2:])


def encode_images(base: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Image embeddings [N, D] of processed images, projected and not normalised, in the tower's dtype."""
    return pooled(image_features(base, inputs))


def pooled(features: Any) -> Tensor:
    """The projected feature out of what `get_*_features` returns (a tensor before transformers 5).

    FLAVA projects every token; the first one's is compared.
    """
    feature: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return feature[:, 0] if feature.ndim == 3 else feature


@torch.no_grad()
def score_parameters(base: PreTrainedModel) -> tuple[float, float]:
    """Factor and bias that turn a cosine into the base's own logit: `logit = factor * cosine + bias`."""
    score = family_of(base).score
    model: Any = base
    if score == "temperature":
        return 1.0 / float(model.temperature), 0.0
    log_scale = model.logit_scale.float()
    if score == "exp_scale_clamped":
        log_scale = log_scale.clamp(0.0, model.max_log_logit_scale)
    scale = float(log_scale.exp())
    return scale, float(model.logit_bias) if score == "exp_scale_bias" else 0.0


def text_device(base: PreTrainedModel) -> torch.device:
    """Where token ids must be, also when the towers are on different devices."""
    tower = getattr(base, "text_model", base)
    return next(tower.parameters()).device
