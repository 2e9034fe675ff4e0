"""From anything `datasets` can hold to pictures, labels and class names; few-shot sampling that can be replayed.

Pictures are decoded in one place, `read_image`, through the same `transformers.image_utils.load_image` that
`pipeline` uses, so training and serving cannot see different pixels (EXIF rotation, alpha, CMYK).
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from PIL import ImageOps
from transformers.image_utils import load_image

from .errors import DataError, FewShotError, ImageError
from .prompts import check_class_names

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})
_IMAGE_NAMES = (
    "image",
    "img",
    "images",
    "picture",
    "photo",
    "pixel_values",
    "file",
    "file_name",
    "image_path",
    "path",
)
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label", "cls")
_SHARD = re.compile(r"-\d+-of-\d+$")
_SPLIT_ALIASES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
}


# ---------------------------------------------------------------------- pictures


def read_image(source: Any, draft: tuple[int, int] | None = None) -> PIL.Image.Image:
    """A picture as RGB, upright, exactly as `pipeline` would see it.

    Args:
        source: path, URL, bytes, `{"bytes": ..., "path": ...}` (a cell of an undecoded `datasets` column), PIL image or
            uint8 array [H, W(, C)].
        draft: let JPEG decoding stop at the smallest scale that still covers this height and width; faster on large
            pictures, and not exactly what `pipeline` would see.

    Raises:
        ImageError: not a picture, truncated, more pixels than Pillow's limit, or floating-point pixels, whose range
            is unknown.
    """
    name = "the picture"
    try:
        if isinstance(source, Mapping):
            name = repr(source.get("path")) if source.get("path") else name
            source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
            name = repr(source)
            if source.startswith(("http://", "https://", "data:image/")):
                source = load_image(source)
            elif not os.path.isfile(source):
                raise ImageError(f"There is no file {name}.")
        if isinstance(source, (bytes, bytearray)):
            source = io.BytesIO(source)
        ours = isinstance(source, (str, io.BytesIO))
        if ours:
            source = PIL.Image.open(source)
        elif source is not None and not isinstance(source, PIL.Image.Image):
            source = PIL.Image.fromarray(source)
        if not isinstance(source, PIL.Image.Image):
            raise ImageError(f"{name} is empty: neither bytes nor a path.")
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and source.width * source.height > limit:
            raise ImageError(f"{name} has {source.width}x{source.height} pixels, more than the limit of {limit}.")
        if draft is not None:
            source.draft("RGB", draft[::-1])
        if source.mode == "F":
            raise ImageError(f"{name} has floating-point pixels of unknown range. Convert it to 8 bits first.")
        if source.mode.startswith("I"):
            warnings.warn(f"{name} has more than 8 bits a channel; values above 255 are clipped.", stacklevel=2)
        elif source.mode in ("RGBA", "LA") and source.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            warnings.warn(
                f"{name} has transparent pixels; their hidden colour is used, as pipeline() does.",
                stacklevel=2,
            )
        if not ours or source.mode != "RGB":
            return load_image(source)
        source.load()
        ImageOps.exif_transpose(source, in_place=True)  # as `load_image` does, without copying a large picture twice
        return source
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise ImageError(f"{name} cannot be read as a picture: {error}") from error


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Picture files among files and folders (searched in depth, sorted); a file named outright is always kept."""
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS and file.is_file())
            found += sorted(os.fspath(file) for file in inside)
        else:
            found.append(os.fspath(path))
    return found


# ---------------------------------------------------------------------- datasets


