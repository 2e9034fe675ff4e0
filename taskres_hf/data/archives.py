"""Zip and tar files as listings: members are read in place, nothing is unpacked anywhere."""

from __future__ import annotations

import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, ImageError
from ..pictures import is_ignored
from .account import LeftOut
from .cells import Cells
from .listing import Listing

LARGEST_MEMBER = 256 << 20  # bytes, unpacked
LARGEST_UNPACKED = 2 << 30  # bytes of a compressed tar, whose members are held in memory
_LARGEST_RATIO = 1000  # unpacked to packed; pictures hardly shrink
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError,
            RuntimeError, ValueError)  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar (also compressed), by its content."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return False


class ArchiveCells:
    """Pictures inside an archive: each is read when asked for, also in other threads and processes."""

    def __init__(self, archive: ArchiveListing, names: Sequence[str]) -> None:
        self.archive = archive
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> dict[str, Any]:
        name = self.names[row]
        try:
            return {"bytes": self.archive.read(name), "path": name}
        except ImageError:
            raise
        except DataError as error:
            raise ImageError(str(error)) from error

    def select(self, rows: Sequence[int]) -> ArchiveCells:
        return ArchiveCells(self.archive, [self.names[row] for row in rows])


class ArchiveListing(Listing):
    """The members of a zip or a tar. Members that lie outside by their name, are links, encrypted or too large are
    left out and counted; no member is ever written to a file.

    Raises:
        DataError: the archive is damaged, or is compressed as a whole and larger than can be held in memory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.archive = str(path.absolute())
        self.places: dict[str, Any] = {}
        # The process that opened it: its children share the position in the file, and perhaps a lock that is held.
        self._open: tuple[int, zipfile.ZipFile, threading.Lock] | None = None
        passed: dict[str, list[str]] = {}
        try:
            if zipfile.is_zipfile(path):
                self.kind = "zip"
                folders = self._list_zip(passed)
            else:
                self.kind = "tar"
                folders = self._list_tar(passed)
        except DataError:
            raise
        except _DAMAGED as error:
            raise DataError(f"The archive {path} is damaged or of a kind that cannot be read: {error}") from error
        self.files = sorted(self.places)
        self.empty = sorted(folders - {str(above) for name in self.files for above in PurePosixPath(name).parents})
        self.left_out = [LeftOut(reason, len(names), tuple(names[:5])) for reason, names in passed.items()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def cells(self, names: Sequence[str]) -> Cells:
        return ArchiveCells(self, names)

    def exists(self, name: str) -> bool:
        return name in self.places

    def read(self, name: str) -> bytes:
        """The content of one member.

        Raises:
            DataError: it is damaged, or the archive has changed or gone.
        """
        place = self.places[name]
        try:
            if isinstance(place, bytes):
                return place
            if self.kind == "tar":
                with open(self.archive, "rb") as stream:
                    stream.seek(place[0])
                    content = stream.read(place[1])
                if len(content) < place[1]:
                    raise EOFError("it ends within the member")
                return content
            archive, lock = self._zip()
            with lock, archive.open(place) as stream:
                return stream.read(LARGEST_MEMBER)
        except _DAMAGED as error:
            raise DataError(f"{name} in {self.name} cannot be read: {error}") from error

    def _zip(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        opened = self._open
        if opened is None or opened[0] != os.getpid():
            opened = self._open = (os.getpid(), zipfile.ZipFile(self.archive), threading.Lock())
        return opened[1:]

    def _list_zip(self, passed: dict[str, list[str]]) -> set[str]:
        folders = set()
        for member in self._zip()[0].infolist():
            name = _inside(member.filename)
            if name is None:
                passed.setdefault("members whose name leads out of the archive", []).append(member.filename)
            elif is_ignored(name):
                continue
            elif member.is_dir():
                folders.add(name)
            elif member.flag_bits & 1:
                passed.setdefault("encrypted members", []).append(name)
            elif member.external_attr >> 28 == 0xA:
                passed.setdefault("links inside the archive", []).append(name)
            elif not self._accepts(name, member.file_size, member.compress_size, passed):
                continue
            else:
                self.places[name] = member.filename
        return folders

    def _list_tar(self, passed: dict[str, list[str]]) -> set[str]:
        """Places of the members; of a compressed tar, their content, since it can only be read from its start."""
        packed = _is_packed(self.archive)
        folders, total, end = set(), 0, os.path.getsize(self.archive)
        with tarfile.open(self.archive, "r|*" if packed else "r:") as archive:
            for member in archive:
                name = _inside(member.name)
                total += member.size if packed else 0
                if total > LARGEST_UNPACKED:
                    raise DataError(
                        f"{self.name} unpacks to more than {LARGEST_UNPACKED >> 30} GB, held in memory because "
                        "a compressed tar has no index. Give a .zip or an uncompressed .tar, or unpack it."
                    )
                if name is None:
                    passed.setdefault("members whose name leads out of the archive", []).append(member.name)
                elif is_ignored(name) or name == "":
                    continue
                elif member.isdir():
                    folders.add(name)
                elif not member.isfile() or member.issparse():
                    passed.setdefault("links and special files inside the archive", []).append(name)
                elif not packed and member.offset_data + member.size > end:
                    raise EOFError(f"it ends within {name}")
                elif self._accepts(name, member.size, member.size, passed):
                    content = archive.extractfile(member) if packed else None
                    self.places[name] = content.read() if content else (member.offset_data, member.size)
        return folders

    def _accepts(self, name: str, size: int, packed: int, passed: dict[str, list[str]]) -> bool:
        if size > LARGEST_MEMBER or size > max(packed, 1024) * _LARGEST_RATIO:
            passed.setdefault(f"members above {LARGEST_MEMBER >> 20} MB or packed beyond belief", []).append(name)
        elif name in self.places:
            passed.setdefault("members with the name of another", []).append(name)
        else:
            return True
        return False


def _is_packed(path: str) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:
        return True
    return False


def _inside(name: str) -> str | None:
    """A member's name with `/` and without `.`, or None where it leads out of the archive."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return None
    return "/".join(part for part in parts if part not in ("", "."))
