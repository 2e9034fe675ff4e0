"""What methods that go into the towers need to know of them, found by watching a tower work, not by its names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..base_model import unrounded_text_side
from ..encoders import pooled, text_device
from ..errors import BaseModelError, ConfigurationError
from ..residual import TaskResClassifier

_AT_ONCE = 128  # prompts whose activations are in memory together
# The separate linear layers of attention, by the last part of their names in transformers.
_QUERY_KEY_VALUE = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value"})


def text_base(model: Any, classifier: TaskResClassifier) -> Any:
    """The base of a whole model with its text side in fp32, from its files where it was loaded without or rounded.

    Raises:
        ConfigurationError: model and classifier have different classes. BaseModelError: no text tower to be had.
    """
    if len(model.class_names) != len(classifier.base):
        raise ConfigurationError(
            f"The model has {len(model.class_names)} classes, the classifier {len(classifier.base)}: pass the model "
            "that the classifier is of."
        )
    return unrounded_text_side(model.clip, model._base_source)[0]


def text_rows(base: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """Text embeddings [P, D] of unit length for token tensors [P, L]; gradients go where something is trained."""
    device = text_device(base)
    features = base.get_text_features(**{name: value.to(device) for name, value in tokens.items()})
    return F.normalize(pooled(features).float(), dim=-1)


def in_parts(embed: Callable[[slice], Tensor], count: int, at_once: int = _AT_ONCE) -> Tensor:
    """`embed` of all `count` prompts, in parts whose activations are made again for the gradient, not kept."""
    parts = [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    if len(parts) == 1:
        return embed(parts[0])
    if not torch.is_grad_enabled():
        return torch.cat([embed(part) for part in parts])
    return torch.cat([checkpoint(embed, part, use_reentrant=False) for part in parts])


def token_embedding(base: PreTrainedModel, tokens: Mapping[str, Tensor]) -> nn.Embedding:
    """The layer that turns token ids into vectors.

    Raises:
        BaseModelError: no such layer is used, so that nothing can be put in the vectors' place.
    """
    one = {name: value[:1] for name, value in tokens.items()}
    wanted = one["input_ids"]
    found: list[Any] = []

    def watch(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        ids = inputs[0] if inputs else None
        if isinstance(ids, Tensor) and ids.shape == wanted.shape and torch.equal(ids.cpu(), wanted):
            found.append(module)

    with _hooks(base, nn.Embedding, watch), torch.no_grad():
        text_rows(base, one)
    if len(found) != 1:
        raise BaseModelError(
            f"The text tower of a {base.config.model_type!r} base with a {_kind(base, 'text_config')!r} text tower has "
            f"{len(found)} embedding layers for its token ids, not one: learned vectors cannot take their place."
        )
    layer: nn.Embedding = found[0]
    return layer


def attention_projections(base: PreTrainedModel, run: Callable[[], Any]) -> list[str]:
    """Names of the linear layers that make queries, keys or values while `run` runs a tower, in the order of use.

    A layer that makes all three at once, as in BLIP's image tower, is none of them.
    """
    names = {module: name for name, module in base.named_modules()}
    found: dict[str, None] = {}

    def watch(module: nn.Module, *_: Any) -> None:
        if names[module].rpartition(".")[2] in _QUERY_KEY_VALUE:
            found[names[module]] = None

    with _hooks(base, nn.Linear, watch), torch.no_grad():
        run()
    return list(found)


@contextmanager
def _hooks(base: nn.Module, kind: type[nn.Module], watch: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(watch) for module in base.modules() if isinstance(module, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(base: PreTrainedModel, tower: str) -> str:
    return str(getattr(getattr(base.config, tower, None), "model_type", "unknown"))
