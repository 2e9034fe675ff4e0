"""Recipe `auto`: the residual of least penalty in the whitened metric of the shots, beside what their means say.

All of it is closed form or convex and draws nothing, so the same shots always give the same classifier:

    logits = tau * (a * S f.u + q * (discriminant of the class means) + f A V^T)

`f` and `u` are image and text embeddings of unit length, `S` the logit scale. `a` says how far the text can be trusted,
`A` whitens with the shots' within-class covariance, shrunk as in linear discriminant analysis, and `V` has the least
`sum of cross-entropies + |V|^2 / (2 (r S)^2)`. Cross-validation on the shots weighs several `q` and `r` against one
another and against zero-shot; `tau` makes probabilities mean what they say. `docs/recipes.md` says why each part is
there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError

WIDTHS = (0.03, 0.07, 0.2, 0.5)  # r, in units of the logit scale
SHARES = (0.25, 1.0, 4.0)  # of the discriminant, times what `_usual_share` gives
USUAL_WIDTH = 0.07
_MOST_FOLDS = 4
_NO_SPREAD = 1e-8  # squared distance to the mean, of embeddings of length 1, that rounding alone can make
_MANY = 250_000  # logits of the shots from which on one fold is enough, and fp32
_LARGE = 1_000_000  # logits of the shots from which on only the discriminant's share is weighed
_PIECE = 4_000_000  # logits looked at in one go
_FOR_TEXT = 2_000_000  # logits that are enough to see how far the text can be trusted


@dataclass(frozen=True)
class WhitenedFit:
    """A fitted classifier: logits = f @ weight.T + bias for image embeddings f [N, D] of unit length.

    Attributes:
        weight: [K, D] fp64, the logit scale included. bias: [K] fp64.
        chosen: `text_weight` a, `text_information` (of 0 to 1, above chance), `temperature` tau, and `candidates`, the
            weight that each pair of share and width got; for people and the artifact.
    """

    weight: Tensor
    bias: Tensor
    chosen: dict[str, Any]


@torch.no_grad()
def fit_whitened(
    images: Tensor, labels: Tensor, base: Tensor, logit_scale: float, views: int = 1, iterations: int = 15
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
    broken = int((~torch.isfinite(images)).any(1).sum())
    if broken:
        raise ConfigurationError(
            f"{broken} of {len(images)} embeddings of training pictures hold NaN or infinite values: check the "
            "pictures and the base model's image tower. The model on disk is untouched."
        )
    large = len(images) * len(base) > _LARGE
    dtype = torch.float32 if len(images) * len(base) > _MANY else torch.float64
    f, y = F.normalize(images.detach().to("cpu", dtype), dim=1), labels.cpu()
    u = F.normalize(base.detach().to("cpu", dtype), dim=1)
    text = (logit_scale * f) @ u.T
    trust, information = _trust(text, y, len(u), views)
    text *= trust
    counts = torch.bincount(y, minlength=len(u)).float() / views
    shots = float(counts[counts > 0].median())
    wary = (1.0 - information) ** 2  # the better the text tells classes apart, the less the means have to add
    problem = _Problem(logit_scale, wary, views, iterations)
    weights, temperature = problem.weigh(f, y, text, shots, large)
    if weights is None:  # one picture a class: nothing can be held out
        usual = _CANDIDATES.index((1.0, USUAL_WIDTH))
        weights = torch.zeros(len(_CANDIDATES) + 1)
        weights[usual], temperature = 1.0, max(0.3, trust_of_text(text / trust, y) / trust)
    used = [i for i in range(len(_CANDIDATES)) if weights[i] > 0.01]
    space = _Whitened(f, y, len(u), views)
    candidates, part = [_CANDIDATES[i] for i in used], weights[used].to(dtype)
    if large and used:  # their mean at once
        mean = sum(float(weights[i]) * _CANDIDATES[i][0] for i in used) / float(part.sum())
        candidates, part = [(mean, USUAL_WIDTH)], part.sum()[None]
    rows, bias = problem.fit(space, y, text, shots, candidates)
    weight = float(weights.sum()) * trust * logit_scale * u + space.unwhiten(torch.einsum("b,bkr->kr", part, rows))
    chosen = {
        "text_weight": trust, "text_information": information, "temperature": temperature,
        "candidates": {"share {:g}, width {:g}".format(*_CANDIDATES[i]): round(float(weights[i]), 4) for i in used},
    }  # fmt: skip
    return WhitenedFit(
        (temperature * weight).double(), (temperature * torch.einsum("b,bk->k", part, bias)).double(), chosen
    )


_CANDIDATES = [(share, width) for share in SHARES for width in WIDTHS]
# Steps from the usual share and width: fewer shots need better reasons to leave them.
_STEPS = torch.tensor(
    [abs(math.log(s)) / math.log(4.0) + abs(math.log(r / USUAL_WIDTH)) / math.log(2.5) for s, r in _CANDIDATES],
    dtype=torch.float64,
)
_TEMPERATURES = torch.exp(torch.linspace(-2.5, 1.2, 38, dtype=torch.float64))


def _usual_share(shots: float) -> float:
    """Share of the discriminant: the more pictures its means are made of, the more."""
    return 0.025 * math.pow(max(1.0, shots / 2.0), 1.2)


# ---------------------------------------------------------------------- how far the text can be trusted


def trust_of_text(text: Tensor, labels: Tensor) -> float:
    """The factor in [0, 1] on zero-shot logits [N, K] under which the labels [N] are likeliest: honest at one shot."""
    low, high = 0.0, 1.0
    target = text.gather(1, labels[:, None]).sum()

    def slope(factor: float) -> float:
        return float(target - (torch.softmax(factor * text, dim=1) * text).sum())

    if slope(high) >= 0:
        return high
    if slope(low) <= 0:
        return low
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def _trust(text: Tensor, labels: Tensor, classes: int, views: int) -> tuple[float, float]:
    """`a`, twice the likeliest factor and its standard error but at most 1; and what the text tells above chance."""
    if text.numel() > _FOR_TEXT:
        keep = _number_in_class(labels, views) < max(1, _FOR_TEXT // classes**2)
        text, labels = text[keep], labels[keep]
    factor = trust_of_text(text, labels)
    log_probabilities = F.log_softmax(factor * text, dim=1)
    probabilities = log_probabilities.exp()
    variance = float(((probabilities * text * text).sum(1) - (probabilities * text).sum(1) ** 2).sum()) / views
    gain = float(log_probabilities.gather(1, labels[:, None]).mean()) + math.log(classes)
    information = min(1.0, max(0.0, gain / math.log(classes))) if classes > 1 else 0.0
    return max(min(1.0, 2.0 * (factor + 1.0 / math.sqrt(max(variance, 1e-12)))), 1e-3), information


def _number_in_class(labels: Tensor, views: int) -> Tensor:
    """0 for the first picture of its class, 1 for the second and so on [V * N]; the same in all views of a picture."""
    labels = labels[: len(labels) // views]
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = torch.cumsum(counts, 0) - counts
    numbers = torch.empty_like(labels)
    numbers[order] = torch.arange(len(labels)) - starts[labels[order]]
    return numbers.repeat(views)


# ---------------------------------------------------------------------- the metric, and what the means say


class _Whitened:
    """Shots in the metric in which pictures of a class are spread alike in all directions.

    Covariance within classes (around the common mean where there are too few pictures for that), shrunk towards a
    sphere with as many pseudo-observations as dimensions: `(dof C + D c I) / (dof + D)`, `c = tr(C) / D`.

    Attributes:
        rows: [N, R] the shots, whitened, in coordinates of their span (R = min(N, D)).
        means, bias: discriminant of the class means in the same coordinates: rows @ means.T + bias [N, K].
        size: factor that gives whitened rows the spread that the shots had; 0 where they have none.
    """

    rows: Tensor
    means: Tensor
    bias: Tensor
    span: Tensor | None
    axes: Tensor
    inside: Tensor
    outside: float
    size: float

    def __init__(self, f: Tensor, y: Tensor, classes: int, views: int) -> None:
        count, dim = f.shape
        numbers = torch.bincount(y, minlength=classes).to(f)
        present = numbers > 0
        means = torch.zeros(classes, dim, dtype=f.dtype).index_add_(0, y, f) / numbers.clamp_min(1.0)[:, None]
        pictures, here = count / views, int(present.sum())
        dof = pictures - here
        if dof < max(8.0, classes / 2.0):
            spread, dof = f - f.mean(0), pictures - 1.0
        else:
            spread = f - means[y]
        self._whiten(spread, max(dof, 1e-9), views)
        center = means[present].mean(0)
        means = torch.where(present[:, None], means, center)  # nothing is known of a class without a picture
        rows = self._apply(f)
        self.span = None
        if count < dim:
            self.span = torch.linalg.qr(rows.T)[0]
        self.rows, white, middle = self.into(rows), self.into(self._apply(means)), self.into(self._apply(center[None]))
        self.means = white - middle
        self.bias = -0.5 * (self.means * (white + middle)).sum(1)
        if count > here:  # the length of a mean of few pictures is mostly noise: taken off where classes differ in it
            noise = (self.rows - white[y]).pow(2).sum() / (count - here) / (numbers / views).clamp_min(1.0)
            self.bias = self.bias + 0.5 * torch.where(present, noise - noise[present].mean(), 0.0)
        moved = float((f - f.mean(0)).pow(2).sum())
        alike = pictures < 2 or moved <= _NO_SPREAD * count
        self.size = 0.0 if alike else math.sqrt(moved / float((rows - rows.mean(0)).pow(2).sum()))

    def _whiten(self, spread: Tensor, dof: float, views: int) -> None:
        count, dim = spread.shape
        if count < dim:
            values, vectors = torch.linalg.eigh(spread @ spread.T / views)
            keep = values > max(float(values[-1]) * count * torch.finfo(values.dtype).eps, 1e-30)
            values, vectors = values[keep], vectors[:, keep]
            axes = spread.T @ vectors / (values * views).sqrt()
        else:
            values, axes = torch.linalg.eigh(spread.T @ spread / views)
        total = float(values.clamp_min(0.0).sum())
        if total <= _NO_SPREAD * count:  # pictures of a class are all the same: any sphere will do
            total, values, dof = 1.0, torch.zeros_like(values), max(dof, 1.0)
        floor = total / dof  # D c
        self.outside = math.sqrt((dof + dim) / floor)
        self.axes = axes
        self.inside = ((values.clamp_min(0.0) + floor) / (dof + dim)).rsqrt() - self.outside

    def _apply(self, rows: Tensor) -> Tensor:
        """C^(-1/2) on rows [N, D]."""
        return self.outside * rows + (rows @ self.axes * self.inside) @ self.axes.T

    def into(self, whitened: Tensor) -> Tensor:
        return whitened if self.span is None else whitened @ self.span

    def whiten(self, f: Tensor) -> Tensor:
        """Other embeddings [N, D] in the coordinates of `rows`."""
        return self.into(self._apply(f))

    def unwhiten(self, weight: Tensor) -> Tensor:
        """Rows of a classifier [K, R] on whitened pictures as rows [K, D] on pictures."""
        return self._apply(weight if self.span is None else weight @ self.span.T)


# ---------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class _Problem:
    """What all fits on the same shots share."""

    logit_scale: float
    wary: float
    views: int
    iterations: int

    def fit(
        self, space: _Whitened, y: Tensor, text: Tensor, shots: float, candidates: list[tuple[float, float]]
    ) -> tuple[Tensor, Tensor]:
        """Weights [B, K, R] on whitened rows and biases [B, K] of candidates (share, width)."""
        rows = space.rows
        shares = torch.tensor([share for share, _ in candidates]).to(rows) * self.wary * _usual_share(shots)
        widths = torch.tensor([width for _, width in candidates]).to(rows) * self.logit_scale
        means = shares[:, None, None] * space.means
        bias = shares[:, None] * space.bias
        if not candidates:
            return means, bias
        offsets = (means @ rows.T).transpose(1, 2).add_(bias[:, None, :]).add_(text)
        balance = _balanced(y, len(space.means)).to(rows) / self.views
        more = _minimise(space.size * rows, y, balance, offsets, widths**-2, self.iterations)
        return means + space.size * more, bias

    def weigh(self, f: Tensor, y: Tensor, text: Tensor, shots: float, large: bool) -> tuple[Tensor | None, float]:
        """Weight of each candidate and, last, of zero-shot, with a temperature; None where nothing can be held out."""
        folds = int(min(_MOST_FOLDS, shots))
        if folds < 2:
            return None, 1.0
        fold = _number_in_class(y, self.views) % folds
        held: list[Tensor] = []
        order: list[Tensor] = []
        for turn in range(1 if text.numel() > _MANY else folds):
            out, rest = fold == turn, fold != turn
            space = _Whitened(f[rest], y[rest], text.shape[1], self.views)
            fewer = shots * (folds - 1) / folds
            rows = space.whiten(f[out])
            if large:
                weights, bias = self._means_alone(space, fewer)
            else:
                weights, bias = self.fit(space, y[rest], text[rest], fewer, _CANDIDATES)
            held.append(text[out] + (weights @ rows.T).transpose(1, 2) + bias[:, None, :])
            order.append(out.nonzero().flatten())
        places = torch.cat(order)
        return self._chosen(torch.cat(held, dim=1), text[places], y[places], shots, large)

    def _means_alone(self, space: _Whitened, shots: float) -> tuple[Tensor, Tensor]:
        shares = torch.tensor(SHARES).to(space.rows) * self.wary * _usual_share(shots)
        return shares[:, None, None] * space.means, shares[:, None] * space.bias

    def _chosen(self, held: Tensor, text: Tensor, y: Tensor, shots: float, large: bool) -> tuple[Tensor, float]:
        """Weights by the log loss of held-out pictures, as it is and at each candidate's own best temperature."""
        balance = _balanced(y, text.shape[1]) / self.views
        steps = _STEPS[[_CANDIDATES.index((share, USUAL_WIDTH)) for share in SHARES]] if large else _STEPS
        reluctance = max(1.5, 8.0 / shots) * steps
        plain = torch.cat([_log_loss(held, y, balance) + reluctance, _log_loss(text[None], y, balance) + 1.0])
        temperatures = _TEMPERATURES[1::2].tolist() if large else _TEMPERATURES.tolist()
        scaled = torch.stack([_log_loss(t * held, y, balance) + 8.0 * math.log(t / 0.7) ** 2 for t in temperatures])
        best = torch.softmax(-(scaled.min(0).values + reluctance), 0)
        free = shots / (shots + 8.0)
        weights = (1.0 - free) * torch.softmax(-plain, 0)
        weights[:-1] += free * best
        mixed = torch.einsum("b,bnk->nk", weights[:-1].to(held), held) + float(weights[-1]) * text
        losses = [float(_log_loss(t * mixed[None], y, balance)) + math.log(t) ** 2 for t in temperatures]
        temperature = temperatures[losses.index(min(losses))]
        if not large:
            return weights, temperature
        spread = torch.zeros(len(_CANDIDATES) + 1, dtype=weights.dtype)
        for share, value in zip(SHARES, weights[:-1].tolist(), strict=True):
            spread[_CANDIDATES.index((share, USUAL_WIDTH))] = value
        spread[-1] = weights[-1]
        return spread, temperature


