"""What is found out about towers by watching them, and work in parts."""

from __future__ import annotations

import pytest
import torch
from support import TINY_FAMILIES, tiny_config, tiny_images
from transformers import AutoModel

from taskres_hf.encoders import FAMILIES, image_features
from taskres_hf.methods.towers import attention_projections, in_parts, text_rows, token_embedding

# Matrices of the image tower, where it is not two layers of three: convolutions; one matrix for all three; keys and
# values of the pooling beside them; a third layer and the groups.
OTHERS = {"align": 0, "blip": 0, "aimv2": 8, "groupvit": 21}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_layers_of_every_family(family: str) -> None:
    """Two layers a tower, three matrices each, unless `OTHERS` says otherwise; and the one layer of words."""
    model = AutoModel.from_config(tiny_config(family)).eval()
    ids = torch.randint(3, 99, (4, 64 if FAMILIES[family].text_length else 9))
    ids[:, -1] = 2
    tokens = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if FAMILIES[family].attention_mask else {})
    text = attention_projections(model, lambda: text_rows(model, tokens))
    image = attention_projections(model, lambda: image_features(model, tiny_images(family)))
    assert (len(text), len(image)) == (6, OTHERS.get(family, 6))
    assert all(name.startswith("text_model.") for name in text)
    assert all(name.startswith("image_model." if family == "flava" else "vision_model.") for name in image)
    assert len({name.rpartition(".")[2] for name in text}) == 3
    assert token_embedding(model, tokens).num_embeddings == 99
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("at_once", [1, 3, 7, 8])
def test_parts_have_the_gradient_of_the_whole(at_once: int) -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(7, 5, dtype=torch.float64)
    sizes = []

    def embed(part: slice) -> torch.Tensor:
        sizes.append(len(inputs[part]))
        return torch.tanh(inputs[part] @ weight)

    whole = torch.tanh(inputs @ weight)
    (expected,) = torch.autograd.grad(whole.pow(2).sum(), weight)
    rows = in_parts(embed, 7, at_once)
    (found,) = torch.autograd.grad(rows.pow(2).sum(), weight)
    assert torch.equal(rows, whole)
    torch.testing.assert_close(found, expected)
    assert max(sizes) <= at_once
    with torch.no_grad():
        assert torch.equal(in_parts(embed, 7, at_once), whole)
