"""Penalised cross-entropies of several small problems, or of one large one, minimised at once by L-BFGS."""

from __future__ import annotations

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

    def value(self, v: Tensor, step: Tensor | None = None, change: Tensor | None = None) -> Tensor:
        """The objective [B] at weights V, whose logits are those of now, or after a step [B] along a change of them."""
        total = 0.5 * self.decay * v.square().sum((1, 2))
        for piece in self.pieces:
            tried = self.logits[:, piece]
            if step is not None and change is not None:
                tried = torch.addcmul(tried, change[:, piece], step[:, None, None])
            likely = over_classes(torch.log_softmax, tried).gather(2, self.truth[:, piece])[..., 0]
            total -= (likely * self.weights[:, piece]).sum(1)
        return total

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

    def curvature(self, direction: Tensor, change: Tensor) -> Tensor:
        """Second derivative [B] along a direction, where the gradient was taken last."""
        bend = self.decay * direction.square().sum((1, 2))
        for piece in self.pieces:
            moved = self._probabilities(piece) * change[:, piece]
            spread = (moved * change[:, piece]).sum(2) - moved.sum(2).square()
            bend += (spread * self.weights[:, piece]).sum(1)
        return bend


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
    history: list[_Pair] = []
    value = start = objective.value(v)
    g = objective.gradient(v)
    for turn in range(iterations):
        # What is left to gain is no more than the objective, and no more than this, by the convexity of the penalty.
        left = torch.minimum(value, g.square().sum((1, 2)) / (2.0 * decay))
        if bool((left <= 1e-3 * settled * weights.sum(1)).all()):
            break
        direction = -_inverse_curvature(g, history)
        change = rows @ direction.mT if logits.shape[2] >= _FEW else (direction @ rows.mT).mT
        slope = (g * direction).sum((1, 2))
        bend = objective.curvature(direction, change)
        step = (-slope / bend.clamp_min(1e-30)).clamp(0.0, 100.0)
        for _ in range(20):
            tried = objective.value(torch.addcmul(v, step[:, None, None], direction), step, change)
            worse = tried > value + 1e-4 * step * slope
            if not bool(worse.any()):
                break
            step = torch.where(worse, 0.5 * step, step)
        better = tried < value
        step = torch.where(better, step, 0.0)
        moved = direction.mul_(step[:, None, None])
        v += moved
        logits.add_(change.mul_(step[:, None, None]))
        fell, value = torch.where(better, value - tried, 0.0), torch.where(better, tried, value)
        if turn == iterations - 1 or bool((fell <= settled * (start - value)).all()):
            break
        before, g = g, objective.gradient(v)
        history = [*history[-9:], _Pair.of(moved, g - before)]
    return v


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
    if not history:
        return g
    result, factors = g.clone(), []
    for moved, difference, rho, _ in reversed(history):
        factor = (moved * result).sum((1, 2), keepdim=True).mul_(rho)
        result.addcmul_(factor, difference, value=-1.0)
        factors.append(factor)
    result *= history[-1].scale
    for (moved, difference, rho, _), factor in zip(history, reversed(factors), strict=True):
        result.addcmul_((difference * result).sum((1, 2), keepdim=True).mul_(rho).neg_().add_(factor), moved)
    return result
