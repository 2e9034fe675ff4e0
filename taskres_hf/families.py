"""The dual encoders that can be a base, one row each.

Families differ in how text must be padded, whether the mask is passed, and how a cosine becomes a logit; each row
says so, and a test compares every row with the model's own `logits_per_image`. Adding a family is one row and one
test parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import BaseModelError


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


# What belongs to the text side, for the families whose towers are loaded separately.
SPLIT_TOWERS = {
    "clip": ("text_model", "text_projection"),
    "metaclip_2": ("text_model", "text_projection"),
    "siglip": ("text_model",),
}
