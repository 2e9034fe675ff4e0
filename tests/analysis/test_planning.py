"""Plans: nothing is tested on what was trained on, known curves are found again, and little data says little."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tagger

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.analysis import planning
from taskres_hf.analysis.learning_curve import Growth, LearningCurve, measure_growth
from taskres_hf.analysis.planning import Plan, plan_from, plan_pictures, write_figure
from taskres_hf.embedding import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError, MissingExtraError
from taskres_hf.residual import TaskResClassifier

NAMES = ["oak", "elm", "ash", "fir"]


def pictures(each: int, signal: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings around a direction for each of four classes, labels, and text that knows nothing of them."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(each)
    images = signal * torch.eye(16)[labels] + 0.25 * torch.randn(len(labels), 16, generator=draw)
    return images, labels, torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def on_curve(shots: list[int], share: list[float], each: int = 100) -> Growth:
    """As if each of four classes had been tested on so many pictures, and those shares were right (zero-shot first)."""
    labels = np.repeat(np.arange(4), each)
    ranks = np.tile((np.arange(each) + 0.5) / each, 4)
    right = [(ranks < value).astype(np.int8)[None] for value in share]
    return Growth(np.array([[n] * 4 for n in [0, *shots]]), right, labels, "held-out")


def planned(tested: Growth, target: float, counts: tuple[int, ...] = (8, 8, 8, 8)) -> Plan:
    return plan_from(tested, counts, NAMES, target=target)


RISING = [0.3 + 0.6 * (1 - (1 + n / 4) ** -0.9) for n in (0, 1, 2, 4, 8)]


def test_no_picture_is_tested_that_was_trained_on() -> None:
    images, labels, base = pictures(6, signal=0.0)  # nothing to learn: only seen pictures could be classified rightly
    tested = measure_growth(images.repeat(1, 4), labels, base.repeat(1, 4), 20.0)
    assert tested.method == "cross-validation"
    for counts, hits in zip(tested.shots[1:], tested.right[1:], strict=True):
        assert ((hits >= 0).sum(1) == len(labels) - counts.sum()).all()
        assert (hits == 1).sum() / (hits >= 0).sum() < 0.5
    assert tested.shots[1:, 0].tolist() == [1, 2, 5]
    assert (tested.tested == 6).all()


def test_of_unequal_classes_each_leaves_a_picture_out_but_a_single_one() -> None:
    images, labels, base = pictures(9)
    keep = torch.tensor([row for row in range(36) if row // 4 < (9, 2, 1, 5)[row % 4]])
    tested = measure_growth(images[keep], labels[keep], base, 20.0)
    assert tested.shots[-1].tolist() == [8, 1, 1, 4]
    assert tested.tested.tolist() == [9, 2, 0, 5]
    plan = plan_from(tested, [9, 2, 1, 5], NAMES, target=0.9)
    assert any("1 classes were not tested" in note and "ash" in note for note in plan.notes)
    assert {row.name for row in plan.classes} == set(NAMES)


def test_held_out_pictures_are_tested_by_all_pictures_at_hand_too() -> None:
    images, labels, base = pictures(4)
    tested = measure_growth(images, labels, base, 20.0, held_out=pictures(10, seed=5)[:2])
    assert tested.shots[:, 0].tolist() == [0, 1, 2, 4]
    assert [len(hits) for hits in tested.right] == [1, 6, 6, 1]
    assert tested.right[-1].mean() > tested.right[0].mean() + 0.2


def test_a_known_curve_is_drawn_on() -> None:
    curve = LearningCurve(on_curve([1, 2, 4, 8], RISING))
    for n in (16, 32, 64):
        truth = 0.3 + 0.6 * (1 - (1 + n / 4) ** -0.9)
        low, high = curve.interval(n, 0.95)
        assert low < truth < high
        assert curve.expected(n) == pytest.approx(truth, abs=0.06)
    widths = [high - low for low, high in (curve.interval(n) for n in (8, 16, 32, 64))]
    assert widths == sorted(widths)


def test_fewer_pictures_say_less() -> None:
    widths = []
    for each in (2, 10, 100):
        low, high = LearningCurve(on_curve([1, 2, 4, 8], RISING, each)).interval(16)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2]


def test_what_a_plan_can_say() -> None:
    rising = on_curve([1, 2, 4, 8], RISING, 200)
    reachable = planned(rising, 0.78)
    assert reachable.status == "reachable"
    assert reachable.needed is not None
    assert reachable.optimistic is not None
    assert 8 < reachable.optimistic < reachable.needed < 64
    assert "more pictures a class would reach 78.0 % accuracy" in reachable.sentence()
    assert all(row.more == reachable.needed - 8 for row in reachable.classes)
    assert planned(rising, 0.4).status == "reached"
    flat = planned(on_curve([1, 2, 4, 8, 16, 32], [0.5, 0.6, 0.64, 0.65, 0.65, 0.65, 0.65], 400), 0.95, (32,) * 4)
    assert flat.status == "level"
    assert 0.6 < flat.level[0] < 0.75
    assert "levels off" in flat.sentence()
    beyond = planned(rising, 0.93)
    assert beyond.status == "beyond"
    assert beyond.needed is None
    assert "more than 8 times" in beyond.sentence()
    little = planned(on_curve([1], [0.5, 0.5], 2), 0.9, (2,) * 4)
    assert little.status == "unknown"
    assert little.needed is little.optimistic is little.pessimistic is None
    assert little.label_first is not None
    assert f"label about {little.label_first} more a class first" in little.sentence()


def test_nothing_is_foretold_beyond_eight_times_what_is_at_hand() -> None:
    plan = planned(on_curve([1, 2, 4, 8], RISING), 0.78)
    assert plan.most == 64
    assert max(row.shots for row in plan.forecasts) == 64


def test_unequal_classes_are_filled_up_and_the_weak_and_small_come_first() -> None:
    tested = on_curve([1, 2, 4, 8], RISING, 200)
    counts = (3, 20, 20, 20)
    plan = planned(
        replace(tested, shots=np.array([[min(n, c) for c in counts] for n in (0, 2, 4, 8, 20)])), 0.8, counts
    )
    assert plan.needed is not None
    more = {row.name: row.more for row in plan.classes}
    assert more == {name: max(0, plan.needed - n) for name, n in zip(NAMES, counts, strict=True)}
    assert plan.classes[0].name == "oak"
    assert plan.more == sum(value or 0 for value in more.values())
    assert f"About {plan.more} more pictures, so that every class has at least {plan.needed}," in plan.sentence()


def features(each: int, digests: bool = True, seed: int = 0) -> ImageFeatures:
    images, labels, _ = pictures(each, seed=seed)
    names = tuple(f"{seed}-{row}" for row in range(len(labels))) if digests else ()
    return ImageFeatures(images[None], labels, NAMES, "digest", (), names)


@pytest.fixture
def head() -> TaskResClassifier:
    return TaskResClassifier(pictures(1)[2], 0.5, 20.0, 0.0)


def test_equal_pictures_are_never_on_both_sides(head: TaskResClassifier) -> None:
    once = features(6)
    twice = once.select([*range(24), *range(24)])
    plan, same = (plan_pictures(head, data, target=0.9) for data in (twice, once))
    assert plan.measured == same.measured
    assert plan.pictures == 24
    assert "24 of 48 pictures are there more than once" in plan.notes[0]
    apart = plan_pictures(head, once, once.select([0, 1]).__class__(
        torch.cat([once.image_embeds[:, :4], features(5, seed=3).image_embeds], 1),
        torch.cat([once.labels[:4], features(5, seed=3).labels]), NAMES, "other", (),
        (*once.digests[:4], *features(5, seed=3).digests),
    ), target=0.9)  # fmt: skip
    assert apart.tested == 20
    assert apart.method == "held-out"


def test_the_same_pictures_give_the_same_plan(head: TaskResClassifier) -> None:
    first, second = (plan_pictures(head, features(5), target=0.9) for _ in range(2))
    assert json.dumps(first.as_dict()) == json.dumps(second.as_dict())


@pytest.mark.parametrize("target", [0, 1, 90, float("nan"), "0.9"])
def test_a_target_that_is_no_share_is_refused(head: TaskResClassifier, target: float) -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        plan_pictures(head, features(3), target=target)


def test_what_cannot_be_planned_is_refused(head: TaskResClassifier, model: TaskResCLIPForImageClassification) -> None:
    with pytest.raises(ConfigurationError, match="accuracy, balanced"):
        plan_pictures(head, features(3), metric="f1")
    with pytest.raises(DataError, match="No class has two different pictures"):
        plan_pictures(head, features(1))
    with pytest.raises(DataError, match="no labelled picture"):
        plan_pictures(head, features(3).select([]))
    with pytest.raises(DataError, match="no held-out picture"):
        plan_pictures(head, features(3), features(3))  # all of them are among those at hand
    broken = features(3)
    broken.image_embeds[0, 0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="NaN"):
        plan_pictures(head, broken)
    with pytest.raises(ConfigurationError, match="one label"):
        plan_pictures(tagger(model).classifier, features(3))


def test_the_figure_has_its_numbers_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib (pip install taskres_hf[plots])")
    plan = planned(on_curve([1, 2, 4, 8], RISING), 0.78)
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        figure, numbers = write_figure(plan, tmp_path / f"curve.{kind}")
        assert figure.read_bytes().startswith(begins)
        rows = list(csv.DictReader(numbers.open()))
        assert [row["what"] for row in rows].count("measured") == 5
        assert float(rows[-1]["low95"]) < float(rows[-1]["accuracy"]) < float(rows[-1]["high95"])
    with pytest.raises(ConfigurationError, match=r"\.png or \.svg"):
        write_figure(plan, tmp_path / "curve.pdf")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"taskres_hf\[plots\]"):
        write_figure(planned(on_curve([1, 2, 4, 8], RISING), 0.78), tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_names_of_classes_are_shown_and_not_obeyed() -> None:
    names = ["<script>", "=cmd()", "\x1b[31mred", "a|b"]
    plan = plan_from(on_curve([1, 2, 4, 8], RISING), [8] * 4, names, target=0.78)
    assert "\x1b" not in plan.sentence()
    assert "<script>" not in plan.class_table().html()
    assert "'=cmd()" in plan.class_table().csv()


def test_a_curve_unlike_all_others_is_not_taken_for_sure() -> None:
    """From chance to the level with the first picture: hardly any curve does that, and the best few would rule."""
    curve = LearningCurve(on_curve([1, 2, 4, 8, 16, 32], [0.05, 0.86, 0.86, 0.87, 0.87, 0.87, 0.87], 200))
    (low, high), (lowest, highest) = curve.interval(32), curve.level()[1:]
    assert low < curve.expected(32) < high
    assert lowest < curve.level()[0] < highest
    assert low < 0.87 < high