def load_splits(
    source: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Open a dataset as named splits.

    Args:
        source: a `Dataset` or `DatasetDict`; a folder of `train.parquet`, `validation.parquet`, `test.parquet`; a
            folder of pictures `class/file.jpg`, with or without split folders above; a folder written by
            `save_to_disk`; one parquet file; or a Hub dataset id.
        name: configuration of a Hub dataset.
        revision, token, cache_dir: as in `datasets.load_dataset`.

    Raises:
        DataError: a streamed dataset, or a folder with neither parquet files nor pictures.
    """
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise DataError(
            "A streamed dataset has no fixed order to sample shots from. Take what you need first, for example "
            "Dataset.from_generator(lambda: iter(stream.take(10_000)), features=stream.features)."
        )
    if isinstance(source, DatasetDict):
        return source
    if isinstance(source, Dataset):
        return DatasetDict({str(source.split or "train"): source})
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return DatasetDict({"train": load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache_dir)})
    if path.is_dir():
        return _load_folder(path, cache_dir)
    if path.is_absolute() or text.startswith((".", "~")):
        raise DataError(f"There is no dataset at {text}. Give a folder, a parquet file or a Hub dataset id.")
    loaded = load_dataset(text, name, revision=revision, token=token, cache_dir=cache_dir)
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _load_folder(path: Path, cache_dir: str | None) -> DatasetDict:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        stored = load_from_disk(str(path))
        return stored if isinstance(stored, DatasetDict) else DatasetDict({"train": stored})
    files: dict[str, list[str]] = {}
    for file in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        split = _SHARD.sub("", file.stem)  # train.parquet, or train-00000-of-00002.parquet
        split = re.sub(r"\W", "_", _SPLIT_ALIASES.get(split, split))
        files.setdefault(split, []).append(str(file))
    if files:
        splits = {}
        for split, names in files.items():  # one by one: files of a folder may differ in columns
            splits[split] = load_dataset("parquet", data_files={split: names}, split=split, cache_dir=cache_dir)
        return DatasetDict(splits)
    if not any(file.suffix.lower() in IMAGE_EXTENSIONS for file in path.rglob("*")):
        raise DataError(
            f"{path} holds neither parquet files nor pictures. Expected train.parquet and test.parquet, or "
            "class/picture.jpg, or train/class/picture.jpg and test/class/picture.jpg."
        )
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    split_names = {folder: _SPLIT_ALIASES.get(folder.name, folder.name) for folder in folders}
    if set(split_names.values()) & {"train", "test"}:
        named = {name: folder for folder, name in split_names.items() if name in ("train", "validation", "test")}
    else:
        named = {"train": path}
    return DatasetDict(
        {
            # Named files: left to itself, `datasets` takes a class "test tubes" for a test split, after a long search.
            split: load_dataset(
                "imagefolder",
                data_dir=str(folder),
                data_files={"train": ["**"]},
                split="train",
                drop_labels=False,
                cache_dir=cache_dir,
            )
            for split, folder in named.items()
        }
    )


class LabelledImages:
    """Pictures with class ids, read lazily from a `datasets.Dataset`.

    Args:
        dataset: any dataset with a picture column and a label column.
        image_column, label_column: their names; found by type, then by usual names, when None.
        class_names: names in label order; needed when labels are plain numbers, and overriding a `ClassLabel`'s
            names position by position.
        default_names: names to use when labels are plain numbers and `class_names` is None.
        drop_unlabelled: leave out rows without a label instead of refusing them.

    Attributes:
        labels: N class ids. class_names: K names. indices: N positions in the dataset that was given.

    Raises:
        DataError: no such column, an empty dataset, unlabelled rows, or labels outside the classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        class_names: Any = None,
        default_names: Sequence[str] | None = None,
        drop_unlabelled: bool = False,
    ) -> None:
        if isinstance(dataset, (IterableDataset, IterableDatasetDict)):
            load_splits(dataset)  # raises the error about streams
        if isinstance(dataset, DatasetDict):
            raise DataError(f"Pass one split, not all of them: choose from {list(dataset)}.")
        if not isinstance(dataset, Dataset):
            raise DataError(f"Expected a datasets.Dataset with pictures and labels; got {type(dataset).__name__}.")
        if len(dataset) == 0:
            raise DataError("The dataset is empty: there is nothing to train on or to evaluate.")
        self.image_column = _find_column(dataset, image_column, "image", _IMAGE_NAMES, Image)
        self.label_column = _find_column(dataset, label_column, "label", _LABEL_NAMES, ClassLabel)
        feature = dataset.features[self.label_column]
        labels = _column(dataset, self.label_column)
        self.class_names, self.labels = _resolve_labels(labels, feature, class_names, default_names, self.label_column)
        self.indices = list(range(len(dataset)))
        images = dataset.with_format(None).select_columns([self.image_column])
        if isinstance(dataset.features[self.image_column], Image):
            images = images.cast_column(self.image_column, Image(decode=False))
        self._images = images
        unlabelled = [index for index, label in enumerate(self.labels) if label < 0]
        if unlabelled and not drop_unlabelled:
            raise DataError(
                f"{len(unlabelled)} of {len(self.labels)} rows have no label (None or -1), the first at index "
                f"{unlabelled[0]}. Label them, or leave them out with drop_unlabelled=True (--drop-unlabelled)."
            )
        if unlabelled:
            kept = self.select([index for index, label in enumerate(self.labels) if label >= 0])
            if not len(kept):
                raise DataError("No row has a label: there is nothing to train on or to evaluate.")
            self.labels, self.indices, self._images = kept.labels, kept.indices, kept._images

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> Any:
        """The undecoded cell of one picture: `{"bytes", "path"}` or a path."""
        return self._images[index][self.image_column]

    def image(self, index: int, draft: tuple[int, int] | None = None) -> PIL.Image.Image:
        """One picture, see `read_image`."""
        try:
            return read_image(self.source(index), draft)
        except ImageError as error:
            raise ImageError(f"Row {self.indices[index]}: {error}") from error

    def digest(self, index: int) -> str:
        """SHA-256 of one picture's file content."""
        cell = self.source(index)
        content = cell.get("bytes") if isinstance(cell, Mapping) else None
        if content is None:
            path = cell.get("path") if isinstance(cell, Mapping) else cell
            try:
                content = Path(str(path)).read_bytes()
            except (OSError, TypeError) as error:
                raise ImageError(f"Row {self.indices[index]}: {path!r} cannot be read: {error}") from error
        return hashlib.sha256(content).hexdigest()

    def select(self, indices: Sequence[int]) -> LabelledImages:
        """The same dataset restricted to positions, in that order."""
        part = object.__new__(LabelledImages)
        part.__dict__.update(self.__dict__)
        part.labels = [self.labels[index] for index in indices]
        part.indices = [self.indices[index] for index in indices]
        part._images = self._images.select(indices)
        return part

    def aligned(self, class_names: Sequence[str], label_map: Mapping[str, str] | str | None = None) -> LabelledImages:
        """The same pictures with labels in another order of classes, matched by name.

        Args:
            class_names: the classes of a model, in its order. The dataset may have fewer.
            label_map: dataset name to model name where they differ, or `"position"` to match by number.

        Raises:
            DataError: a label that occurs has a name the model does not know.
        """
        if list(class_names) == self.class_names:
            return self
        part = self.select(range(len(self)))
        part.class_names = list(class_names)
        if label_map == "position":
            if max(self.labels) >= len(class_names):
                raise DataError(
                    f"The dataset has label {max(self.labels)}, the model {len(class_names)} classes (0 to "
                    f"{len(class_names) - 1})."
                )
            return part
        names = (
            [label_map.get(name, name) for name in self.class_names]
            if isinstance(label_map, Mapping)
            else self.class_names
        )
        position = {name: index for index, name in enumerate(class_names)}
        used = sorted(set(self.labels))
        unknown = [names[label] for label in used if names[label] not in position]
        if unknown:
            raise DataError(
                f"The dataset has classes the model does not know: {unknown[:5]}{' ...' if len(unknown) > 5 else ''}. "
                f"The model knows {list(class_names)[:5]}{' ...' if len(class_names) > 5 else ''}. Give a label_map "
                "{dataset name: model name}, or label_map='position' if only the wording differs."
            )
        part.labels = [position[names[label]] for label in self.labels]
        return part


