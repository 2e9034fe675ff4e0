"""Tables of path and label: what columns mean, where pictures lie, and which rows are named when something is wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from taskres_hf import load_training_data
from taskres_hf.data import LabelledImages
from taskres_hf.errors import DataError

Lay = Callable[..., Path]
FILES = ("img/1.png", "img/2.png", "img/3.png")
ROWS = [
    {"path": "img/1.png", "label": "cat"},
    {"path": "img/2.png", "label": "dog"},
    {"path": "img/3.png", "label": "cat"},
]


def _labels(images: LabelledImages | None) -> dict[str, str]:
    """File below the data's folder to class."""
    assert images is not None
    names = [images.class_names[label] for label in images.labels]
    return {images.source(row).split("/d/")[-1]: name for row, name in enumerate(names)}


EXPECTED = {"img/1.png": "cat", "img/2.png": "dog", "img/3.png": "cat"}


def _write(path: Path, kind: str) -> Path:
    frame = pandas.DataFrame(ROWS)
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    else:
        frame.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "ndjson", "parquet"])
@pytest.mark.parametrize("given", ["table", "folder"])
def test_a_table_in_every_form(lay: Lay, kind: str, given: str) -> None:
    root = lay(*FILES, "img/4.png")
    table = _write(root / f"labels.{kind}", "jsonl" if kind == "ndjson" else kind)
    data = load_training_data(table if given == "table" else root)
    assert _labels(data.train) == EXPECTED
    assert data.train.image(0).width > 0
    assert any(f"Columns of labels.{kind}: pictures 'path', labels 'label'." in note for note in data.account.notes)
    if given == "folder":
        assert [(row.reason, row.count, row.examples) for row in data.account.left_out] == [
            ("pictures that the table does not name", 1, ("img/4.png",))
        ]


def test_a_frame(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lay(*FILES))
    data = load_training_data(pandas.DataFrame(ROWS))
    assert [data.train.class_names[label] for label in data.train.labels] == ["cat", "dog", "cat"]
    frame = pandas.DataFrame({"file": [row["path"] for row in ROWS], "y": pandas.Categorical(["b", "a", "b"])})
    assert load_training_data(frame).train.labels == [1, 0, 1]


def _csv(root: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    content = text.encode() if isinstance(text, str) else text
    (root / name).write_bytes(content)
    return root / name


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile_name,class\nimg/1.png,cat\nimg/2.png,dog\nimg/3.png,cat\n",
        "filename;species\r\nimg/1.png;cat\r\nimg/2.png;dog\r\nimg/3.png;cat\r\n",
        "image|category\nimg/1.png|cat\nimg/2.png|dog\nimg/3.png|cat\n",
        'Image Path,Label\n"img/1.png","cat"\n"img/2.png", dog \n img/3.png,cat',
        "path,label\nimg\\1.png,cat\n.\\img\\2.png,dog\n./img/3.png,cat\n",
        "img/1.png,cat\nimg/2.png,dog\nimg/3.png,cat\n",
        "cat,img/1.png\ndog,img/2.png\ncat,img/3.png\n",
        "id,breed\n1,cat\n2,dog\n3,cat\n",
        "image,width,label\n1.png,3,cat\n2.png,3,dog\n3.png,3,cat\n",
        "width,the_file,label\n3,img/1.png,cat\n3,img/2.png,dog\n3,img/3.png,cat\n",
        "path,label,label_name\nimg/1.png,7,cat\nimg/2.png,9,dog\nimg/3.png,7,cat\n",
        "path,label\nimg/1.png,cat\n\n\nimg/2.png,dog\nimg/3.png,cat\nimg/3.png,cat\n",
    ],
    ids=[
        "byte order mark", "semicolons", "bars", "quotes and spaces", "backslashes", "no header", "label first",
        "names without ending", "below a folder", "unusual column", "ids and names", "blank and repeated lines",
    ],
)  # fmt: skip
def test_tables_as_people_write_them(lay: Lay, text: str) -> None:
    assert _labels(load_training_data(_csv(lay(*FILES), text)).train) == EXPECTED


