"""Pictures with class ids: columns found, labels resolved by name, by number or as pairs that are recorded."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
)

from ..errors import DataError, ImageError
from ..pictures import Remarks, picture_digest, read_image
from ..prompts import check_class_names
from .reading import SEVERAL_LABELS, STREAMED, Account, Cells, DatasetCells, natural_key, shorten

_WHOLE = re.compile(r"-?(?:0|[1-9]\d*)(?:\.0+)?")
_NO_TEXT = frozenset({"nan", "<na>", "n/a", "na", "#n/a", "null"})  # as pandas reads and writes missing cells
_CODE = re.compile(r"[a-zA-Z]{0,5}[\W_]?\d+")


@dataclass
class Naming:
    """Class names in label order, the id of each label, and label to name where the two differ."""

    names: list[str]
    ids: dict[Any, int]
    pairs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def clean(text: str) -> str:
    """A label as a class name: NFC, no space around it."""
    return unicodedata.normalize("NFC", text).strip()


def _letters(text: str) -> str:
    """What makes a name another one: no case, separators or brackets, but `C`, `C#` and `C++` differ."""
    return "".join(character for character in text.casefold() if character.isalnum() or character in "+#*%$<>=!?~^")


def finder(names: Sequence[str]) -> Callable[[str], int | None]:
    """Label to the position of its name: that of the same text, else the only one of other case and separators."""
    exact = {name: index for index, name in enumerate(names)}
    loose: dict[str, list[int]] = {}
    for name, index in exact.items():
        loose.setdefault(_letters(name), []).append(index)

    def find(label: str) -> int | None:
        near = loose.get(_letters(label), []) if _letters(label) else []
        return exact.get(clean(label), near[0] if len(near) == 1 else None)

    return find


def is_missing(label: Any) -> bool:
    """Whether a cell says that a picture has no label: None, NaN, -1 or empty text."""
    if isinstance(label, str):
        return not label.strip()
    return bool(label is None or label == -1 or label != label)


def labels_of_cells(values: Sequence[Any]) -> list[Any]:
    """Labels as text, whole numbers, or None for none."""
    values = [value.item() if hasattr(value, "item") and not isinstance(value, str) else value for value in values]
    values = [str(value) if isinstance(value, bool) else value for value in values]
    values = [None if is_empty_cell(value) else value for value in values]
    known = [value for value in values if value is not None]
    numbers = all(isinstance(v, (int, float)) or (isinstance(v, str) and _WHOLE.fullmatch(v.strip())) for v in known)
    if numbers and all(map(_is_whole, known)):
        whole = [value if value is None or isinstance(value, int) else int(float(value)) for value in values]
        return [None if value == -1 else value for value in whole]
    return values


def _is_whole(value: Any) -> bool:
    """Whether a number, also as text, is whole; an integer of any size is."""
    return isinstance(value, int) or float(value).is_integer()


def is_empty_cell(value: Any) -> bool:
    """Whether a cell of a table says that there is nothing: as `is_missing`, or the text that pandas writes for NaN."""
    if isinstance(value, str) and value.strip().lower() in _NO_TEXT:
        return True
    return not isinstance(value, (list, dict)) and is_missing(value)


def are_measurements(labels: Iterable[Any]) -> bool:
    """Whether labels are numbers (also as text), and not all of them whole."""
    try:
        return not all(_is_whole(label) for label in labels if label is not None)
    except (TypeError, ValueError):
        return False


def are_codes(labels: Iterable[Any], names: Sequence[str] | None) -> bool:
    """Whether labels are numbers or codes (`3`, `n01440764`), and none of them is among the names."""
    known = {label for label in labels if not is_missing(label)}
    return all(isinstance(label, int) or (_CODE.fullmatch(str(label).strip()) is not None) for label in known) and not (
        known & set(names or ())
    )


def name_classes(train: Iterable[Any], others: Iterable[Any], class_names: Any, where: str) -> Naming:
    """Names and ids of the classes.

    Args:
        train: labels of the training pictures: all text or all whole numbers. others: labels of the other splits.
        class_names: names in label order, a mapping from label to name, or None for the labels themselves.
        where: what the labels are, for messages, such as `class folders`.

    Raises:
        DataError: labels and names cannot be matched, or in more than one way.
    """
    labels = {label for label in train if not is_missing(label)}
    every = labels | {label for label in others if not is_missing(label)}
    if not labels:
        raise DataError("No training picture has a label: there is nothing to train on.")
    mapped = _by_mapping(every, class_names)
    if mapped is not None:
        return mapped
    if all(isinstance(label, int) and not isinstance(label, bool) for label in every):
        return _by_number(every, class_names, where)
    if not all(isinstance(label, str) for label in every):
        kinds = sorted({type(label).__name__ for label in every})
        raise DataError(f"Labels must be class ids or names, one per picture; the {where} hold {kinds}.")
    if class_names is None:
        numbers = all(label.strip().isdecimal() for label in labels)
        ordered = sorted({clean(label) for label in labels}, key=natural_key if numbers else None)
        names = check_class_names(ordered, minimum=1)
        places = {label: find(label) for find in [finder(names)] for label in sorted(every)}
        naming = _paired(names, {label: place for label, place in places.items() if place is not None})
    else:
        naming = _by_text(every, class_names, where)
    similar: dict[str, list[str]] = {}
    for name in naming.names:
        similar.setdefault(_letters(name), []).append(name)
    for group in similar.values():
        if len(group) > 1:
            naming.notes.append(f"Classes that differ in spelling only, and are kept apart: {shorten(group)}.")
    return naming


def _by_mapping(labels: set[Any], class_names: Any) -> Naming | None:
    """Names of a mapping from label to name, if that is what `class_names` is."""
    if not isinstance(class_names, Mapping) or not all(isinstance(value, str) for value in class_names.values()):
        return None
    renamed = {clean(str(key)): value for key, value in class_names.items()}
    if not {clean(str(label)) for label in labels} <= set(renamed):
        return None
    order = sorted(renamed, key=natural_key)
    names = check_class_names([renamed[label] for label in order], minimum=1)
    return _paired(names, {label: order.index(clean(str(label))) for label in labels})


def _by_number(labels: set[int], class_names: Any, where: str) -> Naming:
    if class_names is None:
        raise DataError(
            f"The {where} are plain numbers, without names to make prompts from. Pass class_names=[...] in label order "
            "(--class-names)."
        )
    names = check_class_names(class_names, minimum=1)
    outside = sorted(label for label in labels if not 0 <= label < len(names))
    if outside:
        raise DataError(
            f"Labels {outside[:5]} are outside the {len(names)} classes (0 to {len(names) - 1}). Numbers count from 0; "
            "where yours do not, give a mapping {number: name} (--class-names FILE.json)."
        )
    return Naming(names, {label: label for label in labels}, {str(label): names[label] for label in sorted(labels)})


def _by_text(labels: set[str], class_names: Any, where: str) -> Naming:
    names = check_class_names(class_names, minimum=1)
    find, ordered = finder(names), sorted(labels, key=natural_key)
    ids = {label: place for label in ordered if (place := find(label)) is not None}
    unknown = [label for label in ordered if label not in ids]
    if not unknown:
        return _paired(names, ids)
    advice = "Give a mapping {label: name} as class_names (--class-names FILE.json)."
    if ids:
        raise DataError(
            f"The {where} {shorten(unknown)} are not among class_names ({shorten(names)}), others are. {advice}"
        )
    numbers = [int(re.sub(r"\D", "", label)) for label in unknown if _CODE.fullmatch(label.strip())]
    if len(numbers) == len(unknown) == len(names) and len(set(numbers)) == len(numbers):
        return _paired(names, {label: index for index, label in enumerate(unknown)})
    pairs = ", ".join(f"{label} = {name}" for label, name in zip(unknown[:3], names, strict=False))
    why = (
        f"there are {len(unknown)} labels and {len(names)} names"
        if len(unknown) != len(names)
        else f"they could go by order ({pairs}, ...) or be another set of classes"
    )
    raise DataError(f"The {where} ({shorten(unknown)}) are not class_names ({shorten(names)}): {why}. {advice}")


def _paired(names: Sequence[str], ids: Mapping[Any, int]) -> Naming:
    pairs = {str(label): names[index] for label, index in sorted(ids.items(), key=lambda item: item[1])}
    return Naming(list(names), dict(ids), {label: name for label, name in pairs.items() if label != name})


IMAGE_NAMES = (
    "image",
    "img",
    "images",
    "picture",
    "photo",
    "pixel_values",
    "file",
    "file_name",
    "image_path",
    "path",
)


LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label", "cls")


class LabelledImages:
    """Pictures with class ids, read lazily from a `datasets.Dataset`, from files or from an archive.

    A transform set on the dataset (`with_transform`) is applied: the picture is what comes out of it.

    Args:
        dataset: any dataset with a picture column and a label column. Pictures may be files, bytes, or uint8 arrays
            [H, W], [H, W, 3] or [3, H, W].
        image_column, label_column: their names; found by type, then by usual names, when None.
        class_names: names in label order; needed when labels are plain numbers. A `ClassLabel`'s names are matched
            by name where they are among them, else replaced position by position; a mapping {old name: name} leaves
            no doubt.
        default_names: names to use when labels are plain numbers and `class_names` is None.
        drop_unlabelled: leave out rows without a label instead of refusing them.

    Attributes:
        labels: N class ids. class_names: K names. indices: N positions in the dataset that was given.
        split: name of the split the pictures come from, or None; it travels with them.
        account: how the source was read, or None (see `load_training_data`).

    Raises:
        DataError: no such column, an empty dataset, unlabelled rows, labels outside the classes, or a transform that
            gives no pictures, other ones each time, or other labels.
    """

    noun = "picture"

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        class_names: Any = None,
        default_names: Sequence[str] | None = None,
        drop_unlabelled: bool = False,
    ) -> None:
        check_dataset(dataset)
        self.image_column = self._content_column(dataset, image_column, label_column)
        self.label_column = find_column(dataset, label_column, "label", LABEL_NAMES, ClassLabel)
        feature = dataset.features[self.label_column]
        labels = column_values(dataset, self.label_column)
        self.labels: list[Any]  # of `MultiLabelImages` tuples
        self.class_names, self.labels = _resolve_labels(labels, feature, class_names, default_names, self.label_column)
        self.indices = list(range(len(dataset)))
        self.split: str | None = None if dataset.split is None else str(dataset.split)
        self.account: Account | None = None
        self._cells: Cells = self._cells_of(dataset, self.label_column)
        self._leave_out_unlabelled(drop_unlabelled)

    @classmethod
    def from_cells(
        cls,
        cells: Cells,
        labels: Sequence[int],
        class_names: Sequence[str],
        *,
        split: str | None = None,
        drop_unlabelled: bool = False,
    ) -> LabelledImages:
        """N pictures from anywhere (see `data.cells`) with class ids, -1 for none."""
        images = object.__new__(cls)
        images.image_column, images.label_column = "image", "label"
        images.class_names, images.labels = list(class_names), list(labels)
        images.indices = list(range(len(cells)))
        images.split, images.account, images._cells = split, None, cells
        images._leave_out_unlabelled(drop_unlabelled)
        return images

    def _content_column(self, dataset: Dataset, given: str | None, label_column: str | None) -> str:
        return find_column(dataset, given, "image", IMAGE_NAMES, Image)

    def _cells_of(self, dataset: Dataset, label_column: str | None) -> Cells:
        return DatasetCells(dataset, self.image_column, label_column)

    def _leave_out_unlabelled(self, drop: bool) -> None:
        labelled = [index for index, label in enumerate(self.labels) if _has_label(label)]
        if len(labelled) == len(self.labels):
            return
        if not labelled:
            raise DataError("No row has a label: there is nothing to train on or to evaluate.")
        if not drop:
            first = next(index for index, label in enumerate(self.labels) if not _has_label(label))
            raise DataError(
                f"{len(self.labels) - len(labelled)} of {len(self.labels)} rows have no label (None, NaN, empty, -1), "
                f"the first at index {first}. Label or leave them out with drop_unlabelled=True (--drop-unlabelled)."
            )
        part = self.select(labelled)
        self.labels, self.indices, self._cells = part.labels, part.indices, part._cells

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> Any:
        """The undecoded cell of one picture: `{"bytes", "path"}`, a path, a PIL image or a uint8 array."""
        try:
            return self._cells[index]
        except ImageError as error:
            raise ImageError(f"Row {self.indices[index]}: {error}") from error

    def image(
        self, index: int, draft: tuple[int, int] | None = None, remarks: Remarks | None = None
    ) -> PIL.Image.Image:
        """One picture, see `read_image`."""
        try:
            return read_image(self._cells[index], draft, remarks)
        except ImageError as error:
            raise ImageError(f"Row {self.indices[index]}: {error}") from error

    def digest(self, index: int) -> str:
        """SHA-256 of one picture's content: of its file or, where there is no file, of its pixels."""
        try:
            return picture_digest(self._cells[index])
        except ImageError as error:
            raise ImageError(f"Row {self.indices[index]}: {error}") from error

    def select(self, indices: Sequence[int]) -> LabelledImages:
        """The same pictures restricted to positions, in that order."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.labels = [self.labels[index] for index in indices]
        part.indices = [self.indices[index] for index in indices]
        part._cells = self._cells.select(list(indices))
        return part

    def aligned(self, class_names: Sequence[str], label_map: Mapping[str, str] | str | None = None) -> LabelledImages:
        """The same pictures with labels in another order of classes, matched by name whatever the case and separators.

        Args:
            class_names: the classes of a model, in its order. The dataset may have fewer.
            label_map: dataset name to model name where they differ, or `"position"` to match by number.

        Raises:
            DataError: a label that occurs has a name the model does not know.
        """
        if list(class_names) == self.class_names:
            return self
        part = self.select(range(len(self)))
        part.class_names = list(class_names)
        if label_map == "position":
            if max(self.labels) >= len(class_names):
                raise DataError(
                    f"The dataset has label {max(self.labels)}, the model {len(class_names)} classes (0 to "
                    f"{len(class_names) - 1})."
                )
            return part
        names = (
            [label_map.get(name, name) for name in self.class_names]
            if isinstance(label_map, Mapping)
            else self.class_names
        )
        find = finder(class_names)
        places = {label: find(names[label]) for label in sorted(set(self.labels))}
        unknown = [names[label] for label, place in places.items() if place is None]
        if unknown:
            raise DataError(
                f"The dataset has classes the model does not know: {unknown[:5]}{' ...' if len(unknown) > 5 else ''}. "
                f"The model knows {list(class_names)[:5]}{' ...' if len(class_names) > 5 else ''}. Give a label_map "
                "{dataset name: model name}, or label_map='position' if only the wording differs."
            )
        part.labels = [place for label in self.labels if (place := places[label]) is not None]
        return part


def check_dataset(dataset: Any) -> None:
    """Refuse what is not one split of rows.

    Raises:
        DataError: it is streamed, several splits, something else or empty.
    """
    if isinstance(dataset, (IterableDataset, IterableDatasetDict)):
        raise DataError(STREAMED)
    if isinstance(dataset, DatasetDict):
        raise DataError(f"Pass one split, not all of them: choose from {list(dataset)}.")
    if not isinstance(dataset, Dataset):
        raise DataError(f"Expected a datasets.Dataset with pictures and labels; got {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise DataError("The dataset is empty: there is nothing to train on or to evaluate.")


def find_column(dataset: Dataset, given: str | None, kind: str, usual: Sequence[str], feature_type: type) -> str:
    columns = dataset.column_names
    if given is not None:
        if given not in columns:
            raise DataError(f"There is no {kind} column {given!r}; the dataset has {columns}.")
        return given
    typed = [name for name in columns if isinstance(dataset.features[name], feature_type)]
    for candidates in (typed, columns):
        by_name = [name for name in usual if name in candidates]
        if by_name:
            return str(by_name[0])
        if candidates is typed and len(typed) == 1:
            return str(typed[0])
    raise DataError(f"No {kind} column was recognised among {columns}. Name it with {kind}_column= (--{kind}-column).")


def column_values(dataset: Dataset, name: str) -> list[Any]:
    return list(dataset.with_format(None).select_columns([name])[:][name])


def _resolve_labels(
    labels: list[Any], feature: Any, class_names: Any, default_names: Sequence[str] | None, column: str
) -> tuple[list[str], list[int]]:
    """Class names, and labels as ids with -1 for none."""
    if isinstance(feature, ClassLabel):
        names, order = rename_classes(list(feature.names), class_names, column)
        ids = [-1 if label is None or label == -1 else order.get(label, label) for label in labels]
    elif all(label is None or isinstance(label, str) for label in labels):
        if all(map(is_missing, labels)):
            raise DataError(f"The label column {column!r} is empty: there is nothing to learn from.")
        naming = name_classes(labels, [], class_names, f"labels in column {column!r}")
        names, ids = naming.names, [-1 if is_missing(label) else naming.ids[label] for label in labels]
    elif all(label is None or (isinstance(label, int) and not isinstance(label, bool)) for label in labels):
        class_names = default_names if class_names is None else class_names
        if class_names is None:
            raise DataError(
                f"The labels in column {column!r} are plain numbers, without names to make prompts from. Pass "
                "class_names=[...] in label order (--class-names), or cast the column to datasets.ClassLabel."
            )
        names = check_class_names(class_names, minimum=1)
        ids = [-1 if label is None else int(label) for label in labels]
    else:
        kinds = sorted({type(label).__name__ for label in labels})
        raise DataError(
            f"Labels must be class ids or names, one per picture; column {column!r} holds {kinds}. Cast it to "
            f"datasets.ClassLabel or to text; for several labels a picture, ask for {SEVERAL_LABELS} and a model of "
            "problem_type='multi_label_classification'."
        )
    outside = sorted({label for label in ids if label >= len(names) or label < -1})
    if outside:
        raise DataError(
            f"Labels {outside[:5]} in column {column!r} are outside the {len(names)} classes (0 to {len(names) - 1})."
        )
    return names, ids


def rename_classes(old: list[str], class_names: Any, column: str) -> tuple[list[str], dict[int, int]]:
    """Names of a `ClassLabel`'s classes and, where they are the same names in another order, old id to new id."""
    if class_names is None:
        return check_class_names(old, minimum=1), {}
    if isinstance(class_names, Mapping) and set(old) <= set(class_names):
        return check_class_names([class_names[name] for name in old], minimum=1), {}
    names = check_class_names(class_names, minimum=1)
    if set(old) <= set(names):
        return names, {index: names.index(name) for index, name in enumerate(old)}
    if len(names) != len(old):
        raise DataError(
            f"class_names has {len(names)} names, the column {column!r} {len(old)} classes: {shorten(old)}."
        )
    moved = [name for index, name in enumerate(names) if name in old and old[index] != name]
    if moved:
        raise DataError(
            f"class_names and the classes of column {column!r} share names at other positions ({shorten(moved)}): it "
            "is not clear which is which. Give a mapping {name in the dataset: name}."
        )
    return names, {}


def _has_label(label: Any) -> bool:
    return label is not None and (isinstance(label, tuple) or label >= 0)


def class_counts(labels: Iterable[Any], class_names: Sequence[str]) -> dict[str, int]:
    """Number of pictures per class name, in class order; of several labels a picture (multi-hot rows), one each."""
    counts: Counter[int] = Counter()
    for label in labels:
        counts.update([i for i, value in enumerate(label) if value] if isinstance(label, (tuple, list)) else [label])
    return {name: counts.get(index, 0) for index, name in enumerate(class_names)}
