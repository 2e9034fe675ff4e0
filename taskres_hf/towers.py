"""A frozen image tower, rewritten to do less work for the same embeddings.

Three things, none of which changes more than last bits: linear layers are laid out once for oneDNN, in fp32 or bf16;
queries, keys and values are one product, and an MLP's activation is part of one; and where an embedding is that of the
first token, the last layer works for that token alone. The model itself is left as it is: the rewritten one shares
with it whatever it did not have to lay out anew.
"""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .linear import LINEAR, onednn

READS_FIRST_TOKEN = ("clip", "metaclip_2", "chinese_clip", "altclip")  # families whose embedding is that token's
REWRITABLE = (*READS_FIRST_TOKEN, "siglip")  # families whose layers have CLIP's parts and no mask
_FEW_TOKENS = 64  # up to here two small products beat the fused attention in bf16


def tokens(base: PreTrainedModel) -> int:
    """Patches of a picture."""
    config = getattr(base.config, "vision_config", None)
    size, patch = getattr(config, "image_size", 224), getattr(config, "patch_size", 32)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 49


def best_batch_size(base: PreTrainedModel) -> int:
    """Pictures a pass at which a CPU is fastest: fewer, and its cores idle; more, and memory is asked for anew."""
    return max(4, min(1600 // tokens(base), 32), min(os.cpu_count() or 1, 64))


def rewritten(base: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The image side of a model, doing less work; the text side is left out.

    Args:
        base: a frozen dual encoder. dtype: also lay its linear layers out for oneDNN, to multiply in fp32 or bf16;
            None to leave them to whoever converts the model.
    """
    rows = best_batch_size(base) * tokens(base)
    layers: Any = base.vision_model.encoder.layers if base.config.model_type in REWRITABLE else ()  # type: ignore[union-attr]
    last = layers[-1] if len(layers) and base.config.model_type in READS_FIRST_TOKEN else None

    def convert(module: nn.Module, name: str) -> nn.Module:
        if dtype is not None and type(module) in LINEAR:
            own = torch.float32 if name.endswith("_projection") and module.weight.is_cpu else dtype  # one small product
            return PackedLinear(module.weight, module.bias, own, rows, name in _INNER)  # type: ignore[arg-type]
        if dtype is not None and PackedPatches.fits(module):
            return PackedPatches(module, rows)  # type: ignore[arg-type]
        if module in layers and Layer.fits(module):
            clone: nn.Module = Layer(module, first_only=module is last)
        else:
            clone = copy.copy(module)
        children = None if dtype is None else packed_mlp(module, dtype, rows)
        if children is None:
            children = {key: child and convert(child, key) for key, child in clone._modules.items()}
        clone._modules = children
        return clone

    clone: PreTrainedModel = copy.copy(base)
    clone._modules = {
        name: module and convert(module, name) for name, module in base._modules.items() if not name.startswith("text")
    }
    return clone


_INNER = ("q_proj", "k_proj", "v_proj", "fc1", "qkv", "first_query", "keys_values")  # a product takes their result next


class Layer(nn.Module):
    """A layer as CLIP and SigLIP have them (pre-norm, no mask), with queries, keys and values in one product.

    `first_only` leaves out what later layers would read of the other tokens: queries, output and MLP are computed for
    the first token alone, a fourteenth less work in a tower of twelve layers.
    """

    layer_norm1: nn.Module
    layer_norm2: nn.Module
    mlp: nn.Module

    def __init__(self, layer: Any, first_only: bool) -> None:
        super().__init__()
        attention: Any = layer.self_attn
        self.heads, self.first_only = attention.num_heads, first_only
        self.layer_norm1, self.layer_norm2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.out_proj = attention.out_proj
        query = (attention.q_proj, attention.scale)
        key, value = (attention.k_proj, 1.0), (attention.v_proj, 1.0)
        if first_only:
            self.first_query, self.keys_values = _joined(query), _joined(key, value)
        else:
            self.qkv = _joined(query, key, value)

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a module is such a layer, plain: without LoRA, and with nothing that looks in from outside."""
        attention: Any = layer._modules.get("self_attn")
        returned = str(inspect.signature(type(layer).forward).return_annotation)
        return (
            "Tensor" in returned
            and "tuple" not in returned.lower()  # as some families' layers did in older transformers
            and set(layer._modules) == {"self_attn", "layer_norm1", "mlp", "layer_norm2"}
            and attention is not None
            and set(attention._modules) == {"q_proj", "k_proj", "v_proj", "out_proj"}
            and all(type(part) in LINEAR for part in attention.children())
            and hasattr(attention, "num_heads")
            and hasattr(attention, "scale")
            and not any(
                "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
                for module in (layer, *attention.modules())
            )
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        normed = self.layer_norm1(hidden_states)
        if self.first_only:
            hidden_states = hidden_states[:, :1]
            parts = (self.first_query(normed[:, :1]), *self.keys_values(normed).chunk(2, dim=-1))
        else:
            parts = self.qkv(normed).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if query.dtype == torch.bfloat16 and key.shape[2] <= _FEW_TOKENS:
            weights = torch.matmul(query, key.transpose(2, 3)).softmax(dim=-1, dtype=torch.float32)
            mixed = torch.matmul(weights.to(value.dtype), value)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        hidden_states = hidden_states + self.out_proj(mixed.transpose(1, 2).flatten(2))
        found: Tensor = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return found


def _joined(*parts: tuple[nn.Linear, float]) -> nn.Linear:
    """Linear layers of the same input, each times a factor, as one."""
    first = parts[0][0]
    joined = nn.Linear(first.in_features, sum(part.out_features for part, _ in parts), device="meta")
    joined.weight = nn.Parameter(torch.cat([part.weight.detach() * factor for part, factor in parts]), False)
    zeros = [torch.zeros_like(part.weight[:, 0]) if part.bias is None else part.bias.detach() for part, _ in parts]
    bias = torch.cat([zero * factor for zero, (_, factor) in zip(zeros, parts, strict=True)])
    joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


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
