"""Datasets of every shape users have, few-shot draws that can be replayed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from hub_server import HubServer

from taskres_hf import load_splits, sample_few_shot
from taskres_hf.data.labelled import LabelledImages, class_counts
from taskres_hf.errors import ClassNamesError, DataError, FewShotError
from taskres_hf.few_shot import few_shot_indices


def _picture(seed: int, size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def _folder(root: Path, splits: tuple[str, ...] = ("",)) -> Path:
    for split in splits:
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(3):
                _picture(number).save(root / split / label / f"{number}.png")
    return root


def _dataset(labels: list[Any], feature: Any) -> Dataset:
    pictures = [_picture(index) for index in range(len(labels))]
    return Dataset.from_dict({"image": pictures, "label": labels}, Features({"image": Image(), "label": feature}))


# ---------------------------------------------------------------------- opening


def test_folder_of_parquet_splits(splits: DatasetDict, spec: dict[str, Any]) -> None:
    assert {name: len(part) for name, part in splits.items()} == spec["sizes"]
    assert LabelledImages(splits["train"]).class_names == spec["classes"]


@pytest.mark.parametrize("names", [("",), ("train", "val", "test")])
def test_image_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    splits = load_splits(_folder(tmp_path / "d", names), cache_dir=str(tmp_path / "cache"))
    assert set(splits) == ({"train"} if names == ("",) else {"train", "validation", "test"})
    pictures = LabelledImages(splits["train"])
    assert pictures.class_names == ["cat", "dog"]
    assert pictures.labels == [0, 0, 0, 1, 1, 1]


def test_dataset_of_the_hub(hub: HubServer, tmp_path: Path, splits: DatasetDict) -> None:
    (tmp_path / "up").mkdir()
    splits["test"].select(range(10)).to_parquet(tmp_path / "up" / "test.parquet")
    splits["train"].select(range(20)).to_parquet(tmp_path / "up" / "train.parquet")
    hub.add_folder("tester/animals", tmp_path / "up", "datasets")
    loaded = load_splits("tester/animals", cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 20, "test": 10}
    assert LabelledImages(loaded["train"]).class_names == splits["train"].features["label"].names


@pytest.mark.parametrize("above", ["", "train"])
def test_a_class_may_be_called_like_a_split(tmp_path: Path, above: str) -> None:
    for number, name in enumerate(["test tubes", "validation kit", "trains"]):
        (tmp_path / above / name).mkdir(parents=True)
        _picture(number).save(tmp_path / above / name / f"test_{number}.png")
    train = load_splits(tmp_path)["train"]
    assert train.features["label"].names == ["test tubes", "trains", "validation kit"]
    assert sorted(train["label"]) == [0, 1, 2]


def test_saved_to_disk_one_file_and_datasets(tmp_path: Path, splits: DatasetDict) -> None:
    small = DatasetDict({"train": splits["train"].select(range(4))})
    small.save_to_disk(tmp_path / "saved")
    small["train"].to_parquet(tmp_path / "one.parquet")
    assert len(load_splits(tmp_path / "saved")["train"]) == 4
    assert len(load_splits(tmp_path / "one.parquet")["train"]) == 4
    assert load_splits(small) is small
    assert len(load_splits(splits["test"])["test"]) == len(splits["test"])


def test_what_cannot_be_opened(tmp_path: Path, splits: DatasetDict) -> None:
    with pytest.raises(DataError, match="neither parquet files nor pictures"):
        load_splits(tmp_path)
    with pytest.raises(DataError, match="no dataset at"):
        load_splits(tmp_path / "missing")
    with pytest.raises(DataError, match="streamed"):
        load_splits(splits["train"].to_iterable_dataset())


# ---------------------------------------------------------------------- columns and labels


def test_columns_found_by_type_or_named() -> None:
    data = _dataset([0, 1], ClassLabel(names=["cat", "dog"])).rename_columns({"image": "scan", "label": "species"})
    pictures = LabelledImages(data)
    assert (pictures.image_column, pictures.label_column) == ("scan", "species")
    with pytest.raises(DataError, match=r"no image column 'x'.*'scan'"):
        LabelledImages(data, image_column="x")
    with pytest.raises(DataError, match="--label-column"):
        LabelledImages(data.remove_columns("species"))


def test_labels_as_text_and_as_numbers() -> None:
    text = LabelledImages(_dataset(["dog", "cat", "dog"], Value("string")))
    assert (text.class_names, text.labels) == (["cat", "dog"], [1, 0, 1])
    with pytest.raises(DataError, match="--class-names"):
        LabelledImages(_dataset([0, 1], Value("int64")))
    assert LabelledImages(_dataset([0, 1], Value("int64")), class_names=["cat", "dog"]).labels == [0, 1]
    renamed = LabelledImages(_dataset([0, 1], ClassLabel(names=["n1", "n2"])), class_names=["cat", "dog"])
    assert renamed.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("labels", "feature", "options", "message"),
    [
        ([0, -1], ClassLabel(names=["a", "b"]), {}, "1 of 2 rows have no label"),
        ([0, None], Value("int64"), {"class_names": ["a", "b"]}, "--drop-unlabelled"),
        ([0, 2], Value("int64"), {"class_names": ["a", "b"]}, "outside the 2 classes"),
        (["a", "c"], Value("string"), {"class_names": ["a", "b"]}, "not among class_names"),
        ([0, 1], ClassLabel(names=["a", "b"]), {"class_names": ["a"]}, "has 1 names"),
        ([0.5, 1.0], Value("float32"), {}, "class ids or names"),
    ],
)
def test_bad_labels(labels: list[Any], feature: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelledImages(_dataset(labels, feature), **options)


def test_unlabelled_rows_can_be_dropped() -> None:
    pictures = LabelledImages(_dataset([1, -1, 0], ClassLabel(names=["a", "b"])), drop_unlabelled=True)
    assert (pictures.labels, pictures.indices, len(pictures)) == ([1, 0], [0, 2], 2)


def test_empty_and_wrong_kinds(splits: DatasetDict) -> None:
    with pytest.raises(DataError, match="empty"):
        LabelledImages(splits["train"].select([]))
    with pytest.raises(DataError, match="one split"):
        LabelledImages(splits)
    with pytest.raises(DataError, match="list"):
        LabelledImages([1, 2])
    with pytest.raises(ClassNamesError, match="empty"):
        LabelledImages(_dataset([0, 1], ClassLabel(names=["a", " "])))


def test_classes_are_matched_by_name() -> None:
    pictures = LabelledImages(_dataset([0, 1, 1], ClassLabel(names=["dog", "cat"])))
    assert pictures.aligned(["cat", "bird", "dog"]).labels == [2, 0, 0]
    with pytest.raises(DataError, match="label_map"):
        pictures.aligned(["kitten", "dog"])
    assert pictures.aligned(["kitten", "dog"], {"cat": "kitten"}).labels == [1, 0, 0]
    assert pictures.aligned(["kitten", "puppy"], "position").labels == [0, 1, 1]
    with pytest.raises(DataError, match="has label 1"):
        pictures.aligned(["kitten"], "position")


# ---------------------------------------------------------------------- few shots


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
