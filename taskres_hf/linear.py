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
    if operators is None or not rows.dtype == columns.dtype == torch.float32 or not (rows.is_cpu and columns.is_cpu):
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
