"""Rows kept on disk under keys: embeddings by picture, and digests of files by what the file system says of them.

A table is a folder of *shards*: files that are written once, whole or absent, prove themselves on reading and are never
changed, so any number of processes and threads may read and write one table. A run adds shards as it goes, and in the
end makes one of many small ones. A cache only saves time: what cannot be written costs a warning, what cannot be read
is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import uuid
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArtifactError
from ..pictures import is_address
from ..storage import locked, read_tensors, sweep, warn_not_kept, write_tensors

_SECONDS = 2.0  # of work that a shard holds at least
_SHARE = 0.02  # of the time so far that it holds at least, so that the shards of a long run stay few
_LARGEST = 32 << 20  # bytes of a shard that others are still joined to: what reading one row may cost
_KEY = 32  # bytes of a key
_UNSETTLED = 10 * 10**9  # nanoseconds: a file that was changed so shortly before may change again unnoticed


class KeptRows:
    """Rows [D] under keys of 32 bytes.

    Args:
        folder: of the shards; it need not exist. None keeps nothing.
        dtype: of the rows.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype
        self._shards: list[Path] = []
        self._usable: list[bool] = []
        self._damaged: list[Path] = []
        self._keys: NDArray[np.uint8] = np.empty((0, _KEY), np.uint8)
        self._places: NDArray[np.int64] = np.empty((0, 2), np.int64)  # shard and row
        self._starts: NDArray[np.uint64] = np.empty(0, np.uint64)  # the first eight bytes of keys, ascending
        self._pending: list[tuple[list[bytes], Tensor]] = []
        self._writable, self._wrote = folder is not None, False
        self._began = self._last = time.monotonic()
        self._width: int | None = None  # D
        if folder is not None:
            sweep(folder)
        self._look()

    def __contains__(self, key: bytes) -> bool:
        """Whether a shard says that it holds the key; `take` proves it."""
        return self._find(key) is not None

    def _find(self, key: bytes) -> tuple[int, int] | None:
        for place in _places(self._starts, self._keys, key):
            shard, row = self._places[place].tolist()
            if self._usable[shard]:
                return shard, row
        return None

    def take(self, keys: Sequence[bytes]) -> Iterator[tuple[list[int], Tensor]]:
        """Positions of keys [n] and their rows [n, D], shard after shard; keys that are not kept are left out."""
        left = list(range(len(keys)))
        while left:
            found: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for position in left:
                if (place := self._find(keys[position])) is not None:
                    found[place[0]].append((position, place[1]))
            left = []
            for shard, pairs in sorted(found.items()):
                positions, rows = [position for position, _ in pairs], torch.tensor([row for _, row in pairs])
                table = self._proven(shard, [keys[position] for position in positions], rows)
                if table is None:  # damaged, or another process has joined it to others: they are looked at next
                    left += positions
                else:
                    yield positions, table[rows]
            if left:
                self._look()

    def all(self) -> tuple[NDArray[np.uint8], Tensor]:
        """Keys [N, 32] and rows [N, D] of the whole table, proven; for small rows."""
        keys, rows = [], []
        for shard in range(len(self._shards)):
            if self._usable[shard] and (tensors := self._read(self._shards[shard])) is not None:
                keys.append(tensors[0].numpy())
                rows.append(tensors[1])
        return (np.concatenate(keys), torch.cat(rows)) if rows else (self._keys[:0], torch.empty(0, dtype=self.dtype))

    def _look(self) -> None:
        """Learn the keys of shards that are new; those that are gone were joined to others by another process."""
        if self.folder is None or not self.folder.is_dir():
            return
        there = sorted(path for path in self.folder.glob("*.safetensors") if not path.name.startswith("."))
        known = set(self._shards)
        self._usable = [usable and path in there for path, usable in zip(self._shards, self._usable, strict=True)]
        keys, places = [self._keys], [self._places]
        for path in there:
            if path in known or path in self._damaged:
                continue
            try:
                with safe_open(str(path), framework="pt") as stream:
                    found = stream.get_tensor("keys").numpy().copy()
                if found.dtype != np.uint8 or found.ndim != 2 or found.shape[1] != _KEY:
                    raise ArtifactError("it holds no keys")
            except (ArtifactError, OSError, SafetensorError) as error:
                self._refuse(path, error)
                continue
            places.append(np.stack([np.full(len(found), len(self._shards)), np.arange(len(found))], axis=1))
            keys.append(found)
            self._shards.append(path)
            self._usable.append(True)
        if len(keys) > 1:
            self._keys, self._places = np.concatenate(keys), np.concatenate(places)
            order, self._starts = _ordered(self._keys)
            self._keys, self._places = self._keys[order], self._places[order]

    def _proven(self, shard: int, keys: list[bytes], rows: Tensor) -> Tensor | None:
        """The rows of a shard that proves itself and has these keys at these rows; else it is not used any more."""
        tensors = self._read(self._shards[shard])
        if tensors is not None and [bytes(row) for row in tensors[0][rows].numpy()] == keys:
            return tensors[1]
        self._usable[shard] = False
        return None

    def _read(self, path: Path) -> tuple[Tensor, Tensor] | None:
        try:
            tensors, metadata = read_tensors(path)
            return self._checked(tensors, metadata)
        except ArtifactError as error:
            self._refuse(path, error)
            return None

    def _checked(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[Tensor, Tensor]:
        """Keys and rows of a file that are what they must be."""
        assert self.folder is not None
        keys, rows = tensors.get("keys"), tensors.get("rows")
        if keys is None or rows is None or keys.dtype != torch.uint8 or rows.dtype != self.dtype:
            raise ArtifactError("it holds no rows of this kind")
        if keys.dim() != 2 or rows.dim() != 2 or len(keys) != len(rows) or keys.shape[1] != _KEY:
            raise ArtifactError(f"its tables of {list(keys.shape)} and {list(rows.shape)} do not belong together")
        if metadata.get("set") != self.folder.name or rows.shape[1] != (self._width or rows.shape[1]):
            raise ArtifactError("it holds rows of another table")
        if not bool(rows.isfinite().all()):
            raise ArtifactError("it holds NaN or infinity")
        self._width = rows.shape[1]
        return keys, rows

    def _refuse(self, path: Path, error: Exception) -> None:
        """Say of a file that is there that it cannot be used."""
        if path in self._damaged or not os.path.exists(path):
            return
        if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
            self._damaged.append(path)  # what is in it will not get better, as where a drive hiccups
        warnings.warn(f"The cached rows in {path} cannot be used ({error}) and are computed again.", stacklevel=5)

    def add(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep rows [n, D] under keys [n]; they are written when enough has come together."""
        if not self._writable or not len(keys):
            return
        self._pending.append((list(keys), rows))
        now = time.monotonic()
        if now - self._last >= max(_SECONDS, _SHARE * (now - self._began)):
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last shard."""
        pending, self._pending = self._pending, []
        self._last = time.monotonic()
        if pending and self._writable:
            self._write([key for keys, _ in pending for key in keys], torch.cat([rows for _, rows in pending]))

    def close(self) -> None:
        """Write what is left, and make one shard of many small ones."""
        self.flush()
        if self.folder is None or not self._writable or not (self._wrote or self._damaged):
            return
        with locked(self.folder):
            for path in self._damaged:
                with suppress(OSError):
                    path.unlink()
            for group in _to_join(self._sizes()):
                self._join(group)

    def _sizes(self) -> dict[Path, int]:
        assert self.folder is not None
        sizes = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if not path.name.startswith("."):
                with suppress(OSError):
                    sizes[path] = path.stat().st_size
        return sizes

    def _join(self, paths: Sequence[Path]) -> None:
        """One shard of several, each key once; those are removed when it is on the disk."""
        read = {path: tensors for path in paths if (tensors := self._read(path)) is not None}
        if len(read) < 2:
            return
        keys = [bytes(key) for found, _ in read.values() for key in found.numpy()]
        once = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = torch.cat([rows for _, rows in read.values()])[torch.tensor(list(once.values()))]
        if self._write(list(once), rows):
            for path in read:
                with suppress(OSError):  # another process was faster; Windows keeps what somebody reads
                    path.unlink()

    def _write(self, keys: Sequence[bytes], rows: Tensor) -> bool:
        assert self.folder is not None
        table = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY).copy())
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            write_tensors(path, {"keys": table, "rows": rows}, {"set": self.folder.name})
        except ArtifactError as error:
            warn_not_kept(self.folder.parent, "Embeddings are", error)
            self._writable = False
            return False
        self._wrote = True
        return True


