"""A classifier as one module: everything a head may have is in its linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import TINY_FAMILIES, tagger

from taskres_hf.errors import ConfigurationError
from taskres_hf.export.fused import FusedClassifier, FusedHead
from taskres_hf.residual import TaskResClassifier

Tiny = Callable[..., Any]


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("what", ["zero-shot", "residual", "image side", "enhanced base", "all of format 3"])
def test_logits_are_those_of_the_head(what: str, strength: float) -> None:
    torch.manual_seed(0)
    head = TaskResClassifier(
        10 * torch.randn(5, 16), 0.7, 90.0, -4.0, "image" if what == "image side" else "text"
    ).requires_grad_(False)
    if what in ("residual", "image side", "enhanced base"):
        head.residual.copy_(torch.randn_like(head.residual))
    if what == "enhanced base":
        head.shift = torch.randn(5, 16)
    if what == "all of format 3":
        head.set_weight(torch.randn(5, 16), class_bias=torch.randn(5), normalize_weight=False, logit_scale_factor=0.3)
    head.strength = strength
    embeds = 3 * torch.randn(9, 16)
    logits, probabilities = FusedHead(head)(embeds)
    torch.testing.assert_close(logits, head(embeds), atol=1e-4, rtol=0)
    torch.testing.assert_close(probabilities, head(embeds).softmax(dim=1), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if name != "siglip2"])  # pictures as patches
def test_every_family_of_plain_pixels(tiny: Tiny, family: str) -> None:
    model, pixels = tiny(family), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(FusedClassifier(model)(pixels)[0], model(pixels).logits, atol=1e-4, rtol=0)


def test_the_model_stays_as_it_is(tiny: Tiny) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = FusedClassifier(model, half=True)
    assert next(half.base.parameters()).dtype == torch.float16
    assert half.head.linear.weight.dtype == torch.float32
    assert not any("text" in name for name in half.state_dict())  # which would be exported with it
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.clip.dtype == torch.float32


def test_what_cannot_be_exported_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigurationError, match="spatial_shapes"):
        FusedClassifier(tiny("siglip2"))
    model = tiny()
    model.clip.vision_model.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match="hook"):
        FusedClassifier(model)
    model = tiny()
    model.clip.visual_projection.to("meta")
    with pytest.raises(ConfigurationError, match="visual_projection"):
        FusedClassifier(model)


def test_several_labels_per_picture_have_a_probability_each(tiny: Tiny) -> None:
    model, pixels = tagger(tiny(names=["a", "b", "c", "d"])), torch.randn(5, 3, 32, 32)
    fused = FusedClassifier(model)
    with torch.no_grad():
        logits, probabilities = fused(pixels)
        torch.testing.assert_close(probabilities, model(pixels).logits.sigmoid(), atol=1e-5, rtol=0)
    given = fused.head.given(logits)
    assert torch.equal(given, probabilities >= 0.4)
    assert len(given.sum(dim=1).unique()) > 1 or int(given.sum()) not in (len(pixels), 0)
    model.classifier.reset()
    with pytest.raises(ConfigurationError, match="is not trained"):
        FusedClassifier(model)
