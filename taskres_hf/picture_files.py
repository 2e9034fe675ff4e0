"""Picture files among files and folders: what is below a folder, looked at in one way by all that search one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, NamedTuple

from .pictures import ending_status, is_address
from .tables import visible

_DEEPEST = 200  # folders; far beyond any data set, and within what a path may be long
# What file managers, notebooks, archives and network drives leave in folders; names that start with a dot as well.
_SYSTEM_NAMES = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@recycle", "#recycle", "@__thumb",
        "$recycle.bin", "system volume information", "lost+found",
    }
)  # fmt: skip


def is_ignored(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is hidden or the system's own: `.x`, `._x`, `__MACOSX`, `@eaDir`, `Thumbs.db`, ...

    Args:
        path: a name, or a path relative to the folder that is searched, of which every part counts; of an absolute
            path only the last part, since a data set may well lie below a hidden folder.
    """
    pure = PurePath(path)
    parts = (pure.name,) if pure.is_absolute() else pure.parts
    return any((part[:1] == "." and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES for part in parts)


class Entry(NamedTuple):
    """What lies in a folder or below it.

    Attributes:
        name: relative to the folder, with `/`; empty for the folder itself, where it cannot be read.
        kind: `file`; `folder`; `ignored` (see `is_ignored`; nothing below it is looked at); `closed`, a folder that is
            not looked into; `above`, a link to a folder that it lies in; `odd`, neither a file nor a folder.
        reason: why it is closed, above or odd, in the plural.
    """

    name: str
    kind: Literal["file", "folder", "ignored", "closed", "above", "odd"]
    reason: str = ""


def walk(top: str) -> Iterator[Entry]:
    """All below a folder, in no order. Links are followed, except those that lead back to a folder above."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        prefix, above = waiting.pop()
        folder = os.path.join(top, prefix)
        try:
            above = (*above, _identity(folder))
            entries = list(os.scandir(folder))
        except OSError as error:
            yield Entry(prefix.rstrip("/"), "closed", f"folders that cannot be read ({error.strerror})")
            continue
        for entry in entries:
            found = _entry(entry, prefix + entry.name, above)
            yield found
            if found.kind == "folder":
                waiting.append((f"{found.name}/", above))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _entry(entry: os.DirEntry[str], name: str, above: tuple[tuple[int, int], ...]) -> Entry:
    if is_ignored(entry.name):
        return Entry(name, "ignored")
    try:
        if entry.is_file():
            return Entry(name, "file")
        if not entry.is_dir():
            return Entry(name, "odd", "links that lead nowhere" if entry.is_symlink() else "neither files nor folders")
        if _identity(entry.path) in above:
            return Entry(name, "above", "links to a folder above")
        if len(above) >= _DEEPEST:
            return Entry(name, "closed", f"folders more than {_DEEPEST} deep")
        return Entry(name, "folder")
    except OSError as error:  # a link to itself, or to a place that may not be looked at
        return Entry(name, "odd", f"entries that cannot be read ({error.strerror})")


@dataclass(frozen=True)
class ImageListing:
    """Picture files, and what lay beside them.

    Attributes:
        files: paths and addresses, in order, each once.
        left_out: number of files by ending (in lower case; "" for none) that are no pictures or that need an extra.
        ignored: number of hidden files and folders, and the system's own, see `is_ignored`.
    """

    files: list[str]
    left_out: dict[str, int]
    ignored: int = 0

    def lines(self) -> list[str]:
        """What was left out, for people; nothing if nothing was."""
        counts = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        lines = []
        for needs_extra in (False, True):
            part = [(end, count) for end, count in counts if (ending_status(end) == "needs extra") == needs_extra]
            if part:
                text = ", ".join(f"{count} {visible(ending) or 'without an ending'}" for ending, count in part[:10])
                more = f" and {len(part) - 10} other endings" if len(part) > 10 else ""
                remedy = '; to read them: pip install "taskres_hf[heif]"' if needs_extra else ""
                lines.append(f"Left out by their ending: {text}{more}{remedy}")
        return lines


def list_images(paths: Iterable[str | os.PathLike[str]]) -> ImageListing:
    """Picture files among files, folders (searched in depth, sorted) and addresses, with an account of the rest.

    A file named outright is listed whatever its name. So are, within folders, broken links, pipes and folders that
    cannot be opened: `read_image` says what is wrong with them.
    """
    files: dict[str, str] = {}  # what tells a file from others -> as it was named
    left_out: Counter[str] = Counter()
    ignored = 0
    for path in map(os.fsdecode, paths):
        if is_address(path) or not os.path.isdir(path):
            files.setdefault(path if is_address(path) else _place(path), path)
            continue
        inside = []
        for name, kind, _ in walk(path):
            ending = PurePath(name).suffix.lower()
            if kind == "closed" or (kind in ("file", "odd") and ending_status(ending) == "readable"):
                inside.append(name if path == "." else os.path.join(path, name) if name else path)
            elif kind in ("file", "odd"):
                left_out[ending] += 1
            ignored += kind == "ignored"
        for file in sorted(inside):
            files.setdefault(_place(file), file)
    return ImageListing(list(files.values()), dict(left_out), ignored)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files of `list_images`."""
    return list_images(paths).files


def _place(file: str) -> str:
    """The absolute path of a file; up from a link is up from where it leads."""
    folder, name = os.path.split(file)
    return os.path.abspath(
        os.path.join(os.path.realpath(folder), name) if os.pardir in PurePath(folder).parts else file
    )
