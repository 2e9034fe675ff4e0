"""Recipe `auto` where pictures have several labels: one yes-or-no problem per class on one base classifier.

    logits = tau * (z * (a S f.u + c S f.m + b + f A V^T) + (1 - z) * (a' S f.u + c' S f.m + b'))

`f` and `u` are image and text embeddings of unit length, `m` the mean text embedding, `S` the logit scale. A cosine
alone says nothing of yes or no: the factor `a >= 0`, the share `c` of what all classes have in common, and a bias `b`
per class, drawn towards a common one, turn it into a logit. `A` whitens with what is left of the shots' covariance when
their labels are taken off, and `V` is the residual. All of them have the least

    sum of binary cross-entropies + |V|^2 / (2 w^2) + |b - mean|^2 / (2 B^2) + what holds a and -c near 1/2

which is convex, by L-BFGS (SciPy). Held-out shots choose the width `w` among a few, give the share `z` against text
alone (`a'`, `c'`, `b'`), and `tau`, which makes the sigmoid of a logit mean what it says. Then the
threshold from which on a label is given is the one of the largest F1 that these probabilities lead to expect. Nothing
is drawn, so the same shots always give the same classifier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.stratified import fold_of_each
from .whitened import WhitenedFit, refuse_broken

WIDTHS = (0.25, 0.5, 1.0, 2.0)  # of the residual's logits, of a picture of usual spread
USUAL_WIDTH = 1.0  # where no shot can be held out
FACTOR, SURE = 0.5, 20.0  # a and -c where nothing is known, and how much shots must say against it
WIDE = 1.0  # what another width than the usual must gain, in nats, for each doubling or halving, squared
BIAS = 0.5  # width of the classes' biases around their mean, in logits
_FOLDS = 4
_TEMPERATURES = np.exp(np.linspace(-1.6, 0.8, 25)).tolist()
_ITERATIONS = 60


@torch.no_grad()
def fit_multi_label(images: Tensor, labels: Tensor, base: Tensor, logit_scale: float, views: int = 1) -> WhitenedFit:
    """Fit recipe `auto` to pictures with several labels, or none.

    Args:
        images: [V * N, D] embeddings of any length, one view of all N pictures after the other.
        labels: [V * N, K], 1 for a class that the picture shows, else 0.
        base: `t` [K, D]. logit_scale: S. views: V; several views of a picture count as one.

    Returns:
        The classifier. `chosen` holds `width`, `zero_shot` 1 - z, `temperature` tau and `threshold`, the score from
        which on a label is given.

    Raises:
        ConfigurationError: an embedding is NaN or infinite.
    """
    refuse_broken(images)
    f = F.normalize(images.detach().cpu().double(), dim=1)
    y, u = labels.detach().cpu().double(), F.normalize(base.detach().cpu().double(), dim=1)
    weights = f.new_full((len(f),), 1.0 / views)
    problem = _Problem(f, y, weights, logit_scale * u)
    width, kept, temperature, threshold = _judged(problem, views)
    whole, text = problem.fit(width), problem.fit(0.0)
    weight = temperature * (kept * whole.weight + (1.0 - kept) * text.weight)
    bias = temperature * (kept * whole.bias + (1.0 - kept) * text.bias)
    chosen = {"width": width, "zero_shot": 1.0 - kept, "temperature": temperature, "threshold": threshold}
    return WhitenedFit(weight, bias, chosen)


@dataclass(frozen=True)
class _Linear:
    """logits = f @ weight.T + bias"""

    weight: Tensor
    bias: Tensor

    def __call__(self, f: Tensor) -> Tensor:
        return f @ self.weight.T + self.bias


@dataclass(frozen=True)
class _Problem:
    """Shots f [N, D] of unit length with labels y [N, K] and weights [N], and text rows u [K, D], scale included."""

    f: Tensor
    y: Tensor
    weights: Tensor
    u: Tensor

    def part(self, rows: Tensor) -> _Problem:
        return _Problem(self.f[rows], self.y[rows], self.weights[rows], self.u)

    def fit(self, width: float) -> _Linear:
        """The classifier at a width of the residual; 0 for what text alone can say."""
        from scipy.optimize import minimize  # type: ignore[import-untyped]

        n, k = self.y.shape
        m = self.u.mean(0)
        text, common = self.f @ self.u.T, self.f @ m
        middle = float((self.weights @ text).sum() / self.weights.sum() / k)
        shift = float(self.weights @ common / self.weights.sum())
        cosines, shared = (text - middle).numpy(), (common - shift).numpy()
        space, rows = None, np.zeros((n, 0))
        if width > 0:
            space = _Space(self.f, self.y, self.weights)
            rows = width * space.rows.numpy()
        y, w = self.y.numpy(), self.weights.numpy()[:, None]
        r = rows.shape[1]

        def logits(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            z: np.ndarray[Any, Any] = p[0] * cosines + p[1] * shared[:, None] + p[2] + BIAS * p[3 : 3 + k]
            return z + rows @ p[3 + k :].reshape(k, r).T if r else z

        def objective(p: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            z = logits(p)
            value = float((w * (np.logaddexp(0.0, z) - y * z)).sum())
            error = w * (1.0 / (1.0 + np.exp(-z)) - y)
            g = np.empty_like(p)
            g[0], g[1], g[2] = (error * cosines).sum(), (error.sum(1) * shared).sum(), error.sum()
            g[3 : 3 + k] = BIAS * error.sum(0)
            g[3 + k :] = (error.T @ rows).ravel()
            away = p - usual
            return value + 0.5 * float(ridge @ away**2), g + ridge * away

        start = np.zeros(3 + k + k * r)
        start[:2] = FACTOR, -FACTOR
        usual, ridge = start.copy(), np.ones_like(start)
        ridge[:3] = SURE, SURE, 1e-3
        start[2] = math.log((y.mean() + 1e-3) / (1.0 - y.mean() + 1e-3))
        bounds = [(0.0, None)] + [(None, None)] * (len(start) - 1)
        p = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _ITERATIONS}).x
        weight = p[0] * self.u + p[1] * m
        bias = torch.from_numpy(p[2] + BIAS * p[3 : 3 + k]) - p[0] * middle - p[1] * shift
        if space is not None:
            v = width * torch.from_numpy(p[3 + k :].reshape(k, r).copy())
            more, offset = space.unwhiten(v)
            weight, bias = weight + more, bias + offset
        return _Linear(weight, bias)


class _Space:
    """Shots in the metric in which, their labels taken off, they are spread alike in all directions.

    The covariance of what a ridge regression on the labels leaves, shrunk towards a sphere with as many
    pseudo-observations as dimensions, as in `training.whitened`. A picture of usual spread has the length 1.
    """

    def __init__(self, f: Tensor, y: Tensor, weights: Tensor) -> None:
        w = weights[:, None]
        total = float(weights.sum())
        self.middle = (w * f).sum(0) / total
        moved, shown = f - self.middle, y - (w * y).sum(0) / total
        gram = shown.T @ (w * shown) + torch.eye(y.shape[1], dtype=f.dtype)
        left = moved - shown @ torch.linalg.solve(gram, shown.T @ (w * moved))
        dim, dof = f.shape[1], max(total - 1.0, 1.0)
        covariance = left.T @ (w * left)
        floor = max(float(covariance.trace()), 1e-8) / dof
        values, axes = torch.linalg.eigh(covariance)
        self.inverse = (axes * ((values.clamp_min(0.0) + floor) / (dof + dim)).rsqrt()) @ axes.T
        rows = moved @ self.inverse
        size = float((weights @ rows.pow(2).sum(1) / total).sqrt())
        self.inverse = self.inverse / max(size, 1e-12)
        rows = moved @ self.inverse
        self.span = torch.linalg.qr(rows.T)[0] if len(f) < dim else None
        self.rows = rows if self.span is None else rows @ self.span

    def unwhiten(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [K, R] on whitened pictures as weight [K, D] and bias [K] on pictures."""
        weight = (v if self.span is None else v @ self.span.T) @ self.inverse
        return weight, -weight @ self.middle


