"""Embeddings kept on disk: one file a set of pictures, and parts of it while it is being made.

A run that is cut short leaves its parts; the next one reads them and goes on. Every file is whole or absent and proves
itself on reading, so several processes may work on the same set: each writes parts of its own. A cache only saves
time: what cannot be written costs a warning, what cannot be read is computed again.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..storage import read_tensors, warn_not_kept, write_tensors

_SECONDS = 2.0  # of work that a part holds at least
_SHARE = 0.02  # of the time so far that it holds at least, so that the parts of a long run stay few
_STALE_DAYS = 30  # after which parts that nobody went on with are removed


class EmbeddingCache:
    """Embeddings [J, D] fp32 of J jobs (a view of a picture), some of which may be missing.

    Args:
        path: the file, `NAME.safetensors`; its parts are in the folder `NAME.parts`. None keeps everything in memory.
        jobs: J.

    Attributes:
        done: [J], which jobs have an embedding.
        is_complete: whether everything done so far is in the file itself.
    """

    def __init__(self, path: Path | None, jobs: int) -> None:
        self.path, self.jobs = path, jobs
        self.done = torch.zeros(jobs, dtype=torch.bool)
        self.table: Tensor | None = None
        self.is_complete = False
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._start = self._last = time.monotonic()
        if path is None:
            return
        self._parts = path.with_suffix(".parts")
        self.is_complete = self._read(path)
        for part in () if bool(self.done.all()) else sorted(self._parts.glob("*.safetensors")):
            if self._read(part):
                self.is_complete = False
        if self.is_complete:
            shutil.rmtree(self._parts, ignore_errors=True)  # left by a process that ended later than another

    def _read(self, path: Path) -> bool:
        """Take the rows of a file over."""
        if not os.path.exists(path):
            return False
        try:
            tensors, metadata = read_tensors(path)
            rows, embeds = self._checked(tensors, metadata)
        except ArtifactError as error:
            if os.path.exists(path):  # or another process is through and has cleaned up
                warnings.warn(
                    f"The cached embeddings in {path} cannot be used ({error}) and are computed again.", stacklevel=4
                )
            return False
        self.fill(rows, embeds)
        return True

    def _checked(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[Tensor, Tensor]:
        """Rows and embeddings of a file that are what they must be."""
        assert self.path is not None
        rows, embeds = tensors.get("rows"), tensors.get("image_embeds")
        if rows is None or embeds is None or rows.dtype != torch.int64 or embeds.dtype != torch.float32:
            raise ArtifactError("it holds no embeddings")
        if rows.dim() != 1 or embeds.dim() != 2 or len(rows) != len(embeds):
            raise ArtifactError(f"its tables of {list(rows.shape)} and {list(embeds.shape)} do not belong together")
        other = metadata.get("set") != self.path.stem or len(rows.unique()) < len(rows)
        if other or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.jobs):
            raise ArtifactError("it holds other pictures")
        if not bool(embeds.isfinite().all()):
            raise ArtifactError("it holds NaN or infinity")
        return rows, embeds

    def fill(self, rows: Tensor, embeds: Tensor) -> None:
        """Take embeddings [n, D] of jobs [n] that are on disk, or with another process."""
        if not len(rows):
            return
        if len(rows) == self.jobs:
            self.table = embeds if bool((rows.diff() == 1).all()) else embeds[rows.argsort()]
            self.done[:] = True
            return
        if self.table is None:
            self.table = torch.zeros(self.jobs, embeds.shape[1])
        self.table[rows] = embeds
        self.done[rows] = True

    def add(self, rows: Tensor, embeds: Tensor) -> None:
        """Take embeddings [n, D] of jobs [n]; they are written when enough has come together."""
        self.fill(rows, embeds)
        self.is_complete = False
        if self.path is None:
            return
        self._pending.append((rows, embeds))
        now = time.monotonic()
        if now - self._last >= max(_SECONDS, _SHARE * (now - self._start)):
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last part."""
        pending, self._pending = self._pending, []
        self._last = time.monotonic()
        if self.path is None or not pending:
            return
        rows, embeds = (torch.cat(list(column)) for column in zip(*pending, strict=True))
        self._write(self._parts / f"{uuid.uuid4().hex}.safetensors", rows, embeds)

    def merge(self) -> None:
        """Write the file with all that is done, and remove the parts."""
        if self.path is None or self.is_complete or self.table is None:
            return
        rows = self.done.nonzero().flatten()
        self._pending = []
        if self._write(self.path, rows, self.table if len(rows) == self.jobs else self.table[rows]):
            self.is_complete = True
            shutil.rmtree(self._parts, ignore_errors=True)
            self._sweep()

    def _write(self, path: Path, rows: Tensor, embeds: Tensor) -> bool:
        assert self.path is not None
        try:
            write_tensors(path, {"rows": rows, "image_embeds": embeds}, {"set": self.path.stem})
        except ArtifactError as error:
            if not os.path.exists(self.path):  # or another process is through and has removed the parts' folder
                warn_not_kept(self.path.parent, "Embeddings are", error)
                self.path = None
            return False
        return True

    def _sweep(self) -> None:
        """Remove parts of runs that nobody went on with."""
        assert self.path is not None
        for folder in self.path.parent.glob("*.parts"):
            with suppress(OSError):
                newest = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
                if time.time() - newest > _STALE_DAYS * 86400:
                    shutil.rmtree(folder, ignore_errors=True)
