from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import Array, assert_close, flat, loss, unit

from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.methods import proker
from taskres_hf.methods.proker import ProKeR
from taskres_hf.methods.selection import shot_folds
from taskres_hf.residual import TaskResClassifier


def _logits(
    queries: Array, support: Array, labels: Array, head: TaskResClassifier, beta: float, penalty: float
) -> Array:
    text = unit(head.base)
    kernel = np.exp(-beta * (1 - support @ support.T))
    system = kernel / penalty + np.eye(len(support))
    coefficients = np.linalg.inv(system) @ (np.eye(8)[labels] - support @ text.T)
    return head.logit_scale * (queries @ text.T + np.exp(-beta * (1 - queries @ support.T)) @ coefficients)


@pytest.mark.parametrize("which", ["shots", "views"])
def test_formula(
    which: str, request: pytest.FixtureRequest, classifier: TaskResClassifier, images: torch.Tensor
) -> None:
    features: ImageFeatures = request.getfixturevalue(which)
    fitted = ProKeR().fit(features, classifier)
    support, labels = flat(features)
    expected = _logits(
        unit(images), support, labels, classifier, fitted.selected["beta"], fitted.selected["lambda"]
    )  # fmt: skip
    assert_close(fitted.logits(images), expected)
    assert float((fitted.logits(images) - classifier.zero_shot_logits(images)).std(dim=1).min()) > 0.01
    assert fitted.trained_parameters == len(support) * 8


def test_the_numbers_with_the_lowest_loss_on_held_out_shots(
    shots: ImageFeatures, classifier: TaskResClassifier
) -> None:
    embeds, labels = flat(shots)
    folds = shot_folds(shots.labels).numpy()
    losses = {}
    for beta in proker._BETAS:
        for penalty in proker._LAMBDAS:
            total = 0.0
            for fold in range(folds.max() + 1):
                train, held = folds != fold, folds == fold
                logits = _logits(embeds[held], embeds[train], labels[train], classifier, beta, penalty)
                total += loss(logits, labels[held]) * held.sum()
            losses[beta, penalty] = total
    fitted = ProKeR().fit(shots, classifier)
    assert (fitted.selected["beta"], fitted.selected["lambda"]) == min(losses, key=losses.__getitem__)
    assert fitted.selected_on == "cross-validation on the shots"


def test_one_shot_takes_what_is_published(shots: ImageFeatures, classifier: TaskResClassifier) -> None:
    rows = [shots.labels.tolist().index(label) for label in range(8)]
    fitted = ProKeR().fit(shots.select(rows), classifier)
    assert fitted.selected == {"beta": 3.0, "lambda": 0.05}
    assert fitted.selected_on == "nothing (one shot a class)"


def test_many_shots_are_selected_on_a_part(
    shots: ImageFeatures, classifier: TaskResClassifier, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    select = proker._select
    monkeypatch.setattr(proker, "_MOST_TO_SELECT_ON", 20)
    monkeypatch.setattr(proker, "_select", lambda some: seen.append(some) or select(some))
    fitted = ProKeR().fit(shots, classifier, seed=2)
    (some,) = seen
    assert some.labels.unique().tolist() == [0, 1, 2, 3]  # 8 classes, 33 shots: 4 classes
    assert some.text.shape == (4, 192)
    for label in range(4):  # each class has its own text, and all its shots
        true = int((classifier.base @ some.text[label]).argmax())
        mine = torch.nn.functional.normalize(shots.image_embeds[0][shots.labels == true], dim=-1)
        torch.testing.assert_close(some.keys[some.labels == label], mine)
    assert fitted.logits(images).shape == (len(images), 8)


def test_views_beyond_what_can_be_solved_are_left_out(views: ImageFeatures, classifier: TaskResClassifier) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proker, "_MOST_SAMPLES", 70)
        assert ProKeR().fit(views, classifier).trained_parameters == 2 * 33 * 8
