"""The files of a folder or an archive, under one form: relative names, their content, and what was passed over."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..pictures import IMAGE_EXTENSIONS, ending_status, is_ignored
from .account import LeftOut
from .cells import Cells, FileCells

ARCHIVE_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_DEEPEST = 200  # folders; far beyond any data set, and within what a path may be long


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
            top = _identity(self.root)
            os.scandir(self.root).close()
        except OSError as error:
            raise DataError(f"The folder {self.root} cannot be read: {error.strerror or error}.") from error
        holding: set[str] = set()  # folders with a file in them
        folders: list[str] = []
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (top,))]
        while waiting:
            prefix, above = waiting.pop()
            try:
                entries = list(os.scandir(os.path.join(self.root, prefix)))
            except OSError as error:
                passed.setdefault(f"folders that cannot be read ({error.strerror})", []).append(prefix.rstrip("/"))
                continue
            for entry in entries:
                name = prefix + entry.name
                kind = "ignored" if is_ignored(entry.name) else _kind(entry, above)
                if kind == "file":
                    self.files.append(name)
                    holding.add(prefix)
                elif kind == "folder":
                    folders.append(name)
                    waiting.append((f"{name}/", (*above, _identity(entry.path))))
                elif kind != "ignored":
                    passed.setdefault(kind, []).append(name)
        self.files.sort()
        filled = {part for prefix in holding for part in _above(prefix)}
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


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _kind(entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> str:
    """`file`, `folder`, or why it is neither."""
    try:
        if entry.is_file():
            return "file"
        if not entry.is_dir():
            return "links that lead nowhere" if entry.is_symlink() else "neither files nor folders"
        if _identity(entry.path) in above:
            return "links to a folder above"
        return "folder" if len(above) < _DEEPEST else f"folders more than {_DEEPEST} deep"
    except OSError as error:  # a link to itself, or to a place that may not be looked at
        return f"entries that cannot be read ({error.strerror})"


def _above(prefix: str) -> list[str]:
    """`a/b/` as `a` and `a/b`."""
    parts = prefix.split("/")[:-1]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


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
