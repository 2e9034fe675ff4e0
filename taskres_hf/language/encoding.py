"""How a model of texts alone gives one embedding a text: pooling, what stands before each text, how long a text may be.

A folder of sentence-transformers says it in `modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json` and
`config_sentence_transformers.json`; that library is not needed to read them. Without them the mean over the tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..encoders import BaseSource
from ..errors import ArtifactError, BaseModelError, ConfigurationError, TextError
from ..storage import read_json
from ..tables import visible

POOLINGS = ("mean", "cls", "max")
HEAD_POOLING = "head"  # what the pretrained head of a classifier is given
# `model_type`s that count positions from after the padding index.
_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "xmod",
                  "data2vec-text", "longformer", "ibert")  # fmt: skip
_UNLIMITED = 1_000_000  # what tokenizers that know no limit have is far above
_FALLBACK = 512
# Keys of 1_Pooling/config.json, and what else they may ask for, which nothing here does.
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}


@dataclass(frozen=True)
class TextEncoding:
    """How a text becomes an embedding.

    Attributes:
        pooling: `"mean"` over the attention mask, `"cls"` (the first token), `"max"` over the attention mask, or
            `"head"`: what the model's own classification head is given.
        prompt: stands before each text, such as `"query: "` for E5.
        max_length: most tokens of a text, special ones included; longer texts are cut.
    """

    pooling: str
    prompt: str = ""
    max_length: int = _FALLBACK

    def as_dict(self) -> dict[str, Any]:
        """As it lies in config.json."""
        return asdict(self)

    @classmethod
    def of_config(cls, config: Any) -> TextEncoding:
        """That of a `TaskResConfig` of texts."""
        return cls(**config.text_encoding)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Embeddings [N, D] from the last hidden states [N, L, D].

    Args:
        mask: [N, L], 1 for tokens that count.
    """
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "max":
        return hidden.masked_fill(weight == 0, torch.finfo(hidden.dtype).min).amax(dim=1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-9)


def checked_text(value: Any) -> str:
    """A text that a tokenizer takes.

    Raises:
        TextError: it is missing, empty, something else than text, or no Unicode.
    """
    if value is None or value != value:
        raise TextError("there is no text")
    if not isinstance(value, str):
        raise TextError(f"it is no text but {visible(repr(value))[:80]} ({type(value).__name__})")
    if not value.strip():
        raise TextError("the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"the text is no Unicode: {error.reason}") from error
    return value


def positions_of(config: Any) -> int | None:
    """Most tokens that a model of a config can be given at all; None where there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _AFTER_PADDING:
        positions -= int(config.pad_token_id or 0) + 1
    return positions or None


def longest(config: Any, tokenizer: Any, asked: int | None = None, stated: int | None = None) -> int:
    """Most tokens of a text that a model of a config reads.

    Args:
        asked: by the caller. stated: in the checkpoint, where nobody asks.

    Raises:
        ConfigurationError: more than the model has positions for, or no whole number of at least 4.
    """
    positions = positions_of(config)
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 4:
            raise ConfigurationError(f"`max_length` must be a whole number of tokens of at least 4; got {asked!r}.")
        if positions and asked > positions:
            raise ConfigurationError(f"`max_length` is {asked}, and the model has positions for {positions} tokens.")
        return asked
    limits = [one for one in (stated, positions, tokenizer.model_max_length) if one and one < _UNLIMITED]
    return int(min(limits)) if limits else _FALLBACK


def stated_encoding(source: BaseSource) -> dict[str, Any]:
    """What a checkpoint says of itself: `pooling`, `prompt` and `max_length`, each where it does.

    Raises:
        BaseModelError: it has modules that are not to be had here, or lies in a folder within.
    """
    if not source.name:
        return {}
    modules: Any = _read(source, "modules.json")
    found: dict[str, Any] = {}
    if not isinstance(modules, list):
        return found
    kinds = [(str(one.get("type", "")).rsplit(".", 1)[-1], str(one.get("path", ""))) for one in modules]
    others = [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise BaseModelError(
            f"{source.name!r} is a sentence-transformers model with {', '.join(others)}, which is not to be had here: "
            "only Transformer, Pooling and Normalize are. Give another model."
        )
    if kinds and kinds[0][1]:
        raise BaseModelError(
            f"The transformer of {source.name!r} lies in its folder {kinds[0][1]}: give that folder, with pooling=."
        )
    for kind, path in kinds:
        if kind == "Pooling":
            found["pooling"] = _pooling_of(
                _read(source, f"{path}/config.json" if path else "config.json") or {}, source
            )
    length = (_read(source, "sentence_bert_config.json") or {}).get("max_seq_length")
    if isinstance(length, int) and length > 0:
        found["max_length"] = length
    prompts: Mapping[str, Any] = _read(source, "config_sentence_transformers.json") or {}
    default, known = prompts.get("default_prompt_name"), prompts.get("prompts") or {}
    if isinstance(default, str) and isinstance(known.get(default), str):
        found["prompt"] = known[default]
    elif any(isinstance(text, str) and text for text in known.values()):
        names = ", ".join(f"{name} {text!r}" for name, text in known.items() if text)
        warnings.warn(
            f"{source.name!r} knows prompts ({names}) and none by default: none is used. Choose one with prompt=.",
            stacklevel=4,
        )
    return found


def _read(source: BaseSource, name: str) -> Any:
    path = source.file(name)
    if path is None:
        return None
    try:
        if name == "modules.json":  # a list
            import json

            with open(path, encoding="utf-8") as stream:
                return json.load(stream)
        return read_json(path)
    except (ArtifactError, OSError, ValueError) as error:
        raise BaseModelError(f"{name} of the base model {source.name!r} is damaged: {error}") from error


def _pooling_of(values: Mapping[str, Any], source: BaseSource) -> str:
    named = values.get("pooling_mode")
    modes = [named] if isinstance(named, str) else []
    modes += [str(key) for key, on in values.items() if key.startswith("pooling_mode_") and on]
    known = [_MODES.get(mode, mode if mode in POOLINGS else None) for mode in modes]
    if len(known) != 1 or known[0] is None:
        raise BaseModelError(
            f"{source.name!r} pools by {', '.join(modes) or 'nothing'}; here it is one of {', '.join(POOLINGS)}: say "
            "which to use with pooling=."
        )
    return known[0]


def with_prompt(tokenizer: Any, prompt: str, max_length: int) -> Any:
    """A tokenizer that puts a prompt before each text and knows the most tokens that are read."""
    tokenizer.model_max_length = max_length
    if not prompt:
        return tokenizer
    kind: Any = type(tokenizer)

    class Prompted(kind):  # type: ignore[misc]
        """Puts the classifier's prompt before each text."""

        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            several = isinstance(text, Sequence) and not isinstance(text, str)
            if several:
                text = [prompt + one if isinstance(one, str) else one for one in text]
            elif isinstance(text, str):
                text = prompt + text
            return super().__call__(text, *args, **kwargs)

    Prompted.__name__ = Prompted.__qualname__ = kind.__name__
    tokenizer.__class__ = Prompted
    return tokenizer
