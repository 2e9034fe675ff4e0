"""Recipes, the learning-rate schedule and the order of batches.

Recipe `paper` is TaskRes exactly as published (arXiv 2211.10277, section 4.1, and its code's configuration files).
Recipe `auto` is ours: one setting for every task, no validation set. It keeps the residual near zero where shots are
few (penalty 3 / shots on the relative squared length) and its step is relative to the length of the text embeddings,
so it does not depend on the backbone's scale or on `alpha`. `docs/recipes.md` shows how it was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..residual import TaskResClassifier


@dataclass(frozen=True)
class Recipe:
    """Numbers of one training run.

    Attributes:
        learning_rate: of Adam (betas 0.9, 0.999), after the warm-up epoch.
        weight_decay: coupled (added to the gradient), as in `torch.optim.Adam`.
        num_train_epochs: T; the cosine is stepped once an epoch.
        warmup_lr: learning rate of the first epoch.
        train_batch_size: examples per step over all processes.
        penalty: factor on `|alpha x|^2 / mean |t_k|^2`, summed over classes.
    """

    name: str
    learning_rate: float
    weight_decay: float
    num_train_epochs: int
    warmup_lr: float = 1e-5
    train_batch_size: int = 256
    penalty: float = 0.0


def make_recipe(name: str, head: TaskResClassifier, shots: float, count: int = 0) -> Recipe:
    """The recipe of that name for a head.

    Args:
        shots: mean training pictures per class. count: training pictures; `auto` takes four steps an epoch where there
            are more than 1,024, in batches of at most 4,096: fewer, larger products are faster.

    Raises:
        ConfigurationError: unknown name.
    """
    epochs = 200 if shots >= 8 else 100  # published: 100 epochs for 1, 2 and 4 shots, 200 for 8 and 16
    if name == "paper":
        return Recipe("paper", learning_rate=2e-3, weight_decay=5e-4, num_train_epochs=epochs)
    if name == "auto":
        rms = float(head.base.pow(2).mean().sqrt())
        rate = 0.035 * rms / max(abs(head.alpha), 1e-3)
        batch = min(max(256, -(-count // 4)), 4096)
        penalty = 3.0 / max(shots, 1.0)
        return Recipe("auto", rate, 0.0, epochs, train_batch_size=batch, penalty=penalty)
    raise ConfigurationError(f"`recipe` must be 'auto' or 'paper'; got {name!r}.")


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Learning rate of an epoch: `warmup_lr` in epoch 0, then `lr / 2 * (1 + cos(pi * (epoch - 1) / T))`."""
    if epoch == 0:
        return recipe.warmup_lr
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (epoch - 1) / recipe.num_train_epochs))


def epoch_batches(count: int, views: int, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions [B] and views [B] of each batch of an epoch, the same on every process.

    A function of (seed, epoch) alone, so a resumed run needs no generator state. As published, the last batch is
    dropped when it is smaller than `batch_size`, unless the whole set is.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    chosen = torch.randint(views, (count,), generator=generator) if views > 1 else torch.zeros(count, dtype=torch.long)
    end = count // batch_size * batch_size if count >= batch_size else count
    for start in range(0, end, batch_size):
        stop = min(start + batch_size, end)
        yield order[start:stop], chosen[start:stop]
