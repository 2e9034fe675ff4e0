"""Pictures read ahead beside a device: by threads, or in large jobs by processes, since one cannot keep a GPU busy.

A `torch.utils.data.DataLoader` starts the processes, keeps the order, holds no more than a few pictures a process, and
ends them, also where this one is killed. They are started afresh rather than forked, so that none has this one's
threads and devices; what a picture is goes to them, and bytes of the tower's size come back in shared memory: through a
pipe, which a process may be killed in the midst of filling, this one could wait for the rest for ever. Where processes
cannot be started, or one is killed, threads go on.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import threading
import time
import types
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from PIL import ImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigurationError, ImageError
from ..pictures import Remarks, is_address, read_image, read_once
from .preprocessing import Preprocessor, augment, crop_size

_LARGE_JOB = 10_000  # pictures from which processes pay: starting them takes seconds
_FEWEST_CORES = 4
_MOST = 32  # processes
_TOO_MANY = 1024  # that anyone asks for: more are a slip that would bring the machine down
_PART = 8  # pictures a process is given at once
_AHEAD = 2  # parts that wait for a process; with bytes of 8 pictures, what containers have of shared memory holds them
WORKERS = "TASKRES_WORKERS"
_I = TypeVar("_I")
_T = TypeVar("_T")


class Parts(NamedTuple):
    """Finding an item's pictures in three parts, of which the middle one may run in another process.

    `ask(item)` gives, here, the cell that is to be read, or None where there is nothing to read elsewhere;
    `read(cell)` can be pickled; `take(item, cell, read)` gives, here and in order, prepared pictures with what to call
    them.
    """

    ask: Callable[[Any], Any]
    read: PictureReader
    take: Callable[[Any, Any, ReadPicture], list[tuple[Any, Any]]]
    pictures: int


def is_readable_elsewhere(cell: Any) -> bool:
    """Whether a cell says where a picture is, or holds its file, rather than being a picture or an address."""
    if isinstance(cell, Mapping):
        return cell.get("bytes") is not None or is_readable_elsewhere(cell.get("path"))
    return isinstance(cell, (str, os.PathLike)) and not is_address(os.fspath(cell))


def worker_count(pictures: int) -> int:
    """Processes that read so many pictures beside a device; 0 for threads. `TASKRES_WORKERS` decides where it is set.

    Raises:
        ConfigurationError: `TASKRES_WORKERS` is no whole number from 0 to 1,024.
    """
    if multiprocessing.current_process().daemon:  # itself a worker, which may start none
        return 0
    given = os.environ.get(WORKERS, "").strip()
    if given:
        if not given.isdecimal() or int(given) > _TOO_MANY:
            raise ConfigurationError(
                f"{WORKERS} must be a number of processes, 0 for none and {_TOO_MANY:,} at most; got {given!r}."
            )
        return int(given)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "").strip()  # processes, as torchrun says it
    cores //= max(int(sharing), 1) if sharing.isdecimal() else 1
    return min(cores - 1, _MOST) if cores >= _FEWEST_CORES and pictures >= _LARGE_JOB else 0


@dataclass
class ReadPicture:
    """What became of a picture's cell.

    Attributes:
        digest: of the content; None where it cannot be read. status, began: see `FileDigests.note`.
        prepared: by view, what the tower takes. error: why there is none; unnamed where it does not say which picture.
        remarks: arguments of `Remarks.add`.
    """

    digest: str | None = None
    status: os.stat_result | None = None
    began: int = 0
    prepared: dict[int, Any] = field(default_factory=dict)
    error: str | None = None
    is_named: bool = True
    remarks: list[tuple[str, Any, str]] = field(default_factory=list)


class _Noted(Remarks):
    """Remarks to be made in another process."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, Any, str]] = []

    def add(self, kind: str, key: Any, name: str) -> None:
        self.all.append((kind, key, name))


class PictureReader:
    """Reads a picture once, digests, decodes and prepares it, in any process; it touches no device.

    Args:
        preprocess: prepares it as bytes. draft: see `read_image`. views, seed: see `embed_images`.
    """

    def __init__(self, preprocess: Preprocessor, draft: tuple[int, int] | None, views: int = 0, seed: int = 1) -> None:
        self.preprocess, self.draft, self.views, self.seed = preprocess, draft, views, seed
        self.limits = (PIL.Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)  # as the user has set them

    def __call__(self, cell: Any) -> ReadPicture:
        PIL.Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self.limits
        found, remarks = ReadPicture(began=time.time_ns()), _Noted()
        try:
            content, found.digest, found.status = read_once(cell)
            picture = read_image(content, None if self.views else self.draft, remarks)
        except ImageError as error:
            found.error = str(error)
            return found
        finally:
            found.remarks = remarks.all
        try:
            found.prepared = {
                view: self.preprocess.prepare(some, self.views > 0, as_bytes=True)
                for view, some in enumerate(self.pictures(picture, found.digest))
            }
        except ImageError as error:
            found.error, found.is_named = str(error), False
        return found

    def pictures(self, picture: PIL.Image.Image, digest: str, views: Iterable[int] | None = None) -> list[Any]:
        """The views of a picture, or the picture itself where there are none.

        Raises:
            ImageError: see `Preprocessor.check`.
        """
        if not self.views:
            self.preprocess.check(picture)
            return [picture]
        size, seed = crop_size(self.preprocess.stock), f"{self.seed} {digest}"
        which = range(self.views) if views is None else views
        return [augment(picture, size, random.Random(f"{seed} {view}")) for view in which]


