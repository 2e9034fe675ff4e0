"""Texts to embeddings with one model of texts and its tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..language.encoding import TextEncoding, checked_text
from ..language.tower import TextTower, encode, tokenizer_digest
from .engines.rewriting import image_weights_digest

_GROUP = 1024  # texts sorted by length together


@dataclass(frozen=True)
class TextEngine:
    """What runs the model: torch, as it is."""

    precision: str
    engine: str = "torch"
    is_stock: bool = True

    @property
    def name(self) -> str:
        return f"torch {self.precision}"


class TextEmbedder:
    """As `Embedder`, of texts.

    Args:
        tower: the base of a classifier of texts. tokenizer: its tokenizer, with the prompt. encoding: how texts become
            embeddings.

    Attributes:
        batch_size: texts read before a part of the cache may be written. cut: texts that were longer than
            `encoding.max_length`, counted since the last `warn_of_cut`.
    """

    draft = None
    is_reproducible = True

    def __init__(self, tower: TextTower, tokenizer: Any, encoding: TextEncoding) -> None:
        self.base, self.tokenizer, self.encoding = tower, tokenizer, encoding
        self.engine = TextEngine({torch.float32: "fp32"}.get(tower.dtype, str(tower.dtype).removeprefix("torch.")))
        self.batch_size, self.cut, self.preprocess = 64, 0, self
        self._digest = tokenizer_digest(tokenizer)

    @property
    def key(self) -> list[Any]:
        """What an embedding depends on besides the text."""
        return [image_weights_digest(self.base), str(self.base.dtype), "text", self.encoding.as_dict(), self._digest]

    def get_ready(self, texts: int = 0) -> None:
        """Nothing to do: the model runs as it is."""

    def batch_size_for(self, texts: int) -> int:
        """As `batch_size`, however many there are."""
        return self.batch_size

    def check(self, text: Any) -> None:
        """Raise a `TextError` where there is no text to embed."""
        checked_text(text)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] fp32 on the CPU."""
        longest = self.encoding.max_length
        with warnings.catch_warnings():  # of texts that are too long, which are counted here
            warnings.simplefilter("ignore")
            lengths = [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        self.cut += sum(length > longest for length in lengths)
        return encode(self.base, self.tokenizer, texts, longest)

    def stream(
        self,
        batches: Iterable[Sequence[Any]],
        load: Callable[[Any], str | None],
        augmented: bool,
        pad_to: int = 0,
        total: int | None = None,
    ) -> Iterator[tuple[Sequence[Any], Tensor | None]]:
        """Each batch with the embeddings of the texts that `load` gave, in order; see `Embedder.stream`."""
        if augmented:
            raise ConfigurationError("Texts have no augmented views: leave views and augment_online out.")
        group: list[tuple[Sequence[Any], list[str]]] = []

        def embedded() -> Iterator[tuple[Sequence[Any], Tensor | None]]:
            texts = [text for _, some in group for text in some]
            rows, start = (self(texts) if texts else torch.empty(0)), 0
            for batch, some in group:
                yield batch, rows[start : start + len(some)] if some else None
                start += len(some)

        for batch in batches:
            group.append((batch, [text for text in map(load, batch) if text is not None]))
            if sum(len(some) for _, some in group) >= _GROUP:
                yield from embedded()
                group.clear()
        yield from embedded()

    def stream_found(
        self,
        items: Iterable[Any],
        find: Callable[[Any], Sequence[tuple[Any, str]]],
        augmented: bool,
        *_: int,
        **__: Any,
    ) -> Iterator[tuple[Sequence[Any], Tensor]]:
        """Names and embeddings [B, D] of the texts that `find` gives of items; see `Embedder.stream_found`."""
        pairs = (pair for item in items for pair in find(item))
        batches = iter(lambda: list(islice(pairs, self.batch_size)), [])
        for batch, embeds in self.stream(batches, lambda pair: str(pair[1]), augmented):
            if embeds is not None:
                yield [name for name, _ in batch], embeds

    def warn_of_cut(self, texts: int) -> None:
        """Say once how many of so many texts were too long."""
        if self.cut:
            warnings.warn(
                f"{self.cut} of {texts} texts are longer than the {self.encoding.max_length} tokens that the model "
                "reads: what follows is not seen.",
                stacklevel=4,
            )
        self.cut = 0
