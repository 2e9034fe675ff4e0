"""Few-shot draws that can be replayed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from taskres_hf import sample_few_shot
from taskres_hf.data.labelled import class_counts
from taskres_hf.errors import DataError, FewShotError
from taskres_hf.few_shot import few_shot_indices


def test_draw_is_the_published_one() -> None:
    """`random.sample` per class, classes in order of first appearance, one generator seeded once."""
    labels = [2, 0, 2, 1, 0, 2, 1, 0, 2, 1]
    generator = random.Random(7)
    expected = [*generator.sample([0, 2, 5, 8], 2), *generator.sample([1, 4, 7], 2), *generator.sample([3, 6, 9], 2)]
    assert few_shot_indices(labels, 2, seed=7) == expected
    assert few_shot_indices(labels, 2, seed=8) != expected


def test_short_classes_give_all_they_have(splits: DatasetDict) -> None:
    labels, names = splits["train"]["label"], splits["train"].features["label"].names
    with pytest.warns(UserWarning, match="fewer than 16.*reptile or frog"):
        drawn = few_shot_indices(labels, 16, class_names=names)
    counts = class_counts([labels[index] for index in drawn], names)
    available = class_counts(labels, names)
    assert counts == {name: min(16, available[name]) for name in names}
    with pytest.raises(FewShotError, match="on_short='warn'"):
        few_shot_indices(labels, 16, on_short="raise")
    with pytest.raises(DataError, match="at least 1"):
        few_shot_indices(labels, 0)


def test_sampled_dataset_can_be_replayed(splits: DatasetDict) -> None:
    few = sample_few_shot(splits["train"], 3, seed=2)
    assert len(few) == 3 * 8
    indices = few_shot_indices(splits["train"]["label"], 3, 2)
    assert few["hexcode"] == splits["train"].select(indices)["hexcode"]
    text = splits["train"].cast_column("label", Value("int64")).map(lambda row: {"label": str(row["label"])})
    assert len(sample_few_shot(text, 3)) == 24


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, -1, 1, -1, None, 1, 0], ClassLabel(names=["a", "b"])),
        ([5, -1, 9, -1, None, 9, 5], Value("int64")),
        (["a", "", "b", " ", None, "b", "a"], Value("string")),
    ],
)
def test_rows_without_a_label_are_never_drawn(labels: list[Any], feature: Any) -> None:
    data = Dataset.from_dict(
        {"row": list(range(7)), "label": labels}, Features({"row": Value("int64"), "label": feature})
    )
    assert sorted(sample_few_shot(data, 2)["row"]) == [0, 2, 5, 6]
    assert sorted(few_shot_indices([0, -1, 1, -1, -1, 1, 0], 2)) == [0, 2, 5, 6]
