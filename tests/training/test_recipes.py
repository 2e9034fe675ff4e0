"""Recipes, schedule, order of batches, and the gradient by hand against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taskres_hf import TaskResClassifier, TaskResTrainingArguments
from taskres_hf.embedding.engines import onednn as linear
from taskres_hf.errors import ConfigurationError
from taskres_hf.paper.datasets import suite_datasets
from taskres_hf.training.recipes import (
    epoch_batches,
    learning_rate,
    make_recipe,
    published_alpha,
    published_constants,
    recipe_for,
)
from taskres_hf.training.steps import loss_and_gradient, penalty_factor


def _head(dtype: torch.dtype = torch.float64) -> TaskResClassifier:
    torch.manual_seed(0)
    head = TaskResClassifier(10 * torch.randn(6, 16), alpha=0.7, logit_scale=20.0, logit_bias=-1.0).to(dtype)
    with torch.no_grad():
        head.residual.normal_()
    return head


@pytest.mark.parametrize("penalty", [0.0, 0.01])
@pytest.mark.parametrize("shifted", [False, True])
def test_gradient_by_hand_equals_autograd(penalty: float, shifted: bool) -> None:
    head = _head()
    if shifted:
        head.shift = torch.randn(6, 16, dtype=torch.float64)
    images = F.normalize(torch.randn(9, 16, dtype=torch.float64), dim=1)
    labels = torch.randint(6, (9,))
    loss, correct, gradient = loss_and_gradient(head, images, labels, penalty)
    expected = F.cross_entropy(head(images), labels) + penalty * head.residual.pow(2).sum()
    (wanted,) = torch.autograd.grad(expected, head.residual)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-10)
    assert int(correct) == int((head(images).argmax(1) == labels).sum())


@pytest.mark.parametrize("by_onednn", [False, True])
def test_gradient_by_hand_in_fp32_whoever_multiplies(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_onednn and linear.onednn(torch.float32) is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: by_onednn)
    head = _head(torch.float32)
    images, labels = F.normalize(torch.randn(40, 16), dim=1), torch.randint(6, (40,))
    loss, _, gradient = loss_and_gradient(head, images, labels, 0.01)
    expected = F.cross_entropy(head(images), labels) + 0.01 * head.residual.pow(2).sum()
    (wanted,) = torch.autograd.grad(expected, head.residual)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 100), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_paper_recipe(shots: int, epochs: int) -> None:
    recipe = make_recipe("paper", _head(), shots)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.warmup_lr) == (2e-3, 5e-4, 1e-5)
    assert (recipe.train_batch_size, recipe.num_train_epochs, recipe.penalty) == (256, epochs, 0.0)


def test_published_schedule() -> None:
    recipe = make_recipe("paper", _head(), 16)
    rates = [learning_rate(recipe, epoch) for epoch in range(200)]
    assert rates[0] == 1e-5
    assert rates[1] == 2e-3
    assert rates[101] == pytest.approx(1e-3)
    assert rates[199] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 198 / 200)))


def test_auto_v1_does_not_depend_on_the_scale_of_the_backbone_or_alpha() -> None:
    small = TaskResClassifier(torch.randn(4, 8), alpha=0.5)
    large = TaskResClassifier(100 * small.base, alpha=1.0)
    images, labels = F.normalize(torch.randn(4, 8), dim=1), torch.arange(4)
    steps = []
    for head in (small, large):
        recipe = make_recipe("auto-v1", head, 4)
        optimizer = torch.optim.Adam([head.residual], lr=recipe.learning_rate, eps=1e-30)
        for _ in range(5):
            _, _, head.residual.grad = loss_and_gradient(head, images, labels, penalty_factor(recipe, head))
            optimizer.step()
        steps.append(F.normalize(head.weight().detach(), dim=1))
    torch.testing.assert_close(steps[0], steps[1], atol=1e-5, rtol=1e-5)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def rows(count: int, views: int, size: int, seed: int, epoch: int) -> list[tuple[list[int], list[int]]]:
        return [(r.tolist(), v.tolist()) for r, v in epoch_batches(count, views, size, seed, epoch)]

    assert rows(10, 3, 4, 1, 5) == rows(10, 3, 4, 1, 5) != rows(10, 3, 4, 1, 6)
    assert rows(10, 3, 4, 2, 5) != rows(10, 3, 4, 1, 5)


def test_ragged_end_is_dropped_as_published() -> None:
    assert [len(rows) for rows, _ in epoch_batches(600, 1, 256, 1, 0)] == [256, 256]
    assert [len(rows) for rows, _ in epoch_batches(256, 1, 256, 1, 0)] == [256]
    (everything,) = [rows for rows, _ in epoch_batches(200, 1, 256, 1, 0)]
    assert sorted(everything.tolist()) == list(range(200))


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigurationError, match="'auto', 'auto-v1' or 'paper'"):
        make_recipe("best", _head(), 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet", {"learning_rate": 2e-4}), ("ILSVRC/imagenet-1k", {"learning_rate": 2e-4}),
        ("ImageNet", {"learning_rate": 2e-4}), ("oxford_flowers", {"alpha": 1.0}), ("OxfordFlowers", {"alpha": 1.0}),
        ("nelorth/oxford-flowers", {"alpha": 1.0}), ("Flowers102", {"alpha": 1.0}), ("oxford_pets", {}),
        ("my-flowers", {}), ("imagenet_sketch", {}), ("tiny-imagenet", {}), (None, {}), ("", {}),
    ],
)  # fmt: skip
def test_constants_of_the_papers_datasets(name: str | None, expected: dict[str, float]) -> None:
    assert published_constants(name) == expected


def test_constants_agree_with_the_datasets_descriptions() -> None:
    for name, spec in suite_datasets().items():
        if "template_set" in spec:
            described = {key: spec[key] for key in ("learning_rate", "alpha") if key in spec}
            assert described == {"alpha": 0.5, **published_constants(name)}, name


def test_an_alpha_of_ones_own_stays() -> None:
    assert published_alpha(0.5, "oxford_flowers") == 1.0
    assert published_alpha(0.7, "oxford_flowers") == 0.7
    assert published_alpha(0.5, "oxford_pets") == 0.5


def _run(recipe: str, counts: list[int], **options: Any) -> Any:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    return recipe_for(TaskResTrainingArguments(recipe=recipe, **options), _head(), labels, fit_buffer=False)


@pytest.mark.parametrize("counts", [[8] * 5 + [1], [8] + [1] * 5, [7] * 6])
def test_the_shots_asked_for_decide_the_published_epochs(counts: list[int]) -> None:
    assert _run("paper", counts, shots=8).num_train_epochs == 200
    assert _run("paper", [4] * 6, shots=4).num_train_epochs == 100
    assert _run("paper", [8] * 5 + [1]).num_train_epochs == 200  # drawn elsewhere: the fullest class tells


@pytest.mark.parametrize("recipe", ["auto", "auto-v1"])
def test_what_there_is_decides_under_auto(recipe: str) -> None:
    assert _run(recipe, [10] * 6, shots=30) == _run(recipe, [10] * 6)


def test_what_there_is_decides_the_penalty_and_epochs_of_auto_v1() -> None:
    assert _run("auto-v1", [10] * 6).penalty == pytest.approx(0.3)
    assert _run("auto-v1", [8] * 5 + [7]).num_train_epochs == 200


def test_settings_override_the_recipe() -> None:
    recipe = _run("paper", [4] * 6, dataset_name="imagenet")
    assert recipe.learning_rate == 2e-4
    assert _run("paper", [4] * 6, dataset_name="imagenet", learning_rate=0.0).learning_rate == 0.0
