"""A frozen image tower, rewritten to do less work for the same embeddings.

Three things, none of which changes more than last bits: linear layers are laid out once for oneDNN, in fp32 or bf16; an
MLP's activation is part of its first product; and where an embedding is that of the first token, the last layer works
for that token alone. A fourth, on request only, rounds more: the large products in int8 (`onednn.py`). The model itself
is left as it is: the rewritten one shares with it whatever it did not have to lay out anew.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...encoders import family_of
from .onednn import (
    ACTIVATIONS,
    LINEAR,
    PackedLinear,
    Rotation,
    factored,
    int8_parts,
    onednn,
    onednn_int8,
    rotate_layer,
)

_CAPTURE = "transformers.utils.output_capturing"
_PARTS = frozenset({*vars(nn.Module()), "_is_hf_initialized"}) - {"training"}
_VALUES = 64  # of a weight that are compared
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def num_patches(base: PreTrainedModel) -> int:
    """Patches of a picture."""
    config = getattr(base.config, "vision_config", None)
    size, patch = getattr(config, "image_size", 224), getattr(config, "patch_size", 32)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 49


def best_batch_size(base: PreTrainedModel, cores: int = 1) -> int:
    """Pictures a pass at which one core, or several together, are fastest."""
    rows = 1600 if cores > 1 else 800
    return max(4, rows // max(num_patches(base), 50), min(cores, 64))


def rewritten(base: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The image side of a model, doing less work; the text side is left out.

    Args:
        base: a frozen dual encoder. dtype: also lay its linear layers out for oneDNN, to multiply in fp32, bf16 or int8
            (the base must be one that `int8_obstacle` finds nothing about); None to leave them to whoever converts the
            model.
    """
    rows = best_batch_size(base) * num_patches(base)
    layers = _layers(base)
    last = layers[-1] if len(layers) and family_of(base).reads_first_token else None
    rotation = Rotation(base.config.vision_config.hidden_size) if dtype is torch.int8 else None
    inner_dtype = torch.float32 if dtype is torch.int8 else dtype  # bf16 beside bytes moves answers more than they do

    def convert(module: nn.Module, name: str, whole: nn.Module) -> nn.Module:
        if name in _WHOLE:
            return module
        if inner_dtype is not None and type(module) in LINEAR:
            small = name.endswith("_projection")  # one small product
            dtype_here = torch.float32 if small else inner_dtype
            return PackedLinear(module.weight, module.bias, dtype_here, rows, _is_inner(name, whole))  # type: ignore[arg-type]
        replaced: dict[str, nn.Module] = {}
        if module in layers and Layer.fits(module):
            clone: Any = Layer(module, first_only=module is last)
            if rotation is not None and inner_dtype is not None:
                rotate_layer(clone, rotation, enter=module is layers[0], leave=module is layers[-1])
                replaced = {} if clone.first_only else int8_parts(clone, rows)
        else:
            clone = copy.copy(module)
        children = None if inner_dtype is None else packed_mlp(clone, inner_dtype, rows)
        if children is None:
            children = {}
            for key, child in clone._modules.items():
                children[key] = replaced.get(key) or (child and convert(child, key, clone))
        clone._modules = children
        return clone  # type: ignore[no-any-return]

    clone: PreTrainedModel = copy.copy(base)
    clone._modules = {
        name: module and convert(module, name, base)
        for name, module in base._modules.items()
        if not name.startswith("text")
    }
    return clone


_INNER = ("q_proj", "k_proj", "v_proj", "fc1")  # a product takes their result next
_QUERIES = {"k_proj": "q_proj", "v_proj": "q_proj"}  # what else must be of the same dtype
_WHOLE = ("keys", "values")  # whose weights are read as they are


def _is_inner(name: str, whole: nn.Module) -> bool:
    return name in _INNER and _QUERIES.get(name, name) in whole._modules


def _layers(base: PreTrainedModel) -> Any:
    """The layers of an image tower of a family whose layers can be rewritten."""
    return base.vision_model.encoder.layers if family_of(base).clip_layers else ()  # type: ignore[union-attr]


