"""The head: the paper's equation, and what must hold of it."""

from __future__ import annotations

import copy
import math
from typing import Any

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_keeps_its_head(dtype: torch.dtype) -> None:
    """`model.half()` and `.to(dtype)` reach every module; the classifier must not be rounded with the base."""
    head, images = _head(), torch.randn(4, 16)
    with torch.no_grad():
        head.residual.normal_()
    head.class_bias = torch.randn(len(head.base))
    before = head(images)
    whole = torch.nn.Sequential(torch.nn.Linear(2, 2), head).to(dtype)
    assert whole[0].weight.dtype == dtype
    assert torch.equal(head(images), before)
    assert {value.dtype for value in (head.base, head.class_bias, head.residual)} == {torch.float32}
    assert head.double()(images).dtype == torch.float64


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


# ---------------------------------------------------------------------- strength, bias and lengths


def _general(side: str = "text", **settings: Any) -> TaskResClassifier:
    """A head that uses everything there is."""
    head = _head(alpha=0.7, logit_scale=50.0, logit_bias=-3.0, side=side)
    with torch.no_grad():
        head.residual.normal_()
    head.shift, head.class_bias = torch.randn(5, 16), torch.randn(5)
    for name, value in {"logit_scale_factor": 1.5, **settings}.items():
        setattr(head, name, value)
    return head


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equation_of_the_head(normalize: bool, strength: float) -> None:
    head = _general(strength=strength, normalize_weight=normalize)
    images = torch.randn(4, 16)
    frozen = head.base.double() + strength * head.shift.double()  # type: ignore[union-attr]
    weight = frozen + strength * 0.7 * head.residual.detach().double()
    rows = weight / (weight if normalize else frozen).norm(dim=1, keepdim=True)
    cosine = (images / images.norm(dim=1, keepdim=True)).double() @ rows.T
    expected = 50.0 * 1.5**strength * cosine - 3.0 + strength * head.class_bias.double()  # type: ignore[union-attr]
    torch.testing.assert_close(head(images).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("normalize", [True, False])
def test_strength_zero_is_zero_shot_and_one_is_the_trained_bit_for_bit(side: str, normalize: bool) -> None:
    head, images = _general(side, normalize_weight=normalize), torch.randn(4, 16)
    trained = head(images)
    head.strength = 0.0
    assert torch.equal(head(images), head.zero_shot_logits(images))
    assert head.is_zero_shot
    head.strength = 1.0
    assert torch.equal(head(images), trained)
    assert not torch.equal(trained, head.zero_shot_logits(images))
    assert "strength" not in head.facts


def test_a_zero_residual_with_lengths_kept_is_zero_shot() -> None:
    head, images = _head(), torch.randn(4, 16)
    head.normalize_weight = False
    assert torch.equal(head(images), head.zero_shot_logits(images))
    assert head.is_zero_shot


@pytest.mark.parametrize("what", ["residual", "shift", "class_bias", "logit_scale_factor"])
def test_what_is_not_zero_shot(what: str) -> None:
    head = _head()
    assert head.is_zero_shot
    if what == "residual":
        torch.nn.init.ones_(head.residual)
    else:
        setattr(head, what, {"shift": torch.ones(5, 16), "class_bias": torch.ones(5)}.get(what, 2.0))
    assert not head.is_zero_shot
    head.reset()
    assert head.is_zero_shot


@pytest.mark.parametrize("normalize", [True, False])
def test_any_linear_classifier_is_a_residual(normalize: bool) -> None:
    head, images = _general(strength=0.5), torch.randn(40, 16)
    weight, bias = torch.randn(5, 16).double(), torch.linspace(-50, 50, 5).double()
    weight *= torch.tensor([0.02, 0.3, 1.0, 1.0, 4.0]).double()[:, None]
    head.facts["training"] = {"recipe": "auto"}
    head.set_weight(weight.numpy(), class_bias=bias.numpy(), normalize_weight=normalize, logit_scale_factor=0.4)
    rows = weight / weight.norm(dim=1, keepdim=True) if normalize else weight
    expected = 50.0 * 0.4 * F.normalize(images.double(), dim=1) @ rows.T - 3.0 + bias
    torch.testing.assert_close(head(images).double(), expected, atol=1e-4, rtol=1e-5)
    assert head.shift is None
    assert head.strength == 1.0
    assert "training" not in head.facts  # it spoke of what was there before


def test_rows_that_stay_are_exactly_those_of_the_base() -> None:
    head, images = _head(), torch.randn(4, 16)
    weight = F.normalize(head.base, dim=1)
    weight[2] = torch.randn(16)
    head.set_weight(weight)
    assert head.residual.any(dim=1).tolist() == [False, False, True, False, False]
    assert torch.equal(head(images)[:, [0, 1, 3, 4]], head.zero_shot_logits(images)[:, [0, 1, 3, 4]])


_ROWS = torch.ones(5, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": _ROWS[:4]}, r"`weight` must be finite numbers of shape \[5, 16\]; got shape \[4, 16\]"),
        ({"weight": _ROWS * float("nan")}, "`weight`.*NaN"),
        ({"weight": _ROWS.double() * 1e200}, "`weight`.*infinite"),
        ({"weight": "no"}, "`weight` must be numbers"),
        ({"weight": _ROWS * 0}, "normalize_weight=False"),
        ({"weight": _ROWS, "class_bias": torch.ones(4)}, r"`class_bias`.*\[5\]; got shape \[4\]"),
        ({"weight": _ROWS, "class_bias": torch.ones(5, 1)}, "`class_bias`"),
        ({"weight": _ROWS, "class_bias": torch.full((5,), float("inf"))}, "`class_bias`.*infinite"),
        ({"weight": _ROWS, "logit_scale_factor": 0.0}, "`logit_scale_factor`"),
        ({"weight": _ROWS, "normalize_weight": "yes"}, "`normalize_weight`"),
    ],
)
def test_what_cannot_be_written_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    head, images = _general(strength=0.5), torch.randn(4, 16)
    before = head(images)
    with pytest.raises(ConfigurationError, match=message):
        head.set_weight(**arguments)
    assert torch.equal(head(images), before)


