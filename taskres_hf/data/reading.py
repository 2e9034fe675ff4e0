"""What was found in a source, before classes get their names and splits their use, and the account of it.

Pictures are told by cells: rows of a dataset, files, or members of an archive. Each kind gives the undecoded cell of
one picture, can be restricted to rows, and can be sent to another process.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_from_disk

from ..errors import DataError, ImageError
from ..pictures import picture_digest, read_image
from ..tables import visible

_MOST_CLASSES = 100  # beyond it, an account names the smallest and the largest classes only
_MOST_NOTES = 50
# Where messages speak of several labels per picture: one command asks for them by an option.
SEVERAL_LABELS = "multi_label=True (--multi-label of taskres train; other commands take one label per picture)"
_LONGEST = 200
_USES = {"train": "to train on", "held out": "held out to measure on", "measured": "to measure on"}


@dataclass(frozen=True)
class SplitAccount:
    """One split as it was read.

    Attributes:
        name: `train`, `validation`, `test` or the source's own name.
        origin: where it comes from inside the source, such as `Train/` or `labels.csv`.
        use: `"train"`, `"held out"` (of a training), `"measured"` (by an evaluation) or `"not used"`.
        classes: number of pictures per class name, in class order; empty where pictures have no labels.
        unlabelled: number of pictures without a label.
        total: number of pictures where they have several labels each, which are counted in every class of theirs.
    """

    name: str
    origin: str = ""
    use: str = "not used"
    classes: Mapping[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    total: int | None = None

    @property
    def pictures(self) -> int:
        """Number of pictures, with and without a label."""
        return self.total if self.total is not None else sum(self.classes.values()) + self.unlabelled


@dataclass(frozen=True)
class LeftOut:
    """What was not used, and why: a count and the first few names."""

    reason: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Account:
    """How a source was read: see `load_training_data`.

    Attributes:
        source: the Hub id, or the last part of a path.
        kind: what it was taken for, such as `class folders` or `table`.
        splits: every split, also those that are not used.
        left_out: files, rows and classes that were not used.
        class_pairs: label in the source to class name, where they differ.
        notes: what else a reader should know, one sentence each. noun: what one row is, `picture` or `text`.
    """

    source: str
    kind: str
    splits: tuple[SplitAccount, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    class_pairs: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    noun: str = "picture"

    def as_dict(self) -> dict[str, Any]:
        """The account for JSON, of bounded size however many classes and files there are."""
        pairs = dict(list(self.class_pairs.items())[:_MOST_CLASSES])
        return {
            "source": printable(self.source),
            "kind": self.kind,
            "splits": [_split_dict(split) for split in self.splits[:_MOST_NOTES]],
            "left_out": [
                {"reason": printable(row.reason), "count": row.count, "examples": [*map(printable, row.examples[:5])]}
                for row in self.left_out[:_MOST_NOTES]
            ],
            "class_pairs": {printable(label): printable(name) for label, name in pairs.items()},
            "notes": [printable(note) for note in self.notes[:_MOST_NOTES]],
        }

    def lines(self) -> list[str]:
        """The account for people, one fact a line."""
        lines = [f"{printable(self.source)}: {self.kind}"]
        for split in self.splits:
            counts = list(split.classes.values())
            use = _USES.get(split.use, split.use)
            origin = f" from {printable(split.origin)}" if split.origin not in ("", split.name) else ""
            text = f"{printable(split.name)}{origin}: {_count(split.pictures, self.noun)}"
            if counts:
                few, many = min(counts), max(counts)
                each = f"{few}" if few == many else f"{few} to {many}"
                text += f" of {len(counts)} {'class' if len(counts) == 1 else 'classes'}, {each} a class"
            if split.unlabelled:
                text += f", {split.unlabelled} without a label"
            lines.append(f"  {text}; {use}")
        train = next((split for split in self.splits if split.use == "train"), None)
        if train is not None:
            shown = [f"{printable(name)} ({count})" for name, count in list(train.classes.items())[:20]]
            more = f", and {len(train.classes) - 20} more" if len(train.classes) > 20 else ""
            lines.append(f"  classes: {', '.join(shown)}{more}")
        if self.class_pairs:
            pairs = [f"{printable(label)} = {printable(name)}" for label, name in list(self.class_pairs.items())[:20]]
            more = f", and {len(self.class_pairs) - 20} more" if len(self.class_pairs) > 20 else ""
            lines.append(f"  names: {', '.join(pairs)}{more}")
        for row in self.left_out:
            examples = f": {', '.join(map(printable, row.examples[:5]))}" if row.examples else ""
            more = ", ..." if row.examples and row.count > len(row.examples[:5]) else ""
            lines.append(f"  left out, {printable(row.reason)}: {row.count}{examples and f' ({examples[2:]}{more})'}")
        lines += [f"  {printable(note)}" for note in self.notes]
        return lines


def _split_dict(split: SplitAccount) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": printable(split.name), "origin": printable(split.origin), "use": split.use,
        "pictures": split.pictures, "unlabelled": split.unlabelled, "num_classes": len(split.classes),
    }  # fmt: skip
    if len(split.classes) <= _MOST_CLASSES:
        value["classes"] = {printable(name): count for name, count in split.classes.items()}
    else:
        by_count = sorted(split.classes.items(), key=lambda item: item[1])
        value["smallest_classes"] = {printable(name): count for name, count in by_count[:10]}
        value["largest_classes"] = {printable(name): count for name, count in by_count[-10:]}
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: object) -> str:
    """Text of a file, a table or another person that is safe to show: no control characters, at most 200 long."""
    cleaned = visible(str(text)[: _LONGEST + 1])
    return cleaned if len(cleaned) <= _LONGEST else f"{cleaned[: _LONGEST - 3]}..."


def shorten(names: Iterable[object], most: int = 5) -> str:
    """The first few names of many, for a message."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(printable(name) for name in listed[:most]) + more