def test_utf_16_and_other_encodings(lay: Lay) -> None:
    root = lay(*FILES)
    text = "path,label\nimg/1.png,Käfer\nimg/2.png,Öl\n"
    assert load_training_data(_csv(root, text.encode("utf-16"))).train.class_names == ["Käfer", "Öl"]
    with pytest.raises(DataError, match="not UTF-8"):
        load_training_data(_csv(root, text.encode("latin-1")))


def test_quoted_names(lay: Lay) -> None:
    root = lay("a, b.png", "c.png")
    data = load_training_data(_csv(root, 'path,label\n"a, b.png","cat, big"\nc.png,dog\n'))
    assert data.train.class_names == ["cat, big", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\nimg/1.png,cat\nimg/9.png,dog\n", r"1 of 2 pictures.*'img/9.png' \(row 3\)"),
        ("path,label\nimg/1.png,cat\nimg/2.png\n", r"1 rows of labels.csv do not have 2 cells.*\[3\]"),
        ("img/1.png,cat,3\nimg/2.png,dog,4\n", "no line of column names, and 3 columns"),
        ("path,healthy,rust\nimg/1.png,0,1\nimg/2.png,1,0\n", r"recognised as the label.*one column per class"),
        ("path,species,label\nimg/1.png,cat,tame\nimg/2.png,cat,wild\n", r"more than one column.*label: tame, wild"),
        ("image,mask,label\nimg/1.png,img/2.png,a\nimg/3.png,img/1.png,b\n", None),
        ("image,path,label\nimg/1.png,img/2.png,a\nimg/3.png,img/1.png,b\n", r"image \(img/1.png\), path|path \(img/2"),
        ("path,path,label\na,b,c\n", "more than one column called path"),
        ("what,ever\n1,2\n", r"No column.*what, ever.*--image-column"),
        ("path,label\n", "empty"),
        ("", "empty"),
        ("path,label\nhttps://x.org/1.png,cat\n", "download the pictures first"),
        ("path,label\nimg/1.png,cat\nimg/2.png,\n", r"1 of 2 rows have no label"),
        ("path,label\nimg/1.png,\nimg/2.png,\n", "No training picture has a label"),
        ("path,label\nimg/1.png,1\nimg/2.png,2\n", "plain numbers"),
    ],
)
def test_tables_that_cannot_be_read(lay: Lay, text: str, message: str | None) -> None:
    table = _csv(lay(*FILES), text)
    if message is None:
        assert len(load_training_data(table).train) == 2
    else:
        with pytest.raises(DataError, match=message):
            load_training_data(table)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", b'{"a": [1, 2]}', "no table"),
        ("labels.json", b"[1, 2]", "row 1 is no JSON object"),
        ("labels.jsonl", b'{"path": "img/1.png"}\n{"pa', "no JSON in line 2"),
        ("labels.parquet", b"PAR1 and nothing", "no readable parquet file"),
        ("labels.csv", b'path,label\nimg/1.png,"cat\n', "cells|cannot be read|not there"),
        ("labels.xlsx", b"x", "Save a spreadsheet as CSV"),
        ("notes.md", b"x", "of no kind that can be read"),
        ("img/1.png", None, "is one picture"),
    ],
)
def test_files_that_are_no_tables(lay: Lay, name: str, content: bytes | None, message: str) -> None:
    root = lay(*FILES)
    if content is not None:
        (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_training_data(root / name)


def test_columns_can_be_named(lay: Lay) -> None:
    table = _csv(lay(*FILES), "a,b,species,label\nimg/1.png,img/2.png,cat,tame\nimg/3.png,img/1.png,dog,tame\n")
    data = load_training_data(table, image_column="b", label_column="species")
    assert _labels(data.train) == {"img/2.png": "cat", "img/1.png": "dog"}
    for wrong in ({"image_column": "c"}, {"image_column": "a", "label_column": "c"}):
        with pytest.raises(DataError, match=r"no (image|label) column 'c'.*a, b, species, label"):
            load_training_data(table, **wrong)


def test_a_split_column(lay: Lay) -> None:
    root = lay(*FILES, "img/4.png", "img/5.png")
    rows = ["img/1.png,cat,Train", "img/2.png,dog,Train", "img/3.png,cat,TEST", "img/4.png,dog,val", "img/5.png,,test"]
    table = _csv(root, "\n".join(["filepaths,labels,data set", *rows[:4]]).replace("data set", "split"))
    data = load_training_data(table)
    assert _labels(data.train) == {"img/1.png": "cat", "img/2.png": "dog"}
    assert _labels(data.held_out) == {"img/3.png": "cat"}
    assert [split.name for split in data.account.splits] == ["train", "test", "validation"]
    with pytest.raises(DataError, match=r"1 rows .* no 'split', rows \[3\]"):
        load_training_data(_csv(root, "path,label,split\nimg/1.png,cat,train\nimg/2.png,dog,\n"))
    table = _csv(root, "path,label,dataset\nimg/1.png,cat,isic\nimg/2.png,dog,ham\n")
    assert len(load_training_data(table).train) == 2  # a column of that name need not speak of splits


def test_tables_named_after_splits(lay: Lay) -> None:
    root = lay(*FILES, "img/4.png")
    _csv(root, "path,label\nimg/1.png,cat\nimg/2.png,dog\n", "train.csv")
    _csv(root, "path\nimg/4.png\n", "test.csv")
    data = load_training_data(root)
    assert (len(data.train), data.held_out) == (2, None)
    assert "test: 1 pictures without labels; nothing is measured on them." in data.account.notes
    _csv(root, "path,label\nimg/3.png,cat\n", "valid.csv")
    assert _labels(load_training_data(root).held_out) == {"img/3.png": "cat"}


def test_competition_layout(lay: Lay) -> None:
    """train.csv of ids, pictures in train/ and test/, a sample submission."""
    root = lay("train/1.png", "train/2.png", "test/7.png", "test/1.png", "test/2.png")
    _csv(root, "id,breed\n1,boxer\n2,beagle\n", "train.csv")
    _csv(root, "id,boxer,beagle\n7,0.5,0.5\n", "sample_submission.csv")
    with pytest.raises(DataError, match=r"more than one folder.*test/.*train/"):
        load_training_data(root)
    (root / "test" / "1.png").unlink()
    assert _labels(load_training_data(root).train) == {"train/1.png": "boxer", "train/2.png": "beagle"}


def test_metadata_of_an_image_folder(lay: Lay) -> None:
    root = lay("train/1.png", "train/2.png", "test/3.png")
    _csv(root / "train", "file_name,label\n1.png,cat\n2.png,dog\n", "metadata.csv")
    (root / "test" / "metadata.jsonl").write_text('{"file_name": "3.png", "label": "dog"}\n')
    data = load_training_data(root)
    assert _labels(data.train) == {"train/1.png": "cat", "train/2.png": "dog"}
    assert _labels(data.held_out) == {"test/3.png": "dog"}


def test_metadata_without_labels_leaves_the_folders(lay: Lay) -> None:
    root = lay("cat/1.png", "dog/2.png")
    pandas.DataFrame({"file_name": ["cat/1.png", "dog/2.png"], "width": [3, 4], "height": [1, 2]}).to_parquet(
        root / "metadata.parquet"
    )
    data = load_training_data(root)
    assert data.train.class_names == ["cat", "dog"]
    assert any("A table is not used: No column" in note for note in data.account.notes)


def test_a_table_that_says_what_the_folders_say(lay: Lay) -> None:
    root = lay("cat/1.png", "dog/2.png")
    _csv(root, "path,label\ncat/1.png,0\ndog/2.png,1\n")
    data = load_training_data(root)
    assert data.train.class_names == ["cat", "dog"]
    assert "labels.csv says the same." in data.account.notes


def test_a_table_of_one_of_the_splits(lay: Lay) -> None:
    root = lay("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")
    _csv(root, "path,label\ntrain/cat/1.png,0\ntrain/dog/2.png,1\n", "train.csv")
    data = load_training_data(root)
    assert len(data.held_out or []) == 2
    _csv(root, "path,label\ntrain/cat/1.png,0\n", "train.csv")
    with pytest.raises(DataError, match="two ways"):
        load_training_data(root)


def test_a_table_of_something_else(lay: Lay) -> None:
    root = lay("cat/1.png", "dog/2.png")
    (root / "coco.json").write_text('{"images": [], "annotations": []}')
    pandas.DataFrame({"embedding": [[0.5, 0.1], [0.2, 0.3]]}).to_parquet(root / "embeddings.parquet")
    assert load_training_data(root).train.class_names == ["cat", "dog"]
    flat = lay("1.png", root="flat")
    (flat / "coco.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match=r"class folders.*A table could not be used: coco.json is no table"):
        load_training_data(flat)


def test_a_list_of_paths_and_numbers(lay: Lay) -> None:
    """As Caffe and many benchmarks have it."""
    table = _csv(lay(*FILES), "img/1.png 1\nimg/2.png 0\nimg/3.png 1\n", "train.txt")
    assert _labels(load_training_data(table, class_names=["dog", "cat"]).train) == EXPECTED


def test_a_table_that_contradicts_the_folders(lay: Lay) -> None:
    """Pictures in part_1/ and part_2/ are no two classes."""
    root = lay("part_1/1.png", "part_1/2.png", "part_2/3.png")
    table = _csv(root, "image,diagnosis\n1,mole\n2,wart\n3,mole\n")
    with pytest.raises(
        DataError, match=r"labels.csv: 3 pictures, 2 classes: mole, wart.*class folders.*part_1, part_2"
    ):
        load_training_data(root)
    assert load_training_data(root, label_column="diagnosis").train.class_names == ["mole", "wart"]
    assert load_training_data(root, class_folder="first").train.class_names == ["part_1", "part_2"]
    assert load_training_data(table).train.class_names == ["mole", "wart"]


def test_several_tables(lay: Lay) -> None:
    root = lay(*FILES)
    for name in ("a.csv", "b.csv"):
        _write(root / name, "csv")
    with pytest.raises(DataError, match=r"several tables.*a.csv, b.csv"):
        load_training_data(root)


def test_a_broken_table_in_a_flat_folder_says_what_is_wrong_with_it(lay: Lay) -> None:
    root = lay(*FILES)
    _csv(root, "path,label\nimg/1.png,cat\nimg/8.png,dog\n")
    with pytest.raises(DataError, match=r"'img/8.png' \(row 3\)"):
        load_training_data(root)


def test_numbers_as_labels(lay: Lay) -> None:
    root = lay(*FILES)
    table = _csv(root, "path,label\nimg/1.png,1\nimg/2.png,0.0\nimg/3.png,1\n")
    data = load_training_data(table, class_names=["dog", "cat"])
    assert _labels(data.train) == EXPECTED
    table = _csv(root, "path,label\nimg/1.png,1\nimg/2.png,2\nimg/3.png,1\n")
    with pytest.raises(DataError, match=r"outside the 2 classes.*mapping \{number: name\}"):
        load_training_data(table, class_names=["cat", "dog"])
    assert _labels(load_training_data(table, class_names={1: "cat", 2: "dog"}).train) == EXPECTED
    frame = pandas.DataFrame({"path": [str(root / file) for file in FILES], "label": [1.0, 0.0, float("nan")]})
    assert len(load_training_data(frame, class_names=["a", "b"], drop_unlabelled=True).train) == 2
    frame["label"] = [True, False, True]
    assert load_training_data(frame).train.class_names == ["False", "True"]
    frame["label"] = [0.5, 1.0, 2.0]
    with pytest.raises(DataError, match="class ids or names"):
        load_training_data(frame)
    frame["label"] = [["a", "b"], ["a"], ["b"]]
    with pytest.raises(DataError, match="row 1 has several labels"):
        load_training_data(frame)


def test_one_picture_with_two_labels_or_in_two_splits(lay: Lay) -> None:
    root = lay(*(f"{number}.png" for number in range(20)))
    rows = [f"{number}.png,{'cat' if number % 2 else 'dog'},train" for number in range(20)]
    table = _csv(root, "\n".join(["path,label,split", *rows, "3.png,dog,train", "4.png,dog,test"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_training_data(table)
    told = [str(warning.message) for warning in caught]
    assert any("1 pictures with more than one label: 3.png (cat in row 5, dog in row 22)" in text for text in told)
    assert any("1 pictures in more than one split: 4.png" in text for text in told)
    assert sum("more than one" in note for note in data.account.notes) == 2
    many = "\n".join(["path,label", *(f"{number}.png,{label}" for number in range(20) for label in "ab")])
    with pytest.raises(DataError, match=r"20 of 20 pictures .* more than one label"):
        load_training_data(_csv(root, many))


def test_repeated_rows_are_counted(lay: Lay) -> None:
    table = _csv(lay(*FILES), "path,label\nimg/1.png,cat\nimg/2.png,dog\nimg/1.png,cat\n")
    data: Any = load_training_data(table)
    assert len(data.train) == 2
    assert data.account.left_out[0].examples == ("row 4: img/1.png",)


@pytest.mark.parametrize(
    ("column", "values", "train", "held_out"),
    [
        ("is_valid", ["False", "False", "True"], 2, "validation"),
        ("is_train", ["1", "1", "0"], 2, "test"),
        ("IsTest", ["0.0", "0.0", "1.0"], 2, "test"),
        ("fold", ["train", "train", "test"], 2, "test"),
        ("fold", ["0", "1", "2"], 3, None),
    ],
)
def test_columns_that_say_which_split(
    lay: Lay, column: str, values: list[str], train: int, held_out: str | None
) -> None:
    rows = [
        f"img/{n}.png,{name},{value}" for n, name, value in zip((1, 2, 3), ("cat", "dog", "cat"), values, strict=True)
    ]
    data = load_training_data(_csv(lay(*FILES), "\n".join([f"path,label,{column}", *rows])))
    assert (len(data.train), data.held_out and data.held_out.split) == (train, held_out)
    assert column in " ".join(data.account.notes)  # as the splits, or as not used


def test_a_split_column_that_is_not_understood_is_refused(lay: Lay) -> None:
    rows = "img/1.png,cat,0\nimg/2.png,dog,1\nimg/3.png,cat,2\n"
    with pytest.raises(DataError, match=r"'partition' of labels.csv holds 0, 1, 2.*Write train, validation or test"):
        load_training_data(_csv(lay(*FILES), f"path,label,partition\n{rows}"))
    with pytest.raises(DataError, match="no training split"):
        load_training_data(_csv(lay(*FILES), "path,label,split\nimg/1.png,cat,test\nimg/2.png,dog,test\n"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog", "NaN"], "1 of 3 rows have no label"),
        (["cat", "dog", "N/A"], "1 of 3 rows have no label"),
        (["cat", "dog", "cat|dog"], r"row 4 has several labels in 'label' \(cat\|dog\)"),
        (["0.5", "1", "2"], "numbers with fractions"),
        (["0.25", "0.5", "1.0"], "numbers with fractions"),
    ],
)
def test_cells_that_are_no_label(lay: Lay, labels: list[str], message: str) -> None:
    rows = [f"img/{n}.png,{label}" for n, label in zip((1, 2, 3), labels, strict=True)]
    with pytest.raises(DataError, match=message):
        load_training_data(_csv(lay(*FILES), "\n".join(["path,label", *rows])))


def test_separators_inside_one_name_are_no_several_labels(lay: Lay) -> None:
    rows = 'img/1.png,"tench, Tinca tinca"\nimg/2.png,"goldfish, Carassius"\nimg/3.png,v1.5\n'
    data = load_training_data(_csv(lay(*FILES), f"path,label\n{rows}"))
    assert data.train.class_names == ["goldfish, Carassius", "tench, Tinca tinca", "v1.5"]
