"""Labelled texts from data sets and tables of each kind; and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from taskres_hf.data import LabelledTexts, load_evaluation_data, load_training_data
from taskres_hf.errors import DataError, TextError

ROWS = [("a goal", "sports"), ("bread", "food"), ("the team", "sports"), ("a soup", "food")]
TEXTS, NAMES = [row[0] for row in ROWS], [row[1] for row in ROWS]


def as_dataset(column: str = "text") -> Dataset:
    features = Features({column: Value("string"), "label": ClassLabel(names=["food", "sports"])})
    return Dataset.from_dict({column: TEXTS, "label": [int(name == "sports") for name in NAMES]}, features)


def write(folder: Path, kind: str) -> Path:
    path, frame = folder / f"texts.{kind}", pandas.DataFrame({"text": TEXTS, "label": NAMES})
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table(kind: str, tmp_path: Path) -> None:
    data = load_training_data(write(tmp_path, kind), texts=True)
    assert data.train.class_names == ["food", "sports"]
    assert [data.train.source(0), data.train.image(0)] == ["row 0 ('a goal')", "a goal"]
    assert "4 texts of 2 classes" in data.account.lines()[1]


@pytest.mark.parametrize("column", ["text", "sentence", "utterance", "anything"])
def test_a_dataset(column: str) -> None:
    found = LabelledTexts(as_dataset(column))
    assert [found.text(row) for row in range(4)] == TEXTS
    assert found.labels == [1, 0, 1, 0]


def test_numbers_are_named_in_order(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0]})
    with pytest.raises(DataError, match="plain numbers"):
        LabelledTexts(rows)
    assert LabelledTexts(rows, class_names=["food", "sports"]).labels == [1, 0, 1, 0]


def test_splits(tmp_path: Path) -> None:
    both = DatasetDict({"train": as_dataset(), "test": as_dataset()})
    both.save_to_disk(tmp_path / "stored")
    for name in ("train", "test"):
        write(tmp_path, "csv").rename(tmp_path / f"{name}.csv")
    (tmp_path / "tables").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").rename(tmp_path / "tables" / f"{name}.csv")
    frame = pandas.DataFrame({"text": TEXTS, "label": NAMES, "split": ["train", "train", "test", "test"]})
    for source in (both, tmp_path / "stored", tmp_path / "tables", frame):
        data = load_training_data(source, texts=True)
        assert data.held_out is not None
        assert load_evaluation_data(source, texts=True).split == "test"
    assert len(load_training_data(frame, texts=True).train) == 2
    assert len(load_training_data(as_dataset(), texts=True, holdout=0.5).train) == 2


@pytest.mark.parametrize(
    ("value", "why"), [(None, "no text"), ("  ", "empty"), (3, "no text but 3"), ("\ud800", "Unicode")]
)
def test_what_is_no_text_is_named(value: Any, why: str, tmp_path: Path) -> None:
    rows = [*({"text": text, "label": name} for text, name in ROWS), {"text": value, "label": "food"}]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(rows))
    data = load_training_data(path, texts=True).train
    with pytest.raises(TextError, match=f"Row 4: .*{why}"):
        data.image(4)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.csv").write_text("id,label\n1,a\n2,b\n")
    (tmp_path / "two.csv").write_text("text\nhello there\nyou there\n")
    (tmp_path / "three.png").write_bytes(b"")
    for source in (*("empty", "one.csv", "two.csv", "three.png", "none.csv"),):
        with pytest.raises(DataError):
            load_training_data(tmp_path / source, texts=True)
    for options in ({"multi_label": True}, {"class_folder": "first"}):
        with pytest.raises(DataError, match="not to be had for texts"):
            load_training_data(as_dataset(), texts=True, **options)  # type: ignore[arg-type]
