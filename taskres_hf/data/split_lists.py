"""Lists of file names that divide class folders into splits, such as `meta/train.txt` and `meta/test.txt`."""

from __future__ import annotations

from pathlib import PurePosixPath

from ..errors import DataError
from .account import LeftOut, shorten
from .archives import ArchiveCells
from .cells import FileCells
from .listing import Listing, suffix
from .reading import Reading, SplitReading, split_name
from .tables import Paths, Table

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
