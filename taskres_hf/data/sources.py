"""Open any source of labelled pictures as named splits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

from ..errors import DataError
from ..storage import is_path
from .labelled import STREAMED
from .reading import Reading, SplitReading


def load_splits(
    source: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Open a source as named splits of the `datasets` library, with columns `image` and `label` for files.

    Args:
        source: as for `load_training_data`.
        name: configuration of a Hub dataset.
        revision, token, cache_dir: as in `datasets.load_dataset`.

    Raises:
        DataError: as `load_training_data`.
    """
    if isinstance(source, DatasetDict):
        return source
    reading = read_source(source, name, revision, token, cache_dir)
    splits: dict[str, Dataset] = {}
    for split in reading.splits:
        if split.dataset is None:
            raise NotImplementedError
        splits[split.name] = split.dataset
    return DatasetDict(splits)


# ---------------------------------------------------------------------- opening


def read_source(
    source: Any, config_name: str | None, revision: str | None, token: str | bool | None, cache_dir: str | None
) -> Reading:
    """What is in a source; see `load_training_data`."""
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise DataError(STREAMED)
    if isinstance(source, Dataset):
        source = DatasetDict({str(source.split or "train"): source})
    if isinstance(source, DatasetDict):
        return _reading_of(source, "dataset")
    text = os.fspath(source)
    if is_path(source):
        from ._old import load_splits as old

        return _reading_of(old(source, cache_dir=cache_dir), "folder")
    loaded = load_dataset(text, config_name, revision=revision, token=token, cache_dir=cache_dir)
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    return _reading_of(splits, "dataset of the Hub")


def _reading_of(splits: Mapping[str, Dataset], kind: str) -> Reading:
    return Reading(kind, [SplitReading(str(name), dataset=part) for name, part in splits.items()])
