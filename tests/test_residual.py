"""The head: the paper's equation, and what must hold of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taskres_hf import TaskResClassifier
from taskres_hf.errors import ConfigurationError


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