def _find_column(dataset: Dataset, given: str | None, kind: str, usual: Sequence[str], feature_type: type) -> str:
    columns = dataset.column_names
    if given is not None:
        if given not in columns:
            raise DataError(f"There is no {kind} column {given!r}; the dataset has {columns}.")
        return given
    typed = [name for name in columns if isinstance(dataset.features[name], feature_type)]
    for candidates in (typed, columns):
        by_name = [name for name in usual if name in candidates]
        if by_name:
            return str(by_name[0])
        if candidates is typed and len(typed) == 1:
            return str(typed[0])
    raise DataError(f"No {kind} column was recognised among {columns}. Name it with {kind}_column= (--{kind}-column).")


def _column(dataset: Dataset, name: str) -> list[Any]:
    return list(dataset.with_format(None).select_columns([name])[:][name])


def _resolve_labels(
    labels: list[Any], feature: Any, class_names: Any, default_names: Sequence[str] | None, column: str
) -> tuple[list[str], list[int]]:
    """Class names, and labels as ids with -1 for none."""
    if isinstance(feature, ClassLabel):
        names = check_class_names(feature.names if class_names is None else class_names, minimum=1)
        if len(names) != len(feature.names):
            raise DataError(
                f"class_names has {len(names)} names, the column {column!r} {len(feature.names)} classes: "
                f"{feature.names[:5]} ..."
            )
        ids = [-1 if label is None else int(label) for label in labels]
    elif all(label is None or isinstance(label, str) for label in labels):
        found = sorted({label for label in labels if label})
        if not found:
            raise DataError(f"The label column {column!r} is empty: there is nothing to learn from.")
        names = check_class_names(found if class_names is None else class_names, minimum=1)
        position = {name: index for index, name in enumerate(names)}
        cleaned = {text: check_class_names([text], minimum=1)[0] for text in found}
        unknown = [text for text in found if cleaned[text] not in position]
        if unknown:
            raise DataError(f"Labels {unknown[:5]} in column {column!r} are not among class_names {names[:5]} ...")
        ids = [position[cleaned[label]] if label else -1 for label in labels]
    elif all(label is None or (isinstance(label, int) and not isinstance(label, bool)) for label in labels):
        class_names = default_names if class_names is None else class_names
        if class_names is None:
            raise DataError(
                f"The labels in column {column!r} are plain numbers, without names to make prompts from. Pass "
                "class_names=[...] in label order (--class-names), or cast the column to datasets.ClassLabel."
            )
        names = check_class_names(class_names, minimum=1)
        ids = [-1 if label is None else int(label) for label in labels]
    else:
        kinds = sorted({type(label).__name__ for label in labels})
        raise DataError(f"Labels must be class ids or names, one per picture; column {column!r} holds {kinds}.")
    outside = sorted({label for label in ids if label >= len(names) or label < -1})
    if outside:
        raise DataError(
            f"Labels {outside[:5]} in column {column!r} are outside the {len(names)} classes (0 to {len(names) - 1})."
        )
    return names, ids


