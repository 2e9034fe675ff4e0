"""Lists of file names that divide class folders into splits, and what else such files may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from taskres_hf import load_training_data
from taskres_hf.data import load_evaluation_data
from taskres_hf.errors import DataError

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
