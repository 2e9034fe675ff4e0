"""What the second statements of the methods' formulas share: numpy in fp64, no code of the library."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

Array = np.ndarray[Any, np.dtype[Any]]


def unit(rows: Any) -> Array:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def flat(features: Any) -> tuple[Array, Array]:
    """Every view of every picture, unit length, and its label."""
    embeds = unit(features.image_embeds.numpy())
    return embeds.reshape(-1, embeds.shape[-1]), np.concatenate([features.labels.numpy()] * len(embeds))


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def loss(logits: Array, labels: Array) -> float:
    """Mean cross-entropy."""
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean())


def assert_close(found: Any, expected: Array, tolerance: float = 1e-4) -> None:
    """Equal within a part of the largest value."""
    found = np.asarray(found.detach(), dtype=np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


def least(rows: Array, y: Array, offsets: Array, decay: float, iterations: int = 2000) -> tuple[Array, float]:
    """V [K, D] of least summed cross-entropy and penalty, and that."""
    truth = np.eye(offsets.shape[1])[y]

    def objective(flat: Array) -> tuple[float, Array]:
        v = flat.reshape(offsets.shape[1], -1)
        logits = offsets + rows @ v.T
        value = (logsumexp(logits, axis=1) - (truth * logits).sum(1)).sum() + 0.5 * decay * (v**2).sum()
        return float(value), ((softmax(logits) - truth).T @ rows + decay * v).ravel()

    found = minimize(
        objective, np.zeros(offsets.shape[1] * rows.shape[1]), jac=True, method="L-BFGS-B",
        options={"maxiter": iterations, "maxfun": 10 * iterations, "ftol": 1e-15, "gtol": 1e-9},
    )  # fmt: skip
    return found.x.reshape(offsets.shape[1], -1), float(found.fun)
