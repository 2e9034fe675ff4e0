"""Several labels per picture: lists, separated text, one column per class, or multi-hot vectors.

A picture's labels become a multi-hot tuple of K floats; one of zeros alone is a picture that shows none of the classes.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Image, List, Value

from ..errors import DataError
from .labelled import (
    IMAGE_NAMES,
    LABEL_NAMES,
    LabelledImages,
    Naming,
    check_dataset,
    column_values,
    find_column,
    finder,
    is_empty_cell,
    name_classes,
    rename_classes,
)
from .reading import Cells, Reading, printable, shorten
from .stratified import fold_of_each

ONE_LABEL_EACH = (
    "{name} has one label per picture, and several were asked for (multi_label, --multi-label). They are read from a "
    "table beside the pictures (metadata.csv, .jsonl, .parquet) or from a dataset with a column of lists."
)
SEPARATORS = ("|", ";", ",")
MultiHot = tuple[float, ...]
LabelSet = tuple[Any, ...]  # of one picture, as they are written


@dataclass(frozen=True)
class MultiLabel:
    """How several labels per picture are written.

    Attributes:
        separator: between labels in one cell of text: `|`, `;`, `,` or a space; recognised when None.
        columns: one column per class, holding 0 and 1: their names, or `"auto"` for all that hold nothing else.
    """

    separator: str | None = None
    columns: Sequence[str] | str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the artifact: what reads data of the same kind again."""
        columns = None if self.columns is None or self.columns == "auto" else list(self.columns)
        return {key: value for key, value in (("separator", self.separator), ("columns", columns)) if value is not None}

    @classmethod
    def asked(cls, wanted: bool, separator: str | None, columns: Any) -> MultiLabel | None:
        """What a caller asked for; None where pictures have one label each.

        Raises:
            DataError: a separator or columns without asking, or of no such kind.
        """
        if not wanted:
            if separator is not None or columns is not None:
                raise DataError(
                    "A label separator or label columns are for several labels per picture: ask for those with "
                    "multi_label=True (--multi-label)."
                )
            return None
        if separator is not None and separator not in (*SEPARATORS, " "):
            raise DataError(f"The label separator must be one of {' '.join(SEPARATORS)} or a space; got {separator!r}.")
        if columns is not None and separator is not None:
            raise DataError("Choose one: a label separator splits a cell, label columns hold 0 and 1 each.")
        if isinstance(columns, str) and columns != "auto":
            columns = [name.strip() for name in columns.split(",")]
        if columns is not None and columns != "auto" and (len(set(columns)) < len(list(columns)) or not columns):
            raise DataError(f"Label columns must be named once each, at least one; got {list(columns)}.")
        return cls(separator, columns)


# ---------------------------------------------------------------------- from cells to sets of labels


def sets_of_cells(
    values: Sequence[Any], asked: MultiLabel, where: str, numbers: Sequence[int], class_names: Any = None
) -> tuple[list[LabelSet | None], str, str | None]:
    """The labels of each cell, each once, a sentence on how they were told apart, and the separator of text.

    Args:
        values: lists, vectors of 0 and 1, or text; None for no cell at all. where: what the cells are, for messages.
        numbers: of the rows, for messages. class_names: names that may settle which separator is meant.

    Raises:
        DataError: with the first row that cannot be read, or where it is not clear what separates labels.
    """
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    texts = [isinstance(value, str) and not is_empty_cell(value) for value in values]
    lists = [isinstance(value, (list, tuple)) for value in values]
    if any(texts) and any(lists):
        raise DataError(f"{where} holds lists and text: row {numbers[texts.index(True)]} is text. Write all one way.")
    if any(texts):
        return _sets_of_text(values, asked, where, numbers, class_names)
    found: list[LabelSet | None] = []
    for number, value in zip(numbers, values, strict=True):
        if isinstance(value, (list, tuple)):
            found.append(tuple(value))
        elif is_empty_cell(value):
            found.append(None)
        else:
            raise DataError(
                f"{where}: row {number} holds {printable(value)}, one label and no list. Write lists such as ['cat', "
                "'dog'], or train with one label per picture (without multi_label, --multi-label)."
            )
    if _are_vectors(found, where, numbers, class_names):
        return (
            [None if row is None else tuple(i for i, x in enumerate(row) if x) for row in found],
            (f"{where} holds vectors of 0 and 1, one number per class."),
            None,
        )
    for number, row in zip(numbers, found, strict=True):
        wrong = [label for label in row or () if type(label) is float or label is None or label == "" or label == -1]
        if wrong:
            raise DataError(f"{where}: row {number} has {wrong[0]!r} in its list, which names no class.")
    return (
        [None if row is None else tuple(dict.fromkeys(row)) for row in found],
        f"{where} holds lists of labels.",
        None,
    )


