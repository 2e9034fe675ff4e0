"""Models of texts alone: what is one, and one as a tower that gives an embedding a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from ..alone.linear_head import LENGTH
from ..alone.towers import Tower, frozen, head_rows, linear_layers, load_model, refuse_lost, tower_fingerprint
from ..base_model import check_weights
from ..encoders import FAMILIES, BaseSource, config_file, read_config
from ..errors import BaseModelError, ConfigurationError
from ..prompts import warn_of_equals
from .encoding import HEAD_POOLING, TextEncoding, pool

# The cosine counts so often: the scale that sentence-transformers trains such models by (its contrastive losses').
SCALE = 20.0
_HEAD = "ForSequenceClassification"
_BATCH = 64  # texts a forward pass


class TextTower(Tower):
    """A model of texts that gives embeddings [N, D]: pooled, or what the head of its own classifier is given.

    Args:
        model: left as it is. pooling: see `TextEncoding`. untrained: its head holds random numbers.

    Raises:
        ConfigurationError: the head's embeddings are asked for, and there is none.
    """

    main_input_name = "input_ids"

    def __init__(self, model: PreTrainedModel, pooling: str, untrained: bool = False) -> None:
        super().__init__(model.config)
        self.pooling, name = pooling, head_of(model)
        if pooling == HEAD_POOLING and (name is None or untrained):
            raise ConfigurationError(f"A pretrained head is asked for, and {type(model).__name__} has none.")
        if pooling != HEAD_POOLING:
            model, name = getattr(model, model.base_model_prefix, model), None
            if getattr(model, "pooler", None) is not None:  # often random, and never asked
                model = _without_pooler(model)
        self._take(model, name, untrained)

    def embed(self, attention_mask: Tensor | None = None, **tokens: Any) -> Any:
        """What the model returns, with the embeddings [N, D] as `pooler_output`.

        Args:
            attention_mask: [N, L]; all ones when None. **tokens: `input_ids` [N, L] and what else the model takes.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens["input_ids"])
        output = self.model(attention_mask=attention_mask, **tokens)
        if self.pooling == HEAD_POOLING:
            output["pooler_output"] = output.logits
        else:
            output["pooler_output"] = pool(output.last_hidden_state, attention_mask, self.pooling)
        return output


def _without_pooler(model: Any) -> Any:
    clone = object.__new__(type(model))
    clone.__dict__.update(model.__dict__)
    clone._modules = {**model._modules, "pooler": None}
    return clone


def is_text_model(model_type: str | None) -> bool:
    """Whether transformers knows a `model_type` as a model of texts alone."""
    return model_type in CLASSIFIERS and model_type not in FAMILIES


def is_text_model_at(source: BaseSource) -> bool:
    """The same of a Hub id or folder, by its config.json alone."""
    return is_text_model(read_config(source, config_file(source)).get("model_type"))


def check_is_text_model(model_type: str, name: str, code: bool = False) -> None:
    """Refuse a model that is none of texts alone.

    Raises:
        BaseModelError: says what to use instead.
    """
    if is_text_model(model_type) or (code and model_type not in FAMILIES):
        return
    advice = "Give a model that AutoModelForSequenceClassification loads, or a sentence-transformers model."
    if model_type in FAMILIES:
        advice = "It reads pictures too: for those, use TaskResCLIPForImageClassification."
    if model_type == "taskres":
        advice = "It is a saved TaskRes classifier: load it with from_pretrained."
    raise BaseModelError(f"The base model {name!r} is no model of texts alone (model_type {model_type!r}). {advice}")


def head_of(model: PreTrainedModel) -> str | None:
    """The name of the linear layer that a classifier ends with; None where it has none."""
    if _HEAD not in type(model).__name__:
        return None
    found = linear_layers(model, model.base_model_prefix)
    # A head of two layers may be square where there are as many labels as hidden units: the last one gives the logits.
    return found[-1] if found else None


