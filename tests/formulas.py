"""What the second statements of the methods' formulas share: numpy in fp64, no code of the library."""

from __future__ import annotations

from typing import Any

import numpy as np
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