class Duplicates(NamedTuple):
    """Pictures of the same content.

    Attributes:
        conflicting: groups of positions in the first set with one content and more than one label.
        repeated: groups of positions in the first set with one content and one label.
        shared: pairs of positions, in the first set and in the second, with one content.
    """

    conflicting: list[tuple[int, ...]]
    repeated: list[tuple[int, ...]]
    shared: list[tuple[int, int]]


def duplicates(
    digests_a: Sequence[str],
    labels_a: Sequence[int],
    digests_b: Sequence[str] | None = None,
    labels_b: Sequence[int] | None = None,
) -> Duplicates:
    """Find pictures with the same content.

    Args:
        digests_a: digest of each of N training pictures. labels_a: their N class ids.
        digests_b: digest of each of M held-out pictures, or None. labels_b: their M class ids; a picture that is
            in both sets is named whatever its labels are.

    Raises:
        ValueError: digests and labels differ in number.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for position, (digest, _) in enumerate(zip(digests_a, labels_a, strict=True)):
        places[digest].append(position)
    groups = [tuple(group) for group in places.values() if len(group) > 1]
    conflicting = [group for group in groups if len({int(labels_a[position]) for position in group}) > 1]
    repeated = [group for group in groups if len({int(labels_a[position]) for position in group}) == 1]
    if labels_b is not None and digests_b is not None and len(labels_b) != len(digests_b):
        raise ValueError(f"There are {len(digests_b)} digests and {len(labels_b)} labels.")
    shared = [(places[digest][0], position) for position, digest in enumerate(digests_b or ()) if places.get(digest)]
    return Duplicates(conflicting, repeated, shared)


class Cells(Protocol):
    """N pictures that are read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any:
        """What `pictures.read_image` takes: a path, `{"bytes", "path"}`, a PIL image or a uint8 array."""

    def select(self, rows: Sequence[int]) -> Cells:
        """The pictures at these rows, in that order."""


