"""The large products of a frozen tower in int8, without pictures to calibrate on.

Bytes are too coarse for what layers read as they are: a few channels are far larger than all others. Rotated by an
orthogonal, symmetric Q with Q 1 = 1, none is. LN(h Q) = LN(h) Q, since means and lengths stay, so the whole residual
stream can be rotated by rotating weights: at no cost, and exactly (as QuaRot, arXiv 2404.00456, does for language
models). What a layer then reads has variance one and no outliers, and one fixed range fits it. What the second product
of an MLP reads has outliers, so every token has its own range. No picture's embedding depends on another's.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .onednn import ACTIVATIONS, LINEAR, Int8Linear, factored, frozen_linear, product

_RANGE = 4.0  # standard deviations that bytes reach to: the error of coarser steps and of clipping are least there
_ZERO = 128  # the byte for 0
_WIDE = 512  # values of a token from which rotating them at once would take long


class Rotation(nn.Module):
    """Vectors [..., D] times Q [D, D], symmetric and orthogonal, whose rows sum to one and have no large entry.

    Q of a wide tower is the Kronecker product of a matrix of halves [4, 4] and a mixing one [D / 4, D / 4]: as even,
    and a fraction of a layer's work.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        parts = 4 if width % 4 == 0 and width >= _WIDE else 1
        self.halves, self.mixing = 2 / parts - torch.eye(parts), _mixing(width // parts)

    def forward(self, vectors: Tensor) -> Tensor:
        mixed = product(vectors.reshape(-1, len(self.mixing)), self.mixing)
        return torch.matmul(self.halves, mixed.view(-1, len(self.halves), len(self.mixing))).view(vectors.shape)


def _mixing(width: int) -> Tensor:
    """The cosine transform, some waves reversed, and back: symmetric, orthogonal, and the constant wave stays."""
    order = torch.arange(width, dtype=torch.float64)
    waves = torch.cos(math.pi / width * order[:, None] * (order + 0.5)) * math.sqrt(2 / width)
    waves[0] = 1 / math.sqrt(width)
    signs = 2.0 * torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) - 1
    signs[0] = 1
    return ((waves.T * signs.double()) @ waves).float()


def rotate_layer(layer: Any, rotation: Rotation, enter: bool, leave: bool) -> None:
    """Let a `rewriting.Layer` work on a residual stream times Q, in place; what it shares with others stays as it is.

    Args:
        layer: the layer. enter, leave: whether what comes in is not yet rotated, and what goes out no longer.
    """
    for name, module in list(layer.named_children()):
        if name == "out_proj":
            layer.out_proj = _writes(module, rotation)
        elif type(module) in LINEAR:
            setattr(layer, name, _reads(module, layer.layer_norm1, rotation))
    mlp = copy.copy(layer.mlp)
    parts = {"fc1": _reads(mlp.fc1, layer.layer_norm2, rotation), "fc2": _writes(mlp.fc2, rotation)}
    mlp._modules = {**mlp._modules, **parts}
    layer.mlp = mlp
    for name in ("layer_norm1", "layer_norm2"):
        norm = getattr(layer, name)
        setattr(layer, name, nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))
    layer.rotate_in, layer.rotate_out = rotation if enter else None, rotation if leave else None


def _reads(layer: Any, norm: Any, rotation: Rotation) -> nn.Linear:
    """The linear layer, with scale and shift of the norm before it, for inputs times Q."""
    weight = layer.weight.detach()
    bias = weight @ norm.bias.detach()
    if layer.bias is not None:
        bias = bias + layer.bias.detach()
    return frozen_linear(rotation(weight * norm.weight.detach()), bias)


def _writes(layer: Any, rotation: Rotation) -> nn.Linear:
    """The linear layer, for outputs times Q."""
    bias = None if layer.bias is None else rotation(layer.bias.detach())
    return frozen_linear(rotation(layer.weight.detach().T).T.contiguous(), bias)


def int8_parts(layer: Any, rows: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """What takes the place of a rotated `rewriting.Layer`'s children: norms that give bytes, products that take them.

    `dtype` is that of queries, keys and values.
    """
    return {
        "layer_norm1": Int8Norm(layer.layer_norm1),
        "qkv": Int8Linear(layer.qkv.weight, layer.qkv.bias, _RANGE / 127, _ZERO, rows, dtype),
        "layer_norm2": Int8Norm(layer.layer_norm2),
        "mlp": Int8Mlp(layer.mlp, rows),
    }


class Int8Norm(nn.Module):
    """A layer norm without scale and shift, as bytes that reach to `_RANGE` standard deviations."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.scale = torch.full(self.shape, 127 / _RANGE)
        self.shift = torch.full(self.shape, _ZERO + 0.5)  # half, as making bytes of them cuts off

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(hidden_states, self.shape, self.scale, self.shift, self.eps).clamp_(1, 255).to(torch.uint8)


class Int8Mlp(nn.Module):
    """An MLP (`fc1`, `activation_fn`, `fc2`) of the bytes of `Int8Norm`; every token has an inner range of its own."""

    def __init__(self, mlp: Any, rows: int) -> None:
        super().__init__()
        name, variant, factor, self.lowest = ACTIVATIONS[type(mlp.activation_fn).__name__]
        first, second = factored(mlp, factor)
        step, activation = _RANGE / 127, (name, variant)
        self.fc1 = Int8Linear(first.weight, first.bias, step, _ZERO, rows, torch.float32, activation)
        self.fc2 = Int8Linear(second.weight, None, 1.0, 0, rows, torch.float32)
        self.shift = second.weight.sum(dim=1) * self.lowest  # bytes count from the lowest value
        if second.bias is not None:
            self.shift = self.shift + second.bias

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.fc1(inputs)
        span = (hidden.amax(dim=-1, keepdim=True) - self.lowest).clamp_min_(1e-6)
        steps = 254 / span
        hidden = hidden.mul_(steps).add_(0.5 - self.lowest * steps).to(torch.uint8)
        return self.fc2(hidden).mul_(span / 254).add_(self.shift)  # type: ignore[no-any-return]