# ---------------------------------------------------------------------- few-shot sampling


def few_shot_indices(
    labels: Sequence[int],
    shots: int,
    seed: int = 1,
    *,
    on_short: str = "warn",
    class_names: Sequence[str] | None = None,
) -> list[int]:
    """Positions of `shots` examples of each class.

    The same draw as CoOp's and TaskRes's code: classes in the order their first example appears, `random.sample`
    of a generator seeded once.

    Args:
        labels: N class ids.
        shots: examples per class, at least 1.
        seed: seed of the draw.
        on_short: a class with fewer examples gives all it has; `"warn"` names it, `"raise"` refuses, `"ignore"` is
            silent. Other classes are never reduced.
        class_names: for the messages.

    Raises:
        FewShotError: `on_short="raise"` and a class is short.
        DataError: `shots` or `on_short` is not valid.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise DataError(f"`shots` must be a whole number of at least 1; got {shots!r}.")
    if on_short not in ("warn", "raise", "ignore"):
        raise DataError(f"`on_short` must be 'warn', 'raise' or 'ignore'; got {on_short!r}.")
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        if label >= 0:
            by_class.setdefault(int(label), []).append(index)
    names = {label: class_names[label] if class_names else str(label) for label in by_class}
    short = {names[label]: len(members) for label, members in by_class.items() if len(members) < shots}
    if short and on_short != "ignore":
        listed = ", ".join(f"{name} ({count})" for name, count in list(short.items())[:10])
        message = f"{len(short)} of {len(by_class)} classes have fewer than {shots} training pictures: {listed}"
        if on_short == "raise":
            raise FewShotError(f"{message}. Add pictures, ask for fewer shots, or allow it with on_short='warn'.")
        warnings.warn(f"{message}. All they have is taken.", stacklevel=2)
    generator = random.Random(seed)
    chosen: list[int] = []
    for members in by_class.values():
        chosen += members if len(members) < shots else generator.sample(members, shots)
    return chosen


def sample_few_shot(
    dataset: Dataset,
    shots: int,
    seed: int = 1,
    *,
    label_column: str | None = None,
    on_short: str = "warn",
) -> Dataset:
    """`shots` examples of each class as a `Dataset`; arguments as in `few_shot_indices`.

    To replay a stored draw: `dataset.select(model.config.few_shot["indices"])`.
    """
    column = _find_column(dataset, label_column, "label", _LABEL_NAMES, ClassLabel)
    feature = dataset.features[column]
    labels = _column(dataset, column)
    names = (
        list(feature.names)
        if isinstance(feature, ClassLabel)
        else [str(n) for n in dict.fromkeys(labels) if n is not None]
    )
    ids = {name: index for index, name in enumerate(names)}
    labels = [-1 if n is None else n if isinstance(feature, ClassLabel) else ids[str(n)] for n in labels]
    return dataset.select(few_shot_indices(labels, shots, seed, on_short=on_short, class_names=names))


def class_counts(labels: Iterable[int], class_names: Sequence[str]) -> dict[str, int]:
    """Number of pictures per class name, in class order."""
    counts = Counter(labels)
    return {name: counts.get(index, 0) for index, name in enumerate(class_names)}
