"""Open any source of labelled pictures as named splits, divided by lists such as `meta/train.txt` where it has them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetsError

from ..errors import DataError, TaskResError
from ..storage import is_path
from ..tables import visible
from .folders import EXPECTED, NoClassFoldersError, read_folders, refuse_parts
from .labelled import is_missing, name_classes
from .listing import (
    ARCHIVE_ENDINGS,
    ArchiveCells,
    ArchiveListing,
    FolderListing,
    Listing,
    is_archive,
    is_picture,
    is_shard,
    pictures_left_out,
    read_shards,
    suffix,
)
from .multi_label import MultiLabel
from .reading import (
    FileCells,
    LeftOut,
    Reading,
    SplitReading,
    of_loaded,
    of_saved,
    printable,
    reading_of,
    shorten,
    split_name,
)
from .tables import (
    TABLE_ENDINGS,
    MissingPicturesError,
    Paths,
    Table,
    TableOptions,
    join_tables,
    parse_table,
    read_table,
    table_from_frame,
)

_ENDINGS = (".txt", ".csv", ".lst")


def divide_by_lists(listing: Listing, reading: Reading) -> None:
    """Divide the only split of a reading of class folders, where lists of a training and another split lie beside it.

    Raises:
        DataError: several lists for one split, or a picture in more than one.
    """
    (whole,) = reading.splits
    everything = listing.cells(listing.pictures())
    assert isinstance(whole.cells, (FileCells, ArchiveCells))
    assert isinstance(everything, (FileCells, ArchiveCells))
    rows = {name: row for row, name in enumerate(whole.cells.names)}
    found: dict[str, dict[str, list[str]]] = {}
    paths = Paths(listing, "")
    for name in listing.files:
        split = split_name(PurePosixPath(name).stem)
        if split is not None and suffix(name) in _ENDINGS and name.count("/") < 3:
            files = _pictures_of(listing, name, paths)
            if files:
                found.setdefault(split, {})[name] = files
    if "train" not in found or len(found) < 2:
        return
    advice = "Move the others away, or read the folders alone with class_folder='first' (--class-folder first)."
    several = next((lists for lists in found.values() if len(lists) > 1), None)
    if several:
        raise DataError(f"{listing.name} holds several lists of one split: {shorten(several)}. {advice}")
    parts = {split: next(iter(lists.items())) for split, lists in found.items()}
    named: dict[str, str] = {}
    for origin, files in parts.values():
        twice = next((file for file in files if named.setdefault(file, origin) != origin), None)
        if twice is not None:
            raise DataError(f"{twice} is named in {named[twice]} and in {origin}. {advice}")
    reading.splits = []
    for split, (origin, files) in parts.items():
        cells = listing.cells(list(dict.fromkeys(files)))
        assert isinstance(cells, (FileCells, ArchiveCells))
        mine = sorted(rows.pop(file) for file in cells.names if file in rows)
        labels = [whole.labels[row] for row in mine]
        reading.splits.append(SplitReading(split, origin, None, whole.cells.select(mine), labels))
    reading.notes.append(f"Which picture is of which split is read from {shorten(o for o, _ in parts.values())}.")
    if rows:
        relative = dict(zip(everything.names, listing.pictures(), strict=True))
        examples = tuple(relative[name] for name in list(rows)[:5])
        reading.left_out.append(LeftOut("pictures that no list of a split names", len(rows), examples))


def _pictures_of(listing: Listing, name: str, paths: Paths) -> list[str]:
    """The pictures that a list names, one a line; none where it is something else."""
    try:
        lines = listing.read(name).decode("utf-8-sig").splitlines()
        values = [line.strip() for line in lines if line.strip()]
        return paths.find(Table(name, {"path": values}, list(range(1, len(values) + 1))), "path")[0]
    except (DataError, UnicodeDecodeError):
        return []


READABLE = (
    "Readable are folders of pictures, tables (.csv, .tsv, .txt, .json, .jsonl, .parquet), archives (.zip, .tar, "
    ".tar.gz), folders of save_to_disk, and Hub dataset ids."
)
_SHARD = re.compile(r"-\d+-of-\d+$")
_MOST_COPIED = 1 << 30  # bytes of an archive's pictures that `load_splits` holds in memory


@dataclass(frozen=True)
class SourceOptions:
    """What a caller says about a source; see `load_training_data`."""

    config_name: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    class_folder: str | None = None
    class_names: Any = None
    multi_label: MultiLabel | None = None
    texts: bool = False

    @property
    def columns(self) -> TableOptions:
        return TableOptions(self.image_column, self.label_column, self.multi_label, self.class_names)

    def folders(self, listing: Listing) -> Reading:
        names = getattr(self.class_names, "names", self.class_names) or ()
        if isinstance(names, Mapping):  # label to name, or name to label
            names = [str(text) for pair in names.items() for text in pair]
        return read_folders(
            listing, train_split=self.train_split, eval_split=self.eval_split, class_folder=self.class_folder,
            class_names=[name for name in names if isinstance(name, str)],
        )  # fmt: skip


def read_source(source: Any, options: SourceOptions) -> Reading:
    """What is in a source; see `load_training_data`.

    Raises:
        DataError: nothing readable, or more than one way to read it.
    """
    if options.class_folder not in (None, "first", "last"):
        raise DataError(f"class_folder must be 'first' or 'last'; got {options.class_folder!r}.")
    loaded = of_loaded(source)
    if loaded is not None:
        return loaded
    if type(source).__name__ == "DataFrame" and hasattr(source, "columns"):
        here = FolderListing(Path.cwd(), scan=False)
        return read_table(table_from_frame(source), Paths(here, ""), options.columns)
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"A source of type {type(source).__name__} cannot be read. {READABLE}")
    if not is_path(source):
        return from_hub(str(source), options)
    path = Path(os.fspath(source)).expanduser()
    if path.is_dir():
        return _read_folder(path, options)
    if path.is_file():
        return _read_file(path, options)
    raise DataError(f"There is no dataset at {printable(path)}: no such file or folder. {READABLE}")


def from_hub(name: str, options: SourceOptions) -> Reading:
    try:
        loaded = load_dataset(
            name, options.config_name, revision=options.revision, token=options.token, cache_dir=options.cache_dir
        )
    except TaskResError:
        raise
    except Exception as error:  # the Hub client's own type stays; only what was asked for is added
        first = f"The dataset {name!r} (source, --dataset) is no path on this machine and cannot be read from the Hub"
        error.args = (f"{first}: {error}", *error.args[1:])
        raise
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    return reading_of(splits, "dataset of the Hub")


# ---------------------------------------------------------------------- files


def _read_file(path: Path, options: SourceOptions) -> Reading:
    ending = suffix(path.name)
    if ending in (".parquet", ".pq") and _holds_pictures(path):
        split = split_name(path.stem) or "train"
        part = _load_parquet([str(path)], "train", options)
        return Reading("parquet", [SplitReading(split, path.name, part)])
    if ending in TABLE_ENDINGS:
        beside = FolderListing(path.absolute().parent, scan=False)
        split = split_name(path.stem) or "train"
        return read_table(parse_table(path.name, _content(path)), Paths(beside, ""), options.columns, split)
    if is_archive(path):
        return _read_archive(ArchiveListing(path), options)
    if ending in (".7z", ".rar"):
        raise DataError(f"{printable(path)} is an archive of a kind that is not read here: unpack it. {READABLE}")
    if ending in ARCHIVE_ENDINGS:
        raise DataError(f"The archive {printable(path)} is damaged or incomplete: it is neither a zip nor a tar.")
    if is_picture(path.name):
        raise DataError(f"{printable(path)} is one picture. {EXPECTED}")
    extra = " Save a spreadsheet as CSV." if ending in (".xlsx", ".xls", ".ods") else ""
    raise DataError(f"The file {printable(path)} is of no kind that can be read here. {READABLE}{extra}")


def _load_parquet(paths: Sequence[str], split: str, options: SourceOptions) -> Dataset:
    try:
        return load_dataset("parquet", data_files={split: list(paths)}, split=split, cache_dir=options.cache_dir)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{printable(paths[0])} cannot be read as parquet: {error}") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error


def _read_archive(listing: ArchiveListing, options: SourceOptions) -> Reading:
    reading = read_shards([listing], options.label_column) if is_shard(listing) else _read_listing(listing, options)
    reading.kind = f"{listing.kind} archive of {reading.kind}" if "shards" not in reading.kind else reading.kind
    return reading


def _holds_pictures(path: Path) -> bool:
    """Whether a parquet file holds pictures themselves, not only their paths."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{printable(path)} is no readable parquet file: {error}") from error
    if '"Image"' in str((schema.metadata or {}).get(b"huggingface", b"")):
        return True
    return any(_may_be_pictures(kind) for kind in schema.types)


