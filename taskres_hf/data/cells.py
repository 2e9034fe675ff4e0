"""Where the pictures of a labelled set come from: rows of a dataset, files, or members of an archive.

Each kind gives the undecoded cell of one picture, can be restricted to rows, and can be sent to another process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from datasets import Dataset, Image

from ..errors import DataError, ImageError


class Cells(Protocol):
    """N pictures that are read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any:
        """What `pictures.read_image` takes: a path, `{"bytes", "path"}`, a PIL image or a uint8 array."""

    def select(self, rows: Sequence[int]) -> Cells:
        """The pictures at these rows, in that order."""


class FileCells:
    """Picture files on this machine."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> str:
        return self.paths[row]

    def select(self, rows: Sequence[int]) -> FileCells:
        return FileCells([self.paths[row] for row in rows])


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
        cell = self.rows[row][self.column]
        return as_array(cell) if not isinstance(cell, (str, bytes, Mapping, PIL.Image.Image, type(None))) else cell

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
            values = dataset[row]
            if column not in values:
                raise DataError(f"The dataset's transform leaves no column {column!r}, only {sorted(values)}. {advice}")
            try:
                outcomes.append(content_digest(_picture_cell(values[column])))
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


def _picture_cell(cell: Any) -> Any:
    return cell if isinstance(cell, (str, bytes, Mapping, PIL.Image.Image)) else as_array(cell)


def as_array(cell: Any) -> np.ndarray[Any, Any]:
    """Pixels [H, W] or [H, W, C] as uint8 from an array, a tensor or nested lists.

    Raises:
        ImageError: not whole numbers from 0 to 255, or not the shape of a picture.
    """
    try:
        pixels = np.asarray(cell)
    except Exception as error:  # ragged lists, tensors that need a gradient
        raise ImageError(f"A cell of type {type(cell).__name__} is no picture: {error}") from error
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)  # channels first, as torch has them
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or pixels.size == 0 or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ImageError(f"An array of shape {list(pixels.shape)} is no picture: [H, W] or [H, W, 3] is expected.")
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "iu":
        raise ImageError(f"Pixels of type {pixels.dtype} have an unknown range. Convert them to uint8 first.")
    if pixels.dtype != np.uint8 and (pixels.min() < 0 or pixels.max() > 255):
        raise ImageError(f"Pixels from {pixels.min()} to {pixels.max()} are outside 0 to 255.")
    return np.ascontiguousarray(pixels.astype(np.uint8))


def content_digest(cell: Any) -> str:
    """SHA-256 of one picture: of its file's content or, where there is no file, of its pixels.

    Raises:
        ImageError: the file cannot be read.
    """
    if isinstance(cell, PIL.Image.Image):
        palette = cell.getpalette() if cell.mode == "P" else None
        return hashlib.sha256(f"{cell.mode} {cell.size} {palette} ".encode() + cell.tobytes()).hexdigest()
    if isinstance(cell, np.ndarray):
        return hashlib.sha256(f"{cell.shape} ".encode() + cell.tobytes()).hexdigest()
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell if isinstance(cell, bytes) else None
    if content is None:
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        try:
            content = Path(str(path)).read_bytes()
        except (OSError, TypeError, ValueError) as error:
            raise ImageError(f"{path!r} cannot be read: {error}") from error
    return hashlib.sha256(content).hexdigest()