class FileCells:
    """Picture files on this machine; `names` are their paths."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> str:
        return self.names[row]

    def select(self, rows: Sequence[int]) -> FileCells:
        return FileCells([self.names[row] for row in rows])


class DatasetCells:
    """The picture column of a `datasets.Dataset`, undecoded; a transform set on the dataset is applied.

    Raises:
        DataError: what comes out of the transform is not a picture, or is another one each time.
    """

    def __init__(self, dataset: Dataset, column: str, label_column: str | None = None) -> None:
        self.column = column
        self.transformed = dataset.format["type"] == "custom"
        if self.transformed:
            self.rows = dataset
            _check_transform(dataset, column, label_column)
            return
        rows = dataset.with_format(None).select_columns([column])
        feature = dataset.features[column]
        self.rows = rows.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        try:
            return self.rows[row][self.column]
        except Exception as error:  # a transform is anyone's code, and decodes pictures itself
            if not self.transformed:
                raise
            raise ImageError(f"The dataset's transform fails: {visible(str(error))}") from error

    def select(self, rows: Sequence[int]) -> DatasetCells:
        part = object.__new__(DatasetCells)
        part.__dict__.update(self.__dict__)
        part.rows = self.rows.select(rows)
        return part


def _check_transform(dataset: Dataset, column: str, label_column: str | None) -> None:
    """Try a transform on a few rows: it must give pictures, the same ones each time, and leave labels alone."""
    advice = (
        "A transform must return pictures under the picture's own column, because embedding them is the library's "
        "part: remove it with dataset.with_format(None), or let it return PIL images or uint8 arrays."
    )
    for row in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        outcomes = []
        for _ in range(3):
            try:
                values = dataset[row]
            except Exception as error:  # a transform is anyone's code
                raise DataError(
                    f"The dataset's transform fails at row {row}: {visible(str(error))} {advice}"
                ) from error
            if column not in values:
                raise DataError(f"The dataset's transform leaves no column {column!r}, only {sorted(values)}. {advice}")
            try:
                read_image(values[column])
                outcomes.append(picture_digest(values[column]))
            except ImageError as error:
                raise DataError(f"The dataset's transform gives no picture at row {row}: {error} {advice}") from error
        if len(set(outcomes)) > 1:
            raise DataError(
                f"The dataset's transform gives another picture each time (row {row}). Pictures are embedded once: "
                "take the random part out, and ask for augmented views instead (views=, --views)."
            )
        if label_column in values:
            original = dataset.with_format(None)[row][label_column]
            if values[label_column] != original:
                raise DataError(
                    f"The dataset's transform changes the label of row {row} from {original!r} to "
                    f"{values[label_column]!r}. Change labels with dataset.map, which is what is read."
                )


class JoinedCells:
    """Pictures of several sources, one after the other."""

    def __init__(self, parts: Sequence[Cells], rows: Sequence[tuple[int, int]] | None = None) -> None:
        self.parts = list(parts)
        self.rows = [(p, r) for p, part in enumerate(parts) for r in range(len(part))] if rows is None else list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        part, inside = self.rows[row]
        return self.parts[part][inside]

    def select(self, rows: Sequence[int]) -> JoinedCells:
        return JoinedCells(self.parts, [self.rows[row] for row in rows])


@dataclass
class SplitReading:
    """One split: rows of a dataset, or N pictures with N labels (text, a number, or None for no label)."""

    name: str
    origin: str = ""
    dataset: Dataset | None = None
    cells: Cells | None = None
    labels: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.labels) if self.dataset is None else len(self.dataset)


@dataclass
class Reading:
    """A source as it was understood.

    Attributes:
        empty: names of classes without any picture.
        chosen: whether the caller gave one split only, which then is the one to use whatever it is called.
        class_names: of a table with one column per class, these columns in their order.
        separator: between several labels in one cell of a table.
    """

    kind: str
    splits: list[SplitReading]
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    chosen: bool = False
    class_names: list[str] | None = None
    separator: str | None = None

    def split(self, name: str) -> SplitReading | None:
        """The split of that name, exact or under another of its usual names.

        Raises:
            DataError: several splits have such a name.
        """
        exact = [split for split in self.splits if split.name == name]
        wanted = split_name(name)
        near = exact or [split for split in self.splits if wanted and split_name(split.name) == wanted]
        if len(near) > 1:
            raise DataError(
                f"{shorten([split.name for split in near])} may all be meant by {name!r}: name one of them."
            )
        return near[0] if near else None


_SPLITS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout"),
}
_CANONICAL = {word: name for name, words in _SPLITS.items() for word in words}
_WORDS = "|".join(sorted(_CANONICAL, key=len, reverse=True))
_AFFIX = (
    r"(?:images?|imgs?|pictures?|pics?|photos?|datasets?|data|sets?|splits?|folders?|dirs?|files?|samples?|examples?|"
    r"subset|lists?|jpe?gs?|pngs?|[\W_\d])"
)
_SPLIT_NAME = re.compile(rf"{_AFFIX}*({_WORDS}){_AFFIX}*", re.IGNORECASE)
_WRAPPER = re.compile(rf"{_AFFIX}+", re.IGNORECASE)


def split_name(name: str) -> str | None:
    """`train`, `validation` or `test` for a usual spelling (`Train`, `01_train`, `val_images`), else None."""
    match = _SPLIT_NAME.fullmatch(name)
    return None if match is None else _CANONICAL[match.group(1).lower()]


def is_wrapper(name: str) -> bool:
    """Whether a folder's name says nothing but that there are pictures in it: `images`, `data`, `photos_2`."""
    return bool(re.search(r"[a-z]", name, re.IGNORECASE)) and _WRAPPER.fullmatch(name) is not None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


STREAMED = (
    "A streamed dataset has no fixed order to sample shots from. Take what you need first, for example "
    "Dataset.from_generator(lambda: iter(stream.take(10_000)), features=stream.features)."
)


def of_loaded(source: Any) -> Reading | None:
    """What is in a dataset, or in datasets by split, that are loaded; None for any other source.

    Raises:
        DataError: it is streamed.
    """
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise DataError(STREAMED)
    if isinstance(source, Dataset):
        reading = reading_of({str(source.split or "train"): source}, "dataset")
        reading.chosen = True
        return reading
    if isinstance(source, Mapping) and source and all(isinstance(part, Dataset) for part in source.values()):
        return reading_of(source, "dataset")
    return None


def reading_of(splits: Mapping[str, Dataset], kind: str) -> Reading:
    return Reading(kind, [SplitReading(str(name), dataset=part) for name, part in splits.items()])


def of_saved(path: Path) -> Reading | None:
    """What is in a folder of `save_to_disk`; None for any other folder.

    Raises:
        DataError: it is damaged.
    """
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return None
    try:
        stored = load_from_disk(str(path))
    except Exception as error:  # a damaged copy raises whatever its reader stumbles over
        raise DataError(f"{printable(path)} was written by save_to_disk and cannot be read: {error}") from error
    return reading_of(stored if isinstance(stored, DatasetDict) else {"train": stored}, "saved dataset")
