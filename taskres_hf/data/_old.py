"""Open a dataset as named splits."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)

from ..errors import DataError
from ..pictures import IMAGE_EXTENSIONS
from .labelled import STREAMED

_SHARD = re.compile(r"-\d+-of-\d+$")


_SPLIT_ALIASES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
}


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
        raise DataError(STREAMED)
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
