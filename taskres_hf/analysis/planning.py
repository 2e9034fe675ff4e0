"""How many more pictures a target takes, for which classes, and how sure that is: `plan_pictures`, `taskres plan`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError, DataError, MissingExtraError
from ..paper.figures import drawing, image
from ..residual import TaskResClassifier
from ..storage import check_can_write, write_bytes
from ..tables import Table, percent, visible
from .learning_curve import Growth, LearningCurve, measure_growth

BEYOND = 8.0  # times the pictures at hand, past which nothing is foretold
METRICS = ("accuracy", "balanced")
_WIDEST = 0.3  # 80 % interval of the accuracy with twice the pictures, past which nothing is told
_BELIEF = 4.0  # tested pictures that the curve counts as in the accuracy of a class
_NAMED = 5  # classes in the sentence
_DECIMALS = 6  # of numbers of pictures a class, which are means
_NUMBERS = ("what", "pictures_a_class", "accuracy", "low80", "high80", "low95", "high95")


@dataclass(frozen=True)
class Forecast:
    """Accuracy with so many pictures a class: expected, and from where to where with a probability of 80 and 95 %."""

    shots: int
    expected: float
    low: float
    high: float
    low95: float
    high95: float


@dataclass(frozen=True)
class ClassPlan:
    """One class.

    Attributes:
        pictures: at hand. tested: pictures of it that were classified without having been trained on.
        accuracy: share of those that were right, drawn towards what the curve says of such a number of pictures.
        more: pictures to label until it has as many as planned; None where there is no number.
        gain: what that number (or twice the pictures, where there is none) would add to the metric if it fell with the
            curve; the order of the classes, and no more than that.
    """

    name: str
    pictures: int
    tested: int
    accuracy: float
    more: int | None
    gain: float


@dataclass(frozen=True)
class Plan:
    """How many pictures a class reach a target.

    Attributes:
        status: `"reached"` already; `"reachable"`; `"beyond"` (more than 8 times what is at hand: how many cannot be
            told); `"level"` (the curve levels off below the target); `"unknown"` (too little is at hand to tell).
        target: from 0 to 1, of `metric`: `"accuracy"`, or `"balanced"` where each class counts alike.
        method: `"held-out"` or `"cross-validation"`. pictures: at hand. tested: pictures that were tested on.
        shots: pictures a class at hand; of unequal numbers the geometric mean of n + 1, less 1.
        measured: what was measured, `shots` and `accuracy` of each point.
        now: what all pictures at hand are expected to reach. zero_shot: measured without any.
        most: pictures in every class past which nothing is foretold: 8 times those at hand.
        forecasts: from 1 picture a class up to 8 times those at hand.
        needed: smallest number of pictures in every class for which the expected accuracy meets the target.
        optimistic, pessimistic: the same for the upper and the lower end of the 80 % interval. All three are None where
            8 times the pictures at hand do not reach it.
        level: what endless pictures would reach: expected, and the 80 % interval.
        label_first: of `"unknown"`, pictures a class to label before asking again.
        classes: see `ClassPlan`; those first that are weak, or have few pictures. To label more of them than of
            others gained nothing over labelling all alike (`docs/plan.md`).
        notes: what to know when reading this.
    """

    status: str
    target: float
    metric: str
    method: str
    pictures: int
    tested: int
    shots: float
    measured: tuple[tuple[float, float], ...]
    zero_shot: float
    now: Forecast
    most: int
    forecasts: tuple[Forecast, ...]
    needed: int | None
    optimistic: int | None
    pessimistic: int | None
    level: tuple[float, float, float]
    label_first: int | None
    classes: tuple[ClassPlan, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold, with `sentence`."""
        return {**asdict(self), "sentence": self.sentence()}

    @property
    def more(self) -> int | None:
        """Pictures to label in all classes together; None where there is no number."""
        return None if self.needed is None else sum(row.more or 0 for row in self.classes)

    def sentence(self) -> str:
        """The plan in words."""
        goal = f"{percent(self.target)} {'balanced accuracy' if self.metric == 'balanced' else 'accuracy'}"
        now = f"now about {percent(self.now.expected)}, between {percent(self.now.low)} and {percent(self.now.high)}"
        if self.status == "unknown":
            return (
                f"Cannot tell yet how many pictures {goal} takes ({now}): label about {self.label_first} more a class "
                "first, and ask again."
            )
        if self.status == "reached":
            return f"The {self.pictures} pictures at hand are expected to reach {goal} already ({now})."
        if self.status == "level":
            level, low, high = map(percent, self.level)
            return (
                f"{goal} is not reachable with this base model by more pictures: the curve levels off at about {level} "
                f"(between {low} and {high}; {now}). Try a larger base model, better class names or fewer classes."
            )
        if self.status == "beyond":
            least = "" if self.optimistic is None else f", at the very best {self.optimistic} a class"
            return (
                f"{goal} takes more than {BEYOND:g} times the pictures at hand{least} ({now}); how many cannot be told "
                f"from these. {self._weakest()}"
            )
        least, most = self._around()
        return f"{self._amount()} would reach {goal} (between {least} and {most}; {now}). {self._weakest()}"

    def _amount(self) -> str:
        counts = {row.pictures for row in self.classes}
        if len(counts) == 1:
            return f"About {_some(self.needed or 0, min(counts))} more pictures a class"
        return f"About {self.more} more pictures, so that every class has at least {self.needed},"

    def _around(self) -> tuple[str, str]:
        """The optimistic and the pessimistic number, in the terms of `_amount`."""
        counts = {row.pictures for row in self.classes}
        have = min(counts) if len(counts) == 1 else 0
        tail = "" if len(counts) == 1 else " a class"
        least = str(max(0, (self.optimistic or 0) - have))
        if self.pessimistic is None:
            return least, f"more than {self.most - have}{tail}"
        return least, f"{max(0, self.pessimistic - have)}{tail}"

    def _weakest(self) -> str:
        rows = [row for row in self.classes if row.more != 0][:_NAMED]
        if len(self.classes) <= 2 or not rows:
            return ""
        return f"Weakest so far: {', '.join(visible(row.name) for row in rows)}."

    def table(self) -> Table:
        """The forecasts, from the pictures at hand."""
        rows = [
            [row.shots, percent(row.expected), _range(row.low, row.high), _range(row.low95, row.high95)]
            for row in self.forecasts
            if row.shots >= self.shots - 0.5
        ]
        return Table(["pictures a class", "expected", "80 % interval", "95 % interval"], rows)

    def class_table(self, most: int | None = None) -> Table:
        """The classes, the weak and small first."""
        rows = [
            [row.name, row.pictures, percent(row.accuracy) if row.tested else "not tested", row.more]
            for row in self.classes[:most]
        ]
        if not any(row.more for row in self.classes):
            return Table(["class", "pictures", "right now"], [row[:3] for row in rows])
        return Table(["class", "pictures", "right now", "more"], rows)

    def csv(self) -> str:
        """The numbers of the figure: what was measured, and what is foretold."""
        rows: list[list[Any]] = [["measured", shots, share, None, None, None, None] for shots, share in self.measured]
        rows += [
            ["foretold", row.shots, row.expected, row.low, row.high, row.low95, row.high95] for row in self.forecasts
        ]
        return Table(_NUMBERS, rows).csv()


