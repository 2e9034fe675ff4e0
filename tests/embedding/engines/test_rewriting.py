"""A rewritten image tower against the one it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import tiny_config, tiny_images
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines import onednn as linear
from taskres_hf.embedding.engines import rewriting as towers
from taskres_hf.embedding.engines.choose import make_engine
from taskres_hf.embedding.engines.onednn import Rotation, onednn, onednn_int8, rotate_layer
from taskres_hf.embedding.engines.rewriting import (
    Layer,
    packed_mlp,
    rewritten,
)
from taskres_hf.encoders import FAMILIES, encode_images
from taskres_hf.errors import ConfigurationError

Model = TaskResCLIPForImageClassification
REWRITABLE = sorted(name for name, family in FAMILIES.items() if family.clip_layers)
READ_FIRST_TOKEN = sorted(name for name, family in FAMILIES.items() if family.reads_first_token)
needs_int8 = pytest.mark.skipif(onednn_int8() is None, reason="this processor or this torch has no int8 products")


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "altclip", "chinese_clip", "siglip", "blip"])
def test_the_last_layer_works_only_for_the_token_that_is_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AutoModel.from_config(tiny_config(family)).eval()
    seen: list[int] = []
    last = base.vision_model.encoder.layers[-1]
    short = family in READ_FIRST_TOKEN and Layer.fits(last)
    assert short or family != "clip"

    class Norm(nn.LayerNorm):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs.shape[1])
            return super().forward(inputs)

    last.layer_norm2.__class__ = Norm
    with torch.no_grad():
        encode_images(base, tiny_images(family))
        make_engine(base, "torch", "fp32")(tiny_images(family))
    assert seen == [17, 1] if short else seen[0] == seen[1] >= 16


def test_a_model_that_showed_its_hidden_states_is_rewritten_too(model: Model, pixel_values: Tensor) -> None:
    """transformers leaves hooks on its layers from then on."""
    with torch.no_grad():
        model.clip.vision_model(pixel_values=pixel_values, output_hidden_states=True)
    assert all(map(Layer.fits, model.clip.vision_model.encoder.layers))
    model.clip.vision_model.encoder.layers[0].register_forward_pre_hook(lambda *a: None)
    assert not Layer.fits(model.clip.vision_model.encoder.layers[0])


@pytest.mark.skipif(onednn(torch.float32) is None, reason="this torch was built without oneDNN")
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_an_activation_within_the_product_is_the_activation(activation: str) -> None:
    module = CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=48, hidden_act=activation)).requires_grad_(
        False
    )
    inputs = 4 * torch.randn(2, 7, 24)
    expected = module(inputs)
    packed = packed_mlp(module, torch.float32, 14)
    assert packed is not None
    module._modules = packed
    torch.testing.assert_close(module(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(onednn(torch.float32) is None, reason="this torch was built without oneDNN")
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_mlp_of_another_kind_is_left_alone(activation: str) -> None:
    module = CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=48, hidden_act=activation))
    assert packed_mlp(module, torch.float32, 14) is None
    assert packed_mlp(nn.Sequential(nn.Linear(2, 2)), torch.float32, 14) is None


@pytest.mark.parametrize("family", READ_FIRST_TOKEN)
def test_no_keys_or_values_are_computed_for_one_token(family: str) -> None:
    """The last layer's embedding of the first token, with biases and scales that matter."""
    torch.manual_seed(0)
    base, inputs = AutoModel.from_config(tiny_config(family)).eval(), tiny_images(family)
    with torch.no_grad():
        for parameter in base.vision_model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = encode_images(base, inputs)
        found = encode_images(rewritten(base), inputs)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


# ---------------------------------------------------------------------- int8


