"""What every method promises."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError
from taskres_hf.methods.all import METHODS
from taskres_hf.methods.cross_modal import CrossModal
from taskres_hf.methods.method import Fitted, Method, register_method
from taskres_hf.residual import TaskResClassifier

# Fewer steps where the published number only takes time.
SHORT: dict[str, Callable[[], Method]] = {"cross-modal": functools.partial(CrossModal, steps=200)}
# Trained parameters for K classes and length D.
PARAMETERS: dict[str, Callable[[int, int], int]] = {
    "zero-shot": lambda k, d: 0,
    "class-mean": lambda k, d: k * d,
    "linear-probe": lambda k, d: k * (d + 1),
    "linear-probe-cv": lambda k, d: k * (d + 1),
    "cross-modal": lambda k, d: k * d,
    "clap": lambda k, d: k * d,
    "lp++": lambda k, d: k * (d + 2),
    "gda": lambda k, d: k * (d + 1),
    "taskres": lambda k, d: k * (d + 1),
    "taskres-auto-v1": lambda k, d: k * d,
    "taskres-paper": lambda k, d: k * d,
    "tip-adapter": lambda k, d: 0,
    "ape": lambda k, d: 0,
    "prolip": lambda k, d: d * d,
    "clip-adapter": lambda k, d: 2 * d * (d // 4),
}
# Those that tune the image tower take pictures too and have tests of their own.
every_method = pytest.mark.parametrize(
    "name", sorted(name for name in METHODS if "pictures" not in METHODS[name]().needs)
)


def _method(name: str) -> Method:
    return SHORT.get(name, METHODS[name])()


@every_method
def test_the_same_again_and_nothing_else_changes(
    name: str, shots: ImageFeatures, whole_model: TaskResCLIPForImageClassification, images: torch.Tensor
) -> None:
    classifier = whole_model.classifier
    before = copy.deepcopy(classifier)
    weights = {key: value.clone() for key, value in whole_model.clip.state_dict().items()}
    embeds, generator = shots.image_embeds.clone(), torch.random.get_rng_state()
    fitted = _method(name).fit(shots, classifier, seed=3, model=whole_model)
    torch.testing.assert_close(shots.image_embeds, embeds, atol=0, rtol=0)
    for one, other in ((classifier.base, before.base), (classifier.residual, before.residual)):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert classifier.residual.grad is None
    assert classifier.shift is None
    assert classifier.facts == before.facts
    after = whole_model.clip.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    torch.rand(7)  # the global generator is not the seed
    again = _method(name).fit(shots, classifier, seed=3, model=whole_model)
    assert torch.equal(fitted.logits(images), again.logits(images))
    assert fitted.fit_seconds > 0
    assert fitted.selected == again.selected
    torch.random.set_rng_state(generator)


@every_method
def test_a_fit_says_what_it_is(
    name: str, shots: ImageFeatures, whole_model: TaskResCLIPForImageClassification, images: torch.Tensor
) -> None:
    method = _method(name)
    assert method.name == name
    assert method.title
    assert method.source
    fitted = method.fit(shots, whole_model.classifier, model=whole_model)
    logits = fitted.logits(images)
    assert logits.shape == (len(images), 8)
    assert logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())
    assert not logits.requires_grad
    if name in PARAMETERS:
        assert fitted.trained_parameters == PARAMETERS[name](8, images.shape[1])
    # The length of an embedding says nothing, or the whole of it is used.
    assert (fitted.linear is None) == bool(fitted.not_linear)
    if fitted.linear is not None:
        assert fitted.linear.weight.shape == (8, images.shape[1])
        assert fitted.linear.weight.dtype == torch.float32
        torch.testing.assert_close(fitted.linear.logits(images), logits)
        torch.testing.assert_close(fitted.logits(3 * images), logits, atol=1e-3, rtol=1e-4)


@every_method
@pytest.mark.parametrize("shape", ["views", "no shots of a class", "two classes", "one shot a class", "one picture"])
def test_whatever_the_shots_are(
    name: str,
    shape: str,
    shots: ImageFeatures,
    views: ImageFeatures,
    base: str,
    whole_model: TaskResCLIPForImageClassification,
    images: torch.Tensor,
) -> None:
    model, features, labels = whole_model, shots, shots.labels.tolist()
    if shape == "views":
        features = views
    elif shape == "no shots of a class":
        features = shots.select([row for row, label in enumerate(labels) if label != 3])
    elif shape == "two classes":
        two = shots.select([row for row, label in enumerate(labels) if label < 2])
        features = ImageFeatures(two.image_embeds, two.labels, two.class_names[:2], "two", (), two.digests)
        model = TaskResCLIPForImageClassification.from_base(base, two.class_names[:2], "a drawing of a {}.")
    elif shape == "one shot a class":
        features = shots.select([labels.index(label) for label in range(8)])
    else:
        features = shots.select([labels.index(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = _method(name).fit(features, model.classifier, model=model)
    logits = fitted.logits(images)
    assert logits.shape == (len(images), len(features.class_names))
    assert bool(torch.isfinite(logits).all())


def test_a_method_of_ones_own(shots: ImageFeatures, classifier: TaskResClassifier) -> None:
    class Own(Method):
        name, title, source, needs = "own", "Own", "none", frozenset({"text tower"})

        def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: object) -> Fitted:
            return Fitted(classifier.zero_shot_logits, 0)

    register_method("own", Own)
    try:
        register_method("own", Own)
        with pytest.raises(ConfigurationError, match="already"):
            register_method("own", lambda: Own())
        with pytest.raises(ConfigurationError, match="text tower"):
            METHODS["own"]().fit(shots, classifier)
        assert METHODS["own"]().fit(shots, classifier, model="a model").fit_seconds > 0
    finally:
        del METHODS["own"]


def test_the_names_are_those_of_the_tables() -> None:
    assert set(METHODS) >= {
        "zero-shot", "class-mean", "linear-probe", "linear-probe-cv", "cross-modal", "clap", "lp++", "gda", "taskres",
        "taskres-auto-v1", "taskres-paper", "taskres-enhanced",
    }  # fmt: skip
