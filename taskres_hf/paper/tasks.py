"""Tasks to compare methods on: a user's own pictures, or datasets described here, each with what is measured on.

Where a source has no split to measure on, every seed holds a part of each class out, and draws from the rest.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from ..data.labelled import LabelledImages
from ..data.training_data import load_training_data
from ..errors import ConfigurationError, DataError, ImageError
from ..storage import is_path
from ..training.recipes import PUBLISHED_ALPHA
from .datasets import dataset_names, describe_dataset, open_dataset, suite_datasets

HOLDOUT = 0.5  # of each class, where no split is held out: with few pictures a smaller part measures hardly anything


@dataclass(frozen=True)
class Task:
    """Pictures to draw shots from and to measure on.

    Attributes:
        name: in tables and `results.csv`.
        train: what shots are drawn from. test: what is measured on; None where every seed holds a part of `train` out.
        holdout: that part, of each class. templates, prompt_names, alpha: of the classifier, see `from_base`.
        notes: what a reader of the numbers has to know.
    """

    name: str
    train: LabelledImages
    test: LabelledImages | None
    holdout: float = HOLDOUT
    templates: str | list[str] | None = None
    prompt_names: dict[str, str] = field(default_factory=dict)
    alpha: float = PUBLISHED_ALPHA
    notes: list[str] = field(default_factory=list)

    def parts(self, seed: int) -> tuple[list[int], list[int] | None]:
        """Positions in `train` that shots are drawn from, and those held out (None where `test` is measured on)."""
        if self.test is not None:
            return list(range(len(self.train))), None
        held = held_out_rows(self.train, self.holdout, seed)
        return [row for row in range(len(self.train)) if row not in held], sorted(held)


def held_out_rows(images: LabelledImages, share: float, seed: int) -> set[int]:
    """A random share of each class, equal pictures always on the same side.

    Args:
        share: of each class, between 0 and 1; at least one picture is held out and at least one is not. A class with
            one picture keeps it, and is not measured.

    Raises:
        DataError: no class has two pictures.
    """
    digests: list[str] = []
    for row in range(len(images)):
        digests.append(f"row {row}")  # what cannot be read equals nothing
        with suppress(ImageError):
            digests[row] = images.digest(row)
    members: dict[int, dict[str, None]] = {}
    for digest, label in zip(digests, images.labels, strict=True):
        members.setdefault(label, {})[digest] = None
    generator, held = random.Random(seed), set()
    for label in sorted(members):
        pictures = list(members[label])
        count = min(max(round(share * len(pictures)), 1), len(pictures) - 1)
        held.update(generator.sample(pictures, count))
    if not held:
        noun = images.noun
        raise DataError(f"No class has two different {noun}s, so none can be measured on: add {noun}s.")
    return {row for row, digest in enumerate(digests) if digest in held}


def open_tasks(
    data: Any,
    *,
    root: str | os.PathLike[str] | None = None,
    allow_other_split: bool = False,
    templates: str | Sequence[str] | None = None,
    holdout: float | None = None,
    reading: Mapping[str, Any] | None = None,
) -> list[Task]:
    """Open everything that methods are to be compared on, and check it before anything expensive.

    Args:
        data: one source, a list of them, or a mapping from name to source. A source is the name of a described dataset
            (see `taskres benchmark --list`), `"paper"` or `"shipped"` for all of a kind, or anything that
            `load_training_data` reads. What exists on this machine is never taken for a name.
        root, allow_other_split: of described datasets, see `open_dataset`.
        templates: prompts instead of each dataset's own.
        holdout: share of each class to hold out, also where there is a split to measure on; None takes the test split,
            else the validation split, else half of each class.
        reading: further arguments of `load_training_data`.

    Raises:
        DataError: as `load_training_data` and `open_dataset`.
        ConfigurationError: two sources have one name, or `holdout` is not a share.
    """
    if holdout is not None and not (isinstance(holdout, float) and 0 < holdout < 1):
        raise ConfigurationError(f"holdout= is a share of each class between 0 and 1, such as 0.5; got {holdout!r}.")
    tasks: list[Task] = []
    for name, source in named_sources(data):
        if isinstance(source, str) and source in suite_datasets() and not os.path.exists(source):
            task = _described(name or source, source, root, allow_other_split, templates, holdout)
        else:
            task = _own(name or default_name(source), source, templates, holdout, reading or {})
        if task.name in {other.name for other in tasks}:
            raise ConfigurationError(
                f"Two datasets are called {task.name!r}: name them, as in {{'first': ..., 'second': ...}} "
                "(first=PATH second=PATH)."
            )
        tasks.append(task)
    if not tasks:
        raise ConfigurationError("There is nothing to compare methods on: name a dataset.")
    return tasks


def named_sources(data: Any) -> list[tuple[str | None, Any]]:
    """Sources and the names given to them, with `"paper"` and `"shipped"` written out; see `open_tasks`."""
    if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
        return list(data.items())
    sources = list(data) if isinstance(data, (list, tuple)) else [data]
    named: list[tuple[str | None, Any]] = []
    for source in sources:
        group = dataset_names(source) if isinstance(source, str) and not os.path.exists(source) else [source]
        named += [(None, member) for member in group]
    return named


def default_name(source: Any) -> str:
    """A Hub id as it is, of a path the last part without its ending."""
    if not isinstance(source, (str, os.PathLike)):
        return "dataset"
    path = Path(source).expanduser().absolute()
    return (path.name if path.is_dir() else path.stem) if is_path(source) else str(source)


def _described(
    name: str, dataset: str, root: Any, allow_other_split: bool, templates: Any, holdout: float | None
) -> Task:
    spec, data = describe_dataset(dataset), open_dataset(dataset, root, allow_other_split=allow_other_split)
    if "train" not in data.splits:
        raise DataError(f"{dataset} has no training split to draw shots from; compare on {spec.get('source')}.")
    test = data.splits.get("test") if holdout is None else None
    return Task(
        name, data.splits["train"], test, holdout or HOLDOUT,
        templates or spec.get("template") or spec["template_set"], data.prompt_names, spec["alpha"],
        [*data.notes, *_measured_on(data.splits["train"], test, holdout or HOLDOUT)],
    )  # fmt: skip


def _own(name: str, source: Any, templates: Any, holdout: float | None, reading: Mapping[str, Any]) -> Task:
    options = dict(reading)
    if holdout is not None:
        if options.get("eval_split") not in (None, "none"):
            raise ConfigurationError(
                "Choose one: holdout= holds a part of the training split out, eval_split= another."
            )
        options["eval_split"] = "none"
    train, test, account = load_training_data(source, **options)
    notes = [*account.notes, *_measured_on(train, test, holdout or HOLDOUT)]
    return Task(name, train, test, holdout or HOLDOUT, templates, notes=notes)


def _measured_on(train: LabelledImages, test: LabelledImages | None, holdout: float) -> list[str]:
    if test is not None:
        return [f"Measured on the {len(test)} pictures of {test.split or 'test'}."]
    note = f"No split is held out: each seed measures on {100 * holdout:g} % of each class and draws from the rest."
    sizes: dict[int, int] = {}
    for label in train.labels:
        sizes[label] = sizes.get(label, 0) + 1
    alone = sum(size < 2 for size in sizes.values())
    return [note, *([f"{alone} classes have one picture and are not measured."] if alone else [])]
