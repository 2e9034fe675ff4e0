"""Embeddings too many for memory, read from disk while training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


class StoredFeatures:
    """Embeddings too many for memory: a file of [N, D] numbers, read in blocks while training.

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

    def read(self, rows: Tensor) -> Tensor:
        """Embeddings [n, D] fp32 of some rows [n], ascending; beside them one block at a time is in memory."""
        found = torch.empty(len(rows), self.shape[2])
        blocks, counts = torch.unique_consecutive(rows // self._BLOCK, return_counts=True)
        done = 0
        with self.path.open("rb") as stream:
            for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
                start = block * self._BLOCK
                part = self._block(stream, start, min(start + self._BLOCK, len(self)))
                found[done : done + count] = part[rows[done : done + count] - start]
                done += count
        return found

    def spread(self, most: int) -> Tensor:
        """Rows [n] of at most `most` pictures, ascending: as many of each class as fit, evenly spread over the file."""
        counts = torch.bincount(self.labels)
        low, high = 0, int(counts.max())
        while low < high:  # the largest number a class that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(counts.clamp_max(middle).sum()) <= most else (low, middle - 1)
        order = torch.argsort(self.labels, stable=True)
        chosen, start = [], 0
        for count in counts.tolist():
            taken = min(count, low)
            places = (torch.arange(taken) * count + count // 2) // max(taken, 1)
            chosen.append(order[start + places])
            start += count
        return torch.cat(chosen).sort().values

    def _block(self, stream: BinaryIO, start: int, stop: int) -> Tensor:
        """Rows of the file from `start` to `stop` [n, D] fp32."""
        dim = self.shape[2]
        stream.seek(self._offset + start * dim * self._dtype.itemsize)
        block = np.fromfile(stream, self._dtype, (stop - start) * dim).reshape(-1, dim)
        return torch.from_numpy(block.astype(np.float32))

    def batches(self, batch_size: int, seed: int, epoch: int, buffer_mb: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels [B] and embeddings [B, D] fp32 of an epoch: random blocks fill a buffer, which is shuffled.

        At most `buffer_mb` megabytes are held, or one batch if that is more. The ragged end of an epoch is dropped as
        in `training.recipes.epoch_batches`.
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
                    parts.append(self._block(stream, start, stop))
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
