"""How hard a task is for zero-shot, how far its residual went, and whether the two go together.

TaskRes (arXiv 2211.10277, its discussion of the learned residual) sets the magnitude of the task residual against the
relative transfer difficulty. The paper's numbers, and which norm it took, could not be checked here: `docs/transfer.md`
says what is unverified. Beside what it published stand measures that do not depend on the number of classes, on `alpha`
or on the length of the text embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError, DataError
from ..residual import TaskResClassifier

PUBLISHED_DIFFICULTY, PUBLISHED_MAGNITUDE = "rtd", "mean_abs"
# What each number is, in the words of tables.
DIFFICULTIES = {
    PUBLISHED_DIFFICULTY: "relative transfer difficulty",
    "zero_shot_error": "zero-shot error",
    "normalised_error": "zero-shot error over chance's",
}
MAGNITUDES = {
    PUBLISHED_MAGNITUDE: "mean |x|",
    "length": "||x||",
    "scaled_mean_abs": "mean |alpha x|",
    "relative_length": "||alpha x|| / ||t||",
    "turn": "turn (degrees)",
    "turn_apart": "turn among classes (degrees)",
}
# Beside the magnitudes: what of the answers changed, whatever the recipe.
MEASURES = {**MAGNITUDES, "changed": "answers changed"}
LEAST = 4  # tasks or classes below which no correlation is given
_EXACT = 7  # up to so many, all orders are tried
_PIECE = 1000  # resamples at a time
_MOST_LOST = 0.05  # of the resamples may have no correlation

Floats = NDArray[np.float64]


# ---------------------------------------------------------------------- difficulty


def difficulties(zero_shot_accuracy: float, classes: int) -> dict[str, float]:
    """How hard a task is for the zero-shot classifier, three ways; larger is harder.

    Args:
        zero_shot_accuracy: share of pictures, from 0 to 1. classes: K >= 2.

    Returns:
        `rtd`: the relative transfer difficulty of the paper, `(1 / K) / accuracy`, which is 1 where zero-shot is at
        chance and infinite where it is never right; the number of classes decides much of it. Without that:
        `zero_shot_error`, `1 - accuracy`, and `normalised_error`, `(1 - accuracy) / (1 - 1 / K)`, which is 0 where
        zero-shot is always right and 1 at chance.

    Raises:
        DataError: the accuracy is not a share, or there are fewer than two classes.
    """
    if not 0.0 <= zero_shot_accuracy <= 1.0:
        raise DataError(f"The zero-shot accuracy is a share from 0 to 1; got {zero_shot_accuracy!r}.")
    if classes < 2:
        raise DataError(f"Transfer difficulty compares with chance among at least 2 classes; got {classes}.")
    chance, error = 1.0 / classes, 1.0 - zero_shot_accuracy
    rtd = chance / zero_shot_accuracy if zero_shot_accuracy else math.inf
    return {"rtd": rtd, "zero_shot_error": error, "normalised_error": error / (1.0 - chance)}


# ---------------------------------------------------------------------- magnitude


@torch.no_grad()
def magnitudes(head: TaskResClassifier) -> dict[str, list[float]]:
    """How far the residual of each class went, a list of K numbers for each measure.

    Args:
        head: with the residual on the text side. `w_k` are its rows as it answers, `strength` included.

    Returns:
        `mean_abs`: mean over dimensions of |x_k|, probably what the paper shows the mean over classes of. `length`:
        ||x_k||. `scaled_mean_abs`: the mean of |alpha x_k|. `relative_length`: ||w_k - t_k|| / ||t_k||, which is
        ||alpha x_k|| / ||t_k|| at full strength on the regular base. `turn`: degrees between t_k and w_k.
        `turn_apart`: degrees between the two after the mean of all rows is taken off, rows of unit length where the
        classifier normalises them: what is common to all classes moves no answer. 0 with a single class.

        The first four contain the length of the rows, so under recipe `auto` the temperature that it fits as well; only
        the two turns do not. None contains a bias of the classes.

    Raises:
        ConfigurationError: the residual is on the image side, where all classes share one.
    """
    if head.side != "text":
        raise ConfigurationError(
            "The magnitude of a class's residual needs a residual on the text side; here it is on the image side, one "
            "for all classes."
        )
    base, residual, weight = (part.detach().cpu().double() for part in (head.base, head.residual, head.weight()))
    own = base.norm(dim=1).clamp_min(1e-12)
    answering = F.normalize(weight, dim=1) if head.normalize_weight else weight / own[:, None]
    text = base / own[:, None]
    apart = _turns(text - text.mean(dim=0), answering - answering.mean(dim=0))
    measures = {
        "mean_abs": residual.abs().mean(dim=1),
        "length": residual.norm(dim=1),
        "scaled_mean_abs": abs(head.alpha) * residual.abs().mean(dim=1),
        "relative_length": (weight - base).norm(dim=1) / own,
        "turn": _turns(base, weight),
        "turn_apart": apart if len(base) > 1 else torch.zeros(1),
    }
    return {name: values.tolist() for name, values in measures.items()}


def _turns(before: Tensor, after: Tensor) -> Tensor:
    """Degrees [K] between rows [K, D], exact for small ones too."""
    first, second = F.normalize(before, dim=1), F.normalize(after, dim=1)
    half = torch.atan2((first - second).norm(dim=1), (first + second).norm(dim=1))
    return torch.rad2deg(2.0 * half)


@torch.no_grad()
def changed_answers(head: TaskResClassifier, image_embeds: Tensor) -> float:
    """Share of pictures, given as embeddings [N, D], to which the classifier gives another class than zero-shot does.

    Raises:
        DataError: there are no pictures.
    """
    if not len(image_embeds):
        raise DataError("Changed answers need pictures; there are none.")
    before, after = head.zero_shot_logits(image_embeds), head(image_embeds)
    return float((before.argmax(dim=1) != after.argmax(dim=1)).double().mean())


# ---------------------------------------------------------------------- do they go together?


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation.

    Attributes:
        rho: from -1 to 1; None where it cannot be told. low, high: the 95 % interval (percentile bootstrap), None where
            it cannot be told. p: two-sided, by permutation. count: how many pairs. note: why something is missing.
    """

    rho: float | None
    low: float | None
    high: float | None
    p: float | None
    count: int
    note: str = ""

    def __str__(self) -> str:
        if self.rho is None:
            return f"not told: {self.note}"
        interval = "" if self.low is None or self.high is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.rho:+.2f}{interval}" + ("" if self.p is None else f", p {self.p:.2g}")


