"""Recipe `auto`: the residual of least penalty in the whitened metric of the shots, beside what their means say.

All of it is closed form or convex and draws nothing, so the same shots always give the same classifier:

    logits = tau * z * (S f.u + q * (discriminant of the class means) + f A V^T) + tau * (1 - z) * S f.u

`f` and `u` are image and text embeddings of unit length, `S` the logit scale. `A` whitens with the shots' within-class
covariance, shrunk as in linear discriminant analysis, and `V` has the least
`sum of cross-entropies + |V|^2 / (2 (WIDTH S)^2)`. The share `q` of the means follows from what text and means tell of
pictures they were not made from. Held-out shots, or at one shot their number, give `z` against zero-shot, and
`tau`, which makes probabilities mean what they say. `docs/recipes.md` says why each part is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError

WIDTH = 0.05  # of the residual, in units of the logit scale
SHARE = 0.035  # of the discriminant, of two pictures a class that tell nothing of others
_GROWTH = 0.25  # its exponent in the number of pictures
_FOR_MEANS = 20.0  # how much more the means count where they tell pictures apart
_MEANS_AT_ONE = 0.19  # what they are taken to tell at one picture a class, where none can be held out
_TEXT_PICTURES = 10.0  # that speak for zero-shot at one picture a class, where it tells all that there is to tell
_MOST_FOLDS = 4
_NEAR = 0.12  # of the usual distance of two pictures, below which they are as one
_MOST_COMPARED = 2048  # pictures of a class up to which each is compared with each
_NO_SPREAD = 1e-8  # squared distance to the mean, of embeddings of length 1, that rounding alone can make
_SINGLE = 50_000  # logits of the shots from which on fp32 is exact enough
_MANY = 250_000  # from which on one fold is enough
_LARGE = 1_000_000  # logits of the shots from which on held-out pictures are judged by text and means alone
_PIECE = 4_000_000  # logits looked at in one go
_FOR_TEXT = 2_000_000  # logits that are enough to see what the text tells


@dataclass(frozen=True)
class WhitenedFit:
    """A fitted classifier: logits = f @ weight.T + bias for image embeddings f [N, D] of unit length.

    Attributes:
        weight: [K, D] fp64, the logit scale included. bias: [K] fp64.
        chosen: `text_information` and `means_information` (0: nothing, 1: all that there is to tell), `share` q,
            `zero_shot` 1 - z, `temperature` tau, `gain` (see `_HeldOut.judge`); for people and the artifact.
    """

    weight: Tensor
    bias: Tensor
    chosen: dict[str, Any]


def refuse_broken(images: Tensor) -> None:
    """Refuse embeddings [N, D] that are not finite.

    Raises:
        ConfigurationError: says how many.
    """
    broken = int((~torch.isfinite(images)).any(1).sum())
    if broken:
        raise ConfigurationError(
            f"{broken} of {len(images)} embeddings of training pictures hold NaN or infinite values: check the "
            "pictures and the base model's image tower. The model on disk is untouched."
        )


def number_type(logits: int) -> torch.dtype:  # to count in
    return torch.float32 if logits > _SINGLE else torch.float64


@torch.no_grad()
def fit_whitened(
    images: Tensor, labels: Tensor, base: Tensor, logit_scale: float, views: int = 1, iterations: int = 8
) -> WhitenedFit:
    """Fit recipe `auto`.

    Args:
        images: [V * N, D] embeddings of any length, one view of all N pictures after the other. labels: [V * N].
        base: `t` [K, D]. logit_scale: S. views: V; several views of a picture count as one picture.
        iterations: of L-BFGS, at most.

    Returns:
        The classifier. A class without a picture keeps its text row.

    Raises:
        ConfigurationError: an embedding is NaN or infinite.
    """
    refuse_broken(images)
    dtype = number_type(len(images) * len(base))
    f = F.normalize(images.detach().to("cpu", dtype), dim=1)
    u = F.normalize(base.detach().to("cpu", dtype), dim=1)
    text = (logit_scale * f) @ u.T
    rows, bias, chosen = fit_beside(f, f, labels.cpu(), text, logit_scale, views, iterations)
    weight = logit_scale * u + rows
    return WhitenedFit((chosen["temperature"] * weight).double(), bias, chosen)


def fit_beside(
    f: Tensor, unit: Tensor, y: Tensor, text: Tensor, logit_scale: float, views: int, iterations: int,
    reluctance: float = 4.0,  # of a temperature other than 1, where the fit is held against zero-shot
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """What is learned beside logits `text` [V * N, K]: rows [K, D] before the temperature, bias [K] after it."""
    # `unit` are the embeddings f [V * N, D] at unit length, by which pictures are compared.
    large, (count, dim), classes = text.numel() > _LARGE, f.shape, text.shape[1]
    numbers, weights = _pictures(unit, y, views)
    span, f = torch.linalg.qr(f.T) if count < dim else (None, f.T)  # all that is learned lies in the shots' span
    f = f.T.contiguous()
    counts = torch.bincount(y, weights, minlength=classes)
    shots = float(counts[counts > 0].median().round())
    problem = _Problem(f, y, weights, numbers, text, logit_scale, iterations, shots, dim)
    told = problem.text_information()
    held = problem.held_out(large)
    means_told = held.means_information() if held.spaces else _MEANS_AT_ONE
    strength = SHARE * (1.0 - told * (1.0 - means_told)) * (1.0 + _FOR_MEANS * means_told**2)
    chosen: dict[str, Any] = {}
    if held.spaces:
        kept, temperature, chosen["gain"] = held.judge(strength, reluctance)
    else:
        pictures = float(weights.sum())
        kept = pictures / (pictures + _TEXT_PICTURES * told)
        temperature = max(0.3, _likeliest_factor(text, y, weights))
    share = strength * _growth(shots)
    space = _Whitened(f, y, classes, weights, dim)
    rows, bias = problem.fit(space, slice(None), text, share)
    rows = space.unwhiten(rows) if span is None else space.unwhiten(rows) @ span.T
    chosen |= {
        "text_information": told, "means_information": means_told, "share": share, "zero_shot": 1.0 - kept,
        "temperature": temperature,
    }  # fmt: skip
    return kept * rows, (temperature * kept * bias).double(), chosen


_TEMPERATURES = torch.exp(torch.linspace(-2.5, 1.2, 38, dtype=torch.float64)).tolist()


def _growth(shots: float) -> float:
    """How much more the means of so many pictures count."""
    return math.pow(max(1.0, shots / 2.0), _GROWTH)


# ---------------------------------------------------------------------- what logits tell of pictures


def _likeliest_factor(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The factor in [0, 1] on logits [N, K] under which the labels [N], weighted, are likeliest."""
    low, high = 0.0, 1.0
    weights = weights.to(logits)
    target = weights @ logits.gather(1, labels[:, None])[:, 0]

    def slope(factor: float) -> float:
        return float(target - weights @ (torch.softmax(factor * logits, dim=1).mul_(logits)).sum(1))

    if slope(high) >= 0:
        return high
    if slope(low) <= 0:
        return low
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def _information(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """What logits [N, K] tell of the labels [N] at their best factor: 0 as much as chance, 1 all."""
    classes = logits.shape[1]
    if classes < 2:
        return 0.0
    factor = _likeliest_factor(logits, labels, weights)
    lost = _log_loss(factor * logits, labels, weights) / float(weights.sum())
    return min(1.0, max(0.0, 1.0 - lost / math.log(classes)))


def _pictures(f: Tensor, labels: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Number of each picture in its class, from 0, and its weight, both [V * N]; all views of it count as one.

    So does what is nearly the same (a copy, a mirrored picture, the next frame of a film): it tells nothing new, and
    what is learned from one must not be judged by the other.
    """
    f, labels = f[: len(f) // views], labels[: len(labels) // views]
    near = _NEAR * (1.0 - float(f.mean(0).pow(2).sum()))  # half the usual squared distance of two pictures
    numbers, weights = torch.empty_like(labels), torch.empty(len(labels), dtype=torch.float64)
    for members in torch.split(torch.argsort(labels, stable=True), torch.bincount(labels).tolist()):
        first = torch.arange(len(members))
        if 1 < len(members) <= _MOST_COMPARED:
            rows = f[members]
            first = ((1.0 - rows @ rows.T) <= near).fill_diagonal_(True).to(torch.uint8).argmax(1)
            while not torch.equal(first[first], first):
                first = first[first]
        _, number, alike = torch.unique(first, return_inverse=True, return_counts=True)
        numbers[members], weights[members] = number, (views * alike[number]).double().reciprocal()
    return numbers.repeat(views), weights.repeat(views)


# ---------------------------------------------------------------------- the metric, and what the means say


class _Whitened:
    """Shots in the metric in which pictures of a class are spread alike in all directions.

    Covariance within classes (around the common mean where there are too few pictures for that), shrunk towards a
    sphere with as many pseudo-observations as dimensions: `(dof C + D c I) / (dof + D)`, `c = tr(C) / D`. Of the maps
    that whiten, the one by its Cholesky factor: they differ by a rotation, which changes nothing that is fitted.

    Args:
        f: [N, R] the shots; R is less than D where they are given in coordinates of their span. dim: D.

    Attributes:
        rows: [N, R] the shots, whitened.
        means, bias: discriminant of the class means in the same coordinates: rows @ means.T + bias [N, K].
        size: factor that gives whitened rows the spread that the shots had; 0 where they have none.
    """

    rows: Tensor
    means: Tensor
    bias: Tensor
    factor: Tensor
    size: float

    def __init__(self, f: Tensor, y: Tensor, classes: int, weights: Tensor, dim: int) -> None:
        w = weights.to(f)[:, None]
        numbers = torch.bincount(y, weights, minlength=classes).to(f)
        present = numbers > 0
        means = torch.zeros(classes, f.shape[1], dtype=f.dtype).index_add_(0, y, w * f)
        means = means / torch.where(present, numbers, 1.0)[:, None]
        pictures, here = round(float(numbers.sum())), int(present.sum())
        middle = (w * f).sum(0) / pictures
        dof = pictures - here
        if dof < max(8.0, classes / 2.0):
            spread, dof = f - middle, pictures - 1
        else:
            spread = f - means[y]
        self.factor = _covariance_factor(spread.mul_(w.sqrt()), max(float(dof), 1e-9), dim)
        center = means[present].mean(0)
        means = torch.where(present[:, None], means, center)  # nothing is known of a class without a picture
        self.rows = self.whiten(f)
        white = self.whiten(torch.cat([means, center[None]]))
        self.means = white[:-1] - white[-1]
        self.bias = -0.5 * (self.means * (white[:-1] + white[-1])).sum(1)
        if pictures > here:  # the length of a mean of few pictures is mostly noise: taken off where classes differ
            noise = (w * (self.rows - white[y]).square_()).sum() / (pictures - here) / numbers.clamp_min(1.0)
            self.bias = self.bias + 0.5 * torch.where(present, noise - noise[present].mean(), 0.0)
        # A class without a picture gets what the others get on average, so that the text alone decides about it.
        self.bias = torch.where(present, self.bias - self.bias[present].mean(), 0.0)
        moved = float((w * (f - middle).square_()).sum())
        alike = pictures < 2 or moved <= _NO_SPREAD * pictures
        center = (w * self.rows).sum(0) / pictures
        self.size = 0.0 if alike else math.sqrt(moved / float((w * (self.rows - center).square_()).sum()))

    def whiten(self, f: Tensor) -> Tensor:
        """Embeddings [N, R] in the coordinates of `rows`."""
        white: Tensor = torch.linalg.solve_triangular(self.factor.T, f, upper=True, left=False)
        return white

    def unwhiten(self, weight: Tensor) -> Tensor:
        """Rows of a classifier [K, R] on whitened pictures as rows [K, R] on pictures."""
        rows: Tensor = torch.linalg.solve_triangular(self.factor, weight, upper=False, left=False)
        return rows


def _covariance_factor(spread: Tensor, dof: float, dim: int) -> Tensor:
    """Cholesky factor [R, R] of the shrunk covariance; `spread` [N, R] are the shots around their means."""
    covariance = spread.T @ spread
    total = float(covariance.trace())
    if total <= _NO_SPREAD * len(spread):  # pictures of a class are all the same: any sphere will do
        covariance, total, dof = torch.zeros_like(covariance), 1.0, max(dof, 1.0)
    covariance.diagonal().add_(total / dof)  # D c
    factor: Tensor = torch.linalg.cholesky(covariance / (dof + dim))
    return factor


# ---------------------------------------------------------------------- the fit, and what held-out shots say


@dataclass(frozen=True)
class _Problem:
    """The shots, and what all fits on them share.

    Attributes:
        f: embeddings [N, R], in coordinates of their span where there are fewer than D. y: labels [N].
        weights, numbers: [N], see `_pictures`. text: zero-shot logits [N, K].
        shots: pictures of a class, the median. dim: D.
    """

    f: Tensor
    y: Tensor
    weights: Tensor
    numbers: Tensor
    text: Tensor
    logit_scale: float
    iterations: int
    shots: float
    dim: int

    def text_information(self) -> float:
        """What zero-shot tells; honest at one shot, since it has not seen the shots."""
        few = max(1, _FOR_TEXT // self.text.shape[1] ** 2)
        keep = slice(None) if self.text.numel() <= _FOR_TEXT else self.numbers < few
        return _information(self.text[keep], self.y[keep], self.weights[keep])

    def fit(self, space: _Whitened, rows: Tensor | slice, text: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Weight [K, R] on whitened pictures and bias [K] of some shots, beside their text, which is overwritten."""
        means, bias, y = share * space.means, share * space.bias, self.y[rows]
        offsets = text.add_(bias).addmm_(space.rows, means.T)
        balance = _balanced(y, len(means), self.weights[rows]).to(offsets)
        decay = torch.full((1,), (WIDTH * self.logit_scale) ** -2).to(offsets)
        more = _minimise(space.size * space.rows, y, balance, offsets[None], decay, self.iterations)
        return means + space.size * more[0], bias

    def held_out(self, large: bool) -> _HeldOut:
        """The shots in folds, each with the metric and the means of the others; no fold at one shot."""
        folds = int(min(_MOST_FOLDS, self.shots))
        held = _HeldOut(self, folds, large, [], [], [], [])
        if folds < 2:
            return held
        fold = self.numbers % folds
        for turn in range(1 if self.text.numel() > _MANY else folds):
            out, rest = (fold == turn).nonzero().flatten(), (fold != turn).nonzero().flatten()
            space = _Whitened(self.f[rest], self.y[rest], self.text.shape[1], self.weights[rest], self.dim)
            held.add(out, rest, space)
        return held


@dataclass(frozen=True)
class _HeldOut:
    """Shots that were held out, whitened by what was made of the others, and that."""

    problem: _Problem
    folds: int
    large: bool
    out: list[Tensor]
    rows: list[Tensor]
    rest: list[Tensor]
    spaces: list[_Whitened]

    def add(self, out: Tensor, rest: Tensor, space: _Whitened) -> None:
        self.out.append(out)
        self.rows.append(space.whiten(self.problem.f[out]))
        self.rest.append(rest)
        self.spaces.append(space)

    def means_information(self) -> float:
        """What the discriminant of the means alone tells of pictures that they were not made from."""
        parts = zip(self.rows, self.spaces, strict=True)
        logits = torch.cat([rows @ space.means.T + space.bias for rows, space in parts])
        places = torch.cat(self.out)
        return _information(logits, self.problem.y[places], self.problem.weights[places])

    def judge(self, strength: float, reluctance: float) -> tuple[float, float, float]:
        """How much of the fit to keep against zero-shot, the temperature, and by how much the fit raises the log of
        what all classes together claim of a picture: what a class that is added later must be given too.
        """
        problem = self.problem
        share = strength * _growth(problem.shots * (self.folds - 1) / self.folds)
        parts = []
        for rows, rest, space in zip(self.rows, self.rest, self.spaces, strict=True):
            weight, bias = share * space.means, share * space.bias
            if not self.large:
                weight, bias = problem.fit(space, rest, problem.text[rest], share)
            parts.append((rows @ weight.T).add_(bias))
        places = torch.cat(self.out)
        more, text, y = torch.cat(parts), problem.text[places], problem.y[places]
        weights = problem.weights[places]  # not balanced: classes of few pictures would make it a lottery
        temperatures = _TEMPERATURES[1::2] if self.large else _TEMPERATURES

        def best(logits: Tensor, reluctance: float) -> tuple[float, float]:
            """Least loss, and the temperature that gives it."""
            tried = [(_log_loss(t * logits, y, weights) + reluctance * math.log(t) ** 2, t) for t in temperatures]
            return min(tried)

        kept = 1.0 / (1.0 + math.exp(min(50.0, best(text + more, reluctance)[0] - best(text, reluctance)[0] - 3.0)))
        fitted = text + kept * more
        temperature = best(fitted, 0.3)[1]
        claims = [torch.logsumexp(temperature * logits, dim=1) for logits in (fitted, text)]
        return kept, temperature, float((claims[0] - claims[1]).mean())


def _balanced(y: Tensor, classes: int, weights: Tensor) -> Tensor:
    """Weights [N] under which every class with a picture counts alike; as they were where all have as many."""
    counts = torch.bincount(y, weights, minlength=classes)
    return weights * counts.sum() / (float((counts > 0).sum()) * counts[y])


def _log_loss(logits: Tensor, y: Tensor, weights: Tensor) -> float:
    """Weighted sum of cross-entropies of logits [N, K]."""
    return -float((torch.log_softmax(logits, dim=1).gather(1, y[:, None])[:, 0] * weights.to(logits)).sum())


class _Objective:
    """`sum_i w_i CE(logits_i, y_i) + decay / 2 |V|^2` of B problems, whose logits [B, N, K] are moved in place.

    It goes over the pictures in pieces: one more set of logits is all the memory that a direction takes.
    """

    def __init__(self, rows: Tensor, y: Tensor, weights: Tensor, logits: Tensor, decay: Tensor) -> None:
        self.rows, self.weights, self.logits, self.decay = rows, weights, logits, decay
        self.truth = y.expand(len(logits), -1)[..., None]
        size = max(1, _PIECE // (len(logits) * logits.shape[2]))
        self.pieces = [slice(start, start + size) for start in range(0, len(rows), size)]
        # A class without a picture stays as it is.
        self.absent = torch.bincount(y, minlength=logits.shape[2]) == 0

    def value(self, v: Tensor, step: Tensor, change: Tensor) -> Tensor:
        """The objective [B] at weights V after a step [B] along a change of the logits."""
        total = 0.5 * self.decay * v.pow(2).sum((1, 2))
        for piece in self.pieces:
            tried = torch.addcmul(self.logits[:, piece], change[:, piece], step[:, None, None])
            likely = torch.log_softmax(tried, dim=2).gather(2, self.truth[:, piece])[..., 0]
            total -= (likely * self.weights[piece]).sum(1)
        return total

    def _probabilities(self, piece: slice) -> Tensor:  # where they are tiny, exp is ten times slower than this
        return torch.softmax(self.logits[:, piece], dim=2)

    def gradient(self, v: Tensor) -> Tensor:
        g = self.decay[:, None, None] * v
        for piece in self.pieces:
            weights = self.weights[piece]
            error = self._probabilities(piece).mul_(weights[:, None])
            error.scatter_add_(2, self.truth[:, piece], -weights.expand(len(v), -1)[..., None])
            g += error.transpose(1, 2) @ self.rows[piece]
        g[:, self.absent] = 0.0
        return g

    def curvature(self, direction: Tensor, change: Tensor) -> Tensor:
        """Second derivative [B] along a direction."""
        bend = self.decay * direction.pow(2).sum((1, 2))
        for piece in self.pieces:
            moved = self._probabilities(piece).mul_(change[:, piece])
            spread = (moved * change[:, piece]).sum(2) - moved.sum(2) ** 2
            bend += (spread * self.weights[piece]).sum(1)
        return bend


def _minimise(rows: Tensor, y: Tensor, weights: Tensor, logits: Tensor, decay: Tensor, iterations: int) -> Tensor:
    """The V [B, K, R] of least `sum_i w_i CE(logits_i + rows_i V^T, y_i) + decay / 2 |V|^2`, by L-BFGS, all B at once.

    The step along a direction is Newton's, from the exact curvature along it, halved until the objective falls.
    Logits are carried along, so an iteration takes two matrix products; those passed are overwritten.
    """
    v = rows.new_zeros(len(logits), logits.shape[2], rows.shape[1])
    objective = _Objective(rows, y, weights, logits, decay)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    value = objective.value(v, torch.zeros_like(decay), logits)
    g = objective.gradient(v)
    for _ in range(iterations):
        if bool((g.abs().amax((1, 2)) <= 1e-6 * weights.sum()).all()):
            break
        direction = -_inverse_curvature(g, history)
        change = rows @ direction.transpose(1, 2)
        slope = (g * direction).sum((1, 2))
        bend = objective.curvature(direction, change)
        step = (-slope / bend.clamp_min(1e-30)).clamp(0.0, 100.0)
        for _ in range(20):
            tried = objective.value(v + step[:, None, None] * direction, step, change)
            worse = tried > value + 1e-4 * step * slope
            if not bool(worse.any()):
                break
            step = torch.where(worse, 0.5 * step, step)
        better = tried < value
        step = torch.where(better, step, torch.zeros_like(step))
        moved = direction.mul_(step[:, None, None])
        v += moved
        logits.add_(change.mul_(step[:, None, None]))
        value = torch.where(better, tried, value)
        before, g = g, objective.gradient(v)
        difference = g - before
        history = [*history[-9:], (moved, difference, (moved * difference).sum((1, 2)))]
    return v


def _inverse_curvature(g: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """L-BFGS's product of the inverse Hessian with g [B, K, R]; pairs without curvature are passed over."""
    result, factors = g.clone(), []
    for moved, difference, product in reversed(history):
        rho = torch.where(product > 1e-20, 1.0 / product.clamp_min(1e-20), torch.zeros_like(product))
        factor = rho * (moved * result).sum((1, 2))
        result -= factor[:, None, None] * difference
        factors.append((rho, factor))
    if history:
        _, difference, product = history[-1]
        length = difference.pow(2).sum((1, 2))
        scale = torch.where(length > 0, product / length.clamp_min(1e-30), torch.ones_like(length))
        result *= torch.where(product > 1e-20, scale, torch.ones_like(scale))[:, None, None]
    for (moved, difference, _), (rho, factor) in zip(history, reversed(factors), strict=True):
        result += (factor - rho * (difference * result).sum((1, 2)))[:, None, None] * moved
    return result
