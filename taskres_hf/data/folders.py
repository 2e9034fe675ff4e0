"""What folders mean: which are splits, which are classes, which only hold the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import DataError
from .listing import Listing, is_picture, pictures_left_out
from .reading import LeftOut, Reading, SplitReading, is_wrapper, natural_key, shorten, split_name

_GENERIC = re.compile(
    r"[\W_\d]*(?:days?|weeks?|months?|years?|batch(?:es)?|sessions?|parts?|groups?|folds?|runs?|rounds?|trials?|scenes?|"
    r"videos?|clips?|seq(?:uences?)?|frames?|cam(?:era)?s?|views?|crops?|raw|orig(?:inal)?s?|new|old|misc|others?|"
    r"front|back|left|right|top|bottom|[a-z]?)[\W_\da-z]?[\W_\d]*",
    re.IGNORECASE,
)
_PART = re.compile(r"(?:.*[\W_])?(?:batch|chunk|fold|part|session|shard)(?:es|s)?[\W_]*\d+", re.IGNORECASE)
EXPECTED = (
    "Expected are class folders (cat/1.jpg, dog/2.jpg), split folders with class folders (train/cat/1.jpg, "
    "test/cat/2.jpg), or a table of path and label (labels.csv)."
)


class NoClassFoldersError(DataError):
    """There are pictures, but nothing in the folders says what they are; a table may."""


@dataclass
class Folder:
    """A folder of the tree: its own pictures and, below it, how many."""

    name: str = ""
    folders: dict[str, Folder] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    count: int = 0

    @property
    def filled(self) -> dict[str, Folder]:
        """The folders with a picture somewhere below."""
        return {name: inner for name, inner in self.folders.items() if inner.count}


def make_tree(listing: Listing) -> Folder:
    """The folders of a listing with their pictures."""
    root = Folder()
    for name in [*listing.files, *(f"{folder}/" for folder in listing.empty)]:
        picture = is_picture(name)
        here = root
        here.count += picture
        *above, _ = name.split("/")
        path = ""
        for part in above:
            path = f"{path}/{part}" if path else part
            here = here.folders.setdefault(part, Folder(path))
            here.count += picture
        if picture:
            here.pictures.append(name)
    return root


@dataclass
class _Choice:
    """What a caller said about folders."""

    train_split: str | None
    eval_split: str | None
    class_folder: str | None
    class_names: frozenset[str]


def read_folders(
    listing: Listing,
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    class_folder: str | None = None,
    class_names: Iterable[str] = (),
) -> Reading:
    """Splits and classes of a tree of folders.

    Args:
        train_split, eval_split: names of folders to take for splits; their neighbours are then left out.
        class_folder: `"first"` (below the split) or `"last"` (that holds the picture): which folder is the class.
        class_names: names a caller expects; they decide between two readings.

    Raises:
        NoClassFoldersError: pictures without class folders.
        DataError: no pictures, or more than one way to read the folders.
    """
    names = frozenset(_letters(name) for name in class_names)
    choice = _Choice(train_split, eval_split, class_folder, names)
    tree = make_tree(listing)
    if not tree.count:
        raise DataError(_nothing_there(listing))
    others = [name for name in listing.files if not is_picture(name)]
    left_out = [*listing.left_out, *pictures_left_out(others)]
    top = _unwrap(tree, choice)
    reading = Reading("class folders", [], left_out)
    splits = _split_folders(top, choice, reading)
    crossed = None if splits else _splits_below_classes(top, choice)
    if crossed:
        reading.kind = "class folders with split folders in them"
        for split, classes in crossed.items():
            reading.splits.append(_as_split(listing, split, split, classes))
        _leave_out_strays(top, reading)
    elif splits:
        reading.kind = "split folders with class folders"
        for folder, split in splits.items():
            _read_split(listing, split, top.filled[folder], choice, reading)
        if not any(any(label is not None for label in split.labels) for split in reading.splits):
            listed = shorten([f"{split.origin}" for split in reading.splits])
            raise NoClassFoldersError(f"{listing.name}: {listed} hold pictures without class folders. {EXPECTED}")
        reading.empty = sorted({name for folder in splits for name in _empty(_below(top.filled[folder]))})
        bare = [name for name, inner in top.folders.items() if not inner.count and split_name(name)]
        reading.notes += [f"The folder {name}/ holds no picture." for name in bare]
    else:
        classes = _classes(listing, top, choice, reading)
        origin = f"{top.name}/" if top.name else ""
        reading.splits.append(_as_split(listing, "train", origin, classes))
        reading.empty = _empty(top)
    return reading


def refuse_parts(reading: Reading, trouble: str) -> None:
    """Refuse `images_part_1`, `images_part_2` as classes, where nothing else says that they are.

    Raises:
        DataError: the name of every class folder is that of a part; `trouble` is added.
    """
    names = sorted({str(label) for split in reading.splits for label in split.labels if label is not None})
    if all(map(_PART.fullmatch, names)):
        raise DataError(
            f"{shorten(names)} look like parts of one set, not classes. If they are classes, say so with "
            f"class_folder='first' (--class-folder first); else give a table of path and label.{trouble}"
        )


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _nothing_there(listing: Listing) -> str:
    what = pictures_left_out(listing.files)
    found = "; it holds " + "; ".join(f"{row.count} {row.reason}" for row in what[:5]) if what else ""
    passed = "".join(f"; {row.count} {row.reason} ({shorten(row.examples, 3)})" for row in listing.left_out)
    return f"{listing.name} holds neither parquet files nor pictures{found}{passed}. {EXPECTED}"


def _unwrap(top: Folder, choice: _Choice) -> Folder:
    """The folder below those that only hold one other folder."""
    while not top.pictures and len(top.filled) == 1:
        (name, inner), *_ = top.filled.items()
        # day1, day2: a class in parts; but 0, 1 or A, B may well be classes.
        divided = inner.filled and all(_GENERIC.fullmatch(sub) and len(_letters(sub)) > 3 for sub in inner.filled)
        lone_class = not inner.filled or divided or (inner.pictures and len(inner.filled) < 2)
        if split_name(name) or name in (choice.train_split, choice.eval_split):
            break
        if lone_class and not is_wrapper(name):
            break
        top = inner
    return top


def _split_folders(top: Folder, choice: _Choice, reading: Reading) -> dict[str, str]:
    """Folder to split name; nothing where the folders are classes."""
    kids = top.filled
    wanted = {name: name for name in (choice.train_split, choice.eval_split) if name in kids and kids[name].filled}
    found = {name: wanted.get(name) or split_name(name) for name in kids}
    splits = {name: split_name(name) or split for name, split in found.items() if split}
    if not splits:
        return {}
    unknown = [name for name in kids if name not in splits]
    nested = {name for name in splits if kids[name].filled}
    if unknown and not wanted:
        if not nested and set(splits.values()) == {"train"} and len(splits) == 1:
            reading.notes.append(f"The folder {next(iter(splits))} is taken for a class, as its neighbours are.")
            return {}
        raise DataError(
            f"Folders of two kinds lie side by side. {shorten(splits)} would be splits, {shorten(unknown)} are not; "
            f"or all {len(kids)} are classes. Move what does not belong there, give the folder that holds only class "
            "folders, or name the splits: train_split=..., eval_split=... (--train-split, --eval-split)."
        )
    if unknown:
        count = sum(kids[name].count for name in unknown)
        reading.left_out.append(LeftOut(f"pictures in folders beside the splits ({shorten(unknown)})", count))
    if top.pictures:
        reading.left_out.append(
            LeftOut("pictures beside the split folders", len(top.pictures), tuple(top.pictures[:5]))
        )
    by_split: dict[str, list[str]] = {}
    for name, split in splits.items():
        by_split.setdefault(split, []).append(name)
    for split, names in by_split.items():
        if len(names) > 1:
            for name in names:
                if name in wanted:
                    splits[name] = name
            if len({splits[name] for name in names}) < len(names):
                raise DataError(
                    f"{shorten(names)} would all be the {split} split of {top.name or 'the source'}. Rename or move "
                    "one, or name the folders to use: train_split=..., eval_split=... (--train-split, --eval-split)."
                )
    return splits


def _below(folder: Folder) -> Folder:
    """Inside a split folder, the folder that holds the class folders: `train/images/cat`."""
    while not folder.pictures and len(folder.filled) == 1:
        (name, inner), *_ = folder.filled.items()
        repeated = name == folder.name.rsplit("/", 1)[-1]  # seg_train/seg_train/forest
        if not (is_wrapper(name) or split_name(name) or repeated):
            break
        folder = inner
    return folder


def _read_split(listing: Listing, split: str, top: Folder, choice: _Choice, reading: Reading) -> None:
    inner = _below(top)
    origin = f"{inner.name}/"
    if not inner.filled:
        cells = listing.cells(inner.pictures)
        reading.splits.append(SplitReading(split, origin, None, cells, [None] * len(inner.pictures)))
        return
    classes = _by_folder(inner, choice.class_folder or "first")
    _leave_out_strays(inner, reading)
    if (choice.class_folder or "first") == "first":
        _note_deeper(inner, reading)
    reading.splits.append(_as_split(listing, split, origin, classes))


def _as_split(listing: Listing, name: str, origin: str, classes: Mapping[str, list[str]]) -> SplitReading:
    files, labels = [], []
    for label in sorted(classes, key=natural_key):
        inside = sorted(classes[label])
        files += inside
        labels += [label] * len(inside)
    return SplitReading(name, origin, None, listing.cells(files), labels)


def _all_pictures(folder: Folder) -> list[str]:
    pictures, waiting = [], [folder]
    while waiting:
        here = waiting.pop()
        pictures += here.pictures
        waiting += here.filled.values()
    return pictures


def _by_folder(top: Folder, which: str) -> dict[str, list[str]]:
    """Class to pictures; the class is the first folder below `top`, or the last, that holds the picture."""
    if which == "first":
        return {name: _all_pictures(inner) for name, inner in top.filled.items()}
    classes: dict[str, list[str]] = {}
    for inner in top.filled.values():
        for picture in _all_pictures(inner):
            classes.setdefault(picture.split("/")[-2], []).append(picture)
    return classes


def _leave_out_strays(top: Folder, reading: Reading) -> None:
    if top.pictures:
        row = LeftOut("pictures beside the class folders", len(top.pictures), tuple(top.pictures[:5]))
        reading.left_out.append(row)


def _note_deeper(top: Folder, reading: Reading) -> None:
    deeper = sorted({name for inner in top.filled.values() for name in inner.filled})
    if deeper:
        reading.notes.append(f"Folders inside a class folder belong to its class: {shorten(deeper)}.")


def _empty(top: Folder) -> list[str]:
    return sorted(name for name, inner in top.folders.items() if not inner.count)


def _classes(listing: Listing, top: Folder, choice: _Choice, reading: Reading) -> dict[str, list[str]]:
    """Classes where there are no split folders."""
    if not top.filled:
        raise NoClassFoldersError(
            f"{listing.name} holds {top.count} pictures and nothing that says what they show. {EXPECTED}"
        )
    _refuse_splits_in_names(list(top.filled))
    which = choice.class_folder or _which_folder(top, choice)
    classes = _by_folder(top, which)
    if len(classes) < 2 and not choice.class_names & set(map(_letters, classes)):
        (name,) = classes
        inside = shorten(top.filled[name].filled) if name in top.filled else ""
        deeper = f"Folders inside it: {inside}; if those are the classes, give the folder {name}. " if inside else ""
        raise NoClassFoldersError(
            f"{listing.name} holds one class folder only, {name!r}; a classifier needs two. {deeper}{EXPECTED}"
        )
    _leave_out_strays(top, reading)
    if which == "first":
        _note_deeper(top, reading)
    else:
        reading.notes.append(f"The class is the folder that holds the picture, inside {shorten(top.filled)}.")
    return classes


def _refuse_splits_in_names(names: list[str]) -> None:
    """Refuse `train_cat, train_dog, test_cat, ...`: as classes, they would train on the test pictures."""
    found: dict[str, set[str]] = {}
    for name in names:
        first, _, after = re.sub(r"[\W_]+", " ", name).strip().partition(" ")
        before, _, last = re.sub(r"[\W_]+", " ", name).strip().rpartition(" ")
        split, rest = (split_name(first), after) if split_name(first) else (split_name(last), before)
        if split and rest:
            found.setdefault(split, set()).add(_letters(rest))
    shared = found.get("train", set()) & (found.get("test", set()) | found.get("validation", set()))
    if shared:
        raise DataError(
            f"The names of {shorten(names)} hold a split and a class each; or they are splits, or {len(names)} "
            "classes. Put them into split folders (train/cat, test/cat), so that no test picture is trained on, or "
            "name the splits: train_split=..., eval_split=... (--train-split, --eval-split)."
        )


def _which_folder(top: Folder, choice: _Choice) -> str:
    """Whether the class is the first folder or the last, where the names of folders can tell.

    Raises:
        DataError: both are possible.
    """
    kids = top.filled
    inner = [(name, sub) for name, kid in kids.items() for sub in kid.filled]
    tests = [f"{name}/{sub}" for name, sub in inner if split_name(sub) in ("test", "validation")]
    if tests:
        raise DataError(
            f"{shorten(tests)} look like test pictures inside class folders, and would be trained on. Put every class "
            "folder's pictures into split folders (cat/train, cat/test), or the splits above the classes (train/cat)."
        )
    if not inner or any(kid.pictures for kid in kids.values()):
        return "first"
    first, last = set(kids), {folder.rsplit("/", 1)[-1] for folder in _leaves(top)}
    if choice.class_names:
        fits = [{_letters(name) for name in names} <= choice.class_names for names in (first, last)]
        if fits[0] != fits[1]:
            return "first" if fits[0] else "last"
    telling = [
        sub for name, sub in inner
        if not (_GENERIC.fullmatch(sub) or is_wrapper(sub) or split_name(sub) or _letters(name) in _letters(sub))
    ]  # fmt: skip
    if not telling:
        return "first"
    raise DataError(
        f"The class folders can be read in two ways: as {len(first)} classes from the first folder "
        f"({shorten(sorted(first))}), or as {len(last)} classes from the folder that holds the picture "
        f"({shorten(sorted(last))}). Choose with "
        "class_folder='first' or class_folder='last' (--class-folder), or with class_names."
    )


def _leaves(top: Folder) -> list[str]:
    leaves, waiting = [], list(top.filled.values())
    while waiting:
        here = waiting.pop()
        if here.pictures:
            leaves.append(here.name)
        waiting += here.filled.values()
    return leaves


def _splits_below_classes(top: Folder, choice: _Choice) -> dict[str, dict[str, list[str]]] | None:
    """Split to class to pictures for `cat/train/1.jpg`, where every class folder is divided so."""
    kids = top.filled
    if len(kids) < 2 or choice.class_folder:
        return None
    crossed: dict[str, dict[str, list[str]]] = {}
    deeper = False
    for name, kid in kids.items():
        named = {sub: split_name(sub) for sub in kid.filled}
        if kid.pictures or not named or not all(named.values()) or len(set(named.values())) < len(named):
            return None
        for sub, split in named.items():
            crossed.setdefault(str(split), {})[name] = _all_pictures(kid.filled[sub])
            deeper = deeper or bool(kid.filled[sub].filled)
    if "train" not in crossed:
        return None
    if deeper or any(is_wrapper(name) for name in kids):
        raise DataError(
            f"Each of {shorten(kids)} holds split folders. They may be classes, or sets with classes inside. "
            f"Give one of them ({shorten(kids, 1)}) as the source, or put the splits above the classes (train/cat)."
        )
    return crossed
