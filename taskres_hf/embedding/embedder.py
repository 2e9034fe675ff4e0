"""Pictures to embeddings with one base, one processor and one engine; decoding overlaps the tower."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..encoders import image_weights_digest
from .engines.choose import make_engine
from .preprocessing import Preprocessor

_TURN = 64  # pictures prepared before the tower has its turn, where they take turns: changing places costs both


_T = TypeVar("_T")


class Embedder:
    """Pictures to embeddings with one base, one processor and one engine.

    Args:
        base: the dual encoder. image_processor: its image processor.
        engine, precision: see `engines`; the defaults give exactly what the model itself gives.
        exact_preprocessing: always use the stock image processor.
        draft_decoding: decode large JPEG pictures coarsely: faster, and not exactly the same pixels.

    Attributes:
        engine: the `ImageEngine` that runs. batch_size: pictures a forward pass at which it is fastest.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        image_processor: Any,
        engine: str = "torch",
        precision: str = "fp32",
        exact_preprocessing: bool = False,
        draft_decoding: bool = False,
    ) -> None:
        self.base, self.image_processor = base, image_processor
        self.preprocess = Preprocessor(image_processor, exact_preprocessing)
        self.engine = make_engine(base, engine, precision, self.preprocess.normalisation)
        self.preprocess.in_bytes = self.engine.takes_bytes
        self.batch_size = self.engine.batch_size
        self.draft = self.preprocess.target_size() if draft_decoding else None

    @property
    def key(self) -> list[Any]:
        """What an embedding depends on besides the picture."""
        kind = "fast" if self.preprocess.fast else "stock"
        kind += f" {self.draft}" if self.draft else ""
        digest = image_weights_digest(self.base)
        return [digest, str(self.base.dtype), self.engine.name, kind, self.image_processor.to_json_string()]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[PIL.Image.Image], augmented: bool = False) -> Tensor:
        """Embeddings [N, D] fp32 on the CPU of RGB pictures; `augmented` ones already have the tower's size."""
        return self.engine(self.preprocess(pictures, augmented))

    @torch.no_grad()
    def stream(
        self, batches: Iterable[Sequence[_T]], load: Callable[[_T], PIL.Image.Image | None], augmented: bool
    ) -> Iterator[tuple[Sequence[_T], Tensor | None]]:
        """Each batch with the embeddings of the pictures that `load` gave, in order; decoding overlaps the tower.

        On a CPU every core takes a batch from file to embedding, so that one decodes while another multiplies, and none
        waits for another within a layer. With fewer batches than cores, and in engines with threads of their own, all
        cores decode a few batches, then all run the tower. Beside a GPU the next batch is decoded meanwhile.
        """

        def one(item: _T) -> Any:
            picture = load(item)
            return None if picture is None else self.preprocess.one(picture, augmented)

        def inputs(ready: Iterable[Any]) -> dict[str, Tensor] | None:
            ready = [prepared for prepared in ready if prepared is not None]
            return self.preprocess.together(ready, augmented) if ready else None

        def embeds(given: dict[str, Tensor] | None) -> Tensor | None:
            return None if given is None else self.engine(given)

        if next(self.base.parameters()).device.type != "cpu":
            prepared = _decoded_ahead(batches, lambda pool, batch: inputs(pool.map(one, batch)))
            yield from ((batch, embeds(given)) for batch, given in prepared)
            return
        batches, cores = iter(batches), torch.get_num_threads()
        first = list(islice(batches, cores))
        batches = chain(first, batches)
        if self.engine.engine == "torch" and self.preprocess.fast and 1 < cores <= len(first):
            self.engine.get_ready()
            yield from _on_every_core(batches, lambda batch: embeds(inputs(map(one, batch))), cores)
            return
        turn = _TURN if self.preprocess.fast else 1  # the stock processor is given whole pictures: hold few
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            for group in _grouped(batches, turn):
                ready = list(pool.map(one, [item for batch in group for item in batch]))
                for batch in group:
                    yield batch, embeds(inputs(ready[: len(batch)]))
                    del ready[: len(batch)]


def _decoded_ahead(
    batches: Iterable[Sequence[_T]], inputs: Callable[[ThreadPoolExecutor, Sequence[_T]], Any]
) -> Iterator[tuple[Sequence[_T], Any]]:
    """Batches with their inputs, two of them decoded ahead, beside a GPU."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool, ThreadPoolExecutor(1) as ahead:
        yield from _ahead(((batch, ahead.submit(inputs, pool, batch)) for batch in batches), 2)


def _on_every_core(
    batches: Iterable[Sequence[_T]],
    embed: Callable[[Sequence[_T]], Tensor | None],
    cores: int,
) -> Iterator[tuple[Sequence[_T], Tensor | None]]:
    """Batches with what `embed` makes of them, each on one core."""

    @torch.no_grad()
    def work(batch: Sequence[_T]) -> Tensor | None:
        return embed(batch)

    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from _ahead(((batch, pool.submit(work, batch)) for batch in batches), 2 * cores)
    finally:
        torch.set_num_threads(cores)  # what a thread sets for itself, torch also takes for threads to come


def _ahead(jobs: Iterable[tuple[_T, Future[Any]]], count: int) -> Iterator[tuple[_T, Any]]:
    """Results in order, while up to `count` later jobs are under way."""
    waiting: deque[tuple[_T, Future[Any]]] = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) > count:
            item, future = waiting.popleft()
            yield item, future.result()
    while waiting:
        item, future = waiting.popleft()
        yield item, future.result()


def _grouped(batches: Iterable[Sequence[_T]], size: int) -> Iterator[list[Sequence[_T]]]:
    """Batches in lists of at least `size` items, but the last."""
    group: list[Sequence[_T]] = []
    for batch in batches:
        group.append(batch)
        if sum(map(len, group)) >= size:
            yield group
            group = []
    if group:
        yield group
