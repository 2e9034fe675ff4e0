"""Products by oneDNN against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from taskres_hf import TaskResCLIPForImageClassification, linear
from taskres_hf.linear import Int8Linear, OneDnnLinear, PackedLinear, in_bytes, onednn, onednn_int8

Model = TaskResCLIPForImageClassification
needs_onednn = pytest.mark.skipif(onednn(torch.float32) is None, reason="this torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (0, 24), (1, 1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplied_by_onednn_gives_what_it_gave(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape)
    expected = layer(inputs)
    packed = PackedLinear(layer.weight, layer.bias, torch.float32, 10, inner=True)
    torch.testing.assert_close(packed(inputs), expected, atol=1e-5, rtol=1e-5)
    layer.__class__ = OneDnnLinear
    torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_quickened_model_is_still_the_model(base: str, pixel_values: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients, dtypes and tracing are as before; only who multiplies differs."""
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    plain = Model.from_base(base, ["a", "b"])
    assert not any(type(module) is OneDnnLinear for module in plain.modules())
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)
    model = Model.from_base(base, ["a", "b"])
    quick = [module for module in model.clip.modules() if type(module) is OneDnnLinear]
    assert len(quick) > 20
    assert model.clip.state_dict().keys() == plain.clip.state_dict().keys()
    expected = plain(pixel_values=pixel_values).logits
    torch.testing.assert_close(model(pixel_values=pixel_values).logits, expected, atol=1e-3, rtol=1e-4)

    calls: list[int] = []
    real = onednn(torch.float32)
    assert real is not None
    monkeypatch.setattr(linear, "onednn", lambda dtype: (real[0], lambda *a: calls.append(1) or real[1](*a)))
    with torch.no_grad():
        model(pixel_values=pixel_values)
    assert len(calls) >= 20  # it is used
    calls.clear()
    pixels = pixel_values.clone().requires_grad_()
    model.clip.get_image_features(pixel_values=pixels).pooler_output.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(pixel_values=pixel_values[:1])
    with torch.no_grad():
        traced = torch.jit.trace(quick[0], torch.randn(2, quick[0].in_features), check_trace=False)
    assert "mkldnn" not in str(traced.graph)
    copy.deepcopy(model).to(torch.bfloat16)(pixel_values=pixel_values)
    compiled = torch.compile(quick[0], backend="eager", fullgraph=True)
    compiled(torch.randn(2, quick[0].in_features))
    assert not calls  # all of that took torch's own way


@pytest.mark.skipif(onednn_int8() is None, reason="this processor or this torch has no int8 products")
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_bytes_is_that_of_what_they_stand_for(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    layer.weight[3] = 0  # a row without a step
    inputs = torch.randint(0, 256, shape, dtype=torch.uint8)
    rounded, steps = in_bytes(layer.weight)
    assert (rounded * steps - layer.weight).abs().max() <= 0.51 * steps.max()
    expected = nn.functional.linear((inputs.float() - 128) / 32, rounded * steps, layer.bias)
    found = Int8Linear(layer.weight, layer.bias, 1 / 32, 128, 10, torch.float32)(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found = Int8Linear(layer.weight, layer.bias, 1 / 32, 128, 10, torch.float32, ("gelu", "none"))(inputs)
    torch.testing.assert_close(found, nn.functional.gelu(expected), atol=1e-4, rtol=1e-4)