def watched_module(base: PreTrainedModel) -> str | None:
    """Name of a module of the image side that something from outside takes part in (such as a hook), or None.

    A rewritten tower would not run it, or not on everything it sees in the tower itself.
    """
    if any(getattr(torch.nn.modules.module, name, None) for name in _GLOBAL_HOOKS):
        return "every module"
    if "get_image_features" in vars(base):
        return "get_image_features"
    return next((name for name, module in _image_side(base) if _watched(module)), None)


def _image_side(base: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the image side, by name."""
    for side, part in base.named_children():
        for name, module in () if side.startswith("text") else part.named_modules():
            yield f"{side}.{name}".rstrip("."), module


def image_side_state(base: PreTrainedModel, contents: bool = False) -> list[Any]:
    """What differs after a module of the image side was replaced, or a weight or a setting of it was changed.

    Read in no time. What is written into weights past autograd (`weight.data`, numpy, fused optimizers, peft's
    merging) is not counted by torch: `contents` adds some values of each weight, which a device must be waited for.
    """
    modules = [module for _, module in _image_side(base)]
    weights = [
        tensor
        for module in (base, *modules)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    # Modules themselves, since the id of one that is gone is given to another. Inference tensors count no changes.
    state: list[Any] = [(module, type(module), type(module).forward, _settings(module, id)) for module in modules]
    state += [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in weights]
    return state + _some_values(weights) if contents else state


def _settings(module: nn.Module, name_of: Callable[[Any], Any]) -> dict[str, Any]:
    """What a module is told beside its weights and parts, such as a scale, and whether an adapter is switched on.

    Of values that are no numbers, names or collections of them what `name_of` gives; of a `PreTrainedModel`, which
    also keeps notes about loading, numbers alone.
    """
    values = vars(module)
    found = {name: _plain(values[name], name_of) for name in values.keys() - _PARTS}
    if isinstance(module, PreTrainedModel):
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return found


def _plain(value: Any, name_of: Callable[[Any], Any]) -> Any:
    if isinstance(value, (int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, name_of) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, name_of) for key, item in value.items()}
    return name_of(value)


def _kind(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


@torch.no_grad()
def _some_values(weights: Sequence[Tensor]) -> list[bytes]:
    """Some values of each weight, from all over it."""
    some: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        if not weight.is_meta:
            values = weight.reshape(-1)[:: weight.numel() // _VALUES | 1]
            some.setdefault(weight.device, []).append(values.float())
    return [torch.cat(values).cpu().numpy().tobytes() for values in some.values()]


def image_weights_digest(base: PreTrainedModel) -> str:
    """A checksum of all weights and settings that make an image embedding, in milliseconds: not a hash of every byte.

    Sums of the raw bits at two strides, with names, shapes and dtypes, and what modules are and are told, such as an
    activation or an epsilon: any retraining or rounding changes it.
    It tells versions of a model apart; it is no protection against tampering.
    """
    digest = hashlib.sha256()
    for name, module in _image_side(base):
        settings = sorted(_settings(module, _kind).items())
        digest.update(f"{name} {type(module).__qualname__} {settings};".encode())
    for name, tensor in sorted(base.state_dict().items()):
        if name.startswith(("text_", "logit_", "temperature")):  # absent where only the image tower is loaded
            continue
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        bits = bits[: bits.numel() // 4 * 4].view(torch.int32) if bits.numel() >= 4 else bits
        sums = [int(bits[::stride].sum(dtype=torch.int64)) for stride in (1, 7)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums};".encode())
    return digest.hexdigest()


def int8_obstacle(base: PreTrainedModel) -> str | None:
    """What keeps a tower from being multiplied in int8, or None."""
    if onednn_int8() is None:
        return "this torch, on this processor, has no int8 products"
    layers = _layers(base)
    for layer in layers:
        if not Layer.fits(layer) or _activation(layer.mlp) is None:
            return "its layers are not plain CLIP layers"
    return None if len(layers) else "its family's layers are not CLIP's"


class Layer(nn.Module):
    """A layer as CLIP and SigLIP have them (pre-norm, no mask), without what nothing reads.

    `first_only` leaves out what later layers would read of the other tokens: queries, output and MLP are computed for
    the first token alone, and its queries and mixtures pass the weights of keys and values instead of all tokens. That
    is nearly all of the layer's work.
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
        self.rotate_in: nn.Module | None = None
        self.rotate_out: nn.Module | None = None
        self.q_proj, self.scale = attention.q_proj, attention.scale
        if first_only:
            self.keys, self.values = attention.k_proj, attention.v_proj
        else:
            self.k_proj, self.v_proj = attention.k_proj, attention.v_proj

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
            and not any(map(_watched, layer.modules()))
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rotate_in is not None:
            hidden_states = self.rotate_in(hidden_states)
        normed = self.layer_norm1(hidden_states)
        if self.first_only:
            hidden_states = hidden_states[:, :1]
            mixed = self._mixed_for_first(normed)
        else:
            mixed = self._mixed(normed)
        hidden_states = self.out_proj(mixed).add_(hidden_states)  # in place: asking for memory takes longer than adding
        hidden_states = self.mlp(self.layer_norm2(hidden_states)).add_(hidden_states)
        return hidden_states if self.rotate_out is None else self.rotate_out(hidden_states)

    def _mixed(self, normed: Tensor) -> Tensor:
        query, key, value = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, D / heads]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)

    def _mixed_for_first(self, normed: Tensor) -> Tensor:
        """q (W n) = (q W) n, and the mean of W n is W times the mean of n: no token's key or value is computed.

        A bias of the keys adds the same to all tokens' scores, so it does nothing.
        """
        query = self.scale * self.q_proj(normed[:, 0]).to(normed.dtype)
        query = query.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        keys, values = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (self.keys, self.values))
        asked = torch.matmul(query, keys).transpose(0, 1)  # [B, heads, D]
        weights = torch.matmul(asked, normed.transpose(1, 2)).softmax(dim=-1)
        read = torch.matmul(weights, normed).transpose(0, 1)  # [heads, B, D]
        mixed = torch.matmul(read, values.transpose(1, 2)).transpose(0, 1).flatten(1)
        return (mixed if self.values.bias is None else mixed + self.values.bias)[:, None]


