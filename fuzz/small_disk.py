"""Saves on a disk that really is full: a small tmpfs where mounting is allowed, else a limit on the size of files.

`fuzz.full` lets every call fail by replacing it; here the system itself says no, to whatever writes, also to code that
no replacement reaches. The room grows from nothing, a page at a time or in a dozen steps, until the save succeeds. Each
try runs in a process of its own, so that neither the limit nor the mount outlives it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taskres_hf import storage as storing
from taskres_hf.errors import TaskResError

from .full import SAVES, Save, _names
from .harness import Outcome
from .processes import call

_DISK = 64 << 20  # bytes of the tmpfs, before it is filled up
_PAGE = 4096
_STEPS = 12


@contextmanager
def small_disk() -> Iterator[Path]:
    """A folder that is a disk of its own; raises PermissionError where mounting is not allowed."""
    folder = Path(tempfile.mkdtemp(prefix="taskres-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    try:
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            raise PermissionError("mounting is not allowed here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)
    finally:
        folder.rmdir()


def can_mount() -> bool:
    try:
        with small_disk():
            return True
    except PermissionError:
        return False


@contextmanager
def _filled(folder: Path, room: int) -> Iterator[None]:
    """The disk of a folder, with `room` bytes left."""
    ballast = folder.parent / "ballast"
    space = os.statvfs(folder)
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, space.f_bavail * space.f_frsize - room))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _limited(folder: Path, room: int) -> Iterator[None]:
    """No file of this process grows beyond `room` bytes."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def _place(mounted: bool) -> Iterator[Path]:
    if mounted:
        with small_disk() as disk:
            (disk / "work").mkdir()
            yield disk / "work"
    else:
        with tempfile.TemporaryDirectory(prefix="taskres-limit-") as name:
            yield Path(name)


def _try(save: Save, mounted: bool, room: int | None) -> tuple[list[str], bool, int]:
    """One save with so much room (None: enough). Returns what is wrong, whether it succeeded, and the bytes it took."""
    fault: Callable[[Path, int], Any] = _filled if mounted else _limited
    found: list[str] = []
    with _place(mounted) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storing._UNWRITABLE.clear()
        save.before(folder)
        old, before = save.read(folder), _names(folder, save)
        shutil.copytree(folder, copy := folder.parent / f"{folder.name}-copy", dirs_exist_ok=True)
        save.act(folder)
        new, after = save.read(folder), _names(folder, save)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        if room is None:
            shutil.rmtree(copy)
            return [], True, sum(sizes) if mounted else max(sizes)
        shutil.rmtree(folder)
        copy.rename(folder)
        raised: BaseException | None = None
        try:
            with fault(folder, room):
                save.act(folder)
        except TaskResError as error:
            raised = error
        except Exception as error:
            return [f"{type(error).__name__}: {error}"], False, 0
        if save.quiet and raised is not None and not save.needs_room:
            found.append(f"a cache ended the work: {raised}")
        got = save.read(folder)
        if got not in (old, new):
            found.append(f"neither the old content nor the new: {got!r:.200}")
        if raised is None and not save.quiet and got != new:
            found.append("no error, and the new content is not there")
        if left := _names(folder, save) - before - after:
            found.append(f"left behind: {sorted(left)[:4]}")
        storing._UNWRITABLE.clear()
        save.act(folder)
        if save.read(folder) != new:
            found.append("the next save does not give what it always gives")
        return found, raised is None and got == new, 0


def check(save: Save, mounted: bool, steps: int = _STEPS) -> Outcome:
    """Saves with growing room, until one succeeds."""
    kind = "small disk" if mounted else "limit on files"
    outcome, start = Outcome(f"{kind}: {save.name}"), time.monotonic()
    needed = call(lambda: _try(save, mounted, None))
    if needed.error:
        outcome.findings.append(f"{save.name}: {needed.error}")
        return outcome
    step = max(_PAGE if mounted else 1, needed.value[2] // steps)
    for room in range(0, 3 * needed.value[2] + 16 * _PAGE, step):
        ended = call(lambda room=room: _try(save, mounted, room))  # type: ignore[misc]
        found, succeeded, _ = ended.value or ([ended.error or "killed"], False, 0)
        outcome.inputs += 1
        outcome.counts["finding" if found else "same"] += 1
        outcome.findings += [f"{save.name}, {room} bytes: {text}" for text in found]
        if succeeded:
            break
    else:
        outcome.findings.append(f"{save.name}: never succeeded")
    outcome.seconds = time.monotonic() - start
    return outcome


def prove(runs: int | None, seed: int) -> list[Outcome]:
    """Every save, on a small disk where mounting is allowed, and under a limit on the size of files."""
    return [
        check(save, mounted, runs or _STEPS) for mounted in ([True] if can_mount() else []) + [False] for save in SAVES
    ]
