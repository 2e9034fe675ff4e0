"""Answers to pictures as a .csv, .jsonl or .parquet file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import ArtifactError, ConfigurationError
from .storage import check_can_write, write_bytes
from .tables import json_text, spreadsheet_text, visible

_SUFFIXES = (".csv", ".jsonl", ".parquet")
_ROW_GROUP = 65536  # rows that parquet compresses together


def as_utf8(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a file name that are no UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_output(path: Path) -> None:
    """Refuse a file name that cannot be written, before hours of work.

    Raises:
        ConfigurationError: unknown ending, a folder of that name, or no such folder or none that can be written.
    """
    folder = path.absolute().parent
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"Cannot tell the format of {path}: end its name in {', '.join(_SUFFIXES)}.")
    if not folder.is_dir():
        raise ConfigurationError(f"There is no folder {path.parent} to write {path.name} into.")
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: give the name of a file to write.")
    try:
        check_can_write(folder)
    except ArtifactError as error:
        raise ConfigurationError(
            f"The folder {path.parent} cannot be written: choose another for {path.name}. {error}"
        ) from error


def csv_separator(names: Sequence[str], output: Path) -> str | None:
    """What stands between several labels in a cell of CSV: a mark that no class name has.

    Raises:
        ConfigurationError: names have all of them.
    """
    free = [mark for mark in "|;," if not any(mark in name for name in names)]
    if not free and output.suffix.lower() == ".csv":
        raise ConfigurationError(
            f"Class names hold each of | ; and ,: several of them cannot stand in one cell of {output.name}. Write "
            ".jsonl or .parquet."
        )
    return free[0] if free else None


def write_predictions(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    top_k: int = 1,
    reject: bool = False,
    separator: str | None = None,
    columns: Sequence[str] = ("file",),
) -> None:
    """Write the rows of `classify_files` in one step.

    Args:
        columns: text that comes first in each row: `text` instead of `file` of `classify_texts`, `file` and
            `classifier` of a pool.

    CSV has the columns file, label, score, label_2, score_2, ..., error, and with `reject` rejected; control characters
    are escaped, and text that a spreadsheet would run as a formula gets a leading apostrophe. With a separator the
    columns are file, labels, scores, error, each cell holding as many labels as the picture has. JSON lines hold the
    rows as they are; parquet has the lists `labels` and `scores`.
    """
    kind = path.suffix.lower()
    if kind == ".csv":
        content = _csv(rows, top_k, reject, separator, columns).encode("utf-8", "backslashreplace")
    elif kind == ".jsonl":
        content = b"".join(f"{json_text(row)}\n".encode() for row in rows)
    else:
        content = _parquet(rows, reject, columns)
    write_bytes(path, content)


def _csv(
    rows: Iterable[Mapping[str, Any]], top_k: int, reject: bool, separator: str | None, columns: Sequence[str]
) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    suffixes = ["", *(f"_{number}" for number in range(2, top_k + 1))]
    if separator is not None:
        writer.writerow([*columns, "labels", "scores", "error"])
        for row in rows:
            labels = _csv_text(separator.join(top["label"] for top in row["predictions"]))
            scores = separator.join(f"{top['score']:.6f}" for top in row["predictions"])
            first = [_csv_text(row[column]) for column in columns]
            writer.writerow([*first, labels, scores, _csv_text(row["error"] or "")])
        return text.getvalue()
    names = [*columns, *(f"{kind}{suffix}" for suffix in suffixes for kind in ("label", "score")), "error"]
    writer.writerow([*names, "rejected"] if reject else names)
    for row in rows:
        cells: list[Any] = []
        for top in row["predictions"]:
            cells += [_csv_text(top["label"]), "" if top["score"] is None else f"{top['score']:.6f}"]
        cells += [""] * (2 * top_k - len(cells))
        cells = [*(_csv_text(row[column]) for column in columns), *cells, _csv_text(row["error"] or "")]
        if reject:
            cells.append("" if row["rejected"] is None else str(row["rejected"]).lower())
        writer.writerow(cells)
    return text.getvalue()


def _csv_text(text: str) -> str:
    return spreadsheet_text(visible(text))


def _parquet(rows: Iterable[Mapping[str, Any]], reject: bool, first: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {**dict.fromkeys(first, pa.string()), "labels": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}
    schema = pa.schema({**fields, "error": pa.string(), **({"rejected": pa.bool_()} if reject else {})})
    sink, remaining = io.BytesIO(), iter(rows)
    with pq.ParquetWriter(sink, schema, write_page_checksum=True) as writer:
        while group := list(islice(remaining, _ROW_GROUP)):
            columns = {
                **{column: [as_utf8(row[column]) for row in group] for column in first},
                "labels": [[as_utf8(top["label"]) for top in row["predictions"]] for row in group],
                "scores": [[top["score"] for top in row["predictions"]] for row in group],
                "error": [row["error"] and as_utf8(row["error"]) for row in group],
            }
            if reject:
                columns["rejected"] = [row["rejected"] for row in group]
            writer.write_table(pa.table(columns, schema=schema))
    return sink.getvalue()
