"""Pictures without labels to a list of those to label next, and of the classes that need more."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import FileCells, LabelledImages, load_training_data
from ..data.tables import parse_table
from ..embedding import ImageFeatures
from ..errors import ConfigurationError, DataError, ImageError
from ..picture_files import list_images
from ..pictures import is_address
from ..prediction_files import as_utf8, check_output
from ..storage import write_bytes
from ..tables import Table, json_text, percent, visible
from ..training import TaskResTrainer, TaskResTrainingArguments, measuring
from .difficulty import margins
from .labelling import DEFAULT, Pool, check_choice, choose, expected_misses, make_pool

if TYPE_CHECKING:
    from ..modeling_taskres import TaskResCLIPForImageClassification

COLUMNS = ("file", "label", "rank", "suggested", "probability", "margin", "reason")
_BETWEEN = 0.2  # margin below which two classes are named
_RUN = ("=", "+", "-", "@")  # what a spreadsheet runs as a formula where a cell begins with it


@dataclass(frozen=True)
class Suggestions:
    """What `suggest_pictures` found.

    Attributes:
        pictures: a row each, the most useful first: `rank` from 1, `file`, `suggested` (the likeliest class),
            `probability`, `margin` to the second class, `second`, and `reason`.
        classes: a row each, those that need pictures most first: `class`, `labelled` (None where it is not known),
            `expected` (pictures of it in the pool, by the probabilities), `missed` (share of those that are expected
            to be given another class) and `suggested`.
        labelled: `file` and `label` of the labelled pictures that have a file.
        pool: pictures that could be suggested. trained_on: left out since they are labelled already.
        strategy: the name. skipped: why pictures could not be read, one message each. notes: what lay beside them.
    """

    pictures: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    labelled: list[dict[str, str]]
    pool: int
    trained_on: int
    strategy: str
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it but the labelled pictures, for JSON."""
        return {
            "strategy": self.strategy, "pictures": self.pictures, "classes": self.classes, "pool": self.pool,
            "already_labelled": self.trained_on, "skipped": self.skipped, "notes": self.notes,
        }  # fmt: skip

    def table(self) -> Table:
        """The pictures."""
        rows = [
            [row["rank"], row["file"], row["suggested"], percent(row["probability"]), row["reason"]]
            for row in self.pictures
        ]
        return Table(["", "picture", "suggested", "probability", "reason"], rows)

    def class_table(self, most: int = 20) -> Table:
        """The classes, at most so many."""
        rows = [
            [row["class"], row["labelled"], row["expected"], percent(row["missed"]), row["suggested"]]
            for row in self.classes[:most]
        ]
        return Table(["class", "labelled", "expected in the pool", "of them missed", "suggested"], rows, digits=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a table to fill in, .csv, .jsonl or .parquet, that `taskres train` reads.

        Labelled pictures come first, with their label; the others have an empty `label`. Files are named as seen from
        the folder of the table.

        Raises:
            ConfigurationError: another ending, nowhere to write, or a table with labels that this one does not hold.
            ArtifactError: it cannot be written, such as on a full disk.
        """
        path = Path(path)
        check_table(path, len(self.labelled))
        folder = path.absolute().parent
        given: list[dict[str, Any]] = [*self.labelled, *self.pictures]
        rows = [
            {name: _seen_from(folder, row["file"]) if name == "file" else row.get(name) for name in COLUMNS}
            for row in given
        ]
        write_bytes(path, _written(rows, path.suffix.lower()))


def check_table(path: Path, labelled: int | None) -> None:
    """Refuse a table that cannot be written, or that would replace one with more labels than `labelled`.

    Args:
        labelled: how many the new table has; None where that is not known yet.

    Raises:
        ConfigurationError: says which.
    """
    check_output(path)
    try:
        table = parse_table(path.name, path.read_bytes())
    except (OSError, DataError):  # not there, or no table
        return
    there = sum(cell is not None and bool(str(cell).strip()) for cell in table.columns.get("label", ()))
    if labelled is not None and there > labelled:
        raise ConfigurationError(
            f"{path} holds {there} labels, which would be lost: name it as the labelled pictures too (labelled=, "
            "--labelled), or write to another file."
        )


def _seen_from(folder: Path, file: str) -> str:
    """A path that is read from a table in that folder, and that no spreadsheet runs as a formula."""
    if is_address(file):
        return file
    whole = os.path.abspath(file)
    inside = os.path.relpath(whole, folder) if whole.startswith(os.path.join(str(folder), "")) else whole
    return os.path.join(".", inside) if inside.startswith(_RUN) else inside


def _written(rows: Sequence[dict[str, Any]], kind: str) -> bytes:
    texts = ("file", "label", "suggested", "reason")
    if kind == ".csv":
        cells = [
            [visible(row[name] or "") if name in texts else _rounded(row[name]) for name in COLUMNS] for row in rows
        ]
        return Table(COLUMNS, cells).csv().encode("utf-8", "backslashreplace")
    rows = [{name: as_utf8(row[name]) if isinstance(row[name], str) else row[name] for name in COLUMNS} for row in rows]
    if kind == ".jsonl":
        return b"".join(f"{json_text(row)}\n".encode() for row in rows)
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"rank": pa.int64(), "probability": pa.float64(), "margin": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, write_page_checksum=True)
    return sink.getvalue()


def _rounded(value: Any) -> Any:
    return f"{value:.6f}" if isinstance(value, float) else value


# ---------------------------------------------------------------------- suggesting


def suggest_pictures(
    model: TaskResCLIPForImageClassification,
    pictures: Any,
    n: int = 50,
    *,
    labelled: Any = None,
    strategy: str = DEFAULT,
    seed: int = 1,
    args: TaskResTrainingArguments | None = None,
    **data_options: Any,
) -> Suggestions:
    """Say which pictures to label next.

    Pictures that the classifier was trained on, or that are in `labelled`, are left out by their content, and so is
    what looks nearly the same as one of those or as an earlier suggestion.

    Args:
        model: a classifier, trained or not (`from_base`).
        pictures: a path or address, or a list of them; folders are searched in depth.
        n: how many to suggest.
        labelled: pictures that have labels, as for `load_training_data`; what the classifier does not know of them is
            used as well. Rows without a label are left out. By default those that it was trained on, where they are
            among `pictures`, count as its answers to them.
        strategy: a name of `labelling.STRATEGIES`. seed: of what is drawn.
        args: how to read and embed pictures (`engine`, `cache_dir` and so on); what it says of training does not count.
        **data_options: of `load_training_data`, for `labelled`.

    Raises:
        ConfigurationError: an unknown strategy, n below 1, or a classifier of several labels per picture.
        DataError: no pictures, `labelled` cannot be read or has other classes, or every picture is labelled already.
        ImageError: none of the pictures can be read.
    """
    check_choice(n, strategy)
    if model.classifier.several_labels:
        raise ConfigurationError(
            "This classifier gives several labels per picture; which to label next is said for one label each."
        )
    paths = [pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures)
    listing = list_images(paths)
    files = listing.files
    if not files:
        raise DataError(f"There are no pictures in {', '.join(map(os.fsdecode, paths)) or 'an empty list'}.")
    trainer = TaskResTrainer(model, args or TaskResTrainingArguments(on_error="skip", disable_tqdm=True))
    given, rows = _read_labelled(trainer, labelled, data_options)
    data, files, skipped = _read_pool(trainer, files)
    trained, _ = measuring.known_digests(data.digests, model.config.data)
    theirs = set(given.digests) if given is not None else set()
    known = {*trained, *(row for row, digest in enumerate(data.digests) if digest in theirs)}
    rest = [row for row in range(len(data)) if row not in known]
    if not rest:
        raise DataError(f"All {len(files)} pictures that can be read are labelled already: add others.")
    if given is None:
        own = data.image_embeds[0][trained]
        labels = _probabilities(model, own).argmax(1)
    else:
        own, labels = given.image_embeds[0], given.labels
    embeds = data.image_embeds[0][rest]
    pool = make_pool(embeds, _probabilities(model, embeds), own, labels)
    chosen = choose(pool, n, strategy, seed)
    certain = given is not None or model.classifier.is_zero_shot
    counts = torch.bincount(pool.labels, minlength=pool.classes).tolist() if certain else None
    return Suggestions(
        _picture_rows(pool, chosen, [files[row] for row in rest], model.class_names, counts),
        _class_rows(pool, chosen, model.class_names, counts), rows, len(rest), len(known), strategy, skipped,
        listing.lines(),
    )  # fmt: skip


def _read_pool(trainer: TaskResTrainer, files: Sequence[str]) -> tuple[ImageFeatures, list[str], list[str]]:
    """Embeddings of the pictures that have one, their files, and why the others have none."""
    names = trainer.model.class_names
    data, skipped = _embed(trainer, LabelledImages.from_cells(FileCells(files), [0] * len(files), names))
    read = [file for place, file in enumerate(files) if place not in set(data.skipped)]
    finite = data.image_embeds[0].isfinite().all(1).tolist()
    skipped += [
        f"'{visible(file)}' has no embedding: the model gives NaN for it."
        for file, good in zip(read, finite, strict=True) if not good
    ]  # fmt: skip
    if not all(finite):
        keep = [row for row, good in enumerate(finite) if good]
        return data.select(keep), [read[row] for row in keep], skipped
    return data, read, skipped


def _read_labelled(
    trainer: TaskResTrainer, labelled: Any, options: dict[str, Any]
) -> tuple[ImageFeatures | None, list[dict[str, str]]]:
    """Embeddings of the labelled pictures that can be read, and file and label of those that are files."""
    if labelled is None:
        return None, []
    names = trainer.model.class_names
    read = load_training_data(labelled, eval_split="none", drop_unlabelled=True, **options).train
    images = read.aligned(names, trainer.args.label_map)
    data, _ = _embed(trainer, images)
    rows = []
    for place in range(len(images)):
        source = images.source(place)
        if isinstance(source, str) and not is_address(source):
            rows.append({"file": source, "label": names[images.labels[place]]})
    return data, rows


def _embed(trainer: TaskResTrainer, images: LabelledImages) -> tuple[ImageFeatures, list[str]]:
    """Embeddings of what can be read, and why the rest cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ pictures cannot be read")
        data = trainer.embed(images)
    return data, [_problem(images, place) for place in data.skipped]


def _problem(images: LabelledImages, place: int) -> str:
    name = visible(str(images.source(place)))
    try:
        images.image(place)
    except ImageError as error:
        return str(error).partition(": ")[2] if str(error).startswith("Row ") else str(error)
    return f"'{name}' could not be read a moment ago: run again."


@torch.no_grad()
def _probabilities(model: TaskResCLIPForImageClassification, embeds: Tensor) -> Tensor:
    head = model.classifier
    logits: Tensor = head(embeds.to(head.residual.device))
    return logits.softmax(1).cpu()


# ---------------------------------------------------------------------- in words


def _picture_rows(
    pool: Pool, chosen: Sequence[int], files: Sequence[str], names: Sequence[str], labels: Sequence[int] | None
) -> list[dict[str, Any]]:
    stands_for, gaps = _stand_for(pool, chosen), margins(pool.probabilities)
    rows = []
    for rank, row in enumerate(chosen, 1):
        chances, order = pool.probabilities[row].sort(descending=True, stable=True)
        first = int(order[0])
        second = int(order[1]) if len(order) > 1 else None
        reasons = []
        if stands_for[rank - 1] > 1:
            reasons.append(f"typical of {stands_for[rank - 1]} pictures without a label")
        if second is not None and float(gaps[row]) < _BETWEEN:
            reasons.append(f"between {names[first]} and {names[second]}")
        if labels is not None and any(labels) and not labels[first]:
            reasons.append(f"{names[first]} has no label yet")
        rows.append({
            "rank": rank, "file": files[row], "suggested": names[first], "probability": float(chances[0]),
            "margin": float(gaps[row]), "second": None if second is None else names[second],
            "reason": "; ".join(reasons) or "unlike the other pictures",
        })  # fmt: skip
    return rows


def _stand_for(pool: Pool, chosen: Sequence[int]) -> list[int]:
    """For how many pictures of the pool each chosen one is nearer than every other chosen or labelled one."""
    there = torch.cat([pool.images[list(chosen)], pool.labelled])
    counts = torch.zeros(len(there), dtype=torch.long)
    for part in pool.images.split(4096):
        counts += torch.bincount((part @ there.T).argmax(1), minlength=len(there))
    return counts[: len(chosen)].tolist()


def _class_rows(
    pool: Pool, chosen: Sequence[int], names: Sequence[str], labels: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Classes by what is expected to be missed of them."""
    expected = pool.probabilities.sum(0)
    likeliest, missed = pool.probabilities.argmax(1), expected_misses(pool.probabilities)
    suggested = torch.bincount(likeliest[list(chosen)], minlength=pool.classes)
    rows = [
        {
            "class": name, "labelled": None if labels is None else labels[one], "expected": float(expected[one]),
            "missed": float(missed[one]), "suggested": int(suggested[one]),
        }
        for one, name in enumerate(names)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["labelled"] != 0, -float(str(row["missed"]))))
