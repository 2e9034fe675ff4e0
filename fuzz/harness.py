"""Damaged inputs, one after another, and what became of each.

An input must give the answer of the undamaged file, or an error of ours, or, from a cache, nothing (it is made again).
Files of other people (tables, archives, split lists) carry no checksum of ours: there another answer is allowed as long
as it is well formed. Anything else is a finding: an error of another kind, another answer, a crash of the process,
more than 5 seconds of the processor, or more than 500 MB.

Each kind of file runs in a process of its own that is forked once, so a crash ends that process and is seen from here.
Every input follows from the seed, the kind and its number: any of them can be made again.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskres_hf.errors import TaskResError

from .mutation import mutate

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS, MOST_BYTES = 5.0, 500 << 20
_STUCK = 60.0  # seconds without an input, after which the process is ended
_KEPT = 3  # reproducers for each place where it went wrong

MADE_AGAIN = "made again"  # the answer of a cache that does not use a file


class Slow(BaseException):
    """Raised into a reader that takes too long; no `except Exception` catches it."""


@dataclass(frozen=True)
class Target:
    """A kind of file and its reader.

    Attributes:
        seeds: undamaged files as the library writes them, by name; several variants.
        read: folder to an answer that can be compared; raises what the reader raises.
        allow: errors that are documented besides those of the library.
        check: for files without our checksum: what is wrong with an answer of another kind, empty if nothing.
        thorough: another reader for every 50th input, with an answer of its own.
        changes_folder: whether reading writes into the folder.
        keep: endings of names that are never damaged.
        resign: makes checksums right again after a file was damaged, so that what lies behind them is met.
    """

    name: str
    seeds: Sequence[Mapping[str, bytes]]
    read: Callable[[Path], Any]
    allow: tuple[type[BaseException], ...] = ()
    check: Callable[[Any], str] | None = None
    thorough: Callable[[Path], Any] | None = None
    changes_folder: bool = False
    keep: tuple[str, ...] = ()
    resign: Callable[[dict[str, bytes]], dict[str, bytes] | None] | None = None


@dataclass
class Outcome:
    """What became of the inputs of one target."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    inputs: int = 0


def make_input(target: Target, seed: int, number: int) -> tuple[int, dict[str, bytes], bool]:
    """Input `number`: which seed it comes from, its files, and whether its checksums were made right again."""
    rng = random.Random(f"{seed} {target.name} {number}")
    place = rng.randrange(len(target.seeds))
    files = dict(target.seeds[place])
    names = [name for name in files if not name.endswith(target.keep)]
    forged = False
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2)))):
        files[name], made = mutate(rng, name, files[name])
        forged = forged or made
    if target.resign is not None and rng.random() < 0.4:
        signed = target.resign(files)
        if signed is not None:
            return place, signed, True
    return place, files, forged


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _alarm(number: int, frame: Any) -> None:
    raise Slow


def judge(target: Target, folder: Path, expected: Any, forged: bool, read: Callable[[Path], Any]) -> tuple[str, str]:
    """What reading a folder comes to: `same`, `refused`, `made again`, `other`, or `finding` with what went wrong."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        answer = read(folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if isinstance(answer, str) and answer == MADE_AGAIN:
            result = ("made again", "")
        elif answer == expected:
            result = ("same", "")
        elif target.check is not None:
            problem = target.check(answer)
            result = ("finding", f"not well formed: {problem}") if problem else ("other", "")
        else:
            result = ("other", "") if forged else ("finding", f"another answer: {answer!r:.300}")
    except (TaskResError, *target.allow):
        result = ("refused", "")
    except Slow:
        result = ("finding", f"more than {MOST_SECONDS:g} seconds: {_where(traceback.format_exc())}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        result = ("finding", f"{type(error).__name__}: {str(error)[:200]} {_where(traceback.format_exc())}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if result[0] != "finding" and used > MOST_BYTES:
        return "finding", f"{used >> 20} MB of memory"
    if result[0] != "finding" and time.process_time() - start > MOST_SECONDS:
        return "finding", f"{time.process_time() - start:.1f} seconds"
    return result


def _where(trace: str) -> str:
    """The last place within the library."""
    lines = [line.strip() for line in trace.splitlines() if "taskres_hf" in line and line.strip().startswith("File")]
    return f"({lines[-1].split('taskres_hf/', 1)[-1]})" if lines else ""


def pack(expected: Mapping[str, bytes], files: Mapping[str, bytes], forged: bool = False) -> bytes:
    """A reproducer: the damaged files and the undamaged ones they were made of; forged ones have right checksums."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in (("undamaged", expected), ("damaged", files)):
            for name, data in content.items():
                archive.writestr(f"{part}/{name}", data)
        archive.comment = b"forged" if forged else b""
    return sink.getvalue()


