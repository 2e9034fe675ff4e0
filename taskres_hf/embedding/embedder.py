"""Pictures to embeddings with one base, one processor and one engine; decoding overlaps the tower."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, groupby, islice
from typing import Any, TypeVar

import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..encoders import picture_size
from ..errors import BaseModelError, TaskResError
from .engines.choose import (
    ImageEngine,
    candidates,
    engine_of_watched,
    make_engine,
    stock_engine,
)
from .engines.devices import SMALLEST_BATCH, DeviceTower, device_of, embed_ahead, is_accelerator
from .engines.proving import (
    CENTRED,
    CENTRED_ASKED,
    SECONDS_TO_PREPARE,
    STOCK,
    Proof,
    agrees,
    fastest,
    probe_pictures,
    prove,
    remember,
    remembered,
)
from .engines.rewriting import image_side_state, image_weights_digest, watched_module
from .preprocessing import Preprocessor
from .workers import Parts, cut, in_order, read_beside

_PREPARED_AHEAD = 64  # pictures prepared before the tower runs, where the two take turns: changing places costs both
_LARGE_JOB = 400  # batches from which measuring the engines pays: it takes about 24
_PAYS = 20  # times what converting the tower takes, so that it may be converted only to be measured


_T = TypeVar("_T")
_I = TypeVar("_I")


class Embedder:
    """Pictures to embeddings with one base, one processor and one engine.

    Args:
        base: the dual encoder. image_processor: its image processor.
        engine, precision: see `engines.choose`; the defaults give exactly what the model itself gives.
        exact_preprocessing: always use the stock image processor.
        draft_decoding: decode large JPEG pictures coarsely: faster, and not exactly the same pixels.
        crop: `"processor"`, or `"torchvision"` for the centre crop that published code made: where an odd number of
            rows or columns is cut off, torchvision rounds half to even and transformers down, one pixel apart.

    Attributes:
        engine: the `ImageEngine` that runs. batch_size: pictures a forward pass at which it is fastest.

    Raises:
        ConfigurationError: an unknown engine, precision or crop, or a combination that does not exist.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        image_processor: Any,
        engine: str = "torch",
        precision: str = "fp32",
        exact_preprocessing: bool = False,
        draft_decoding: bool = False,
        crop: str = "processor",
    ) -> None:
        self.base, self.image_processor = base, image_processor
        self._prepared_by, self._preparing = "", (exact_preprocessing, crop, draft_decoding)
        self._follow_processor()
        self._wanted, self._lock = (engine, precision), threading.RLock()
        self._choose_engine()

    def _follow_processor(self) -> None:
        """Prepare pictures as the image processor says now, where it was changed too."""
        said = self.image_processor.to_json_string()
        if said != self._prepared_by:
            exact, crop, draft = self._preparing
            self.preprocess = Preprocessor(self.image_processor, exact, crop)
            self.draft = self.preprocess.target_size() if draft else None
            self._prepared_by = said

    def _choose_engine(self) -> None:
        engine, precision = self._wanted
        self.engine = make_engine(self.base, engine, precision)
        self._is_ready = self.engine.is_stock
        self._device, self._made_of = device_of(self.base), image_side_state(self.base, contents=True)
        beside = is_accelerator(self._device)  # where whole pictures, for a stock processor, are held, they are few
        self.batch_size = self.engine.batch_size
        if beside and not self.preprocess.fast:
            self.batch_size = min(self.batch_size, SMALLEST_BATCH)
        self._may_choose = not beside and engine == "auto" and (precision == "auto" or self.engine.precision == "fp32")
        if self._may_choose and not self._is_ready:
            self._take(fastest(remembered(self.base), self.candidates()))

    def candidates(self) -> dict[str, tuple[str, str]]:
        """What may be chosen automatically, by name."""
        return {"-".join(pair): pair for pair in candidates(self.base, self._wanted[1])}

    def _take(self, name: str | None) -> None:
        """Run in the form of this name from now on; None: in the one there is."""
        if name == STOCK:
            self._run_stock()
        elif name is not None and name != self.engine.name:
            self.engine = make_engine(self.base, *self.candidates()[name])
            self._is_ready = self.engine.is_stock

    @property
    def key(self) -> list[Any]:
        """What an embedding depends on besides the picture."""
        self._follow_processor()
        kind = "fast" if self.preprocess.fast else "stock"
        kind += f" {self.draft}" if self.draft else ""
        kind += " torchvision" if self.preprocess.crop == "torchvision" else ""
        digest = image_weights_digest(self.base)
        name = self.engine.name + self.engine.variant
        return [digest, str(self.base.dtype), name, kind, self._prepared_by]

    @property
    def is_reproducible(self) -> bool:
        """Whether `key` says all: not where a hook, which has no digest, takes part in the tower."""
        return watched_module(self.base) is None

    @torch.no_grad()
    def get_ready(self, pictures: int = 0) -> ImageEngine:
        """Convert the tower, now rather than when the first pictures come, and compare it with what it was.

        Two probe pictures go both ways; where they come out differently the tower runs as it is, with a warning. Where
        the engine is automatic and `pictures` are many, the fastest form is measured and remembered.
        A tower that was changed since is converted and compared again.

        Returns:
            What runs. Threads wait for the one that compares.
        """
        with self._lock:
            self._get_ready(pictures)
            return self.engine

    def _get_ready(self, pictures: int) -> None:
        self._follow_processor()
        if device_of(self.base) != self._device:
            self._choose_engine()  # the model was moved
        if not self.engine.is_stock:
            if engine_of_watched(self.base, self.engine.name) is not None:
                self._run_stock()  # a hook that came after the engine
            elif self._made_of != image_side_state(self.base, contents=True):
                self._choose_engine()
        if self._is_ready:
            return
        probes = self._probes()
        expected = self._embedded(stock_engine(self.base), self.preprocess(probes))
        try:
            self.engine.get_ready()
            embeds = self.engine(self.preprocess(probes))
        except (TaskResError, MemoryError):
            raise
        except Exception as error:  # whatever a library that converts towers raises at one it does not know
            warnings.warn(
                f"{self.engine.name} cannot run this image tower, which runs as it is instead: {error}", stacklevel=4
            )
            self._run_stock()
            return
        self._made_of = image_side_state(self.base, contents=True)  # some modules keep what they were last given
        automatic = "auto" in self._wanted and self._wanted[1] in ("auto", "fp32")
        right = agrees(embeds, expected, self.engine.precision, CENTRED if automatic else CENTRED_ASKED)
        self._is_ready = True  # not before: whoever interrupts the comparison has it again
        if not right:
            warnings.warn(
                f"On this machine {self.engine.name} gives other embeddings than the image tower as it is, which runs "
                "instead.",
                stacklevel=4,
            )
            self._run_stock()
        elif self._may_choose and pictures >= _LARGE_JOB * self.batch_size:
            self._choose_fastest(pictures)

    def _probes(self) -> list[PIL.Image.Image]:
        """Two probe pictures, of the tower's own size where its image processor does not make them that."""
        probes, size = probe_pictures(), picture_size(self.base)
        left = next(iter(self.preprocess(probes).values())).shape[-2:]
        return probes if left == size else probe_pictures(*size)

    def _embedded(self, engine: ImageEngine, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings [B, D] of collated pictures.

        Raises:
            BaseModelError: the tower refuses pictures as its image processor leaves them.
        """
        try:
            return engine(inputs)
        except Exception as error:  # each library has its own
            shape, taken = next(iter(inputs.values())).shape[1:], picture_size(self.base)
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or shape == (3, *taken):
                raise
            said = str(error).partition("\n")[0]
            raise BaseModelError(
                f"The image tower takes pictures of {taken[0]} x {taken[1]} pixels, not {' x '.join(map(str, shape))} "
                f"numbers, as {type(self.image_processor).__name__} leaves them ({type(error).__name__}: "
                f"{said}). Give an image processor that scales and crops to that size, or "
                "pictures of it."
            ) from error

    def _choose_fastest(self, pictures: int) -> None:
        """Measure what was not measured here and is worth it for so many pictures; run in the fastest right form."""
        known, pairs = remembered(self.base), self.candidates()
        slow = {name for name, (engine, _) in pairs.items() if SECONDS_TO_PREPARE[engine]}
        if any(name not in known for name in pairs if name not in slow):
            known |= self.prove({name: pair for name, pair in pairs.items() if name not in slow})
            remember(self.base, known)
        job = pictures * (known[STOCK].seconds or 0.0)
        paying = {name for name in slow if job > _PAYS * SECONDS_TO_PREPARE[pairs[name][0]]}
        if any(name not in known for name in paying):  # all of them anew, since only one run's times can be compared
            known |= self.prove({name: pair for name, pair in pairs.items() if name not in slow or name in paying})
            remember(self.base, known)
        choice = fastest(known, pairs)
        if choice != self.engine.name:
            self._take(choice)
            if not self._is_ready:
                self.get_ready()

    @torch.no_grad()
    def batch_size_for(self, pictures: int) -> int:
        """Pictures a forward pass for a job of so many: `batch_size`, and on a GPU no more than its memory allows."""
        self.get_ready(pictures)
        tower = self.engine.beside
        if tower is None:
            return self.batch_size
        return tower.batch_size(pictures, self.batch_size, self.preprocess(self._probes()))

    @torch.no_grad()
    def prove(self, pairs: Mapping[str, tuple[str, str]] | None = None) -> dict[str, Proof]:
        """Try forms of the tower on this machine: whether they are right, and what a picture takes.

        Args:
            pairs: engine and precision by name; by default all that may be chosen automatically. The tower as it is,
                `"stock"`, is always among them.
        """
        pairs = self.candidates() if pairs is None else pairs
        engines = {STOCK: lambda: stock_engine(self.base)}
        for name, pair in pairs.items():
            engines[name] = partial(make_engine, self.base, *pair)
        before, probes = (self.engine, self._is_ready), self.preprocess(self._probes())
        try:
            return prove(engines, lambda engine: engine(probes), self._pace)
        finally:
            self.engine, self._is_ready = before

    def _pace(self, engine: ImageEngine) -> float:
        """Seconds a picture takes in a large job, with every core at work and its decoding left out."""
        self.engine, self._is_ready = engine, True
        probes, cores = self._probes(), torch.get_num_threads()
        batches = [[probes[number % 2] for number in range(self.batch_size)] for _ in range(cores)]
        start = time.perf_counter()
        for _ in self.stream(batches, lambda picture: picture, False, total=max(_LARGE_JOB, cores)):
            pass
        return (time.perf_counter() - start) / (cores * self.batch_size)

    def _run_stock(self) -> None:
        """Let the tower run as it is from now on."""
        self.engine, self._is_ready = stock_engine(self.base), True

    @torch.no_grad()
    def __call__(self, pictures: Sequence[PIL.Image.Image], augmented: bool = False) -> Tensor:
        """Embeddings [N, D] fp32 on the CPU of RGB pictures; `augmented` ones already have the tower's size."""
        return self._embedded(self.get_ready(), self.preprocess(pictures, augmented))

    @torch.no_grad()
    def stream(
        self,
        batches: Iterable[Sequence[_T]],
        load: Callable[[_T], PIL.Image.Image | None],
        augmented: bool,
        pad_to: int = 0,
        total: int | None = None,
    ) -> Iterator[tuple[Sequence[_T], Tensor | None]]:
        """Each batch with the embeddings of the pictures that `load` gave, in order; decoding overlaps the tower.

        As `stream_found`, for callers that know their pictures. Those of a batch pass the tower together, and no others
        with them, so that last bits are the same where a job that was interrupted goes on with the next batch.

        Args:
            load: the picture of an item, or None for one that cannot be read; in any thread.
            pad_to: fill smaller batches up to so many pictures, whose embeddings are thrown away: libraries multiply
                small matrices another way, so last bits would depend on how many pictures happen to be left over.
            total: number of batches of the whole job, of which these are the rest; by default these.
        """
        batches, cores = iter(batches), torch.get_num_threads()
        first = list(islice(batches, cores))
        under_way: deque[tuple[int, Sequence[_T]]] = deque()

        def items() -> Iterator[tuple[int, _T]]:
            for number, batch in enumerate(chain(first, batches)):
                under_way.append((number, batch))
                yield from ((number, item) for item in batch)

        def find(numbered: tuple[int, _T]) -> list[tuple[int, PIL.Image.Image]]:
            picture = load(numbered[1])
            return [] if picture is None else [(numbered[0], picture)]

        def until(number: int) -> Iterator[tuple[Sequence[_T], Tensor | None]]:
            while under_way and under_way[0][0] < number:
                yield under_way.popleft()[1], torch.cat(rows) if rows else None
                rows.clear()

        size, rows = max(map(len, first), default=1) or 1, list[Tensor]()
        count = len(first) if total is None else total
        found = self.stream_found(items(), find, augmented, size, count, pad_to=pad_to, apart=lambda number: number)
        for numbers, embeds in found:
            yield from until(numbers[0])
            rows.append(embeds)
            if len(numbers) == len(under_way[0][1]):
                yield from until(numbers[0] + 1)
        yield from until(sys.maxsize)

    @torch.no_grad()
    def stream_found(
        self,
        items: Iterable[_I],
        find: Callable[[_I], Sequence[tuple[_T, PIL.Image.Image]]],
        augmented: bool,
        batch_size: int,
        total: int,
        each: int = 1,
        pad_to: int | None = None,
        parts: Parts | None = None,
        apart: Callable[[_T], Any] = lambda name: None,
    ) -> Iterator[tuple[Sequence[_T], Tensor]]:
        """Names and embeddings [B, D] of the pictures of items, of which only reading one tells what it holds.

        On a CPU each core reads a few items or lets a batch pass the tower, whatever is next, so that one decodes while
        another multiplies, and none waits for another within a layer. With fewer batches than cores, and in engines
        with threads of their own, all cores decode a few batches, then all run the tower. Beside a GPU decoding runs
        ahead, of large jobs in processes of its own (`parts`). Batches are full but the last, whatever `find` gives of
        an item: no picture, one, or several. Of pictures no more are held than cores are at work on, and a few batches
        of what the tower takes.

        Args:
            find: pictures of an item, each with what to call it; in any thread.
            total: number of batches, if nothing were left out. each: pictures of an item, at most.
            pad_to: see `stream`; by default a whole batch. parts: does what `find` does, in any process.
            apart: pictures for whose names it differs do not pass the tower together; by default all may.
        """
        self.get_ready()
        full = min(batch_size, self.batch_size) if pad_to is None else pad_to
        tower = self.engine.beside

        def batched(found: Iterable[tuple[_T, Any]]) -> Iterator[list[tuple[_T, Any]]]:
            for _, some in groupby(found, lambda pair: apart(pair[0])):
                yield from cut(some, batch_size)

        @torch.no_grad()
        def prepare(part: Sequence[_I]) -> list[tuple[_T, Any]]:
            found = (pair for item in part for pair in find(item))
            return [(name, self.preprocess.prepare(picture, augmented, tower is not None)) for name, picture in found]

        @torch.no_grad()
        def embed(batch: Sequence[tuple[_T, Any]]) -> tuple[Sequence[_T], Tensor]:
            values = self.preprocess.collate([picture for _, picture in batch], augmented)
            embeds = self._embedded(self.engine, {name: _padded(value, full) for name, value in values.items()})
            return [name for name, _ in batch], embeds[: len(batch)]

        if tower is not None:
            ahead, parts = (max(2 * batch_size // each, 1), parts) if self.preprocess.fast else (_PREPARED_AHEAD, None)
            with closing(read_beside(items, prepare, ahead, parts)) as read:
                yield from self._embed_beside(tower, read, augmented, batch_size, pad_to, apart)
        elif self._has_core_each(total):
            yield from _read_on_every_core(items, prepare, batched, embed, batch_size // (4 * each) or 1)
        else:  # the stock processor is given whole pictures: hold few
            ahead = max(_PREPARED_AHEAD if self.preprocess.fast else 1, batch_size)
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
                yield from map(embed, batched(_in_turn(items, prepare, pool, ahead // each or 1)))

    def _embed_beside(
        self,
        tower: DeviceTower,
        read: Iterator[tuple[_T, Any]],
        augmented: bool,
        size: int,
        pad_to: int | None,
        apart: Callable[[_T], Any],
    ) -> Iterator[tuple[Sequence[_T], Tensor]]:
        """Names and embeddings of prepared pictures, by a tower beside which pictures go on being read."""

        def collate(prepared: Sequence[Any]) -> dict[str, Tensor]:
            return self.preprocess.collate(prepared, augmented, tower.pins)

        return embed_ahead(tower, read, size, collate, self.preprocess.finisher(tower.device), pad_to, apart)

    def _has_core_each(self, batches: int) -> bool:
        """Whether every core takes batches of its own."""
        return self.engine.engine == "torch" and self.preprocess.fast and 1 < torch.get_num_threads() <= batches


def use_engine(model: Any, engine: str | None = "auto", precision: str = "auto") -> str:
    """Let `forward`, and so `pipeline`, run a loaded classifier's image tower in a faster form, on the CPU.

    The model keeps its modules, and whoever asks for hidden states or attentions, or trains, runs those. A form that
    gives other embeddings of two probe pictures is not taken, as in `Embedder`.

    Args:
        model: a `TaskResCLIPForImageClassification` or `TaskResForImageClassification`.
        engine, precision: see `engines.choose`; None for the tower as it is again.

    Returns:
        What runs, such as `"torch-bf16"`; `"stock"` for the tower as it is.

    Raises:
        ConfigurationError: an unknown engine or precision, or a combination that does not exist here. The model then
            runs as before.
    """
    if engine is None:
        model.run_image_tower = None
        return STOCK
    tower = _FasterTower(model.image_processor, engine, precision)
    chosen = tower.engine_for(model.clip)
    model.run_image_tower = tower
    return STOCK if chosen.is_stock else chosen.name


class _FasterTower:
    """Runs the image tower of whichever base it is given; its copies, in this process or another, begin anew."""

    def __init__(self, image_processor: Any, engine: str, precision: str) -> None:
        self._wanted = (image_processor, engine, precision)
        self._embedder: Embedder | None = None

    def __reduce__(self) -> Any:
        return type(self), self._wanted

    def engine_for(self, base: PreTrainedModel) -> ImageEngine:
        """The form that runs; a tower that is another, or was changed since, is converted anew."""
        embedder = self._embedder
        if embedder is None or embedder.base is not base:
            self._embedder = embedder = Embedder(base, *self._wanted, exact_preprocessing=True)
        return embedder.get_ready()

    @torch.no_grad()
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.engine_for(base)(inputs).to(next(iter(inputs.values())).device)


def _padded(rows: Tensor, count: int) -> Tensor:
    """The rows [B, ...], the last one repeated until there are `count`."""
    missing = count - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def _read_on_every_core(
    items: Iterable[_I],
    prepare: Callable[[Sequence[_I]], list[tuple[_T, Any]]],
    batched: Callable[[Iterable[tuple[_T, Any]]], Iterator[list[tuple[_T, Any]]]],
    embed: Callable[[Sequence[tuple[_T, Any]]], tuple[Sequence[_T], Tensor]],
    few: int,
) -> Iterator[tuple[Sequence[_T], Tensor]]:
    """What `embed` makes of batches of what `prepare` finds; each core reads a few items, or embeds a batch."""
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        jobs = ((None, pool.submit(prepare, part)) for part in cut(items, few))
        found = chain.from_iterable(some for _, some in in_order(jobs, 2 * cores))
        batches = ((None, pool.submit(embed, batch)) for batch in batched(found))
        yield from (result for _, result in in_order(batches, cores))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _in_turn(
    items: Iterable[_I], prepare: Callable[[Sequence[_I]], list[tuple[_T, Any]]], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[_T, Any]]:
    """What `prepare` finds in items, `ahead` of them at a time by all threads; none while the tower runs."""
    for group in cut(items, ahead):
        yield from chain.from_iterable(list(pool.map(prepare, ([item] for item in group))))
