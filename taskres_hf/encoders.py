"""Embeddings out of a base: text and pictures, projected and not normalised."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families import POSITIONS_AFTER_PADDING, family_of


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