def rank_correlation(
    first: Iterable[float], second: Iterable[float], *, resamples: int = 9_999, seed: int = 1
) -> RankCorrelation:
    """Spearman's rank correlation of two lists of N numbers, with an interval and a test that assume no distribution.

    The interval resamples the pairs; the test permutes one list: all orders up to 7 pairs, so that p is never below
    `2 / N!`, else `resamples` random ones. With so few pairs the interval is rough and the p decides; there is none
    where more than 5 % of the resamples have no correlation, such as of four pairs of which three are equal.

    Args:
        seed: of the resamples: the same numbers give the same interval.

    Raises:
        DataError: lists of different lengths, or a number that is NaN. Infinite ones have a rank.
    """
    x, y = _checked(first, second)
    if len(x) < LEAST:
        return RankCorrelation(None, None, None, None, len(x), f"{len(x)} of at least {LEAST}")
    rho = float(_rowwise(x[None], y[None])[0])
    if math.isnan(rho):
        return RankCorrelation(None, None, None, None, len(x), "all values are equal")
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, _PIECE):
        rows = generator.integers(len(x), size=(min(_PIECE, resamples - start), len(x)))
        drawn.append(_rowwise(x[rows], y[rows]))
    found = np.concatenate(drawn)
    low, high = _interval(found)
    note, lost = "", float(np.isnan(found).mean())
    if lost > _MOST_LOST:  # what is left is no fair sample
        low = high = None
        note = f"no interval: in {100 * lost:.0f} % of the resamples all values are equal"
    if abs(rho) > 1 - 1e-9:  # every resample agrees, which says nothing of other tasks
        low = high = None
        note = "no interval: all pairs are in one order, so every resample is"
    return RankCorrelation(rho, low, high, _permutation_p(x, y, rho, resamples, generator), len(x), note)


