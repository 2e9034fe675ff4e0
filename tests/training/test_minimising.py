"""What recipe `auto` minimises, against scipy, and its slopes against differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from formulas import least, softmax
from torch import Tensor

from taskres_hf.training import minimising
from taskres_hf.training.minimising import Objective, likeliest_factor, log_losses, minimise, probabilities


def _problem(classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, R], labels [N] and offsets [N, K] of classes that are hard to tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % classes
    means = torch.randn(classes, 12, generator=generator, dtype=torch.float64)
    rows = means[labels] + 2.0 * torch.randn(30, 12, generator=generator, dtype=torch.float64)
    return rows, labels, torch.randn(30, classes, generator=generator, dtype=torch.float64)


def _value(objective: Objective, v: Tensor, *step: Tensor) -> Tensor:
    return torch.tensor(objective.cross_entropy(*step), dtype=torch.float64) + 0.5 * objective.decay * v.square().sum(
        (1, 2)
    )


@pytest.mark.parametrize("classes", [5, 70])  # few classes are laid out another way
@pytest.mark.parametrize("decay", [0.01, 2.0])
def test_the_minimum_is_scipys(decay: float, classes: int) -> None:
    rows, labels, offsets = _problem(classes)
    x, y = rows.numpy(), labels.numpy()
    expected, lowest = least(x, y, offsets.numpy(), decay)
    keep = np.unique(y)  # a class without a picture stays as it is
    if len(keep) < classes:
        expected, lowest = least(x, y, np.delete(offsets.numpy(), np.arange(30, classes), 1), decay)
        offsets[:, 30:] = -1e3  # so that nothing is claimed by those
    several = torch.stack([offsets, 2.0 * offsets])
    ones, decays = torch.ones(2, 30, dtype=torch.float64), torch.tensor([decay, 1.0], dtype=torch.float64)
    v = minimise(torch.stack([rows, rows]), labels, ones, several, decays, 500, 0.0)[0].numpy()
    logits = offsets.numpy() + x @ v.T
    value = -np.log(softmax(logits)[np.arange(30), y]).sum() + 0.5 * decay * (v**2).sum()
    assert value == pytest.approx(lowest, abs=1e-6)
    assert np.abs(v[keep] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(np.delete(v, keep, 0)).sum() == 0.0
    assert np.abs(several[0].numpy() - logits).max() < 1e-8  # carried along, in place


@pytest.mark.parametrize("settled", [0.1, 0.001])
def test_what_is_left_out_is_as_little_as_asked(settled: float) -> None:
    rows, labels, offsets = _problem()
    ones, decay = torch.ones(1, 30, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)

    def value(settled: float, iterations: int = 500) -> float:
        moved = offsets[None].clone()
        v = minimise(rows[None], labels, ones, moved, decay, iterations, settled)
        return float(_value(Objective(rows[None], labels, ones, moved, decay), v))

    lowest, start = value(0.0), value(0.0, 0)
    assert lowest < value(settled) < lowest + 2.0 * settled * (start - lowest)


def test_a_picture_without_weight_is_left_out() -> None:
    rows, labels, offsets = _problem()
    weights, decay = torch.ones(1, 30, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    weights[0, 20:] = 0.0
    every = minimise(rows[None], labels, weights, offsets[None].clone(), decay, 500, 0.0)
    some = minimise(rows[None, :20], labels[:20], weights[:, :20], offsets[None, :20].clone(), decay, 500, 0.0)
    torch.testing.assert_close(every, some, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("piece", [1, 1_000_000])
def test_slope_and_curvature_are_those_of_the_value(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimising, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    rows, logits, v, direction = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 6, 3), (2, 6, 4), (2, 4, 3), (2, 4, 3))
    )
    labels, decay = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0.5, 2.0], dtype=torch.float64)
    weights = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(2, 6)

    def at(moved: Tensor) -> Objective:
        return Objective(rows, labels, weights, logits + rows @ moved.mT, decay)

    def differences(what: Any, step: float = 1e-5) -> Tensor:
        before, after = (what(at(v + s * direction), v + s * direction) for s in (-step, step))
        return (after - before) / (2 * step)

    here, change = at(v), rows @ direction.mT
    slope = (here.gradient(v) * direction).sum((1, 2))
    torch.testing.assert_close(slope, differences(_value), atol=1e-6, rtol=1e-6)
    bend = differences(lambda there, moved: (there.gradient(moved) * direction).sum((1, 2)))
    curvature = torch.tensor(here.curvature(change), dtype=torch.float64) + decay * direction.square().sum((1, 2))
    torch.testing.assert_close(curvature, bend, atol=1e-6, rtol=1e-6)
    step = torch.tensor([0.5, 0.1], dtype=torch.float64)[:, None, None]
    moved = v + step * direction
    torch.testing.assert_close(_value(here, moved, step, change), _value(at(moved), moved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 100])
def test_no_number_is_subnormal(dtype: torch.dtype, classes: int) -> None:
    """Processors that multiply those slowly took several times as long for a fit."""
    generator = torch.Generator().manual_seed(0)
    tiny = torch.finfo(dtype).tiny
    logits = 40 * torch.randn(2, 60, classes, generator=generator, dtype=dtype)
    logits[0, 0, :2] = torch.tensor([0.0, math.log(tiny) - 2.0], dtype=dtype)
    assert (logits.softmax(2)[0, 0] < tiny).any()
    chances = probabilities(logits)
    torch.testing.assert_close(chances, logits.softmax(2), atol=torch.finfo(dtype).eps, rtol=0.0)
    rows = torch.randn(2, 60, 7, generator=generator, dtype=dtype)
    y, weights = torch.randint(classes, (60,), generator=generator), torch.ones(2, 60, dtype=dtype)
    objective = Objective(rows, y, weights, logits, torch.ones(2, dtype=dtype))
    gradient = objective.gradient(torch.zeros(2, classes, 7, dtype=dtype))
    for numbers in (chances, gradient, gradient.square()):
        assert not ((numbers != 0) & (numbers.abs() < tiny)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("best", [-1.0, 0.003, 0.02, 0.5, 0.98, 3.0])
def test_no_factor_is_likelier_than_the_likeliest(best: float, classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(2000, classes, generator=generator, dtype=torch.float64)
    labels = true.softmax(1).multinomial(1, generator=generator)[:, 0]
    logits, weights = true / best, torch.rand(2000, generator=generator)
    found = likeliest_factor(logits.to(dtype), labels, weights)
    losses = log_losses(logits, labels, weights, [found, *(place / 200 for place in range(201))])
    assert 0.0 <= found <= 1.0
    assert losses[0] <= min(losses) + 1e-6
    assert found == {-1.0: 0.0, 3.0: 1.0}.get(best, found)
    told_apart = 100.0 * true.to(dtype)  # without an error: every factor is as good, but for rounding
    assert likeliest_factor(told_apart, true.argmax(1), weights) == 1.0
