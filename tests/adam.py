"""Adam and AdamW with a cosine schedule, in numpy: what the second statements of trained methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from formulas import Array


def adam(
    start: Sequence[Array],
    gradients_of: Callable[[int, Sequence[Array]], Sequence[Array]],
    steps: int,
    rate: float,
    eps: float,
    decay: float = 0.0,
) -> list[list[Array]]:
    """What was trained after each step; `decay` is decoupled, the rate falls to 0 along a cosine."""
    values = [np.array(value, dtype=np.float64) for value in start]
    first, second = ([np.zeros_like(value) for value in values] for _ in range(2))
    history = []
    for step in range(steps):
        now = rate / 2 * (1 + math.cos(math.pi * step / steps))
        for place, gradient in enumerate(gradients_of(step, values)):
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient**2
            mean, square = first[place] / (1 - 0.9 ** (step + 1)), second[place] / (1 - 0.999 ** (step + 1))
            values[place] = values[place] * (1 - now * decay) - now * mean / (np.sqrt(square) + eps)
        history.append(list(values))
    return history
