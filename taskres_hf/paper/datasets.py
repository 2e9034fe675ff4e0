"""The paper's datasets as data, opened from a local copy or the Hub and checked.

`paper/datasets.json` says everything about the 11 few-shot datasets and ImageNet's four variants. The tasks
shipped with the library can be opened the same way.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value

from ..data.labelled import LabelledImages
from ..data.sources import load_splits
from ..errors import ConfigurationError, DataError
from ..pictures import IMAGE_EXTENSIONS
from ..storage import read_json

_DEMO = Path(__file__).parents[1] / "demo_data"


@cache
def suite_datasets() -> dict[str, dict[str, Any]]:
    """Name to description of every dataset: the paper's, its variants, and the shipped tasks."""
    text = resources.files("taskres_hf").joinpath("paper/datasets.json").read_text(encoding="utf-8")
    found = {name: value for name, value in json.loads(text).items() if not name.startswith("_")}
    for task, spec in json.loads((_DEMO / "tasks.json").read_text(encoding="utf-8")).items():
        found[task] = {
            "title": f"{task} (shipped)", "alpha": 0.5, "template": spec["template"], "class_names": spec["classes"],
            "sizes": spec["sizes"], "sizes_are": "official", "layout": {"kind": "shipped"}, "hub": None, "traps": [],
        }  # fmt: skip
    found["all-categories"]["targets"] = []
    for file in sorted((_DEMO / "dg").glob("*.parquet")):
        found["all-categories"]["targets"].append(file.stem)
        found[file.stem] = {
            "title": f"all-categories in the style {file.stem} (shipped)", "source": "all-categories",
            "layout": {"kind": "shipped_target"}, "hub": None, "traps": [],
        }  # fmt: skip
    return found


@dataclass(frozen=True)
class SuiteData:
    """An opened dataset of the suite.

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
        raise ConfigurationError(f"There is no dataset {name!r} in the suite: {', '.join(known)}.")
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
) -> SuiteData:
    """Open a dataset of the suite and check it before anything expensive.

    Args:
        name: such as `"oxford_pets"`, `"imagenet_r"` or a shipped task.
        root: folder that holds the datasets' folders as CoOp lays them out (`root/oxford_pets/images`,
            `root/oxford_pets/split_zhou_OxfordPets.json`), or that dataset's own folder; None opens the Hub copy.
        allow_other_split: accept a copy whose split or sizes are not the published ones.

    Raises:
        DataError: files are missing, classes differ, or sizes differ and `allow_other_split` is not set.
    """
    spec = describe_dataset(name)
    names, prompts = unique_names(spec["class_names"], spec["all_wnids"])
    kind = spec["layout"]["kind"]
    notes: list[str] = []
    if kind == "shipped":
        splits = {split: LabelledImages(part) for split, part in load_splits(_DEMO / name).items()}
    elif kind == "shipped_target":
        splits = {"test": LabelledImages(load_splits(_DEMO / "dg" / f"{name}.parquet")["train"])}
    else:
        folder = None if root is None else _dataset_folder(Path(root).expanduser(), name, spec)
        if folder is not None and _has_layout(folder, spec):
            splits = _READERS[kind](folder, spec, names)
        else:
            splits, notes = _open_copy(name, folder, spec, names)
    problems = _compare(splits, spec, names)
    if problems and not allow_other_split:
        raise DataError(
            f"This copy of {name} is not the published split: {'; '.join(problems)}. Results would not compare. "
            "Use the published split files, or accept it with allow_other_split=True (--allow-other-split)."
        )
    return SuiteData(name, splits, names, prompts, notes + problems)


def _dataset_folder(root: Path, name: str, spec: Mapping[str, Any]) -> Path:
    for folder in (root / spec["layout"]["folder"], root / name, root):
        if folder.is_dir():
            return folder
    raise DataError(f"There is no folder {root}.")


def _has_layout(folder: Path, spec: Mapping[str, Any]) -> bool:
    layout = spec["layout"]
    marks = {"split_file": layout.get("split_file"), "variant_lists": "images_variant_train.txt"}
    mark = marks.get(layout["kind"], layout.get("test"))
    return (folder / str(mark)).exists()


def _compare(splits: Mapping[str, LabelledImages], spec: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    problems = []
    for split, expected in spec.get("sizes", {}).items():
        found = len(splits[split]) if split in splits else 0
        shared_test = spec["title"] == "ImageNet" and split == "validation"  # its validation set is the test set
        if found != expected and not shared_test:
            problems.append(f"{split} has {found} pictures, published {expected}")
    if "train" in splits and (absent := len(names) - len(set(splits["train"].labels))):
        problems.append(f"{absent} of {len(names)} classes have no training picture")
    return problems


def _from_paths(paths: Sequence[Path], labels: Sequence[int], names: Sequence[str], folder: Path) -> LabelledImages:
    if not paths:
        raise DataError(f"There are no pictures below {folder}.")
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(paths)} pictures that the split names are not there, the first {absent[0]}. "
            "Check that the archives are unpacked as the layout asks."
        )
    features = Features({"image": Value("string"), "label": ClassLabel(names=list(names))})
    data = Dataset.from_dict({"image": [str(path) for path in paths], "label": list(labels)}, features)
    return LabelledImages(data.cast_column("image", Image()))


def _read_split_file(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> dict[str, LabelledImages]:
    """CoOp's `split_zhou_*.json`: lists of [path, label, class name] for train, val and test."""
    layout = spec["layout"]
    content = read_json(folder / layout["split_file"])
    splits = {}
    for split, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        rows = content.get(key)
        if not isinstance(rows, list):
            raise DataError(f"{folder / layout['split_file']} has no list {key!r}.")
        wrong = {(label, found) for _, label, found in rows if not 0 <= label < len(names) or names[label] != found}
        if wrong:
            label, found = sorted(wrong)[0]
            raise DataError(f"{folder / layout['split_file']}: label {label} is called {found!r}, not as published.")
        paths = [folder / layout["images"] / path for path, _, _ in rows]
        splits[split] = _from_paths(paths, [label for _, label, _ in rows], names, folder)
    return splits