def _to_join(sizes: dict[Path, int]) -> list[list[Path]]:
    """Which files to make one of: as many small ones as are together half as large as the next, or larger.

    So a row is written anew a few times in its life, however small the runs, and files stay few.
    """
    small = sorted((path for path, size in sizes.items() if size < _LARGEST), key=lambda path: (sizes[path], path))
    total = last = 0
    for place, path in enumerate(small):
        if place and sizes[path] <= 2 * total:
            last = place + 1
        total += sizes[path]
    groups: list[list[Path]] = []
    held = 0
    for path in small[:last]:
        if not groups or held + sizes[path] > 2 * _LARGEST:
            groups.append([])
            held = 0
        groups[-1].append(path)
        held += sizes[path]
    return [group for group in groups if len(group) > 1]


class FileDigests:
    """Digests of picture files, so that an unchanged file is not read again.

    A file is the same where its path, device, inode, size and both times (of its content and of its entry) are. One
    that was changed less than ten seconds before it was read could change again within the same tick of its file
    system's clock, so it is read again the next time. Not on Windows, which keeps no time of an entry's change.

    Args:
        folder: where to keep them; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._kept = KeptRows(None if os.name == "nt" else folder, torch.uint8)
        self._noted: deque[tuple[bytes, bytes]] = deque()
        keys, digests = self._kept.all()
        order, self._starts = _ordered(keys)
        self._keys, self._digests = keys[order], digests.numpy()[order]

    def find(self, path: str) -> str | None:
        """The digest of a file as it is now, SHA-256 in hexadecimal; None where it is not known. In any thread."""
        key = _file_key(path, _status(path)) if len(self._starts) else None
        place = None if key is None else next(_places(self._starts, self._keys, key), None)
        return None if place is None else bytes(self._digests[place]).hex()

    def note(self, path: str, status: os.stat_result, digest: str, began: int) -> None:
        """Remember the digest of a file that had this status before and after it was read. In any thread.

        Args:
            began: when the reading began, in nanoseconds of `time.time_ns`.
        """
        if self._kept.folder is not None and max(status.st_mtime_ns, status.st_ctime_ns) < began - _UNSETTLED:
            self._noted.append((_file_key(path, status) or b"", bytes.fromhex(digest)))

    def save(self) -> None:
        """Keep what was noted, on the disk when enough has come together."""
        noted = [self._noted.popleft() for _ in range(len(self._noted))]
        if noted:
            digests = np.frombuffer(b"".join(digest for _, digest in noted), np.uint8).reshape(-1, _KEY)
            self._kept.add([key for key, _ in noted], torch.from_numpy(digests.copy()))

    def flush(self) -> None:
        """Write what was noted."""
        self.save()
        self._kept.flush()

    def close(self) -> None:
        """See `KeptRows.close`."""
        self.save()
        self._kept.close()


def _ordered(keys: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """The order of keys by their first eight bytes, and these."""
    starts = np.ascontiguousarray(keys[:, :8]).view(np.uint64).flatten()
    order = np.argsort(starts, kind="stable")
    return order, starts[order]


def _places(starts: NDArray[np.uint64], keys: NDArray[np.uint8], key: bytes) -> Iterator[int]:
    """Where a key is among ordered ones."""
    start = np.frombuffer(key[:8], np.uint64)[0]
    place = int(np.searchsorted(starts, start))
    while place < len(starts) and starts[place] == start:
        if keys[place].tobytes() == key:
            yield place
        place += 1


def file_of(source: Any) -> str | None:
    """The path of a picture that is a file; None for bytes, pixels and addresses."""
    if isinstance(source, Mapping):
        source = None if source.get("bytes") is not None else source.get("path")
    path = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else ""
    return path if path and not is_address(path) else None


def _status(path: str) -> os.stat_result | None:
    """What the file system says of a regular file when it is opened, which is when a network drive asks its server."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return None
        handle = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):
        return None
    try:
        return os.fstat(handle)
    finally:
        os.close(handle)


def _file_key(path: str, status: os.stat_result | None) -> bytes | None:
    if status is None:
        return None
    facts: list[Any] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return hashlib.sha256(json.dumps([os.path.abspath(path), *facts]).encode()).digest()
