"""The dual encoders that can be a base, one row each, and how to get embeddings out of them.

Families differ in how text must be padded, whether the mask is passed, and how a cosine becomes a logit; each row
says so, and a test compares every row with the model's own `logits_per_image`. Adding a family is one row and one
test parameter.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file, extract_commit_hash

from .errors import BaseModelError, ConfigurationError
from .linear import quicken

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
BASE_KWARGS = ("device_map", "attn_implementation", "max_memory", "offload_folder", "quantization_config")


@dataclass(frozen=True)
class EncoderFamily:
    """What is particular to one `model_type`.

    Attributes:
        padding: `"longest"`, or `"max_length"` where padding changes the answer and must be as in pretraining.
        attention_mask: whether the text tower is given the mask.
        score: `"exp_scale"` (cosine times exp of a learned scale), `"exp_scale_bias"` (plus a learned bias) or
            `"temperature"` (cosine divided by a learned temperature).
        text_length: fixed number of tokens, or None for the text tower's own maximum.
        image_inputs: names of the processor's outputs that the image tower needs.
    """

    padding: str = "longest"
    attention_mask: bool = True
    score: str = "exp_scale"
    text_length: int | None = None
    image_inputs: tuple[str, ...] = ("pixel_values",)


FAMILIES: dict[str, EncoderFamily] = {
    "clip": EncoderFamily(),
    "metaclip_2": EncoderFamily(),
    "altclip": EncoderFamily(),
    "chinese_clip": EncoderFamily(),
    "blip": EncoderFamily(),
    "vision-text-dual-encoder": EncoderFamily(),
    "align": EncoderFamily(score="temperature"),
    # SigLIP pools the last token: short padding or a mask would pool another one.
    "siglip": EncoderFamily(padding="max_length", attention_mask=False, score="exp_scale_bias", text_length=64),
    "siglip2": EncoderFamily(
        padding="max_length",
        attention_mask=False,
        score="exp_scale_bias",
        text_length=64,
        image_inputs=("pixel_values", "pixel_attention_mask", "spatial_shapes"),
    ),
}


def family_of(model_or_config: Any) -> EncoderFamily:
    """The row of a model or config.

    Raises:
        BaseModelError: its `model_type` is not a dual encoder in the table.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    hint = " It is a saved TaskRes artifact: load it with from_pretrained." if model_type == "taskres" else ""
    raise BaseModelError(
        f"The base model must be a dual encoder (images and text in one space); {model_type!r} is not one this "
        f"library knows.{hint} Supported model types: {', '.join(sorted(FAMILIES))}."
    )


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: Any = None,
    hub_kwargs: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, str | None]:
    """Load a dual encoder, frozen and in eval mode.

    Args:
        name_or_path: Hub id or folder.
        revision: branch, tag or commit; the commit it resolves to is returned.
        dtype: dtype of the weights, or `"auto"` for the checkpoint's own.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`, `subfolder`.

    Returns:
        The model, and the commit it came from (None for a folder).

    Raises:
        BaseModelError: not a dual encoder in `FAMILIES`, found before any weight is read.
        OSError: not found or not reachable, as raised by the Hub client.
    """
    hub = dict(hub_kwargs or {})
    path = cached_file(name_or_path, "config.json", revision=revision, **hub)
    commit = None if Path(name_or_path).is_dir() else extract_commit_hash(path, None)
    hub["revision"] = commit or revision  # every further file comes from the same commit
    family_of(AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub))
    for key, value in (("attn_implementation", attn_implementation), ("device_map", device_map)):
        if value is not None:
            model_kwargs[key] = value
    model = AutoModel.from_pretrained(
        name_or_path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **hub,
        **model_kwargs,
    )
    for method in ("get_text_features", "get_image_features"):
        if not callable(getattr(model, method, None)):
            raise BaseModelError(f"The base model {name_or_path!r} ({type(model).__name__}) has no `{method}`.")
    quicken(model)
    return model.eval().requires_grad_(False), commit


