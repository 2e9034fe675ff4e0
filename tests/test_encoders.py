"""Every family of dual encoders gives the logits of its own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, CLIPModel

from taskres_hf.base_model import load_image_tower
from taskres_hf.embedding.engines import onednn as linear
from taskres_hf.encoders import image_features, pooled, score_parameters
from taskres_hf.errors import BaseModelError
from taskres_hf.families import FAMILIES, family_of

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


def tiny_config(family: str) -> Any:
    """A config of a family, small enough to make at once."""
    text, vision = dict(_TEXT), dict(_VISION)
    if family in ("siglip", "siglip2"):
        text["projection_size"] = 32
        if family == "siglip2":
            vision["num_patches"] = 16
    if family == "altclip":
        text |= {"project_dim": 32, "max_position_embeddings": 70, "type_vocab_size": 1}
    if family == "chinese_clip":
        text |= {"type_vocab_size": 2, "eos_token_id": None}
    if family == "align":
        vision = {
            "image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32,
            "in_channels": [16], "out_channels": [32], "strides": [1], "kernel_sizes": [3], "expand_ratios": [1],
            "num_block_repeats": [1], "depthwise_padding": [], "squeeze_expansion_ratio": 0.25,
        }  # fmt: skip
    if family == "vision-text-dual-encoder":
        from transformers import BertConfig, VisionTextDualEncoderConfig, ViTConfig

        text_config = BertConfig(**{k: v for k, v in text.items() if k not in ("projection_dim", "eos_token_id")})
        vision_config = ViTConfig(**{k: v for k, v in vision.items() if k != "projection_dim"})
        return VisionTextDualEncoderConfig.from_vision_text_configs(vision_config, text_config, projection_dim=16)
    dim = 8 if family == "align" else 16  # ALIGN's image embedding has the tower's own size
    options: dict[str, Any] = {"text_config": text, "vision_config": vision, "projection_dim": dim}
    if family == "blip":
        options["image_text_hidden_size"] = 16
    return AutoConfig.for_model(family, **options)


def tiny_images(family: str) -> dict[str, Any]:
    """What three prepared pictures are for it."""
    if family == "siglip2":
        return {
            "pixel_values": torch.randn(3, 16, 8 * 8 * 3),
            "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * 3),
        }
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_of_the_family(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(family)).eval()
    row = family_of(model)
    with torch.no_grad():  # untrained scales and biases are too plain to tell formulas apart
        for name, value in (("logit_bias", -3.0), ("logit_scale", 1.7), ("temperature", 0.6)):
            if hasattr(model, name):
                getattr(model, name).fill_(value)
    ids = torch.randint(3, 99, (4, 64 if row.text_length else 9))
    ids[:, -1] = 2
    text: dict[str, Any] = {"input_ids": ids}
    if row.attention_mask:
        text["attention_mask"] = torch.ones_like(ids)
    images = tiny_images(family)
    with torch.no_grad():
        expected = model(**images, **text)
        expected = expected.logits_per_image
        image_embeds = pooled(image_features(model, images))
        text_embeds = pooled(model.get_text_features(**text))
    scale, bias = score_parameters(model)
    logits = scale * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T + bias
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_other_models_are_refused() -> None:
    with pytest.raises(BaseModelError, match="'bert'"):
        family_of(AutoConfig.for_model("bert"))


def test_the_image_tower_alone_is_the_same(
    base: str, pixel_values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    whole = CLIPModel.from_pretrained(base, dtype=torch.float32)
    tower = load_image_tower(base, revision=None, dtype=torch.float32, hub_kwargs={}, attn_implementation=None)
    assert tower is not None
    with torch.no_grad():
        expected = pooled(image_features(whole, {"pixel_values": pixel_values}))
        found = pooled(image_features(tower, {"pixel_values": pixel_values}))
    assert torch.equal(found, expected)
    modules = list(tower.modules())
    assert len({id(module._forward_hooks) for module in modules}) == len(modules)  # a hook on one layer is on one layer
    assert len({id(parameter) for parameter in tower.parameters()}) == len(list(tower.parameters()))