def rank_correlation_within(
    first: Iterable[float],
    second: Iterable[float],
    groups: Iterable[Hashable],
    *,
    resamples: int = 9_999,
    seed: int = 1,
) -> RankCorrelation:
    """The mean over groups of Spearman's correlation within each, such as of the classes within each task.

    A difference between groups (another base, other pictures) counts for nothing. The interval resamples whole groups;
    the test permutes within each. Groups of fewer than four, or of equal values, are left out.

    Returns:
        `count` is the number of groups. With a single one it is the correlation within it, and `count` its pairs.

    Raises:
        DataError: see `rank_correlation`.
    """
    x, y = _checked(first, second)
    names = list(groups)
    if len(names) != len(x):
        raise DataError(f"A correlation within groups needs a group for each pair; got {len(names)} for {len(x)}.")
    places: dict[Hashable, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    parts = [(x[rows], y[rows]) for rows in places.values() if len(rows) >= LEAST]
    parts = [(a, b) for a, b in parts if len(set(a)) > 1 and len(set(b)) > 1]
    if not parts:
        return RankCorrelation(None, None, None, None, 0, f"no group has {LEAST} that differ")
    if len(parts) == 1:
        return rank_correlation(*parts[0], resamples=resamples, seed=seed)
    rhos = np.array([_rowwise(a[None], b[None])[0] for a, b in parts])
    rho, generator = float(rhos.mean()), np.random.default_rng(seed)
    low = high = None
    note = f"no interval: {len(parts)} groups of at least {LEAST}"
    if len(parts) >= LEAST:
        low, high = _interval(rhos[generator.integers(len(rhos), size=(resamples, len(rhos)))].mean(axis=1))
        note = ""
    shuffled = np.zeros(resamples)
    for a, b in parts:
        shuffled += _rowwise(a[None], generator.permuted(np.tile(b, (resamples, 1)), axis=1)) / len(parts)
    p = (1 + int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())) / (1 + resamples)
    return RankCorrelation(rho, low, high, p, len(parts), note)


def _checked(first: Iterable[float], second: Iterable[float]) -> tuple[Floats, Floats]:
    x, y = (np.asarray(list(values), dtype=np.float64) for values in (first, second))
    if x.shape != y.shape:
        raise DataError(f"A rank correlation needs two lists of one length; got {len(x)} and {len(y)} numbers.")
    if bool(np.isnan(x).any()) or bool(np.isnan(y).any()):
        raise DataError("A rank correlation needs numbers; some are NaN. Leave those pairs out.")
    return x, y


def _rowwise(x: Floats, y: Floats) -> Floats:
    """Spearman's correlation of each row [B, N]; NaN where a row's values are all equal."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    a, b = (rankdata(values, axis=1) for values in (x, y))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    length = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (a * b).sum(axis=1) / length
    return found


def _interval(values: Floats) -> tuple[float | None, float | None]:
    """The middle 95 % of resamples; those without a value are left out."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return None, None
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


def _permutation_p(x: Floats, y: Floats, rho: float, resamples: int, generator: np.random.Generator) -> float:
    if len(x) <= _EXACT:
        orders = np.array(list(permutations(range(len(x)))))
        found = _rowwise(np.broadcast_to(x, orders.shape), y[orders])
        return float((np.abs(found) >= abs(rho) - 1e-12).mean())
    found = _rowwise(x[None], generator.permuted(np.tile(y, (resamples, 1)), axis=1))
    return (1 + int((np.abs(found) >= abs(rho) - 1e-12).sum())) / (1 + resamples)


# ---------------------------------------------------------------------- one classifier


def describe_residual(
    head: TaskResClassifier, class_names: Sequence[str], metrics: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Difficulty and magnitude of one trained classifier, as `taskres analyze MODEL` shows them.

    Args:
        head: see `magnitudes`. class_names: K names.
        metrics: as recorded in an artifact: `zero_shot_accuracy` and `per_class`; None where nothing was measured.

    Returns:
        `num_classes`, `zero_shot_accuracy`, `accuracy` and `difficulty` (see `difficulties`), the last three None
        where they are not recorded; `magnitude`: the mean over classes of each measure; `classes`: a row a class with
        `name`, `support`, `zero_shot_accuracy`, `accuracy` (None where not recorded) and every measure, the largest
        turn among classes first; `correlations`: measure to the rank correlation over classes of it with the class's
        zero-shot error, see `RankCorrelation`.
    """
    metrics, names = metrics or {}, list(class_names)
    measured, per_class = magnitudes(head), metrics.get("per_class") or {}
    before = metrics.get("zero_shot_accuracy")
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        known = per_class.get(name) or {}
        facts = {key: known.get(key) for key in ("support", "zero_shot_accuracy", "accuracy")}
        rows.append({"name": name, **facts, **{key: values[number] for key, values in measured.items()}})
    told = [row for row in rows if row["zero_shot_accuracy"] is not None]
    errors = [1.0 - row["zero_shot_accuracy"] for row in told]
    return {
        "num_classes": len(names), "zero_shot_accuracy": before, "accuracy": metrics.get("accuracy"),
        "difficulty": difficulties(before, len(names)) if before is not None and len(names) > 1 else None,
        "magnitude": {key: sum(values) / len(values) for key, values in measured.items()},
        "classes": sorted(rows, key=lambda row: -row["turn_apart"]),
        "correlations": {key: rank_correlation(errors, [row[key] for row in told]) for key in measured},
    }  # fmt: skip
