"""The six tasks of photographs, built from clones of the public repositories that hold them.

Which pictures the tables of docs/results.md use follows from no rule: a random draw decided it, and near-duplicates an
image network found. `PUBLISHED` keeps their row numbers, from which `build` makes those very tasks, byte for byte with
the same JPEG encoder. Without a draw it draws by a rule of its own: the same classes, the same number of pictures or
nearly, and the same groups kept apart.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from datasets import ClassLabel, Dataset, Features, Image

from taskres_hf.errors import DataError

SPLITS = ("train", "validation", "test")
MOST = {"train": 32, "validation": 8, "test": 40}  # pictures a class
SHORT_SIDE, QUALITY = 160, 88

# Of each task, the rows of its sorted candidates by split, in the order in which the split holds them, and `sha256` of
# the files they name, which tells another commit.
Draw = Mapping[str, Mapping[str, Any]]
PUBLISHED = Path(__file__).with_name("photos_draw.json")


@dataclass(frozen=True)
class Candidate:
    """A picture that a task may use: its class, the source's own split (or ""), and what must stay on one side."""

    path: Path
    label: int
    part: str
    group: str


@dataclass(frozen=True)
class Source:
    """Where a task comes from. `folders` are patterns with `{}` for a class's own folder, by the source's split."""

    repository: str
    commit: str
    licence: str
    template: str
    folders: Mapping[str, str]
    classes: Mapping[str, str]
    group: Callable[[Path], str]
    divide: Callable[[list[Candidate], random.Random], dict[str, list[Candidate]]]
    kept_apart: str

    @property
    def clone(self) -> str:
        return self.repository.split("/")[1]


def candidates(root: Path, name: str) -> list[Candidate]:
    """Every picture of the classes of a task, by class and path.

    Raises:
        DataError: the clone is not there, or holds no picture of a class.
    """
    source = SOURCES[name]
    clone = root / source.clone
    if not clone.is_dir():
        raise DataError(
            f"{clone} is not there. Make it with: git clone https://github.com/{source.repository} {clone} && "
            f"git -C {clone} checkout {source.commit}"
        )
    found: list[Any] = []
    for label, folder in enumerate(source.classes.values()):
        before = len(found)
        for part, pattern in source.folders.items():
            paths = _pictures(clone / pattern.format(folder))
            found += [Candidate(path, label, part, source.group(path)) for path in paths]
        if len(found) == before:
            raise DataError(f"{clone} holds no picture for {folder!r}; is it the commit {source.commit}?")
    return found


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return sorted(found, key=lambda path: path.name)  # paths themselves sort differently on Windows


def prepared(path: Path) -> bytes:
    """A picture as the tasks hold it: at most 160 pixels on the short side, JPEG, without metadata."""
    with PIL.Image.open(path) as opened:
        opened.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))  # decodes a camera's picture at a fraction of its size
        picture = PIL.ImageOps.exif_transpose(opened).convert("RGB")
    scale = SHORT_SIDE / min(picture.size)
    if scale < 1:
        width, height = (max(SHORT_SIDE, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


# ---------------------------------------------------------------------- who goes where


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.stem)[-1])


def _by_class(pictures: Iterable[Candidate]) -> dict[int, list[Candidate]]:
    found: dict[int, list[Candidate]] = defaultdict(list)
    for picture in pictures:
        found[picture.label].append(picture)
    return found


def _deal(pictures: list[Candidate], rng: random.Random) -> dict[str, list[Candidate]]:
    """Shuffle the groups and give each to the split that is furthest from its share."""
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for picture in pictures:
        groups[picture.group].append(picture)
    order = sorted(groups)
    rng.shuffle(order)
    dealt: dict[str, list[Candidate]] = {split: [] for split in SPLITS}
    for group in order:
        emptiest = min(SPLITS, key=lambda split: len(dealt[split]) / MOST[split])
        dealt[emptiest] += groups[group]
    return dealt


