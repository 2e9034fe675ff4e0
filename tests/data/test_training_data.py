"""One call to what to train on, what to measure on and what was read as what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from hub_server import HubServer

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments, load_training_data
from taskres_hf.data import load_evaluation_data
from taskres_hf.errors import DataError

Lay = Callable[..., Path]


def test_a_dataset_of_the_hub(hub: HubServer, tmp_path: Path, splits: DatasetDict) -> None:
    (tmp_path / "up").mkdir()
    for name, count in (("test", 10), ("train", 20)):
        splits[name].select(range(count)).to_parquet(tmp_path / "up" / f"{name}.parquet")
    hub.add_folder("tester/pictures", tmp_path / "up", "datasets")
    data = load_training_data("tester/pictures", cache_dir=str(tmp_path / "cache"))
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out), data.held_out.split) == (20, 10, "test")
    assert data.account.source == "tester/pictures"
    assert data.train.account is data.held_out.account is data.account


def test_no_path_is_in_the_account(lay: Lay) -> None:
    account = load_training_data(lay("cat/1.png", "dog/2.png", "3.png")).account
    assert account.source == "d"
    assert str(lay().parent) not in json.dumps(account.as_dict()) + "\n".join(account.lines())


# ---------------------------------------------------------------------- a part held out


def test_a_part_is_held_out_of_every_class(splits: DatasetDict) -> None:
    data = load_training_data(splits, holdout=0.2, seed=3)
    assert data.held_out is not None
    assert (data.train.split, data.held_out.split) == ("train", "holdout")
    assert not set(data.train.indices) & set(data.held_out.indices)
    assert len(data.train) + len(data.held_out) == len(splits["train"])
    every, held = Counter(splits["train"]["label"]), Counter(data.held_out.labels)
    assert {label: round(0.2 * count) for label, count in every.items()} == held
    again, other = (load_training_data(splits, holdout=0.2, seed=seed).held_out for seed in (3, 4))
    assert again is not None
    assert other is not None
    assert again.indices == data.held_out.indices != other.indices
    assert [(split.name, split.use) for split in data.account.splits] == [
        ("test", "not used"), ("train", "train"), ("validation", "not used"), ("holdout", "held out"),
    ]  # fmt: skip
    assert any("0.2 of each class, seed 3" in note for note in data.account.notes)


def test_what_cannot_be_held_out(lay: Lay) -> None:
    root = lay("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png")
    data = load_training_data(root, holdout=0.9)  # one is left to train on, and one to measure on
    assert sorted(data.train.labels) == [0, 1]
    assert data.held_out is not None
    assert sorted(data.held_out.labels) == [0, 1]
    for share in (0, 1, -0.5, 20, True, "0.2"):
        with pytest.raises(DataError, match="share of the training pictures"):
            load_training_data(root, holdout=share)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Choose one"):
        load_training_data(root, holdout=0.2, eval_split="test")
    with pytest.raises(DataError, match=r"1 classes have one picture only.*owl"):
        load_training_data(lay("owl/5.png"), holdout=0.2)


# ---------------------------------------------------------------------- labels of several splits


def _dataset(labels: list[Any], feature: Any, splits: DatasetDict) -> Dataset:
    cells = splits["test"].select(range(len(labels))).cast_column("image", Image(decode=False))["image"][:]
    return Dataset.from_dict({"image": cells, "label": labels}, Features({"image": Image(), "label": feature}))


def test_text_labels_have_the_training_order_everywhere(splits: DatasetDict) -> None:
    text = Value("string")
    source = DatasetDict(
        {"train": _dataset(["dog", "cat"], text, splits), "test": _dataset(["cat", "dog", "owl", "owl"], text, splits)}
    )
    with pytest.warns(UserWarning, match="2 test pictures of classes without a training picture.*owl"):
        data = load_training_data(source)
    assert data.held_out is not None
    assert data.train.class_names == data.held_out.class_names == ["cat", "dog"]
    assert (data.held_out.labels, data.held_out.indices) == ([0, 1], [0, 1])
    assert data.account.left_out[0].count == 2
    source["test"] = _dataset(["owl"], text, splits)
    with pytest.raises(DataError, match="no class of the training split: it has owl, training has cat, dog"):
        load_training_data(source)


def test_a_test_split_without_labels(splits: DatasetDict) -> None:
    names = ClassLabel(names=["a", "b"])
    parts = {name: _dataset(labels, names, splits) for name, labels in (("train", [0, 1]), ("test", [-1, -1]))}
    data = load_training_data(DatasetDict(parts))
    assert data.held_out is None
    assert "test: 2 pictures without labels; nothing is measured on them." in data.account.notes
    assert [split.unlabelled for split in data.account.splits] == [0, 2]
    parts["validation"] = _dataset([1, 0], names, splits)
    held_out = load_training_data(DatasetDict(parts)).held_out
    assert held_out is not None
    assert held_out.split == "validation"
    with pytest.raises(DataError, match="'test' has no labels"):
        load_training_data(DatasetDict(parts), eval_split="test")
    del parts["validation"]
    parts["test"] = parts["test"].remove_columns("label")
    assert load_training_data(DatasetDict(parts)).held_out is None


def test_rows_without_a_label_are_counted(splits: DatasetDict) -> None:
    source = _dataset([0, -1, 1, None], ClassLabel(names=["a", "b"]), splits)
    with pytest.raises(DataError, match="--drop-unlabelled"):
        load_training_data(source)
    data = load_training_data(source, drop_unlabelled=True)
    assert data.train.indices == [0, 2]
    assert [(row.reason, row.count) for row in data.account.left_out] == [("train rows without a label", 2)]


def test_numbers_take_their_names_from_the_caller(splits: DatasetDict) -> None:
    parts = {name: _dataset([0, 1], Value("int64"), splits) for name in ("train", "test")}
    data = load_training_data(DatasetDict(parts), class_names=["cat", "dog"])
    assert data.held_out is not None
    assert data.held_out.class_names == ["cat", "dog"]


# ---------------------------------------------------------------------- data to measure on


def test_the_split_to_measure_on(lay: Lay) -> None:
    root = lay("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png")
    assert load_evaluation_data(root).split == "validation"
    assert load_evaluation_data(root, "Train").split == "train"
    with pytest.raises(DataError, match="no split 'test'; there are train, validation"):
        load_evaluation_data(root, "test")
    flat = lay("cat/1.png", "dog/2.png", root="flat")
    images = load_evaluation_data(flat)
    assert (images.split, len(images)) == ("train", 2)
    assert images.account is not None
    assert images.account.splits[0].use == "measured"
    with pytest.raises(DataError, match="no split 'test'"):
        load_evaluation_data(flat, "test")


def test_pictures_of_one_class(lay: Lay) -> None:
    root = lay("cat/1.png", "cat/2.png")
    assert load_evaluation_data(root, default_names=["dog", "cat"]).class_names == ["cat"]
    with pytest.raises(DataError, match="one class folder only, 'cat'"):
        load_evaluation_data(root)


def test_an_unlabelled_split_is_not_measured_on(lay: Lay, splits: DatasetDict) -> None:
    root = lay("train/cat/1.png", "train/dog/2.png", "test/3.png")
    with pytest.raises(DataError, match="'test' has no labels"):
        load_evaluation_data(root, "test")
    with pytest.raises(DataError, match=r"Which split.*test, train"):
        load_evaluation_data(root)


def test_numbered_folders_meet_the_names_of_a_model(lay: Lay) -> None:
    root = lay("test/1/1.png", "test/2/2.png", "test/10/10.png")
    images = load_evaluation_data(root, default_names=["bird", "flower", "mammal"])
    assert [images.class_names[label] for label in images.labels] == ["bird", "flower", "mammal"]
    assert images.account is not None
    assert images.account.class_pairs == {"1": "bird", "2": "flower", "10": "mammal"}
    words = lay("cat/1.png", "dog/2.png", root="words")
    assert load_evaluation_data(words, default_names=["tabby", "beagle"]).class_names == ["cat", "dog"]


# ---------------------------------------------------------------------- from folder to classifier


def test_trained_on_what_was_read(lay: Lay, base: str) -> None:
    root = lay(*(f"{split}/{name}/{n}.png" for split in ("Train", "Test") for name in ("cat", "dog") for n in range(3)))
    data = load_training_data(root)
    model = TaskResCLIPForImageClassification.from_base(base, data.train.class_names)
    arguments = TaskResTrainingArguments(num_train_epochs=2, disable_tqdm=True)
    trainer = TaskResTrainer(model, arguments, data.train, data.held_out)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["num_images"] == 6
    assert model.config.metrics["split"] == "test"
