"""What a source of data was read as: which folders became which splits and classes, and what was left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..tables import visible

_MOST_CLASSES = 100  # beyond it, an account names the smallest and the largest classes only
_MOST_NOTES = 50
_LONGEST = 200
_USES = {"train": "to train on", "held out": "held out to measure on", "measured": "to measure on"}


@dataclass(frozen=True)
class SplitAccount:
    """One split as it was read.

    Attributes:
        name: `train`, `validation`, `test` or the source's own name.
        origin: where it comes from inside the source, such as `Train/` or `labels.csv`.
        use: `"train"`, `"held out"` (of a training), `"measured"` (by an evaluation) or `"not used"`.
        classes: number of pictures per class name, in class order; empty where pictures have no labels.
        unlabelled: number of pictures without a label.
    """

    name: str
    origin: str = ""
    use: str = "not used"
    classes: Mapping[str, int] = field(default_factory=dict)
    unlabelled: int = 0

    @property
    def pictures(self) -> int:
        """Number of pictures, with and without a label."""
        return sum(self.classes.values()) + self.unlabelled


@dataclass(frozen=True)
class LeftOut:
    """What was not used, and why: a count and the first few names."""

    reason: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Account:
    """How a source was read: see `load_training_data`.

    Attributes:
        source: the Hub id, or the last part of a path.
        kind: what it was taken for, such as `class folders` or `table`.
        splits: every split, also those that are not used.
        left_out: files, rows and classes that were not used.
        class_pairs: label in the source to class name, where they differ.
        notes: what else a reader should know, one sentence each.
    """

    source: str
    kind: str
    splits: tuple[SplitAccount, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    class_pairs: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The account for JSON, of bounded size however many classes and files there are."""
        pairs = dict(list(self.class_pairs.items())[:_MOST_CLASSES])
        return {
            "source": printable(self.source),
            "kind": self.kind,
            "splits": [_split_dict(split) for split in self.splits[:_MOST_NOTES]],
            "left_out": [
                {"reason": printable(row.reason), "count": row.count, "examples": [*map(printable, row.examples[:5])]}
                for row in self.left_out[:_MOST_NOTES]
            ],
            "class_pairs": {printable(label): printable(name) for label, name in pairs.items()},
            "notes": [printable(note) for note in self.notes[:_MOST_NOTES]],
        }

    def lines(self) -> list[str]:
        """The account for people, one fact a line."""
        lines = [f"{printable(self.source)}: {self.kind}"]
        for split in self.splits:
            counts = list(split.classes.values())
            use = _USES.get(split.use, split.use)
            origin = f" from {printable(split.origin)}" if split.origin not in ("", split.name) else ""
            text = f"{printable(split.name)}{origin}: {_count(split.pictures, 'picture')}"
            if counts:
                few, many = min(counts), max(counts)
                each = f"{few}" if few == many else f"{few} to {many}"
                text += f" of {len(counts)} {'class' if len(counts) == 1 else 'classes'}, {each} a class"
            if split.unlabelled:
                text += f", {split.unlabelled} without a label"
            lines.append(f"  {text}; {use}")
        train = next((split for split in self.splits if split.use == "train"), None)
        if train is not None:
            shown = [f"{printable(name)} ({count})" for name, count in list(train.classes.items())[:20]]
            more = f", and {len(train.classes) - 20} more" if len(train.classes) > 20 else ""
            lines.append(f"  classes: {', '.join(shown)}{more}")
        if self.class_pairs:
            pairs = [f"{printable(label)} = {printable(name)}" for label, name in list(self.class_pairs.items())[:20]]
            more = f", and {len(self.class_pairs) - 20} more" if len(self.class_pairs) > 20 else ""
            lines.append(f"  names: {', '.join(pairs)}{more}")
        for row in self.left_out:
            examples = f": {', '.join(map(printable, row.examples[:5]))}" if row.examples else ""
            more = ", ..." if row.examples and row.count > len(row.examples[:5]) else ""
            lines.append(f"  left out, {printable(row.reason)}: {row.count}{examples and f' ({examples[2:]}{more})'}")
        lines += [f"  {printable(note)}" for note in self.notes]
        return lines


def _split_dict(split: SplitAccount) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": printable(split.name), "origin": printable(split.origin), "use": split.use,
        "pictures": split.pictures, "unlabelled": split.unlabelled, "num_classes": len(split.classes),
    }  # fmt: skip
    if len(split.classes) <= _MOST_CLASSES:
        value["classes"] = {printable(name): count for name, count in split.classes.items()}
    else:
        by_count = sorted(split.classes.items(), key=lambda item: item[1])
        value["smallest_classes"] = {printable(name): count for name, count in by_count[:10]}
        value["largest_classes"] = {printable(name): count for name, count in by_count[-10:]}
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: object) -> str:
    """Text of a file, a table or another person that is safe to show: no control characters, at most 200 long."""
    cleaned = visible(str(text)[: _LONGEST + 1])
    return cleaned if len(cleaned) <= _LONGEST else f"{cleaned[: _LONGEST - 3]}..."


def shorten(names: Iterable[object], most: int = 5) -> str:
    """The first few names of many, for a message."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(printable(name) for name in listed[:most]) + more


class Duplicates(NamedTuple):
    """Pictures of the same content.

    Attributes:
        conflicting: groups of positions in the first set with one content and more than one label.
        repeated: groups of positions in the first set with one content and one label.
        shared: pairs of positions, in the first set and in the second, with one content.
    """

    conflicting: list[tuple[int, ...]]
    repeated: list[tuple[int, ...]]
    shared: list[tuple[int, int]]


def duplicates(
    digests_a: Sequence[str],
    labels_a: Sequence[int],
    digests_b: Sequence[str] | None = None,
    labels_b: Sequence[int] | None = None,
) -> Duplicates:
    """Find pictures with the same content.

    Args:
        digests_a: digest of each of N training pictures. labels_a: their N class ids.
        digests_b: digest of each of M held-out pictures, or None. labels_b: their M class ids; a picture that is
            in both sets is named whatever its labels are.

    Raises:
        ValueError: digests and labels differ in number.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for position, (digest, _) in enumerate(zip(digests_a, labels_a, strict=True)):
        places[digest].append(position)
    groups = [tuple(group) for group in places.values() if len(group) > 1]
    conflicting = [group for group in groups if len({int(labels_a[position]) for position in group}) > 1]
    repeated = [group for group in groups if len({int(labels_a[position]) for position in group}) == 1]
    if labels_b is not None and digests_b is not None and len(labels_b) != len(digests_b):
        raise ValueError(f"There are {len(digests_b)} digests and {len(labels_b)} labels.")
    shared = [(places[digest][0], position) for position, digest in enumerate(digests_b or ()) if places.get(digest)]
    return Duplicates(conflicting, repeated, shared)
