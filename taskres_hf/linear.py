"""Products of frozen matrices, and linear layers of a frozen tower, multiplied by oneDNN.

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
        found = multiply(inputs, layout(weight, 15), None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return (layout, multiply) if torch.equal(found, F.linear(inputs, weight)) else None


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
    if operators is None or not rows.dtype == columns.dtype == torch.float32 or not rows.is_cpu & columns.is_cpu:
        return torch.mm(rows, columns.T)
    found: Tensor = operators[1](rows, columns, None, "none", [], "")
    return found


class OneDnnLinear(nn.Linear):
    """A linear layer whose fp32 product oneDNN computes where nothing is learned; otherwise an `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        plain = (
            type(input) is not Tensor
            or type(self.weight) is not nn.Parameter
            or (torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad))
            or not input.dtype == self.weight.dtype == torch.float32
            or not input.device.type == self.weight.device.type == "cpu"
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        )
        operators = None if plain else onednn(torch.float32)
        if operators is None:
            return super().forward(input)
        found: Tensor = operators[1](input, self.weight, self.bias, "none", [], "")
        return found


LINEAR = (nn.Linear, OneDnnLinear)  # exactly these: a subclass (LoRA, 8 bit) is more than its weight


def quicken(module: nn.Module) -> None:
    """Let a loaded, frozen model use oneDNN where MKL is slow; its weights stay as and where they are."""
    if mkl_is_slow():
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = OneDnnLinear


class PackedLinear(nn.Module):
    """A frozen linear layer, its weight copied and laid out once for oneDNN, that multiplies in fp32 or bf16.

    A bf16 result goes back to fp32 before it is added to the residual stream, which like the normalisations stays in
    fp32: as fast as a tower wholly in bf16, with a twentieth of its error. Queries, keys, values and the hidden layer
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
            found = F.linear(inputs, self.weight, self.bias)
        else:
            found = self.multiply(inputs, self.weight, self.bias, self.activation[0], [], self.activation[1])
        return found if self.inner else found.float()


# What oneDNN can apply within a product: its name and variant, and the factor its input needs and its output has.
# quick_gelu(z) = z sigmoid(1.702 z) = swish(1.702 z) / 1.702.
_ACTIVATIONS = {
    "QuickGELUActivation": ("swish", "", 1.702),
    "GELUActivation": ("gelu", "none", 1.0),
    "GELUTanh": ("gelu", "tanh", 1.0),
    "PytorchGELUTanh": ("gelu", "tanh", 1.0),
}


def packed_mlp(module: nn.Module, dtype: torch.dtype, rows: int) -> dict[str, nn.Module | None] | None:
    """The children of an MLP (`fc1`, `activation_fn`, `fc2`) with the activation within the first product.

    Returns None for anything else, and where oneDNN is missing.
    """
    if set(module._modules) != {"fc1", "activation_fn", "fc2"} or onednn(dtype) is None:
        return None
    first: Any = module.fc1
    second: Any = module.fc2
    known = _ACTIVATIONS.get(type(module.activation_fn).__name__)
    if known is None or type(first) not in LINEAR or type(second) not in LINEAR or not first.weight.is_cpu:
        return None
    name, variant, factor = known
    bias = None if first.bias is None else first.bias.detach() * factor
    return {
        "fc1": PackedLinear(first.weight.detach() * factor, bias, dtype, rows, True, (name, variant)),
        "activation_fn": nn.Identity(),
        "fc2": PackedLinear(second.weight.detach() / factor, second.bias, dtype, rows, False),
    }


class PackedPatches(nn.Module):
    """A convolution whose patches do not overlap, as the linear layer it is; in fp32."""

    def __init__(self, layer: nn.Conv2d, rows: int) -> None:
        super().__init__()
        self.weight = layer.weight  # towers ask for its dtype
        self.high, self.wide = layer.kernel_size
        self.linear = PackedLinear(layer.weight.flatten(1), layer.bias, torch.float32, rows, inner=False)

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a module is such a convolution, on a CPU."""
        return (
            type(layer) is nn.Conv2d
            and layer.weight.device.type == "cpu"
            and layer.stride == layer.kernel_size
            and layer.padding in ((0, 0), "valid")
            and layer.dilation == (1, 1)
            and layer.groups == 1
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        count, channels, height, width = pixel_values.shape
        down, across = height // self.high, width // self.wide
        pixel_values = pixel_values[:, :, : down * self.high, : across * self.wide]
        patches = pixel_values.reshape(count, channels, down, self.high, across, self.wide)
        embeds: Tensor = self.linear(patches.permute(0, 2, 4, 1, 3, 5).reshape(count, down * across, -1))
        return embeds.transpose(1, 2).reshape(count, -1, down, across)
