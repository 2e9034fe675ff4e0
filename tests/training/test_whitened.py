"""Recipe `auto`: a second statement of its formulas in numpy and scipy, and what people rely on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, least, unit
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from benchmarks.solver import problem
from taskres_hf.errors import ConfigurationError
from taskres_hf.evaluation import accuracy, expected_calibration_error
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.training import minimising, whitened
from taskres_hf.training.whitened import fit_whitened

SCALE = 100.0


@pytest.fixture
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits go on after what is left to gain matters to nobody."""
    monkeypatch.setattr(whitened, "_SETTLED", 0.0)


def _shots(tasks: Any, count: int, name: str = "animals-plants", seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [N, D], labels [N] and the base classifier [K, D]."""
    model, parts = tasks[name]
    train = parts["train"]
    rows = few_shot_indices(train.labels.tolist(), count, seed, on_short="ignore")
    return train.image_embeds[0, rows], train.labels[rows], model.classifier.base


# ---------------------------------------------------------------------- a second statement


def _told(logits: Array, y: Array) -> tuple[float, float]:
    """Best factor in [0, 1] on logits, and what they tell at it: 0 as much as chance, 1 all."""
    rows, classes = np.arange(len(y)), logits.shape[1]

    def loss(factor: float) -> float:
        return float((logsumexp(factor * logits, axis=1) - factor * logits[rows, y]).mean())

    factor = minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-9}).x
    return factor, min(1.0, max(0.0, 1.0 - loss(factor) / math.log(classes)))


def _whitening(f: Array, y: Array, classes: int) -> Array:
    """C^(-1/2) [D, D] of the shrunk covariance."""
    count, dim = f.shape
    means = np.stack([f[y == k].mean(0) for k in range(classes)])
    spread, dof = f - means[y], float(count - classes)
    if dof < max(8.0, classes / 2.0):
        spread, dof = f - f.mean(0), count - 1.0
    covariance = spread.T @ spread / dof
    shrunk = (dof * covariance + np.trace(covariance) * np.eye(dim)) / (dof + dim)
    values, vectors = np.linalg.eigh(shrunk)
    inverse: Array = vectors @ np.diag(values**-0.5) @ vectors.T
    return inverse


def _discriminant(f: Array, y: Array, root: Array, classes: int) -> tuple[Array, Array]:
    """Rows [K, D] on whitened pictures and biases [K], relative to the mean of the class means."""
    means = np.stack([f[y == k].mean(0) for k in range(classes)]) @ root
    middle, counts = means.mean(0), np.bincount(y, minlength=classes)
    bias = -0.5 * ((means**2).sum(1) - middle @ middle)
    if len(y) > classes:  # a mean of n pictures is longer than what it estimates, by the spread of one over n
        noise = ((f @ root - means[y]) ** 2).sum() / (len(y) - classes) / counts
        bias = bias + 0.5 * (noise - noise.mean())
    return means - middle, bias - bias.mean()


def _parts(f: Array, y: Array, base: Array, share: float) -> tuple[Array, Array]:
    """Classifier [K, D] and bias [K] of text, means and residual."""
    u, root = unit(base), _whitening(f, y, len(base))
    means, bias = _discriminant(f, y, root, len(base))
    rows = f @ root
    size = math.sqrt(((f - f.mean(0)) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum())
    weight, bias = SCALE * u + share * means @ root, share * bias
    v, _ = least(size * rows, y, f @ weight.T + bias, (whitened.WIDTH * SCALE) ** -2)
    return weight + size * v @ root, bias


@pytest.mark.usefixtures("to_the_end")
def test_one_shot_is_the_formulas(tasks: Any) -> None:
    images, labels, base = _shots(tasks, 1)
    f, y = unit(images), labels.numpy()
    factor, told = _told(SCALE * f @ unit(base).T, y)
    share = 0.035 * (1.0 - told * (1.0 - 0.19)) * (1.0 + 20.0 * 0.19**2)
    weight, bias = _parts(f, y, base.numpy(), share)
    kept = len(y) / (len(y) + 10.0 * told)  # what speaks for zero-shot, in pictures
    zero_shot = SCALE * unit(base)
    weight, bias = zero_shot + kept * (weight - zero_shot), kept * bias
    fitted = fit_whitened(images, labels, base, SCALE, iterations=400)
    assert fitted.chosen["zero_shot"] == pytest.approx(1 - kept, abs=1e-4)
    assert fitted.chosen["text_information"] == pytest.approx(told, abs=1e-4)
    assert fitted.chosen["share"] == pytest.approx(share, abs=1e-6)
    assert fitted.chosen["temperature"] == pytest.approx(max(0.3, factor), abs=1e-4)
    assert np.abs(fitted.weight.numpy() / fitted.chosen["temperature"] - weight).max() < 1e-3 * np.abs(weight).max()
    assert np.abs(fitted.bias.numpy() / fitted.chosen["temperature"] - bias).max() < 1e-3


def test_unequal_shots_do_not_fall_back_to_zero_shot(tasks: Any) -> None:
    """Classes of few pictures do not decide what is kept of what the others say."""
    images, labels, base = _shots(tasks, 16)
    keep, seen = [], dict.fromkeys(range(0, len(base), 2), 6)  # every other class has two pictures
    for row, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= 8:
            keep.append(row)
    assert sorted(torch.bincount(labels[keep]).tolist())[:4] == [2] * 4
    told = fit_whitened(images[keep], labels[keep], base, SCALE).chosen
    assert told["zero_shot"] < 0.2


@pytest.mark.usefixtures("to_the_end")
def test_held_out_shots_decide_by_the_formulas(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitened, "_NEAR", 0.0)
    images, labels, base = _shots(tasks, 4)
    f, y, classes = unit(images), labels.numpy(), len(base)
    text = SCALE * f @ unit(base).T
    fold = np.array([sum(y[:row] == label) for row, label in enumerate(y)])
    alone, more = np.zeros_like(text), np.zeros_like(text)
    for turn in range(4):
        rest = fold != turn
        root = _whitening(f[rest], y[rest], classes)
        means, bias = _discriminant(f[rest], y[rest], root, classes)
        alone[~rest] = f[~rest] @ root @ means.T + bias
    told, told_by_means = _told(text, y)[1], _told(alone, y)[1]
    strength = 0.035 * (1.0 - told * (1.0 - told_by_means)) * (1.0 + 20.0 * told_by_means**2)
    for turn in range(4):
        rest = fold != turn
        weight, bias = _parts(f[rest], y[rest], base.numpy(), strength * 1.5**0.25)
        more[~rest] = f[~rest] @ weight.T + bias - text[~rest]

    def loss(logits: Array, reluctance: float) -> tuple[float, float]:
        """The least, and the temperature that gives it."""
        rows = np.arange(len(y))
        return min(
            (float((logsumexp(t * logits, axis=1) - t * logits[rows, y]).sum() + reluctance * math.log(t) ** 2), t)
            for t in whitened._TEMPERATURES
        )

    kept = 1.0 / (1.0 + math.exp(loss(text + more, 4.0)[0] - loss(text, 4.0)[0] - 3.0))
    fitted = fit_whitened(images, labels, base, SCALE, iterations=400)
    assert fitted.chosen["means_information"] == pytest.approx(told_by_means, abs=1e-4)
    assert fitted.chosen["share"] == pytest.approx(strength * 2.0**0.25, rel=1e-3)
    assert fitted.chosen["zero_shot"] == pytest.approx(1.0 - kept, abs=1e-3)
    temperature = loss(text + kept * more, 0.3)[1]
    assert fitted.chosen["temperature"] == pytest.approx(temperature)
    claims = [logsumexp(temperature * logits, axis=1) for logits in (text + kept * more, text)]
    assert fitted.chosen["gain"] == pytest.approx((claims[0] - claims[1]).mean(), abs=1e-2)
    assert "gain" not in fit_whitened(*_shots(tasks, 1), SCALE).chosen  # nothing can be held out


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_copy_of_every_picture_tells_nothing_new(tasks: Any, count: int) -> None:
    images, labels, base = _shots(tasks, count)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    nearly = images + 0.01 * images.norm(dim=1, keepdim=True) * noise / images.shape[1] ** 0.5
    fitted = fit_whitened(images, labels, base, SCALE)
    twice = fit_whitened(torch.cat([images, nearly]), labels.repeat(2), base, SCALE)
    assert twice.chosen == pytest.approx(fitted.chosen, abs=0.02)
    test = tasks["animals-plants"][1]["test"].image_embeds[0]
    same = _logits(fitted, test).argmax(1) == _logits(twice, test).argmax(1)
    assert float(same.float().mean()) > 0.98


def test_means_count_the_more_they_tell(tasks: Any) -> None:
    images, labels, base = _shots(tasks, 8)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    right, wrong = (fit_whitened(images, y, base, SCALE).chosen for y in (labels, shuffled))
    assert right["means_information"] > wrong["means_information"] + 0.1
    assert right["share"] > wrong["share"]
    assert wrong["zero_shot"] > right["zero_shot"]


@pytest.mark.parametrize("count", [4, 16])
def test_whitening_and_discriminant_are_the_formulas(tasks: Any, count: int) -> None:
    images, labels, _ = _shots(tasks, count)
    f, y, classes = unit(images), labels.numpy(), int(labels.max()) + 1
    root = _whitening(f, y, classes)
    rows = torch.from_numpy(f)
    moments = whitened._moments(rows, labels, classes, torch.ones(len(f)))
    space = whitened._Whitened(rows, labels, torch.ones(1, len(f)), f.shape[1], (moments[0][None], moments[1][None]))
    eye = torch.eye(f.shape[1], dtype=torch.float64)
    turned = space.whiten(eye)[0].numpy()  # by a rotation: what rows have in common is the same
    assert np.abs(turned @ turned.T - root @ root).max() < 1e-8 * (root @ root).max()
    assert np.abs(space.unwhiten(eye).numpy() - turned.T).max() < 1e-8 * np.abs(turned).max()
    means, bias = _discriminant(f, y, root, classes)
    found = (space.rows @ space.means.mT + space.bias)[0].numpy()
    assert np.abs(found - (f @ root @ means.T + bias)).max() < 1e-7 * np.abs(found).max()


@pytest.mark.usefixtures("to_the_end")
def test_pieces_and_the_span_change_nothing(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, base = _shots(tasks, 4)
    whole = fit_whitened(images, labels, base, SCALE, iterations=200)
    monkeypatch.setattr(whitened, "_PIECE", 100)
    monkeypatch.setattr(minimising, "_PIECE", 100)
    pieces = fit_whitened(images, labels, base, SCALE, iterations=200)
    torch.testing.assert_close(pieces.weight, whole.weight, atol=1e-4, rtol=1e-4)
    # The same pictures eight times as views: more rows than dimensions, so without a span.
    assert len(images) < images.shape[1] < 8 * len(images)
    other = fit_whitened(images.repeat(8, 1), labels.repeat(8), base, SCALE, views=8, iterations=200)
    torch.testing.assert_close(other.weight, whole.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(other.bias, whole.bias, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------- what people rely on


def test_the_same_shots_give_the_same_bits(tasks: Any) -> None:
    shots = _shots(tasks, 4)
    first, second = fit_whitened(*shots, SCALE), fit_whitened(*shots, SCALE)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert first.chosen == second.chosen


def test_what_was_fitted_can_be_changed_and_learned_from(tasks: Any) -> None:
    """Which tensors of inference mode, in which it is fitted, cannot."""
    fitted = fit_whitened(*_shots(tasks, 4), SCALE)
    fitted.weight.requires_grad_().square().sum().backward()
    fitted.bias.add_(1.0)


@pytest.mark.parametrize("count", [1, 4])
def test_the_order_of_the_classes_pictures_does_not_matter(tasks: Any, count: int) -> None:
    images, labels, base = _shots(tasks, count)
    fitted = fit_whitened(images, labels, base, SCALE)
    order = torch.argsort(labels, descending=True, stable=True)  # folds go by the order within a class
    again = fit_whitened(images[order], labels[order], base, SCALE)
    torch.testing.assert_close(again.weight, fitted.weight, atol=1e-6 * float(fitted.weight.abs().max()), rtol=0)


def test_a_class_without_pictures_keeps_its_text_row(tasks: Any) -> None:
    images, labels, base = _shots(tasks, 4)
    fitted = fit_whitened(images[labels != 2], labels[labels != 2], base, SCALE)
    rows = unit(base)
    factor = float(fitted.weight[2].norm())
    assert np.abs(fitted.weight[2].numpy() - factor * rows[2]).max() < 1e-9 * factor
    assert abs(float(fitted.bias[2])) < 1e-9
    assert all(np.abs(fitted.weight[k].numpy() - factor * rows[k]).max() > 0.002 * factor for k in (0, 1, 3))


@pytest.mark.parametrize("count", [1, 4])
def test_a_class_without_pictures_draws_no_pictures_of_others(tasks: Any, count: int) -> None:
    images, labels, base = _shots(tasks, count)
    test = tasks["animals-plants"][1]["test"].image_embeds[0]
    chosen = 0
    for absent in range(len(base)):
        fitted = fit_whitened(images[labels != absent], labels[labels != absent], base, SCALE)
        chosen += int((_logits(fitted, test).argmax(1) == absent).sum())
    assert chosen < 1.1 * len(test)  # every class was left out once: zero-shot gives each picture to one


@pytest.mark.parametrize(
    "what", ["two classes", "one class", "one picture", "imbalanced", "twice", "all the same", "nearly"]
)
@pytest.mark.parametrize("views", [1, 2])
def test_odd_shots_give_finite_logits(tasks: Any, what: str, views: int) -> None:
    images, labels, base = _shots(tasks, 4)
    if what in ("two classes", "one class"):
        kept = labels < (2 if what == "two classes" else 1)
        images, labels, base = images[kept], labels[kept], base[: int(labels[kept].max()) + 1]
    if what == "one picture":
        images, labels = images[:1], labels[:1]
    if what == "imbalanced":
        kept = (torch.arange(len(labels)) < 1) | (labels > 0)
        images, labels = torch.cat([images[kept], images[labels == 7]]), torch.cat([labels[kept], labels[labels == 7]])
    if what == "twice":
        images, labels = torch.cat([images, images]), torch.cat([labels, labels])
    if what == "all the same":
        images = images[:1].expand(len(images), -1)
    if what == "nearly":  # as alike as batches of different size leave them
        images = images[:1] + 1e-7 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    seen = images.repeat(views, 1)
    if what == "one picture":
        seen = seen + 0.1 * torch.arange(views)[:, None] * images.roll(1, 1)  # two views that differ
    fitted = fit_whitened(seen, labels.repeat(views), base, SCALE, views)
    assert bool(torch.isfinite(fitted.weight).all() and torch.isfinite(fitted.bias).all())
    assert float(fitted.weight.norm(dim=1).max()) < 100 * SCALE
    if what == "two classes":
        logits = torch.nn.functional.normalize(images.double(), dim=1) @ fitted.weight.T + fitted.bias
        assert accuracy(logits, labels) > accuracy(images @ torch.from_numpy(unit(base)).to(images).T, labels) + 0.3
    if what in ("one class", "one picture", "all the same", "nearly"):  # nothing can be learned: zero-shot
        rows = torch.nn.functional.normalize(fitted.weight, dim=1).numpy()
        assert np.abs(rows - unit(base)).max() < 1e-5
        assert float(fitted.bias.abs().max()) < 1e-5


def test_broken_embeddings_are_an_error(tasks: Any) -> None:
    images, labels, base = _shots(tasks, 1)
    images = images.clone()
    images[3, 5] = float("nan")
    with pytest.raises(ConfigurationError, match="1 of 8 embeddings"):
        fit_whitened(images, labels, base, SCALE)


@pytest.mark.parametrize("count", [1, 4])
def test_a_second_view_that_is_the_first_changes_nothing(tasks: Any, count: int) -> None:
    images, labels, base = _shots(tasks, count)
    fitted = fit_whitened(images, labels, base, SCALE)
    twice = fit_whitened(images.repeat(2, 1), labels.repeat(2), base, SCALE, views=2)
    assert twice.chosen == pytest.approx(fitted.chosen, abs=2e-4)
    torch.testing.assert_close(twice.weight, fitted.weight, atol=1e-5 * float(fitted.weight.abs().max()), rtol=1e-4)


def _test_accuracy(tasks: Any, fitted: whitened.WhitenedFit, name: str = "animals-plants") -> float:
    test = tasks[name][1]["test"]
    return accuracy(_logits(fitted, test.image_embeds[0]), test.labels)


def _logits(fitted: whitened.WhitenedFit, images: Tensor) -> Tensor:
    return torch.nn.functional.normalize(images.double(), dim=1) @ fitted.weight.T + fitted.bias


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_it_learns_at_any_logit_scale(tasks: Any, scale: float) -> None:
    images, labels, base = _shots(tasks, 16)
    zero_shot = tasks["animals-plants"][0].classifier.zero_shot_logits(
        tasks["animals-plants"][1]["test"].image_embeds[0]
    )
    fitted = fit_whitened(images, labels, base, scale)
    assert _test_accuracy(tasks, fitted) > accuracy(zero_shot, tasks["animals-plants"][1]["test"].labels) + 0.02
    # Neither the length of images nor that of the base matters.
    again = fit_whitened(3.0 * images, labels, 0.1 * base, scale)
    torch.testing.assert_close(again.weight, fitted.weight, atol=1e-3, rtol=1e-3)


def _clusters(classes: int, count: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shots, labels, a weak base classifier, and as many new pictures."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=generator)
    base = means + 2.0 * torch.randn(classes, dim, generator=generator)
    labels = torch.arange(count) % classes
    shots, new = (means[labels] + 1.2 * torch.randn(count, dim, generator=generator) for _ in range(2))
    return shots, labels, base, new


def test_many_logits_take_the_short_way_to_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shots, labels, base, new = _clusters(300, 4000, 64)
    assert len(shots) * len(base) > whitened._LARGE
    large = accuracy(_logits(fit_whitened(shots, labels, base, SCALE), new), labels)
    few = labels < 100
    small = fit_whitened(shots[few], labels[few], base[:100], SCALE)
    for limit in ("_LARGE", "_MANY"):
        monkeypatch.setattr(whitened, limit, 1)
    short = fit_whitened(shots[few], labels[few], base[:100], SCALE)
    found = [accuracy(_logits(fitted, new[few]), labels[few]) for fitted in (small, short)]
    assert found[1] == pytest.approx(found[0], abs=0.04)
    zero_shot = torch.nn.functional.normalize(new, dim=1) @ torch.nn.functional.normalize(base, dim=1).T
    assert large > accuracy(zero_shot, labels) + 0.1


def test_a_fit_that_is_right_and_far_too_sure_is_kept() -> None:
    """A tenth of the labels are exchanged: only a small temperature makes its probabilities mean what they say."""
    case = problem(10, 16, 1024)
    fitted = fit_whitened(case.images, case.labels, case.head.base, SCALE)
    assert fitted.chosen["temperature"] < 0.05
    assert fitted.chosen["zero_shot"] < 0.1
    assert accuracy(_logits(fitted, case.test), case.truth) > 0.99


# Of `food` with 16 shots it is not so.
@pytest.mark.parametrize(("name", "count"), [("food", 1), ("food", 4), ("people", 1), ("people", 4), ("people", 16)])
def test_probabilities_mean_more_than_those_of_zero_shot(tasks: Any, name: str, count: int) -> None:
    model, parts = tasks[name]
    test = parts["test"]
    errors = []
    for seed in (1, 2, 3):
        fitted = fit_whitened(*_shots(tasks, count, name, seed), model.classifier.logit_scale)
        errors.append(expected_calibration_error(_logits(fitted, test.image_embeds[0]), test.labels))
    zero_shot = model.classifier.zero_shot_logits(test.image_embeds[0])
    assert sum(errors) / 3 < expected_calibration_error(zero_shot, test.labels)
