"""Pictures with several labels: every way of writing them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from taskres_hf import load_training_data, sample_few_shot
from taskres_hf.data import MultiLabelImages, load_evaluation_data
from taskres_hf.errors import DataError

NAMES = ["cat", "dog", "sea lion"]
SETS = [["cat", "dog"], [], ["sea lion"], ["dog"]]
HOT = [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)]


def _pictures(count: int = 4) -> list[PIL.Image.Image]:
    return [PIL.Image.new("RGB", (8, 8), (40 * place, 0, 0)) for place in range(count)]


def _dataset(labels: list[Any], feature: Any, name: str = "labels") -> Dataset:
    features = Features({"image": Image(), name: feature})
    return Dataset.from_dict({"image": _pictures(len(labels)), name: labels}, features)


def _folder(folder: Path, table: str, content: str) -> Path:
    folder.mkdir(exist_ok=True)
    for place, picture in enumerate(_pictures()):
        picture.save(folder / f"{place}.png")
    (folder / table).write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("labels", "feature", "options"),
    [
        ([[0, 1], [], [2], [1]], List(ClassLabel(names=NAMES)), {}),
        (SETS, List(Value("string")), {}),
        ([["cat", "dog", "cat"], [], ["sea lion"], ["dog", "dog"]], List(Value("string")), {}),
        ([[0, 1, 1], [], [2], [1]], List(Value("int64")), {"class_names": NAMES}),
        ([list(row) for row in HOT], List(Value("float32")), {"class_names": NAMES}),
        ([list(map(int, row)) for row in HOT], List(Value("int64")), {"class_names": NAMES}),
        (["cat|dog", "", "sea lion", "dog"], Value("string"), {}),
        (["cat; dog;", "", "sea lion", "dog"], Value("string"), {"separator": ";"}),
    ],
)
def test_every_way_of_writing_gives_the_same_rows(labels: list[Any], feature: Any, options: Any) -> None:
    images = MultiLabelImages(_dataset(labels, feature), **options)
    assert images.class_names == NAMES
    assert images.labels == HOT


def test_one_column_per_class() -> None:
    columns = {name: [int(row[place]) for row in HOT] for place, name in enumerate(NAMES)}
    dataset = Dataset.from_dict({"image": _pictures(), **columns, "age": [20, 30, 40, 50]})
    dataset = dataset.cast_column("image", Image())
    for asked in ("auto", NAMES):
        images = MultiLabelImages(dataset, label_columns=asked)
        assert (images.class_names, images.labels) == (NAMES, HOT)


@pytest.mark.parametrize(
    ("labels", "feature", "options", "message"),
    [
        ([[1.0, float("nan"), 0.0]] * 2, List(Value("float32")), {"class_names": NAMES}, "0 and 1 alone"),
        ([[0.5, 0.5, 0.0]] * 2, List(Value("float32")), {"class_names": NAMES}, "0 and 1 alone"),
        ([[1.0, 0.0]] * 2, List(Value("float32")), {"class_names": NAMES}, "length 2"),
        ([["cat"], ["wolf"]], List(Value("string")), {"class_names": NAMES}, "wolf"),
        ([[0], [7]], List(Value("int64")), {"class_names": NAMES}, "7"),
        ([[0], [1]], List(Value("int64")), {}, "plain numbers"),
        ([[0, 1], [1, 0]], List(Value("int64")), {"class_names": ["a", "b"]}, "class ids or a vector"),
        (["cat", "dog"], Value("string"), {}, "no cell holds several"),
        (["cat, tame|dog", "dog"], Value("string"), {}, "more than one mark"),
        ([0, 1], ClassLabel(names=NAMES), {"label_column": "labels"}, "one label per picture"),
        ([["cat", None], ["dog"]], List(Value("string")), {}, "names no class"),
        ([["cat"], None], List(Value("string")), {}, "no label"),
        ([[], []], List(Value("string")), {}, "nothing to train on"),
        (["a|b", "a"], Value("string"), {"separator": "#"}, "must be one of"),
    ],
)
def test_what_cannot_be_read_is_refused(labels: list[Any], feature: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MultiLabelImages(_dataset(labels, feature), **options)


def test_two_classes_as_floats_are_vectors() -> None:
    images = MultiLabelImages(_dataset([[0.0, 1.0], [1.0, 0.0]], List(Value("float32"))), class_names=["a", "b"])
    assert images.labels == [(0.0, 1.0), (1.0, 0.0)]


def test_lists_are_still_refused_where_one_label_is_meant() -> None:
    with pytest.raises(DataError, match="multi_label=True"):
        load_training_data(_dataset(SETS, List(Value("string"))), label_column="labels")


@pytest.mark.parametrize(
    ("table", "content", "options"),
    [
        ("metadata.csv", "file_name,label\n0.png,cat|dog\n1.png,\n2.png,sea lion\n3.png,dog\n", {}),
        ("metadata.csv", "file_name,label\n0.png,cat\n0.png,dog\n1.png,\n2.png,sea lion\n3.png,dog\n",
         {"label_separator": "|"}),
        ("metadata.csv",
         "file_name,label\n0.png,\"['cat', 'dog']\"\n1.png,[]\n2.png,['sea lion']\n3.png,['dog']\n", {}),
        ("metadata.jsonl",
         "\n".join(json.dumps({"file_name": f"{i}.png", "label": row}) for i, row in enumerate(SETS)), {}),
        ("metadata.csv",
         "file_name,cat,dog,sea lion,age\n0.png,1,1,0,20\n1.png,0,0,0,3\n2.png,0,0,1,9\n3.png,0,1,0,5\n",
         {"label_columns": "auto"}),
        ("labels.csv", "image,cat,dog,sea lion\n0,1,1.0,0\n1,0,0,0\n2,0,0,1\n3,False,1,0\n",
         {"label_columns": "cat,dog,sea lion"}),
    ],
)  # fmt: skip
def test_tables_beside_the_pictures(tmp_path: Path, table: str, content: str, options: Any) -> None:
    train, held_out, account = load_training_data(_folder(tmp_path, table, content), multi_label=True, **options)
    assert held_out is None
    assert (train.class_names, train.labels) == (NAMES, HOT)
    assert account.splits[0].pictures == 4
    assert account.splits[0].classes == {"cat": 1, "dog": 2, "sea lion": 1}
    assert any("1 rows have no label" in note for note in account.notes)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("file_name,cat,dog\n0.png,1,\n1.png,0,1\n", {"label_columns": "cat,dog"}, "row 2 holds ''"),
        ("file_name,cat,dog\n0.png,1,-1\n1.png,0,1\n", {"label_columns": "cat,dog"}, "'-1'"),
        ("file_name,cat,dog\n0.png,1,0\n1.png,0,1\n", {"label_columns": "cat,wolf"}, "wolf"),
        ("file_name,label\n0.png,cat\n1.png,dog\n", {}, "no cell holds several"),
        ("file_name,label\n0.png,cat|dog\n1.png,dog\n", {"multi_label": False}, "--multi-label"),
        ("file_name,label\n0.png,cat|dog\n1.png,dog\n", {"multi_label": False, "label_separator": "|"}, "multi_label"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_training_data(_folder(tmp_path, "metadata.csv", content), **{"multi_label": True, **options})


def test_class_folders_say_one_label_each(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        _folder(tmp_path / name, "notes.md", "")
    with pytest.raises(DataError, match="has one label per picture, and several were asked for"):
        load_training_data(tmp_path, multi_label=True)


def test_labels_of_the_test_split_that_training_lacks_are_left_out_and_named(tmp_path: Path) -> None:
    rows = "file_name,label,split\n0.png,cat|dog,train\n1.png,dog,train\n2.png,cat|wolf,test\n3.png,,test\n"
    with pytest.warns(UserWarning, match="wolf"):
        train, held_out, account = load_training_data(_folder(tmp_path, "metadata.csv", rows), multi_label=True)
    assert held_out is not None
    assert held_out.class_names == train.class_names == ["cat", "dog"]
    assert held_out.labels == [(1.0, 0.0), (0.0, 0.0)]
    assert account.left_out[-1].examples == ("wolf",)


def test_a_part_is_held_out_of_every_class() -> None:
    labels = [["cat"] if place % 2 else ["dog", "sea lion"] for place in range(40)]
    train, held_out, _ = load_training_data(_dataset(labels, List(Value("string"))), multi_label=True, holdout=0.25)
    assert held_out is not None
    assert (len(train), len(held_out)) == (30, 10)
    assert [sum(column) for column in zip(*held_out.labels, strict=True)] == [5.0, 5.0, 5.0]


def test_aligned_by_name_and_unknown_classes_refused() -> None:
    images = MultiLabelImages(_dataset(SETS, List(Value("string"))))
    assert images.aligned(["Sea_Lion", "cat", "bird", "dog"]).labels[0] == (0.0, 1.0, 0.0, 1.0)
    with pytest.raises(DataError, match="sea lion"):
        images.aligned(["cat", "dog"])


def test_one_split_to_measure_on_and_a_draw() -> None:
    dataset = _dataset(SETS * 5, List(Value("string")))
    assert load_evaluation_data(dataset, multi_label=True).labels == HOT * 5
    drawn = sample_few_shot(dataset, 2, multi_label=True)
    assert all(sum(name in row for row in drawn["labels"]) >= 2 for name in NAMES)
