"""Products of frozen matrices, and linear layers of a frozen tower, multiplied by oneDNN: in fp32, bf16 or int8.

torch multiplies fp32 on a CPU with MKL, which runs at half of its speed on processors of another maker than Intel, and
lays a bf16 weight out anew at each call. oneDNN comes with torch and does neither. Its operators are those that
`torch.compile` calls; they are tried before they are used, and without them torch's own product stays.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


@cache
def onednn_int8() -> tuple[Any, Any] | None:
    """oneDNN's layout and product of unsigned with signed bytes, or None where torch or the processor lacks them.

    The largest bytes are tried: without VNNI instructions sums of two products would overflow.
    """
    inputs, weight = torch.full((2, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    scales, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    try:
        layout, multiply = torch.ops.onednn.qlinear_prepack, torch.ops.onednn.qlinear_pointwise
        laid_out = layout(weight, [2, 64])
        sums = multiply(
            inputs, 1.0, 0, laid_out, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return (layout, multiply) if supported() and bool((sums == 64 * 255 * 127).all()) else None


@cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies fp32 with MKL on a processor that MKL does not know."""
    maker = os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
    if not maker:
        try:
            maker = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
        except OSError:
            return False
    return torch.backends.mkl.is_available() and "AuthenticAMD" in maker and onednn(torch.float32) is not None


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` of two matrices outside autograd, by oneDNN where MKL is slow."""
    operators = onednn(torch.float32) if mkl_is_slow() else None
    if operators is None or not rows.dtype == columns.dtype == torch.float32 or not (rows.is_cpu and columns.is_cpu):
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
    """A weight [N, D] as signed bytes [N, D] times steps [N, 1]."""
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    steps = torch.maximum(high, -low).clamp_min_(torch.finfo(torch.float32).tiny) / 127
    return (weight / steps).round_().to(torch.int8), steps


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is rounded to signed bytes, each of its rows by its own step.

    Takes unsigned bytes that stand for `step * (byte - zero)` and gives `dtype`, with `activation` as in
    `PackedLinear`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        step: float,
        zero: int,
        rows: int,
        dtype: torch.dtype,
        activation: tuple[str, str] = ("none", ""),
    ) -> None:
        super().__init__()
        operators = onednn_int8()
        assert operators is not None, "the caller has looked for int8 products"
        layout, self.multiply = operators
        rounded, steps = in_bytes(weight)
        self.weight = layout(rounded, [rows, weight.shape[1]])
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.quantisation = (step, zero, self.weight, steps.flatten(), zeros, bias, 1.0, 0, dtype)
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
