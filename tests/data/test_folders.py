"""Which folders become splits and classes, what is left out, and what is refused because it can be read in two ways."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskres_hf import load_training_data
from taskres_hf.data import Account, LabelledImages
from taskres_hf.data.reading import is_wrapper, split_name
from taskres_hf.errors import DataError

Lay = Callable[..., Path]
PAIR = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


def _by_class(images: LabelledImages | None) -> dict[str, list[str]]:
    """Class to the names of its files."""
    assert images is not None
    named: dict[str, list[str]] = {name: [] for name in images.class_names}
    for row, label in enumerate(images.labels):
        named[images.class_names[label]].append(os.path.basename(images.source(row)))
    return named


def _left_out(account: Account) -> dict[str, int]:
    return {row.reason: row.count for row in account.left_out}


def _under(*folders: str) -> list[str]:
    return [f"{folder}/{name}" for folder in folders for name in PAIR]


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Train", "train"), ("TRAINING", "train"), ("train_images", "train"),
        ("images_train", "train"), ("01_train", "train"), ("trainset", "train"), ("train_set", "train"),
        ("TrainData", "train"), ("Training Set", "train"), ("train2017", "train"), ("train-00000-of-00002", None),
        ("val", "validation"), ("Valid", "validation"), ("dev", "validation"), ("eval", "validation"),
        ("validation_data", "validation"), ("test", "test"), ("Testing", "test"), ("tst", "test"), ("hold-out", None),
        ("holdout", "test"), ("test tubes", None), ("train station", None), ("trains", None), ("contest", None),
        ("trainer", None), ("pretrain", None), ("values", None), ("device", None), ("latest", None), ("images", None),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_name(name) == split


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("train_images", "test_images"),
        ("images_train", "images_test"), ("01_train", "02_test"), ("trainset", "testset"),
        ("dataset/train", "dataset/test"), ("DATA/images/train", "DATA/images/test"), ("a/b/train", "a/b/test"),
        ("train/images", "test/images"), ("train/train", "test/test"),
    ],
)  # fmt: skip
def test_split_folders_in_every_usual_spelling(lay: Lay, train: str, test: str) -> None:
    data = load_training_data(lay(*_under(train), *_under(test), "readme.md"))
    assert data.held_out is not None
    assert (data.train.split, data.held_out.split) == ("train", "test")
    assert data.train.class_names == data.held_out.class_names == ["cat", "dog"]
    assert data.train.labels == data.held_out.labels == [0, 0, 1, 1]
    assert f"/{train}/" in data.train.source(0)
    assert f"/{test}/" in data.held_out.source(0)


def test_test_before_validation_and_neither_is_trained_on(lay: Lay) -> None:
    data = load_training_data(lay(*_under("train", "valid", "test")))
    assert data.held_out is not None
    assert [(split.name, split.use) for split in data.account.splits] == [
        ("test", "held out"), ("train", "train"), ("validation", "not used"),
    ]  # fmt: skip
    chosen = load_training_data(lay(*_under("train", "valid", "test")), eval_split="val").held_out
    assert chosen is not None
    assert chosen.split == "validation"
    assert load_training_data(lay(), eval_split="none").held_out is None


def test_a_folder_beside_the_splits_is_named(lay: Lay) -> None:
    root = lay(*_under("Train", "Test", "extra"))
    with pytest.raises(DataError, match=r"Test, Train would be splits, extra are not.*--train-split"):
        load_training_data(root)
    data = load_training_data(root, train_split="Train", eval_split="test")
    assert len(data.train) == 4
    assert _left_out(data.account) == {"pictures in folders beside the splits (extra)": 4}


def test_two_folders_for_one_split(lay: Lay) -> None:
    root = lay(*_under("train", "val", "dev"))
    with pytest.raises(DataError, match="dev, val would all be the validation split"):
        load_training_data(root)
    data = load_training_data(root, train_split="train", eval_split="dev")
    assert data.held_out is not None
    assert data.held_out.split == "dev"


def test_splits_of_any_name_when_they_are_named(lay: Lay) -> None:
    data = load_training_data(lay(*_under("2023", "2024")), train_split="2023", eval_split="2024")
    assert data.held_out is not None
    assert (data.train.split, data.held_out.split) == ("2023", "2024")
    assert "/2024/" in data.held_out.source(0)


@pytest.mark.parametrize("wrong", ["tset", "validation"])
def test_a_split_that_does_not_exist(lay: Lay, wrong: str) -> None:
    root = lay(*_under("train", "test"))
    with pytest.raises(DataError, match=f"no split '{wrong}'; there are test, train"):
        load_training_data(root, eval_split=wrong)
    with pytest.raises(DataError, match="no split"):
        load_training_data(root, train_split=wrong)
    with pytest.raises(DataError, match="no split 'test'; there are train"):
        load_training_data(lay(*PAIR, root="flat"), eval_split="test")


def test_no_split_is_both_trained_on_and_measured_on(lay: Lay) -> None:
    root = lay(*_under("train", "test"))
    with pytest.raises(DataError, match="'test' cannot be trained on and measured on"):
        load_training_data(root, train_split="test", eval_split="Testing")
    assert load_training_data(root, train_split="test").held_out is None


def test_only_a_test_split(lay: Lay) -> None:
    with pytest.raises(DataError, match=r"no training split; there are test.*--train-split"):
        load_training_data(lay(*_under("test")))


def test_splits_inside_class_folders(lay: Lay) -> None:
    root = lay("cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png")
    data = load_training_data(root)
    assert _by_class(data.train) == {"cat": ["1.png"], "dog": ["3.png"]}
    assert _by_class(data.held_out) == {"cat": ["2.png"], "dog": ["4.png"]}


def test_a_test_folder_inside_one_class_only_is_refused(lay: Lay) -> None:
    with pytest.raises(DataError, match=r"cat/test.*inside class folders"):
        load_training_data(lay("cat/train/1.png", "cat/test/2.png", "dog/3.png"))


@pytest.mark.parametrize(
    "names",
    [("train_cat", "train_dog", "test_cat", "test_dog"), ("cat-train", "dog-train", "cat-valid", "dog-valid")],
)
def test_splits_in_the_names_of_class_folders_are_refused(lay: Lay, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="hold a split and a class each"):
        load_training_data(lay(*(f"{name}/1.png" for name in names)))
    assert len(load_training_data(lay("train car/1.png", "train bus/2.png", root="toys")).train.class_names) == 2


@pytest.mark.parametrize("names", [("images/train", "images/test", "masks/train", "masks/test")])
def test_pictures_and_masks_are_no_classes(lay: Lay, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="images, masks holds split folders"):
        load_training_data(lay(*(f"{name}/1.png" for name in names)))


# ---------------------------------------------------------------------- classes


def test_a_class_may_be_called_like_a_split(lay: Lay) -> None:
    data = load_training_data(lay("test tubes/1.png", "train station/2.png", "trains/3.png"))
    assert data.train.class_names == ["test tubes", "train station", "trains"]
    data = load_training_data(lay("bus/1.png", "car/2.png", "train/3.png", root="vehicles"))
    assert data.train.class_names == ["bus", "car", "train"]
    assert any("train is taken for a class" in note for note in data.account.notes)


def test_a_class_that_may_be_a_split_is_refused(lay: Lay) -> None:
    with pytest.raises(DataError, match=r"test would be splits, cat, dog are not; or all 3 are classes"):
        load_training_data(lay("cat/1.png", "dog/2.png", "test/3.png"))


def test_the_class_is_the_first_folder_below_the_split(lay: Lay) -> None:
    root = lay("train/bird/day1/1.png", "train/bird/day2/2.png", "train/cat/3.png", "train/cat/x/y/4.png")
    data = load_training_data(root)
    assert _by_class(data.train) == {"bird": ["1.png", "2.png"], "cat": ["3.png", "4.png"]}
    assert any("day1, day2, x" in note for note in data.account.notes)
    assert load_training_data(root, class_folder="last").train.class_names == ["cat", "day1", "day2", "y"]


@pytest.mark.parametrize(
    "names",
    [
        ("cat/day1/1.png", "cat/day2/2.png", "dog/day1/3.png"),
        ("cat/01/1.png", "dog/02/2.png"),
        ("cat/images/1.png", "dog/images/2.png"),
        ("cat/cat_pictures/1.png", "dog/dog_pictures/2.png"),
        ("cat/siamese/1.png", "cat/2.png", "dog/3.png"),
    ],
)
def test_folders_that_only_divide_a_class(lay: Lay, names: tuple[str, ...]) -> None:
    assert load_training_data(lay(*names)).train.class_names == ["cat", "dog"]


def test_folds_with_the_same_folders_inside_are_no_classes(lay: Lay) -> None:
    root = lay(*_under("fold1", "fold2"))
    with pytest.raises(DataError, match=r"2 classes from the first folder \(fold1, fold2\), or as 2 .*\(cat, dog\)"):
        load_training_data(root)
    assert len(load_training_data(root, class_folder="last").train) == 8


def test_classes_at_two_depths_are_refused_with_both_readings(lay: Lay) -> None:
    root = lay("animals/cat/1.png", "animals/dog/2.png", "plants/rose/3.png", "plants/oak/4.png")
    both = r"2 classes from the first folder \(animals, plants\), or as 4 .*\(cat, dog, oak, rose\).*--class-folder"
    with pytest.raises(DataError, match=both):
        load_training_data(root)
    assert load_training_data(root, class_folder="first").train.class_names == ["animals", "plants"]
    last = load_training_data(root, class_folder="last")
    assert _by_class(last.train) == {"cat": ["1.png"], "dog": ["2.png"], "oak": ["4.png"], "rose": ["3.png"]}
    assert load_training_data(root, class_names=["oak", "rose", "cat", "dog"]).train.class_names[0] == "oak"
    assert load_training_data(root / "animals").train.class_names == ["cat", "dog"]
    with pytest.raises(DataError, match="class_folder must be"):
        load_training_data(root, class_folder="middle")


def test_a_picture_beside_the_class_folders(lay: Lay) -> None:
    data = load_training_data(lay(*PAIR, "cover.png"))
    assert data.train.class_names == ["cat", "dog"]
    assert data.account.left_out[0].examples == ("cover.png",)
    assert _left_out(data.account) == {"pictures beside the class folders": 1}
    data = load_training_data(lay(*_under("train", "test"), "train/stray.png", "top.png", root="split"))
    assert _left_out(data.account) == {
        "pictures beside the split folders": 1, "pictures beside the class folders": 1,
    }  # fmt: skip


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("images/1.png", "images/2.png"), ("train/1.png", "test/2.png")])
def test_pictures_without_class_folders(lay: Lay, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"class folders.*labels\.csv"):
        load_training_data(lay(*names))


def test_one_class_folder(lay: Lay) -> None:
    with pytest.raises(DataError, match=r"one class folder only, 'bird'.*Folders inside it: day1, day2"):
        load_training_data(lay("bird/day1/1.png", "bird/day2/2.png", "bird/3.png"))


@pytest.mark.parametrize("names", [("0", "1", "2"), ("A", "B", "C"), ("cat", "dog", "owl")])
@pytest.mark.filterwarnings("ignore:.*say nothing")
def test_folders_that_hold_only_one_other(lay: Lay, names: tuple[str, ...]) -> None:
    root = lay(*(f"archive/signs/{name}/{name}.png" for name in names), "archive/readme.txt")
    assert load_training_data(root).train.class_names == list(names)


def test_unlabelled_test_pictures(lay: Lay) -> None:
    root = lay(*_under("train"), "test/1.png", "test/2.png")
    data = load_training_data(root)
    assert (len(data.train), data.held_out) == (4, None)
    assert "test: 2 pictures without labels; nothing is measured on them." in data.account.notes
    assert any("2 without a label" in line for line in data.account.lines())
    with pytest.raises(DataError, match="'test' has no labels, so nothing can be measured on its 2 pictures"):
        load_training_data(root, eval_split="test")
    (root / "valid").mkdir()
    (root / "train" / "cat").rename(root / "valid" / "cat")
    lay("train/cat/9.png")
    assert load_training_data(root).held_out.split == "validation"  # type: ignore[union-attr]


def test_empty_classes_and_classes_of_one_split(lay: Lay) -> None:
    root = lay(*_under("train", "test"), "train/bird/1.png", "test/fish/2.png", "test/fish/3.png")
    (root / "train" / "wolf").mkdir()
    with pytest.warns(UserWarning, match=r"2 test pictures of classes without a training picture.*fish"):
        data = load_training_data(root)
    assert data.train.class_names == ["bird", "cat", "dog"]
    assert len(data.held_out or []) == 4
    assert _left_out(data.account) == {"test pictures of classes without a training picture": 2}
    assert "Folders without any picture, which make no class: wolf." in data.account.notes
    assert "Classes without a picture in test: bird." in data.account.notes


def test_files_that_are_no_pictures(lay: Lay) -> None:
    hidden = ("cat/.DS_Store", "cat/._1.png", "__MACOSX/cat/1.png", ".ipynb_checkpoints/a/1.png", "dog/Thumbs.db")
    data = load_training_data(lay(*PAIR, *hidden, "cat/1.xmp", "cat/2.xmp", "notes.txt", "dog/3.psd", "x.zip"))
    assert len(data.train) == 4
    assert {reason.split(";")[0]: count for reason, count in _left_out(data.account).items()} == {
        "files ending in .xmp": 2, "files ending in .txt": 1, "files ending in .psd": 1,
        "archives inside ending in .zip": 1,
    }  # fmt: skip


def test_a_folder_without_pictures_says_what_it_holds(lay: Lay) -> None:
    with pytest.raises(DataError, match=r"neither parquet files nor pictures; it holds 1 files ending in \.psd"):
        load_training_data(lay("cat/1.psd"))


def test_classes_that_differ_in_case(lay: Lay) -> None:
    data = load_training_data(lay("Cat/1.png", "cat/2.png", "dog/3.png"))
    assert len(data.train.class_names) == 3
    assert any("differ in spelling only, and are kept apart: Cat, cat" in note for note in data.account.notes)


# ---------------------------------------------------------------------- names


def test_numbered_folders_meet_names_in_natural_order(lay: Lay) -> None:
    root = lay("train/1/1.png", "train/2/2.png", "train/10/10.png", "test/10/a.png", "test/1/b.png")
    data = load_training_data(root, class_names=["bird", "flower", "mammal"])
    assert _by_class(data.train) == {"bird": ["1.png"], "flower": ["2.png"], "mammal": ["10.png"]}
    assert _by_class(data.held_out) == {"bird": ["b.png"], "flower": [], "mammal": ["a.png"]}
    assert data.account.as_dict()["class_pairs"] == {"1": "bird", "2": "flower", "10": "mammal"}
    assert any("1 = bird, 2 = flower, 10 = mammal" in line for line in data.account.lines())
    with pytest.warns(UserWarning, match="say nothing to a text encoder"):
        assert load_training_data(root).train.class_names == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["01", "1", "2"], ["a", "b", "c"]),  # two of one number
        (["1", "2"], ["a", "b", "c"]),  # from 0, from 1 or in order
        (["cat", "dog"], ["Katze", "Hund"]),  # words that are other words
        (["cat", "dog"], ["cat", "wolf"]),
        (["1", "dog"], ["a", "dog"]),
    ],
)
def test_names_that_may_be_paired_wrongly_are_refused(lay: Lay, folders: list[str], names: list[str]) -> None:
    root = lay(*(f"{folder}/{folder}.png" for folder in folders))
    with pytest.raises(DataError, match=r"mapping \{label: name\}"):
        load_training_data(root, class_names=names)


def test_a_mapping_says_which_name_is_whose(lay: Lay) -> None:
    root = lay("cat/1.png", "dog/2.png", "n02/3.png")
    data = load_training_data(root, class_names={"dog": "Hund", "n02": "Maus", "cat": "Katze"})
    assert _by_class(data.train) == {"Katze": ["1.png"], "Hund": ["2.png"], "Maus": ["3.png"]}


def test_names_that_differ_in_case_and_underscores(lay: Lay) -> None:
    data = load_training_data(lay("Tabby_Cat/1.png", "beagle/2.png"), class_names=["beagle", "tabby cat"])
    assert _by_class(data.train) == {"beagle": ["2.png"], "tabby cat": ["1.png"]}
    assert data.account.class_pairs == {"Tabby_Cat": "tabby cat"}


def test_wrappers() -> None:
    assert all(map(is_wrapper, ["images", "Data", "jpg", "photos_2", "image_files"]))
    assert not any(map(is_wrapper, ["cat", "2", "datacenter", "imagery"]))


# ---------------------------------------------------------------------- odd trees


def test_links_are_followed_and_loops_are_not(lay: Lay, tmp_path: Path) -> None:
    root = lay(*PAIR)
    other = lay("1.png", "2.png", root="elsewhere")
    (root / "bird").symlink_to(other)
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load_training_data(root)
    assert _by_class(data.train)["bird"] == ["1.png", "2.png"]
    assert len(data.train) == 6
    assert {"links to a folder above", "links that lead nowhere"} <= set(_left_out(data.account))


def test_names_that_are_not_text(lay: Lay, photos: list[bytes]) -> None:
    root = lay(*PAIR, "cat/two\nlines.png", "a; b/1.png")
    raw = os.fsencode(root) + b"/dog/cow\xe9.png"
    Path(os.fsdecode(raw)).write_bytes(photos[5])
    os.mkdir(os.fsencode(root) + b"/cow\xe9")
    Path(os.fsdecode(os.fsencode(root) + b"/cow\xe9/1.png")).write_bytes(photos[6])
    data = load_training_data(root)
    assert len(data.train) == 8
    assert all(data.train.image(row).width for row in range(8))
    text = "\n".join(data.account.lines())
    assert text.encode("utf-8")
    assert "\\udce9" in text


def test_very_deep_trees(lay: Lay) -> None:
    root = lay(*PAIR, "/".join(["cat", *("deeper" for _ in range(220)), "3.png"]))
    data = load_training_data(root)
    assert len(data.train) == 4
    assert _left_out(data.account) == {"folders more than 200 deep": 1}


def test_many_files_are_listed_in_one_pass(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call per file: what a folder's listing says is enough."""
    root = lay(*(f"c{number % 7}/{number}.png" for number in range(300)))
    calls: list[str] = []
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *args, **options: calls.append(str(path)) or stat(path, *args, **options)
    )
    assert len(load_training_data(root).train) == 300
    assert sum(call.endswith(".png") for call in calls) == 0


