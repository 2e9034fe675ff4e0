"""The paper's datasets as data, opened from a local copy or the Hub and checked.

`paper/datasets.json` says everything about the 11 few-shot datasets and ImageNet's four variants but what the published
scripts set per dataset, which is `training.recipes.published_constants`. The tasks shipped with the library can be
opened the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value

from ..data import LabelledImages, load_splits
from ..demo import demo_dataset, demo_styles, demo_tasks
from ..errors import ArtifactError, ConfigurationError, DataError, ImageError
from ..pictures import IMAGE_EXTENSIONS
from ..storage import read_json
from ..training.recipes import PUBLISHED_ALPHA, published_constants

_KEYS = {"train": "train", "validation": "val", "test": "test"}  # what split files call the splits


@cache
def suite_datasets() -> dict[str, dict[str, Any]]:
    """Name to description of every dataset: the paper's, its variants, and the shipped tasks."""
    text = resources.files("taskres_hf").joinpath("paper/datasets.json").read_text(encoding="utf-8")
    known = {
        name: value if "source" in value else {"alpha": PUBLISHED_ALPHA, **published_constants(name), **value}
        for name, value in json.loads(text).items()
        if not name.startswith("_")
    }
    for task, spec in demo_tasks().items():
        known[task] = {
            "title": f"{task} (shipped)", "alpha": PUBLISHED_ALPHA, "template": spec["template"],
            "class_names": spec["classes"], "sizes": spec["sizes"],
            "sizes_are": "official", "layout": {"kind": "shipped"}, "hub": None, "traps": [],
        }  # fmt: skip
    known["all-categories"]["targets"] = demo_styles()
    for style in demo_styles():
        known[style] = {
            "title": f"all-categories in the style {style} (shipped)", "source": "all-categories",
            "layout": {"kind": "shipped_target"}, "hub": None, "traps": [],
        }  # fmt: skip
    return known


def dataset_names(name: str) -> list[str]:
    """The name itself; of `paper` the names of the paper's 11 datasets, of `shipped` those of the shipped tasks."""
    known = suite_datasets()
    groups = {
        "paper": [name for name, spec in known.items() if "template_set" in spec],
        "shipped": [name for name, spec in known.items() if spec["layout"]["kind"] == "shipped"],
    }
    return groups.get(name, [name])


@dataclass(frozen=True)
class PaperData:
    """An opened dataset of the paper.

    Attributes:
        splits: `train`, `validation`, `test` as `LabelledImages`, with the classes in the paper's order.
        class_names: K names, unique. prompt_names: what prompts say where it differs from the name.
        notes: how this copy differs from the published one; empty if it does not.
    """

    name: str
    splits: dict[str, LabelledImages]
    class_names: list[str]
    prompt_names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe_dataset(name: str) -> dict[str, Any]:
    """One entry of `suite_datasets`; a variant has the classes of its source.

    Raises:
        ConfigurationError: there is no such dataset.
    """
    known = suite_datasets()
    if name not in known:
        raise ConfigurationError(f"There is no dataset {name!r}; those described are {', '.join(known)}.")
    spec = known[name]
    if "source" in spec:
        source = known[spec["source"]]
        spec = {**spec, "class_names": source["class_names"], "all_wnids": source.get("wnids")}
    return {**spec, "all_wnids": spec.get("all_wnids") or spec.get("wnids")}


