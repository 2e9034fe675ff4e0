"""The dual encoders that can be a base: all facts of a family in one row.

Families differ in how text must be padded, how a cosine becomes a logit, where their text side is and what their image
towers are made of; each row says so, and a test compares every row with the model's own `logits_per_image`. Adding a
family is one row and one test parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import BaseModelError

# Text towers that count positions from after the padding index, by their own `model_type`.
POSITIONS_AFTER_PADDING = ("xlm-roberta", "altclip_text_model")


@dataclass(frozen=True)
class EncoderFamily:
    """What is particular to one `model_type`.

    Attributes:
        padding: `"longest"`, or `"max_length"` where padding changes the answer and must be as in pretraining.
        attention_mask: whether the text tower is given the mask.
        score: `"exp_scale"` (cosine times exp of a learned scale), `"exp_scale_bias"` (plus a learned bias) or
            `"temperature"` (cosine divided by a learned temperature).
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

FAMILIES: dict[str, EncoderFamily] = {
    "clip": EncoderFamily(text_modules=_CLIP_TEXT, clip_layers=True, reads_first_token=True),
    "metaclip_2": EncoderFamily(text_modules=_CLIP_TEXT, clip_layers=True, reads_first_token=True),
    "altclip": EncoderFamily(clip_layers=True, reads_first_token=True),
    "chinese_clip": EncoderFamily(clip_layers=True, reads_first_token=True),
    "blip": EncoderFamily(),
    "vision-text-dual-encoder": EncoderFamily(),
    "align": EncoderFamily(score="temperature"),
    # SigLIP pools the last token: short padding or a mask would pool another one.
    "siglip": EncoderFamily(
        padding="max_length",
        attention_mask=False,
        score="exp_scale_bias",
        text_length=64,
        text_projection="text_model.head",
        text_modules=("text_model",),
        clip_layers=True,
    ),
    "siglip2": EncoderFamily(
        padding="max_length",
        attention_mask=False,
        score="exp_scale_bias",
        text_length=64,
        text_projection="text_model.head",
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
    hint = ""
    if model_type == "taskres":
        hint = " It is a TaskRes classifier: load it with from_pretrained, or give its base, .clip."
    raise BaseModelError(
        f"The base model must be a dual encoder (images and text in one space); {model_type!r} is not one this "
        f"library knows.{hint} Supported model types: {', '.join(sorted(FAMILIES))}."
    )
