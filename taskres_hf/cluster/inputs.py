"""Data sets too large to list picture by picture: parquet files, WebDataset shards and folders, cut into blocks.

A block is what one worker does at once, and what is done again after a crash. A row is told from all others by the
file that it is in and its number there, which do not depend on how many workers there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.listing import ArchiveListing, is_picture
from ..errors import ConfigurationError, DataError
from ..picture_files import list_images, walk
from ..pictures import IMAGE_EXTENSIONS, is_address, size_and_time
from ..prediction_files import as_utf8
from ..storage import digest_of
from ..tables import visible

ROWS_PER_BLOCK = 10_000
_ENDS = 1 << 20  # bytes at the start and at the end of a file by which it is told from another
_READ = 64  # rows of a parquet file that are in memory at once, beside those that the tower has
_PICTURE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "bytes", "image_bytes", "content")
_PATH_NAMES = ("path", "file_name", "filename", "file", "filepath", "file_path", "image_path")
_TABLES, _TARS = (".parquet", ".pq"), (".tar",)


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one input.

    Attributes:
        number: from 0 on. source: the file, as rows name it; of picture files the first. path: where it lies.
        kind: `parquet`, `tar` or `pictures`. first: number of its first row (0 in pictures).
        rows: how many; None for a tar, which is one block and is not read before.
        groups: first and last + 1 of the row groups of a parquet file. files: of pictures, source and path of each.
        digest: of the input's identity, and which part of it this is.
    """

    number: int
    source: str
    path: str
    kind: str
    first: int
    rows: int | None
    digest: str
    groups: tuple[int, int] = (0, 0)
    files: tuple[tuple[str, str], ...] = ()

    def as_json(self) -> str:
        """As text, which any process can read."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Block:
        """What `as_json` gave."""
        values = json.loads(text)
        values["groups"] = tuple(values["groups"])
        return cls(**{**values, "files": tuple((source, path) for source, path in values["files"])})


@dataclass
class Row:
    """One picture of a data set.

    Attributes:
        source, row: which it is. picture: its name, where it has one. cell: what `read_image` takes.
        kept: the columns that go through. error: why it has no answer. digest: of the picture's content.
    """

    source: str
    row: int
    picture: str | None
    cell: Any
    kept: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    digest: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        inside = f"/{self.picture}" if self.picture and self.picture != self.source else ""
        number = "" if self.picture else f" row {self.row}"
        return f"'{visible(self.source + inside)}'{number}"


@dataclass(frozen=True)
class Inputs:
    """What is to be read.

    Attributes:
        files: source, kind, bytes and digest of each. blocks: all of them. column: of the pictures in parquet files.
        kept: the columns that go through, by name, with the type that pyarrow gives them (tars: text).
        class_names: of kept columns that are class labels.
    """

    files: list[dict[str, Any]]
    blocks: list[Block]
    column: str | None
    kept: dict[str, Any]
    class_names: dict[str, list[str]]

    @property
    def digest(self) -> str:
        """Of all inputs and of how they are cut."""
        return digest_of(block.digest.encode() for block in self.blocks)


def find_inputs(
    sources: Any, rows_per_block: int = ROWS_PER_BLOCK, column: str | None = None, keep: Sequence[str] = ()
) -> Inputs:
    """Cut data into blocks; reads the ends of files, and no picture.

    Args:
        sources: a parquet file, a tar, a picture, a folder of one of these (searched in depth), or several of them.
        rows_per_block: about how many rows a block has; a parquet file is only cut between row groups, a tar never.
        column: of the pictures in parquet files: bytes, `{"bytes", "path"}`, or paths relative to the file; by default
            the only one that can be.
        keep: columns of parquet files that go through as they are; of tars, endings of members, such as `cls`.

    Raises:
        DataError: nothing to read, several kinds at once, or no such column, or several that may hold pictures.
        ConfigurationError: `rows_per_block` below 1.
    """
    if rows_per_block < 1:
        raise ConfigurationError(f"`rows_per_block` must be at least 1; got {rows_per_block}.")
    named = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found = _tables_and_tars([os.fsdecode(name) for name in named])
    kinds = {kind for kind, _ in found.values()}
    listing = list_images(named) if "pictures" in kinds or not found else None
    pictures = [] if listing is None else [file for file in listing.files if _suffix(file) not in _TABLES + _TARS]
    if len(kinds) > 1 or (pictures and kinds - {"pictures"}):
        raise DataError(
            f"There are {' and '.join(sorted(kinds | {'pictures'} if pictures else kinds))} in "
            f"{', '.join(map(visible, map(str, named)))}. Give the one or the other."
        )
    if kinds <= {"pictures"} and not pictures:
        raise DataError(
            f"There is nothing to read in {', '.join(visible(str(name)) for name in named)}: no parquet file, no "
            f".tar and no picture ({', '.join(sorted(IMAGE_EXTENSIONS)[:6])}, ...)."
        )
    if pictures:
        if column or keep:
            raise DataError("Picture files have no columns: leave image_column and keep out.")
        return _of_pictures(pictures, named, rows_per_block)
    if kinds == {"tar"}:
        return _of_tars(found, keep)
    return _of_tables(found, rows_per_block, column, keep)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _kind(name: str) -> str | None:
    ending = _suffix(name)
    return "parquet" if ending in _TABLES else "tar" if ending in _TARS else "pictures" if is_picture(name) else None


def _tables_and_tars(named: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Source name to kind and path, sorted; of picture files one for all."""
    found: dict[str, tuple[str, str]] = {}
    closed: list[str] = []
    for place in named:
        if is_address(place) or not os.path.isdir(place):
            if not is_address(place) and not os.path.exists(place):
                raise DataError(f"There is no file or folder {visible(place)}.")
            inside, root = [(_kind(place) or "pictures", place)], os.path.dirname(place)
        else:
            below = sorted(walk(place))
            closed += [f"{os.path.join(place, one.name)} ({one.reason})" for one in below if one.kind == "closed"]
            files = [os.path.join(place, one.name) for one in below if one.kind in ("file", "odd")]
            inside, root = [(kind, path) for path in files if (kind := _kind(path)) is not None], place
        for kind, path in inside:
            source = path if len(named) > 1 or is_address(path) else os.path.relpath(path, root or ".")
            if kind == "pictures":  # there are some; which, `list_images` says
                found.setdefault("", (kind, path))
            elif found.setdefault(as_utf8(source), (kind, _absolute(path)))[1] != _absolute(path):
                raise DataError(f"Two inputs are called {visible(source)}.")
    if closed and set(found) - {""}:  # of pictures, each such folder is a row that says so
        raise DataError(f"Files may be missing: {visible(closed[0])}. Make it readable, or name the files to read.")
    return dict(sorted(found.items()))