def is_forged(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.comment == b"forged"


def unpack(path: Path) -> dict[str, dict[str, bytes]]:
    parts: dict[str, dict[str, bytes]] = {"undamaged": {}, "damaged": {}}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            part, _, rest = name.partition("/")
            parts[part][rest] = archive.read(name)
    return parts


class _Worker:
    """The forked process's side: reads inputs and sends what became of them."""

    def __init__(self, target: Target, scratch: Path, seed: int, corpus: Path) -> None:
        self.target, self.scratch, self.seed, self.corpus = target, scratch, seed, corpus
        self.expected: dict[tuple[int, bool], Any] = {}
        self.kept: Counter[str] = Counter()
        self.here: dict[int, dict[str, bytes]] = {}

    def folder(self, place: int, files: Mapping[str, bytes]) -> Path:
        """A folder with these files; of a target that only reads, only what differs is written."""
        folder = self.scratch / str(place)
        if self.target.changes_folder or place not in self.here or set(self.here[place]) != set(files):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.here[place] = {}
        before = self.here[place]
        write_files(folder, {name: data for name, data in files.items() if before.get(name) is not data})
        self.here[place] = dict(files)
        return folder

    def answer(self, place: int, thorough: bool) -> Any:
        if (place, thorough) not in self.expected:
            folder = self.folder(place, self.target.seeds[place])
            read = self.target.thorough if thorough else self.target.read
            assert read is not None
            self.expected[place, thorough] = read(folder)
        return self.expected[place, thorough]

    def one(self, number: int) -> tuple[str, str]:
        place, files, forged = make_input(self.target, self.seed, number)
        thorough = self.target.thorough is not None and number % 50 == 0
        expected = self.answer(place, thorough)
        read = self.target.thorough if thorough else self.target.read
        assert read is not None
        kind, reason = judge(self.target, self.folder(place, files), expected, forged, read)
        if kind == "finding":
            reason = f"{self.target.name} {number}: {reason}"
            self.keep(place, files, forged, reason)
        return kind, reason

    def keep(self, place: int, files: Mapping[str, bytes], forged: bool, reason: str) -> None:
        self.kept[signature(reason)] += 1
        if self.kept[signature(reason)] <= _KEPT:
            content = pack(self.target.seeds[place], files, forged)
            self.corpus.mkdir(parents=True, exist_ok=True)
            name = f"{self.target.name}-{hashlib.sha256(content).hexdigest()[:10]}.zip"
            (self.corpus / name).write_bytes(content)


def _quiet() -> None:
    """What a worker does without: warnings, waiting for the disk, more memory than a small machine has."""
    warnings.simplefilter("ignore")
    os.fsync = lambda handle: None
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    if pages:
        limit = pages * os.sysconf("SC_PAGE_SIZE") + (4 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _work(worker: _Worker, numbers: range, deadline: float, pipe: Any, current: Any) -> None:
    _quiet()
    counts: Counter[str] = Counter()
    findings: list[str] = []
    for number in numbers:
        current.value = number
        kind, reason = worker.one(number)
        counts[kind] += 1
        if reason:
            findings.append(reason)
        if time.monotonic() > deadline:
            break
    pipe.send((counts, findings[:200]))
    pipe.close()
    os._exit(0)


def run_target(
    target: Target,
    runs: int,
    seed: int,
    seconds: float = float("inf"),
    corpus: Path = CORPUS,
    scratch: str | None = None,
) -> Outcome:
    """Read `runs` damaged inputs of a target, or as many as fit into `seconds`."""
    outcome, start = Outcome(target.name), time.monotonic()
    context = multiprocessing.get_context("fork")
    first, deadline = 0, start + seconds
    with tempfile.TemporaryDirectory(prefix="taskres-fuzz-", dir=scratch) as folder:
        while first < runs and time.monotonic() < deadline:
            worker = _Worker(target, Path(folder), seed, corpus)
            receiver, sender = context.Pipe(duplex=False)
            current = context.Value("q", first)
            child = context.Process(target=_work, args=(worker, range(first, runs), deadline, sender, current))
            child.start()
            sender.close()
            reason = _watch(child, receiver, current)
            if reason is None:
                try:
                    counts, findings = receiver.recv()
                except EOFError:
                    child.join()
                    reason = f"the process ended with {child.exitcode}"
            if reason is None:
                outcome.counts += counts
                outcome.findings += findings
                outcome.inputs += sum(counts.values())
                break
            # What the process had counted is lost with it: its inputs count as read, the last one as a finding.
            place, files, forged = make_input(target, seed, current.value)
            worker.keep(place, files, forged, f"{target.name} {current.value}: {reason}")
            outcome.findings.append(f"{target.name} {current.value}: {reason}")
            outcome.counts["finding"] += 1
            outcome.inputs += current.value - first + 1
            first = current.value + 1
    outcome.seconds = time.monotonic() - start
    return outcome


def _watch(child: Any, receiver: Any, current: Any) -> str | None:
    """Wait for a worker; None when it is through, else what ended it."""
    last, since = current.value, time.monotonic()
    while not receiver.poll(0.05):
        if not child.is_alive() and not receiver.poll(0):
            return f"the process ended with {child.exitcode}"
        if current.value != last:
            last, since = current.value, time.monotonic()
        elif time.monotonic() - since > _STUCK:
            child.kill()
            child.join()
            return f"no answer in {_STUCK:g} seconds"
    return None


def replay(target: Target, corpus: Path = CORPUS, scratch: str | None = None) -> Outcome:
    """Read the reproducers of former findings again; each must be refused or give the undamaged file's answer."""
    outcome, start = Outcome(f"{target.name} (corpus)"), time.monotonic()
    for path in sorted(corpus.glob(f"{target.name}-*.zip")):
        parts = unpack(path)
        with tempfile.TemporaryDirectory(prefix="taskres-fuzz-", dir=scratch) as folder:
            for part, files in parts.items():
                write_files(Path(folder, part), files)
            readers = [target.read] + ([target.thorough] if target.thorough else [])
            for read in readers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        expected = read(Path(folder, "undamaged"))
                    except TaskResError:  # written by a release whose files are refused now
                        expected = None
                    kind, reason = judge(target, Path(folder, "damaged"), expected, is_forged(path), read)
                outcome.counts[kind] += 1
                outcome.inputs += 1
                if reason:
                    outcome.findings.append(f"{path.name}: {reason}")
    outcome.seconds = time.monotonic() - start
    return outcome


def print_table(outcomes: Sequence[Outcome]) -> None:
    """One row a target, and all findings below."""
    columns = ("same", "made again", "refused", "other", "finding")
    print("| target | inputs | same answer | made again | refused | other, well formed | findings | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for outcome in outcomes:
        numbers = " | ".join(f"{outcome.counts[column]:,}" for column in columns)
        print(f"| {outcome.name} | {outcome.inputs:,} | {numbers} | {outcome.seconds:.1f} |", flush=True)
    for outcome in outcomes:
        alike: dict[str, list[str]] = {}
        for finding in outcome.findings:
            alike.setdefault(signature(finding), []).append(finding)
        for findings in alike.values():
            print(f"{len(findings)} times: {findings[0][:300]!r}")


def signature(finding: str) -> str:
    """What findings of one cause have in common: the kind of error and the place in the library."""
    reason = finding.split(": ", 1)[-1]
    return f"{reason.split(':')[0]} {reason.rsplit('(', 1)[-1] if reason.endswith(')') else ''}"
