"""What training would reach on a task, told before any training, with intervals that say how well it is known.

A straight line in a few measures of `analysis.difficulty`, whose constants lie in `difficulty.json` beside this file.
`python -m benchmarks.difficulty --fit` writes them; `docs/difficulty.md` says how they were measured.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import LabelledImages, load_training_data
from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError, DataError
from ..few_shot import few_shot_indices
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import TaskResClassifier
from ..tables import Table, percent
from ..training import TaskResTrainer, TaskResTrainingArguments
from .difficulty import class_measures, task_measures

CONSTANTS = Path(__file__).with_name("difficulty.json")
UNLABELLED, ONE, SEVERAL = "unlabelled", "one picture a class", "several pictures a class"
_MOST_SHOTS = 16  # of the tasks that the constants come from
_CLIP = 0.02  # accuracies are looked at as log-odds, from here to 1 - this


def log_odds(share: float) -> float:
    share = min(max(share, _CLIP), 1.0 - _CLIP)
    return math.log(share / (1.0 - share))


def share_of(odds: float) -> float:
    """The share that log-odds stand for."""
    return 1.0 / (1.0 + math.exp(-odds))


def task_values(measures: Mapping[str, float], classes: int, given: int) -> dict[str, float]:
    """What the lines for a task are made of: its measures, and how many classes and pictures a class there are.

    Args:
        measures: of `task_measures`. classes: K. given: labelled pictures a class that they were made from, or 0.
    """
    values = {"log_classes": math.log2(classes), "log_given": math.log2(max(given, 1)), **measures}
    for name in ("zero_shot_accuracy", "class_means", "nearest_neighbour", "cross_validated"):
        if name in values:  # a few pictures that are all right or all wrong do not mean 100 or 0 %
            values[name] = log_odds((8.0 * values[name] + 1.0 / classes) / 9.0)
    return values


def class_values(measures: Mapping[str, Tensor], task: Mapping[str, float]) -> list[dict[str, float]]:
    """What the lines for classes are made of, K times: its measures, and their means over the classes.

    Args:
        measures: of `class_measures`; a class that has none gets the mean. task: of `task_values`.
    """
    means = {name: float(values.nanmean()) for name, values in measures.items()}
    classes = len(next(iter(measures.values())))
    same = {name: value for name, value in task.items() if name.startswith("log_")}
    same |= {f"mean_{name}": value for name, value in means.items()}
    rows = []
    for place in range(classes):
        own = {name: float(values[place]) for name, values in measures.items()}
        rows.append(same | {name: means[name] if math.isnan(value) else value for name, value in own.items()})
    return rows


def cell_of(values: Mapping[str, float], shots: int) -> str:
    """Whose errors say how far to trust a line: pictures a class given, and shots, each one of 1, 2, 4, 8, 16."""
    given = min(max(round(values["log_given"]), 0), 4)
    return f"{2**given} given, {2 ** round(math.log2(shots))} shots"


@dataclass(frozen=True)
class Line:
    """A straight line, how far from it left-out tasks were, and where it was fitted.

    Attributes:
        terms: names of values, or products of two (`cross_validated*log_shots`). weights: one a term. intercept.
        seen: value to its least and largest among the tasks it was fitted on. spread: value to its standard deviation.
        halves: share of left-out tasks to be covered, as text, to half the width of the interval by `cell_of`.
        coverage: the share that was really covered, by what was left out of line and widths (`task`, `kind`, `base`),
            then by level.
    """

    terms: tuple[str, ...]
    weights: tuple[float, ...]
    intercept: float
    seen: Mapping[str, tuple[float, float]]
    spread: Mapping[str, float]
    halves: Mapping[str, Mapping[str, float]]
    coverage: Mapping[str, Mapping[str, float]]

    def at(self, values: Mapping[str, float], shots: int) -> float:
        """The line's value at a number of shots; values outside what was seen count as the nearest seen."""
        known = {"log_shots": math.log2(shots), **self._inside(values)}
        return self.intercept + sum(
            weight * math.prod(known[name] for name in term.split("*"))
            for term, weight in zip(self.terms, self.weights, strict=True)
        )

    def _inside(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: min(max(values[name], low), high) for name, (low, high) in self.seen.items()}

    def outside(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values outside what was seen, with how far, in standard deviations."""
        far = {name: abs(values[name] - inside) for name, inside in self._inside(values).items()}
        return {name: gap / max(self.spread[name], 1e-9) for name, gap in far.items() if gap > 0}

    def half(self, values: Mapping[str, float], shots: int, level: str) -> float:
        """Half width of the interval, wider by each standard deviation that the farthest value lies outside."""
        return self.halves[level][cell_of(values, shots)] * (1.0 + max(self.outside(values).values(), default=0.0))


@cache
def constants() -> dict[str, Any]:
    """What `python -m benchmarks.difficulty --fit` wrote: `made_by`, `of`, and `lines` by mode and target."""
    read: dict[str, Any] = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    read["lines"] = {
        mode: {
            target: Line(**{**line, "terms": tuple(line["terms"]), "weights": tuple(line["weights"])})
            for target, line in lines.items()
        }
        for mode, lines in read["lines"].items()
    }
    return read


# ------------------------------------------------------------------------------------------------------- what is told


@dataclass(frozen=True)
class Expected:
    """What recipe `auto` is expected to reach on test pictures: shares from 0 to 1, intervals as (low, high)."""

    shots: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


@dataclass(frozen=True)
class ClassDifficulty:
    """A class: `difficulty` (the share of its pictures expected to be answered wrongly) and its accuracy."""

    name: str
    difficulty: float
    accuracy: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True)
class TransferDifficulty:
    """How hard a task is for a base model.

    Attributes:
        difficulty: mistakes expected after training on `shots` pictures a class, as a share of those of chance: 0 none,
            1 as many. difficulty_interval: (low, high).
        shots: what `difficulty` and `per_class` speak of.
        expected: at each number of shots asked for. per_class: the most difficult first.
        level: how often intervals are meant to hold. coverage: how often those of `accuracy`, `gain` and
            `class_accuracy` really did, where a `task`, a `kind` of tasks or a `base` model was left out.
        measures: by name, see `analysis.difficulty`.
        made_from: `mode`, `pictures`, `pictures_per_class` (0 without labels), `classes`, `constants`.
        outside: measures outside those of the tasks that the constants come from; nothing is known there, the values
            are those of the nearest seen, and the intervals are wider.
    """

    difficulty: float
    difficulty_interval: tuple[float, float]
    shots: int
    expected: tuple[Expected, ...]
    per_class: tuple[ClassDifficulty, ...]
    level: float
    coverage: Mapping[str, Mapping[str, float]]
    measures: Mapping[str, float]
    made_from: Mapping[str, Any]
    outside: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """Accuracy and gain expected at each number of shots."""
        rows = [
            [one.shots, percent(one.accuracy), _between(one.accuracy_interval), f"{100 * one.gain:+.1f}",
             _between(one.gain_interval, "+.1f")]
            for one in self.expected
        ]  # fmt: skip
        share = f"{100 * self.level:.0f} %"
        return Table(["shots", "accuracy", f"{share} interval", "gain, points", f"{share} interval "], rows)

    def class_table(self, most: int | None = None) -> Table:
        """The most difficult classes first."""
        rows = [
            [one.name, percent(one.accuracy), _between(one.accuracy_interval)] for one in list(self.per_class)[:most]
        ]
        return Table(["class", f"accuracy at {self.shots}", f"{100 * self.level:.0f} % interval"], rows)

    def _repr_html_(self) -> str:
        return self.table().html() + self.class_table().html()


def _between(interval: tuple[float, float], form: str = ".1f") -> str:
    return " to ".join(format(100 * value, form) for value in interval)


# ------------------------------------------------------------------------------------------------------- from a user


def transfer_difficulty(
    model: Any,
    images: Any,
    *,
    labelled: bool | None = None,
    shots: int | Sequence[int] = (1, 2, 4, 8, 16),
    at: int = 4,
    level: float = 0.8,
    seed: int = 1,
    arguments: TaskResTrainingArguments | None = None,
    reading: Mapping[str, Any] | None = None,
) -> TransferDifficulty:
    """How hard a task is, and what recipe `auto` is expected to reach on it, before training.

    Nothing is trained but small fits on parts of the labelled pictures that are given; the model is not changed, and a
    trained one is looked at as the zero-shot classifier of its classes.

    Args:
        model: a `TaskResCLIPForImageClassification`, the folder or Hub id of a saved one, or its head (a
            `TaskResClassifier`), which is enough for embeddings.
        images: `ImageFeatures`, or embeddings [N, D] (no labels); a `datasets.Dataset`, a folder, a table or a Hub id
            as for `load_training_data`, of which the training split is looked at; or pictures as a list of files or
            PIL images (no labels). A folder of pictures without class folders has no labels. At least 2 different
            pictures; of equal ones one is used.
        labelled: whether to use labels: None where there are some, False not.
        shots: pictures a class to say what is expected at, from 1 to 16.
        at: the one that `difficulty` and `per_class` speak of.
        level: the share of tasks that intervals are to hold: 0.5, 0.8 or 0.9.
        seed: of the draw of 16 pictures a class, where there are more labelled ones.
        arguments: how pictures are embedded. reading: options of `load_training_data`.

    Returns:
        What is expected, with intervals. How often they hold is in `coverage`, measured on 13 tasks of photographs and
        emoji and two small encoders, one task left out at a time; of other encoders and pictures nothing is known.

    Raises:
        ConfigurationError: shots or level outside what was measured, or a head without embeddings.
        DataError: fewer than 2 pictures, fewer than 2 classes, several labels per picture, or as `load_training_data`.

    Warns of equal pictures, and of measures outside those of the tasks that the constants come from.
    """
    wanted = _checked_shots(shots, at)
    known, key = constants(), f"{level:g}"
    levels = known["lines"][UNLABELLED]["accuracy"].halves
    if key not in levels:
        raise ConfigurationError(f"`level` must be one of {', '.join(levels)}; got {level!r}.")
    data = _Given.read(model, images, labelled, seed, arguments, reading)
    lines: dict[str, Line] = known["lines"][data.mode]
    head = data.head
    measures = task_measures(data.embeds, head.base, head.logit_scale, data.labels)
    values = task_values(measures, len(head.base), data.per_class)
    told = {count: _expected(lines, values, count, key) for count in {*wanted, at}}
    rows = class_values(class_measures(data.embeds, head.base, head.logit_scale, data.labels), values)
    chance = 1.0 - 1.0 / len(head.base)
    low, high = told[at].accuracy_interval
    outside = tuple(sorted({name for target in ("accuracy", "gain") for name in lines[target].outside(values)}))
    if outside:
        warnings.warn(
            f"Nothing like this was among the tasks that the prediction comes from ({', '.join(outside)} outside what "
            "was seen): take it as a guess. The intervals are widened, by a rule that was not measured.",
            stacklevel=2,
        )
    return TransferDifficulty(
        (1.0 - told[at].accuracy) / chance, ((1.0 - high) / chance, (1.0 - low) / chance), at,
        tuple(told[count] for count in wanted), _hardest(data.names, lines["class_accuracy"], rows, at, key), level,
        {target: {what: held[key] for what, held in line.coverage.items()} for target, line in lines.items()}, measures,
        {"mode": data.mode, "pictures": len(data.embeds), "pictures_per_class": data.per_class,
         "classes": len(head.base), "constants": known["made_by"]},
        outside,
    )  # fmt: skip


def _checked_shots(shots: int | Sequence[int], at: int) -> list[int]:
    wanted = [shots] if isinstance(shots, int) else list(shots)
    for count in [*wanted, at]:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_SHOTS:
            raise ConfigurationError(f"`shots` must be from 1 to {_MOST_SHOTS}, what was measured; got {count!r}.")
    if not wanted:
        raise ConfigurationError("`shots` is empty: name a number of pictures a class, such as 4.")
    return sorted(set(wanted))


def _expected(lines: Mapping[str, Line], values: Mapping[str, float], shots: int, level: str) -> Expected:
    odds, half = lines["accuracy"].at(values, shots), lines["accuracy"].half(values, shots, level)
    gain, gain_half = lines["gain"].at(values, shots), lines["gain"].half(values, shots, level)
    return Expected(
        shots, share_of(odds), (share_of(odds - half), share_of(odds + half)), gain,
        (max(-1.0, gain - gain_half), min(1.0, gain + gain_half)),
    )  # fmt: skip


def _hardest(
    names: Sequence[str], line: Line, rows: Sequence[Mapping[str, float]], shots: int, level: str
) -> tuple[ClassDifficulty, ...]:
    found = []
    for name, values in zip(names, rows, strict=True):
        middle, half = line.at(values, shots), line.half(values, shots, level)
        low, accuracy, high = (min(max(value, 0.0), 1.0) for value in (middle - half, middle, middle + half))
        found.append(ClassDifficulty(name, 1.0 - accuracy, accuracy, (low, high)))
    return tuple(sorted(found, key=lambda one: -one.difficulty))


@dataclass(frozen=True)
class _Given:
    """A head, embeddings [N, D], labels [N] or None, class names, and labelled pictures a class (0: none)."""

    head: TaskResClassifier
    embeds: Tensor
    labels: Tensor | None
    names: list[str]
    per_class: int

    @property
    def mode(self) -> str:
        if self.labels is None:
            return UNLABELLED
        return SEVERAL if int(torch.bincount(self.labels).max()) > 1 else ONE

    @classmethod
    def read(cls, model: Any, images: Any, labelled: bool | None, seed: int, arguments: Any, reading: Any) -> _Given:
        embeds, labels, head, names = _embedded(model, images, labelled, arguments, reading)
        if len(head.base) < 2:
            raise DataError("The difficulty of a task needs two classes or more; the model has one.")
        if embeds.ndim != 2 or embeds.shape[1] != head.base.shape[1] or len(embeds) < 2:
            raise DataError(
                f"Embeddings must be [N, {head.base.shape[1]}] of 2 or more pictures; got {list(embeds.shape)}."
            )
        if not bool(torch.isfinite(embeds).all()):
            raise DataError("Embeddings hold NaN or infinite values: check the pictures and the base model.")
        if labels is None:
            return cls(head, embeds, None, names, 0)
        if labels.ndim != 1:
            raise DataError("The difficulty of tasks with several labels per picture was not measured; use one label.")
        rows = few_shot_indices(labels.tolist(), _MOST_SHOTS, seed, on_short="ignore")
        embeds, labels = embeds[rows], labels[rows]
        counts = torch.bincount(labels, minlength=len(head.base))
        if int((counts > 0).sum()) < 2:
            raise DataError("Only one class has labelled pictures: label some of another, or pass labelled=False.")
        return cls(head, embeds, labels, names, round(float(counts[counts > 0].double().median())))


def _embedded(
    model: Any, images: Any, labelled: bool | None, arguments: TaskResTrainingArguments | None, reading: Any
) -> tuple[Tensor, Tensor | None, TaskResClassifier, list[str]]:
    if isinstance(model, (str, os.PathLike)):
        model = TaskResCLIPForImageClassification.from_pretrained(model)
    head = model if isinstance(model, TaskResClassifier) else model.classifier
    names = [f"class {number}" for number in range(len(head.base))] if head is model else model.class_names
    if isinstance(images, Tensor):
        if labelled:
            raise DataError("Embeddings alone have no labels: pass ImageFeatures, which have.")
        return images, None, head, names
    if isinstance(images, ImageFeatures):
        if head is model:
            names = images.class_names
        if names != images.class_names:
            raise DataError("The embeddings have other classes than the model, or in another order.")
        images = _each_once(images)
        return images.image_embeds[0], None if labelled is False else images.labels, head, names
    if head is model:
        raise ConfigurationError("A head alone embeds no pictures: pass the model, or ImageFeatures.")
    source, known = read_pictures(images, names, labelled, reading)
    made = _each_once(TaskResTrainer(model, arguments or TaskResTrainingArguments()).embed(source))
    return made.image_embeds[0], made.labels if known else None, head, names


def _each_once(data: ImageFeatures) -> ImageFeatures:
    """A copy of a picture, left out or not, would answer for it."""
    rows = data.each_once()
    if len(rows) == len(data):
        return data
    warnings.warn(
        f"{len(data) - len(rows)} of {len(data)} pictures are there more than once; they are left out.", stacklevel=4
    )
    return data.select(rows)


def read_pictures(
    images: Any,
    class_names: Any = None,
    labelled: bool | None = None,
    reading: Mapping[str, Any] | None = None,
) -> tuple[LabelledImages, bool]:
    """Pictures as something to embed, and whether they have labels; those without are all given the first class.

    Args:
        images: anything but embeddings that `transfer_difficulty` takes. labelled, reading: as there.
        class_names: in label order, or a mapping from label to name; needed where there are no labels, else the data's.

    Raises:
        ConfigurationError: no labels and no names. DataError: `labelled` is true and there are none.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    from ..data.folders import NoClassFoldersError
    from ..picture_files import find_images

    def without_labels(pictures: Any, found: str = "These pictures have no labels.") -> tuple[LabelledImages, bool]:
        if labelled:
            raise DataError(f"{found} Give a folder per class, a table or a dataset with a label column.")
        if not isinstance(class_names, (list, tuple)):
            raise ConfigurationError(
                f"{found} To measure without labels, say what the classes are: class_names=[...] (--class-names)."
            )
        if not len(pictures):
            raise DataError(f"There are no pictures in {images!r}.")
        rows = pictures
        if not isinstance(pictures, Dataset):
            rows = Dataset.from_dict({"image": list(pictures)}, Features({"image": Image()}))
        rows = rows.add_column("label", [0] * len(rows)).cast_column("label", ClassLabel(names=list(class_names)))
        return LabelledImages(rows), False

    if isinstance(images, LabelledImages):
        return images, labelled is not False
    if isinstance(images, Dataset):
        column = next((name for name, kind in images.features.items() if isinstance(kind, Image)), None)
        if column is not None and (len(images.features) == 1 or (labelled is False and class_names is not None)):
            return without_labels(images.select_columns([column]))
    elif isinstance(images, (list, tuple)):
        return without_labels([os.fspath(one) if isinstance(one, os.PathLike) else one for one in images])
    elif labelled is False and class_names is not None and os.path.isdir(images):
        return without_labels(find_images([images]))
    try:
        data = load_training_data(images, eval_split="none", **{"class_names": class_names, **(reading or {})})
    except NoClassFoldersError as error:
        return without_labels(find_images([images]), str(error))
    return data.train, labelled is not False
