"""Eight processes and eight threads over one cache, one output folder, one model.

All succeed, or one says why; what is there at the end is what one alone would have left; whoever reads meanwhile sees
the content of one writer, whole.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.base_classifier import read_table, write_table
from taskres_hf.paper.cells import read_cell
from taskres_hf.predicting import classify_to_file
from taskres_hf.storage import write_sealed
from taskres_hf.training.run import list_checkpoints, read_checkpoint, write_checkpoint

from . import kills, targets
from .harness import Outcome
from .material import base, classifier
from .processes import together

MANY = 8


def _embed(folder: Path, rounds: int) -> list[str]:
    """One cache of embeddings: all get the same bits."""
    found = []
    for number in range(rounds):
        place = folder / str(number)
        ended = together([lambda place=place: kills._embed(place)[0]] * MANY)  # type: ignore[misc]
        found += [f"embedding: {one.error}" for one in ended if one.error or one.killed]
        if len({one.value for one in ended}) > 1:
            found.append("embedding: results differ")
        files = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
        rest = [name for name in files if not name.endswith(".safetensors") or name.rsplit("/", 1)[-1].startswith(".")]
        if rest or len(files) > 6:
            found.append(f"embedding: left {len(files)} files, {rest[:3]}")
    return found


def _small_files(folder: Path, rounds: int) -> list[str]:
    """One base classifier and one cell, written and read all the time."""

    def work(number: int) -> list[str]:
        table, bad = targets._TABLE, []
        for _ in range(rounds * 25):
            write_table(folder / "t.safetensors", table)
            write_sealed(folder / "cell.json", {"accuracy": number, "more": [number] * 200})
            found, cell = read_table(folder / "t.safetensors"), read_cell(folder / "cell.json")
            if found is None or not torch.equal(found, table):
                bad.append("a base classifier was read in part")
            if cell is None or cell["more"] != [cell["accuracy"]] * 200:
                bad.append("a cell was read in part")
        return bad

    ended = together([lambda number=number: work(number) for number in range(MANY)])  # type: ignore[misc]
    return [one.error for one in ended if one.error or one.killed] + [text for one in ended for text in one.value or []]


def _numbered(number: int) -> TaskResCLIPForImageClassification:
    """A classifier whose classes, residual and image processor all say its number."""
    model = classifier(number, [f"class {number}-{place}" for place in range(number + 2)])
    with torch.no_grad():
        model.classifier.residual.fill_(float(number))
    processor = type(model.image_processor).from_dict(model.image_processor.to_dict())
    processor.image_mean = [0.01 * (number + 1)] * 3
    model.image_processor = processor
    return model


def _is_one(folder: Path) -> str:
    model = TaskResCLIPForImageClassification.from_pretrained(folder, base_model=base())
    number = int(model.classifier.residual.flatten()[0])
    mean = model.image_processor.image_mean[0]
    names = model.class_names == [f"class {number}-{place}" for place in range(number + 2)]
    if not names or len(model.classifier.residual) != number + 2 or abs(mean - 0.01 * (number + 1)) > 1e-9:
        return f"residual of {number}, names {model.class_names[:1]}, processor {mean}"
    return ""


def _artifacts(folder: Path, rounds: int) -> list[str]:
    """Four processes save over one artifact, four load it: each load sees one of them whole."""
    place = folder / "artifact"
    _numbered(0).save_pretrained(place)

    def save(number: int) -> list[str]:
        for _ in range(rounds * 3):
            _numbered(number).save_pretrained(place)
        return []

    def load(number: int) -> list[str]:
        return [text for _ in range(rounds * 6) if (text := _is_one(place))]

    jobs: list[Callable[[], list[str]]] = []
    for number in range(MANY // 2):
        jobs += [lambda number=number: save(number), lambda number=number: load(number)]  # type: ignore[misc]
    ended = together(jobs)
    found = [f"artifact: {one.error}" for one in ended if one.error or one.killed]
    found += [f"artifact, mixed: {text}" for one in ended for text in one.value or []]
    if text := _is_one(place):
        found.append(f"artifact, at the end: {text}")
    return found + [f"artifact: left {name}" for name in kills.leftovers(folder)]


def _checkpoints(folder: Path, rounds: int) -> list[str]:
    """Checkpoints of the same epochs into one folder."""

    def work(number: int) -> None:
        for epoch in range(1, rounds + 2):
            write_checkpoint(classifier(epoch), str(folder), epoch, *targets._state(epoch), None)

    ended = together([lambda number=number: work(number) for number in range(MANY)])  # type: ignore[misc]
    found = [f"checkpoints: {one.error}" for one in ended if one.error or one.killed]
    for path in list_checkpoints(folder):
        epoch = int(path.name.rsplit("-", 1)[1])
        if not targets._is_of(epoch, *read_checkpoint(path, str(folder))[1:]):
            found.append(f"checkpoints: {path.name} holds another epoch")
    return found


def _predictions(folder: Path, rounds: int) -> list[str]:
    """One output file: one process writes it, the others say that it is in use or there."""
    files, found = kills._files(), []
    for number in range(rounds):
        output = folder / f"{number}.csv"

        def work(output: Path = output) -> str:
            classify_to_file(classifier(1), files, output, batch_size=4)
            return "written"

        ended = together([work] * MANY)
        errors = [one.error for one in ended if one.error and not one.error.startswith("ConfigurationError")]
        found += [f"predictions: {text}" for text in errors]
        if sum(one.value == "written" for one in ended) < 1:
            found.append("predictions: nobody wrote")
        if len(output.read_bytes().splitlines()) != len(files) + 1:
            found.append("predictions: the output is not whole")
    return found


def swaps(seconds: float, classes: tuple[int, int] = (20, 3)) -> tuple[int, list[str]]:
    """Eight threads classify with one model, by `pipeline` and by hand, while a ninth exchanges its classifier.

    Returns:
        Requests that were answered, and what was wrong with them.
    """
    tasks = [
        classifier(place, [f"{kind}{number}" for number in range(count)])
        for place, (kind, count) in enumerate(zip("ab", classes, strict=True))
    ]
    served = classifier(9, list(tasks[0].class_names))
    pipe = pipeline("image-classification", model=served, image_processor=served.image_processor)
    picture, embeds = Image.new("RGB", (32, 32), (90, 20, 160)), torch.ones(1, served.config.projection_dim)
    sizes, found, answered = {"a": classes[0], "b": classes[1]}, [], [0]
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for task in tasks:
                served.use_classifier(task)
                time.sleep(0)

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                if number % 2:
                    rows = pipe(picture, top_k=50)
                    names = [row["label"] for row in rows]
                else:
                    with torch.no_grad():
                        answer = served(image_embeds=embeds)
                    time.sleep(0)
                    names = served.class_names
                    if answer.logits.shape[1] != len(names):
                        found.append(f"{answer.logits.shape[1]} logits, {len(names)} names")
                if len(names) != sizes[names[0][0]] or len({name[0] for name in names}) > 1:
                    found.append(f"names of two tasks: {sorted(names)[:3]} ({len(names)})")
                answered[0] += 1
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(MANY)] + [threading.Thread(target=swap)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return answered[0], found


RACES: dict[str, Callable[[Path, int], list[str]]] = {
    "one cache of embeddings": _embed, "small files": _small_files, "one artifact": _artifacts,
    "one folder of checkpoints": _checkpoints, "one output of predictions": _predictions,
}  # fmt: skip


def race(name: str, rounds: int) -> Outcome:
    """One of `RACES`, `rounds` times."""
    outcome, start = Outcome(f"races: {name}"), time.monotonic()
    for prepare in (kills._images, kills._files):
        prepare()
    with tempfile.TemporaryDirectory(prefix="taskres-races-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome.findings = RACES[name](Path(folder), rounds)
    outcome.inputs = rounds * MANY
    outcome.counts["finding"], outcome.seconds = len(outcome.findings), time.monotonic() - start
    outcome.counts["same"] = outcome.inputs - min(len(outcome.findings), outcome.inputs)
    return outcome


def prove(runs: int | None, seed: int) -> list[Outcome]:
    """Every race, 5 rounds by default, and a minute of exchanged classifiers."""
    outcomes = [race(name, runs or 5) for name in RACES]
    start = time.monotonic()
    count, found = swaps(float(os.environ.get("FUZZ_SECONDS", 12.0 * (runs or 5))))
    swapping = Outcome("races: exchanged classifiers", findings=found, inputs=count)
    swapping.counts["same"], swapping.counts["finding"] = count - len(found), len(found)
    swapping.seconds = time.monotonic() - start
    return [*outcomes, swapping]