def _may_be_pictures(kind: Any) -> bool:
    """Bytes, `{"bytes", "path"}`, or rows of pixels; a list of numbers is an embedding or several labels."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return bool(types.is_nested(kind.value_type))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


# ---------------------------------------------------------------------- folders


def _read_folder(path: Path, options: SourceOptions) -> Reading:
    saved = of_saved(path)
    if saved is not None:
        return saved
    listing = FolderListing(path)
    parquet = [name for name in listing.files if suffix(name) == ".parquet" and _holds_pictures(path / name)]
    if parquet and listing.pictures():
        raise DataError(
            f"{printable(path)} holds pictures in parquet files ({shorten(parquet, 2)}) and {len(listing.pictures())} "
            "picture files. Give the one or the other: a parquet file, or a folder without them."
        )
    if parquet:
        return _read_parquet_files(path, parquet, options)
    if not listing.pictures():
        tars = [name for name in listing.files if suffix(name) == ".tar"]
        shards = [ArchiveListing(path / name) for name in tars]
        if shards and all(is_shard(shard) for shard in shards):
            return read_shards(shards, options.label_column)
    return _read_listing(listing, options)


def _read_parquet_files(path: Path, names: list[str], options: SourceOptions) -> Reading:
    above = sorted({str(PurePosixPath(name).parent) for name in names})
    one_set = [folder for folder in above if not split_name(PurePosixPath(folder).name)]
    if len(one_set) > 1 or len({str(PurePosixPath(folder).parent) for folder in above}) > 1:
        raise DataError(
            f"{printable(path)} holds parquet files in several folders ({shorten(above)}), perhaps several data sets. "
            "Give one of them."
        )
    files: dict[str, list[str]] = {}
    for name in names:
        stem = _SHARD.sub("", Path(name).stem)  # train.parquet, or train-00000-of-00002.parquet
        folder = PurePosixPath(name).parent.name
        if split_name(folder) and not split_name(stem):  # train/0000.parquet
            stem = folder
        split = re.sub(r"\W", "_", split_name(stem) or stem)
        files.setdefault(split, []).append(str(path / name))
    reading = Reading("parquet files", [])
    for split, paths in files.items():  # one by one: files of a folder may differ in columns
        part = _load_parquet(paths, split, options)
        reading.splits.append(SplitReading(split, shorten([Path(p).name for p in paths], 2), part))
    return reading


def _read_listing(listing: Listing, options: SourceOptions) -> Reading:
    """A folder or an archive: class folders, tables, or both where they agree."""
    tables, trouble = _tables(listing, options)
    folders, problem = None, None
    if options.multi_label is not None and tables is not None:  # folders say one label each
        return _with_rest(tables, listing)
    try:
        folders = options.folders(listing)
    except NoClassFoldersError as error:
        problem = error
    except DataError:
        if tables is None or options.label_column is None:
            raise
    if tables is None:
        tried = f" A table could not be used: {trouble}" if trouble else ""
        if folders is None:
            raise NoClassFoldersError(f"{problem or EXPECTED}{tried}")
        if trouble is not None and (options.label_column or options.multi_label):
            raise trouble
        if not (options.class_folder or options.class_names):
            refuse_parts(folders, tried)
        if len(folders.splits) == 1 and options.class_folder is None:
            divide_by_lists(listing, folders)
        if trouble is not None:
            folders.notes.append(f"A table is not used: {trouble}")
        return folders
    if folders is None:
        return _with_rest(tables, listing)
    agree = _same_classes(tables, folders)
    if not agree and not (options.label_column or options.class_folder):
        raise DataError(
            f"{listing.name} can be read in two ways: as {_described(tables)}, or as {_described(folders)}. "
            "Choose with label_column=... (--label-column) or class_folder='first' (--class-folder), or give the "
            "table itself as the source."
        )
    if (not agree and options.label_column) or (agree and len(tables.splits) > len(folders.splits)):
        return _with_rest(tables, listing)
    folders.notes.append(f"{tables.splits[0].origin} {'says the same' if agree else 'is not used'}.")
    return folders


def _tables(listing: Listing, options: SourceOptions) -> tuple[Reading | None, DataError | None]:
    """What the tables of a folder say, and why one says nothing."""
    names = [name for name in listing.files if suffix(name) in TABLE_ENDINGS and name.count("/") < 3]
    metadata = [name for name in names if Path(name).stem.lower() == "metadata"]
    found: dict[str, Reading] = {}
    trouble: DataError | None = None
    for name in metadata or [name for name in names if "/" not in name]:
        folder = str(PurePosixPath(name).parent) if "/" in name else ""
        parts = [PurePosixPath(name).stem, *reversed(PurePosixPath(name).parts[:-1])]
        split = next(filter(None, map(split_name, parts)), "train")
        try:
            table = parse_table(name, listing.read(name))
            found[name] = read_table(table, Paths(listing, folder), options.columns, split)
        except MissingPicturesError as error:
            if options.class_folder is None:
                raise
            trouble = error
        except DataError as error:
            if suffix(name) != ".txt":  # most are read-me files
                trouble = error
    if not any(not is_missing(label) for reading in found.values() for part in reading.splits for label in part.labels):
        return None, trouble
    splits = [split.name for reading in found.values() for split in reading.splits]
    if len(set(splits)) < len(splits):
        raise DataError(
            f"{listing.name} holds several tables of pictures and labels: {shorten(found)}. Give one of them as the "
            "source, or name them after their splits (train.csv, test.csv)."
        )
    return join_tables(found), trouble


def _described(reading: Reading) -> str:
    labels = sorted({str(label) for split in reading.splits for label in split.labels if not is_missing(label)})
    origins = shorten([split.origin or split.name for split in reading.splits], 3)
    count = sum(map(len, reading.splits))
    return f"{reading.kind} ({origins}: {count} pictures, {len(labels)} classes: {shorten(labels)})"


def _labels_by_file(reading: Reading) -> dict[str, Any]:
    return {
        os.path.normpath(name): label
        for split in reading.splits
        if isinstance(split.cells, (FileCells, ArchiveCells))
        for name, label in zip(split.cells.names, split.labels, strict=True)
    }


def _same_classes(one: Reading, other: Reading) -> bool:
    """Whether two readings have the same pictures (or splits) in the same groups, whatever the groups are called."""
    first, second = _labels_by_file(one), _labels_by_file(other)
    if not first.keys() <= second.keys():
        return False
    for split in other.splits:  # a table may speak of one split, such as train.csv, but not of a part of it
        inside = _labels_by_file(Reading("", [split])).keys() & first.keys()
        if inside and len(inside) < len(split):
            return False
    pairs = {(first[name], second[name]) for name in first}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _with_rest(reading: Reading, listing: Listing) -> Reading:
    """A table's reading, with what it does not name counted."""
    named = _labels_by_file(reading)
    cells = listing.cells(listing.pictures())
    assert isinstance(cells, (FileCells, ArchiveCells))
    relative = zip(cells.names, listing.pictures(), strict=True)
    rest = [name for cell, name in relative if os.path.normpath(cell) not in named]
    reading.left_out += listing.left_out
    if rest:
        reading.left_out.append(LeftOut("pictures that the table does not name", len(rest), tuple(rest[:5])))
    others = [name for name in listing.files if not is_picture(name) and suffix(name) not in TABLE_ENDINGS]
    reading.left_out += pictures_left_out(others)
    return reading