def unique_names(names: Sequence[str], wnids: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names made unique by their WordNet id where two classes share one, and what prompts say for those."""
    counts = Counter(names)
    unique, prompts = [], {}
    for index, name in enumerate(names):
        label = name
        if counts[name] > 1:
            label = f"{name} ({wnids[index] if wnids else index})"
            prompts[label] = name
        unique.append(label)
    return unique, prompts


def open_dataset(
    name: str, root: str | os.PathLike[str] | None = None, *, allow_other_split: bool = False
) -> PaperData:
    """Open a dataset of the paper and check it before anything expensive.

    Args:
        name: such as `"oxford_pets"`, `"imagenet_r"` or a shipped task.
        root: folder that holds the datasets' folders as CoOp lays them out (`root/oxford_pets/images`,
            `root/oxford_pets/split_zhou_OxfordPets.json`), or that dataset's own folder; None opens the Hub copy.
        allow_other_split: accept a copy whose split or sizes are not the published ones, or in which a picture is in
            two splits.

    Raises:
        DataError: files are missing, a row of a split file cannot be read, classes differ, or the split differs and
            `allow_other_split` is not set.
    """
    spec = describe_dataset(name)
    names, prompts = unique_names(spec["class_names"], spec["all_wnids"])
    kind = spec["layout"]["kind"]
    folder: Path | None = None
    notes: list[str] = []
    problems: list[str] = []
    if kind == "shipped":
        splits = {split: LabelledImages(part) for split, part in demo_dataset(name).items()}
    elif kind == "shipped_target":
        splits = {"test": LabelledImages(demo_dataset("dg")[name])}
    else:
        folder = None if root is None else _dataset_folder(Path(root).expanduser(), name, spec)
        if folder is not None and _has_layout(folder, spec):
            splits, problems = _READERS[kind](folder, spec, names)
        else:
            splits, notes = _open_copy(name, folder, spec, names)
    problems += _compare(splits, spec, names)
    if problems and not allow_other_split:
        missing = "" if folder is None or _has_layout(folder, spec) else f" ({folder / _mark(spec)} is not there)"
        raise DataError(
            f"This copy of {name} is not the published split: {'; '.join(problems)}. Results would not compare. Use "
            f"the published split files{missing}, or accept it with allow_other_split=True (--allow-other-split)."
        )
    return PaperData(name, splits, names, prompts, notes + problems)


def overlaps(splits: Mapping[str, LabelledImages]) -> list[str]:
    """Pictures that are in two splits, by content: a line for each pair of splits, with the first few of them.

    Reads every picture; a picture that cannot be read is left out.
    """
    rows: dict[str, dict[str, int]] = {split: {} for split in _KEYS if split in splits}
    for split, seen in rows.items():
        for row in range(len(splits[split])):
            with suppress(ImageError):
                seen.setdefault(splits[split].digest(row), row)
    lines = []
    for one, other in combinations(rows, 2):
        if both := [digest for digest in rows[one] if digest in rows[other]]:
            shown = ", ".join(f"{one} row {rows[one][d]} and {other} row {rows[other][d]}" for d in both[:3])
            more, are = " ..." if len(both) > 3 else "", "s are" if len(both) > 1 else " is"
            lines.append(f"{len(both)} picture{are} in {one} and in {other}: {shown}{more}")
    return lines


def _dataset_folder(root: Path, name: str, spec: Mapping[str, Any]) -> Path:
    """The dataset's folder: below `root`, or `root` itself."""
    below: list[Path] = [root / spec["layout"]["folder"], root / name]
    for folder in below:
        if folder.is_dir():
            return folder
    if not root.is_dir():
        raise DataError(f"There is no folder {root}.")
    return root


def _mark(spec: Mapping[str, Any]) -> str:
    """The file or folder that the published layout has and no other."""
    layout = spec["layout"]
    marks = {"split_file": layout.get("split_file"), "variant_lists": "images_variant_train.txt"}
    return str(marks.get(layout["kind"], layout.get("test")))


def _has_layout(folder: Path, spec: Mapping[str, Any]) -> bool:
    return (folder / _mark(spec)).exists()


