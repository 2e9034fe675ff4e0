"""The files of a folder, an archive or shards, under one form: relative names, their content, what was passed over.

Zip and tar files are read in place, nothing is unpacked anywhere. WebDataset shards are tar files of `key.jpg` beside
`key.cls`, `key.txt` or `key.json`.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, ImageError
from ..picture_files import is_ignored, walk
from ..pictures import IMAGE_EXTENSIONS, ending_status
from .reading import Cells, FileCells, JoinedCells, LeftOut, Reading, SplitReading, printable, shorten, split_name

ARCHIVE_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def suffix(name: str) -> str:
    """The ending of a file's name in lower case, such as `.jpg`."""
    base = name.rsplit("/", 1)[-1]
    stem, dot, ending = base.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_picture(name: str) -> bool:
    """Whether a file's name has the ending of a picture that can be read."""
    return suffix(name) in IMAGE_EXTENSIONS


class Listing(ABC):
    """Files below a root, without hidden and system files.

    Attributes:
        name: what to call the root in messages.
        files: names of all files relative to the root, with `/`, sorted.
        empty: folders without any file below them.
        left_out: what could not be listed, such as links that lead nowhere.
    """

    name: str

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: list[str] = []
        self.empty: list[str] = []
        self.left_out: list[LeftOut] = []

    @abstractmethod
    def cells(self, names: Sequence[str]) -> Cells:
        """These files as pictures."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of one file."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a name is that of a file."""

    def pictures(self) -> list[str]:
        """Names of all files with the ending of a picture."""
        return [name for name in self.files if is_picture(name)]


class FolderListing(Listing):
    """The files of a folder on this machine. Links are followed, except those that lead back to a folder above.

    Args:
        root: the folder.
        scan: list the files now; a table beside its pictures needs no list where it names them as they are.

    Raises:
        DataError: the folder itself cannot be read.
    """

    def __init__(self, root: Path, scan: bool = True) -> None:
        super().__init__(str(root))
        self.root = str(root)
        self._scanned = False
        if scan:
            self._scan()

    def pictures(self) -> list[str]:
        if not self._scanned:
            self._scan()
        return super().pictures()

    def _scan(self) -> None:
        self._scanned = True
        passed: dict[str, list[str]] = {}
        try:
            os.scandir(self.root).close()
        except OSError as error:
            raise DataError(f"The folder {self.root} cannot be read: {error.strerror or error}.") from error
        holding: set[str] = set()  # folders with a file in them
        folders: list[str] = []
        for name, kind, reason in walk(self.root):
            if kind == "file":
                self.files.append(name)
                holding.add(name.rpartition("/")[0])
            elif kind == "folder":
                folders.append(name)
            elif kind != "ignored":
                passed.setdefault(reason, []).append(name)
        self.files.sort()
        filled = {part for folder in holding for part in (folder, *map(str, PurePosixPath(folder).parents))}
        self.empty = sorted(name for name in folders if name not in filled)
        self.left_out = [LeftOut(reason, len(names), tuple(sorted(names)[:5])) for reason, names in passed.items()]

    def path(self, name: str) -> str:
        """The path of a file of the listing."""
        return os.path.join(self.root, name)

    def cells(self, names: Sequence[str]) -> Cells:
        return FileCells([self.path(name) for name in names])

    def read(self, name: str) -> bytes:
        try:
            return Path(self.path(name)).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path(name)} cannot be read: {error.strerror or error}.") from error

    def exists(self, name: str) -> bool:
        try:
            return os.path.isfile(self.path(name))
        except ValueError:  # a null character
            return False