def _range(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def _some(needed: int, have: int) -> int:
    return max(0, needed - have)


def plan_pictures(
    head: TaskResClassifier,
    train: ImageFeatures,
    held_out: ImageFeatures | None = None,
    *,
    target: float = 0.9,
    metric: str = "accuracy",
    draws: int = 6,
    seed: int = 1,
    on_fit: Callable[[int, int], None] | None = None,
) -> Plan:
    """How many more pictures a class reach a target with recipe `auto`, from the pictures at hand.

    Args:
        head: a classifier, of which only the base is used (`model.classifier`).
        train: embeddings of the pictures at hand (`TaskResTrainer.embed`). Of equal pictures one is taken.
        held_out: embeddings of others, to test on; they should be like the pictures that the classifier is for. By
            default parts of `train` are left out, which says nothing of pictures of another kind.
        target: share from 0 to 1.
        metric: `"accuracy"`, in the mix of classes of the tested pictures, or `"balanced"`.
        draws, seed, on_fit: see `learning_curve.measure_growth`.

    Returns:
        See `Plan`. `docs/plan.md` says how often its intervals were right.

    Raises:
        ConfigurationError: a target or metric out of range, or several labels per picture.
        DataError: no picture, or no two different pictures of any class to test on.
    """
    check_target(target, metric)
    head.check_one_label("A plan")
    notes: list[str] = []
    train = _each_once(train, set(), "", notes)
    if held_out is not None:
        held_out = _each_once(held_out, set(train.digests), " or lie among the pictures to learn from", notes)
    if not len(train):
        raise DataError("There is no labelled picture at hand: label two of each class first.")
    apart = None if held_out is None else (held_out.image_embeds[0], held_out.labels)
    tested = measure_growth(
        train.image_embeds[0], train.labels, head.base, float(head.logit_scale), held_out=apart, draws=draws, seed=seed,
        on_fit=on_fit, noun=train.noun,
    )  # fmt: skip
    counts = torch.bincount(train.labels, minlength=len(head.base)).numpy()
    return plan_from(tested, counts, train.class_names, target=target, metric=metric, notes=notes)


def check_target(target: float, metric: str) -> None:
    """Raises ConfigurationError unless the target lies between 0 and 1 and the metric is known."""
    if not (isinstance(target, (int, float)) and 0.0 < target < 1.0):
        raise ConfigurationError(f"target must lie between 0 and 1, such as 0.9 for 90 %; got {target!r}.")
    if metric not in METRICS:
        raise ConfigurationError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}.")


