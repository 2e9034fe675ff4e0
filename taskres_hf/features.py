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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import LabelledImages
from .encoders import image_weights_digest
from .engines import make_engine
from .errors import ArtifactError, ConfigurationError, DataError, ImageError
from .files import read_tensors, write_tensors
from .preprocessing import Preprocessor

_FORMAT = 3
_TURN = 64  # pictures prepared before the tower has its turn, where they take turns: changing places costs both
_T = TypeVar("_T")
_CROP_AREA = (0.08, 1.0)  # published augmentation: random resized crop and flip
_CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ImageFeatures:
    """Embeddings of a labelled set of pictures.

    Attributes:
        image_embeds: [V, N, D] fp32, not normalised: V augmented views, or one plain view.
        labels: [N] class ids.
        class_names: K names in label order.
        digest: digest of the pictures' content and labels, in order.
        skipped: positions of pictures that could not be read and were left out.
    """

    image_embeds: Tensor
    labels: Tensor
    class_names: list[str]
    digest: str
    skipped: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.labels.shape[0])

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
        )


def embed_images(
    embedder: Embedder,
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

    Raises:
        ImageError: pictures that cannot be read (`on_error="raise"`).
        DataError: none can be read.
    """
    if views < 0:
        raise ConfigurationError(f"`views` must be 0 (plain pictures) or more; got {views}.")
    if on_error not in ("raise", "skip"):
        raise ConfigurationError(f"`on_error` must be 'raise' or 'skip'; got {on_error!r}.")
    readable, problems = _digests(images)
    digests = [digest for _, digest in readable]
    content = hashlib.sha256(json.dumps([digests, images.labels, images.class_names]).encode()).hexdigest()
    path = None
    if cache_dir is not None:
        spec = [_FORMAT, *embedder.key, views, seed if views else 0, digests]
        path = Path(cache_dir) / f"{hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32]}.safetensors"
    stored = _read_cache(path, len(digests), max(views, 1))
    if stored is None:
        jobs = [(index, digest, view) for view in range(max(views, 1)) for index, digest in readable]
        stored = _embed(
            embedder, images, jobs, views, seed, batch_size or embedder.batch_size, progress, accelerator, problems
        )
        if path is not None and (accelerator is None or accelerator.is_main_process):
            write_tensors(path, stored)
    ok = stored["readable"].bool()
    lost = {index: "cannot be decoded" for (index, _), good in zip(readable, ok.tolist(), strict=True) if not good}
    problems = {**lost, **problems}
    if problems:
        _report(problems, images, on_error)
    if not bool(ok.any()):
        raise DataError("None of the pictures can be read.")
    labels = torch.tensor([images.labels[index] for index, _ in readable])[ok]
    return ImageFeatures(stored["image_embeds"][:, ok], labels, images.class_names, content, tuple(sorted(problems)))


def _digests(images: LabelledImages) -> tuple[list[tuple[int, str]], dict[int, str]]:
    readable, problems = [], {}
    for index in range(len(images)):
        try:
            readable.append((index, images.digest(index)))
        except ImageError as error:
            problems[index] = str(error)
    return readable, problems


def _embed(
    embedder: Embedder,
    images: LabelledImages,
    jobs: list[tuple[int, str, int]],
    views: int,
    seed: int,
    batch_size: int,
    progress: bool,
    accelerator: Any,
    problems: dict[int, str],
) -> dict[str, Tensor]:
    """Embeddings [V, N, D] of all jobs (picture, digest, view), and which pictures could be decoded [N]."""
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator is not None else (1, 0)
    mine = jobs[rank::world]
    good = torch.zeros(len(mine), dtype=torch.bool)
    size = crop_size(embedder.image_processor) if views else (0, 0)

    def load(place: int) -> PIL.Image.Image | None:
        index, digest, view = mine[place]
        try:
            picture = images.image(index, None if views else embedder.draft)
        except ImageError as error:
            problems[index] = str(error)
            return None
        good[place] = True
        return augment(picture, size, random.Random(f"{seed} {digest} {view}")) if views else picture

    batches = [range(start, min(start + batch_size, len(mine))) for start in range(0, len(mine), batch_size)]
    rows: list[Tensor] = []
    with tqdm(
        total=len(mine), desc="Embedding pictures", unit="img", disable=not progress or rank != 0, leave=False
    ) as bar:
        for places, embeds in embedder.stream(batches, load, augmented=views > 0):
            if embeds is not None:
                rows.append(embeds)
            bar.update(len(places))
    table = torch.zeros(len(mine), rows[0].shape[1] if rows else 1)
    if rows:
        table[good] = torch.cat(rows)
    if world > 1:
        table, good = _gather(table, good, len(jobs), world, accelerator)
    count = len(jobs) // max(views, 1)
    return {"image_embeds": table.view(-1, count, table.shape[1]), "readable": good.view(-1, count)[0].to(torch.uint8)}


def _gather(table: Tensor, mask: Tensor, total: int, world: int, accelerator: Any) -> tuple[Tensor, Tensor]:
    """Every process's rows, back in the order of the jobs (dealt out round robin)."""
    share = math.ceil(total / world)
    dims = accelerator.gather(torch.tensor([table.shape[1]], device=accelerator.device)).max().item()
    padded = torch.zeros(share, dims + 1, device=accelerator.device)
    padded[: len(table), : table.shape[1]] = table.to(accelerator.device)
    padded[: len(table), -1] = mask.to(accelerator.device, padded.dtype)
    everyone = (
        accelerator.gather(padded).view(world, share, dims + 1).transpose(0, 1).reshape(-1, dims + 1)[:total].cpu()
    )
    return everyone[:, :-1].contiguous(), everyone[:, -1].bool()


class StoredFeatures:
    """Embeddings too many for memory: a file of [N, D] numbers, read in shuffled blocks while training.

    Args:
        path: `.npy` file of image embeddings [N, D], fp16 or fp32, not object. labels: [N] class ids.
        class_names: K names in label order.

    Attributes:
        labels: [N]. shape: (1, N, D). digest: of the file's name, size and time, and the labels.

    Raises:
        DataError: not such a file, or another number of labels.
    """

    _BLOCK = 1024  # rows read at once: large enough for a disk, small enough to shuffle well

    def __init__(
        self, path: str | os.PathLike[str], labels: Sequence[int] | Tensor, class_names: Sequence[str]
    ) -> None:
        self.path = Path(path)
        try:
            table = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is no .npy file of embeddings: {error}") from error
        if table.ndim != 2 or table.dtype not in (np.float16, np.float32):
            raise DataError(f"{self.path} must hold [N, D] fp16 or fp32; it holds {table.dtype} {list(table.shape)}.")
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        if len(self.labels) != len(table):
            raise DataError(f"{self.path} has {len(table)} rows; {len(self.labels)} labels were given.")
        self.class_names = list(class_names)
        self.shape = (1, *table.shape)
        self._dtype, self._offset = table.dtype, table.offset
        status = self.path.stat()
        digest = hashlib.sha256(f"{self.path.name} {status.st_size} {status.st_mtime_ns} {self.shape}".encode())
        digest.update(self.labels.contiguous().numpy().data)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return int(self.shape[1])

    def batches(self, batch_size: int, seed: int, epoch: int, buffer_mb: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels [B] and embeddings [B, D] fp32 of an epoch: random blocks fill a buffer, which is shuffled.

        At most `buffer_mb` megabytes are held, or one batch if that is more. The ragged end of an epoch is dropped as
        in `optimization.epoch_batches`.
        """
        count, dim = self.shape[1:]
        rows = max(buffer_mb * 1_000_000 // (12 * dim), batch_size)  # the buffer, and the shuffled copy of a batch
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        starts = torch.randperm(-(-count // self._BLOCK), generator=generator) * self._BLOCK
        left_embeds, left_labels = torch.empty(0, dim), torch.empty(0, dtype=torch.long)
        small = count < batch_size
        with self.path.open("rb") as stream:
            position = 0
            while position < len(starts):
                parts, labels, held = [left_embeds], [left_labels], len(left_embeds)
                while position < len(starts) and held < rows:
                    start = int(starts[position])
                    stop = min(start + self._BLOCK, count)
                    stream.seek(self._offset + start * dim * self._dtype.itemsize)
                    block = np.fromfile(stream, self._dtype, (stop - start) * dim).reshape(-1, dim)
                    parts.append(torch.from_numpy(block.astype(np.float32)))
                    labels.append(self.labels[start:stop])
                    held += stop - start
                    position += 1
                embeds, ids = torch.cat(parts), torch.cat(labels)
                del parts, labels
                order = torch.randperm(len(embeds), generator=generator)
                whole = len(order) if small else len(order) // batch_size * batch_size
                for first in range(0, whole, batch_size):
                    chosen = order[first : first + batch_size]
                    yield ids[chosen], embeds[chosen]
                left_embeds, left_labels = embeds[order[whole:]], ids[order[whole:]]
                del embeds


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


def crop_size(image_processor: Any) -> tuple[int, int]:
    """Height and width of the pictures the tower sees, from the processor's `crop_size` or `size`.

    Raises:
        ConfigurationError: the processor gives no fixed size; augmented views need one.
    """
    for size in (getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)):
        if size is not None and "height" in size and size["height"]:
            return int(size["height"]), int(size["width"])
    raise ConfigurationError(f"{type(image_processor).__name__} has no fixed picture size: use views=0.")


def augment(picture: PIL.Image.Image, size: tuple[int, int], generator: random.Random) -> PIL.Image.Image:
    """The published augmentation: a random crop of 8 to 100 % of the area, resized (bicubic), flipped half the time."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * generator.uniform(*_CROP_AREA)
        ratio = math.exp(generator.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = generator.randint(0, width - wide), generator.randint(0, height - high)
            break
    else:  # very long pictures: the largest central crop of an allowed shape
        wide = min(width, max(1, round(height * _CROP_RATIO[1])))
        high = min(height, max(1, round(width / _CROP_RATIO[0])))
        left, top = (width - wide) // 2, (height - high) // 2
    picture = picture.crop((left, top, left + wide, top + high))
    picture = picture.resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC)
    return ImageOps.mirror(picture) if generator.random() < 0.5 else picture


def _read_cache(path: Path | None, count: int, views: int) -> dict[str, Tensor] | None:
    if path is None or not path.exists():
        return None
    try:
        tensors, _ = read_tensors(path)
        if tensors["image_embeds"].shape[:2] == (views, count) and bool(tensors["image_embeds"].isfinite().all()):
            return tensors
        reason = "it holds other pictures"
    except (ArtifactError, KeyError) as error:
        reason = str(error)
    warnings.warn(f"The cached embeddings in {path} cannot be used ({reason}) and are computed again.", stacklevel=3)
    return None


def _report(problems: dict[int, str], images: LabelledImages, on_error: str) -> None:
    listed = "\n".join(f"  {message}" for _, message in sorted(problems.items())[:20])
    more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
    message = f"{len(problems)} of {len(images)} pictures cannot be read:\n{listed}{more}"
    if on_error == "raise":
        raise ImageError(f"{message}\nRemove them, or leave them out with on_error='skip' (--on-error skip).")
    warnings.warn(f"{message}\nThey are left out.", stacklevel=3)
