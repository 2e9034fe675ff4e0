"""Where the pictures of a labelled set come from: rows of a dataset, files, or members of an archive.

Each kind gives the undecoded cell of one picture, can be restricted to rows, and can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from datasets import Dataset, Image

from ..errors import DataError, ImageError
from ..pictures import picture_digest, read_image
from ..tables import visible


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
