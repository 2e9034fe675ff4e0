"""Products of frozen matrices, and linear layers of a frozen tower, multiplied by oneDNN: in fp32, bf16 or int8.

torch multiplies fp32 on a CPU with MKL, which is slower on processors that it does not know, and lays a bf16 weight out
anew at each call. oneDNN comes with torch and does neither. Its operators are those that
`torch.compile` calls; they are tried before they are used, and without them torch's own product stays.

int8 takes no pictures to calibrate on. Bytes are too coarse for what layers read as they are: a few channels are far
larger than all others. Rotated by an orthogonal, symmetric Q with Q 1 = 1, none is. LN(h Q) = LN(h) Q, since means and
lengths stay, so the whole residual stream can be rotated by rotating weights: at no cost, and exactly (as QuaRot, arXiv
2404.00456, does for language models). What a layer then reads has variance one and no outliers, and one fixed range
fits it. What the second product of an MLP reads has outliers, so every token has its own range. No picture's embedding
depends on another's.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...machine import measured, times_faster

_FASTER = 1.1  # times as fast, from which a change of the library pays
_ROWS, _WIDTH = 256, 512  # of a step of training: pictures, and classes of as many dimensions


@cache
def onednn(dtype: torch.dtype) -> tuple[Any, Any] | None:
    """oneDNN's layout and product of a linear layer in this dtype, or None where torch or the processor lacks them."""
    inputs, weight = torch.ones(3, 5, 8, dtype=dtype), torch.eye(8, dtype=dtype)[:4]
    try:
        layout, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        result = multiply(inputs, layout(weight, 15), None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return (layout, multiply) if torch.equal(result, F.linear(inputs, weight)) else None


class Int8(NamedTuple):
    """oneDNN's layout and product of unsigned with signed bytes, and whether two products are first added in 16 bits.

    Processors without VNNI instructions do so. 16 bits hold 255 times the sum of two neighbouring weights up to 128.
    """

    layout: Any
    multiply: Any
    in_pairs: bool


@cache
def onednn_int8() -> Int8 | None:
    """Products of bytes, or None where torch or the processor lacks them, or gets the largest sums wrong."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    try:
        operators = torch.ops.onednn.qlinear_prepack, torch.ops.onednn.qlinear_pointwise
        for found in (Int8(*operators, False), Int8(*operators, True)) if vnni else (Int8(*operators, True),):
            if _is_right(found):
                return found
    except (AttributeError, NotImplementedError, RuntimeError):
        pass
    return None


def _is_right(int8: Int8) -> bool:
    """Whether sums of the largest products, of either sign, come out exactly."""
    inputs, signs = torch.full((32, 256), 255, dtype=torch.uint8), torch.ones(64, dtype=torch.int8)
    signs[::2] = -1
    largest = torch.full((64, 256), 127, dtype=torch.int8)
    if int8.in_pairs:  # of uneven parts, so that any other two than neighbours would not fit
        parts = torch.randint(1, 128, (64, 128), generator=torch.Generator().manual_seed(0))
        largest = torch.stack((parts, 128 - parts), dim=-1).flatten(1).to(torch.int8)
    weight = int8.layout(signs[:, None] * largest, [32, 256])
    scales, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    sums = int8.multiply(inputs, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return torch.equal(sums, (255.0 * largest.sum(dim=1) * signs).expand(32, 64))


def int8_products() -> Int8:
    """Products of bytes, where they were found before."""
    found = onednn_int8()
    assert found is not None, "the caller has looked for int8 products"
    return found


def int8_variant() -> str:
    """Tells embeddings by weights that are rounded for pairs from those by whole bytes; empty for these."""
    return " weights in pairs" if int8_products().in_pairs else ""


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies matrices in fp32 faster here than what torch does it with, as it was measured.

    torch takes MKL, where it has it, which is slower on processors that it does not know.
    """
    return measured("products by oneDNN", _speed_of_onednn) >= _FASTER


def _speed_of_onednn() -> float:
    operators = onednn(torch.float32)
    if operators is None:
        return 0.0
    rows, columns = (torch.rand(size, _WIDTH, generator=torch.Generator().manual_seed(0)) for size in (_ROWS, _WIDTH))
    return times_faster(lambda: operators[1](rows, columns, None, "none", [], ""), lambda: torch.mm(rows, columns.T))


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` of two matrices outside autograd, by oneDNN where that is faster."""
    fits = rows.dtype == columns.dtype == torch.float32 and rows.is_cpu and columns.is_cpu
    operators = onednn(torch.float32) if fits and onednn_is_faster() else None
    if operators is None:
        return torch.mm(rows, columns.T)
    result: Tensor = operators[1](rows, columns, None, "none", [], "")
    return result


LINEAR = (nn.Linear,)  # exactly this: a subclass (LoRA, 8 bit) is more than its weight


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these very tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer


class PackedLinear(nn.Module):
    """A frozen linear layer, its weight copied and laid out once for oneDNN, that multiplies in fp32 or bf16.

    A bf16 result goes back to fp32 before it is added to the residual stream, which like the normalisations stays in
    fp32: as fast as a tower wholly in bf16, with a fraction of its error. Queries, keys, values and the hidden layer
    (`inner`) stay in bf16, as the next product takes them. `activation` is applied within the product: oneDNN's name
    of it, and its variant.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rows: int,
        inner: bool,
        activation: tuple[str, str] = ("none", ""),
    ) -> None:
        super().__init__()
        self.dtype, self.inner, self.activation = dtype, inner, activation
        self.bias = None if bias is None else bias.detach().to(dtype)
        operators = onednn(dtype) if weight.device.type == "cpu" else None
        weight = weight.detach().to(dtype)
        self.weight = weight if operators is None else operators[0](weight, rows)
        self.multiply = None if operators is None else operators[1]

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype)
        if self.multiply is None:
            outputs = F.linear(inputs, self.weight, self.bias)
        else:
            outputs = self.multiply(inputs, self.weight, self.bias, self.activation[0], [], self.activation[1])
        return outputs if self.inner else outputs.float()


def in_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, D] as signed bytes [N, D] times steps [N, 1].

    Where products are added in pairs, the sum of two neighbours has no more steps than the largest weight: few rows
    have two large ones side by side, so steps are finer than if every weight had 7 bits.
    """
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    largest = torch.maximum(high, -low)
    if int8_products().in_pairs:
        sums = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2)).sum(dim=-1)
        largest = torch.maximum(largest, sums.abs().amax(dim=1, keepdim=True))
    steps = largest.clamp_min_(torch.finfo(torch.float32).tiny) / 127
    return (weight / steps).round_().to(torch.int8), steps


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is rounded to signed bytes, each of its rows by its own step.

    Takes unsigned bytes that stand for `step * (byte - zero)` and gives fp32, with `activation` as in `PackedLinear`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        step: float,
        zero: int,
        rows: int,
        activation: tuple[str, str] = ("none", ""),
    ) -> None:
        super().__init__()
        layout, self.multiply, _ = int8_products()
        rounded, steps = in_bytes(weight)
        self.weight = layout(rounded, [rows, weight.shape[1]])
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.quantisation = (step, zero, self.weight, steps.flatten(), zeros, bias, 1.0, 0, torch.float32)
        self.activation: tuple[str, list[Any], str] = (activation[0], [], activation[1])

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.multiply(inputs, *self.quantisation, *self.activation)
        return outputs


# What oneDNN can apply within a product: its name and variant, the factor its input needs and its output has, and the
# lowest value it gives. quick_gelu(z) = z sigmoid(1.702 z) = swish(1.702 z) / 1.702.
ACTIVATIONS = {
    "QuickGELUActivation": ("swish", "", 1.702, -0.2785),
    "GELUActivation": ("gelu", "none", 1.0, -0.1701),
    "GELUTanh": ("gelu", "tanh", 1.0, -0.1701),
    "PytorchGELUTanh": ("gelu", "tanh", 1.0, -0.1701),
}


def factored(mlp: Any, factor: float) -> tuple[nn.Linear, nn.Linear]:
    """`fc1` and `fc2` of an MLP for an activation whose input is, and whose output is not, times a factor."""
    bias = None if mlp.fc1.bias is None else mlp.fc1.bias.detach() * factor
    second = None if mlp.fc2.bias is None else mlp.fc2.bias.detach()
    return (
        frozen_linear(mlp.fc1.weight.detach() * factor, bias),
        frozen_linear(mlp.fc2.weight.detach() / factor, second),
    )


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


def int8_parts(layer: Any, rows: int) -> dict[str, nn.Module]:
    """What takes the place of a rotated `rewriting.Layer`'s parts: norms that give bytes, products that take them."""

    def reads(part: nn.Linear) -> Int8Linear:
        return Int8Linear(part.weight, part.bias, _RANGE / 127, _ZERO, rows)

    return {
        "layer_norm1": Int8Norm(layer.layer_norm1),
        "q_proj": reads(layer.q_proj),
        "k_proj": reads(layer.k_proj),
        "v_proj": reads(layer.v_proj),
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
        self.fc1 = Int8Linear(first.weight, first.bias, step, _ZERO, rows, activation)
        self.fc2 = Int8Linear(second.weight, None, 1.0, 0, rows)
        self.shift = second.weight.sum(dim=1) * self.lowest  # bytes count from the lowest value
        if second.bias is not None:
            self.shift = self.shift + second.bias

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.fc1(inputs)
        span = (hidden.amax(dim=-1, keepdim=True) - self.lowest).clamp_min_(1e-6)
        steps = 254 / span
        hidden = hidden.mul_(steps).add_(0.5 - self.lowest * steps).to(torch.uint8)
        return self.fc2(hidden).mul_(span / 254).add_(self.shift)  # type: ignore[no-any-return]
