"""What was found in a source, before classes get their names and splits their use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..errors import DataError
from .account import LeftOut, shorten
from .cells import Cells


@dataclass
class SplitReading:
    """One split: rows of a dataset, or N pictures with N labels (text, a number, or None for no label)."""

    name: str
    origin: str = ""
    dataset: Dataset | None = None
    cells: Cells | None = None
    labels: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.labels) if self.dataset is None else len(self.dataset)


@dataclass
class Reading:
    """A source as it was understood.

    Attributes:
        empty: names of classes without any picture.
        chosen: whether the caller gave one split only, which then is the one to use whatever it is called.
    """

    kind: str
    splits: list[SplitReading]
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    chosen: bool = False

    def split(self, name: str) -> SplitReading | None:
        """The split of that name, exact or under another of its usual names.

        Raises:
            DataError: several splits have such a name.
        """
        exact = [split for split in self.splits if split.name == name]
        wanted = split_name(name)
        near = exact or [split for split in self.splits if wanted and split_name(split.name) == wanted]
        if len(near) > 1:
            raise DataError(
                f"{shorten([split.name for split in near])} may all be meant by {name!r}: name one of them."
            )
        return near[0] if near else None


_SPLITS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout"),
}
_CANONICAL = {word: name for name, words in _SPLITS.items() for word in words}
_WORDS = "|".join(sorted(_CANONICAL, key=len, reverse=True))
_AFFIX = (
    r"(?:images?|imgs?|pictures?|pics?|photos?|datasets?|data|sets?|splits?|folders?|dirs?|files?|samples?|examples?|"
    r"subset|lists?|jpe?gs?|pngs?|[\W_\d])"
)
_SPLIT_NAME = re.compile(rf"{_AFFIX}*({_WORDS}){_AFFIX}*", re.IGNORECASE)
_WRAPPER = re.compile(rf"{_AFFIX}+", re.IGNORECASE)


def split_name(name: str) -> str | None:
    """`train`, `validation` or `test` for a usual spelling (`Train`, `01_train`, `val_images`), else None."""
    match = _SPLIT_NAME.fullmatch(name)
    return None if match is None else _CANONICAL[match.group(1).lower()]


def is_wrapper(name: str) -> bool:
    """Whether a folder's name says nothing but that there are pictures in it: `images`, `data`, `photos_2`."""
    return bool(re.search(r"[a-z]", name, re.IGNORECASE)) and _WRAPPER.fullmatch(name) is not None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
