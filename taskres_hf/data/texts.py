"""Texts with class ids: from a dataset, a table (CSV, JSON lines, parquet ...) or a folder with a table per split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import DataError, TextError
from ..language.encoding import checked_text
from ..storage import is_path
from .labelled import LABEL_NAMES, LabelledImages, find_column, labels_of_cells
from .listing import suffix
from .reading import DatasetCells, Reading, SplitReading, of_loaded, of_saved, printable, shorten, split_name
from .sources import SourceOptions, from_hub
from .tables import (
    TABLE_ENDINGS,
    Table,
    check_labels,
    find_label_column,
    join_tables,
    parse_table,
    split_column,
    table_from_frame,
    usual_columns,
)

TEXT_NAMES = (
    "text", "sentence", "texts", "sentences", "utterance", "query", "question", "message", "review", "content", "body",
    "document", "comment", "headline", "title", "description", "input", "tweet", "prompt",
)  # fmt: skip
READABLE = (
    "Readable are tables with a column of texts and one of labels (.csv, .tsv, .json, .jsonl, .parquet), a folder with "
    "such a table per split, folders of save_to_disk, and Hub dataset ids."
)


class TextCells:
    """N texts in memory, as they were found: text, a number, or None."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Any:
        return self.values[row]

    def select(self, rows: Sequence[int]) -> TextCells:
        return TextCells([self.values[row] for row in rows])


class LabelledTexts(LabelledImages):
    """Texts with class ids, as `LabelledImages` are pictures.

    Args:
        dataset: any dataset with a column of texts and one of labels.
        text_column, label_column: their names; the usual ones are found when None.
        class_names, default_names, drop_unlabelled: see `LabelledImages`.

    Raises:
        DataError: see `LabelledImages`.
    """

    noun = "text"

    def __init__(self, dataset: Dataset, *, text_column: str | None = None, **options: Any) -> None:
        super().__init__(dataset, image_column=text_column, **options)

    def _content_column(self, dataset: Dataset, given: str | None, label_column: str | None) -> str:
        words = [
            name for name in dataset.column_names
            if getattr(dataset.features[name], "dtype", None) in ("string", "large_string")
            and name not in (label_column, *LABEL_NAMES)
        ]  # fmt: skip
        if given is None and not set(words) & set(TEXT_NAMES) and len(words) == 1:
            return str(words[0])
        return find_column(dataset, given, "text", TEXT_NAMES, bytes)  # no feature is of this type: by name

    def _cells_of(self, dataset: Dataset, label_column: str | None) -> Any:
        if dataset.format["type"] == "custom":
            raise DataError("A transform on a dataset of texts is not applied here: use dataset.map, then with_format.")
        return DatasetCells(dataset, self.image_column, label_column)

    def text(self, index: int) -> str:
        """One text.

        Raises:
            TextError: it is missing, empty or something else; says which row.
        """
        try:
            return checked_text(self._cells[index])
        except TextError as error:
            raise TextError(f"Row {self.indices[index]}: {error}") from error

    def image(self, index: int, draft: Any = None, remarks: Any = None, content: Any = None) -> Any:
        """The text, where a picture would be read."""
        return self.text(index) if content is None else content

    def source(self, index: int) -> Any:
        """What a message calls the text: its row and how it begins."""
        value = self._cells[index]
        start = f" ({printable(value[:40])!r}{'...' if len(value) > 40 else ''})" if isinstance(value, str) else ""
        return f"row {self.indices[index]}{start}"

    def read(self, index: int, cell: Any = None) -> tuple[str, str, None]:
        """One text and its SHA-256."""
        text = self.text(index)
        return text, hashlib.sha256(b"text\0" + text.encode("utf-8")).hexdigest(), None


