"""Recipes, the learning-rate schedule and the order of batches.

Recipe `paper` is TaskRes exactly as published (arXiv 2211.10277, section 4.1, and its code's configuration files).
Recipe `auto` is ours and has no numbers to set: it fits all at once, see `training.whitened`. Recipe `auto-v1` is what
`auto` was before, trained by epochs: one setting for every task, no validation set. It keeps the residual near zero
where shots are few (penalty 3 / shots on the relative squared length) and its step is relative to the length of the
text embeddings, so it does not depend on the backbone's scale or on `alpha`. `docs/recipes.md` shows how it was chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..residual import TaskResClassifier
from .arguments import TaskResTrainingArguments

# Pictures times classes of embeddings on disk that recipe `auto` takes at once: 48 MB a set of logits, of which a fit
# holds a handful.
MOST_LOGITS = 12_000_000


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


# What the published scripts set per dataset besides the one setting for all (train_regular.sh, train_enhance.sh).
PUBLISHED_CONSTANTS: dict[str, dict[str, float]] = {
    "imagenet": {"learning_rate": 2e-4},
    "oxford_flowers": {"alpha": 1.0},
}
_OTHER_NAMES = {
    "imagenet1k": "imagenet", "imagenet2012": "imagenet", "ilsvrc2012": "imagenet", "wdsimagenet1k": "imagenet",
    "flowers102": "oxford_flowers", "oxfordflowers102": "oxford_flowers", "oxford102flowers": "oxford_flowers",
    "wdsvtabflowers": "oxford_flowers",
}  # fmt: skip
PUBLISHED_ALPHA = 0.5  # of all others


def published_epochs(shots: float) -> int:
    """Published: 100 epochs for 1, 2 and 4 shots, 200 for 8 and 16."""
    return 200 if round(shots) >= 8 else 100


def published_constants(dataset_name: str | None) -> dict[str, float]:
    """What the published scripts set for a dataset: `learning_rate` for ImageNet, `alpha` for Flowers102, else nothing.

    Args:
        dataset_name: as in the paper, in `paper.datasets`, or a Hub id such as `"ILSVRC/imagenet-1k"`.
    """
    name = re.sub(r"[^a-z0-9]", "", str(dataset_name or "").rstrip("/").split("/")[-1].lower())
    return next(
        (
            values
            for known, values in PUBLISHED_CONSTANTS.items()
            if name == known.replace("_", "") or _OTHER_NAMES.get(name) == known
        ),
        {},
    )


def published_alpha(alpha: float, dataset_name: str | None) -> float:
    """The published `alpha` of a dataset; another one than the library's default is the user's own and stays."""
    return published_constants(dataset_name).get("alpha", alpha) if alpha == PUBLISHED_ALPHA else alpha


def make_recipe(
    name: str, head: TaskResClassifier, shots: float, count: int = 0, dataset_name: str | None = None
) -> Recipe:
    """The recipe of that name for a head.

    Args:
        shots: training pictures per class: `auto-v1` takes what there is on average, `paper` what was asked for.
        count: training pictures; `auto-v1` takes four steps an epoch where there are more than 1,024, in batches of at
            most 4,096: fewer, larger products are faster.
        dataset_name: `paper` has another learning rate for ImageNet, see `published_constants`.

    Raises:
        ConfigurationError: unknown name.
    """
    epochs = published_epochs(shots)
    if name == "paper":
        rate = published_constants(dataset_name).get("learning_rate", 2e-3)
        return Recipe("paper", learning_rate=rate, weight_decay=5e-4, num_train_epochs=epochs)
    if name == "auto":
        return Recipe("auto", 0.0, 0.0, 1, warmup_lr=0.0, train_batch_size=max(count, 1))
    if name == "auto-v1":
        rms = float(head.base.pow(2).mean().sqrt()) or math.sqrt(head.mean_square() / head.base.shape[1])
        rate = 0.035 * rms / max(abs(head.alpha), 1e-3)
        batch = min(max(256, -(-count // 4)), 4096)
        penalty = 3.0 / max(shots, 1.0)
        return Recipe("auto-v1", rate, 0.0, epochs, train_batch_size=batch, penalty=penalty)
    raise ConfigurationError(f"`recipe` must be 'auto', 'auto-v1' or 'paper'; got {name!r}.")


def recipe_for(args: TaskResTrainingArguments, head: TaskResClassifier, labels: Tensor, fit_buffer: bool) -> Recipe:
    """The recipe of a run, with what the settings override.

    Args:
        labels: [N] class ids of the training pictures, or [N, K] of several labels each. How many pictures a class has
            decides; of those asked for, only recipe `paper` knows, whose epochs go by the shots of its protocol.
        fit_buffer: keep a batch and its logits within `buffer_mb`, for embeddings read from disk.
    """
    classes, dim = head.base.shape
    if args.recipe == "paper":
        shots: float = args.shots or int(labels.sum(0).max() if labels.ndim == 2 else torch.bincount(labels).max())
    else:
        shots = (float(labels.sum()) if labels.ndim == 2 else len(labels)) / classes
    name = args.recipe if args.recipe != "auto" or not why_epochs(args, head, fit_buffer) else "auto-v1"
    recipe = make_recipe(name, head, shots, len(labels), args.dataset_name)
    if recipe.name == "auto":
        return recipe
    if fit_buffer and recipe.name == "auto-v1":
        fitting = args.buffer_mb * 1_000_000 // (4 * (dim + 3 * classes))
        recipe = replace(recipe, train_batch_size=max(256, min(recipe.train_batch_size, fitting)))
    return replace(recipe, **{name: getattr(args, name) for name in _OF_EPOCHS if getattr(args, name) is not None})


_OF_EPOCHS = ("num_train_epochs", "learning_rate", "weight_decay", "warmup_lr", "train_batch_size", "penalty")


def why_epochs(args: TaskResTrainingArguments, head: TaskResClassifier, from_disk: bool = False) -> str:
    """What asks for training by epochs, so that `auto-v1` takes the place of `auto`; empty if nothing does.

    Args:
        from_disk: embeddings are read from disk while training.
    """
    asked = ask_for_epochs(args)
    asked += ["a residual on the image side"] if head.side == "image" else []
    asked += ["alpha 0"] if head.alpha == 0 else []
    asked += ["embeddings on disk of so many classes"] if from_disk and len(head.base) ** 2 > MOST_LOGITS else []
    return ", ".join(asked)


def check_supported(head: TaskResClassifier, args: TaskResTrainingArguments) -> None:
    """Refuse what cannot be had with several labels per picture.

    Raises:
        ConfigurationError: names it.
    """
    if args.enhanced_base:
        head.check_has_text("enhanced_base (TaskRes*)")
    if head.several_labels and args.enhanced_base:
        raise ConfigurationError(
            "enhanced_base (TaskRes*) tunes the text for one label per picture; with several labels per picture "
            "(problem_type 'multi_label_classification') train without it."
        )


def ask_for_epochs(args: TaskResTrainingArguments) -> list[str]:
    """Settings that recipe `auto`, which has no epochs, cannot follow; `auto-v1` takes its place."""
    asked = [name for name in _OF_EPOCHS if getattr(args, name) is not None]
    asked += [name for name in ("save_epochs", "enhanced_base", "augment_online") if getattr(args, name)]
    return asked + (["measuring every epoch"] if args.evaluates_epochs else [])


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
