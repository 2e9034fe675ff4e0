"""Batches of image embeddings, whatever they come from, and the step that learns from one, with one signature each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor

from ..alone.linear_head import SCALE, LinearHead
from ..data import LabelledImages
from ..embedding import Embedder, ImageFeatures, StoredFeatures, augment, crop_size
from ..embedding.engines.onednn import product
from ..errors import ConfigurationError
from ..residual import AS_PUBLISHED, TaskResClassifier
from .beside_head import fit_whitened_beside
from .multi_label import fit_multi_label
from .recipes import Recipe, epoch_batches, learning_rate
from .whitened import WhitenedFit, fit_whitened


def penalty_factor(recipe: Recipe, head: TaskResClassifier) -> float:
    """Factor `c` such that the penalty is `c * |x|^2`."""
    if not recipe.penalty:
        return 0.0
    return recipe.penalty * head.alpha**2 / head.mean_square()


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many pictures get their label, or all of theirs and no other."""
    return ((logits > 0) == (labels > 0)).all(1).sum() if labels.ndim == 2 else (logits.argmax(dim=1) == labels).sum()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over pictures of the cross-entropy or, with labels [N, K], of the mean binary cross-entropy."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / labels.shape[1]
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def loss_and_gradient(
    head: TaskResClassifier, images: Tensor, labels: Tensor, penalty: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, number of correct predictions, and the gradient with respect to the residual, by hand.

    With `u_k = norm(t_k + alpha x_k)` and `G = dL/du` [K, D], the chain rule through the normalisation is
    `dL/dx_k = alpha / |w_k| * (G_k - (G_k . u_k) u_k)`. Two matrix products instead of autograd's graph; a test
    holds it to autograd.

    Args:
        images: [B, D] embeddings of unit length. labels: [B], or [B, K] of 0 and 1 where pictures have several: then
            the loss is binary cross-entropy, and it and the penalty are means over classes. penalty: see
            `penalty_factor`.

    Returns:
        loss (scalar), correct (scalar, integer), gradient [K, D].
    """
    weight = head.weight()  # a fresh tensor: reused below
    length = weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = weight.div_(length)
    logits = product(images, unit).mul_(head.logit_scale).add_(head.logit_bias)
    if head.class_bias is not None:
        logits.add_(head.class_bias)
    correct = count_correct(logits, labels)
    if labels.ndim == 2:  # the mean over classes, as transformers' BCEWithLogitsLoss
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        error = logits.sigmoid_().sub_(labels).div_(labels.shape[1])
        penalty /= labels.shape[1]
    else:
        log_probabilities = F.log_softmax(logits, dim=1)
        rows = labels.unsqueeze(1)
        loss = -log_probabilities.gather(1, rows).mean()
        error = log_probabilities.exp_()
        error.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=error.dtype))
    gradient = product(error.T, images.T).mul_(head.logit_scale / len(labels))
    gradient.sub_(unit * (gradient * unit).sum(dim=1, keepdim=True)).mul_(head.alpha / length)
    if penalty:
        loss = loss + penalty * head.residual.pow(2).sum()
        gradient.add_(head.residual, alpha=2.0 * penalty)
    return loss, correct, gradient


# Image embeddings [b, D] and labels [b] of one process's share, and the number of examples B of all processes.
Batch = tuple[Tensor, Tensor, int]
# The batches of an epoch.
Batches = Callable[[int], Iterator[Batch]]
# Learns from a batch; sums [3] over all processes: loss, correct, examples.
Step = Callable[[Tensor, Tensor, int], Tensor]


def batches_in_memory(
    data: ImageFeatures, head: TaskResClassifier, recipe: Recipe, seed: int, world: int = 1, rank: int = 0
) -> Batches:
    """Embeddings already computed, a random view of each picture."""
    embeds = _ready(data.image_embeds, head)
    labels = data.labels.to(embeds.device)

    def batches(epoch: int) -> Iterator[Batch]:
        for rows, views in epoch_batches(len(data), len(embeds), recipe.train_batch_size, seed, epoch):
            rows, views, count = rows[rank::world].to(embeds.device), views[rank::world].to(embeds.device), len(rows)
            images = embeds[0].index_select(0, rows) if len(embeds) == 1 else embeds[views, rows]
            yield images, labels[rows], count

    return batches


def batches_from_disk(
    data: StoredFeatures, head: TaskResClassifier, recipe: Recipe, seed: int, buffer_mb: int, world: int, rank: int
) -> Batches:
    """Embeddings too many for memory."""

    def batches(epoch: int) -> Iterator[Batch]:
        for labels, images in data.batches(recipe.train_batch_size, seed, epoch, buffer_mb):
            ready = _ready(images[rank::world], head)
            yield ready, labels[rank::world].to(ready.device), len(labels)

    return batches


def batches_augmented(
    images: LabelledImages,
    digests: Sequence[str],
    embedder: Embedder,
    head: TaskResClassifier,
    recipe: Recipe,
    seed: int,
    batch_size: int | None = None,
    world: int = 1,
    rank: int = 0,
) -> Batches:
    """Pictures augmented and embedded afresh; a view is a function of the seed, the picture and the epoch."""
    size = crop_size(embedder.image_processor)
    all_labels = torch.tensor(images.labels)
    turn = batch_size or embedder.batch_size

    def embed(rows: list[int], epoch: int) -> Tensor:
        parts = [torch.zeros(0, head.base.shape[1])]
        for start in range(0, len(rows), turn):
            pictures = [
                augment(images.image(row), size, random.Random(f"{seed} {digests[row]} {epoch}"))
                for row in rows[start : start + turn]
            ]
            parts.append(embedder(pictures, augmented=True))
        return torch.cat(parts)

    def batches(epoch: int) -> Iterator[Batch]:
        for rows, _ in epoch_batches(len(images), 1, recipe.train_batch_size, seed, epoch):
            mine = rows[rank::world]
            ready = _ready(embed(mine.tolist(), epoch), head)
            yield ready, all_labels[mine].to(ready.device), len(rows)

    return batches


def _ready(images: Tensor, head: TaskResClassifier) -> Tensor:
    images = images.to(device=head.residual.device, dtype=head.residual.dtype)
    # On the text side the length of an image embedding does not matter.
    return F.normalize(images, dim=-1) if head.side == "text" and not head.takes_raw_embeddings else images


def make_optimizer(head: TaskResClassifier, recipe: Recipe) -> torch.optim.Optimizer:
    """The published optimizer over the residual, which starts without a gradient.

    Raises:
        ConfigurationError: the head is not the published one, see `TaskResClassifier.check_trainable`.
    """
    if recipe.name != "auto":  # which starts from zero-shot, whatever was there
        head.check_trainable()
    head.residual.grad = None  # whatever a caller or an earlier run left there
    return torch.optim.Adam([head.residual], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: int) -> float:
    rate = learning_rate(recipe, epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def make_step(
    head: TaskResClassifier,
    optimizer: torch.optim.Optimizer | None,
    recipe: Recipe,
    closed_form: bool = True,
    accelerator: Any = None,
    views: int = 1,
) -> Step:
    """The step of a run: the gradient by hand where one process trains the text side, else autograd.

    Recipe `auto` has one step that takes all pictures in all views and fits the residual to them.

    Args:
        views: of a picture in the batch, one view of all pictures after the other; for `auto`.
        accelerator: an `accelerate.Accelerator`, or None within one process.
    """
    if recipe.name == "auto":
        return _whole_step(head, views, accelerator)
    assert optimizer is not None
    factor = penalty_factor(recipe, head)
    several = accelerator is not None and accelerator.num_processes > 1
    if closed_form and not several and head.side == "text" and not isinstance(head, LinearHead):
        return _closed_form_step(head, optimizer, factor)
    return _autograd_step(head, optimizer, factor, accelerator)


def batches_whole(data: ImageFeatures, head: TaskResClassifier) -> Batches:
    """All pictures in all views at once, for recipe `auto`."""

    def batches(epoch: int) -> Iterator[Batch]:
        count = data.image_embeds.shape[0]
        device = head.base.device
        yield data.image_embeds.flatten(0, 1).to(device), torch.cat([data.labels] * count).to(device), len(data)

    return batches


def _whole_step(head: TaskResClassifier, views: int, accelerator: Any) -> Step:
    @torch.no_grad()
    def step(images: Tensor, labels: Tensor, count: int) -> Tensor:
        several = labels.ndim == 2  # a picture may have several labels
        fitted = _fitted_at_once(head, images, labels, views)
        weight, bias = fitted.weight.to(head.base), fitted.bias.to(head.base)
        if accelerator is not None and accelerator.num_processes > 1:  # the same numbers everywhere, to the last bit
            weight, bias = broadcast(weight), broadcast(bias)
        facts = {name: value for name, value in head.facts.items() if name not in AS_PUBLISHED}
        bias = bias - head.logit_bias if several else bias
        head.set_weight(weight / head.logit_scale, class_bias=bias, normalize_weight=False)
        head.facts.update(facts)
        if head.facts.get("training") or several:
            head.facts["training"] = {**(head.facts.get("training") or {}), **fitted.chosen}
        logits = head(images[: len(images) // views]).detach()
        truth = labels[: len(logits)]
        loss, correct = float(summed_loss(logits, truth)) / len(truth), count_correct(logits, truth)
        return torch.tensor([loss * count, float(correct), count], dtype=torch.float64)

    return step


def _fitted_at_once(head: TaskResClassifier, images: Tensor, labels: Tensor, views: int) -> WhitenedFit:
    """What recipe `auto` fits: logit_scale * f @ weight.T + bias, beside a bias that the head has of its own."""
    if not head.takes_raw_embeddings:
        fit_all = fit_multi_label if labels.ndim == 2 else fit_whitened
        return fit_all(images, labels, head.base, SCALE if isinstance(head, LinearHead) else head.logit_scale, views)
    fitted = fit_whitened_beside(images, labels, head.base, head.base_bias, views)
    own = 0.0 if head.base_bias is None else head.base_bias.cpu()
    return replace(fitted, bias=fitted.bias - own)


def _closed_form_step(head: TaskResClassifier, optimizer: torch.optim.Optimizer, factor: float) -> Step:
    def step(images: Tensor, labels: Tensor, count: int) -> Tensor:
        loss, correct, head.residual.grad = loss_and_gradient(head, images, labels, factor)
        optimizer.step()
        return torch.tensor([float(loss) * count, float(correct), count], dtype=torch.float64)

    return step


def _autograd_step(
    head: TaskResClassifier, optimizer: torch.optim.Optimizer, factor: float, accelerator: Any = None
) -> Step:
    forward, prepared = (head, optimizer) if accelerator is None else accelerator.prepare(head, optimizer)
    world = 1 if accelerator is None else accelerator.num_processes

    def step(images: Tensor, labels: Tensor, count: int) -> Tensor:
        logits = forward(images)
        # Sums over the whole batch: gradients of the processes are averaged, whatever share each one has.
        local = summed_loss(logits, labels)
        regulariser = factor / (labels.shape[1] if labels.ndim == 2 else 1) * head.residual.pow(2).sum()
        loss = local * (world / count) + regulariser
        loss.backward() if accelerator is None else accelerator.backward(loss)
        prepared.step()
        prepared.zero_grad()
        correct = count_correct(logits, labels)
        sums = torch.stack([local.detach() + regulariser.detach() * len(labels), correct.to(local.dtype)])
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        return torch.cat([sums.double().cpu(), torch.tensor([float(count)], dtype=torch.float64)])

    return step


def start_by_epochs(head: TaskResClassifier, data: ImageFeatures | StoredFeatures) -> None:
    """Before training by epochs: what has to be read off the shots themselves.

    With several labels per picture a bias, see `set_class_bias`; over an image tower without a head the class means.

    Raises:
        ConfigurationError: the shots are on disk, and class means are needed.
    """
    if isinstance(data, StoredFeatures):
        if isinstance(head, LinearHead) and not head.takes_raw_embeddings:
            raise ConfigurationError(
                "Training by epochs over an image tower without a head starts from class means, for which embeddings "
                "must be in memory; these are on disk. Use recipe 'auto'."
            )
    elif data.labels.ndim == 2:
        set_class_bias(head, data.image_embeds[0], data.labels)
    elif isinstance(head, LinearHead):
        head.start_from_means(data.image_embeds[0], data.labels)


@torch.no_grad()
def set_class_bias(head: TaskResClassifier, images: Tensor, labels: Tensor) -> None:
    """Before training by epochs: a frozen bias per class under which the zero-shot classifier gives each class to about
    as many of the shots as show it. Cosines of CLIP alone would give all classes to all pictures.

    Args:
        images: [N, D] embeddings. labels: [N, K].
    """
    logits = head.zero_shot_logits(images.to(head.base.device)).cpu().double()
    share = ((labels.cpu().double().sum(0) + 0.5) / (len(labels) + 1.0)).clamp(0.01, 0.99)
    low, high = torch.full_like(share, -2e5), torch.full_like(share, 2e5)
    for _ in range(80):  # the sigmoid's mean grows with the bias
        middle = 0.5 * (low + high)
        more = torch.sigmoid(logits + middle).mean(0) > share
        low, high = torch.where(more, low, middle), torch.where(more, middle, high)
    head.class_bias = (0.5 * (low + high)).to(head.base)


def fit(
    head: TaskResClassifier,
    data: ImageFeatures,
    recipe: Recipe,
    seed: int,
    *,
    closed_form: bool = True,
    epochs: int = 0,
) -> None:
    """Train a head on embeddings in memory, in this process alone, without logs or files.

    Args:
        epochs: end after so many of the recipe's epochs; 0 for all.
    """
    if recipe.name == "auto":
        whole = next(batches_whole(data, head)(0))
        make_step(head, None, recipe, views=data.image_embeds.shape[0])(*whole)
        return
    start_by_epochs(head, data)
    optimizer = make_optimizer(head, recipe)
    batches, step = batches_in_memory(data, head, recipe, seed), make_step(head, optimizer, recipe, closed_form)
    for epoch in range(min(epochs or recipe.num_train_epochs, recipe.num_train_epochs)):
        set_learning_rate(optimizer, recipe, epoch)
        for batch in batches(epoch):
            step(*batch)
    head.residual.grad = None