def _identity(path: str) -> dict[str, Any]:
    """Size of a file, and a digest of its start and its end: enough to notice another file, not a flipped bit."""
    try:
        size, digest = os.path.getsize(path), hashlib.sha256()
        with open(path, "rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(_ENDS, size - _ENDS))
            digest.update(stream.read(_ENDS))
    except OSError as error:
        raise DataError(f"{visible(path)} cannot be read: {error.strerror or error}.") from error
    return {"bytes": size, "ends_sha256": digest.hexdigest()}


def _part(identity: Mapping[str, Any], source: str, *where: Any) -> str:
    return digest_of([json.dumps([source, identity, *where], sort_keys=True).encode()])


# ---------------------------------------------------------------------- picture files


def _of_pictures(files: Sequence[str], named: Sequence[Any], rows_per_block: int) -> Inputs:
    root = os.fsdecode(named[0]) if len(named) == 1 and os.path.isdir(named[0]) else None
    pairs = [
        (as_utf8(path if root is None else os.path.relpath(path, root)), path if is_address(path) else _absolute(path))
        for path in files
    ]
    blocks = []
    for number, start in enumerate(range(0, len(pairs), rows_per_block)):
        some = tuple(pairs[start : start + rows_per_block])
        digest = _part({"files": [[source, *size_and_time(path)] for source, path in some]}, some[0][0])
        blocks.append(Block(number, some[0][0], some[0][1], "pictures", 0, len(some), digest, files=some))
    facts = {"kind": "pictures", "rows": len(pairs), "blocks": len(blocks)}
    return Inputs([{"source": root or "", **facts}], blocks, None, {}, {})


def _absolute(path: str) -> str:
    return os.path.join(os.getcwd(), path)  # not `abspath`: `..` after a link leads elsewhere


# ---------------------------------------------------------------------- tars


def _of_tars(found: Mapping[str, tuple[str, str]], keep: Sequence[str]) -> Inputs:
    import pyarrow as pa

    files, blocks = [], []
    for number, (source, (_, path)) in enumerate(found.items()):
        identity = _identity(path)
        files.append({"source": source, "kind": "tar", **identity})
        blocks.append(Block(number, source, path, "tar", 0, None, _part(identity, source)))
    return Inputs(files, blocks, None, {name: pa.string() for name in keep}, {})


def _tar_rows(block: Block, keep: Sequence[str]) -> Iterator[Row]:
    """Samples of a shard in the order of their keys: the first picture of each, and members beside it."""
    listing = ArchiveListing(Path(block.path))
    samples: dict[str, dict[str, str]] = {}
    for name in listing.files:
        folder, slash, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        samples.setdefault(f"{folder}{slash}{key}", {})[ending.lower()] = name
    number = 0
    for key in sorted(samples):
        endings = samples[key]
        picture = next((name for _, name in sorted(endings.items()) if is_picture(name)), None)
        if picture is None:
            continue
        kept = {
            name: listing.read(endings[name]).decode("utf-8", "backslashreplace").strip() if name in endings else None
            for name in keep
        }
        row = Row(block.source, number, as_utf8(picture), None, kept)
        try:
            row.cell = {"bytes": listing.read(picture), "path": picture}
        except DataError as error:
            row.error = str(error)
        yield row
        number += 1


# ---------------------------------------------------------------------- parquet


def _of_tables(
    found: Mapping[str, tuple[str, str]], rows_per_block: int, column: str | None, keep: Sequence[str]
) -> Inputs:
    files: list[dict[str, Any]] = []
    blocks: list[Block] = []
    kept: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for source, (_, path) in found.items():
        opened = _opened(path)
        schema, identity = opened.schema_arrow, _identity(path)
        column = _column_of(schema, column, source)
        for name in keep:
            if name not in schema.names:
                raise DataError(f"{visible(source)} has no column {visible(name)!r}; it has {_listed(schema.names)}.")
            if kept.setdefault(name, schema.field(name).type) != schema.field(name).type:
                raise DataError(f"The column {visible(name)!r} has another type in {visible(source)} than before.")
        names |= _class_names(schema, keep)
        meta, start, row, count = opened.metadata, 0, 0, 0
        before = len(blocks)
        for group in range(meta.num_row_groups):
            count += meta.row_group(group).num_rows
            if count >= rows_per_block or group == meta.num_row_groups - 1:
                digest = _part(identity, source, start, group + 1)
                groups = (start, group + 1)
                blocks.append(Block(len(blocks), source, path, "parquet", row, count, digest, groups))
                start, row, count = group + 1, row + count, 0
        rows = {"rows": meta.num_rows, "blocks": len(blocks) - before}
        files.append({"source": source, "kind": "parquet", **identity, **rows})
    if not blocks:
        raise DataError("The parquet files hold no rows.")
    return Inputs(files, blocks, column, kept, names)


def _opened(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{visible(path)} is no readable parquet file: {error}") from error


def _column_of(schema: Any, wanted: str | None, source: str) -> str:
    """The column of pictures: the one that was named, else the only one of bytes, else the only one of paths."""
    import pyarrow.types as types

    def is_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return "bytes" in [inner.name for inner in kind]
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_text(kind: Any) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind))

    if wanted is not None:
        if wanted not in schema.names or not (
            is_bytes(schema.field(wanted).type) or is_text(schema.field(wanted).type)
        ):
            raise DataError(
                f"{visible(source)} has no column {visible(wanted)!r} of pictures (bytes) or paths; it has "
                f"{_listed(schema.names)}."
            )
        return wanted
    content = [name for name in schema.names if is_bytes(schema.field(name).type)]
    paths = [name for name in schema.names if is_text(schema.field(name).type) and name.lower() in _PATH_NAMES]
    for candidates, usual in ((content, _PICTURE_NAMES), (paths, _PATH_NAMES)):
        likely = [name for name in candidates if name.lower() in usual]
        if len(candidates) == 1 or len(likely) == 1:
            return str((likely if len(likely) == 1 else candidates)[0])
        if candidates:
            raise DataError(
                f"Which column of {visible(source)} holds the pictures: {_listed(candidates)}? Name it with "
                "image_column (--image-column)."
            )
    raise DataError(
        f"{visible(source)} has no column of pictures (bytes) or of paths called {', '.join(_PATH_NAMES)}; it has "
        f"{_listed(schema.names)}. Name it with image_column (--image-column)."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(visible(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _class_names(schema: Any, keep: Sequence[str]) -> dict[str, list[str]]:
    """Names of kept class labels, as `datasets` writes them into a file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: list(map(str, found)) for name in keep if (found := features[name].get("names"))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _table_rows(block: Block, column: str, keep: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa

    folder, number = os.path.dirname(block.path), block.first
    columns = list(dict.fromkeys([column, *keep]))
    try:
        for batch in _opened(block.path).iter_batches(_READ, range(*block.groups), columns):
            others = {name: batch.column(name) for name in keep}
            for place, value in enumerate(batch.column(column)):
                cell, picture, error = _cell(value.as_py(), folder)
                kept = {name: values[place].as_py() for name, values in others.items()}
                yield Row(block.source, number, picture, cell, kept, error)
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{visible(block.source)} is damaged after row {number}: {error}") from error


def _cell(value: Any, folder: str) -> tuple[Any, str | None, str | None]:
    """What `read_image` takes of a cell, the picture's name, and what is wrong with it."""
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    content = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if content is not None:
        return {"bytes": content, "path": path}, path, None
    if not path:
        return None, None, "the cell is empty: neither bytes nor a path."
    if is_address(path):  # whoever wrote the table would decide what this machine asks of which other
        return None, path, "it is an address, which is not fetched for a table. Download the pictures first."
    return os.path.join(folder, path), path, None


# ---------------------------------------------------------------------- any block


def read_rows(block: Block, column: str | None, keep: Sequence[str]) -> Iterator[Row]:
    """The rows of a block in their order, read as they are asked for.

    Raises:
        DataError: its file is damaged.
    """
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        "parquet": lambda: _table_rows(block, str(column), keep),
        "tar": lambda: _tar_rows(block, keep),
        "pictures": lambda: (Row(source, 0, source, path) for source, path in block.files),
    }
    return readers[block.kind]()