def pictures_left_out(files: Sequence[str]) -> list[LeftOut]:
    """Files that are no readable pictures, counted by ending."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for name in files:
        ending = suffix(name)
        counts[ending] += 1
        if counts[ending] <= 3:
            examples.setdefault(ending, []).append(name)
    rows = []
    for ending, count in counts.most_common():
        extra = '; to read them: pip install "taskres_hf[heif]"' if ending_status(ending) == "needs extra" else ""
        kind = "archives inside" if ending in ARCHIVE_ENDINGS else "files"
        rows.append(LeftOut(f"{kind} ending in {ending or 'nothing'}{extra}", count, tuple(examples[ending])))
    return rows


LARGEST_MEMBER = 256 << 20  # bytes, unpacked
LARGEST_UNPACKED = 2 << 30  # bytes of a compressed tar, whose members are held in memory
_LARGEST_RATIO = 1000  # unpacked to packed; pictures hardly shrink
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError,
            RuntimeError, ValueError)  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar (also compressed), by its content."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except _DAMAGED:
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
            elif is_ignored(name) or name == "":
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


_LABELS = ("cls", "class", "label", "cls.txt", "class.txt", "label.txt", "json", "txt")
_JSON_NAMES = ("label", "class", "cls", "category", "class_name", "label_name", "target")


def is_shard(listing: ArchiveListing) -> bool:
    """Whether most pictures of a tar have a label of their own beside them.

    Where all pictures lie in folders, a `.txt` beside one holds boxes or a caption, and the folders are classes.
    """
    if listing.kind != "tar":
        return False
    pictures = {_key(name)[0] for name in listing.pictures()}
    folders = {key.rpartition("/")[0] for key in pictures}
    divided = len(folders) > 1 and "" not in folders
    labelled = {_key(name)[0] for name in listing.files if _key(name)[1] in _LABELS[: -1 if divided else None]}
    return bool(pictures) and 2 * len(pictures & labelled) > len(pictures)


def _key(name: str) -> tuple[str, str]:
    """What the files of one sample share, and the rest: `a/0001.seg.png` as `a/0001` and `seg.png`."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def read_shards(shards: Sequence[ArchiveListing], label_column: str | None) -> Reading:
    """Splits and labels of shards; a shard's split is in its name (`train-0001.tar`), else it is for training.

    Args:
        label_column: the ending that holds the label (`cls`), or a field of the `json` files.

    Raises:
        DataError: no label in any of them, or several that differ.
    """
    by_split: dict[str, list[tuple[ArchiveListing, list[str], list[Any]]]] = {}
    left_out: list[LeftOut] = []
    used: set[str] = set()
    for shard in shards:
        samples: dict[str, dict[str, str]] = {}
        for name in shard.files:
            key, ending = _key(name)
            samples.setdefault(key, {})[ending] = name
        pictures, labels, others = [], [], []
        for key in sorted(samples):
            endings = samples[key]
            images = [name for name in endings.values() if is_picture(name)]
            others += [name for ending, name in endings.items() if name not in images[:1] and ending not in _LABELS]
            if images:
                label, source = _label(shard, endings, label_column)
                pictures.append(images[0])
                labels.append(label)
                used |= {source} if source else set()
        left_out += [*shard.left_out, *pictures_left_out(others)]
        split = split_name(re.sub(r"\.tar$", "", shard.name, flags=re.IGNORECASE)) or "train"
        by_split.setdefault(split, []).append((shard, pictures, labels))
    if len(used) > 1:
        raise DataError(f"Labels are in {shorten(sorted(used))}, not in one place. Name it with label_column=.")
    reading = Reading("WebDataset shards", [], left_out)
    for split, parts in by_split.items():
        cells = JoinedCells([shard.cells(pictures) for shard, pictures, _ in parts])
        labels = [label for _, _, inside in parts for label in inside]
        origin = parts[0][0].name if len(parts) == 1 else f"{len(parts)} shards"
        reading.splits.append(SplitReading(split, origin, None, cells, labels))
    distinct = {label for split in reading.splits for label in split.labels if label is not None}
    count = sum(len(split) for split in reading.splits)
    if used == {"txt"} and len(distinct) > max(20, count // 2):
        raise DataError(
            f"The .txt files look like captions, not classes: {len(distinct)} texts for {count} pictures, such "
            f"as {shorten(sorted(distinct), 1)}. Name where the label is with label_column=."
        )
    if used:
        reading.notes.append(f"Labels are read from {next(iter(used))}.")
    return reading


def _label(shard: ArchiveListing, endings: dict[str, str], wanted: str | None) -> tuple[Any, str | None]:
    """The label of one sample and where it was, or None twice."""
    for ending in _LABELS if wanted is None or wanted not in endings else (wanted,):
        if ending not in endings:
            continue
        content = shard.read(endings[ending])
        try:
            text = content.decode("utf-8-sig").strip()
            if ending != "json":
                if wanted is None or wanted == ending:
                    return (int(text) if re.fullmatch(r"-?\d+", text) else text or None), ending
                continue
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"{endings[ending]} in {shard.name} is no label: {error}") from error
        fields = [wanted] if wanted is not None else [name for name in _JSON_NAMES if isinstance(value, dict)]
        for field in fields:
            if isinstance(value, dict) and field in value:
                if isinstance(value[field], (list, dict)):
                    raise DataError(
                        f"{endings[ending]} in {shard.name}: the field {field!r} is no label but "
                        f"{printable(value[field])}; one class a picture is needed. Name its field with label_column=."
                    )
                return value[field], f"json field {field!r}"
    return None, None