class _Cells(Dataset[ReadPicture]):
    """What a process runs: a loader's "index" is the cell itself."""

    def __init__(self, read: PictureReader) -> None:
        self.read = read

    def __getitem__(self, cell: Any) -> ReadPicture:
        return self.read(cell)


def _end_with_parent(_: int) -> None:
    """Let this process end where the one it reads for is killed: torch looks at the server that started it."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _packed(found: list[ReadPicture]) -> tuple[list[ReadPicture], Tensor | None]:
    """Pictures that were read, and the bytes [n, H, W, 3] of all that there is of them, in shared memory."""
    pixels = [some for read in found for some in read.prepared.values()]
    places = iter(range(len(pixels)))
    for read in found:
        read.prepared = {view: next(places) for view in read.prepared}
    return found, torch.from_numpy(np.stack(pixels)) if pixels else None


def _unpacked(found: list[ReadPicture], pixels: Tensor | None) -> list[ReadPicture]:
    """What `_packed` was given, in memory of this process."""
    rows = None if pixels is None else pixels.numpy().copy()
    for read in found:
        read.prepared = {} if rows is None else {view: rows[place] for view, place in read.prepared.items()}
    return found


def read_beside(
    items: Iterable[_I], prepare: Callable[[Sequence[_I]], list[_T]], ahead: int, parts: Parts | None
) -> Generator[_T, None, None]:
    """What `prepare` finds in items, in order, while something else goes on: by processes where that pays.

    Args:
        prepare: names and prepared pictures of some items, in any thread. ahead: items that are read before they are
            asked for, by threads. parts: does the same in any process; None where nothing can.
    """

    def by_threads(items: Iterable[_I]) -> Iterator[_T]:
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
        try:
            jobs = ((None, pool.submit(prepare, [item])) for item in items)
            yield from chain.from_iterable(some for _, some in in_order(jobs, ahead))
        finally:
            pool.shutdown(cancel_futures=True)

    count = 0 if parts is None else worker_count(parts.pictures)
    yield from (
        by_threads(items) if parts is None or not count else _by_processes(items, prepare, parts, count, by_threads)
    )


def _by_processes(
    items: Iterable[_I],
    prepare: Callable[[Sequence[_I]], list[Any]],
    parts: Parts,
    count: int,
    by_threads: Callable[[Iterable[_I]], Iterator[Any]],
) -> Iterator[Any]:
    """What `prepare` finds in items, in order, read by `count` processes; by threads where processes fail."""
    left, given = iter(items), deque[tuple[list[_I], list[Any]]]()

    def cells() -> Iterator[list[Any]]:
        while part := list(islice(left, _PART)):
            asked: list[Any] = []
            given.append((part, asked))
            asked += map(parts.ask, part)
            yield [cell for cell in asked if cell is not None]

    loader = DataLoader(
        _Cells(parts.read), batch_sampler=cells(), num_workers=count, collate_fn=_packed,
        worker_init_fn=_end_with_parent, prefetch_factor=_AHEAD,
        multiprocessing_context=_context(parts.read), generator=torch.Generator(),  # the user's draws none less
    )  # fmt: skip
    loaded: Any = None
    try:
        while True:
            try:
                if loaded is None:
                    with _without_main():
                        loaded = iter(loader)
                found = next(loaded, None)
            except Exception as error:  # whatever keeps them from starting or ends them; a real one comes up again
                first = str(error).partition("\n")[0]
                warnings.warn(f"Pictures are read by threads, as processes fail: {first}", stacklevel=2)
                break
            if found is None:
                return
            part, asked = given.popleft()
            results = iter(_unpacked(*found))
            for item, cell in zip(part, asked, strict=True):
                yield from prepare([item]) if cell is None else parts.take(item, cell, next(results))
    finally:
        if loaded is not None:
            loaded._shutdown_workers()  # now, not when the last traceback that knows of it is gone
    yield from by_threads(chain(chain.from_iterable(part for part, _ in given), left))


def _context(read: PictureReader) -> Any:
    """How processes are started: from a server that has imported what they need once, where there can be one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(read.preprocess.stock).__module__])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import the script that runs: one without an `if __name__ ...` would run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def cut(items: Iterable[_I], size: int) -> Iterator[list[_I]]:
    """Items in lists of `size`, the last one shorter."""
    items = iter(items)
    while part := list(islice(items, size)):
        yield part


def in_order(jobs: Iterable[tuple[_T, Future[Any]]], count: int) -> Iterator[tuple[_T, Any]]:
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