def _are_vectors(rows: Sequence[LabelSet | None], where: str, numbers: Sequence[int], class_names: Any) -> bool:
    """Whether lists are multi-hot vectors rather than lists of class ids.

    Raises:
        DataError: numbers with other values than 0 and 1, of different lengths, or that can be either.
    """
    given = [(number, row) for number, row in zip(numbers, rows, strict=True) if row is not None]
    every = [value for _, row in given for value in row]
    if not every or any(isinstance(value, str) or value is None for value in every):
        return False
    lengths = {len(row) for _, row in given}
    classes = len(getattr(class_names, "names", class_names) or ())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in every):
        repeated = any(len(set(row)) < len(row) for _, row in given)
        alike = len(lengths) == 1 and set(every) <= {0, 1} and (not classes or lengths == {classes})
        if alike and lengths == {2} and not repeated:
            raise DataError(
                f"{where}: each list is [0, 1] or [1, 0], which can be class ids or a vector of 0 and 1. Write vectors "
                "as floats (1.0, 0.0), or lists of names."
            )
        return alike and lengths != {1} and (repeated or max(lengths) > 2)
    for number, row in given:
        odd = [value for value in row if value not in (0, 1)]
        if odd:
            raise DataError(
                f"{where}: row {number} holds {odd[0]!r}; a vector of labels holds 0 and 1 alone. Decide for each "
                "class whether the picture shows it."
            )
    if len(lengths) > 1 or (classes and lengths != {classes}):
        size = f", for {classes} classes" if classes else ""
        raise DataError(
            f"{where} holds vectors of length {', '.join(map(str, sorted(lengths)))}{size}: one number a class."
        )
    return True


def _sets_of_text(
    values: Sequence[Any], asked: MultiLabel, where: str, numbers: Sequence[int], class_names: Any
) -> tuple[list[LabelSet | None], str, str | None]:
    texts = ["" if is_empty_cell(value) else str(value).strip() for value in values]
    written = [text for text in texts if text]
    if asked.separator is None and all(text.startswith("[") and text.endswith("]") for text in written):
        found = []
        for number, text in zip(numbers, texts, strict=True):
            try:
                found.append(ast.literal_eval(text) if text else [])
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise DataError(f"{where}: row {number} is no list of labels ({printable(text)}).") from error
        return sets_of_cells(found, asked, where, numbers, class_names)
    separator = asked.separator or _recognised(written, where, class_names)
    sets: list[LabelSet | None] = []
    for text in texts:
        sets.append(tuple(dict.fromkeys(part for part in map(str.strip, text.split(separator)) if part)))
    return sets, f"{where} holds labels separated by {'a space' if separator == ' ' else repr(separator)}.", separator


def recurring(labels: Iterable[Any]) -> set[str]:
    """Parts between `|` or `;` that more than one label has: so look several labels in one cell, and no class names."""
    texts = {label for label in labels if isinstance(label, str)}
    parts = Counter(part.strip() for text in texts for part in set(re.split(r"[|;]", text)) if part.strip() != text)
    return {part for part, count in parts.items() if part and count > 1}


