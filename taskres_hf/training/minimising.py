"""Penalised cross-entropies of several small problems, or of one large one, minimised at once by L-BFGS.

Also what logits tell of labels, at the factor on them that makes the labels likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 1_000_000  # logits looked at in one go
_FEW = 64  # classes below which torch is up to ten times faster with pictures in the last dimension


def laid_out(logits: Tensor) -> Tensor:
    """Logits [..., N, K] as they are handled fastest in memory, those of few classes as [..., K, N]."""
    return logits if logits.shape[-1] >= _FEW else logits.mT.contiguous().mT


def over_classes(function: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """`torch.softmax` or `torch.log_softmax` of logits [..., N, K] over the classes."""
    if logits.shape[-1] >= _FEW:
        return function(logits, dim=-1)
    return function(laid_out(logits).mT, dim=-2).mT


def probabilities(logits: Tensor) -> Tensor:
    """Of logits [..., N, K], the softmax over the classes; 0 where rounding the largest of a row changes it by more.

    Some processors multiply subnormal numbers, which the tiniest would be or lead to, many times as slowly.
    """
    least = torch.finfo(logits.dtype).eps ** 2
    return F.threshold(over_classes(torch.softmax, logits), least, 0.0, inplace=True)


def likeliest_factor(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The factor in [0, 1] on logits [N, K] under which the labels [N], weighted, are likeliest."""
    weights = weights.to(logits)
    target = weights @ logits.gather(1, labels[:, None])[:, 0]
    if float(target - weights @ logits.mean(1)) <= 0:
        return 0.0
    low, factor, high = 0.0, 1.0, 1.0
    for _ in range(40):
        chances = probabilities(factor * logits).mul_(logits)
        mean = chances.sum(1)
        slope = float(target - weights @ mean)
        if factor == 1.0 and slope >= 0:
            return 1.0
        low, high = (factor, high) if slope > 0 else (low, factor)
        bend = float(weights @ (chances.mul_(logits).sum(1) - mean.square_()))
        following = factor + slope / max(bend, 1e-30)  # Newton's; from below it does not go too far
        if abs(following - factor) < 1e-5:
            return max(following, 0.0)
        factor = following if low < following < high else 0.5 * (low + high) if low else 0.2 * high
    return factor


def information(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, float]:
    """What logits [N, K] tell of the labels [N] at their best factor, 0 as much as chance, 1 all; and that factor."""
    logits = laid_out(logits)
    classes, factor = logits.shape[1], likeliest_factor(logits, labels, weights)
    if classes < 2:
        return 0.0, factor
    lost = log_losses(logits, labels, weights, [factor])[0] / float(weights.sum())
    return min(1.0, max(0.0, 1.0 - lost / math.log(classes))), factor


def log_losses(logits: Tensor, y: Tensor, weights: Tensor, factors: list[float]) -> list[float]:
    """Weighted sums of cross-entropies of logits [N, K], times each factor."""
    if len(factors) > 1 and logits.numel() * len(factors) > _PIECE:
        return [loss for factor in factors for loss in log_losses(logits, y, weights, [factor])]
    several = logits.float() * torch.tensor(factors)[:, None, None]
    likely = over_classes(torch.log_softmax, several).gather(2, y.expand(len(factors), -1)[..., None])[..., 0]
    losses: list[float] = (-(likely.double() @ weights.double())).tolist()
    return losses


