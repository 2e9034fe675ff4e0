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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.labelled import LabelledImages
from ..errors import ArtifactError, ConfigurationError, DataError, ImageError
from ..storage import read_tensors, write_tensors
from .augmentation import augment, crop_size
from .embedder import Embedder

_FORMAT = 3


@dataclass(frozen=True)
class ImageFeatures:
    """Embeddings of a labelled set of pictures.

    Attributes:
        image_embeds: [V, N, D] fp32, not normalised: V augmented views, or one plain view.
        labels: [N] class ids.
        class_names: K names in label order.
        digest: digest of the pictures' content and labels, in order.
        skipped: positions of pictures that could not be read and were left out.
        digests: SHA-256 of each picture's content, N hexadecimal strings; empty where embeddings came without pictures.
    """

    image_embeds: Tensor
    labels: Tensor
    class_names: list[str]
    digest: str
    skipped: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()

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
            digests=tuple(self.digests[index] for index in indices) if self.digests else (),
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
    kept = tuple(digest for digest, good in zip(digests, ok.tolist(), strict=True) if good)
    table = stored["image_embeds"][:, ok]
    return ImageFeatures(table, labels, images.class_names, content, tuple(sorted(problems)), kept)


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
