"""Processes killed (SIGKILL) at random moments of every kind of work, and what the next process makes of what is left.

Half of the kills come after a random time, half at a random call that changes a file, since most of the time passes
between those. After each one: a reader finds the old content, the new or nothing; the same call again goes on and gives
bit for bit what an uninterrupted run gives; finished work (embeddings, rows, epochs, cells) is not done again; what the
killed process left unfinished is removed by a run a day later.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback

from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.artifact import CONFIG, WEIGHTS, read_checked
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.demo import demo_dataset, demo_model
from taskres_hf.embedding import cache as caching
from taskres_hf.embedding.cache import KeptRows
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, embed_images
from taskres_hf.errors import TaskResError
from taskres_hf.paper.checkpoints import import_checkpoint
from taskres_hf.paper.compare import compare_methods
from taskres_hf.predicting import classify_to_file
from taskres_hf.training.run import list_checkpoints, read_checkpoint

from .full import Disk
from .harness import Outcome
from .material import CLASSES, classifier, picture_files, zero_shot
from .processes import Started, call

_PICTURES, _BATCH, _EPOCHS = 24, 4, 8
_TWO_DAYS = 2 * 86400


@dataclass(frozen=True)
class Work:
    """Work that can be interrupted.

    Attributes:
        act: does it or goes on with it; returns the result, and how many units of work it did anew.
        kept: units that a reader finds finished on disk; raises what the reader raises.
        total: units of an uninterrupted run.
    """

    name: str
    act: Callable[[Path], tuple[Any, int]]
    kept: Callable[[Path], int]
    total: int


def _digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


@cache
def _images() -> LabelledImages:
    return LabelledImages(demo_dataset("animals-plants")["test"].select(range(0, 6 * _PICTURES, 6)))


def _embed(folder: Path) -> tuple[Any, int]:
    model, decoded = zero_shot(), []
    real = LabelledImages.image

    def image(self: LabelledImages, index: int, *rest: Any) -> Any:
        decoded.append(index)
        return real(self, index, *rest)

    with mock.patch.object(caching, "_SECONDS", 0.0), mock.patch.object(LabelledImages, "image", image):
        embedder = Embedder(model.clip, model.image_processor)
        found = embed_images(embedder, _images(), batch_size=_BATCH, cache_dir=folder, progress=False)
    return _digest(found.image_embeds), len(decoded)


def _embedded(folder: Path) -> int:
    keys = [bytes.fromhex(_images().digest(row)) for row in range(_PICTURES)]
    tables = [path for path in folder.glob("*") if path.name != "files"]
    return max((sum(len(rows) for _, rows in KeptRows(table).take(keys)) for table in tables), default=0)


@cache
def _features() -> ImageFeatures:
    model = zero_shot()
    return embed_images(Embedder(model.clip, model.image_processor), _images(), progress=False)


class _Epochs(TrainerCallback):
    """Counts the epochs that are begun."""

    count = 0

    def on_epoch_begin(self, *values: Any, **options: Any) -> None:
        self.count += 1


def _train(folder: Path) -> tuple[Any, int]:
    model, counter = classifier(0, _features().class_names), _Epochs()
    model.classifier.reset()
    arguments = TaskResTrainingArguments(
        output_dir=str(folder), recipe="auto-v1", num_train_epochs=_EPOCHS, train_batch_size=8, save_epochs=1,
        save_total_limit=3, on_short="ignore", disable_tqdm=True, cache_dir=False, report_to="none",
    )  # fmt: skip
    trainer = TaskResTrainer(model, arguments, _features(), callbacks=[counter])
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(folder)) or None)
    return (_digest(model.classifier.residual), len(trainer.log_history)), counter.count


def _trained(folder: Path) -> int:
    return int(read_checkpoint(True, str(folder))[1]["epoch"]) if list_checkpoints(folder) else 0


def _save(folder: Path) -> tuple[Any, int]:
    for number in range(3):
        classifier(number, CLASSES if number != 1 else ["x", "y"]).save_pretrained(folder / "artifact")
    return _saved_digest(folder), 1


def _saved_digest(folder: Path) -> str:
    config, tensors, _ = read_checked(folder / "artifact" / CONFIG, folder / "artifact" / WEIGHTS)
    return hashlib.sha256(repr((sorted(config.items(), key=str), tensors["residual"])).encode()).hexdigest()


def _saved(folder: Path) -> int:
    if (folder / "artifact").exists():
        _saved_digest(folder)
    return 0


@cache
def _published() -> Path:
    path = Path(tempfile.mkdtemp(prefix="taskres-kills-")) / "model.pth.tar-200"
    model = classifier(7)
    state = {"text_feature_residuals": model.classifier.residual.detach(), "base_text_features": model.classifier.base}
    torch.save({"state_dict": state, "epoch": 200}, path)
    return path


def _import(folder: Path) -> tuple[Any, int]:
    first, base = zero_shot(), zero_shot().clip
    options = {"tokenizer": first.tokenizer, "image_processor": first.image_processor}
    model = import_checkpoint(_published(), base, CLASSES, **options)  # type: ignore[arg-type]
    model.save_pretrained(folder / "artifact")
    return _saved_digest(folder), 1


@cache
def _files() -> list[str]:
    return picture_files(Path(tempfile.mkdtemp(prefix="taskres-kills-")), _PICTURES)


def _predict(folder: Path) -> tuple[Any, int]:
    output = folder / "answers.csv"
    if output.exists():  # the killed process was through
        return output.read_bytes(), 0
    written = classify_to_file(classifier(1), _files(), output, batch_size=_BATCH, resume=True)
    return output.read_bytes(), _PICTURES - written.resumed


def _predicted(folder: Path) -> int:
    if (folder / "answers.csv").exists():
        return _PICTURES
    if not (folder / "answers.csv.partial").exists():
        return 0
    lines = (folder / "answers.csv.partial").read_bytes().split(b"\n")
    return max(len(lines) - 2, 0) // _BATCH * _BATCH


_METHODS = ("zero-shot", "class-mean", "gda")


def _compare(folder: Path) -> tuple[Any, int]:
    fitted: list[bool] = []
    with mock.patch.dict(os.environ, {"TASKRES_CACHE": str(_published().parent)}):
        rows = compare_methods(
            demo_model(), "food", folder, methods=_METHODS, shots=[1, 2], seeds=[1],
            arguments={"disable_tqdm": True}, on_cell=lambda cell, result, done: fitted.append(not done),
        )  # fmt: skip
    return [(row["method"], row["shots"], row["accuracy"], row["ece"]) for row in rows], sum(fitted)


def _compared(folder: Path) -> int:
    return len([path for path in (folder / "cells").glob("**/*.json") if not path.name.startswith(".")])


WORKS = (
    Work("embedding", _embed, _embedded, _PICTURES),
    Work("training", _train, _trained, _EPOCHS),
    Work("saving", _save, _saved, 1),
    Work("importing", _import, _saved, 1),
    Work("predicting", _predict, _predicted, _PICTURES),
    Work("comparing", _compare, _compared, len(_METHODS) * 2),
)


class _Deadly(Disk):
    """Kills this process at call `fail_at`, before it is made or, of a write, in its midst."""

    def call(self, what: str, path: str, other: str = "") -> bool:
        if len(self.calls) == self.fail_at and what != "write":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().call(what, path, other)


@contextmanager
def _deadly(folder: Path, number: int) -> Iterator[None]:
    disk = _Deadly(folder, number)
    real = OSError

    def dying(*values: Any) -> OSError:
        os.kill(os.getpid(), signal.SIGKILL)
        return real(*values)

    with mock.patch("fuzz.full.OSError", dying, create=True), disk.in_place():
        yield


def _at_call(work: Work, folder: Path, number: int) -> Any:
    with _deadly(folder, number):
        return work.act(folder)


def _count_calls(work: Work, folder: Path) -> int:
    disk = Disk(folder)
    with disk.in_place():
        work.act(folder)
    return len(disk.calls)


@dataclass
class Reference:
    """An uninterrupted run: its result, how long it took, how many calls changed files."""

    result: Any
    seconds: float
    calls: int


def reference(work: Work) -> Reference:
    for prepare in (zero_shot, _images, _features, _published, _files):
        prepare()  # here, so that all processes have the same
    with tempfile.TemporaryDirectory(prefix="taskres-kills-") as one, tempfile.TemporaryDirectory() as other:
        first = call(lambda: work.act(Path(one)))
        assert not first.error, first.error
        counted = call(lambda: _count_calls(work, Path(other)))
        assert not counted.error, counted.error
        return Reference(first.value[0], first.seconds, counted.value)


def leftovers(folder: Path) -> list[str]:
    """Unfinished files and folders."""
    return sorted(path.name for path in folder.rglob(".*") if path.name.endswith(".tmp") or path.is_dir())


def _a_day_later(folder: Path) -> None:
    """Make everything old, and take away what is finished, so that the next run has something to write."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            _remove_finished(path)
    old = time.time() - _TWO_DAYS
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (old, old))