class Objective:
    """`sum_i w_i CE(logits_i, y_i) + decay / 2 |V|^2` of B problems, whose logits [B, N, K] are moved in place.

    It goes over the pictures in pieces: one more set of logits is all the memory that a direction takes.

    Args:
        rows: [B, N, R]. y: [N]. weights: [B, N]; 0 leaves a picture out. logits: [B, N, K]. decay: [B].
    """

    def __init__(self, rows: Tensor, y: Tensor, weights: Tensor, logits: Tensor, decay: Tensor) -> None:
        self.rows, self.weights, self.logits, self.decay = rows, weights, logits, decay
        self.truth = y.expand(len(logits), -1)[..., None]
        size = max(1, _PIECE // (len(logits) * logits.shape[2]))
        self.pieces = [slice(start, start + size) for start in range(0, rows.shape[1], size)]
        self._kept: Tensor | None = None
        # A class without a picture stays as it is.
        seen = torch.zeros_like(logits[:, 0]).scatter_add_(1, self.truth[..., 0], weights)
        self.absent = (seen == 0)[..., None] if bool((seen == 0).any()) else None

    def cross_entropy(self, step: Tensor | None = None, change: Tensor | None = None) -> list[float]:
        """Sums [B] at the logits of now, or after a step [B, 1, 1] along a change of them."""
        total = self.weights.new_zeros(len(self.weights))
        for piece in self.pieces:
            tried = self.logits[:, piece]
            if step is not None and change is not None:
                tried = torch.addcmul(tried, change[:, piece], step)
            likely = over_classes(torch.log_softmax, tried).gather(2, self.truth[:, piece])[..., 0]
            total -= (likely * self.weights[:, piece]).sum(1)
        found: list[float] = total.tolist()
        return found

    def _probabilities(self, piece: slice) -> Tensor:
        if len(self.pieces) > 1:
            return probabilities(self.logits[:, piece])
        if self._kept is None:
            self._kept = probabilities(self.logits)
        return self._kept

    def gradient(self, v: Tensor) -> Tensor:
        """[B, K, R] at weights V, whose logits are those of now."""
        self._kept = None
        g = self.decay[:, None, None] * v
        for piece in self.pieces:
            weights = self.weights[:, piece, None]
            error = self._probabilities(piece) * weights
            error.scatter_add_(2, self.truth[:, piece], -weights)
            g.baddbmm_(error.mT, self.rows[:, piece])
        return g if self.absent is None else g.masked_fill_(self.absent, 0.0)

    def curvature(self, change: Tensor) -> list[float]:
        """Second derivative [B] of the cross-entropies along a change of the logits, where the gradient was taken."""
        total = self.weights.new_zeros(len(self.weights))
        for piece in self.pieces:
            moved = self._probabilities(piece) * change[:, piece]
            mean = moved.sum(2)
            spread = moved.mul_(change[:, piece]).sum(2).addcmul_(mean, mean, value=-1.0)
            total += (spread * self.weights[:, piece]).sum(1)
        found: list[float] = total.tolist()
        return found


def minimise(
    rows: Tensor, y: Tensor, weights: Tensor, logits: Tensor, decay: Tensor, iterations: int, settled: float
) -> Tensor:
    """The V [B, K, R] of least `sum_i w_i CE(logits_i + rows_i V^T, y_i) + decay / 2 |V|^2`, by L-BFGS, all B at once.

    The step along a direction is Newton's, from the exact curvature along it, halved until the objective falls.
    Logits are carried along, so an iteration takes two matrix products; those passed are overwritten.

    Args:
        rows, y, weights, logits, decay: see `Objective`.
        iterations: at most. settled: share of the fall so far that an iteration must bring, or be the last; a
            thousandth of it, per picture, is not worth an iteration.
    """
    v = rows.new_zeros(len(logits), logits.shape[2], rows.shape[2])
    objective = Objective(rows, y, weights, logits, decay)
    starts = objective.cross_entropy(), decay.tolist(), (1e-3 * settled * weights.sum(1)).tolist()
    lines = [_Line(*start) for start in zip(*starts, strict=True)]
    history: list[_Pair] = []
    g = objective.gradient(v)
    for turn in range(iterations):
        if all(line.is_at_its_end(steepness) for line, steepness in zip(lines, _products(g, g), strict=True)):
            break
        direction = _inverse_curvature(g, history).neg_()
        change = rows @ direction.mT if logits.shape[2] >= _FEW else (direction @ rows.mT).mT
        products = [_products(other, direction) for other in (g, v, direction)]
        for line, *found in zip(lines, *products, objective.curvature(change), strict=True):
            line.turn(*found)
        for _ in range(20):
            step = v.new_tensor([line.step for line in lines])[:, None, None]
            tried = zip(lines, objective.cross_entropy(step, change), strict=True)
            worse = [line for line, cross_entropy in tried if line.is_worse(cross_entropy)]
            if not worse:
                break
            for line in worse:
                line.step *= 0.5
        step = v.new_tensor([line.go() for line in lines])[:, None, None]
        moved = direction.mul_(step)
        v += moved
        logits.add_(change.mul_(step))
        if turn == iterations - 1 or all(line.fell <= settled * (line.start - line.value) for line in lines):
            break
        before, g = g, objective.gradient(v)
        history = [*history[-9:], _Pair.of(moved, g - before)]
    return v


class _Line:
    """Where one problem stands along a direction, in plain numbers: tensors of so few cost several times as much."""

    def __init__(self, value: float, decay: float, enough: float) -> None:
        self.start = self.value = value
        self.decay, self.enough, self.length = decay, enough, 0.0  # of V, squared

    def is_at_its_end(self, steepness: float) -> bool:
        """What is left to gain is no more than the objective, and no more than this, by convexity of the penalty."""
        return self.value <= self.enough or steepness <= 2.0 * self.decay * self.enough

    def turn(self, slope: float, along: float, far: float, curvature: float) -> None:
        """To a direction: its products with the gradient, with V and with itself, and the cross-entropy's curvature."""
        self.slope, self.along, self.far = slope, along, far
        self.step = min(max(-slope / max(curvature + self.decay * far, 1e-30), 0.0), 100.0)

    def is_worse(self, cross_entropy: float) -> bool:
        """Whether the objective falls by too little, or rises, after the step."""
        self.taken, self.further = self.step, self.length + self.step * (2.0 * self.along + self.step * self.far)
        self.tried = cross_entropy + 0.5 * self.decay * self.further
        return self.tried > self.value + 1e-4 * self.step * self.slope

    def go(self) -> float:
        """The step that was tried last, if it falls."""
        if not self.tried < self.value:
            self.fell = 0.0
            return 0.0
        self.fell, self.value, self.length = self.value - self.tried, self.tried, self.further
        return self.taken


def _products(a: Tensor, b: Tensor) -> list[float]:
    """Of [B, K, R] tensors, summed."""
    found: list[float] = (a * b).sum((1, 2)).tolist()
    return found


class _Pair(NamedTuple):
    """A step [B, K, R], how the gradient changed along it, and of both [B] what the product with a gradient takes.

    Where there was no curvature both are such that the pair is passed over: `rho` is 0, `scale` 1.
    """

    moved: Tensor
    difference: Tensor
    rho: Tensor
    scale: Tensor

    @classmethod
    def of(cls, moved: Tensor, difference: Tensor) -> _Pair:
        product = (moved * difference).sum((1, 2), keepdim=True)
        curved, bounded = product > 1e-20, product.clamp_min(1e-20)
        scale = bounded / difference.square().sum((1, 2), keepdim=True).clamp_min(1e-30)
        return cls(moved, difference, torch.where(curved, bounded.reciprocal(), 0.0), torch.where(curved, scale, 1.0))


def _inverse_curvature(g: Tensor, history: list[_Pair]) -> Tensor:
    """L-BFGS's product of the inverse Hessian with g [B, K, R]."""
    result, factors = g.clone(), []
    for moved, difference, rho, _ in reversed(history):
        factor = (moved * result).sum((1, 2), keepdim=True).mul_(rho)
        result.addcmul_(factor, difference, value=-1.0)
        factors.append(factor)
    if history:
        result *= history[-1].scale
    for (moved, difference, rho, _), factor in zip(history, reversed(factors), strict=True):
        result.addcmul_((difference * result).sum((1, 2), keepdim=True).mul_(rho).neg_().add_(factor), moved)
    return result