def test_classes_of_another_split_are_met_whatever_their_case_and_separators(lay: Lay) -> None:
    root = lay("train/Red Fox/1.png", "train/Dog /2.png", "test/red_fox/3.png", "test/dog/4.png")
    train, held_out, account = load_training_data(root)
    assert (train.class_names, train.labels) == (["Dog", "Red Fox"], [0, 1])
    assert _by_class(held_out) == {"Dog": ["4.png"], "Red Fox": ["3.png"]}
    assert account.class_pairs == {"Dog ": "Dog", "dog": "Dog", "red_fox": "Red Fox"}


def test_names_that_differ_in_more_than_separators_stay_apart(lay: Lay) -> None:
    with pytest.warns(UserWarning, match="C#"):
        data = load_training_data(lay("train/C/1.png", "train/Java/2.png", "test/java/3.png", "test/C#/4.png"))
    assert _by_class(data.held_out) == {"C": [], "Java": ["3.png"]}


def test_split_folders_named_by_the_caller_that_hold_their_own_name(lay: Lay) -> None:
    """The Intel image classification layout."""
    names = [f"{split}/{split}/{name}/1.png" for split in ("seg_train", "seg_test") for name in ("forest", "sea")]
    root = lay(*names, "seg_pred/seg_pred/1.png")
    with pytest.raises(DataError, match="name the splits: train_split="):
        load_training_data(root)
    data = load_training_data(root, train_split="seg_train", eval_split="seg_test")
    assert data.train.class_names == ["forest", "sea"]
    assert data.held_out is not None
    assert data.held_out.labels == [0, 1]


def test_parts_of_one_set_are_no_classes(lay: Lay) -> None:
    root = lay("HAM_images_part_1/1.png", "HAM_images_part_2/2.png")
    with pytest.raises(DataError, match=r"look like parts of one set.*class_folder='first'"):
        load_training_data(root)
    assert len(load_training_data(root, class_folder="first").train.class_names) == 2
    assert len(load_training_data(root, class_names=["HAM images part 1", "HAM images part 2"]).train.class_names) == 2