def _watched(module: nn.Module) -> bool:
    """Whether something from outside takes part; hooks that transformers leaves to capture hidden states do not."""
    hooks = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) != _CAPTURE]
    computed = "parametrizations" in module._modules  # weights made anew at each pass: `nn.utils.parametrize`
    return "forward" in vars(module) or computed or bool(hooks or module._forward_pre_hooks)


def packed_mlp(module: nn.Module, dtype: torch.dtype, rows: int) -> dict[str, nn.Module | None] | None:
    """The children of an MLP (`fc1`, `activation_fn`, `fc2`) with the activation within the first product.

    Returns None for anything else, and where oneDNN is missing.
    """
    known = _activation(module)
    if known is None or onednn(dtype) is None or not module.fc1.weight.is_cpu:  # type: ignore[union-attr]
        return None
    name, variant, factor, _ = known
    first, second = factored(module, factor)
    return {
        "fc1": PackedLinear(first.weight, first.bias, dtype, rows, True, (name, variant)),
        "activation_fn": nn.Identity(),
        "fc2": PackedLinear(second.weight, second.bias, dtype, rows, False),
    }


def _activation(module: Any) -> tuple[str, str, float, float] | None:
    """The activation of a plain MLP as oneDNN knows it; None for anything else."""
    if set(module._modules) != {"fc1", "activation_fn", "fc2"}:
        return None
    linear = type(module.fc1) in LINEAR and type(module.fc2) in LINEAR
    return ACTIVATIONS.get(type(module.activation_fn).__name__) if linear else None