# ---------------------------------------------------------------------- as datasets


def load_splits(
    source: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Open a source as named splits of the `datasets` library; files give the columns `image` and `label`.

    Args:
        source: as for `load_training_data`.
        name: configuration of a Hub dataset.
        revision, token, cache_dir: as in `datasets.load_dataset`.

    Raises:
        DataError: as `load_training_data`; also an archive whose pictures do not fit into 1 GB of memory.
    """
    if isinstance(source, DatasetDict):
        return source
    options = SourceOptions(config_name=name, revision=revision, token=token, cache_dir=cache_dir)
    reading = read_source(source, options)
    every = [label for split in reading.splits for label in split.labels]
    feature: Any = Value("int64")
    ids: dict[Any, int] = {}
    if any(isinstance(label, str) for label in every):
        naming = name_classes(every, [], None, "labels")
        feature, ids = ClassLabel(names=naming.names), naming.ids
    splits = {}
    for split in reading.splits:
        if split.dataset is None:
            labels = [None if is_missing(label) else ids.get(label, label) for label in split.labels]
            columns = {"image": _as_values(split.cells), "label": labels}
            features = Features({"image": Image(), "label": feature})
            splits[split.name] = Dataset.from_dict(columns, features, split=split.name)
        else:
            splits[split.name] = split.dataset
    return DatasetDict(splits)


def _as_values(cells: Any) -> list[Any]:
    """Cells that a table can hold: paths, or the content of what has no path that is text."""
    values, size = [], 0
    for row in range(len(cells)):
        cell = cells[row]
        if isinstance(cell, str) and not cell.isascii() and cell != cell.encode("utf-8", "replace").decode("utf-8"):
            cell = {"bytes": _content(Path(cell)), "path": None}
        if isinstance(cell, dict):
            size += len(cell["bytes"])
            cell = {"bytes": cell["bytes"], "path": cell["path"] and visible(cell["path"])}
        if size > _MOST_COPIED:
            raise DataError(
                "The pictures of this archive do not fit into 1 GB as a dataset in memory. Use load_training_data, "
                "which reads each when it is needed, or unpack the archive."
            )
        values.append(cell)
    return values
