"""The head: the paper's equation, and what must hold of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from taskres_hf import TaskResClassifier
from taskres_hf.errors import ConfigurationError
from taskres_hf.residual import checked_alpha, cross_entropy


def _head(**options: object) -> TaskResClassifier:
    torch.manual_seed(0)
    return TaskResClassifier(10 * torch.randn(5, 16), **options)  # type: ignore[arg-type]


def test_equation_of_the_paper() -> None:
    head = _head(alpha=0.7, logit_scale=50.0)
    images = torch.randn(4, 16)
    with torch.no_grad():
        head.residual.normal_()
    weight = head.base + 0.7 * head.residual
    cosine = (images / images.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(images), 50.0 * cosine)


def test_zero_residual_is_zero_shot() -> None:
    head, images = _head(), torch.randn(4, 16)
    assert torch.equal(head(images), head.zero_shot_logits(images))


def test_image_side_moves_the_images() -> None:
    head, images = _head(side="image"), torch.randn(4, 16)
    with torch.no_grad():
        head.residual.normal_()
    assert head.residual.shape == (1, 16)
    moved = F.normalize(images + 0.5 * head.residual, dim=1)
    torch.testing.assert_close(head(images), 100 * moved @ F.normalize(head.base, dim=1).T)


def test_only_the_residual_is_trained_and_stored() -> None:
    head = _head()
    assert [name for name, _ in head.named_parameters()] == ["residual"]
    assert list(head.state_dict()) == ["residual"]
    assert not head.residual.any()


def test_bf16_images_do_not_round_the_head() -> None:
    head = _head()
    assert head(torch.randn(2, 16).bfloat16()).dtype == torch.float32


def test_reset_goes_back_to_zero_shot() -> None:
    head, images = _head(), torch.randn(4, 16)
    with torch.no_grad():
        head.residual.normal_()
    head.shift = torch.randn(5, 16)
    head.reset()
    assert torch.equal(head(images), head.zero_shot_logits(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": torch.randn(5)}, "matrix"),
        ({"base": torch.full((2, 3), float("nan"))}, "NaN"),
        ({"base": torch.randn(2, 3), "alpha": float("inf")}, "alpha"),
        ({"base": torch.randn(2, 3), "side": "left"}, "side"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TaskResClassifier(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1e30, -1e5, 1e-30, float("nan"), float("inf"), True, "0.5"])
def test_an_alpha_that_cannot_work(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match="`alpha` must be"):
        TaskResClassifier(torch.eye(3), alpha)
    head = TaskResClassifier(torch.eye(3))
    with pytest.raises(ConfigurationError, match="`alpha` must be"):
        head.alpha = alpha
    assert head.alpha == 0.5


@pytest.mark.parametrize(("scale", "bias"), [(math.exp(80), 0.0), (0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, 1e9)])
def test_a_logit_scale_that_cannot_work(scale: float, bias: float) -> None:
    with pytest.raises(ConfigurationError, match="logit_scale"):
        TaskResClassifier(torch.eye(3), 0.5, scale, bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_is_never_nan(bad: float) -> None:
    head = TaskResClassifier(torch.eye(3))
    embeds = torch.ones(4, 3)
    embeds[2, 1] = bad
    for call in (head, head.zero_shot_logits):
        with pytest.raises(ConfigurationError, match="of 1 of 4 pictures are NaN"):
            call(embeds)
    with torch.no_grad():
        head.residual[0, 0] = bad
    with pytest.raises(ConfigurationError, match="of 4 of 4 pictures"):
        head(torch.ones(4, 3))


def test_reset_forgets_how_the_residual_came_to_be() -> None:
    head = TaskResClassifier(torch.eye(3), 0.25)
    head.facts["training"] = {"recipe": "auto"}
    head.shift = torch.ones(3, 3)
    assert torch.equal(head.frozen_weight(), torch.eye(3) + 1)
    head.reset()
    assert head.facts == {"alpha": 0.25}
    assert torch.equal(head.weight(), torch.eye(3))


def test_soft_labels_are_probabilities() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    hard = torch.tensor([0, 2, 1, 1])
    soft = F.one_hot(hard, 3).double()
    assert cross_entropy(logits, hard.int()) == cross_entropy(logits, hard) == cross_entropy(logits, soft)
    mixed = 0.7 * soft + 0.1
    expected = -(mixed * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(cross_entropy(logits, mixed), expected.mean().float())
    torch.testing.assert_close(cross_entropy(logits, mixed, num_items=8), (expected.sum() / 8).float())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(4, 3), "sum 1"),  # several classes a picture
        (torch.tensor([[2.0, -1.0, 0.0]] * 4), "sum 1"),
        (torch.full((4, 3), float("nan")), "sum 1"),
        (torch.tensor([0.0, 1.0, 2.0, 1.0]), r"probabilities \(floats\) of shape \[4, 3\]"),
        (torch.eye(4)[:, :3].long(), "4 class ids"),
        (torch.tensor([0, 1, 2]), "4 class ids"),
        (torch.tensor([[0], [1], [2], [0]]), "4 class ids"),
        (torch.tensor([True, False, True, True]), "4 class ids"),
        (torch.tensor([0, 1, 2, 3]), "from 0 to 2; got 3"),
    ],
)
def test_labels_that_are_none(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cross_entropy(torch.zeros(4, 3), labels)


def test_alpha_of_numpy() -> None:
    import numpy as np

    assert checked_alpha(np.float32(0.5)) == checked_alpha(np.float64(0.5)) == 0.5
    assert checked_alpha(np.int64(1)) == 1.0
    with pytest.raises(ConfigurationError, match="`alpha`"):
        checked_alpha(np.bool_(True))
