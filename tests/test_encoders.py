"""Every family of dual encoders gives the logits of its own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tiny_config, tiny_images
from transformers import AutoConfig, AutoModel, CLIPModel

from taskres_hf.base_formats import BaseSource
from taskres_hf.base_model import load_image_tower
from taskres_hf.embedding.engines import onednn as linear
from taskres_hf.encoders import image_features, pooled, score_parameters
from taskres_hf.errors import BaseModelError
from taskres_hf.families import FAMILIES, family_of


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
    side = load_image_tower(BaseSource(base))
    assert side is not None
    tower = side.base
    with torch.no_grad():
        expected = pooled(image_features(whole, {"pixel_values": pixel_values}))
        found = pooled(image_features(tower, {"pixel_values": pixel_values}))
    assert torch.equal(found, expected)
    modules = list(tower.modules())
    assert len({id(module._forward_hooks) for module in modules}) == len(modules)  # a hook on one layer is on one layer
    assert len({id(parameter) for parameter in tower.parameters()}) == len(list(tower.parameters()))