def _remove_finished(path: Path) -> None:
    if path.is_dir() and leftovers(path):
        for inner in path.iterdir():
            if not inner.name.startswith("."):
                _remove_finished(inner)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def one_kill(work: Work, expected: Reference, rng: random.Random) -> list[str]:
    """Kill a run at a random moment and see what the next ones make of it; what is wrong."""
    found = []
    with tempfile.TemporaryDirectory(prefix="taskres-kills-") as name:
        folder = Path(name)
        if rng.random() < 0.5:
            number = rng.randrange(expected.calls)
            moment = f"at call {number} of {expected.calls}"
            Started(lambda: _at_call(work, folder, number)).result()
        else:
            seconds = rng.random() * expected.seconds
            moment = f"after {seconds:.3f} of {expected.seconds:.3f} s"
            started = Started(lambda: work.act(folder))
            time.sleep(seconds)
            started.kill()
            started.result()
        try:
            kept = work.kept(folder)
        except TaskResError as error:
            return [f"{work.name}, killed {moment}: a reader finds {error}"]
        again = call(lambda: work.act(folder))
        if again.error or again.killed:
            return [f"{work.name}, killed {moment}: the next run ends with {again.error}"]
        if again.value[0] != expected.result:
            found.append(f"{work.name}, killed {moment}: another result")
        if kept and again.value[1] > work.total - kept:
            found.append(f"{work.name}, killed {moment}: {kept} units were kept, {again.value[1]} done anew")
        if left := leftovers(folder):
            _a_day_later(folder)
            once_more = call(lambda: work.act(folder))
            if once_more.error:
                found.append(f"{work.name}, killed {moment}: the third run ends with {once_more.error}")
            if still := leftovers(folder):
                found.append(f"{work.name}, killed {moment}: {still[:3]} of {left[:3]} are there a day later")
    return found


def prove(runs: int | None, seed: int, works: tuple[Work, ...] = WORKS) -> list[Outcome]:
    """`runs` kills, 200 by default, dealt out over all kinds of work."""
    total, outcomes = runs or 200, []
    for place, work in enumerate(works):
        outcome, start = Outcome(f"kills: {work.name}"), time.monotonic()
        expected = reference(work)
        share = len(range(place, total, len(works)))
        for number in range(share):
            found = one_kill(work, expected, random.Random(f"{seed} {work.name} {number}"))
            outcome.inputs += 1
            outcome.counts["finding" if found else "same"] += 1
            outcome.findings += found
        outcome.seconds = time.monotonic() - start
        outcomes.append(outcome)
    return outcomes
