"""Products by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskres_hf.embedding.engines import onednn as engine
from taskres_hf.embedding.engines.onednn import (
    Int8,
    Int8Linear,
    PackedLinear,
    in_bytes,
    onednn,
    onednn_int8,
)

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
    found = Int8Linear(layer.weight, layer.bias, 1 / 32, 128, 10)(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found = Int8Linear(layer.weight, layer.bias, 1 / 32, 128, 10, ("gelu", "none"))(inputs)
    torch.testing.assert_close(found, nn.functional.gelu(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [768, 25, 1])
def test_the_bytes_of_two_neighbours_fit_16_bits_with_finer_steps_than_7_bits(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "onednn_int8", lambda: Int8(None, None, True))
    weight = torch.randn(500, width, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = 1  # the worst there is: 7 bits
    weight[3, : width // 2] = -127.5
    rounded, steps = in_bytes(weight)
    assert (rounded * steps - weight).abs().max() <= 0.51 * steps.max()
    sums = nn.functional.pad(rounded, (0, width % 2)).unflatten(1, (-1, 2)).int()
    for sign in (1, -1):
        assert 255 * (sign * sums).clamp(min=0).sum(-1).max() <= 32767
    if width > 25:
        assert (steps[4:] < weight[4:].abs().amax(dim=1, keepdim=True) / 64).float().mean() > 0.99
