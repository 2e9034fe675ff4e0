"""From a dataset of any shape to pictures with class ids."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, Value

from taskres_hf import load_training_data
from taskres_hf.data.labelled import LabelledImages, are_measurements, labels_of_cells
from taskres_hf.errors import ClassNamesError, DataError, ImageError


def _picture(seed: int, size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def _dataset(labels: list[Any], feature: Any) -> Dataset:
    pictures = [_picture(index) for index in range(len(labels))]
    return Dataset.from_dict({"image": pictures, "label": labels}, Features({"image": Image(), "label": feature}))


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


# ---------------------------------------------------------------------- names of a ClassLabel


def test_names_of_a_class_label_are_matched_by_name() -> None:
    data = _dataset([0, 1, -1], ClassLabel(names=["dog", "cat"]))
    options: dict[str, Any] = {"drop_unlabelled": True}
    assert LabelledImages(data, class_names=["cat", "dog"], **options).labels == [1, 0]
    assert LabelledImages(data, class_names=["cat", "owl", "dog"], **options).labels == [2, 0]
    assert LabelledImages(data, class_names=["Hund", "Katze"], **options).labels == [0, 1]
    renamed = LabelledImages(data, class_names={"cat": "Katze", "dog": "Hund"}, **options)
    assert (renamed.class_names, renamed.labels) == (["Hund", "Katze"], [0, 1])
    with pytest.raises(DataError, match="share names at other positions"):
        LabelledImages(data, class_names=["cat", "wolf"], **options)


def test_renamed_classes_are_in_the_account() -> None:
    data = load_training_data(_dataset([0, 1], ClassLabel(names=["n01", "n02"])), class_names=["cat", "dog"])
    assert data.account.class_pairs == {"n01": "cat", "n02": "dog"}
    assert "Columns: pictures 'image', labels 'label'." in data.account.notes


# ---------------------------------------------------------------------- arrays and transforms


@pytest.mark.parametrize("shape", [(30, 40, 3), (3, 30, 40), (30, 40, 1), (30, 40)])
def test_arrays_as_cells(splits: DatasetDict, shape: tuple[int, ...]) -> None:
    photo = splits["test"][0]["image"].convert("RGB" if 3 in shape else "L").resize((40, 30))
    pixels = np.asarray(photo)
    cell = pixels.transpose(2, 0, 1) if shape[0] == 3 else pixels.reshape(shape)
    for feature in (Array3D(shape, "uint8"),) if len(shape) == 3 else ():
        data = Dataset.from_dict(
            {"image": [cell, cell], "label": ["a", "b"]}, Features({"image": feature, "label": Value("string")})
        )
        assert np.array_equal(np.asarray(LabelledImages(data).image(1)), np.asarray(photo.convert("RGB")))
    images = LabelledImages(Dataset.from_dict({"image": [cell.tolist(), (cell // 2).tolist()], "label": ["a", "b"]}))
    assert np.array_equal(np.asarray(images.image(0)), np.asarray(photo.convert("RGB")))
    assert images.digest(0) != images.digest(1)


def test_arrays_of_unknown_range() -> None:
    images = LabelledImages(Dataset.from_dict({"image": [[[0.5, 0.1]] * 2, [[300, 2]] * 2], "label": ["a", "b"]}))
    for row in range(2):
        with pytest.raises(ImageError, match=f"Row {row}.*range"):
            images.image(row)


def _invert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "image": [PIL.ImageOps.invert(picture.convert("RGB")) for picture in batch["image"]]}


def test_a_transform_is_applied() -> None:
    data = _dataset([0, 1, 1], ClassLabel(names=["cat", "dog"]))
    before = LabelledImages(data)
    for given in (data.with_transform(_invert), DatasetDict({"train": data}).with_transform(_invert)["train"]):
        images = LabelledImages(given)
        assert images.labels == [0, 1, 1]
        assert np.array_equal(np.asarray(images.image(1)), 255 - np.asarray(before.image(1)))
        assert images.digest(0) != before.digest(0)
        assert images.select([2]).digest(0) == images.digest(2)
    source = DatasetDict({"train": data, "test": data}).with_transform(_invert)
    held_out = load_training_data(source).held_out
    assert held_out is not None
    assert held_out.digest(0) == images.digest(0)


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_changes_nothing(kind: str) -> None:
    data = _dataset([0, 1, 1], ClassLabel(names=["cat", "dog"]))
    images = LabelledImages(data.with_format(kind))
    assert [images.digest(row) for row in range(3)] == [LabelledImages(data).digest(row) for row in range(3)]
    assert images.labels == [0, 1, 1]


def _only_tensors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"pixel_values": [np.zeros((3, 4, 4), np.float32) for _ in batch["image"]]}


def _floats(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "image": [np.asarray(picture) / 255 for picture in batch["image"]]}


def _random(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "image": [picture.rotate(360 * random.random()) for picture in batch["image"]]}


def _labels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "label": [1 - label for label in batch["label"]]}


def _fails(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (_only_tensors, r"leaves no column 'image', only \['pixel_values'\].*with_format\(None\)"),
        (_floats, "gives no picture at row 0.*range"),
        (_random, "another picture each time.*views"),
        (_labels, "changes the label of row 0 from 0 to 1"),
        (_fails, "fails at row 0: no"),
    ],
)
def test_transforms_that_give_no_pictures(transform: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelledImages(_dataset([0, 1], ClassLabel(names=["cat", "dog"])).with_transform(transform))


def test_sent_to_another_process(splits: DatasetDict) -> None:
    images = LabelledImages(splits["test"].select(range(4)))
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.digest(row) for row in range(4)] == [images.digest(row) for row in range(4)]
    assert copy.labels == images.labels


def test_text_labels_meet_names_as_those_of_folders_do() -> None:
    data = load_training_data(_dataset(["10", "2", "1"], Value("string")), class_names=["one", "two", "ten"])
    assert data.train.labels == [2, 1, 0]
    assert data.account.class_pairs == {"1": "one", "2": "two", "10": "ten"}
    data = load_training_data(_dataset(["cat ", "cat", "Dog"], Value("string")))
    assert (data.train.class_names, data.train.labels) == (["Dog", "cat"], [1, 1, 0])
    parts = DatasetDict(train=_dataset(["Cat", "Dog"], Value("string")), test=_dataset(["cat", "DOG"], Value("string")))
    held_out = load_training_data(parts).held_out
    assert held_out is not None
    assert held_out.labels == [0, 1]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([10**400, 1], [10**400, 1]),  # JSON knows integers of any size
        ([2**53 + 1, 0.0], [2**53 + 1, 0]),
        (["3.0", 4, "-1", None, -1.0], [3, 4, None, None, None]),
        ([1.5, 10**400], [1.5, 10**400]),
    ],
    ids=["huge", "beyond floats", "text", "fractions"],
)
def test_numbers_of_any_size_are_read_as_they_are(cells: list[Any], labels: list[Any]) -> None:
    assert labels_of_cells(cells) == labels
    assert are_measurements(cells) == any(label == 1.5 for label in labels)