def read_texts(source: Any, options: SourceOptions) -> Reading:
    """What is in a source of labelled texts; see `load_training_data`.

    Raises:
        DataError: nothing readable, or more than one way to read it.
    """
    if options.multi_label is not None or options.class_folder is not None:
        raise DataError("Several labels a text, and class folders, are not to be had for texts: leave them out.")
    loaded = of_loaded(source)
    if loaded is not None:
        return loaded
    if type(source).__name__ == "DataFrame" and hasattr(source, "columns"):
        return _of_table(table_from_frame(source), options, "train")
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"A source of type {type(source).__name__} cannot be read. {READABLE}")
    if not is_path(source):
        return from_hub(str(source), options)
    path = Path(os.fspath(source)).expanduser()
    if path.is_dir():
        return _of_folder(path, options)
    if not path.is_file():
        raise DataError(f"There is no dataset at {printable(path)}: no such file or folder. {READABLE}")
    if suffix(path.name) not in TABLE_ENDINGS:
        raise DataError(f"The file {printable(path)} is no table of texts. {READABLE}")
    return _of_file(path, options, split_name(path.stem) or "train")


def _of_file(path: Path, options: SourceOptions, split: str) -> Reading:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    return _of_table(parse_table(path.name, content), options, split)


def _of_folder(path: Path, options: SourceOptions) -> Reading:
    saved = of_saved(path)
    if saved is not None:
        return saved
    files = sorted(
        file for folder in (path, path / "data") if folder.is_dir() for file in folder.iterdir()
        if file.is_file() and suffix(file.name) in TABLE_ENDINGS and suffix(file.name) != ".txt"
    )  # fmt: skip
    named = {file: split_name(file.stem.split("-0")[0]) for file in files}  # train-00000-of-00001.parquet
    splits = [split for split in named.values() if split]
    if len(files) == 1:
        return _of_file(files[0], options, named[files[0]] or "train")
    if not files or len(splits) < len(files) or len(set(splits)) < len(splits):
        found = f"it holds {shorten([file.name for file in files])}" if files else "it holds no table"
        raise DataError(
            f"{printable(path)} is no folder with a table per split, train.csv and test.csv or so: {found}. {READABLE}"
        )
    return join_tables({file.name: _of_file(file, options, str(named[file])) for file in files})


def text_column_of(table: Table, given: str | None, label: str | None = None) -> str:
    """The column of texts.

    Raises:
        DataError: no column of the given name, or nothing looks like one.
    """
    if given is not None:
        if given not in table.columns:
            raise DataError(f"There is no text column {given!r} in {table.name}; it has {shorten(table.columns, 20)}.")
        return given
    named = [column for column in usual_columns(table, TEXT_NAMES) if column != label]
    if named:
        return named[0]
    words = [
        column for column, values in table.columns.items()
        if column != label and any(isinstance(value, str) and " " in value.strip() for value in values)
    ]  # fmt: skip
    if len(words) == 1 or len(table.columns) == 1:
        return (words or list(table.columns))[0]
    raise DataError(
        f"No text column was recognised in {table.name} among {shorten(table.columns, 20)}. Name it with text_column= "
        "(--text-column)."
    )


def _of_table(table: Table, options: SourceOptions, split: str) -> Reading:
    """Splits, texts and labels of a table; `split` is the name of rows that do not say."""
    column = text_column_of(table, options.image_column, options.label_column)
    splits, named = split_column(table, column, options.columns, split)
    label = find_label_column(table, options.label_column, [column, splits])
    if label is None:
        raise DataError(
            f"No column of {table.name} was recognised as the label among {shorten(table.columns, 20)}. Name it with "
            "label_column= (--label-column)."
        )
    labels = labels_of_cells(table.columns[label])
    check_labels(table, label, labels)
    used = [f"texts {column!r}", f"labels {label!r}"] + ([f"splits {splits!r}"] if splits else [])
    others = [name for name in table.columns if name not in ("", column, label, splits)]
    also = f" (not used: {shorten(others)})" if others else ""
    reading = Reading("table", [], notes=[*table.notes, f"Columns of {table.name}: {', '.join(used)}{also}."])
    for name in dict.fromkeys(named):
        rows = [row for row, other in enumerate(named) if other == name]
        cells = TextCells([table.columns[column][row] for row in rows])
        reading.splits.append(SplitReading(name, table.name, None, cells, [labels[row] for row in rows]))
    return reading


def read_lines(source: str | os.PathLike[str], text_column: str | None = None) -> list[Any]:
    """The texts of a table, to classify: its column of texts, labelled or not.

    Raises:
        DataError: no such file, or no column of texts.
    """
    path = Path(source).expanduser()
    try:
        return list((table := parse_table(path.name, path.read_bytes())).columns[text_column_of(table, text_column)])
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