def _read_variant_lists(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> dict[str, LabelledImages]:
    """FGVC Aircraft's own lists: `<number> <variant>` per line."""
    position = {name: index for index, name in enumerate(names)}
    splits = {}
    for split, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = (folder / f"images_variant_{key}.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.strip().split(" ", 1) for line in lines if line.strip()]
        unknown = sorted({variant for _, variant in rows} - set(position))
        if unknown:
            raise DataError(f"{folder}: unknown variants {unknown[:5]}; these are not the variant lists.")
        paths = [folder / spec["layout"]["images"] / f"{number}.jpg" for number, _ in rows]
        splits[split] = _from_paths(paths, [position[variant] for _, variant in rows], names, folder)
    return splits


def _read_wnid_folders(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> dict[str, LabelledImages]:
    """One folder per WordNet id, as ImageNet and its variants come."""
    order = {wnid: index for index, wnid in enumerate(spec["all_wnids"])}
    expected = set(spec.get("wnids") or order)
    splits = {}
    for split in ("train", "test"):
        if split not in spec["layout"]:
            continue
        top = folder / spec["layout"][split]
        found = {path.name for path in top.iterdir() if path.is_dir()} if top.is_dir() else set()
        if found != expected:
            missing, extra = sorted(expected - found), sorted(found - expected)
            raise DataError(f"{top}: {len(missing)} classes missing {missing[:3]}, {len(extra)} unknown {extra[:3]}.")
        splits[split] = _read_class_folders(top, {wnid: order[wnid] for wnid in sorted(found)}, names)
    return splits


def _read_numbered_folders(folder: Path, spec: Mapping[str, Any], names: Sequence[str]) -> dict[str, LabelledImages]:
    """ImageNet-V2: folders `0` to `999`; their number is the label, whatever the sorting."""
    top = folder / spec["layout"]["test"]
    found = {path.name for path in top.iterdir() if path.is_dir()}
    if found != {str(index) for index in range(len(names))}:
        raise DataError(f"{top} must hold the folders 0 to {len(names) - 1}; it holds {len(found)} folders.")
    return {"test": _read_class_folders(top, {str(index): index for index in range(len(names))}, names)}


def _read_class_folders(top: Path, labels: Mapping[str, int], names: Sequence[str]) -> LabelledImages:
    paths, ids = [], []
    for name, label in labels.items():
        inside = sorted(path for path in (top / name).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
        paths += inside
        ids += [label] * len(inside)
    return _from_paths(paths, ids, names, top)


_READERS: dict[str, Callable[[Path, Mapping[str, Any], Sequence[str]], dict[str, LabelledImages]]] = {
    "split_file": _read_split_file,
    "variant_lists": _read_variant_lists,
    "wnid_folders": _read_wnid_folders,
    "numbered_folders": _read_numbered_folders,
}


def _open_copy(
    name: str, folder: Path | None, spec: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, LabelledImages], list[str]]:
    """A Hub copy, or a local copy in a form `load_splits` knows; classes are matched by normalised name."""
    hub = spec["hub"]
    if folder is None and hub is None:
        raise DataError(f"{name} has no known copy on the Hub: pass root= (--root) with the official files.")
    splits = load_splits(folder) if folder is not None else load_splits(hub["id"], revision=hub["revision"])
    present = next(iter(splits.values())).column_names
    columns: dict[str, Any] = {
        key: hub[key] if hub and hub[key] in present else None for key in ("image_column", "label_column")
    }
    renamed = {hub.get("test_split"): "test"} if hub and hub.get("test_split") and "test" not in splits else {}
    opened, notes = {}, [f"a copy in another form ({folder or hub['id']}), matched by class name"]
    position = {_plain(text): label for label, text in enumerate(names)}
    for wnid, label in zip(spec["all_wnids"] or [], range(len(names)), strict=False):
        position[_plain(wnid)] = label
    for split, part in splits.items():
        pictures = LabelledImages(part, **columns)
        unknown = [text for text in pictures.class_names if _plain(text) not in position]
        if unknown:
            raise DataError(
                f"{len(unknown)} classes of this copy of {name} are not the published ones, such as {unknown[:3]}. "
                "Use the official files with the published split."
            )
        mapping = {text: names[position[_plain(text)]] for text in pictures.class_names}
        opened[renamed.get(split, split)] = pictures.aligned(names, mapping)
    return opened, notes


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