def _recognised(texts: Sequence[str], where: str, class_names: Any) -> str:
    """The separator of labels.

    Raises:
        DataError: there is none, or more than one.
    """
    found = [mark for mark in SEPARATORS if any(mark in text for text in texts)]
    names = getattr(class_names, "names", class_names) or ()
    if len(found) > 1 and names and not isinstance(names, Mapping):
        find = finder([str(name) for name in names])
        found = [m for m in found if all(find(part) is not None for t in texts for part in t.split(m) if part.strip())]
    if len(found) == 1:
        return found[0]
    what = f"more than one mark may separate labels ({' '.join(found)})" if found else "no cell holds several labels"
    raise DataError(
        f"{where}: {what}. Say which with label_separator='|' (--label-separator), or train with one label per picture."
    )


def columns_of(
    columns: Mapping[str, Sequence[Any]], asked: MultiLabel, where: str, numbers: Sequence[int], taken: Iterable[Any]
) -> tuple[list[LabelSet], list[str]]:
    """The labels of each row from one column per class, and the classes in the order of the columns.

    Raises:
        DataError: no such column, or one that holds something else than 0 and 1.
    """
    if asked.columns == "auto":
        chosen = [
            name for name, values in columns.items() if name not in taken and all(_bit(v) in (0, 1) for v in values)
        ]
        if len(chosen) < 2:
            raise DataError(
                f"{where} has {len(chosen)} columns of 0 and 1 alone among {shorten(columns, 20)}. Name the columns of "
                "the classes with label_columns= (--label-columns)."
            )
    else:
        chosen = list(asked.columns or ())
        absent = [name for name in chosen if name not in columns]
        if absent:
            raise DataError(f"There is no label column {absent[0]!r} in {where}; it has {shorten(columns, 20)}.")
    sets: list[LabelSet] = []
    for row, number in enumerate(numbers):
        bits = {name: _bit(columns[name][row]) for name in chosen}
        odd = next((name for name, bit in bits.items() if bit is None), None)
        if odd is not None:
            raise DataError(
                f"{where}: row {number} holds {printable(columns[odd][row])!r} in {odd!r}; a column of a class holds 0 "
                "and 1 alone. Decide whether the picture shows it."
            )
        sets.append(tuple(name for name, bit in bits.items() if bit))
    return sets, chosen


def _bit(value: Any) -> int | None:
    """0 or 1 of a number, a truth value or its text; None of anything else."""
    text = str(value.item() if hasattr(value, "item") else value).strip().lower()
    return {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}.get(text)


def read_sets(
    name: str,
    columns: Mapping[str, Sequence[Any]],
    numbers: Sequence[int],
    label: str | None,
    asked: MultiLabel,
    class_names: Any,
    taken: Sequence[str | None],
    files: Sequence[str],
    splits: Sequence[str],
    reading: Reading,
) -> list[Any]:
    """The labels of each row of a table; several rows of one picture are taken together, as the reading then notes.

    Args:
        label: the column of labels, or None where there is none or one per class. taken: columns of something else.
        files, splits: of each row.

    Raises:
        DataError: see `sets_of_cells` and `columns_of`.
    """
    found: Sequence[LabelSet | None]
    if asked.columns is not None:
        found, reading.class_names = columns_of(columns, asked, name, numbers, taken)
        reading.notes.append(f"Columns of classes: {shorten(reading.class_names, 20)}.")
    elif label is None:
        return [None] * len(numbers)
    else:
        where = f"{label!r} of {name}"
        cells, note, reading.separator = sets_of_cells(columns[label], asked, where, numbers, class_names)
        found = [() if labels is None else labels for labels in cells]
        reading.notes.append(note)
    sets, several = _joined(files, splits, found)
    if several:
        reading.notes.append(f"{several} pictures have several rows, whose labels are taken together.")
    if none := sum(not labels for labels in sets):
        reading.notes.append(f"{none} rows have no label: none of the classes is on these pictures.")
    return sets


