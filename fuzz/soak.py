"""Long runs: memory and open files stay flat over many predictions, and one picture in a hundred is broken.

Memory is the private memory of the process, open files those in /proc; both are sampled all along, and the line through
the samples of the second half must not rise by more than a few bytes a picture.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data.training_data import load_training_data
from taskres_hf.predicting import classify_files, classify_to_file

from .harness import Outcome
from .material import classifier, picture_files

_MOST_BYTES = 100.0  # a picture that memory may rise by: a row of an answer has more
_ROUND = 500  # files on disk, named again and again


def private_bytes() -> int:
    """Memory that belongs to this process alone."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass
class Samples:
    """Memory and open files over the number of pictures."""

    pictures: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)

    def take(self, pictures: int) -> None:
        gc.collect()
        self.pictures.append(pictures)
        self.memory.append(private_bytes())
        self.handles.append(len(os.listdir("/proc/self/fd")))

    def slope(self) -> float:
        """Bytes a picture in the second half, by the median of the slopes between its samples."""
        half = len(self.pictures) // 2
        x, y = np.asarray(self.pictures[half:], dtype=float), np.asarray(self.memory[half:], dtype=float)
        pairs = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))]
        return float(np.median(pairs)) if pairs else 0.0

    def problems(self) -> list[str]:
        half = len(self.handles) // 2
        found = []
        if self.slope() > _MOST_BYTES:
            found.append(f"memory rises by {self.slope():.0f} bytes a picture")
        if max(self.handles[half:]) > max(self.handles[: half or 1]):
            found.append(f"open files rise from {max(self.handles[: half or 1])} to {max(self.handles[half:])}")
        return found


def predict(count: int, samples: int = 40) -> tuple[Outcome, Samples]:
    """Classify `count` pictures as a stream; the answers are looked at and dropped."""
    outcome, taken, start = Outcome("soak: predictions"), Samples(), time.monotonic()
    model = classifier(1)
    with tempfile.TemporaryDirectory(prefix="taskres-soak-") as folder:
        files = picture_files(Path(folder), min(_ROUND, count))
        first: dict[str, str] = {}
        step = max(len(files), count // samples)
        while outcome.inputs < count:
            named = [files[number % len(files)] for number in range(min(step, count - outcome.inputs))]
            for row in classify_files(model, named):
                answer = json.dumps([top["label"] for top in row["predictions"]])
                if first.setdefault(row["file"], answer) != answer or row["error"]:
                    outcome.findings.append(f"{Path(row['file']).name} has another answer than at first")
                outcome.inputs += 1
            taken.take(outcome.inputs)
    outcome.findings += taken.problems()
    outcome.counts["finding"] = len(outcome.findings)
    outcome.counts["same"] = outcome.inputs - len(outcome.findings)
    outcome.seconds = time.monotonic() - start
    return outcome, taken


def broken_pictures(folder: Path, count: int, share: int = 100) -> set[str]:
    """`count` pictures in two class folders, one in `share` of them broken in one of several ways; the broken ones."""
    names = picture_files(folder / "all", min(count, _ROUND))
    broken: set[str] = set()
    for number in range(count):
        place = folder / "train" / ("even", "odd")[number % 2] / f"{number:06d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        if number % share != share - 1:
            if number < len(names):
                shutil.copyfile(names[number], place)
            else:
                content = Path(names[number % len(names)]).read_bytes()
                place.write_bytes(content + number.to_bytes(4, "big"))  # another content, the same pixels
            continue
        whole = Path(names[number % len(names)]).read_bytes()
        ways = (b"", whole[: len(whole) // 2], b"<html>", bytes(len(whole)), whole[:40] + b"\0" * 40 + whole[80:])
        place.write_bytes(ways[number // share % len(ways)])
        broken.add(str(place))
    shutil.rmtree(folder / "all")
    return broken


def with_broken(count: int) -> Outcome:
    """Train on pictures of which 1 % are broken, and classify all of them into a file."""
    outcome, start = Outcome("soak: broken pictures"), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="taskres-soak-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        broken = broken_pictures(folder, count)
        data = load_training_data(folder / "train")
        model = classifier(0, list(data.train.class_names))
        arguments = TaskResTrainingArguments(
            output_dir=str(folder / "out"), on_error="skip", disable_tqdm=True, cache_dir=str(folder / "cache"),
            report_to="none",
        )  # fmt: skip
        trainer = TaskResTrainer(model, arguments, data.train)
        features = trainer.embed(data.train)
        lost = {str(data.train.source(row)) for row in features.skipped}
        if lost != broken:
            outcome.findings.append(f"{len(broken)} pictures are broken, {len(lost)} were left out")
        trainer.train()
        trainer.save_model(folder / "out")
        files = sorted(str(path) for path in (folder / "train").rglob("*.png"))
        written = classify_to_file(model, files, folder / "answers.jsonl")
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        if [row["file"] for row in rows] != files:
            outcome.findings.append("rows are not those of the files")
        if {row["file"] for row in rows if row["error"]} != broken:
            outcome.findings.append("rows with an error are not those of the broken pictures")
        if any(not row["predictions"] for row in rows if not row["error"]) or len(written.skipped) != len(broken):
            outcome.findings.append("a readable picture has no answer")
    outcome.inputs, outcome.counts["refused"] = count, len(broken)
    outcome.counts["finding"] = len(outcome.findings)
    outcome.counts["same"], outcome.seconds = count - len(broken), time.monotonic() - start
    return outcome


def prove(runs: int | None, seed: int) -> list[Outcome]:
    """50,000 predictions and 10,000 pictures, or `runs` and a fifth of that."""
    count = runs or 50_000
    first, taken = predict(count)
    print(f"memory: {taken.slope():.1f} bytes a picture in the second half; open files: {taken.handles[-1]}")
    return [first, with_broken(count // 5)]