def _loss(logits: Tensor, y: Tensor, weights: Tensor) -> float:
    """Weighted sum of binary cross-entropies."""
    return float((F.binary_cross_entropy_with_logits(logits, y, reduction="none") * weights).sum())


def _judged(problem: _Problem, views: int) -> tuple[float, float, float, float]:
    """Width, how much of the fit to keep against zero-shot, temperature and threshold, by held-out shots."""
    count = len(problem.f) // views
    first = problem.y[:count]
    if count < 4:
        return USUAL_WIDTH, 1.0, 1.0, _threshold(torch.sigmoid(problem.fit(USUAL_WIDTH)(problem.f)))
    folds = min(_FOLDS, count)
    fold = torch.tensor(fold_of_each(first.tolist(), [1.0 / folds] * folds, 0)).repeat(views)
    logits: dict[float, list[Tensor]] = {width: [] for width in (0.0, *WIDTHS)}
    truth, weights = [], []
    for turn in range(folds):
        out, rest = (fold == turn).nonzero().flatten(), (fold != turn).nonzero().flatten()
        if not len(out) or not len(rest):
            continue
        part = problem.part(rest)
        for width, found in logits.items():
            found.append(part.fit(width)(problem.f[out]))
        known = (part.y.sum(0) > 0) & (part.y.sum(0) < len(part.y))  # of others a held-out shot was the only one
        truth.append(problem.y[out])
        weights.append(problem.weights[out, None] * known.double())
    y, w = torch.cat(truth), torch.cat(weights)
    held = {width: torch.cat(found) for width, found in logits.items()}
    width = min(WIDTHS, key=lambda width: _loss(held[width], y, w) + WIDE * math.log2(width / USUAL_WIDTH) ** 2)
    gain = _loss(held[0.0], y, w) - _loss(held[width], y, w)
    kept = 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, gain + 3.0))))
    mixed = kept * held[width] + (1.0 - kept) * held[0.0]
    temperature = min(_TEMPERATURES, key=lambda t: _loss(t * mixed, y, w) + 0.3 * math.log(t) ** 2)
    return width, kept, float(temperature), _threshold(torch.sigmoid(float(temperature) * mixed))


def _threshold(probabilities: Tensor) -> float:
    """The threshold of the largest expected micro-F1 of calibrated probabilities (Lipton et al., ECML PKDD 2014):
    about half of that F1, and below 0.5 where labels are hard to tell.
    """
    ordered = probabilities.flatten().sort(descending=True)[0]
    given = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype)
    expected = 2.0 * ordered.cumsum(0) / (given + ordered.sum())
    return min(0.5, max(0.01, float(ordered[int(expected.argmax())])))