def _compare(splits: Mapping[str, LabelledImages], spec: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    problems = []
    for split, expected in spec.get("sizes", {}).items():
        count = len(splits[split]) if split in splits else 0
        shared_test = spec["title"] == "ImageNet" and split == "validation"  # its validation set is the test set
        if count != expected and not shared_test:
            problems.append(f"{split} has {count} pictures, published {expected}")
    if "train" in splits and (absent := len(names) - len(set(splits["train"].labels))):
        problems.append(f"{absent} of {len(names)} classes have no training picture")
    return problems


def _from_paths(paths: Sequence[Path], labels: Sequence[int], names: Sequence[str], folder: Path) -> LabelledImages:
    if not paths:
        raise DataError(f"There are no pictures below {folder}.")
    absent = [path for path in paths if not os.path.isfile(path)]  # a name may be too long to ask `Path`
    if absent:
        raise DataError(
            f"{len(absent)} of {len(paths)} pictures that the split names are not there, the first {absent[0]}. "
            "Check that the archives are unpacked as the layout asks."
        )
    features = Features({"image": Value("string"), "label": ClassLabel(names=list(names))})
    data = Dataset.from_dict({"image": [str(path) for path in paths], "label": list(labels)}, features)
    return LabelledImages(data.cast_column("image", Image()))


_Opened = tuple[dict[str, LabelledImages], list[str]]  # the splits, and how they differ from the published ones


def _read_split_file(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> _Opened:
    """CoOp's `split_zhou_*.json`: lists of [path, label, class name] for train, val and test."""
    file = folder / spec["layout"]["split_file"]
    try:
        content = read_json(file)
    except ArtifactError as error:
        raise DataError(str(error)) from None
    rows: dict[str, list[Any]] = {}
    for split, key in _KEYS.items():
        part = content.get(key)
        if not isinstance(part, list):
            raise DataError(f"{file} has no list {key!r}; it must hold the lists train, val and test.")
        rows[split] = part
        for number, row in enumerate(part):
            if problem := _row_problem(row, names):
                raise DataError(f"{file}: row {number} of {key!r} {problem}.")
    pictures = folder / spec["layout"]["images"]
    problems = _path_overlaps({split: [path for path, _, _ in part] for split, part in rows.items()})
    text = json.dumps(list(rows.values()), ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    if spec.get("split_sha256") not in (None, digest.hexdigest()):
        problems.append(f"the rows of {file.name} are not those of the published file")
    splits = {
        split: _from_paths([pictures / path for path, _, _ in part], [label for _, label, _ in part], names, folder)
        for split, part in rows.items()
    }
    return splits, problems


def _row_problem(row: Any, names: Sequence[str]) -> str | None:
    """What is wrong with a row of a split file, or None."""
    shown = repr(row)[:200]
    if not isinstance(row, list) or len(row) != 3:
        return f"must be [path, label, class name]; it is {shown}"
    path, label, name = row
    if isinstance(label, bool) or not isinstance(label, int):
        return f"has the label {label!r}, a {type(label).__name__}; labels are whole numbers from 0: {shown}"
    if not isinstance(path, str) or not path or Path(path).is_absolute() or ".." in Path(path).parts:
        return f"must name a picture by its path below the folder of pictures: {shown}"
    if not 0 <= label < len(names):
        return f"has the label {label}; there are {len(names)} classes: {shown}"
    if names[label] != name:
        return f"says that label {label} is called {name!r}, not {names[label]!r} as published"
    return None


def _path_overlaps(paths: Mapping[str, Sequence[str]]) -> list[str]:
    """Files that the lists name twice, within a split or across two."""
    problems = []
    for split, part in paths.items():
        if len(set(part)) < len(part):
            path, count = Counter(part).most_common(1)[0]
            problems.append(
                f"{split} names {len(part) - len(set(part))} pictures again, such as {path} ({count} times)"
            )
    for one, other in combinations(paths, 2):
        known = set(paths[one])
        if both := [row for row, path in enumerate(paths[other]) if path in known]:
            shown = ", ".join(f"row {row} of {other} ({paths[other][row]})" for row in both[:3])
            problems.append(f"{len(both)} pictures of {other} are also in {one}: {shown}")
    return problems


def _read_variant_lists(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> _Opened:
    """FGVC Aircraft's own lists: `<number> <variant>` per line."""
    position = {name: index for index, name in enumerate(names)}
    rows: dict[str, list[tuple[str, int]]] = {}
    for split, key in _KEYS.items():
        file = folder / f"images_variant_{key}.txt"
        rows[split] = []
        for number, line in enumerate(_lines(file), start=1):
            picture, _, variant = line.strip().partition(" ")
            if variant not in position:
                raise DataError(
                    f"{file}: line {number} must be `<number> <variant>` with a known variant; it is {line[:200]!r}."
                )
            rows[split].append((f"{picture}.jpg", position[variant]))
    pictures = folder / spec["layout"]["images"]
    splits = {
        split: _from_paths([pictures / path for path, _ in part], [label for _, label in part], names, folder)
        for split, part in rows.items()
    }
    return splits, _path_overlaps({split: [path for path, _ in part] for split, part in rows.items()})


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}). The published split needs it.") from None


def _folders(top: Path) -> set[str]:
    if not top.is_dir():
        raise DataError(f"There is no folder {top}. Check that the archives are unpacked as the layout asks.")
    return {path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith(".")}


def _read_wnid_folders(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> _Opened:
    """One folder per WordNet id, as ImageNet and its variants come."""
    order = {wnid: index for index, wnid in enumerate(spec["all_wnids"])}
    expected = set(spec.get("wnids") or order)
    splits = {}
    for split in ("train", "test"):
        if split not in spec["layout"]:
            continue
        top = folder / spec["layout"][split]
        present = _folders(top)
        if present != expected:
            missing, extra = sorted(expected - present), sorted(present - expected)
            raise DataError(f"{top}: {len(missing)} classes missing {missing[:3]}, {len(extra)} unknown {extra[:3]}.")
        splits[split] = _read_class_folders(top, {wnid: order[wnid] for wnid in sorted(present)}, names)
    return splits, []


def _read_numbered_folders(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> _Opened:
    """ImageNet-V2: folders `0` to `999`; their number is the label, whatever the sorting."""
    top = folder / spec["layout"]["test"]
    present = _folders(top)
    if present != {str(index) for index in range(len(names))}:
        raise DataError(f"{top} must hold the folders 0 to {len(names) - 1}; it holds {len(present)} folders.")
    return {"test": _read_class_folders(top, {str(index): index for index in range(len(names))}, names)}, []


def _read_class_folders(top: Path, labels: Mapping[str, int], names: Sequence[str]) -> LabelledImages:
    paths, ids = [], []
    for name, label in labels.items():
        inside = sorted(
            path
            for path in (top / name).iterdir()
            if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
        )
        paths += inside
        ids += [label] * len(inside)
    return _from_paths(paths, ids, names, top)


_READERS: dict[str, Callable[[Path, Mapping[str, Any], Sequence[str]], _Opened]] = {
    "split_file": _read_split_file,
    "variant_lists": _read_variant_lists,
    "wnid_folders": _read_wnid_folders,
    "numbered_folders": _read_numbered_folders,
}


def _open_copy(name: str, folder: Path | None, spec: Mapping[str, Any], names: Sequence[str]) -> _Opened:
    """A Hub copy, or a local copy in a form `load_splits` knows; classes are matched by normalised name."""
    hub = spec["hub"]
    if folder is None and hub is None:
        raise DataError(f"{name} has no known copy on the Hub: pass root= (--root) with the official files.")
    if folder is None:
        splits = load_splits(hub["id"], revision=hub["revision"])
    else:
        _refuse_half_of_the_layout(folder, name, spec)
        try:
            splits = load_splits(folder)
        except DataError as error:
            raise DataError(
                f"{folder} is neither the published layout of {name} ({folder / _mark(spec)} is not there) nor a copy "
                f"in another form: {error}"
            ) from error
    present = next(iter(splits.values())).column_names
    columns: dict[str, Any] = {
        key: hub[key] if hub and hub[key] in present else None for key in ("image_column", "label_column")
    }
    renamed = {hub.get("test_split"): "test"} if hub and hub.get("test_split") and "test" not in splits else {}
    opened, notes = {}, [f"a copy in another form ({folder or hub['id']}), matched by class name"]
    position = {_letters_and_digits(text): label for label, text in enumerate(names)}
    for wnid, label in zip(spec["all_wnids"] or [], range(len(names)), strict=False):
        position[_letters_and_digits(wnid)] = label
    for split, part in splits.items():
        pictures = LabelledImages(part, **columns)
        unknown = [text for text in pictures.class_names if _letters_and_digits(text) not in position]
        if unknown:
            raise DataError(
                f"{len(unknown)} classes of this copy of {name} are not the published ones, such as {unknown[:3]}. "
                "Use the official files with the published split."
            )
        mapping = {text: names[position[_letters_and_digits(text)]] for text in pictures.class_names}
        opened[renamed.get(split, split)] = pictures.aligned(names, mapping)
    return opened, notes


def _refuse_half_of_the_layout(folder: Path, name: str, spec: Mapping[str, Any]) -> None:
    """Pictures unpacked as published, without what says which of them is in which split."""
    images = spec["layout"].get("images", ".")
    if spec["layout"]["kind"] in ("split_file", "variant_lists") and images != "." and (folder / images).is_dir():
        raise DataError(
            f"{folder / _mark(spec)} is not there: {folder / images} holds the pictures of {name}, and that file says "
            "which belong to which split. Download it as docs/reproduce.md says."
        )


def _letters_and_digits(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
