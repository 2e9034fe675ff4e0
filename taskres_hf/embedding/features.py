"""Frozen image embeddings, computed once, with augmented views if wanted, and kept on disk.

The backbone never changes, so a picture's embedding never does: training epochs run over embeddings, and the cache is
keyed by the content of the pictures, the backbone's weights and the processor, not by file names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.labelled import LabelledImages
from ..errors import ConfigurationError, ImageError
from ..pictures import Remarks
from .cache import EmbeddingCache
from .embedder import Embedder
from .preprocessing import augment, crop_size
from .texts import TextEmbedder

_FORMAT = 5


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
        batch_size: pictures a forward pass, by default the engine's best; it changes nothing but speed and memory.
        cache_dir: folder to keep embeddings in; None keeps nothing.
        on_error: `"raise"` names all unreadable pictures at once; `"skip"` leaves them out with a warning.
        accelerator: an `accelerate.Accelerator`: each process embeds its share, all get the whole.

    An embedding that was interrupted goes on where it stopped, if `cache_dir` is the same.

    Raises:
        ImageError: pictures that cannot be read (`on_error="raise"`), or none can be read.
    """
    if views < 0:
        raise ConfigurationError(f"`views` must be 0 (plain pictures) or more; got {views}.")
    if on_error not in ("raise", "skip"):
        raise ConfigurationError(f"`on_error` must be 'raise' or 'skip'; got {on_error!r}.")
    readable, problems = _digests(images)
    digests = [digest for _, digest in readable]
    if not readable:
        _report(problems, images, on_error)
    if cache_dir is not None and not embedder.is_reproducible:
        warnings.warn("Hooks take part in the image tower: its embeddings are not cached.", stacklevel=2)
        cache_dir = None
    jobs = _Jobs(images, readable, views, seed)
    cache = _cache(cache_dir, embedder, jobs)
    size = batch_size or embedder.batch_size
    if _anything_left(cache, jobs, embedder, accelerator):
        embedder.get_ready(len(jobs))  # where another form of the tower turns out to be right, so is another cache
        cache = _cache(cache_dir, embedder, jobs)
        _embed(embedder, jobs, cache, size, progress, accelerator)
        jobs.remarks.warn()
        if isinstance(embedder, TextEmbedder):
            embedder.warn_of_cut(len(readable))
    done = cache.done.view(-1, len(readable)).all(dim=0)
    for (index, _), good in zip(readable, done.tolist(), strict=True):
        if not good:
            problems[index] = jobs.problem(index)
    if problems:
        _report(problems, images, on_error)
    assert cache.table is not None
    table = cache.table.view(-1, len(readable), cache.table.shape[1])
    return ImageFeatures(
        table if bool(done.all()) else table[:, done],
        torch.tensor([images.labels[index] for index, _ in readable])[done],
        images.class_names,
        _content(images, digests),
        tuple(sorted(problems)),
        tuple(digest for digest, good in zip(digests, done.tolist(), strict=True) if good),
        images.noun,
    )


def content_digest(images: LabelledImages) -> str:
    """The `digest` that embeddings of these pictures have, without embedding them; reads every picture's bytes."""
    return _content(images, [digest for _, digest in _digests(images)[0]])


def _content(images: LabelledImages, digests: list[str]) -> str:
    return hashlib.sha256(json.dumps([digests, images.labels, images.class_names]).encode()).hexdigest()


def _digests(images: LabelledImages) -> tuple[list[tuple[int, str]], dict[int, str]]:
    """Position and digest of the pictures whose bytes can be read, and what is wrong with the others."""
    readable, problems = [], {}
    for index in range(len(images)):
        try:
            readable.append((index, images.digest(index)))
        except ImageError as error:
            problems[index] = str(error)
    return readable, problems


class _Jobs:
    """What is to be embedded: every view of every picture, all pictures of the first view first."""

    def __init__(self, images: LabelledImages, readable: list[tuple[int, str]], views: int, seed: int) -> None:
        self.images, self.readable, self.views, self.seed = images, readable, views, seed
        self.remarks = Remarks()
        self._problems: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.readable) * max(self.views, 1)

    def load(self, job: int, embedder: Any) -> PIL.Image.Image | None:
        """The picture of a job as the tower takes it, or None if it cannot be read."""
        view, row = divmod(job, len(self.readable))
        index, digest = self.readable[row]
        try:
            picture = self.images.image(index, None if self.views else embedder.draft, self.remarks)
            if self.views:
                size = crop_size(embedder.image_processor)
                return augment(picture, size, random.Random(f"{self.seed} {digest} {view}"))
            embedder.preprocess.check(picture)
        except ImageError as error:
            message = str(error)
            self._problems[index] = message if message.startswith("Row ") else self._named(index, message)
            return None
        return picture

    def problem(self, index: int) -> str:
        """Why a picture cannot be read; tried again where another process has met it."""
        if index not in self._problems:
            try:
                self.images.image(index)
                self._problems[index] = self._named(index, "it could not be read a moment ago; run again")
            except ImageError as error:
                self._problems[index] = str(error)
        return self._problems[index]

    def _named(self, index: int, message: str) -> str:
        source = self.images.source(index)
        path = source.get("path") if isinstance(source, Mapping) else source
        name = f"{path!r}: " if isinstance(path, str) and path else ""
        return f"Row {self.images.indices[index]}: {name}{message}"


