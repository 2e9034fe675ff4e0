"""A table of path and label: CSV, TSV, JSON, JSON lines, parquet or a pandas frame."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from ..pictures import IMAGE_EXTENSIONS
from .labelled import are_measurements, is_empty_cell, labels_of_cells
from .listing import Listing, is_picture, suffix
from .multi_label import MultiLabel, read_sets, recurring
from .reading import SEVERAL_LABELS, LeftOut, Reading, SplitReading, printable, shorten, split_name

TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".pq")
_PATH_NAMES = (
    "filename", "filepath", "file", "path", "imagepath", "imagefile", "imagename", "image", "imgpath", "imgfile",
    "imgname", "img", "picture", "photo", "filenames", "filepaths", "paths", "images", "imageid", "imgid", "idcode",
    "id", "name",
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "labelname", "class", "classes", "classname", "classlabel", "category", "categories",
    "categoryname", "target", "cls", "finelabel", "species", "breed", "y", "classid", "labelid", "diagnosis", "choice",
)  # fmt: skip
_SPLIT_NAMES = ("split", "splits", "subset", "partition", "set", "dataset", "fold")
_SURE_SPLITS = ("split", "splits", "partition")  # what they hold must be splits, or the table is refused
_YES_NO = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}
_MARKS = re.compile(r"[|;,]")
_MOST_CONFLICTS = 0.1  # of the pictures: beyond it, pictures are meant to have several labels


class MissingPicturesError(DataError):
    """A table names pictures of which some are there."""


@dataclass
class Table:
    """Columns of equal length, and the line or row number of each row for messages."""

    name: str
    columns: dict[str, list[Any]]
    numbers: list[int]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)


# ---------------------------------------------------------------------- parsing


def parse_table(name: str, content: bytes) -> Table:
    """A table from a file's content; its ending says of which kind it is.

    Raises:
        DataError: it is damaged, empty or has no columns.
    """
    ending = suffix(name)
    try:
        if ending in (".parquet", ".pq"):
            import pyarrow.parquet

            columns = pyarrow.parquet.read_table(io.BytesIO(content)).to_pydict()
            return _checked(Table(name, columns, list(range(1, 1 + len(next(iter(columns.values()), []))))))
        text = _decode(name, content)
        if ending in (".json", ".jsonl", ".ndjson"):
            return _checked(_from_json(name, text, lines=ending != ".json"))
        return _checked(_from_lines(name, text, "\t" if ending == ".tsv" else None))
    except DataError:
        raise
    except Exception as error:  # Arrow's and Python's own parsers raise many types
        raise DataError(f"The table {name} cannot be read: {error}") from error


def table_from_frame(frame: Any) -> Table:
    """A table from a `pandas.DataFrame`; row numbers count from 1."""
    columns = {str(name): frame[name].astype(object).tolist() for name in frame.columns}
    return _checked(Table("the data frame", columns, list(range(1, len(frame) + 1))))


def _checked(table: Table) -> Table:
    if not len(table):
        raise DataError(f"The table {table.name} is empty: there is nothing to train on or to evaluate.")
    return table


def _decode(name: str, content: bytes) -> str:
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"The table {name} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _from_json(name: str, text: str, lines: bool) -> Table:
    rows: list[Any]
    numbers = []
    if lines:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise DataError(f"The table {name} has no JSON in line {number}: {error}") from error
                numbers.append(number)
    else:
        value = json.loads(text)
        if isinstance(value, dict) and value and all(isinstance(v, (str, int)) for v in value.values()):
            value = [{"path": path, "label": label} for path, label in value.items()]
        if not isinstance(value, list):
            raise DataError(
                f'{name} is no table: expected is a list of objects, [{{"path": ..., "label": ...}}, ...], or one '
                'object {"path": "label", ...}.'
            )
        rows, numbers = value, list(range(1, len(value) + 1))
    wrong = next((number for number, row in zip(numbers, rows, strict=True) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise DataError(f"{name}: row {wrong} is no JSON object with a path and a label.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(name, {column: [row.get(column) for row in rows] for column in columns}, numbers)


def _from_lines(name: str, text: str, separator: str | None) -> Table:
    first = next((line for line in text.splitlines() if line.strip()), "")
    if separator is None:
        usual = [mark for mark in (",", ";", "\t", "|") if mark in first]
        separator = max(usual, key=first.count) if usual else " " if suffix(name) == ".txt" else ","
    csv.field_size_limit(10_000_000)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows, numbers = [], []
    for row in reader:
        if any(cell.strip() for cell in row):
            rows.append(row)
            numbers.append(reader.line_num)
    if not rows:
        return Table(name, {}, [])
    notes = []
    if any(suffix(cell.strip()) in IMAGE_EXTENSIONS for cell in rows[0]):
        if len(rows[0]) != 2:
            raise DataError(
                f"The table {name} has no line of column names, and {len(rows[0])} columns. Write one as the first "
                "line, such as path,label."
            )
        path = 0 if is_picture(rows[0][0].strip()) else 1
        header = ["path", "label"] if path == 0 else ["label", "path"]
        notes.append(f"{name} has no line of column names; its columns are taken for {header[0]} and {header[1]}.")
    else:
        header, rows, numbers = [cell.strip() for cell in rows[0]], rows[1:], numbers[1:]
    doubled = {column for column in header if header.count(column) > 1}
    if doubled:
        raise DataError(f"The table {name} has more than one column called {shorten(sorted(doubled))}.")
    wrong = [number for row, number in zip(rows, numbers, strict=True) if len(row) != len(header)]
    if wrong:
        raise DataError(
            f"{len(wrong)} rows of {name} do not have {len(header)} cells like the first one; lines {wrong[:5]}. Put "
            "names that contain the separator in quotes."
        )
    columns = {column: [row[place].strip() for row in rows] for place, column in enumerate(header)}
    return Table(name, columns, numbers, notes)


# ---------------------------------------------------------------------- columns


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def usual_columns(table: Table, names: Sequence[str]) -> list[str]:
    """Columns of these names, whatever case and separators."""
    plain = {_plain(column): column for column in table.columns}
    return [plain[name] for name in names if name in plain]


def _given(table: Table, column: str, kind: str) -> str:
    if column not in table.columns:
        raise DataError(f"There is no {kind} column {column!r} in {table.name}; it has {shorten(table.columns, 20)}.")
    return column


def find_label_column(table: Table, given: str | None, taken: Sequence[str | None]) -> str | None:
    """The column of labels, or None where nothing looks like one.

    Raises:
        DataError: no column of the given name, or several that divide the pictures differently.
    """
    if given is not None:
        return _given(table, given, "label")
    candidates = [column for column in usual_columns(table, _LABEL_NAMES) if column not in taken]
    rest = [column for column in table.columns if column not in taken]
    if not candidates:
        return rest[0] if len(rest) == 1 else None
    partitions = {column: _partition(table.columns[column]) for column in candidates}
    if len(set(partitions.values())) > 1:
        examples = "; ".join(
            f"{column}: {shorten(sorted(set(map(str, table.columns[column]))), 3)}" for column in candidates
        )
        raise DataError(
            f"{table.name} has more than one column that may be the label ({examples}). Name it with label_column= "
            "(--label-column)."
        )
    words = [
        column for column in candidates if not all(isinstance(v, int) for v in labels_of_cells(table.columns[column]))
    ]
    return (words or candidates)[0]


def _partition(values: Sequence[Any]) -> tuple[int, ...]:
    """Which rows belong together, whatever their label is called."""
    first: dict[str, int] = {}
    return tuple(first.setdefault(str(value), len(first)) for value in values)


def check_labels(table: Table, column: str, labels: Sequence[Any]) -> None:
    """Refuse what is no class: several labels in a cell, or a measurement.

    Raises:
        DataError: with the first such row.
    """
    known = {label for label in labels if isinstance(label, str)} | recurring(labels)
    for row, value in enumerate(labels):
        parts = [part.strip() for part in _MARKS.split(value)] if isinstance(value, str) else []
        if isinstance(value, (list, dict, tuple)) or (len(parts) > 1 and any(part in known for part in parts)):
            raise DataError(
                f"{table.name}: row {table.numbers[row]} has several labels in {column!r} ({printable(value)}); one "
                "per picture is needed. Keep such rows out of the table, write one label into each, or ask for several "
                f"labels a picture: {SEVERAL_LABELS}."
            )
    if are_measurements(labels):
        raise DataError(
            f"Labels must be class ids or names; {column!r} of {table.name} holds numbers with fractions "
            f"({shorten(dict.fromkeys(map(str, labels)))}), which measure something. Write the class into the table, "
            "or name another column with label_column= (--label-column)."
        )


# ---------------------------------------------------------------------- paths


class Paths:
    """Finds the files that a table names: relative to its folder, or all below one folder beside it."""

    def __init__(self, listing: Listing, folder: str) -> None:
        self.listing, self.folder = listing, folder
        self._index: dict[str, list[str]] | None = None

    def _direct(self, value: str) -> str | None:
        for text in (value, value.replace("\\", "/")):
            name = posixpath.normpath(posixpath.join(self.folder, text))
            if self.listing.exists(name):
                return name
        return None

    def _prefixes(self, value: str) -> dict[str, str]:
        """Every (folder, ending) by which a name becomes a file, to that file."""
        if self._index is None:
            self._index = {}
            for name in self.listing.pictures():
                base = name.rsplit("/", 1)[-1]
                self._index.setdefault(base, []).append(name)
                self._index.setdefault(base.rsplit(".", 1)[0], []).append(name)
        value = posixpath.normpath(value.replace("\\", "/")).lstrip("/")
        found = {}
        for name in self._index.get(value.rsplit("/", 1)[-1], []):
            for ending in ("", suffix(name)):
                stem = name[: len(name) - len(ending)] if ending else name
                if stem == value or stem.endswith(f"/{value}"):
                    found[f"{stem[: len(stem) - len(value)]}*{ending and '.*'}"] = name
        return found

    def find(self, table: Table, column: str) -> tuple[list[str], str]:
        """Names of the files of all rows, and below which folder they lie where it is not the table's own.

        Raises:
            DataError: some are not there, or names fit files below more than one folder.
        """
        values = table.columns[column]
        texts = ["" if value is None else str(value).strip() for value in values]
        addresses = [number for text, number in zip(texts, table.numbers, strict=True) if "://" in text]
        if addresses:
            raise DataError(f"{table.name} names addresses ({texts[0]}), not files: download the pictures first.")
        direct = [self._direct(text) if text else None for text in texts]
        if not any(direct):
            looked_up = self._look_up(table, column, texts)
            if looked_up is not None:
                return looked_up
        missing = [(text, number) for text, name, number in zip(texts, direct, table.numbers, strict=True) if not name]
        if missing:
            listed = ", ".join(f"{printable(text)!r} (row {number})" for text, number in missing[:10])
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            kind = MissingPicturesError if any(direct) else DataError
            raise kind(
                f"{len(missing)} of {len(texts)} pictures that {table.name} names in column {column!r} are not there: "
                f"{listed}{more}. Paths are relative to the table's folder ({printable(self.listing.name)})."
            )
        return [str(name) for name in direct], ""

    def _look_up(self, table: Table, column: str, texts: Sequence[str]) -> tuple[list[str], str] | None:
        """Files below one folder beside the table or, where every name is that of one file only, below several."""
        options = [self._prefixes(text) if text else {} for text in texts]
        common = set(options[0]).intersection(*options[1:])
        if len(common) == 1:
            (prefix,) = common
            return [found[prefix] for found in options], prefix
        if common:
            raise DataError(
                f"The names in column {column!r} of {table.name} fit pictures below more than one folder: "
                f"{shorten(sorted(common))}. Write the folder into the table."
            )
        if all(len(set(found.values())) == 1 for found in options):
            files = [next(iter(found.values())) for found in options]
            return files, shorten(sorted({prefix for found in options for prefix in found}))
        return None

    def outside(self, files: Sequence[str]) -> list[str]:
        """Those of the files that do not lie below the folder that is read."""
        root = os.path.normpath(self.listing.name)
        return [file for file in files if not os.path.normpath(os.path.join(root, file)).startswith(root + os.sep)]

    def fits(self, value: Any) -> bool:
        """Whether a cell names a picture that is there."""
        return isinstance(value, str) and bool(value.strip()) and bool(self._direct(value) or self._prefixes(value))


def find_path_column(table: Table, given: str | None, paths: Paths) -> str | None:
    """The column of paths, or None where nothing looks like one.

    Raises:
        DataError: no column of the given name, or two that name different pictures.
    """
    if given is not None:
        return _given(table, given, "image")
    first = {column: next((v for v in values if v not in (None, "")), None) for column, values in table.columns.items()}
    usual = [column for column in usual_columns(table, _PATH_NAMES) if isinstance(first[column], (str, int))]
    named = [column for column in usual if isinstance(first[column], str) and is_picture(str(first[column]))]
    if not named:  # a name that says nothing, or names without their ending, such as id_code
        named = [column for column, value in first.items() if isinstance(value, str) and is_picture(value)]
    named = named or [column for column in usual if paths.fits(first[column])]
    fitting = [column for column in named if paths.fits(first[column])] or named
    if len(fitting) > 1 and len({str(first[column]).replace("\\", "/").rsplit("/", 1)[-1] for column in fitting}) > 1:
        raise DataError(
            f"{table.name} has more than one column that may be the picture's path: "
            f"{shorten([f'{column} ({first[column]})' for column in fitting])}. Name it with image_column= "
            "(--image-column)."
        )
    return fitting[0] if fitting else None


# ---------------------------------------------------------------------- meaning


@dataclass
class TableOptions:
    """Columns that a caller names."""

    image_column: str | None = None
    label_column: str | None = None
    multi_label: MultiLabel | None = None
    class_names: Any = None


def read_table(table: Table, paths: Paths, options: TableOptions, split: str = "train") -> Reading:
    """Splits and labels of a table; `split` is the name of rows that do not say.

    Raises:
        DataError: no column of paths, missing files, or a split column with gaps.
    """
    column = find_path_column(table, options.image_column, paths)
    if column is None:
        raise DataError(
            f"No column of {table.name} was recognised as the pictures' paths among {shorten(table.columns, 20)}. Name "
            "it with image_column= (--image-column)."
        )
    splits, named = split_column(table, column, options, split)
    asked = options.multi_label
    one_each = asked is not None and asked.columns is not None
    label = None if one_each else find_label_column(table, options.label_column, [column, splits])
    if label is None and split != "test" and not one_each:
        raise DataError(
            f"No column of {table.name} was recognised as the label among {shorten(table.columns, 20)}. Name it with "
            "label_column= (--label-column); one column per class is read with multi_label=True and label_columns= "
            "(--multi-label and --label-columns of taskres train)."
        )
    files, below = paths.find(table, column)
    reading = Reading("table", [], notes=list(table.notes))
    labels: list[Any] = [None] * len(table)
    if asked is not None:
        written = (table.name, table.columns, table.numbers)
        labels = read_sets(*written, label, asked, options.class_names, [column, splits], files, named, reading)
    elif label is not None:
        labels = labels_of_cells(table.columns[label])
        check_labels(table, label, labels)
    used = (
        [f"pictures {column!r}"] + ([f"labels {label!r}"] if label else []) + ([f"splits {splits!r}"] if splits else [])
    )
    others = [name for name in table.columns if name not in ("", column, label, splits, *(reading.class_names or ()))]
    also = f" (not used: {shorten(others)})" if others else ""
    reading.notes.append(f"Columns of {table.name}: {', '.join(used)}{also}.")
    if below:
        reading.notes.append(f"The pictures of {table.name} were looked up as {below}.")
    if outside := paths.outside(files):
        example = f"{len(outside)} of {len(files)}, such as {printable(outside[0])}"
        reading.notes.append(f"Pictures of {table.name} lie outside of {printable(paths.listing.name)}: {example}.")
    rows = _without_repeats(table, files, labels, named, reading)
    for name in dict.fromkeys(named[row] for row in rows):
        mine = [row for row in rows if named[row] == name]
        cells = paths.listing.cells([files[row] for row in mine])
        reading.splits.append(SplitReading(name, table.name, None, cells, [labels[row] for row in mine]))
    return reading


def split_column(table: Table, path: str, options: TableOptions, split: str) -> tuple[str | None, list[str]]:
    """The column that says which split a row is of, if any, and the split of each row.

    Columns such as `split` hold names of splits; columns such as `is_valid` say yes or no.

    Raises:
        DataError: gaps in such a column, or a column called `split` that holds something else.
    """
    for column, values in table.columns.items():
        plain = _plain(column)
        if column in (path, options.label_column) or all(map(is_empty_cell, values)):
            continue
        names: list[str | None] = []
        if plain in _SPLIT_NAMES:
            names = [split_name(str(value)) for value in values if not is_empty_cell(value)]
        elif plain.startswith("is") and (asked := split_name(plain[2:])):
            said = [_YES_NO.get(str(value).strip().lower().removesuffix(".0")) for value in values]
            other = "train" if asked != "train" else "test"
            names = [None if yes is None else asked if yes else other for yes in said]
        if not names or not all(names):
            if plain in _SURE_SPLITS and names:
                raise DataError(
                    f"{column!r} of {table.name} holds {shorten(sorted(set(map(str, values))))}, not names of splits. "
                    "Write train, validation or test into it, or call it otherwise to leave it out."
                )
            continue
        empty = [number for value, number in zip(values, table.numbers, strict=True) if is_empty_cell(value)]
        if empty:
            raise DataError(f"{len(empty)} rows of {table.name} have no {column!r}, rows {empty[:5]}. Fill it in.")
        return column, [str(name) for name in names]
    return None, [split] * len(table)


def _without_repeats(
    table: Table, files: Sequence[str], labels: Sequence[Any], splits: Sequence[str], reading: Reading
) -> list[int]:
    """Rows that do not repeat another; pictures with two labels or in two splits are noted.

    Raises:
        DataError: many pictures have several labels.
    """
    first: dict[tuple[str, str, Any], int] = {}
    by_file: dict[str, list[int]] = {}
    repeated = []
    for row, key in enumerate(zip(files, splits, labels, strict=True)):
        if key in first:
            repeated.append(row)
        else:
            first[key] = row
            by_file.setdefault(files[row], []).append(row)
    if repeated:
        examples = tuple(f"row {table.numbers[row]}: {files[row]}" for row in repeated[:5])
        reading.left_out.append(LeftOut(f"rows of {table.name} that repeat another", len(repeated), examples))
    torn = {file: rows for file, rows in by_file.items() if len({labels[row] for row in rows}) > 1}
    listed = [
        f"{file} ({', '.join(f'{labels[r]} in row {table.numbers[r]}' for r in rows)})" for file, rows in torn.items()
    ]
    if len(torn) > _MOST_CONFLICTS * len(by_file) and len(torn) > 1:
        raise DataError(
            f"{len(torn)} of {len(by_file)} pictures of {table.name} have more than one label, such as {listed[0]}. "
            f"Keep one row each, or ask for several labels a picture: {SEVERAL_LABELS}."
        )
    shared = [file for file, rows in by_file.items() if len({splits[row] for row in rows}) > 1]
    for names, what in ((listed, "with more than one label"), (shared, "in more than one split")):
        if names:
            reading.notes.append(f"Pictures {what}: {len(names)} ({shorten(names)}).")
            warnings.warn(f"{table.name} has {len(names)} pictures {what}: {shorten(names)}.", stacklevel=6)
    return list(first.values())


def join_tables(readings: Mapping[str, Reading]) -> Reading:
    """One reading of a table per split."""
    joined = Reading("tables", [])
    for reading in readings.values():
        joined.splits += reading.splits
        joined.left_out += reading.left_out
        joined.notes += reading.notes
        joined.class_names = joined.class_names or reading.class_names
        joined.separator = joined.separator or reading.separator
    return joined
