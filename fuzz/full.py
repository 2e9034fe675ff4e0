"""A disk that is full at the n-th write, for every n of every save; and the order in which writes reach the disk.

Each save runs in this process with the calls that change files replaced: opening, writing, syncing, renaming, making
folders. The n-th of them fails as on a full disk, having written half of what it was given; or it and all after it do.
Afterwards the old content or the new is there and whole, the error is ours, nothing is left lying about, and the same
save without a fault gives what it always gives.

The same replacements record the calls. A rename is safe against a power cut where everything below the new name was
synced after it was last written, and the folder it happened in is synced afterwards.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf import storage as storing
from taskres_hf.artifact import CONFIG, WEIGHTS, read_checked
from taskres_hf.base_classifier import read_table, write_table
from taskres_hf.errors import TaskResError
from taskres_hf.paper.cells import read_cell
from taskres_hf.predicting import PredictionWriter, check_output
from taskres_hf.storage import write_sealed
from taskres_hf.training.run import read_checkpoint, write_checkpoint

from . import targets
from .harness import MADE_AGAIN, Outcome
from .material import base, classifier

ABSENT = "absent"


@dataclass(frozen=True)
class Save:
    """Something that is written.

    Attributes:
        before: makes what is there first. act: writes. read: folder to what a reader finds, `ABSENT` for nothing.
        quiet: a cache: a full disk is no error. needs_room: a cache of files that are needed somewhere: an
            error where there is no room at all. ordered: whether the order of writes matters, since no checksum is
            compared before a file is used. kept: endings of names that may stay after a fault, to go on from.
    """

    name: str
    before: Callable[[Path], Any]
    act: Callable[[Path], Any]
    read: Callable[[Path], Any]
    quiet: bool = False
    needs_room: bool = False
    ordered: bool = True
    kept: tuple[str, ...] = ()


# ---------------------------------------------------------------------- what is written


def _nothing(folder: Path) -> None:
    pass


def _artifact(folder: Path) -> Any:
    place = folder / "artifact"
    if not place.exists():
        return ABSENT
    config, tensors, processor = read_checked(place / CONFIG, place / WEIGHTS)
    TaskResCLIPForImageClassification.from_pretrained(place, base_model=base()).image_processor  # noqa: B018
    return config, tensors, processor


def _checkpoint(folder: Path, epoch: int) -> None:
    write_checkpoint(classifier(epoch), str(folder), epoch, *targets._state(epoch), 1)


def _newest(folder: Path) -> Any:
    return read_checkpoint(True, str(folder))[1]


def _embed(folder: Path) -> None:
    targets.add_rows(folder, 2).close()


def _embedded(folder: Path) -> Any:
    found = targets._read_embeddings(folder)
    return ABSENT if found == MADE_AGAIN else found


def _table(folder: Path) -> Any:
    found = read_table(folder / "t.safetensors")
    return ABSENT if found is None else found.tolist()


def _predict(folder: Path) -> None:
    """Rows, those of an earlier run first, and the output."""
    check_output(folder / "a.csv")
    with PredictionWriter(folder / "a.csv", targets._RUN, resume=True, batch_size=4) as writer:
        for row in targets._ROWS[writer.rows :]:
            writer.write(row)
        writer.finish(2)


def _predicted(folder: Path) -> Any:
    return (folder / "a.csv").read_bytes() if (folder / "a.csv").exists() else ABSENT


def _tower(folder: Path) -> Any:
    found = targets._read_tower(folder)
    return ABSENT if found == MADE_AGAIN else found


def _cell(folder: Path) -> Any:
    found = read_cell(folder / "cell.json")
    return ABSENT if found is None else found


SAVES = (
    Save("a new artifact", _nothing, lambda f: classifier(2).save_pretrained(f / "artifact"), _artifact),
    Save(
        "an artifact over another",
        lambda f: classifier(1, ["x", "y"]).save_pretrained(f / "artifact"),
        lambda f: classifier(2).save_pretrained(f / "artifact"), _artifact,
    ),
    Save("a checkpoint", lambda f: _checkpoint(f, 2), lambda f: _checkpoint(f, 4), _newest),
    Save("embeddings", _nothing, _embed, _embedded, quiet=True, kept=(".safetensors",)),
    Save("a base classifier", _nothing, lambda f: write_table(f / "t.safetensors", targets._TABLE), _table, quiet=True),
    Save(
        "a cell", lambda f: write_sealed(f / "cell.json", {"accuracy": 0.1}),
        lambda f: write_sealed(f / "cell.json", targets._CELL), _cell,
    ),
    Save("predictions", _nothing, _predict, _predicted, kept=(".partial",)),
    Save("a converted tower", _nothing, targets._read_tower, _tower, quiet=True, needs_room=True, ordered=False),
)  # fmt: skip


# ---------------------------------------------------------------------- the disk


@dataclass
class Disk:
    """Counts and records the calls that change files below a folder, and lets one of them fail.

    Attributes:
        fail_at: number of the call that fails, from 0; None for none. for_good: all after it fail too.
        calls: (what, path, second path) in order.
    """

    root: Path
    fail_at: int | None = None
    for_good: bool = False
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    failed: int = 0

    def _mine(self, path: Any) -> str | None:
        try:
            text = os.path.abspath(os.fspath(path))
        except (TypeError, ValueError):
            return None
        temporary = text.startswith(tempfile.gettempdir() + os.sep) and "torch" not in text
        return text if text.startswith(str(self.root)) or temporary else None

    def call(self, what: str, path: str, other: str = "") -> bool:
        """Note a call; whether it is to fail."""
        number = len(self.calls)
        self.calls.append((what, path, other))
        fails = self.fail_at is not None and (number == self.fail_at or (self.for_good and number > self.fail_at))
        self.failed += fails
        return fails

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The calls replaced, for as long as the block runs."""
        real = {name: getattr(os, name) for name in ("replace", "rename", "mkdir", "fsync", "open", "fdopen")}
        real_open = io.open

        def full(path: str) -> OSError:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        def rename(source: Any, target: Any, **options: Any) -> None:
            if (path := self._mine(target)) and self.call("rename", self._mine(source) or str(source), path):
                raise full(path)
            real["replace"](source, target, **options)

        def mkdir(path: Any, *rest: Any, **options: Any) -> None:
            if not os.path.isdir(path) and (mine := self._mine(path)) and self.call("mkdir", mine):
                raise full(mine)
            real["mkdir"](path, *rest, **options)

        def fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if self._mine(path) and self.call("fsync", path):
                raise full(path)

        def low_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            creates = flags & os.O_CREAT and not os.path.exists(path)
            if creates and (mine := self._mine(path)) and self.call("create", mine):
                raise full(mine)
            return int(real["open"](path, flags, *rest, **options))

        def fdopen(handle: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
            stream = real["fdopen"](handle, mode, *rest, **options)
            return _Stream(stream, os.readlink(f"/proc/self/fd/{handle}"), self) if set(mode) & set("wa+") else stream

        def high_open(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            mine = None if isinstance(path, int) or not set(mode) & set("wax+") else self._mine(path)
            if mine and not os.path.exists(mine) and self.call("create", mine):
                raise full(mine)
            stream = real_open(path, mode, *rest, **options)
            return _Stream(stream, mine, self) if mine else stream

        replaced = {
            "replace": rename,
            "rename": rename,
            "mkdir": mkdir,
            "fsync": fsync,
            "open": low_open,
            "fdopen": fdopen,
        }
        opening = [mock.patch.object(module, "open", high_open) for module in (builtins, io)]
        with mock.patch.multiple(os, **replaced), opening[0], opening[1]:
            yield


class _Stream:
    """An open file whose writing may fail."""

    def __init__(self, stream: Any, path: str, disk: Disk) -> None:
        self._stream, self._path, self._disk = stream, path, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)

    def write(self, content: Any) -> int:
        if self._disk.call("write", self._path):
            self._stream.write(content[: len(content) // 2])
            self._stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        return int(self._stream.write(content))

    def writelines(self, parts: Iterable[Any]) -> None:
        for part in parts:
            self.write(part)


# ---------------------------------------------------------------------- faults


@contextmanager
def _fresh(save: Save) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="taskres-full-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storing._UNWRITABLE.clear()
        storing._SWEPT.clear()
        save.before(Path(name))
        yield Path(name)


def _names(folder: Path, save: Save) -> set[str]:
    return {name.relative_to(folder).as_posix() for name in folder.rglob("*") if not _kept(name, folder, save)}


def _kept(name: Path, folder: Path, save: Save) -> bool:
    return any(part.endswith(save.kept) for part in name.relative_to(folder).parts) if save.kept else False


def record(save: Save) -> Disk:
    """The calls of a save without a fault."""
    with _fresh(save) as folder:
        disk = Disk(folder)
        with disk.in_place():
            save.act(folder)
        return disk


def problems(
    save: Save, number: int, for_good: bool, old: Any, new: Any, names: tuple[set[str], set[str]]
) -> list[str]:
    """What is wrong after call `number` of a save has failed."""
    found = []
    with _fresh(save) as folder:
        disk = Disk(folder, number, for_good)
        try:
            with disk.in_place():
                save.act(folder)
            raised = None
        except TaskResError as error:
            raised = error
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        what = disk.calls[number][0] if number < len(disk.calls) else "nothing"
        synced_folder = what == "fsync" and os.path.isdir(disk.calls[number][1])
        if save.quiet and raised is not None and not (save.needs_room and for_good):
            found.append(f"a cache ended the work: {raised}")
        after = save.read(folder)
        if after not in (old, new):
            found.append(f"neither the old content nor the new: {after!r:.200}")
        if raised is None and not save.quiet and after != new and not synced_folder:
            found.append("no error, and the new content is not there")
        left = _names(folder, save) - names[0] - names[1]
        if left:
            found.append(f"left behind: {sorted(left)[:4]}")
        save.act(folder)
        if save.read(folder) != new:
            found.append("the next save does not give what it always gives")
    return [f"{what} {disk.calls[number][1].rsplit('/', 1)[-1]}: {text}" for text in found]


def unsafe_renames(disk: Disk) -> list[str]:
    """Renames that a power cut may turn into an empty or half file, or may undo after later work relied on them."""
    found: list[str] = []
    folders = {path for what, path, _ in disk.calls if what == "mkdir"}
    dirty: dict[str, int] = {}
    for number, (what, path, target) in enumerate(disk.calls):
        if what in ("create", "write", "mkdir"):
            dirty[path] = number
        elif what == "fsync":
            dirty.pop(path, None)
        elif what == "rename":
            inside = [name for name in dirty if name == path or name.startswith(f"{path}{os.sep}")]
            unsynced = [name for name in inside if name not in folders]
            if unsynced:
                found.append(f"{os.path.basename(target)}: renamed before {os.path.basename(unsynced[0])} was synced")
            later = disk.calls[number + 1 :]
            folder = os.path.dirname(target)
            moved = any(what == "rename" and path == folder for what, path, _ in later)
            if ("fsync", folder, "") not in later and not moved:
                found.append(f"{os.path.basename(target)}: its folder was not synced after the rename")
    return found


def check(save: Save, most: int | None = None) -> Outcome:
    """Let every call of a save fail, once and for good; `most` of them where that is given."""
    outcome, start = Outcome(f"full disk: {save.name}"), time.monotonic()
    disk = record(save)
    if save.ordered:
        outcome.findings += [f"{save.name}: {text}" for text in unsafe_renames(disk)]
    with _fresh(save) as folder:
        old, before = save.read(folder), _names(folder, save)
        shutil.rmtree(folder)
        folder.mkdir()
        save.before(folder)
        save.act(folder)
        new, after = save.read(folder), _names(folder, save)
    count = len(disk.calls)
    step = max(1, count // most) if most else 1
    for number in range(0, count, step):
        for for_good in (False, True):
            outcome.inputs += 1
            found = problems(save, number, for_good, old, new, (before, after))
            outcome.counts["finding" if found else "same"] += 1
            outcome.findings += [f"{save.name}, call {number}: {text}" for text in found]
    outcome.seconds = time.monotonic() - start
    return outcome


def prove(runs: int | None, seed: int) -> list[Outcome]:
    """Every call of every save."""
    return [check(save, runs) for save in SAVES]