def _deal_each_class(pictures: list[Candidate], rng: random.Random) -> dict[str, list[Candidate]]:
    dealt = [_deal(part, rng) for part in _by_class(pictures).values()]
    return {split: [picture for one in dealt for picture in one[split]] for split in SPLITS}


def _own_splits(pictures: list[Candidate], rng: random.Random) -> dict[str, list[Candidate]]:
    """The source's splits; a class with fewer than 4 validation pictures gets some of its training pictures."""
    parts = {split: [picture for picture in pictures if picture.part == split] for split in SPLITS}
    have = _by_class(parts["validation"])
    for label, mine in _by_class(parts["train"]).items():
        if (count := len(have[label])) >= 4:
            continue
        wanted = 4 if count else max(4, min(MOST["validation"], len(mine) // 6))
        moved = rng.sample(mine, wanted - count)
        parts["validation"] += moved
        parts["train"] = [picture for picture in parts["train"] if picture not in moved]
    return parts


def _own_test(pictures: list[Candidate], rng: random.Random) -> dict[str, list[Candidate]]:
    """The source's test split; validation is what 15 % of the other photographs show."""
    rest = [picture for picture in pictures if picture.part == "train"]
    groups = sorted({picture.group for picture in rest})
    held = set(rng.sample(groups, max(1, round(0.15 * len(groups)))))
    return {
        "train": [picture for picture in rest if picture.group not in held],
        "validation": [picture for picture in rest if picture.group in held],
        "test": [picture for picture in pictures if picture.part == "test"],
    }


def drawn_by_rule(name: str, pictures: list[Candidate]) -> dict[str, list[int]]:
    """Rows of each split: files that occur twice count once, groups are divided, at most `MOST` of a class are kept.

    The order mixes the classes.
    """
    rng = random.Random(name)
    once = {hashlib.sha256(picture.path.read_bytes()).digest(): picture for picture in reversed(pictures)}
    rows = {picture.path: row for row, picture in enumerate(pictures)}
    draw = {}
    for split, part in SOURCES[name].divide(list(reversed(once.values())), rng).items():
        kept: list[int] = []
        for mine in _by_class(part).values():
            kept += [rows[picture.path] for picture in rng.sample(mine, min(MOST[split], len(mine)))]
        rng.shuffle(kept)
        draw[split] = kept
    return draw


def drawn_like(folder: Path, name: str, pictures: Sequence[Candidate]) -> dict[str, list[int]]:
    """Rows of the pictures of a task that is there already, found by their bytes.

    Raises:
        DataError: some of its pictures cannot be made from the clone.
    """
    import pyarrow.parquet

    rows = {(hashlib.sha256(prepared(one.path)).digest(), one.label): row for row, one in enumerate(pictures)}
    draw, lost = {}, 0
    for split in SPLITS:
        table = pyarrow.parquet.read_table(folder / name / f"{split}.parquet", columns=["image", "label"]).to_pylist()
        keys = [(hashlib.sha256(row["image"]["bytes"]).digest(), row["label"]) for row in table]
        lost += sum(key not in rows for key in keys)
        draw[split] = [rows[key] for key in keys if key in rows]
    if lost:
        raise DataError(
            f"{lost} pictures of {folder / name} are not what {SOURCES[name].repository} gives at {SHORT_SIDE} pixels. "
            f"Is the clone at {SOURCES[name].commit}, and is Pillow built with the same JPEG encoder?"
        )
    return draw


# ---------------------------------------------------------------------- writing


def build(root: Path, out: Path, names: Iterable[str] | None = None, draw: Draw | Path | None = None) -> dict[str, Any]:
    """Write tasks as `out/NAME/{train,validation,test}.parquet`, with `tasks.json`, `draw.json` and the licences.

    Args:
        root: folder of the clones, each under its repository's name.
        draw: what `PUBLISHED` or the `draw.json` of an earlier build says, or a folder of tasks whose very pictures
            are wanted; None draws by the rule, the same everywhere.

    Returns:
        The content of `tasks.json`.

    Raises:
        DataError: a clone is missing or at another commit, or a picture of the folder `draw` cannot be made.
    """
    tasks, draws = {}, {}
    for name in names or SOURCES:
        pictures = candidates(root, name)
        if isinstance(draw, Path):
            rows = drawn_like(draw, name, pictures)
        else:
            rows = drawn_by_rule(name, pictures) if draw is None else _checked(name, draw, pictures)
        parts = {split: [pictures[row] for row in part] for split, part in rows.items()}
        tasks[name] = _write(root, out, name, parts)
        draws[name] = {"sha256": _digest(parts), **rows}
    (out / "tasks.json").write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")
    (out / "draw.json").write_text(json.dumps(draws, separators=(",", ":")) + "\n", encoding="utf-8")
    return tasks


def _checked(name: str, draw: Draw, pictures: Sequence[Candidate]) -> dict[str, list[int]]:
    """Rows that a draw has for a task, after a look whether they name the files that they were drawn from."""
    if name not in draw or set(draw[name]) != {"sha256", *SPLITS}:
        raise DataError(f"The draw says nothing of {name}; it must hold sha256 and rows for {', '.join(SPLITS)}.")
    rows = {split: list(draw[name][split]) for split in SPLITS}
    if all(0 <= row < len(pictures) for part in rows.values() for row in part):
        digest = _digest({split: [pictures[row] for row in part] for split, part in rows.items()})
        if digest == draw[name]["sha256"]:
            return rows
    raise DataError(
        f"The draw of {name} is of other files than the {len(pictures)} here; is the clone of "
        f"{SOURCES[name].repository} at {SOURCES[name].commit}?"
    )


def _digest(parts: Mapping[str, Sequence[Candidate]]) -> str:
    """SHA-256 of the files of the splits, each by its own, whatever they are encoded to afterwards."""
    whole = hashlib.sha256()
    for split in SPLITS:
        for picture in parts[split]:
            whole.update(hashlib.sha256(picture.path.read_bytes()).digest())
    return whole.hexdigest()


def _write(root: Path, out: Path, name: str, parts: Mapping[str, Sequence[Candidate]]) -> dict[str, Any]:
    source = SOURCES[name]
    features = Features({"image": Image(), "label": ClassLabel(names=list(source.classes))})
    (out / name).mkdir(parents=True, exist_ok=True)
    per_class = {}
    for split, part in parts.items():
        images = [{"bytes": prepared(picture.path), "path": None} for picture in part]
        labels = [picture.label for picture in part]
        Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(str(out / name / f"{split}.parquet"))
        counts = [labels.count(label) for label in range(len(source.classes))]
        per_class[split] = {"min": min(counts), "max": max(counts)}
    clone = root / source.clone
    for licence in clone.glob("LICENSE*"):
        shutil.copyfile(licence, out / f"{source.clone}-{licence.name}")
    return {
        "classes": list(source.classes), "n_classes": len(source.classes), "template": source.template,
        "sizes": {split: len(part) for split, part in parts.items()}, "per_class": per_class,
        "source": source.repository, "licence": source.licence, "commits": {source.repository: _commit(clone)},
        "kept_apart": source.kept_apart, "files": [f"{name}/{split}.parquet" for split in parts],
    }  # fmt: skip


def _commit(clone: Path) -> str | None:
    """The commit of a clone; None for a copy without its history."""
    if not (clone / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


# ---------------------------------------------------------------------- the six

_GROCERY: dict[str, Any] = {
    "repository": "marcusklasson/GroceryStoreDataset",
    "commit": "fc80ba90f803d79d0383df52c5a4ac5de99ff6fc",
    "licence": "MIT",
    "template": "a photo of a {}, a type of fruit.",
    "folders": {
        "train": "dataset/train/Fruit/{}", "validation": "dataset/val/Fruit/{}", "test": "dataset/test/Fruit/{}",
    },
    "group": str,
    "divide": _own_splits,
    "kept_apart": "the source's own train/validation/test",
}  # fmt: skip
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

SOURCES: dict[str, Source] = {
    "clothing": Source(
        repository="alexeygrigorev/clothing-dataset-small",
        commit="11961516512414bf9f6c150a832cfd21b54a6b54",
        licence="CC0-1.0",
        template="a photo of a {}, a type of clothing.",
        folders={"train": "train/{}", "validation": "validation/{}", "test": "test/{}"},
        classes={
            "button-up shirt": "shirt", "dress": "dress", "hat": "hat", "jacket or coat": "outwear",
            "long-sleeved shirt": "longsleeve", "pair of pants": "pants", "pair of shoes": "shoes",
            "pair of shorts": "shorts", "skirt": "skirt", "t-shirt": "t-shirt",
        },
        group=str,
        divide=_deal_each_class,
        kept_apart="equal files",
    ),
    "fruit": Source(
        **_GROCERY,
        classes={
            "avocado": "Avocado", "banana": "Banana", "cantaloupe melon": "Melon/Cantaloupe",
            "grapefruit": "Red-Grapefruit", "kiwi": "Kiwi", "lemon": "Lemon", "lime": "Lime", "mango": "Mango",
            "nectarine": "Nectarine", "orange": "Orange", "papaya": "Papaya", "passion fruit": "Passion-Fruit",
            "peach": "Peach", "pineapple": "Pineapple", "plum": "Plum", "pomegranate": "Pomegranate",
            "satsuma mandarin": "Satsumas", "watermelon": "Melon/Watermelon",
        },
    ),
    "apples-pears": Source(
        **_GROCERY,
        classes={
            "Anjou pear": "Pear/Anjou", "Conference pear": "Pear/Conference",
            "Golden Delicious apple": "Apple/Golden-Delicious", "Granny Smith apple": "Apple/Granny-Smith",
            "Kaiser pear": "Pear/Kaiser", "Pink Lady apple": "Apple/Pink-Lady",
            "Red Delicious apple": "Apple/Red-Delicious", "Royal Gala apple": "Apple/Royal-Gala",
        },
    ),
    "waste": Source(  # the original, garythung/trashnet, keeps the same files in an archive
        repository="congduytran12/Trash-Classification-",
        commit="00212f2c18dcdb9045c74481eaae5baaf72537df",
        licence="MIT (of garythung/trashnet)",
        template="a photo of {} waste.",
        folders={"": "dataset-resized/{}"},
        classes={
            "cardboard": "cardboard", "glass": "glass", "metal": "metal", "other trash": "trash", "paper": "paper",
            "plastic": "plastic",
        },
        group=lambda path: f"{path.parent.name} {_number(path) // 10:04d}",
        divide=_deal_each_class,
        kept_apart="blocks of ten consecutive file numbers stay together",
    ),
    "sign-digits": Source(
        repository="ardamavi/Sign-Language-Digits-Dataset",
        commit="4b09433ef9d5c60602e8805bb54b8aa2428527f8",
        licence="Apache-2.0",
        template="a photo of a hand showing the number {} in sign language.",
        folders={"": "Dataset/{}"},
        classes={name: str(digit) for digit, name in enumerate(_DIGITS)},
        group=lambda path: f"{_number(path) // 40:04d}",
        divide=_deal,
        kept_apart="blocks of 40 consecutive file numbers (about four signers) stay together",
    ),
    "coins": Source(
        repository="kaa/coins-dataset",
        commit="dbfaaa6c0d3d0677547039087055f03fb7c2ab64",
        licence="MIT",
        template="a photo of a euro coin of {}.",
        folders={"train": "classified/train/{}", "test": "classified/test/{}"},
        classes={
            "1 cent": "1c", "1 euro": "1e", "10 cents": "10c", "2 cents": "2c", "2 euros": "2e", "20 cents": "20c",
            "5 cents": "5c", "50 cents": "50c",
        },
        group=lambda path: path.stem.rpartition("_")[0],
        divide=_own_test,
        kept_apart="the source's own train/test; coins cut from one picture stay together",
    ),
}  # fmt: skip