class TextTowerNotLoaded(nn.Module):
    """Stands where the text tower would be: it is not needed once the base classifier is known."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            raise BaseModelError(
                "The text tower was not loaded: classifying needs the image tower alone. Load the model with "
                "from_pretrained(..., text_tower=True) to use it."
            ) from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.missing


def has_text_tower(base: PreTrainedModel) -> bool:
    """Whether text can be embedded with a base."""
    return not any(isinstance(module, TextTowerNotLoaded) for module in base.children())


def check_same_base(base: PreTrainedModel, config: Any) -> None:
    """Whether a base without its text tower, whose text embeddings cannot be compared, is the artifact's.

    Raises:
        BaseModelError: it has another name or commit.
    """
    name, wanted = base.config._name_or_path, str(config.base_model_name_or_path)
    commit = getattr(base.config, "_commit_hash", None)
    if name != wanted or (config.base_model_revision or commit) != commit:
        raise BaseModelError(
            f"The base given is {name!r} without its text tower, so it cannot be told whether it is {wanted!r}, which "
            "the artifact was made for. Load the base with text_tower=True."
        )


def load_image_tower(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel | None:
    """The base without its text tower, its weights mapped from the file instead of read.

    Returns:
        The base, frozen and in eval mode; None where the checkpoint is not one safetensors file with exactly the
        weights the image side needs, and `load_base` must be used.
    """
    hub = dict(hub_kwargs or {})
    try:
        config_path = cached_file(name_or_path, "config.json", revision=revision, **hub)
        path = cached_file(name_or_path, "model.safetensors", revision=revision, **hub)
    except OSError:
        return None
    kept = _config_of_split_towers(Path(str(config_path)).read_text(encoding="utf-8"))
    if kept is None:
        return None
    config = copy.deepcopy(kept)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    text_layers, layers = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    config.text_config.num_hidden_layers = 0  # the text side is built and thrown away
    config.vision_config.num_hidden_layers = 1  # and copying an empty layer costs a fraction of building one
    with torch.device("meta"), no_init_weights():
        base = AutoModel.from_config(config, dtype=dtype, **options)
    base.config.text_config.num_hidden_layers = text_layers
    base.config.vision_config.num_hidden_layers = layers
    stack = base.vision_model.encoder.layers
    stack.extend(_copied(stack[0]) for _ in range(layers - 1))
    for attribute in _SPLIT_TOWERS[config.model_type]:
        setattr(base, attribute, TextTowerNotLoaded())
    with safe_open(str(path), framework="pt") as stream:
        stored = set(stream.keys())
        for prefix, module in base.named_modules():  # several times faster than load_state_dict(assign=True)
            vars(module)["training"] = False
            for leaf, parameter in module._parameters.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter is not None and name not in stored:
                    return None
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(stream.get_tensor(name).to(dtype), requires_grad=False)
    for name, buffer in list(base.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                return None
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            base.get_submodule(owner).register_buffer(leaf, positions, persistent=False)
    quicken(base)
    base.config._name_or_path = name_or_path
    base.config._commit_hash = None if Path(name_or_path).is_dir() else extract_commit_hash(path, None)
    whole: PreTrainedModel = base
    return whole


@lru_cache(maxsize=16)
def _config_of_split_towers(text: str) -> PreTrainedConfig | None:
    """The config in a file's text, or None if its towers cannot be loaded separately; making one takes milliseconds."""
    values = json.loads(text)
    if values.get("model_type") not in _SPLIT_TOWERS or "auto_map" in values:
        return None
    return AutoConfig.for_model(**values)


def _copied(module: nn.Module) -> nn.Module:
    """A copy with the same empty parameters, and hooks, buffers and children of its own."""
    clone = copy.copy(module)
    vars(clone).update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict | set)})
    clone._modules = {name: child and _copied(child) for name, child in module._modules.items()}
    return clone


# What belongs to the text side, for the families whose towers are loaded separately.
_SPLIT_TOWERS = {
    "clip": ("text_model", "text_projection"),
    "metaclip_2": ("text_model", "text_projection"),
    "siglip": ("text_model",),
}


def load_tokenizer(name_or_path: str, *, revision: str | None = None, **hub_kwargs: Any) -> Any:
    """The base's tokenizer; keyword arguments as in `AutoTokenizer.from_pretrained`."""
    return AutoTokenizer.from_pretrained(name_or_path, revision=revision, **hub_kwargs)


