from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from formulas import assert_close, flat, softmax, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.clap import CLAP, RECIPE, held_to_text
from taskres_hf.methods.inputs import samples
from taskres_hf.residual import TaskResClassifier


@pytest.mark.parametrize(("which", "batch"), [("shots", 256), ("views", 256), ("views", 8)])
def test_formula(
    which: str,
    batch: int,
    request: pytest.FixtureRequest,
    classifier: TaskResClassifier,
    images: torch.Tensor,
) -> None:
    features: ImageFeatures = request.getfixturevalue(which)
    epochs = 40
    method = CLAP(replace(RECIPE, num_train_epochs=epochs, train_batch_size=batch))
    embeds, labels = flat(features)
    scale, text = classifier.logit_scale, classifier.base.double()
    probabilities = softmax(scale * embeds @ unit(text).T)
    held = torch.tensor([probabilities[labels == label, label].mean() for label in range(8)])
    weight = text.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    inputs, truth, steps = torch.from_numpy(embeds), torch.from_numpy(labels), 0
    for epoch in range(epochs):
        rate = 1e-5 if epoch == 0 else 0.05 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        optimizer.param_groups[0]["lr"] = rate
        for rows in method._batches(len(truth), len(features), 1, epoch):
            logits = scale * inputs[rows] @ torch.nn.functional.normalize(weight, dim=1).T
            apart = (held * (weight - text).pow(2).sum(dim=1)).mean()
            optimizer.zero_grad()
            (torch.nn.functional.cross_entropy(logits, truth[rows]) + apart).backward()
            optimizer.step()
            steps += 1
    assert steps == epochs * max(len(features) // batch, 1)
    expected = scale * unit(images) @ unit(weight.detach()).T
    assert np.abs(expected - scale * unit(images) @ unit(text).T).max() > 0.5
    assert_close(method.fit(features, classifier).logits(images), expected)


def test_a_class_without_shots_is_held_most(shots: ImageFeatures, classifier: TaskResClassifier) -> None:
    rest = shots.select([row for row, label in enumerate(shots.labels.tolist()) if label != 3])
    held = held_to_text(classifier, *samples(rest))
    assert float(held[3]) == 1
    assert bool((held[[0, 1, 2, 4]] < 1).all())


def test_the_published_constants() -> None:
    assert (RECIPE.learning_rate, RECIPE.num_train_epochs, RECIPE.train_batch_size) == (0.1, 300, 256)
    assert (RECIPE.warmup_lr, RECIPE.weight_decay) == (1e-5, 0)
