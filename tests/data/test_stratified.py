"""Draws and folds of pictures with several labels."""

from __future__ import annotations

import random

import pytest

from taskres_hf.data.stratified import draw_shots, fold_of_each, folds_of_pictures, positives
from taskres_hf.errors import FewShotError
from taskres_hf.few_shot import few_shot_indices


def _rows(count: int = 200, shares: tuple[float, ...] = (0.5, 0.1, 0.03, 0.2)) -> list[tuple[float, ...]]:
    draw = random.Random(0)
    return [tuple(float(draw.random() < share) for share in shares) for _ in range(count)]


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_every_class_gets_its_shots_and_as_many_without(shots: int) -> None:
    rows = _rows()
    drawn = draw_shots(rows, shots, seed=1)
    assert len(set(drawn)) == len(drawn)
    there, found = positives(rows, 4), positives([rows[row] for row in drawn], 4)
    assert all(have >= min(shots, count) for have, count in zip(found, there, strict=True))
    assert all(len(drawn) - have >= shots for have in found)
    assert len(drawn) <= 4 * 2 * shots
    assert drawn == draw_shots(rows, shots, seed=1) != draw_shots(rows, shots, seed=2)


def test_a_class_never_and_a_class_always_there_are_no_obstacle() -> None:
    rows = [(1.0, 0.0, float(place % 2)) for place in range(10)]
    assert positives([rows[row] for row in draw_shots(rows, 2, 1)], 3)[2] >= 2


def test_short_classes_are_named_or_refused() -> None:
    rows = [(1.0, 0.0)] * 5 + [(0.0, 1.0)]
    with pytest.warns(UserWarning, match=r"rare \(1\)"):
        few_shot_indices(rows, 2, class_names=["often", "rare"])
    with pytest.raises(FewShotError, match="rare"):
        few_shot_indices(rows, 2, on_short="raise", class_names=["often", "rare"])


def test_folds_have_the_same_share_of_each_class() -> None:
    rows = _rows(400)
    parts = fold_of_each(rows, [0.25] * 4, seed=1)
    for part in range(4):
        members = [row for row, found in zip(rows, parts, strict=True) if found == part]
        assert abs(len(members) - 100) <= 4
        assert all(abs(a - b / 4) <= 2 for a, b in zip(positives(members, 4), positives(rows, 4), strict=True))


def test_equal_pictures_are_in_one_fold() -> None:
    folds = folds_of_pictures(_rows(30), [str(place // 2) for place in range(30)], 5, seed=1)
    assert folds[::2] == folds[1::2]
    assert set(folds) == set(range(5))