def text_length(base: Any, tokenizer: Any) -> int:
    """Most tokens a prompt may have: the family's fixed length, the tower's positions and the tokenizer's maximum."""
    config = getattr(base, "config", base)
    text_config = getattr(config, "text_config", config)
    limits = [family_of(config).text_length, getattr(text_config, "max_position_embeddings", None)]
    limits.append(tokenizer.model_max_length)
    if text_config.model_type in ("xlm-roberta", "altclip_text_model"):
        limits[1] -= text_config.pad_token_id + 1  # RoBERTa counts positions from after the padding index
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
    given = {name: inputs[name] for name in family.image_inputs if inputs.get(name) is not None}
    given["pixel_values"] = given["pixel_values"].to(dtype=base.dtype)
    return base.get_image_features(**given, **kwargs)  # type: ignore[operator]


def encode_images(base: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Image embeddings [N, D] of processed images, projected and not normalised, in the tower's dtype."""
    return pooled(image_features(base, inputs))


def pooled(features: Any) -> Tensor:
    """The projected feature out of what `get_*_features` returns (a tensor before transformers 5)."""
    if isinstance(features, Tensor):
        return features
    feature: Tensor = features.pooler_output
    return feature


@torch.no_grad()
def score_parameters(base: PreTrainedModel) -> tuple[float, float]:
    """Factor and bias that turn a cosine into the base's own logit: `logit = factor * cosine + bias`."""
    score = family_of(base).score
    model: Any = base
    if score == "temperature":
        return 1.0 / float(model.temperature), 0.0
    scale = float(model.logit_scale.float().exp())
    return scale, float(model.logit_bias) if score == "exp_scale_bias" else 0.0


def text_device(base: PreTrainedModel) -> torch.device:
    """Where token ids must be, also when the towers are on different devices."""
    tower = getattr(base, "text_model", base)
    return next(tower.parameters()).device


def image_weights_digest(base: PreTrainedModel) -> str:
    """A checksum of all weights that make an image embedding, in milliseconds: not a hash of every byte.

    Sums of the raw bits at two strides, with names, shapes and dtypes: any retraining or rounding changes it.
    It tells versions of a model apart; it is no protection against tampering.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if name.startswith(("text_", "logit_", "temperature")):  # absent where only the image tower is loaded
            continue
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        bits = bits[: bits.numel() // 4 * 4].view(torch.int32) if bits.numel() >= 4 else bits
        sums = [int(bits[::stride].sum(dtype=torch.int64)) for stride in (1, 7)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums};".encode())
    return digest.hexdigest()


def load_base_fp32(
    name: str,
    revision: str | None,
    dtype: Any,
    trust_remote_code: bool,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, str | None, torch.dtype]:
    """The base in fp32, so that `t` does not depend on the dtype it will run in, and that dtype."""
    dtype = dtype if dtype == "auto" else torch_dtype(dtype)
    placed = "device_map" in kwargs or "quantization_config" in kwargs
    first = dtype if dtype == "auto" or placed else torch.float32
    base, commit = load_base(
        name, revision=revision, dtype=first, trust_remote_code=trust_remote_code, hub_kwargs=hub, **kwargs
    )
    target = base.dtype if dtype == "auto" or placed else dtype
    if not placed:
        base.float()
    return base, commit, target


def torch_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype or its name, as a torch dtype."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"`dtype` must be a torch dtype or 'auto'; got {dtype!r}.")
    return dtype


def split_kwargs(kwargs: dict[str, Any], separate_hub_only: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes to the Hub client, and the rest."""
    hub = {key: kwargs[key] for key in _HUB_KWARGS if kwargs.get(key) is not None}
    rest = {key: value for key, value in kwargs.items() if key not in _HUB_KWARGS}
    if not separate_hub_only:
        unknown = [key for key in rest if key not in (*BASE_KWARGS, "low_cpu_mem_usage", "subfolder")]
        if unknown:
            raise TypeError(f"from_base() got unexpected arguments: {unknown}.")
        rest = {key: value for key, value in rest.items() if value is not None and key != "low_cpu_mem_usage"}
    return hub, rest
