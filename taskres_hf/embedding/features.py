"""Frozen image embeddings, computed once, with augmented views if wanted, and kept on disk.

The backbone never changes, so a picture's embedding never does: training epochs run over embeddings, and the cache is
keyed by the content of the pictures, the backbone's weights and the processor, not by file names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile
from torch import Tensor
from tqdm.auto import tqdm

from ..data.labelled import LabelledImages
from ..errors import ConfigurationError, ImageError
from ..pictures import Remarks
from .cache import FileDigests, KeptRows, file_of
from .embedder import Embedder
from .texts import TextEmbedder
from .workers import Parts, PictureReader, ReadPicture, is_readable_elsewhere

_FORMAT = 6
_LOOK = 1024  # pictures looked at before the next are, until one must pass the tower
_GATHERED = 4096  # pictures of each process that are exchanged at once
_DIGEST = 32  # bytes
_Job = tuple[int, int]  # view and row


@dataclass(frozen=True)
class ImageFeatures:
    """Embeddings of a labelled set of pictures.

    Attributes:
        image_embeds: [V, N, D] fp32, not normalised: V augmented views, or one plain view.
        labels: [N] class ids, or [N, K] of 0 and 1 (floats) where pictures have several labels.
        class_names: K names in label order.
        digest: digest of the pictures' content and labels, in order.
        skipped: positions of pictures that could not be read and were left out.
        digests: SHA-256 of each picture's content, N hexadecimal strings; empty where embeddings came without pictures.
        noun: what messages call one of them.
    """

    image_embeds: Tensor
    labels: Tensor
    class_names: list[str]
    digest: str
    skipped: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()
    noun: str = "picture"

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def each_once(self, known: Collection[str] = ()) -> list[int]:
        """Rows whose picture is neither in an earlier row nor among `known` digests; all where there are no digests."""
        if not self.digests:
            return list(range(len(self)))
        first = {digest: row for row, digest in reversed(list(enumerate(self.digests)))}
        return sorted(row for digest, row in first.items() if digest not in known)

    def select(self, indices: Sequence[int]) -> ImageFeatures:
        """The same embeddings restricted to positions, in that order."""
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        digest = hashlib.sha256(f"{self.digest} {list(indices)}".encode()).hexdigest()
        return replace(
            self,
            image_embeds=self.image_embeds[:, chosen],
            labels=self.labels[chosen],
            digest=digest,
            skipped=(),
            digests=tuple(self.digests[index] for index in indices) if self.digests else (),
        )


def embed_images(
    embedder: Embedder | TextEmbedder,
    images: LabelledImages,
    *,
    views: int = 0,
    seed: int = 1,
    batch_size: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    progress: bool = True,
    accelerator: Any = None,
) -> ImageFeatures:
    """Embed pictures with the frozen image tower, once per view.

    Args:
        embedder: the base, its processor and the engine.
        images: N labelled pictures.
        views: 0 for the plain picture as in evaluation, V > 0 for V augmented views (random resized crop and flip,
            drawn from `seed` and the picture's content).
        batch_size: pictures a forward pass, by default the engine's best, on a GPU as many as its memory has room for;
            it changes nothing but speed and memory.
        cache_dir: folder to keep embeddings in; None keeps nothing.
        on_error: `"raise"` names all unreadable pictures at once; `"skip"` leaves them out with a warning.
        accelerator: an `accelerate.Accelerator`: each process embeds its share, all get the whole.

    An embedding that was interrupted goes on where it stopped, if `cache_dir` is the same.

    Raises:
        ImageError: pictures that cannot be read (`on_error="raise"`), or none can be read.
    """
    if views < 0:
        raise ConfigurationError(f"`views` must be 0 (plain pictures) or more; got {views}.")
    if views and isinstance(embedder, TextEmbedder):
        raise ConfigurationError("Texts have no augmented views: leave views and augment_online out.")
    if on_error not in ("raise", "skip"):
        raise ConfigurationError(f"`on_error` must be 'raise' or 'skip'; got {on_error!r}.")
    if cache_dir is not None and not embedder.is_reproducible:
        warnings.warn("Hooks take part in the image tower: its embeddings are not cached.", stacklevel=2)
        cache_dir = None
    work = _Pass(embedder, images, views, seed, None if cache_dir is None else Path(cache_dir), accelerator)
    work.run(batch_size, progress)
    work.remarks.warn()
    readable = [row for row, digest in enumerate(work.digests) if digest is not None]
    if work.embedded and isinstance(embedder, TextEmbedder):
        embedder.warn_of_cut(len(readable))
    good = work.done.all(dim=0)
    problems = {row: work.problem(row) for row in (~good).nonzero().flatten().tolist()}
    if problems:
        _report(problems, images, on_error)
    assert work.table is not None
    return ImageFeatures(
        work.table if bool(good.all()) else work.table[:, good],
        torch.tensor(images.labels)[good],
        images.class_names,
        _content(images, [str(work.digests[row]) for row in readable]),
        tuple(sorted(problems)),
        tuple(str(work.digests[row]) for row in good.nonzero().flatten().tolist()),
        images.noun,
    )


def content_digest(images: LabelledImages, digests: Sequence[str] | None = None) -> str:
    """The `digest` that embeddings of these pictures have, without embedding them; reads every picture's bytes.

    Args:
        digests: of each picture, where they are known.
    """
    if digests is not None:
        return _content(images, list(digests))

    def digest(row: int) -> str | None:
        with suppress(ImageError):
            return images.digest(row)
        return None

    with ThreadPoolExecutor(_readers()) as pool:
        return _content(images, [found for found in pool.map(digest, range(len(images))) if found is not None])


def _content(images: LabelledImages, digests: list[str]) -> str:
    return hashlib.sha256(json.dumps([digests, images.labels, images.class_names]).encode()).hexdigest()


def _readers() -> int:
    """Threads that read files before the tower is needed: more would wait for the same disk."""
    return min(os.cpu_count() or 1, 8)


class _Pass:
    """One pass over N pictures: each is read once, by one process, and what is known of it is not made again.

    Attributes:
        table: [V, N, D] embeddings, or None before there is one. done: [V, N], which are there.
        digests: of pictures whose bytes could be read. embedded: whether the tower was needed.
    """

    def __init__(
        self, embedder: Any, images: LabelledImages, views: int, seed: int, cache_dir: Path | None, accelerator: Any
    ) -> None:
        self.embedder, self.images, self.views, self.seed = embedder, images, views, seed
        self.accelerator, self.cache_dir = accelerator, cache_dir
        self.world: int = 1 if accelerator is None else accelerator.num_processes
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.each = max(views, 1)
        self.remarks, self.embedded = Remarks(), False
        self.digests: list[str | None] = [None] * len(images)
        self._problems: dict[int, str] = {}
        self._lock = threading.Lock()
        self._bar: Any = None
        kept = cache_dir is not None and images.noun == "picture"
        self._files = FileDigests(cache_dir / "files" if kept and cache_dir is not None else None)
        self._begin()  # which looks at what the image processor says now
        self._read = PictureReader(embedder.preprocess, embedder.draft, views, seed)

    def _begin(self) -> None:
        """Nothing is known of any picture; the cache is that of the form the tower has now."""
        self.table: Tensor | None = None
        self.done = torch.zeros(self.each, len(self.images), dtype=torch.bool)
        self._owners: dict[bytes, int] = {}  # rows whose picture is the first of its content
        self._opened: dict[int, list[tuple[_Job, Any]]] = {}
        folder = None
        if self.cache_dir is not None:
            spec = [_FORMAT, *self.embedder.key, self.seed if self.views else None]
            spec += ["cut short"] * ImageFile.LOAD_TRUNCATED_IMAGES  # what else is an error has an embedding then
            folder = self.cache_dir / hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32]
        self._cache = KeptRows(folder)

    # ---------------------------------------------------------------------- one picture, in any thread

    def _row_key(self, digest: str, view: int) -> bytes:
        return hashlib.sha256(f"{digest} {view}".encode()).digest() if self.views else bytes.fromhex(digest)

    def _jobs(self, digest: str) -> list[tuple[int, bytes]]:
        return [(view, self._row_key(digest, view)) for view in range(self.each)]

    def open(self, row: int) -> list[tuple[_Job, Any]]:
        """What must pass the tower of a picture: nothing where it is known, cannot be read, or came up before."""
        if (opened := self._opened.pop(row, None)) is not None:
            return opened
        found = self._open(row)
        if not found:
            self._count(self.each)
        return found

    def _count(self, jobs: int) -> None:
        with self._lock:
            self._bar.update(jobs)

    def _open(self, row: int) -> list[tuple[_Job, Any]]:
        try:
            cell = self.images.source(row)
            if self._is_known(row, cell):
                return []
            began = time.time_ns()
            content, digest, status = self.images.read(row, cell)
        except ImageError as error:
            self._problems[row] = str(error)
            return []
        left = self._new_views(row, cell, digest, status, began)
        return self._decoded(row, digest, left, content) if left else []

    def _file(self, cell: Any) -> str | None:
        return file_of(cell) if self.images.noun == "picture" else None

    def _is_known(self, row: int, cell: Any) -> bool:
        """Whether a picture's file did not change since it was read, and all its embeddings are kept."""
        file = self._file(cell)
        digest = None if file is None else self._files.find(file)
        if digest is None or not all(key in self._cache for _, key in self._jobs(digest)):
            return False
        self.digests[row] = digest
        return True

    def _new_views(self, row: int, cell: Any, digest: str, status: os.stat_result | None, began: int) -> list[int]:
        """The views of a picture that was read which are neither kept nor another picture's."""
        self.digests[row] = digest
        if (file := self._file(cell)) is not None and status is not None:
            self._files.note(file, status, digest, began)
        with self._lock:  # of two pictures alike the first is embedded
            new = [(view, key) for view, key in self._jobs(digest) if key not in self._cache]
            return [view for view, key in new if self._owners.setdefault(key, row) == row]

    def _decoded(self, row: int, digest: str, views: list[int], content: Any) -> list[tuple[_Job, Any]]:
        try:
            picture = self.images.image(row, None if self.views else self.embedder.draft, self.remarks, content)
            return [
                ((view, row), some)
                for view, some in zip(views, self._read.pictures(picture, digest, views), strict=True)
            ]
        except ImageError as error:
            message = str(error)
            self._fail(row, message if message.startswith("Row ") else self._named(row, message))
            return []

    def _fail(self, row: int, message: str) -> None:
        """Say why a picture has no embedding; a copy of it may have one, as under the ending that tells its format."""
        self._problems[row] = message
        with self._lock:
            for _, key in self._jobs(self.digests[row] or ""):
                if self._owners.get(key) == row:
                    del self._owners[key]

    # ---------------------------------------------------------------------- the same, read by another process

    def _ask(self, row: int) -> Any:
        """The cell of a picture that another process is to read; None for one that `open` need not read, or must."""
        try:
            cell = None if row in self._opened else self.images.source(row)
        except ImageError:
            return None
        return cell if cell is not None and is_readable_elsewhere(cell) and not self._is_known(row, cell) else None

    def _take_read(self, row: int, cell: Any, read: ReadPicture) -> list[tuple[_Job, Any]]:
        """As `open`, of a picture that was read, with what the tower takes of it."""
        left = [] if read.digest is None else self._new_views(row, cell, read.digest, read.status, read.began)
        for remark in read.remarks if left else ():
            self.remarks.add(*remark)
        if read.error is not None and (left or read.digest is None):
            named = f"Row {self.images.indices[row]}: {read.error}"
            self._fail(row, named if read.is_named else self._named(row, read.error))
        found = [((view, row), read.prepared[view]) for view in left if view in read.prepared]
        if not found:
            self._count(self.each)
        return found

    def _parts(self, left: list[int]) -> Parts | None:
        """How other processes may read pictures; None where what is to be read is no file, or no picture."""
        with suppress(ImageError):
            if self.images.noun == "picture" and is_readable_elsewhere(self.images.source(left[-1])):
                return Parts(self._ask, self._read, self._take_read, len(left) * self.each)
        return None

    def problem(self, row: int) -> str:
        """Why a picture cannot be read; tried again where another process has met it."""
        if row not in self._problems:
            try:
                self.images.image(row)
                self._problems[row] = self._named(row, "it could not be read a moment ago; run again")
            except ImageError as error:
                self._problems[row] = str(error)
        return self._problems[row]

    def _named(self, row: int, message: str) -> str:
        source = self.images.source(row)
        path = source.get("path") if isinstance(source, Mapping) else source
        name = f"{path!r}: " if isinstance(path, str) and path else ""
        return f"Row {self.images.indices[row]}: {name}{message}"

    # ---------------------------------------------------------------------- all of them

    def run(self, batch_size: int | None, progress: bool) -> None:
        """Embed, or take from the cache, all pictures that can be read."""
        left = self._undone()
        with tqdm(
            total=len(left) * self.each, desc=f"Embedding {self.images.noun}s", delay=0.5, leave=False,
            unit="img" if self.images.noun == "picture" else " texts", disable=not progress or self.rank != 0,
        ) as self._bar:  # fmt: skip
            try:
                while left:  # again where what the cache held turned out to be damaged
                    if self._embed(left, batch_size):
                        self._take(left)
                    left = [row for row in self._undone() if self._is_open(row)]
            except BaseException:  # an interrupt too: what is done is kept
                self._cache.flush()
                self._files.flush()
                raise
        self._repeat()
        self._cache.close()
        self._files.close()
        if self.world > 1:
            self._gather()

    def _undone(self) -> list[int]:
        """This process's pictures without an embedding."""
        rows: list[int] = (~self.done.all(dim=0)).nonzero().flatten().tolist()
        return [row for row in rows if row % self.world == self.rank]

    def _is_open(self, row: int) -> bool:
        """Whether a picture is neither known, nor unreadable, nor another one's copy."""
        digest = self.digests[row]
        if row in self._problems:
            return False
        return digest is None or any(
            not self.done[view, row] and self._owners.get(key, row) == row for view, key in self._jobs(digest)
        )

    def _embed(self, rows: list[int], batch_size: int | None) -> bool:
        """Let what is new pass the tower; False where that takes another form, and all begins anew."""
        left = self._search(rows)
        if not left:
            return True
        form = self.embedder.engine.name
        self.embedder.get_ready(len(left) * self.each)
        if self.embedder.engine.name != form:  # where another turns out to be right, so is another cache
            self._begin()
            return False
        self.embedded = True
        size = batch_size or self.embedder.batch_size_for(len(self.images) * self.each)
        total, parts = math.ceil(len(self.images) * self.each / size), self._parts(left)
        stream: Any = self.embedder.stream_found(left, self.open, self.views > 0, size, total, self.each, parts=parts)
        with closing(stream):
            for jobs, embeds in stream:
                self._keep(jobs, embeds)
                self._count(len(jobs))
        return True

    def _search(self, rows: list[int]) -> list[int]:
        """The rows from the first on that must pass the tower; those opened by then have their pictures at hand."""
        met = threading.Event()

        def look(row: int) -> bool:
            if met.is_set():
                return True
            if found := self.open(row):
                self._opened[row] = found
                met.set()
            return bool(found)

        with ThreadPoolExecutor(_readers()) as pool:
            for start in range(0, len(rows), _LOOK):
                block = rows[start : start + _LOOK]
                looked = list(pool.map(look, block))
                if met.is_set():
                    return [row for row, needed in zip(block, looked, strict=True) if needed] + rows[start + _LOOK :]
                self._files.save()
        return []

    def _keep(self, jobs: Sequence[_Job], embeds: Tensor) -> None:
        """Take embeddings [n, D] of jobs over, and keep those that are finite."""
        self._fill([view for view, _ in jobs], [row for _, row in jobs], embeds)
        finite = embeds.isfinite().all(dim=1)
        keys = [self._row_key(str(self.digests[row]), view) for view, row in jobs]
        self._cache.add([key for key, good in zip(keys, finite.tolist(), strict=True) if good], embeds[finite])
        self._files.save()

    def _fill(self, views: Any, rows: Any, embeds: Tensor) -> None:
        if self.table is None:
            self.table = torch.zeros(*self.done.shape, embeds.shape[1])
        self.table[views, rows] = embeds
        self.done[views, rows] = True

    def _take(self, rows: list[int]) -> None:
        """Take from the cache what it has of pictures that were read, or need not be."""
        jobs = [
            (view, row, key) for row in rows if (digest := self.digests[row]) is not None and row not in self._problems
            for view, key in self._jobs(digest) if not self.done[view, row] and key not in self._owners
        ]  # fmt: skip
        for positions, embeds in self._cache.take([key for _, _, key in jobs]):
            self._fill([jobs[place][0] for place in positions], [jobs[place][1] for place in positions], embeds)

    def _repeat(self) -> None:
        """Give pictures that are the same as another its embedding."""
        for row in self._undone():
            if (digest := self.digests[row]) is None or self.table is None:
                continue
            for view, key in self._jobs(digest):
                owner = self._owners.get(key, row)
                if not self.done[view, row] and self.done[view, owner]:
                    self.table[view, row] = self.table[view, owner]
                    self.done[view, row] = True

    def _gather(self) -> None:
        """Every process's pictures (dealt out round robin) with every process; some at a time, for their size."""
        accelerator, total = self.accelerator, len(self.images)
        dim = 0 if self.table is None else self.table.shape[2]
        dim = int(accelerator.gather(torch.tensor([dim], device=accelerator.device)).max())
        if self.table is None:
            self.table = torch.zeros(*self.done.shape, dim)
        for start in range(0, total, _GATHERED * self.world):
            mine = torch.arange(start, min(start + _GATHERED * self.world, total))[self.rank :: self.world]
            padded = torch.zeros(_GATHERED, self.each * (dim + 1) + _DIGEST + 1)
            padded[: len(mine)] = torch.cat(
                [
                    self.table[:, mine].transpose(0, 1).flatten(1), self.done[:, mine].T.float(),
                    torch.tensor([_as_numbers(self.digests[row]) for row in mine.tolist()]).view(-1, _DIGEST + 1),
                ],
                dim=1,
            )  # fmt: skip
            everyone = accelerator.gather(padded.to(accelerator.device)).cpu().view(self.world, _GATHERED, -1)
            whole = everyone.transpose(0, 1).flatten(0, 1)[: total - start]
            rows = slice(start, start + len(whole))
            embeds, done, numbers = whole.split([self.each * dim, self.each, _DIGEST + 1], dim=1)
            self.table[:, rows] = embeds.view(-1, self.each, dim).transpose(0, 1)
            self.done[:, rows] = done.bool().T
            for row, values in zip(range(start, total), numbers.long().tolist(), strict=False):
                self.digests[row] = bytes(values[1:]).hex() if values[0] else None


def _as_numbers(digest: str | None) -> list[float]:
    """Whether there is a digest, and its bytes."""
    return [0.0] * (_DIGEST + 1) if digest is None else [1.0, *map(float, bytes.fromhex(digest))]


def _report(problems: dict[int, str], images: LabelledImages, on_error: str) -> None:
    listed = "\n".join(f"  {message}" for _, message in sorted(problems.items())[:20])
    more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
    if len(problems) == len(images):
        raise ImageError(f"None of the {images.noun}s can be read ({len(images)} of {len(images)}):\n{listed}{more}")
    message = f"{len(problems)} of {len(images)} {images.noun}s cannot be read:\n{listed}{more}"
    if on_error == "raise":
        raise ImageError(f"{message}\nRemove them, or leave them out with on_error='skip' (--on-error skip).")
    warnings.warn(f"{message}\nThey are left out.", stacklevel=3)
