"""The head over an image tower: rows as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taskres_hf.alone.linear_head import LENGTH, LinearHead
from taskres_hf.embedding import ImageFeatures
from taskres_hf.errors import ConfigurationError
from taskres_hf.training.recipes import make_recipe
from taskres_hf.training.steps import fit

GENERATOR = torch.Generator().manual_seed(0)
ROWS, BIAS = torch.randn(4, 6, generator=GENERATOR), torch.randn(4, generator=GENERATOR)
IMAGES = 3.0 * torch.randn(40, 6, generator=GENERATOR)
LABELS = (IMAGES @ torch.randn(6, 4, generator=GENERATOR)).argmax(dim=1)


def head_of(kind: str) -> LinearHead:
    if kind == "class_means":
        return LinearHead(torch.zeros(4, 6), 0.5, 10.0)
    head = LinearHead(ROWS, 0.5)
    head.base_bias = BIAS.clone()
    return head


def features() -> ImageFeatures:
    digests = [f"{number:064x}" for number in range(len(IMAGES))]
    return ImageFeatures(IMAGES[None], LABELS, ["a", "b", "c", "d"], digests)


def test_it_is_the_very_linear_layer() -> None:
    assert torch.equal(head_of("head")(IMAGES), F.linear(IMAGES, ROWS, BIAS))
    assert not head_of("class_means")(IMAGES).any()


@pytest.mark.parametrize("kind", ["head", "class_means"])
@pytest.mark.parametrize("recipe", ["auto", "auto-v1", "paper"])
def test_every_recipe_learns(kind: str, recipe: str) -> None:
    head = head_of(kind)
    before = float((head(IMAGES).argmax(dim=1) == LABELS).float().mean())
    fit(head, features(), make_recipe(recipe, head, 10, len(IMAGES)), seed=1)
    after = float((head(IMAGES).argmax(dim=1) == LABELS).float().mean())
    small_steps = (kind, recipe) == ("head", "paper")  # for rows as long as CLIP's text embeddings
    assert after > (before if small_steps else max(before, 0.5))
    assert torch.equal(head.base_bias, BIAS) if kind == "head" else head.base_bias is None
    head.strength = 0.0
    assert torch.equal(head(IMAGES), head_of(kind)(IMAGES))
    head.reset()
    assert torch.equal(head(IMAGES), head_of(kind)(IMAGES))


@pytest.mark.parametrize("kind", ["head", "class_means"])
def test_a_classifier_can_be_written(kind: str) -> None:
    head, weight, bias = head_of(kind), torch.randn(4, 6), torch.randn(4)
    head.set_weight(weight, class_bias=bias)
    expected = F.linear(IMAGES, weight, BIAS + bias) if kind == "head" else 10.0 * F.linear(
        F.normalize(IMAGES, dim=1), weight) + bias  # fmt: skip
    torch.testing.assert_close(head(IMAGES), expected, atol=1e-4, rtol=1e-4)
    held: Any = copy.deepcopy(head.residual)
    for wrong in ({"normalize_weight": True}, {"logit_scale_factor": 2.0}, {"class_bias": torch.zeros(3)}):
        with pytest.raises(ConfigurationError):
            head.set_weight(weight, **wrong)
    assert torch.equal(head.residual, held)


def test_class_means_are_of_one_length_and_of_these_shots_alone() -> None:
    head = head_of("class_means")
    head.start_from_means(IMAGES, LABELS)
    assert head.shift is not None
    torch.testing.assert_close(head.shift.norm(dim=1), torch.full((4,), LENGTH))
    first = F.normalize(F.normalize(IMAGES[LABELS == 1], dim=1).mean(dim=0), dim=0)
    torch.testing.assert_close(head.shift[1], LENGTH * first)
    other = head_of("head")
    other.start_from_means(IMAGES, LABELS)
    assert other.shift is None  # a pretrained head is the start already


def test_a_class_without_a_picture_keeps_its_pretrained_row() -> None:
    head, few = head_of("head"), LABELS != 2
    data = ImageFeatures(
        IMAGES[few][None], LABELS[few], ["a", "b", "c", "d"], [f"{n:064x}" for n in range(int(few.sum()))]
    )
    fit(head, data, make_recipe("auto", head, 10, len(data)), seed=1)
    scale = head.weight()[2] / ROWS[2]
    torch.testing.assert_close(scale, scale[0].expand(6), atol=1e-4, rtol=1e-3)


def test_answers_are_never_nan() -> None:
    with pytest.raises(ConfigurationError, match="NaN"):
        head_of("head")(torch.full((1, 6), float("nan")))