def _balanced(y: Tensor, classes: int) -> Tensor:
    """Weights [N] under which every class with a picture counts alike; 1 where all have as many."""
    counts = torch.bincount(y, minlength=classes).double()
    return len(y) / (float((counts > 0).sum()) * counts[y])


def _log_loss(logits: Tensor, y: Tensor, balance: Tensor) -> Tensor:
    """Weighted sum of cross-entropies [B] of logits [B, N, K]."""
    target = logits.gather(2, y.expand(len(logits), -1)[..., None])[..., 0]
    return ((torch.logsumexp(logits, dim=2) - target) * balance.to(logits)).sum(1).double()


class _Objective:
    """`sum_i w_i CE(logits_i, y_i) + decay / 2 |V|^2` of B candidates, whose logits [B, N, K] are moved in place.

    It goes over the pictures in pieces: one more set of logits is all the memory that a direction takes.
    """

    def __init__(self, rows: Tensor, y: Tensor, weights: Tensor, logits: Tensor, decay: Tensor) -> None:
        self.rows, self.weights, self.logits, self.decay = rows, weights, logits, decay
        self.truth = y.expand(len(logits), -1)[..., None]
        size = max(1, _PIECE // (len(logits) * logits.shape[2]))
        self.pieces = [slice(start, start + size) for start in range(0, len(rows), size)]
        # A class without a picture stays as it is.
        self.absent = torch.bincount(y, minlength=logits.shape[2]) == 0
        self.normaliser = torch.logsumexp(logits, dim=2)  # [B, N]

    def value(self, v: Tensor, step: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """The objective [B] at weights V after a step [B] along a change of the logits, and its normaliser."""
        total, normaliser = 0.5 * self.decay * v.pow(2).sum((1, 2)), torch.empty_like(self.normaliser)
        for piece in self.pieces:
            tried = torch.addcmul(self.logits[:, piece], change[:, piece], step[:, None, None])
            normaliser[:, piece] = torch.logsumexp(tried, dim=2)
            target = tried.gather(2, self.truth[:, piece])[..., 0]
            total += ((normaliser[:, piece] - target) * self.weights[piece]).sum(1)
        return total, normaliser

    def _probabilities(self, piece: slice) -> Tensor:
        return (self.logits[:, piece] - self.normaliser[:, piece, None]).exp_()

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
    value, _ = objective.value(v, torch.zeros_like(decay), logits)
    g = objective.gradient(v)
    for _ in range(iterations):
        direction = -_inverse_curvature(g, history)
        change = (direction @ rows.T).transpose(1, 2)
        slope = (g * direction).sum((1, 2))
        bend = objective.curvature(direction, change)
        step = (-slope / bend.clamp_min(1e-30)).clamp(0.0, 100.0)
        for _ in range(20):
            tried, normaliser = objective.value(v + step[:, None, None] * direction, step, change)
            worse = tried > value + 1e-4 * step * slope
            if not bool(worse.any()):
                break
            step = torch.where(worse, 0.5 * step, step)
        better = tried < value
        step = torch.where(better, step, torch.zeros_like(step))
        moved = direction.mul_(step[:, None, None])
        v += moved
        logits.add_(change.mul_(step[:, None, None]))
        objective.normaliser = torch.where(better[:, None], normaliser, objective.normaliser)
        value = torch.where(better, tried, value)
        before, g = g, objective.gradient(v)
        difference = g - before
        history = [*history[-9:], (moved, difference, (moved * difference).sum((1, 2)))]
        if bool((g.abs().amax((1, 2)) <= 1e-6 * weights.sum()).all()):
            break
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
