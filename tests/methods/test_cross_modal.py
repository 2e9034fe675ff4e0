from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from formulas import assert_close, flat, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods.cross_modal import CrossModal, _turns, rate_at
from taskres_hf.residual import TaskResClassifier


def test_formula(views: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor) -> None:
    embeds, labels = map(torch.from_numpy, flat(views))
    scale, text = classifier.logit_scale, torch.from_numpy(unit(classifier.base))
    weight = text.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], weight_decay=1e-2)
    generator = torch.Generator().manual_seed(1)
    pictures, texts = _turns(len(labels), generator), _turns(8, generator)
    for step in range(200):
        chosen, classes = next(pictures), next(texts)
        assert len(chosen) == 16
        assert sorted(classes.tolist()) == list(range(8))
        optimizer.param_groups[0]["lr"] = rate_at(step, 200)
        logits = scale * torch.cat([embeds[chosen], text[classes]]) @ weight.T
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.cat([labels[chosen], classes])).backward()
        optimizer.step()
    expected = scale * unit(images) @ weight.detach().numpy().T
    assert np.abs(expected - scale * unit(images) @ text.numpy().T).max() > 0.5
    assert_close(CrossModal(steps=200).fit(views, classifier).logits(images), expected)


def test_every_picture_has_its_turn() -> None:
    turns = _turns(40, torch.Generator().manual_seed(1))
    first, second = torch.cat([next(turns), next(turns)]), torch.cat([next(turns), next(turns)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 32
    assert first.tolist() != second.tolist()


def test_the_published_schedule() -> None:
    assert [rate_at(step, 12_800) for step in (0, 1, 25, 50)] == pytest.approx([1e-5, 2e-5, 5e-4, 1e-3])
    assert rate_at(6450, 12_800) == pytest.approx(5e-4)
    assert rate_at(12_799, 12_800) < 1e-6
    assert inspect.signature(CrossModal).parameters["steps"].default == 12_800