def test_where_there_is_no_room_to_write() -> None:
    for head in (_head(side="image"), _head(alpha=0.0)):
        with pytest.raises(ConfigurationError, match="text side with an alpha other than 0"):
            head.set_weight(_ROWS)
    base = torch.randn(5, 16)
    base[1] = 0.0
    with pytest.raises(ConfigurationError, match="one of the base classifier's"):
        TaskResClassifier(base).set_weight(_ROWS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", 2), ("strength", -0.1), ("strength", True), ("strength", "1"), ("strength", math.nan),
        ("strength", None), ("logit_scale_factor", 0), ("logit_scale_factor", -1), ("logit_scale_factor", math.nan),
        ("logit_scale_factor", math.inf), ("logit_scale_factor", "1"), ("normalize_weight", "yes"),
        ("normalize_weight", 1), ("normalize_weight", None),
    ],
)  # fmt: skip
def test_settings_of_the_head_that_cannot_be(name: str, value: Any) -> None:
    head = _head()
    with pytest.raises(ConfigurationError, match=f"`{name}` must be"):
        setattr(head, name, value)
    assert head.facts == {"alpha": 0.5}


def test_reset_brings_all_back() -> None:
    head, images = _general(strength=0.5, normalize_weight=False), torch.randn(4, 16)
    head.reset()
    assert head.facts == {"alpha": 0.7}
    assert head.class_bias is head.shift is None
    assert (head.strength, head.normalize_weight, head.logit_scale_factor) == (1.0, True, 1.0)
    assert torch.equal(head(images), head.zero_shot_logits(images))


@pytest.mark.parametrize("what", ["strength", "normalize_weight", "logit_scale_factor", "class_bias"])
def test_only_the_published_classifier_is_trained(what: str) -> None:
    head = _head()
    head.check_trainable()
    values = {"strength": 0.5, "normalize_weight": False, "logit_scale_factor": 2.0, "class_bias": torch.ones(5)}
    setattr(head, what, values[what])
    with pytest.raises(ConfigurationError, match=f"another {what}.*reset"):
        head.check_trainable()


def test_the_head_says_what_it_is() -> None:
    assert repr(_head()) == "TaskResClassifier(classes=5, dim=16, alpha=0.5, logit_scale=100)"
    assert "strength=0.25" in repr(_general(strength=0.25))


@pytest.mark.parametrize("normalize", [True, False])
def test_compiled_traced_and_copied_it_is_the_same(normalize: bool) -> None:
    head, images = _general(strength=0.5, normalize_weight=normalize), torch.randn(4, 16)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), head(images))
    head.strength = 0.25
    torch.testing.assert_close(compiled(images), head(images))
    torch.testing.assert_close(torch.export.export(head, (images,)).module()(images), head(images))
    assert torch.equal(copy.deepcopy(head)(images), head(images))
