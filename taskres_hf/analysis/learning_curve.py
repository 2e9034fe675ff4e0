"""Accuracy at growing numbers of pictures, measured on pictures that were not trained on, and the curve through it.

A curve rises from zero-shot `z` towards a level `a` that more pictures do not pass, in one of two forms:

    power law     a - (a - z) (1 + n / c)^-d
    exponential   a - (a - z) exp(-(n / c)^d)

`n` is the number of pictures a class. Many curves are drawn from wide distributions of `z, a, c, d` (the prior) and
weighed by how well they agree with what was measured; what is said of larger `n` is the weighted mean and the weighted
quantiles over both forms. Nothing is optimised, so nothing is fitted to noise: with few pictures the band is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..training.whitened import fit_whitened, refuse_broken

Floats = NDArray[np.float64]

_NUMBER = 20_000  # curves drawn
_LEAST = 100.0  # curves that count, at least
_DRAW = 0.05  # spread of the accuracy that a draw of one picture a class makes; falls with the root of the number
_MISFIT = 0.03  # by which no curve of two forms is expected to be nearer to the truth
_LIKE = 10.0  # pictures that the usual covariance of measurements on the same pictures counts as
_TOGETHER = 0.7  # correlation of two measurements on the same pictures
_MANY = 250_000  # logits of the training pictures from which on fewer draws are enough
_MOST_SIZES = 7


@dataclass(frozen=True)
class Growth:
    """Which pictures were classified rightly after training on so many.

    Attributes:
        shots: [S, K] pictures of each class that were trained on; zeros first (zero-shot).
        right: S arrays [R, N]: 1 right, 0 wrong, -1 not tested, for each of R draws.
        labels: [N] class ids of the pictures tested.
        method: `"cross-validation"` or `"held-out"`.
    """

    shots: NDArray[np.int64]
    right: list[NDArray[np.int8]]
    labels: NDArray[np.int64]
    method: str

    @property
    def tested(self) -> NDArray[np.int64]:
        """Pictures of each class that were tested [K]."""
        ever = np.any([(hits >= 0).any(0) for hits in self.right[1:] or self.right], axis=0)
        return np.bincount(self.labels[ever], minlength=self.shots.shape[1])


def measure_growth(
    images: Tensor,
    labels: Tensor,
    base: Tensor,
    logit_scale: float,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    draws: int = 6,
    seed: int = 1,
    on_fit: Callable[[int, int], None] | None = None,
    noun: str = "picture",
) -> Growth:
    """Train recipe `auto` on growing parts of the pictures and test it on others.

    Args:
        images: [N, D] embeddings of any length, each picture once. labels: [N]. base: `t` [K, D]. logit_scale: S.
        held_out: embeddings [M, D] and labels [M] to test on; by default the pictures that a draw leaves out, of each
            class at least one. A class with one picture is then trained on and not tested.
        draws: of each size; fewer where there are very many pictures.
        seed: of the draws.
        on_fit: called with the number of fits done and of all. noun: what messages call one of them.

    Raises:
        DataError: there is nothing to test on. ConfigurationError: an embedding is NaN or infinite.
    """
    refuse_broken(images)
    classes, y = len(base), labels.cpu().numpy().astype(np.int64)
    f, u = (F.normalize(x.detach().to("cpu", torch.float64), dim=1) for x in (images, base))
    counts = np.bincount(y, minlength=classes)
    if held_out is None:
        g, truth = f, y
        if counts.max(initial=0) < 2:
            raise DataError(f"No class has two different {noun}s, so there is nothing to test on: label more first.")
    else:
        g, truth = F.normalize(held_out[0].detach().to("cpu", torch.float64), dim=1), held_out[1].cpu().numpy()
        if not len(truth):
            raise DataError(f"There is no held-out {noun} to test on.")
    if len(y) * classes > _MANY:
        draws = min(draws, 2)
    jobs = list(_jobs(y, counts, held_out is None, draws, np.random.default_rng(seed)))
    right = [((g @ u.T).argmax(1).numpy() == truth).astype(np.int8)[None]]
    shots, total = [np.zeros(classes, dtype=np.int64)], sum(len(parts) for parts in jobs)
    done = 0
    for parts in jobs:
        rows = np.full((len(parts), len(truth)), -1, dtype=np.int8)
        for row, chosen in zip(rows, parts, strict=True):
            fit = fit_whitened(f[chosen], torch.from_numpy(y[chosen]), base, logit_scale)
            other = ~chosen if held_out is None else np.ones(len(truth), dtype=bool)
            row[other] = (g[other] @ fit.weight.T + fit.bias).argmax(1).numpy() == truth[other]
            done += 1
            if on_fit is not None:
                on_fit(done, total)
        shots.append(np.bincount(y[parts[0]], minlength=classes))
        right.append(rows)
    return Growth(
        np.array(shots), right, truth.astype(np.int64), "cross-validation" if held_out is None else "held-out"
    )


def _jobs(
    y: NDArray[np.int64], counts: NDArray[np.int64], apart: bool, draws: int, generator: Any
) -> Iterator[list[NDArray[np.bool_]]]:
    """For each size, which pictures each draw trains on [N]; `apart`: some of each class must be left out."""
    most = int(counts.max())
    top = most - max(1, most // 8) if apart else most
    below = [size for size in (2**power for power in range(30)) if size < 0.8 * top][-(_MOST_SIZES - 1) :]
    for size in [*below, top]:
        limits = counts - np.maximum(1, counts // 8) if apart else counts
        take = np.minimum(np.where(counts > 1, limits, counts), size)
        whole = not apart and size == top
        yield list(_draws(y, counts, take, 1 if whole else draws, generator))


def _draws(
    y: NDArray[np.int64], counts: NDArray[np.int64], take: NDArray[np.int64], draws: int, generator: Any
) -> Iterator[NDArray[np.bool_]]:
    """Which pictures are trained on; what is left out moves through a class, so that each is left out as often."""
    members = [np.flatnonzero(y == k) for k in range(len(counts))]
    orders, turns = [generator.permutation(rows) for rows in members], [0] * len(members)
    for _ in range(draws):
        chosen = np.ones(len(y), dtype=bool)
        for k, rows in enumerate(members):
            out = int(counts[k] - take[k])
            if not out:
                continue
            if (turns[k] + 1) * out > counts[k]:
                orders[k], turns[k] = generator.permutation(rows), 0
            chosen[orders[k][turns[k] * out : (turns[k] + 1) * out]] = False
            turns[k] += 1
        yield chosen


@dataclass(frozen=True)
class Prior:
    """What curves are taken to be like before anything is measured; wide, and the same for every task.

    Attributes:
        level: of the errors of zero-shot, the share that stays for ever is drawn from Beta(1, level).
        scale: median of c, in pictures a class, and the standard deviation of log c.
        rate: median of d, and the standard deviation of log d.
    """

    level: float = 3.0
    scale: tuple[float, float] = (8.0, 1.6)
    rate: tuple[float, float] = (0.9, 0.4)


class LearningCurve:
    """What was measured at growing shots, and what follows for other numbers of pictures.

    Args:
        tested: see `measure_growth`.
        balanced: every class counts alike; else as often as it is among the tested pictures.
        prior: see `Prior`.

    Attributes:
        weights: [K] what each class counts; 0 where none of its pictures was tested. They sum to 1.
        shots: [S] pictures a class, from 0: of unequal numbers the geometric mean of n + 1, less 1.
        accuracy: [S] shares from 0 to 1. covariance: [S, S] of their errors.
    """

    def __init__(self, tested: Growth, balanced: bool = False, prior: Prior | None = None) -> None:
        counts = tested.tested
        self.weights: Floats = (counts > 0) / (counts > 0).sum() if balanced else counts / counts.sum()
        self.shots: Floats = np.array([self.pictures_a_class(row) for row in tested.shots])
        each = self.weights[tested.labels] / np.maximum(counts, 1)[tested.labels]  # what a picture counts
        times = np.array([(hits >= 0).sum(0) for hits in tested.right])
        hit = np.array([(hits == 1).sum(0) for hits in tested.right])
        weight = (times > 0) * each
        weight = weight / weight.sum(1, keepdims=True)
        share = hit / np.maximum(times, 1)
        self.accuracy: Floats = (weight * share).sum(1)
        self.covariance: Floats = self._covariance(weight, share, [len(hits) for hits in tested.right])
        self._curves = _Curves(prior or Prior())
        away = self._curves.at(self.shots) - self.accuracy[:, None]
        log = -0.5 * np.einsum("sm,sm->m", away, np.linalg.solve(self.covariance, away))
        self._weight: Floats = _weights(log - log.max())

    def _covariance(self, weight: Floats, share: Floats, draws: list[int]) -> Floats:
        """Of pictures: measured, and what is usual, as if of a few more pictures. Of draws; of the forms."""
        size = 1.0 / (weight**2).sum(1).max()
        away = weight * (share - self.accuracy[:, None])
        smooth = (self.accuracy * size + 1.0) / (size + 2.0)
        spread = np.sqrt(smooth * (1.0 - smooth) / size)
        usual = np.outer(spread, spread) * (_TOGETHER + (1.0 - _TOGETHER) * np.eye(len(spread)))
        both = (size * away @ away.T + _LIKE * usual) / (size + _LIKE)
        drawn = _draw_spread(self.shots) ** 2 * (0.3 + 0.7 / np.array(draws)) * (self.shots > 0)
        made: Floats = both + np.diag(drawn + _MISFIT**2)
        return made

    def pictures_a_class(self, counts: Sequence[int] | NDArray[np.int64]) -> float:
        """The equal number of pictures that K unequal ones are taken to be worth."""
        return float(np.expm1(self.weights @ np.log1p(np.asarray(counts, dtype=np.float64))))

    def expected(self, shots: float) -> float:
        """Accuracy with so many pictures a class, the mean over the curves."""
        return float(self._curves.at([shots])[0] @ self._weight)

    def interval(self, shots: float, coverage: float = 0.8) -> tuple[float, float]:
        """Where the accuracy reached with one draw of so many pictures lies, with that probability."""
        values = self._curves.at([shots])[0] + _draw_spread(np.array([shots]))[0] * self._curves.noise * (shots > 0)
        return self._quantiles(values, coverage)

    def level(self, coverage: float = 0.8) -> tuple[float, float, float]:
        """What endless pictures would reach: expected, and from where to where it lies with that probability."""
        return (float(self._curves.level @ self._weight), *self._quantiles(self._curves.level, coverage))

    def _quantiles(self, values: Floats, coverage: float) -> tuple[float, float]:
        order = np.argsort(values)
        places = np.searchsorted(np.cumsum(self._weight[order]), [(1 - coverage) / 2, (1 + coverage) / 2])
        low, high = np.clip(values[order][np.minimum(places, len(values) - 1)], 0.0, 1.0).tolist()
        return low, high


def _weights(log: Floats) -> Floats:
    """Weights of the curves, flattened until many count: where none fits well, the best few would look too sure."""
    while True:
        likely = np.exp(log)
        weights: Floats = likely / likely.sum()
        if 1.0 / (weights**2).sum() >= _LEAST:
            return weights
        log = 0.8 * log


def _draw_spread(shots: Floats) -> Floats:
    spread: Floats = _DRAW / np.sqrt(np.maximum(shots, 1.0))
    return spread


def _lognormal(draw: np.random.Generator, median: float, spread: float) -> Floats:
    values: Floats = median * np.exp(spread * draw.standard_normal(_NUMBER))
    return values


class _Curves:
    """Curves of both forms, half of each, drawn from the prior; always the same."""

    def __init__(self, prior: Prior) -> None:
        draw = np.random.default_rng(0)
        self.start: Floats = draw.uniform(0.005, 0.995, _NUMBER)
        self.level: Floats = 1.0 - (1.0 - self.start) * draw.beta(1.0, prior.level, _NUMBER)
        self.scale: Floats = _lognormal(draw, *prior.scale)
        self.rate: Floats = _lognormal(draw, *prior.rate)
        self.noise: Floats = draw.standard_normal(_NUMBER)

    def at(self, shots: Sequence[float] | Floats) -> Floats:
        """Accuracies [len(shots), number of curves]."""
        n = np.asarray(shots, dtype=np.float64)[:, None] / self.scale
        power = np.arange(_NUMBER) % 2 == 0
        left = np.where(power, (1.0 + n) ** -self.rate, np.exp(-(n**self.rate)))
        made: Floats = self.level - (self.level - self.start) * left
        return made