def _each_once(data: ImageFeatures, known: set[str], also: str, notes: list[str]) -> ImageFeatures:
    """Equal pictures on both sides of a test would make it say nothing."""
    rows = data.each_once(known)
    if len(rows) == len(data):
        return data
    notes.append(
        f"{len(data) - len(rows)} of {len(data)} {data.noun}s are there more than once{also}; they are left out."
    )
    return data.select(rows)


def plan_from(
    tested: Growth,
    counts: Sequence[int] | Any,
    class_names: Sequence[str],
    *,
    target: float,
    metric: str = "accuracy",
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that follows from what was tested; arguments as in `plan_pictures`.

    Args:
        counts: [K] pictures at hand of each class.
    """
    counts = np.asarray(counts, dtype=np.int64)
    curve = LearningCurve(tested, metric == "balanced")
    have = curve.pictures_a_class(counts)
    found = _Search(curve, counts, BEYOND * have)
    needed = found.smallest(lambda shots: curve.expected(shots) >= target)
    optimistic = found.smallest(lambda shots: curve.interval(shots)[1] >= target)
    pessimistic = found.smallest(lambda shots: curve.interval(shots)[0] >= target)
    level, now = curve.level(), _forecast(curve, have, round(have))
    first, status = None, "reachable"
    low, high = curve.interval(2 * have)
    if high - low > _WIDEST:
        status, first = "unknown", max(2, math.ceil(have * (((high - low) / _WIDEST) ** 2 - 1)))
        needed = optimistic = pessimistic = None
    elif now.expected >= target:
        status = "reached"
    elif needed is None:
        status = "level" if level[2] < target else "beyond"
    steps = {max(1, round(have * factor)) for factor in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8)} | {1}
    shots = [round(count, _DECIMALS) for count in curve.shots.tolist()]
    return Plan(
        status, target, metric, tested.method, int(counts.sum()), int(tested.tested.sum()), round(have, _DECIMALS),
        tuple(zip(shots, curve.accuracy.tolist(), strict=True)), float(curve.accuracy[0]), now, found.most,
        tuple(_forecast(curve, step, step) for step in sorted(steps)), needed, optimistic, pessimistic,
        level, first, _classes(curve, tested, counts, class_names, needed),
        (*notes, *_notes(tested, counts, class_names)),
    )  # fmt: skip


def _forecast(curve: LearningCurve, shots: float, name: int) -> Forecast:
    return Forecast(name, curve.expected(shots), *curve.interval(shots), *curve.interval(shots, 0.95))


class _Search:
    """Smallest number that every class must have; what is at hand already stays."""

    def __init__(self, curve: LearningCurve, counts: Any, limit: float) -> None:
        self.curve, self.counts = curve, counts
        self.most = 1
        while self.worth(2 * self.most) <= limit + 1e-9:
            self.most *= 2
        step = self.most
        while step := step // 2:
            self.most += step if self.worth(self.most + step) <= limit + 1e-9 else 0

    def worth(self, number: int) -> float:
        return self.curve.pictures_a_class(np.maximum(self.counts, number))

    def smallest(self, enough: Callable[[float], bool]) -> int | None:
        low, high = 0, self.most
        if not enough(self.worth(high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(self.worth(middle)) else (middle, high)
        return high


def _classes(
    curve: LearningCurve, tested: Growth, counts: Any, names: Sequence[str], needed: int | None
) -> tuple[ClassPlan, ...]:
    """Accuracy of each class with all pictures at hand, and what more of it would add."""
    largest = tested.right[-1]
    rows = []
    for place, name in enumerate(names):
        hits = largest[:, tested.labels == place]
        number = int((hits >= 0).any(0).sum())
        share = float((hits == 1).sum()) / max(1, int((hits >= 0).sum()))
        before = 1.0 - curve.expected(int(counts[place]))
        error = 1.0 - (number * share + _BELIEF * (1.0 - before)) / (number + _BELIEF)
        wanted = max(int(counts[place]), needed or 2 * max(1, round(curve.pictures_a_class(counts))))
        left = (1.0 - curve.expected(wanted)) / max(before, 1e-9)
        weight = float(curve.weights[place]) or 1.0 / len(names)
        more = None if needed is None else wanted - int(counts[place])
        rows.append(ClassPlan(str(name), int(counts[place]), number, 1.0 - error, more, weight * error * (1.0 - left)))
    return tuple(sorted(rows, key=lambda row: (-row.gain, row.name)))


def _notes(tested: Growth, counts: Any, names: Sequence[str]) -> list[str]:
    notes = []
    untested = [visible(name) for name, number in zip(names, tested.tested, strict=True) if not number]
    if untested:
        listed = ", ".join(untested[:_NAMED]) + (" and more" if len(untested) > _NAMED else "")
        why = "no held-out picture" if tested.method == "held-out" else "fewer than two pictures"
        has = "class was not tested, for it has" if len(untested) == 1 else "classes were not tested, for they have"
        notes.append(f"{len(untested)} {has} {why}: {listed}.")
    if tested.method == "cross-validation":
        notes.append(
            "Tested on left-out parts of the same pictures: this holds for new pictures that are like these. If they "
            "come in series (one object, one session), others will do worse: give a test split of others."
        )
    if counts.max() > 4 * max(1, counts.min()):
        notes.append(
            f"Classes have between {counts.min()} and {counts.max()} pictures: the table counts them by the geometric "
            "mean, and the plan fills every class up to the same number."
        )
    return notes


# ---------------------------------------------------------------------- the figure


def check_figure(path: str | os.PathLike[str]) -> Path:
    """Where the figure goes.

    Raises:
        MissingExtraError: matplotlib is not installed. ConfigurationError: the file ends in neither .png nor .svg, is a
            folder, or the .csv beside it is there and holds something else, such as labels. ArtifactError: its folder
            cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigurationError(f"A figure is a .png or .svg file; got {path.name!r}.")
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: give the name of a file to write.")
    check_can_write(path.absolute().parent)
    numbers = path.with_suffix(".csv")
    if numbers.exists() and not _holds_numbers(numbers):
        raise ConfigurationError(
            f"The numbers of {path.name} would be written over {numbers}, which holds something else: choose another "
            "name for the figure."
        )
    if find_spec("matplotlib") is None:
        raise MissingExtraError('A figure needs the package matplotlib: pip install "taskres_hf[plots]".')
    return path


def _holds_numbers(path: Path) -> bool:
    """Whether a file is what an earlier plan wrote."""
    try:
        with path.open("rb") as file:
            return file.readline().rstrip() == ",".join(_NUMBERS).encode()
    except OSError:
        return False


def write_figure(plan: Plan, path: str | os.PathLike[str]) -> list[Path]:
    """Draw what was measured, the curve, its 80 and 95 % bands and the target, with the numbers as CSV beside it.

    Returns:
        The two files.

    Raises:
        ConfigurationError, MissingExtraError: as of `check_figure`. ArtifactError: the folder cannot be written.
    """
    path = check_figure(path)
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        shots = [row.shots for row in plan.forecasts]
        bands = {"95 %": ("low95", "high95", 0.12), "80 %": ("low", "high", 0.25)}
        for name, (low, high, alpha) in bands.items():
            least, most = ([100 * getattr(row, end) for row in plan.forecasts] for end in (low, high))
            axes.fill_between(shots, least, most, color="#0072B2", alpha=alpha, linewidth=0, label=f"{name} interval")
        axes.plot(shots, [100 * row.expected for row in plan.forecasts], color="#0072B2", label="expected")
        points = [(x, 100 * y) for x, y in plan.measured if x > 0]
        axes.plot([x for x, _ in points], [y for _, y in points], "ko", markersize=5, label=f"measured ({plan.method})")
        axes.axhline(100 * plan.zero_shot, color="#7F7F7F", linestyle=":", label="zero-shot, measured")
        axes.axhline(100 * plan.target, color="#D55E00", linestyle="--", label="target")
        if plan.needed is not None:
            axes.axvline(plan.needed, color="#D55E00", linestyle=":", linewidth=1, label=f"{plan.needed} a class")
        _finish(axes, plan, sorted({*shots, *(round(x) for x, _ in points)}))
        content = image(figure, path.suffix.lower()[1:])
    write_bytes(path, content)
    write_bytes(path.with_suffix(".csv"), plan.csv().encode())
    return [path, path.with_suffix(".csv")]


def _finish(axes: Any, plan: Plan, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.4 * kept[-1]:
            kept.append(tick)
    axes.set_xticks(kept, [str(tick) for tick in kept])
    axes.minorticks_off()
    axes.axvline(plan.shots, color="#7F7F7F", linewidth=0.8, label="at hand")
    axes.set_xlabel("pictures a class")
    axes.set_ylabel(f"{'balanced accuracy' if plan.metric == 'balanced' else 'accuracy'} (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="best")