def _joined(files: Sequence[str], splits: Sequence[str], sets: Sequence[LabelSet | None]) -> tuple[list[Any], int]:
    """Label sets with the labels of all rows of the same picture and split, and how many pictures have several rows."""
    by_file: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(files, splits, strict=True)):
        by_file.setdefault(key, []).append(row)
    result: list[Any] = list(sets)
    for rows in by_file.values():
        if len(rows) > 1:
            union = tuple(dict.fromkeys(label for row in rows for label in sets[row] or ()))
            for row in rows:
                result[row] = union
    return result, sum(len(rows) > 1 for rows in by_file.values())


# ---------------------------------------------------------------------- pictures


def flat(sets: Iterable[LabelSet | None]) -> list[Any]:
    """All labels of all pictures."""
    return [label for labels in sets for label in labels or ()]


class MultiLabelImages(LabelledImages):
    """Pictures with several labels each, or none; see `LabelledImages`, whose methods all work.

    Args:
        dataset: with a column of lists (`List(ClassLabel)`, names, ids, or vectors of 0 and 1), of separated text, or
            one column per class (`label_columns`).
        separator, label_columns: see `MultiLabel`.
        class_names, default_names: as in `LabelledImages`; ids and vectors need either.

    Attributes:
        labels: N tuples of K floats, 1.0 for a class that the picture shows, else 0.0.
        asked: how the labels are written, or None.

    Raises:
        DataError: as `LabelledImages`; a value other than 0 and 1 in a vector, an unknown label, or a column that holds
            one label per picture.
    """

    asked: MultiLabel | None = None

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        class_names: Any = None,
        default_names: Sequence[str] | None = None,
        drop_unlabelled: bool = False,
        separator: str | None = None,
        label_columns: Sequence[str] | str | None = None,
    ) -> None:
        check_dataset(dataset)
        asked = MultiLabel.asked(True, separator, label_columns)
        assert asked is not None
        self.image_column = find_column(dataset, image_column, "image", IMAGE_NAMES, Image)
        numbers = range(len(dataset))
        if asked.columns is not None:
            self.label_column = "label_columns"
            plain = [name for name in dataset.column_names if isinstance(dataset.features[name], Value)]
            columns = {name: column_values(dataset, name) for name in plain}
            sets, chosen = columns_of(columns, asked, "the dataset", numbers, [self.image_column])
            naming = name_classes(flat(sets), [], chosen if class_names is None else class_names, "label columns")
            found: list[LabelSet | None] = list(sets)
        else:
            self.label_column = find_column(dataset, label_column, "label", ("labels", *LABEL_NAMES), List)
            feature, where = dataset.features[self.label_column], f"the column {self.label_column!r}"
            values = column_values(dataset, self.label_column)
            if isinstance(feature, ClassLabel):
                raise DataError(_ONE_LABEL.format(where=where))
            found, naming = _of_column(values, feature, asked, where, class_names, default_names)
        self.class_names = naming.names
        self.labels = multi_hot(found, naming)
        self.indices = list(numbers)
        self.split = None if dataset.split is None else str(dataset.split)
        self.account = None
        self._cells = self._cells_of(dataset, None if asked.columns is not None else self.label_column)
        self._leave_out_unlabelled(drop_unlabelled)

    @classmethod
    def from_sets(
        cls, cells: Cells, sets: Sequence[LabelSet | None], naming: Naming, *, split: str | None, drop_unlabelled: bool
    ) -> MultiLabelImages:
        """N pictures from anywhere with their labels."""
        made: Any = cls.from_cells(
            cells, multi_hot(sets, naming), naming.names, split=split, drop_unlabelled=drop_unlabelled
        )
        return made  # type: ignore[no-any-return]

    def set_aside(self, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
        """The pictures to train on and a share to measure on, of every class about that share."""
        parts = fold_of_each(self.labels, [1.0 - share, share], seed)
        train, held_out = (self.select([row for row, part in enumerate(parts) if part == side]) for side in (0, 1))
        if not len(train) or not len(held_out):
            raise DataError(f"holdout={share:g} of {len(self)} pictures leaves none on one side. Add pictures.")
        held_out.split = "holdout"
        return train, held_out

    def aligned(self, class_names: Sequence[str], label_map: Mapping[str, str] | str | None = None) -> MultiLabelImages:
        """As `LabelledImages.aligned`; a class that the data does not have counts as not shown."""
        if list(class_names) == self.class_names:
            return self
        counts = [sum(row[place] for row in self.labels) for place in range(len(self.class_names))]
        if label_map == "position":
            places: list[int | None] = [place if place < len(class_names) else None for place in range(len(counts))]
        else:
            mapped = label_map if isinstance(label_map, Mapping) else {}
            find = finder(class_names)
            places = [find(mapped.get(name, name)) for name in self.class_names]
        unknown = [
            name for name, place, count in zip(self.class_names, places, counts, strict=True) if place is None and count
        ]
        if unknown:
            raise DataError(
                f"The dataset has classes the model does not know: {shorten(unknown)}. The model knows "
                f"{shorten(class_names)}. Give a label_map {{dataset name: model name}}, or label_map='position' if "
                "only the wording differs."
            )
        known = [place for place in places if place is not None]
        if len(set(known)) < len(known):
            raise DataError("The label_map gives one class of the model to several of the dataset.")
        part: Any = self.select(range(len(self)))
        part.class_names, part.labels = list(class_names), []
        for row in self.labels:
            values = [0.0] * len(class_names)
            for place, value in zip(places, row, strict=True):
                if place is not None:
                    values[place] = value
            part.labels.append(tuple(values))
        return part  # type: ignore[no-any-return]


_ONE_LABEL = (
    "{where} holds one label per picture, and several were asked for. Train without multi_label (--multi-label), or "
    "turn the column into lists: dataset.map(lambda row: {{'labels': [row['label']]}})."
)


def _of_column(
    values: list[Any], feature: Any, asked: MultiLabel, where: str, class_names: Any, default_names: Any
) -> tuple[list[LabelSet | None], Naming]:
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        names, order = rename_classes(list(inner.names), class_names, where)
        found: list[LabelSet | None] = [None if row is None else tuple(dict.fromkeys(row)) for row in values]
        return found, Naming(names, {place: order.get(place, place) for place in range(len(names))})
    numbers = range(len(values))
    known = default_names if class_names is None else class_names
    found, *_ = sets_of_cells(values, asked, where, numbers, known)
    every = flat(found)
    if every and all(isinstance(label, int) for label in every):
        return found, name_classes(every, [], known, f"labels in {where}")
    return found, name_classes(every, [], class_names, f"labels in {where}")


def multi_hot(sets: Sequence[LabelSet | None], naming: Naming) -> list[Any]:
    """Label sets as tuples of K floats, None for pictures without a cell.

    Raises:
        DataError: a label that is none of the classes.
    """
    shared: dict[MultiHot, MultiHot] = {}
    rows: list[Any] = []
    for number, labels in enumerate(sets):
        if labels is None:
            rows.append(None)
            continue
        values = [0.0] * len(naming.names)
        for label in labels:
            place = naming.ids.get(label)
            if place is None or not 0 <= place < len(values):
                raise DataError(
                    f"Row {number} has the label {printable(label)!r}, which is none of the classes "
                    f"{shorten(naming.names)}."
                )
            values[place] = 1.0
        row = tuple(values)
        rows.append(shared.setdefault(row, row))
    return rows
