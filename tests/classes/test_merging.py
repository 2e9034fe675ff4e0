"""Averages of classifiers over one base, and unions of their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual, tagger

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.checking.verifying import DIFFERS, verify
from taskres_hf.classes import interpolate, merge_residuals, unite
from taskres_hf.errors import BaseMismatchError, ClassNamesError, ConfigurationError

NAMES = ["cat", "dog", "bird", "fish"]
TEMPLATE = "a drawing of a {}."
Make = Callable[..., Any]


@pytest.fixture
def make(base: str) -> Make:
    """Classifiers over one base, each with a residual of its own."""
    shared = Model.from_base(base, NAMES, TEMPLATE).clip

    def made(seed: int, names: list[str] | None = None, template: str = TEMPLATE, **options: Any) -> Any:
        model = Model.from_base(base, names or NAMES, template, **options)
        model.clip = shared
        return random_residual(model, seed)

    return made


def _like_auto(model: Any, seed: int, temperature: float = 0.4) -> Any:
    unit = torch.nn.functional.normalize(model.classifier.base.double(), dim=1)
    noise = 0.02 * torch.randn(unit.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bias = torch.linspace(-1, 1, len(unit))
    model.classifier.set_weight(temperature * (unit + noise - noise.mean(0)), class_bias=bias, normalize_weight=False)
    model.config.training = {"recipe": "auto", "temperature": temperature, "gain": 0.5}
    return model


def _answers(model: Any) -> torch.Tensor:
    images = torch.randn(6, model.config.projection_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits: torch.Tensor = model(image_embeds=images).logits
    return logits


def _whole(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    assert not [row for row in verify(folder) if row["result"] == DIFFERS]
    torch.testing.assert_close(_answers(Model.from_pretrained(folder)), _answers(model), atol=1e-5, rtol=1e-5)


def test_published_residuals_are_averaged_as_such(make: Make, tmp_path: Path) -> None:
    one, two = make(1), make(2, alpha=0.25)
    before = _answers(one)
    merged = merge_residuals([one, two], [3, 1])
    expected = (0.75 * 0.5 * one.classifier.residual + 0.25 * 0.25 * two.classifier.residual) / 0.5
    torch.testing.assert_close(merged.classifier.residual, expected)
    assert merged.classifier.class_bias is None
    assert torch.equal(_answers(one), before)
    _whole(merged, tmp_path / "a")
    assert merged.config.training["weights"] == [0.75, 0.25]


def test_the_ends_of_an_interpolation_are_the_classifiers(make: Make) -> None:
    for one, two in (
        (make(1), make(2)),
        (_like_auto(make(1), 1), _like_auto(make(2), 2)),
        (make(1), _like_auto(make(2), 2)),
    ):
        torch.testing.assert_close(_answers(interpolate(one, two, 0)), _answers(one), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(_answers(interpolate(one, two, 1)), _answers(two), atol=2e-4, rtol=1e-4)
    middle = (_answers(one) + _answers(two)) / 2
    torch.testing.assert_close(_answers(one.interpolate(one, two, 0.5)), middle, atol=2e-4, rtol=1e-4)


def test_another_order_of_classes_is_followed(make: Make) -> None:
    one, two = make(1), make(2, NAMES[::-1])
    merged = merge_residuals([one, two], [0, 1])
    assert merged.class_names == NAMES
    torch.testing.assert_close(_answers(merged), _answers(two).flip(1), atol=1e-4, rtol=1e-4)


def test_pictures_of_all_are_remembered_and_accuracy_is_not(make: Make) -> None:
    from taskres_hf.training.measuring import remember

    models = [make(1), make(2)]
    for model, digest in zip(models, ("aa" * 32, "bb" * 32), strict=True):
        model.config.data = {"train_digest": digest, "train_images": 1, "train_pictures": remember([digest])}
        model.config.few_shot, model.config.metrics = {"num_images": 1, "shots": 1}, {"accuracy": 1.0}
    merged = merge_residuals(models)
    assert merged.config.data["train_pictures"] == remember(["aa" * 32, "bb" * 32])
    assert merged.config.few_shot == {"num_images": 2}
    assert merged.config.metrics is None


def test_a_union_keeps_the_first_and_the_order_within_each(make: Make, tmp_path: Path) -> None:
    for one, two in (
        (make(1), make(2, ["sun", "moon"])),
        (_like_auto(make(1), 1), _like_auto(make(2, ["sun", "moon"]), 2, 0.8)),
        (make(1), _like_auto(make(2, ["sun", "moon"], "a {}"), 2)),
    ):
        both = unite([one, two])
        assert both.class_names == [*NAMES, "sun", "moon"]
        torch.testing.assert_close(_answers(both)[:, :4], _answers(one), atol=2e-4, rtol=1e-4)
        assert torch.equal(_answers(both)[:, 4:].argmax(1), _answers(two).argmax(1))
        assert both.class_prompts() == [*one.class_prompts(), *two.class_prompts()]
    _whole(both, tmp_path / "a")


def test_a_union_puts_both_on_one_scale(make: Make) -> None:
    one, two = _like_auto(make(1), 1, 0.4), _like_auto(make(2, ["sun", "moon"]), 2, 0.8)
    joined = _answers(unite([one, two]))[:, 4:]
    torch.testing.assert_close(joined, 0.5 * (_answers(two) - 0.5) + 0.5, atol=2e-3, rtol=1e-3)


def test_what_differs_is_said(make: Make, base: str) -> None:
    one, moved, strong = make(1), make(2), make(2)
    moved.classifier.base.add_(0.3 * torch.randn_like(moved.classifier.base))
    strong.strength = 0.5
    elsewhere, other_tower = make(2), make(2)
    elsewhere.config.base_model_name_or_path = "me/other"
    image = other_tower.config.base_fingerprint["image"]
    other_tower.config.base_fingerprint = {
        **other_tower.config.base_fingerprint, "image": {**image, "sketch": [value + 1 for value in image["sketch"]]},
    }  # fmt: skip
    wrong: list[tuple[Any, type[Exception], str]] = [
        (
            make(2, ["cat", "dog", "bird", "whale"]),
            ClassNamesError,
            "'fish' only the first and 'whale'",
        ),
        (make(2, template="a {}"), ConfigurationError, "different prompts for 'cat'"),
        (make(2, prompt_average="normalized"), ConfigurationError, "prompt_average"),
        (make(2, residual_side="image"), ConfigurationError, "residual_side"),
        (moved, BaseMismatchError, "other text embeddings"),
        (strong, ConfigurationError, "strength"),
        (elsewhere, ConfigurationError, "base_model_name_or_path"),
        (other_tower, ConfigurationError, "image towers differ"),
    ]
    for other, kind, message in wrong:
        with pytest.raises(kind, match=message):
            merge_residuals([one, other])
    with pytest.raises(ClassNamesError, match="Several classifiers have"):
        unite([one, make(2, ["sun", "cat"])])
    for models, weights in (
        ([one], None),
        ([one, base], None),
        ([one, one], [1]),
        ([one, one], [0, 0]),
        ([one, one], [1, -1]),
    ):
        with pytest.raises(ConfigurationError, match=r"at least two|weights"):
            merge_residuals(models, weights)
    for t in (-0.1, 1.1, True, "half", float("nan")):
        with pytest.raises(ConfigurationError, match="number from 0"):
            interpolate(one, one, t)  # type: ignore[arg-type]


def test_shared_residuals_of_the_image_side(make: Make) -> None:
    one, two = make(1, residual_side="image"), make(2, residual_side="image")
    merged = merge_residuals([one, two])
    torch.testing.assert_close(merged.classifier.residual, (one.classifier.residual + two.classifier.residual) / 2)
    with pytest.raises(ConfigurationError, match="cannot be united"):
        unite([one, make(2, ["sun", "moon"], residual_side="image")])


def test_a_strength_in_between_is_kept_or_refused(make: Make) -> None:
    names = ["sun", "moon"]
    one, two = make(1), make(2, names)
    one.classifier.shift = 0.1 * torch.randn_like(one.classifier.base)
    one.strength = two.strength = 0.5
    both = _answers(unite([one, two]))
    torch.testing.assert_close(both, torch.cat([_answers(one), _answers(two)], dim=1), atol=1e-4, rtol=1e-4)

    one, same, auto = make(1), _like_auto(make(2), 2), _like_auto(make(2, names), 2)
    for model in (one, same, auto):
        model.strength = 0.5
    for wrong in (
        lambda: interpolate(one, same, 0.0),
        lambda: merge_residuals([same, one]),
        lambda: unite([one, auto]),
    ):
        with pytest.raises(ConfigurationError, match=r"Set strength = 1\.0 before"):
            wrong()
    torch.testing.assert_close(_answers(unite([same, auto]))[:, :4], _answers(same), atol=2e-4, rtol=1e-4)


def test_a_union_loses_no_residual_to_an_alpha_of_zero(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="alpha 0"):
        unite([make(1, alpha=0.0), make(2, ["sun", "moon"])])


def test_weights_that_are_no_list(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="`weights`"):
        merge_residuals([make(1), make(2)], 0.5)  # type: ignore[arg-type]


def test_classifiers_of_several_labels_per_picture_are_not_brought_together(make: Make) -> None:
    one, other = make(0), tagger(make(1))
    apart = tagger(make(2, ["boat", "car"]))
    for refused in (
        lambda: merge_residuals([one, other]),
        lambda: interpolate(other, other, 0.5),
        lambda: unite([one, apart]),
    ):
        with pytest.raises(ConfigurationError, match="gives several, or none"):
            refused()
