"""Where a base lies, and what a folder or repository is that is no base: said in words, with what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils.hub import cached_file, extract_commit_hash

from .errors import ArtifactError, BaseModelError
from .families import FAMILIES
from .storage import is_path, read_json

# A file that tells what a folder or repository is instead, and what to do then.
_OTHER_FORMATS = {
    "model_index.json": ("a diffusers pipeline", "Give a CLIP model that has both towers, not a pipeline."),
    "open_clip_config.json": ("an open_clip checkpoint", "{open_clip}"),
    "open_clip_model.safetensors": ("an open_clip checkpoint", "{open_clip}"),
    "open_clip_pytorch_model.bin": ("an open_clip checkpoint", "{open_clip}"),
    "adapter_config.json": ("a PEFT adapter", "Merge it into its base model, save that, and give that folder."),
    "modules.json": ("a sentence-transformers model", "Give the CLIP model inside it, such as its folder 0_CLIPModel."),
}
_OPEN_CLIP = (
    "Use the same model in transformers' format (many have one on the Hub), or convert it with the script "
    "convert_clip_original_pytorch_to_hf.py of transformers."
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


@dataclass(frozen=True)
class BaseSource:
    """Where a base comes from.

    Attributes:
        name: Hub id or folder. revision: branch, tag or commit; None for `main` or a folder.
        hub: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`, `subfolder`.
        trust_remote_code: let the base run code from its repository.
    """

    name: str
    revision: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def file(self, name: str) -> str | None:
        """Path of one of its files, downloaded where needed; None where it has none."""
        if os.path.isdir(self.name):
            path = Path(self.name, self.hub.get("subfolder") or "", name)
            return str(path) if path.is_file() else None
        with suppress(OSError):
            options = {**self.hub, "revision": self.revision}
            return cached_file(self.name, name, _raise_exceptions_for_missing_entries=False, **options)
        return None

    def commit(self) -> str | None:
        """The commit its revision is now; the revision itself where that cannot be told, None for a folder."""
        if not self.name or is_path(self.name):
            return None
        path = self.file("config.json")
        return (extract_commit_hash(path, None) if path else None) or self.revision


def config_file(source: BaseSource) -> str:
    """The base's config.json."""
    name = source.name
    if is_path(name) and not os.path.isdir(name):
        kind = "is a file: give the folder of the model" if os.path.isfile(name) else "does not exist: check the path"
        raise BaseModelError(f"The base model {name!r} {kind}, or a Hub id such as openai/clip-vit-base-patch32.")
    if os.path.isdir(name):
        path = source.file("config.json")
        if path is not None:
            return path
    else:
        try:
            found = cached_file(name, "config.json", revision=source.revision, **source.hub)
            if found is not None:
                return str(found)
        except OSError as error:
            cause = error.__cause__  # of the two, the second says only that the Hub could not be asked
            if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
                raise
    raise BaseModelError(
        _other_format(source)
        or f"The base model {name!r} has no config.json; {_content(source)}. Give a model in "
        "transformers' format: config.json, model.safetensors, tokenizer and image processor."
    )


def _other_format(source: BaseSource) -> str | None:
    for file, (what, advice) in _OTHER_FORMATS.items():
        if source.file(file) is not None:
            return f"The base model {source.name!r} is {what} ({file}). {advice.format(open_clip=_OPEN_CLIP)}"
    return None


def _content(source: BaseSource) -> str:
    if not os.path.isdir(source.name):
        return "the repository holds something else"
    folder = Path(source.name, source.hub.get("subfolder") or "")
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(os.listdir(folder))
    return f"the folder holds {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}" if names else "it is empty"


def check_model_type(name: str, path: str) -> None:
    """Say what a model is that is no dual encoder.

    Raises:
        BaseModelError: with what it is and what to give instead.
    """
    try:
        config = read_json(path)
    except ArtifactError as error:
        raise BaseModelError(f"The config.json of the base model {name!r} is damaged: {error}") from error
    kind = config.get("model_type")
    if kind in FAMILIES:
        return
    advice = "Give the whole model, with both towers."
    if kind == "taskres":
        what, advice = "a saved TaskRes classifier", "Load it with from_pretrained, or give its own base model."
    elif "model_cfg" in config:
        what, advice = "an open_clip checkpoint", _OPEN_CLIP
    elif "_class_name" in config or "_diffusers_version" in config:
        what = "a part of a diffusers pipeline"
    elif kind is None:
        what = "a timm model" if "pretrained_cfg" in config else "of no known kind: its config.json has no model_type"
    elif {"vision_config", "text_config"} <= set(config):
        what, advice = "a model of images and text of another family", ""
    elif "vision" in str(kind) or {"image_size", "num_channels", "patch_size"} & set(config):
        what = "an image model alone"
    elif "text" in str(kind) or "vocab_size" in config:
        what = "a text-only model"
    else:
        what = "another kind of model"
    raise BaseModelError(
        f"The base model {name!r} is {what} (model_type {kind!r}); needed is a dual encoder, images and text in one "
        f"space. {advice} Supported model types: {', '.join(sorted(FAMILIES))}."
    )


def why_not(source: BaseSource, error: Exception) -> str | None:
    """What to say instead of an error of transformers; None where that error says it best."""
    if isinstance(error, BaseModelError | torch.OutOfMemoryError):
        return None
    weights = ("model.safetensors", "model.safetensors.index.json")
    if isinstance(error, OSError) and all(source.file(file) is None for file in weights):
        pickle = next((file for file in _PICKLES if source.file(file) is not None), None)
        if pickle is not None:
            return (
                f"The base model {source.name!r} has its weights in {pickle} only, which can run code when opened and "
                "is not read here. If you trust it, convert it once: AutoModel.from_pretrained(NAME).save_pretrained("
                "FOLDER) with transformers, copy the tokenizer and image processor files, and give that folder."
            )
        other = _other_format(source)
        if other is not None or os.path.isdir(source.name):
            return other or f"The base model {source.name!r} has no model.safetensors; {_content(source)}."
        return None
    if isinstance(error, OSError) and not os.path.isdir(source.name):
        return None
    return f"The base model {source.name!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