def _cache(cache_dir: str | os.PathLike[str] | None, embedder: Any, jobs: _Jobs) -> EmbeddingCache:
    if cache_dir is None:
        return EmbeddingCache(None, len(jobs))
    digests = [digest for _, digest in jobs.readable]
    spec = [_FORMAT, *embedder.key, jobs.views, jobs.seed if jobs.views else 0, digests]
    name = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32]
    return EmbeddingCache(Path(cache_dir) / f"{name}.safetensors", len(jobs))


def _anything_left(cache: EmbeddingCache, jobs: _Jobs, embedder: Any, accelerator: Any) -> bool:
    """Whether a process has something to embed or to collect.

    Of a finished set only pictures are missing that could not be read; whether they can be now is tried first, which
    costs less than getting a tower ready.
    """
    left = not bool(cache.done.all())
    if left and cache.is_complete:
        missing = (~cache.done).nonzero().flatten().tolist()
        left = any(jobs.load(job, embedder) is not None for job in missing)
    if accelerator is not None and accelerator.num_processes > 1:
        flags = accelerator.gather(torch.tensor([int(left)], device=accelerator.device))
        return bool(flags.max())
    return left


def _embed(
    embedder: Any, jobs: _Jobs, cache: EmbeddingCache, batch_size: int, progress: bool, accelerator: Any
) -> None:
    """Put the embeddings of all jobs that can be read into the cache."""
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator is not None else (1, 0)
    mine = range(rank, len(jobs), world)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    left = [[job for job in batch if not cache.done[job]] for batch in batches]
    left = [batch for batch in left if batch]
    read: set[int] = set()

    def load(job: int) -> PIL.Image.Image | None:
        picture = jobs.load(job, embedder)
        if picture is not None:
            read.add(job)
        return picture

    pad_to = min(batch_size, embedder.batch_size)
    with tqdm(
        total=len(mine), initial=len(mine) - sum(map(len, left)), desc=f"Embedding {jobs.images.noun}s",
        unit="img" if jobs.images.noun == "picture" else " texts",
        disable=not progress or rank != 0, leave=False,
    ) as bar:  # fmt: skip
        try:
            stream: Any = embedder.stream(left, load, jobs.views > 0, pad_to, len(batches))
            with closing(stream):
                for batch, embeds in stream:
                    if embeds is not None:
                        cache.add(torch.tensor([job for job in batch if job in read]), embeds)
                    bar.update(len(batch))
        except BaseException:  # an interrupt too: what is done is kept
            cache.flush()
            raise
    if world > 1:
        cache.flush()
        _gather(cache, len(jobs), world, rank, accelerator)
    if rank == 0:
        cache.merge()


def _gather(cache: EmbeddingCache, total: int, world: int, rank: int, accelerator: Any) -> None:
    """Every process's rows (dealt out round robin) in every process's cache."""
    share = math.ceil(total / world)
    dim = 0 if cache.table is None else cache.table.shape[1]
    dim = int(accelerator.gather(torch.tensor([dim], device=accelerator.device)).max())
    padded = torch.zeros(share, dim + 1, device=accelerator.device)
    if cache.table is not None:
        padded[: len(cache.done[rank::world]), :dim] = cache.table[rank::world].to(accelerator.device)
        padded[: len(cache.done[rank::world]), -1] = cache.done[rank::world].to(accelerator.device, padded.dtype)
    everyone = accelerator.gather(padded).view(world, share, dim + 1).transpose(0, 1).reshape(-1, dim + 1)[:total].cpu()
    rows = everyone[:, -1].bool().nonzero().flatten()
    cache.fill(rows, everyone[rows, :-1])


def _report(problems: dict[int, str], images: LabelledImages, on_error: str) -> None:
    listed = "\n".join(f"  {message}" for _, message in sorted(problems.items())[:20])
    more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
    if len(problems) == len(images):
        raise ImageError(f"None of the {images.noun}s can be read ({len(images)} of {len(images)}):\n{listed}{more}")
    message = f"{len(problems)} of {len(images)} {images.noun}s cannot be read:\n{listed}{more}"
    if on_error == "raise":
        raise ImageError(f"{message}\nRemove them, or leave them out with on_error='skip' (--on-error skip).")
    warnings.warn(f"{message}\nThey are left out.", stacklevel=3)
