"""WebDataset shards: tar files of `key.jpg` beside `key.cls`, `key.txt` or `key.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from .account import LeftOut, printable, shorten
from .archives import ArchiveListing
from .cells import JoinedCells
from .listing import is_picture, pictures_left_out
from .reading import Reading, SplitReading, split_name

_LABELS = ("cls", "class", "label", "cls.txt", "class.txt", "label.txt", "json", "txt")
_JSON_NAMES = ("label", "class", "cls", "category", "class_name", "label_name", "target")


def is_shard(listing: ArchiveListing) -> bool:
    """Whether most pictures of a tar have a label of their own beside them.

    Where all pictures lie in folders, a `.txt` beside one holds boxes or a caption, and the folders are classes.
    """
    if listing.kind != "tar":
        return False
    pictures = {_key(name)[0] for name in listing.pictures()}
    folders = {key.rpartition("/")[0] for key in pictures}
    divided = len(folders) > 1 and "" not in folders
    labelled = {_key(name)[0] for name in listing.files if _key(name)[1] in _LABELS[: -1 if divided else None]}
    return bool(pictures) and 2 * len(pictures & labelled) > len(pictures)


def _key(name: str) -> tuple[str, str]:
    """What the files of one sample share, and the rest: `a/0001.seg.png` as `a/0001` and `seg.png`."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def read_shards(shards: Sequence[ArchiveListing], label_column: str | None) -> Reading:
    """Splits and labels of shards; a shard's split is in its name (`train-0001.tar`), else it is for training.

    Args:
        label_column: the ending that holds the label (`cls`), or a field of the `json` files.

    Raises:
        DataError: no label in any of them, or several that differ.
    """
    by_split: dict[str, list[tuple[ArchiveListing, list[str], list[Any]]]] = {}
    left_out: list[LeftOut] = []
    used: set[str] = set()
    for shard in shards:
        samples: dict[str, dict[str, str]] = {}
        for name in shard.files:
            key, ending = _key(name)
            samples.setdefault(key, {})[ending] = name
        pictures, labels, others = [], [], []
        for key in sorted(samples):
            endings = samples[key]
            images = [name for name in endings.values() if is_picture(name)]
            others += [name for ending, name in endings.items() if name not in images[:1] and ending not in _LABELS]
            if images:
                label, source = _label(shard, endings, label_column)
                pictures.append(images[0])
                labels.append(label)
                used |= {source} if source else set()
        left_out += [*shard.left_out, *pictures_left_out(others)]
        split = split_name(re.sub(r"\.tar$", "", shard.name, flags=re.IGNORECASE)) or "train"
        by_split.setdefault(split, []).append((shard, pictures, labels))
    if len(used) > 1:
        raise DataError(f"Labels are in {shorten(sorted(used))}, not in one place. Name it with label_column=.")
    reading = Reading("WebDataset shards", [], left_out)
    for split, parts in by_split.items():
        cells = JoinedCells([shard.cells(pictures) for shard, pictures, _ in parts])
        labels = [label for _, _, inside in parts for label in inside]
        origin = parts[0][0].name if len(parts) == 1 else f"{len(parts)} shards"
        reading.splits.append(SplitReading(split, origin, None, cells, labels))
    distinct = {label for split in reading.splits for label in split.labels if label is not None}
    count = sum(len(split) for split in reading.splits)
    if used == {"txt"} and len(distinct) > max(20, count // 2):
        raise DataError(
            f"The .txt files look like captions, not classes: {len(distinct)} texts for {count} pictures, such "
            f"as {shorten(sorted(distinct), 1)}. Name where the label is with label_column=."
        )
    if used:
        reading.notes.append(f"Labels are read from {next(iter(used))}.")
    return reading


def _label(shard: ArchiveListing, endings: dict[str, str], wanted: str | None) -> tuple[Any, str | None]:
    """The label of one sample and where it was, or None twice."""
    for ending in _LABELS if wanted is None or wanted not in endings else (wanted,):
        if ending not in endings:
            continue
        content = shard.read(endings[ending])
        try:
            text = content.decode("utf-8-sig").strip()
            if ending != "json":
                if wanted is None or wanted == ending:
                    return (int(text) if re.fullmatch(r"-?\d+", text) else text or None), ending
                continue
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"{endings[ending]} in {shard.name} is no label: {error}") from error
        fields = [wanted] if wanted is not None else [name for name in _JSON_NAMES if isinstance(value, dict)]
        for field in fields:
            if isinstance(value, dict) and field in value:
                if isinstance(value[field], (list, dict)):
                    raise DataError(
                        f"{endings[ending]} in {shard.name}: the field {field!r} is no label but "
                        f"{printable(value[field])}; one class a picture is needed. Name its field with label_column=."
                    )
                return value[field], f"json field {field!r}"
    return None, None