@pytest.mark.parametrize("width", [1, 7, 24, 192, 768, 1024])
def test_rotating_is_a_rotation_that_keeps_means(width: int) -> None:
    rotation = Rotation(width)
    vectors = torch.randn(3, 5, width)
    rotated = rotation(vectors)
    torch.testing.assert_close(rotated.mean(-1), vectors.mean(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rotated.norm(dim=-1), vectors.norm(dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotation(rotated), vectors, atol=1e-4, rtol=1e-4)  # its own inverse
    if width >= 192:  # one large channel becomes many small ones
        assert rotation(torch.eye(width)).abs().max() <= 5 / width**0.5


@pytest.mark.parametrize("family", REWRITABLE)
def test_a_rotated_tower_is_the_same_tower(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What int8 rounds is, before it is rounded, exactly what was there."""
    torch.manual_seed(0)
    base, inputs = AutoModel.from_config(tiny_config(family)).eval(), tiny_images(family)
    if not Layer.fits(base.vision_model.encoder.layers[0]):
        pytest.skip("this family's layers return a tuple in this version of transformers, so they are not rewritten")
    with torch.no_grad():
        for parameter in base.vision_model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        before = {name: value.clone() for name, value in base.state_dict().items()}
        expected = encode_images(base, inputs)
        clone = rewritten(base)
        layers = clone.vision_model.encoder.layers
        rotation = Rotation(base.config.vision_config.hidden_size)
        for layer in layers:
            rotate_layer(layer, rotation, enter=layer is layers[0], leave=layer is layers[-1])
        found = encode_images(clone, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@needs_int8
@pytest.mark.parametrize("family", REWRITABLE)
def test_int8_is_close_even_with_channels_far_larger_than_the_rest(family: str) -> None:
    torch.manual_seed(0)
    base, inputs = AutoModel.from_config(tiny_config(family)).eval(), tiny_images(family)
    with torch.no_grad():
        for layer in base.vision_model.encoder.layers:
            layer.mlp.fc2.bias[3] += 20.0
            layer.layer_norm1.weight[3] = layer.layer_norm2.weight[3] = 0.02  # as trained towers answer it
        expected = encode_images(base, inputs)
        found = encode_images(rewritten(base, torch.int8), inputs)
    assert ((found - expected).norm() / expected.norm()) < 0.03


@needs_int8
def test_in_int8_a_picture_does_not_depend_on_its_neighbours(model: Model, splits: Any) -> None:
    pictures = [row["image"].convert("RGB") for row in splits["test"].select(range(9))]
    embedder = Embedder(model.clip, model.image_processor, "torch", "int8")
    alone = torch.cat([embedder([picture]) for picture in pictures])
    torch.testing.assert_close(embedder(pictures), alone, atol=1e-2 * float(alone.abs().max()), rtol=0)


def test_where_int8_does_not_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("openvino", "onnxruntime"):
        with pytest.raises(ConfigurationError, match="engine='torch'"):
            make_engine(model.clip, engine, "int8")
    monkeypatch.setattr(towers, "onednn_int8", lambda: linear.Int8(None, None, False))
    with pytest.raises(ConfigurationError, match="family"):
        make_engine(AutoModel.from_config(tiny_config("blip")), precision="int8")
    with pytest.raises(ConfigurationError, match="not in fp32"):
        make_engine(copy.deepcopy(model.clip).to(torch.bfloat16), precision="int8")
    watched = copy.deepcopy(model.clip)
    watched.vision_model.encoder.layers[1].register_forward_hook(lambda *a: None)
    with pytest.raises(ConfigurationError, match="not plain CLIP layers"):
        make_engine(watched, precision="int8")
    monkeypatch.setattr(towers, "onednn_int8", lambda: None)
    with pytest.raises(ConfigurationError, match=r"no int8 products.*precision='auto'"):
        make_engine(model.clip, precision="int8")


def test_int8_is_taken_only_where_the_largest_sums_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without VNNI cuts off sums of two products that 16 bits do not hold."""
    probe = linear.onednn_int8.__wrapped__

    def cut_off(x: Tensor, step: float, zero: int, weight: Tensor, *rest: Any) -> Tensor:
        products = x[:, None].int() * weight[None]
        return products.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767).sum(-1).float()

    def other_pairs(x: Tensor, step: float, zero: int, weight: Tensor, *rest: Any) -> Tensor:
        return cut_off(x, step, zero, weight.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).flatten(1), *rest)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda weight, shape: weight)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", cut_off)
    found = probe()
    assert found is not None
    assert found.in_pairs
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", other_pairs)
    assert probe() is None
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *a: cut_off(*a).clamp(max=1e6))
    assert probe() is None


@needs_int8
def test_int8_with_bytes_for_pairs_is_close(model: Model, splits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = linear.int8_products()
    keys = []
    for in_pairs in (False, True):
        monkeypatch.setattr(linear, "onednn_int8", lambda in_pairs=in_pairs: known._replace(in_pairs=in_pairs))
        keys.append(Embedder(model.clip, model.image_processor, "torch", "int8").key)
    assert keys[0] != keys[1]  # a cache that machines share does not mix the two
    pictures = [row["image"].convert("RGB") for row in splits["test"].select(range(20))]
    expected = Embedder(model.clip, model.image_processor)(pictures)
    found = Embedder(model.clip, model.image_processor, "torch", "int8")(pictures)
    mean = expected.mean(dim=0)
    assert torch.cosine_similarity(found - mean, expected - mean).min() > 0.99
