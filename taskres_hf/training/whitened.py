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
from .minimising import information, laid_out, log_losses, minimise

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
_SINGLE = 20_000  # logits of the shots from which on fp32 is exact enough, and fits at once are no faster than in turn
_MANY = 100_000  # from which on one fold is enough
_LARGE = 1_000_000  # logits of the shots from which on held-out pictures are judged by text and means alone
_FOR_TEXT = 2_000_000  # logits that are enough to see what the text tells
_PIECE = 1_000_000  # numbers handled in one go
_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)
_SETTLED = 0.003  # share of what a fit gained so far that one more iteration must bring


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
    if not math.isfinite(images.sum()):  # quick; finite numbers whose sum is not are looked at again
        broken = int((~torch.isfinite(images)).any(1).sum())
        if not broken:
            return
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
    u = logit_scale * F.normalize(base.detach().to("cpu", dtype), dim=1)
    rows, bias, chosen = fit_beside(f, f, labels.cpu(), f @ u.T, logit_scale, views, iterations)
    weight = u + rows
    return WhitenedFit((chosen["temperature"] * weight).double(), bias, chosen)


def fit_beside(
    f: Tensor, unit: Tensor, y: Tensor, text: Tensor, logit_scale: float, views: int, iterations: int,
    reluctance: float = 4.0,  # of a temperature other than 1, where the fit is held against zero-shot
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """What is learned beside logits `text` [V * N, K]: rows [K, D] before the temperature, bias [K] after it."""
    # `unit` are the embeddings f [V * N, D] at unit length, by which pictures are compared.
    with torch.inference_mode():  # small fits are thousands of small operations, each a tenth cheaper in it
        rows, bias, chosen = _fit_beside(f, unit, y, text, logit_scale, views, iterations, reluctance)
    return rows.clone(), bias.clone(), chosen  # which can be changed, and learned from


def _fit_beside(
    f: Tensor, unit: Tensor, y: Tensor, text: Tensor, logit_scale: float, views: int, iterations: int,
    reluctance: float,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    large, (count, dim), classes = text.numel() > _LARGE, f.shape, text.shape[1]
    numbers, weights = _pictures(unit, y, views)
    given, few = f, 1.25 * count <= dim
    f = _coordinates(f) if few else f  # all that is learned lies in the shots' span
    counts = torch.bincount(y, weights, minlength=classes)
    shots = float(counts[counts > 0].median().round())
    moments = _moments(f, y, classes, weights)
    problem = _Problem(f, y, weights, numbers, text, moments, logit_scale, iterations, shots, dim)
    told, factor = problem.text_information()
    held = problem.held_out(large)
    means_told = held.means_information() if held.out else _MEANS_AT_ONE
    strength = SHARE * (1.0 - told * (1.0 - means_told)) * (1.0 + _FOR_MEANS * means_told**2)
    share, chosen = strength * _growth(shots), dict[str, Any]()
    if problem.at_once:
        space = held.spaces[0]
        *apart, whole = problem.fit(space, [held.share(strength)] * len(held.out) + [share])
    else:
        apart = held.fits(strength)
    more = held.logits(apart)
    if held.out:
        kept, temperature, chosen["gain"] = held.judge(more, reluctance)
    else:
        pictures = float(weights.sum())
        kept = pictures / (pictures + _TEXT_PICTURES * told)
        temperature = max(0.3, factor)
    if not problem.at_once:
        del held, more, apart
        space = problem.space(slice(None), problem.moments)
        whole = problem.fit(space, [share])[0]
    rows, bias = space.unwhiten(whole[0]), whole[1]
    if few:
        rows = torch.linalg.solve_triangular(f, rows, upper=False, left=False) @ given
    chosen |= {
        "text_information": told, "means_information": means_told, "share": share, "zero_shot": 1.0 - kept,
        "temperature": temperature,
    }  # fmt: skip
    return kept * rows, (temperature * kept * bias).double(), chosen


def _coordinates(f: Tensor) -> Tensor:
    """Lower triangle [N, N] whose rows have the lengths and angles of f [N, D], but for 3e-5 by which copies differ."""
    products = f.double() @ f.double().T
    products.diagonal().add_(1e-9 * products.diagonal().mean().clamp_min(1e-30))
    coordinates: Tensor = torch.linalg.cholesky(products)
    return coordinates.to(f)


_TEMPERATURES = torch.exp(torch.linspace(-4.5, 1.2, 58, dtype=torch.float64)).tolist()


def _growth(shots: float) -> float:
    """How much more the means of so many pictures count."""
    return math.pow(max(1.0, shots / 2.0), _GROWTH)


# ---------------------------------------------------------------------- the shots


def _pictures(f: Tensor, labels: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Number of each picture in its class, from 0, and its weight, both [V * N]; all views of it count as one.

    So does what is nearly the same (a copy, a mirrored picture, the next frame of a film): it tells nothing new, and
    what is learned from one must not be judged by the other.
    """
    f, labels = f[: len(f) // views], labels[: len(labels) // views]
    near = _NEAR * (1.0 - float(f.mean(0).pow(2).sum()))  # half the usual squared distance of two pictures
    numbers, weights = torch.empty_like(labels), torch.empty(len(labels), dtype=torch.float64)
    order, counts = torch.argsort(labels, stable=True), torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    for size in counts[counts > 0].unique().tolist():  # classes of as many pictures at once
        places = torch.arange(size)
        for some in starts[counts == size].split(max(1, _PIECE // (size * (size + f.shape[1])))):
            members = order[some[:, None] + places]
            first = places.expand(len(some), -1)
            if 1 < size <= _MOST_COMPARED:
                rows = f[members]
                alike = (1.0 - rows @ rows.mT) <= near
                alike.diagonal(dim1=1, dim2=2).fill_(True)
                first = alike.to(torch.uint8).argmax(2)
                while not torch.equal(further := first.gather(1, first), first):
                    first = further
            numbers[members] = ((first == places).cumsum(1) - 1).gather(1, first)
            times = torch.zeros_like(members).scatter_add_(1, first, torch.ones_like(members)).gather(1, first)
            weights[members] = (views * times).double().reciprocal()
    return numbers.repeat(views), weights.repeat(views)


# ---------------------------------------------------------------------- the metric, and what the means say


class _Whitened:
    """Shots in the metric in which pictures of a class are spread alike in all directions, in B weightings at once.

    Covariance within classes (around the common mean where there are too few pictures for that), shrunk towards a
    sphere with as many pseudo-observations as dimensions: `(dof C + D c I) / (dof + D)`, `c = tr(C) / D`. Of the maps
    that whiten, the one by its Cholesky factor: they differ by a rotation, which changes nothing that is fitted.

    Args:
        f: [N, R] the shots; R is less than D where they are given in coordinates of their span. y: [N].
        weights: [B, N]; 0 leaves a picture out. dim: D. moments: those of each weighting.

    Attributes:
        rows: [B, N, R] the shots, whitened.
        means, bias: discriminant of the class means [B, K, R], [B, K] in the same coordinates: rows @ means.T + bias.
        size: [B] factors that give whitened rows the spread that the shots had; 0 where they have none.
    """

    rows: Tensor
    means: Tensor
    bias: Tensor
    factor: Tensor
    size: Tensor

    def __init__(self, f: Tensor, y: Tensor, weights: Tensor, dim: int, moments: _Moments) -> None:
        self.weights, w = weights, weights.to(f)
        sums, squares = moments
        numbers = _numbers(y, weights, sums.shape[1]).to(f)
        present = numbers > 0
        means = sums / torch.where(present, numbers, math.inf)[..., None]
        pictures, here = numbers.sum(1).round(), present.sum(1)
        middle = sums.sum(1) / pictures[:, None]
        apart = pictures - here >= max(8.0, sums.shape[1] / 2.0)
        dof = pictures - torch.where(apart, here, 1)
        centers = torch.where(apart[:, None, None], means, middle[:, None])  # of what pictures are off by
        covariance = squares - sums.mT @ centers
        total, off = _trace(squares), _trace(covariance)
        moved = total - pictures * _dot(middle, middle)
        if bool((torch.minimum(moved, off) <= 1e5 * torch.finfo(f.dtype).eps * total).any()):
            spread = (f - centers[:, y]).mul_(w.sqrt()[..., None])  # so little that rounding matters
            covariance, moved = spread.mT @ spread, (w * (f - middle[:, None]).square_().sum(2)).sum(1)
            off = _trace(covariance)
        self.factor = _covariance_factor(covariance, off, pictures, dof.clamp_min(1e-9), dim)
        center = means.sum(1, keepdim=True) / here[:, None, None]
        means = torch.where(present[..., None], means, center)  # nothing is known of a class without a picture
        self.rows = self.whiten(f)
        white = self.whiten(torch.cat([means, center, middle[:, None]], 1))
        white, center, middle = white[:, :-2], white[:, -2:-1], white[:, -1]
        self.means = white - center
        self.bias = -0.5 * _dot(self.means, white + center)
        length = _dot(w, _dot(self.rows, self.rows))
        # The length of a mean of few pictures is mostly noise: taken off where there are classes of several.
        within = (length - _dot(numbers, _dot(white, white))).clamp_min_(0.0)
        noise = torch.where(pictures > here, within / (pictures - here), 0.0)
        self.bias += 0.5 * noise[:, None] / numbers.clamp_min(1.0)
        # A class without a picture gets what the others get on average, so that the text alone decides about it.
        self.bias -= (self.bias * present).sum(1, keepdim=True) / here[:, None]
        self.bias.mul_(present)
        alike = (pictures < 2) | (moved <= _NO_SPREAD * pictures)
        self.size = torch.where(alike, 0.0, (moved / (length - pictures * _dot(middle, middle))).sqrt())

    def whiten(self, f: Tensor) -> Tensor:
        """Embeddings [N, R] or [B, N, R] in the coordinates of `rows`."""
        white: Tensor = torch.linalg.solve_triangular(self.factor.mT, f, upper=True, left=False)
        return white

    def unwhiten(self, weight: Tensor) -> Tensor:
        """Rows of a classifier [K, R] on pictures whitened in the last weighting as rows [K, R] on pictures."""
        rows: Tensor = torch.linalg.solve_triangular(self.factor[-1], weight, upper=False, left=False)
        return rows


_Moments = tuple[Tensor, Tensor]
_Fit = tuple[Tensor, Tensor]  # weight [K, R] on whitened pictures, and bias [K]


def _moments(f: Tensor, y: Tensor, classes: int, weights: Tensor) -> _Moments:
    """Weighted sums [K, R] of the shots of each class, and of the products [R, R] of their coordinates."""
    weighted = weights.to(f)[:, None] * f
    return torch.zeros(classes, f.shape[1], dtype=f.dtype).index_add_(0, y, weighted), weighted.T @ f


def _numbers(y: Tensor, weights: Tensor, classes: int) -> Tensor:
    """Pictures [B, K] of each class, under weights [B, N]."""
    return weights.new_zeros(len(weights), classes).index_add_(1, y, weights)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of the last dimension, summed."""
    return (a * b).sum(-1)


def _trace(squares: Tensor) -> Tensor:
    return squares.diagonal(dim1=-2, dim2=-1).sum(-1)


def _covariance_factor(covariance: Tensor, total: Tensor, pictures: Tensor, dof: Tensor, dim: int) -> Tensor:
    """Cholesky factors [B, R, R] of the shrunk covariances, from the sums of the products of what shots are off by."""
    same = total <= _NO_SPREAD * pictures  # pictures of a class are all the same: any sphere will do
    if bool(same.any()):
        covariance = covariance.masked_fill(same[:, None, None], 0.0)
        total, dof = torch.where(same, 1.0, total), torch.where(same, dof.clamp_min(1.0), dof)
    covariance.diagonal(dim1=-2, dim2=-1).add_((total / dof)[:, None])  # D c
    factor: Tensor = torch.linalg.cholesky(covariance.div_((dof + dim)[:, None, None]))
    return factor


# ---------------------------------------------------------------------- the fit, and what held-out shots say


@dataclass(frozen=True)
class _Problem:
    """The shots, and what all fits on them share.

    Attributes:
        f: embeddings [N, R], in coordinates of their span where there are fewer than D. y: labels [N].
        weights, numbers: [N], see `_pictures`. text: zero-shot logits [N, K]. moments: see `_moments`.
        shots: pictures of a class, the median. dim: D.
    """

    f: Tensor
    y: Tensor
    weights: Tensor
    numbers: Tensor
    text: Tensor
    moments: _Moments
    logit_scale: float
    iterations: int
    shots: float
    dim: int

    def text_information(self) -> tuple[float, float]:
        """What zero-shot tells, and at what factor; honest at one shot, since it has not seen the shots."""
        if self.text.numel() <= _FOR_TEXT:
            return information(self.text, self.y, self.weights)
        keep = self.numbers < max(1, _FOR_TEXT // self.text.shape[1] ** 2)
        return information(self.text[keep], self.y[keep], self.weights[keep])

    @property
    def at_once(self) -> bool:
        return self.text.numel() <= _SINGLE

    def fit(self, space: _Whitened, shares: list[float], rows: Tensor | slice = slice(None)) -> list[_Fit]:
        """What is learned beside the text of some shots, in each weighting of them."""
        share = torch.tensor(shares, dtype=torch.float64).to(space.rows)
        means, bias = share[:, None, None] * space.means, share[:, None] * space.bias
        y, text, x = self.y[rows], self.text[rows].float(), space.rows.float()
        logits = laid_out(text[None] if len(shares) == 1 else text.repeat(len(shares), 1, 1))
        logits.add_(bias[:, None]).baddbmm_(x, means.float().mT)
        decay = ((WIDTH * self.logit_scale * space.size.double().clamp_min(1e-6)) ** -2).float()
        balance = _balanced(y, text.shape[1], space.weights).float()
        means += minimise(x, y, balance, logits, decay, self.iterations, _SETTLED)
        return list(zip(means, bias, strict=True))

    def space(self, rows: Tensor | slice, moments: _Moments) -> _Whitened:
        """The metric and the means of some shots alone."""
        sums, squares = moments
        return _Whitened(self.f[rows], self.y[rows], self.weights[rows][None], self.dim, (sums[None], squares[None]))

    def held_out(self, large: bool) -> _HeldOut:
        """The shots in folds, each with the metric and the means of the others; no fold at one shot."""
        folds, classes = int(min(_MOST_FOLDS, self.shots)), self.text.shape[1]
        turns = 0 if folds < 2 else 1 if self.text.numel() > _MANY else folds
        held, limit = _HeldOut(self, folds, large, [], [], [], [], []), max(classes, _FOR_TEXT // classes)
        fold, moments = self.numbers % folds, list[_Moments]()
        for turn in range(turns):
            left = (fold == turn).nonzero().flatten()
            sums, squares = _moments(self.f[left], self.y[left], classes, self.weights[left])
            moments.append((self.moments[0] - sums, self.moments[1] - squares))
            if large and len(left) > limit:  # no more than are needed to judge, from all over
                left = left[torch.arange(len(left), dtype=torch.float64) * _GOLDEN % 1.0 < limit / len(left)]
            held.out.append(left)
        if self.at_once:
            weights = self.weights.repeat(turns + 1, 1)  # the last is of all shots
            for turn, out in enumerate(held.out):
                weights[turn, out] = 0.0
            sums, squares = (torch.stack(each) for each in zip(*moments, self.moments, strict=True))
            space = _Whitened(self.f, self.y, weights, self.dim, (sums, squares))
            held.spaces.append(space)
            for turn, out in enumerate(held.out):
                held.add(space.rows[turn, out], space, turn)
        else:
            for turn, out in enumerate(held.out):
                rest = (fold != turn).nonzero().flatten()
                space = self.space(rest, moments[turn])
                held.spaces.append(space)
                held.rest.append(rest)
                held.add(space.whiten(self.f[out])[0], space, 0)
        return held


@dataclass(frozen=True)
class _HeldOut:
    """Shots that were held out, whitened by what was made of the others, and that.

    Attributes:
        out: which, of each fold. rows: they, whitened. means: the discriminant of the others.
        spaces: the others; of all folds and of all shots in one, where they are fitted at once. rest: which those are.
    """

    problem: _Problem
    folds: int
    large: bool
    out: list[Tensor]
    rows: list[Tensor]
    means: list[_Fit]
    spaces: list[_Whitened]
    rest: list[Tensor]

    def add(self, rows: Tensor, space: _Whitened, turn: int) -> None:
        self.rows.append(rows)
        self.means.append((space.means[turn], space.bias[turn]))

    def means_information(self) -> float:
        """What the discriminant of the means alone tells of pictures that they were not made from."""
        logits, places = torch.cat(self.logits(self.means)), torch.cat(self.out)
        return information(logits, self.problem.y[places], self.problem.weights[places])[0]

    def share(self, strength: float) -> float:
        """Of the means of fewer pictures."""
        return strength * _growth(self.problem.shots * (self.folds - 1) / self.folds)

    def fits(self, strength: float) -> list[_Fit]:
        """Of each fold, in turn; where shots are many, what their means say."""
        share = self.share(strength)
        if self.large:
            return [(share * weight, share * bias) for weight, bias in self.means]
        parts = zip(self.spaces, self.rest, strict=True)
        return [fit for space, rest in parts for fit in self.problem.fit(space, [share], rest)]

    def logits(self, fits: list[_Fit]) -> list[Tensor]:
        """What each adds to the logits of the pictures that were held out of it."""
        return [torch.addmm(bias, rows, weight.T) for rows, (weight, bias) in zip(self.rows, fits, strict=True)]

    def judge(self, added: list[Tensor], reluctance: float) -> tuple[float, float, float]:
        """How much of the fit to keep against zero-shot, the temperature, and by how much the fit raises the log of
        what all classes together claim of a picture: what a class that is added later must be given too.
        """
        problem, places = self.problem, torch.cat(self.out)
        more, text, y = laid_out(torch.cat(added)), laid_out(problem.text[places]), problem.y[places]
        weights = problem.weights[places]  # not balanced: classes of few pictures would make it a lottery
        temperatures = _TEMPERATURES[1::2] if self.large else _TEMPERATURES

        def best(logits: Tensor, reluctance: float) -> tuple[float, float, int]:
            """Least loss, and the temperature that gives it: of every fourth, then of those around the best."""

            def tried(places: range) -> tuple[float, float, int]:
                some = [temperatures[place] for place in places]
                losses = zip(log_losses(logits, y, weights, some), some, places, strict=True)
                return min((loss + reluctance * math.log(t) ** 2, t, place) for loss, t, place in losses)

            place = tried(range(1, len(temperatures), 4))[2]
            return tried(range(max(0, place - 3), min(len(temperatures), place + 4)))

        kept = 1.0 / (1.0 + math.exp(min(50.0, best(text + more, reluctance)[0] - best(text, reluctance)[0] - 3.0)))
        fitted = text + kept * more
        temperature = best(fitted, 0.3)[1]
        claims = [torch.logsumexp(temperature * logits, dim=1) for logits in (fitted, text)]
        return kept, temperature, float((claims[0] - claims[1]).mean())


def _balanced(y: Tensor, classes: int, weights: Tensor) -> Tensor:
    """Weights [B, N] under which every class with a picture counts alike; as they were where all have as many."""
    counts = _numbers(y, weights, classes)
    pictures, here = counts.sum(1, keepdim=True), (counts > 0).sum(1, keepdim=True)
    return weights * (pictures / (here * counts[:, y]).clamp_min(1e-30))