def load_text_model(
    source: BaseSource, dtype: Any, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, bool, str | None]:
    """A model of texts in fp32 unless placed or quantised, whether its head holds random numbers, and its commit.

    Raises:
        BaseModelError: no model of texts alone (found before any weight is read), or its weights are not whole.
        HubError: not found, not to be read or not reachable.
    """

    def choose(config: Mapping[str, Any]) -> Any:
        named = [str(one) for one in config.get("architectures") or []]
        return AutoModelForSequenceClassification if any(one.endswith(_HEAD) for one in named) else AutoModel

    def check(model_type: str, code: bool) -> None:
        check_is_text_model(model_type, source.name, code)

    model, missing, commit = load_model(source, dtype, options, choose, check)
    name = head_of(model)
    own = [key for key in missing if name is None or not key.startswith(f"{name}.")]
    refuse_lost(source, [key for key in own if name is not None or "pooler." not in key])
    check_weights(model, source.name)
    return model, bool(missing), commit


def as_tower(model: PreTrainedModel, pooling: str, untrained: bool = False) -> TextTower:
    """A loaded model as a frozen tower.

    Raises:
        BaseModelError: no model of texts alone. ConfigurationError: a tower that pools otherwise.
    """
    if isinstance(model, TextTower):
        if model.pooling != pooling:
            raise ConfigurationError(
                f"The tower given pools by {model.pooling!r}, the classifier needs {pooling!r}: give the model itself."
            )
        return model
    check_is_text_model(model.config.model_type, str(model.config._name_or_path))
    return frozen(TextTower(model, pooling, untrained))


def tokenized(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Tokens [N, L] of texts, padded to the longest and cut at `max_length`."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"))


@torch.no_grad()
def encode(tower: TextTower, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """Embeddings [N, D] fp32 on the CPU of texts, as they come from pooling."""
    device, order = next(tower.parameters()).device, sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    parts = []
    for start in range(0, len(texts), _BATCH):  # texts of about one length together: little padding
        some = [texts[row] for row in order[start : start + _BATCH]]
        tokens = {name: value.to(device) for name, value in tokenized(tokenizer, some, max_length).items()}
        parts.append(tower.embed(**tokens).pooler_output.float().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of how a tokenizer makes tokens, without what the latest call set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    values = json.loads(backend.to_str())
    values.pop("truncation", None), values.pop("padding", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def made_of(tower: TextTower, tokenizer: Any, config: Any) -> tuple[Tensor, dict[str, Any]]:
    """The base classifier [K, D] of a config's classes, and its fingerprint.

    Of class names: the mean direction of a class's prompts, as long as CLIP's text embeddings, so that published step
    sizes mean what they mean there.

    Raises:
        BaseModelError: the model gives NaN, or the same embedding for all classes.
    """
    if config.base_classifier != CLASS_NAMES:
        table, _ = head_rows(tower, config)
        return table, tower_fingerprint(tower, config, table)
    encoding, prompts = TextEncoding.of_config(config), config.class_prompts()
    flat = [prompt for group in prompts for prompt in group]
    ids = tokenizer(flat, truncation=True, max_length=encoding.max_length)["input_ids"]
    starts = [sum(map(len, prompts[:place])) for place in range(len(prompts) + 1)]
    rows = [tuple(map(tuple, ids[one:other])) for one, other in pairwise(starts)]
    if len(set(rows)) == 1 and len(rows) > 1:
        raise ConfigurationError(
            f"All prompts become the same tokens, so that no class can be told from another: {flat[0]!r:.80} and "
            f"{flat[-1]!r:.80}. Give class names, templates or prompt_names= that differ to the base's tokenizer."
        )
    warn_of_equals([group[0] for group in prompts], rows, "classes' prompts")
    tokens = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    embeds = F.normalize(encode(tower, tokenizer, flat, encoding.max_length), dim=1)
    groups = embeds.split([len(group) for group in prompts])
    table = LENGTH * F.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=1)
    if not bool(table.isfinite().all()):
        raise BaseModelError("The base model gives NaN or infinite values for class names: its weights are damaged.")
    if len(set(flat)) > 1 and bool((embeds - embeds[0]).abs().max() <= 1e-6):
        raise BaseModelError("The base model gives the same embedding for every class name: it cannot tell them apart.")
    return table, tower_fingerprint(tower, config, table, SCALE, tokens)


CLASS_NAMES = "class_names"  # embeddings of the classes' names, as base classifier


def embedding_length(tower: TextTower) -> int:
    """D: of the head, or the model's hidden size."""
    if tower.head is not None:
        return int(tower.head.weight.shape[1])
    return int(tower.config.hidden_size)
