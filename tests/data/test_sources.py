"""Sources as named splits of the `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from hub_server import HubServer
from huggingface_hub.errors import OfflineModeIsEnabled

from taskres_hf import load_splits, load_training_data
from taskres_hf.data import LabelledImages, load_evaluation_data, sources
from taskres_hf.errors import DataError


def _picture(seed: int, size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def _folder(root: Path, splits: tuple[str, ...] = ("",)) -> Path:
    for split in splits:
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(3):
                _picture(number).save(root / split / label / f"{number}.png")
    return root


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


def test_files_as_datasets(lay: Callable[..., Path]) -> None:
    root = lay("train/cat/1.png", "train/dog/2.png", "test/3.png")
    raw = Path(os.fsdecode(os.fsencode(root / "train" / "dog") + b"/cow\xe9.png"))
    raw.write_bytes((root / "test" / "3.png").read_bytes())
    splits = load_splits(root)
    assert splits["train"].features["label"] == ClassLabel(names=["cat", "dog"])
    assert splits["train"]["label"] == [0, 1, 1]
    assert splits["test"]["label"] == [None]
    assert splits["train"][2]["image"].size == splits["test"][0]["image"].size
    assert str(splits["train"].split) == "train"


def test_parquet_in_folders_of_splits(tmp_path: Path, splits: DatasetDict) -> None:
    for split in ("train", "test"):
        (tmp_path / "default" / split).mkdir(parents=True)
        splits[split].select(range(4)).to_parquet(tmp_path / "default" / split / "0000.parquet")
    assert set(load_splits(tmp_path / "default")) == {"train", "test"}


def test_a_folder_of_several_data_sets(tmp_path: Path, splits: DatasetDict) -> None:
    for name in ("animals", "plants"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            splits[split].select(range(4)).to_parquet(tmp_path / name / f"{split}.parquet")
    with pytest.raises(DataError, match=r"several folders \(animals, plants\).*Give one"):
        load_splits(tmp_path)
    assert set(load_splits(tmp_path / "plants")) == {"train", "test"}
    (tmp_path / "outer").mkdir()
    (tmp_path / "plants").rename(tmp_path / "outer" / "data")
    assert set(load_splits(tmp_path / "outer")) == {"train", "test"}


def test_a_hub_id_that_is_not_there_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for load in (load_splits, load_training_data):
        with pytest.raises(FileNotFoundError, match=r"dataset 'tester/nothing' \(source, --dataset\)"):
            load("tester/nothing")

    def offline(*_: Any, **__: Any) -> None:
        raise OfflineModeIsEnabled("Offline mode is enabled.")

    monkeypatch.setattr(sources, "load_dataset", offline)
    with pytest.raises(OfflineModeIsEnabled, match=r"dataset 'tester/nothing' \(source, --dataset\)"):
        load_splits("tester/nothing")


def test_parquet_files_beside_pictures(lay: Callable[..., Path], splits: DatasetDict) -> None:
    root = lay("cat/1.png", "dog/2.png")
    splits["test"].select(range(4)).to_parquet(root / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet.* and 2 picture files"):
        load_splits(root)


def test_a_damaged_saved_dataset(tmp_path: Path, splits: DatasetDict) -> None:
    splits["test"].select(range(4)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="save_to_disk and cannot be read"):
        load_splits(tmp_path / "saved")


@pytest.mark.parametrize("source", [None, 3, ["a"], {"train": [1]}, b"x"])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises((DataError, TypeError), match="cannot be read"):
        load_splits(source)


def test_a_dataset_that_is_given_is_used_whatever_its_split_is_called(splits: DatasetDict) -> None:
    data = load_training_data(splits["test"])
    assert (data.train.split, data.held_out) == ("test", None)
    named = DatasetDict({"training": splits["train"], "valid": splits["validation"]})
    data = load_training_data(named)
    assert data.held_out is not None
    assert (data.train.split, data.held_out.split) == ("training", "valid")
    with pytest.raises(DataError, match="may all be meant by 'train'"):
        load_training_data(DatasetDict({"training": splits["train"], "train_2": splits["train"]}))
    assert isinstance(data.train, LabelledImages)
    assert isinstance(Dataset.from_dict({}), Dataset)


FILES = tuple(f"images/{name}/{number}.png" for name in ("pie", "sushi") for number in (0, 1, 2))


@pytest.fixture
def lists(lay: Callable[..., Path]) -> Callable[[dict[str, str]], Path]:
    """Class folders, and text files of these lines beside them."""

    def make(texts: dict[str, str]) -> Path:
        root = lay(*FILES, *texts)
        for name, text in texts.items():
            (root / name).write_text(text.replace(" ", "\n"))
        return root

    return make


@pytest.mark.parametrize(
    ("train", "test", "ending"),
    [("meta/train.txt", "meta/test.txt", ""), ("TrainImages.txt", "TestImages.txt", ".png")],
)
def test_lists_of_both_splits(lists: Callable[[dict[str, str]], Path], train: str, test: str, ending: str) -> None:
    """Food-101 and MIT-67: the official test pictures must not be trained on."""
    root = lists({train: f"pie/0{ending} sushi/0{ending} sushi/1{ending}", test: f"pie/1{ending} sushi/2{ending}"})
    data = load_training_data(root)
    assert data.train.labels == [0, 1, 1]
    assert data.held_out is not None
    assert (data.held_out.split, data.held_out.labels) == ("test", [0, 1])
    assert f"read from {test}, {train}." in " ".join(data.account.notes)
    assert [row.examples for row in data.account.left_out if "no list" in row.reason] == [("images/pie/2.png",)]
    assert len(load_evaluation_data(root)) == 2
    assert len(load_training_data(root, class_folder="first").train) == 6


def test_lists_that_contradict_each_other_are_refused(lists: Callable[[dict[str, str]], Path]) -> None:
    with pytest.raises(DataError, match=r"several lists of one split: labels/train1.txt, labels/train2.txt"):
        load_training_data(lists({"labels/train1.txt": "pie/0", "labels/train2.txt": "pie/1", "test.txt": "pie/2"}))


def test_a_picture_in_two_lists_is_refused(lists: Callable[[dict[str, str]], Path]) -> None:
    with pytest.raises(DataError, match=r"pie/0.png is named in .*class_folder='first'"):
        load_training_data(lists({"train.txt": "pie/0 sushi/0", "test.txt": "pie/0 sushi/1"}))


def test_other_text_files_divide_nothing(lists: Callable[[dict[str, str]], Path]) -> None:
    assert len(load_training_data(lists({"train.txt": "how to train", "test.txt": "pie/0"})).train) == 6
