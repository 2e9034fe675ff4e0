"""The paper's datasets as data: complete, checked before use, read from the layouts people have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from support import PAPER, run

from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.paper import datasets
from taskres_hf.paper.datasets import describe_dataset, open_dataset, overlaps, suite_datasets, unique_names
from taskres_hf.prompts import class_prompts, named_templates
from taskres_hf.training.recipes import published_constants


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a test shrink the published sizes of a dataset, so that a handful of files is a complete copy."""
    changed = json.loads(json.dumps(suite_datasets()))
    monkeypatch.setattr(datasets, "suite_datasets", lambda: changed)
    return changed


def _picture(path: Path, shade: int = 0, tint: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (12, 12), (shade % 256, 99, tint)).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)


def test_every_dataset_of_the_paper_is_described() -> None:
    for name, classes in PAPER.items():
        spec = describe_dataset(name)
        assert len(spec["class_names"]) == classes
        assert set(spec["sizes"]) == {"train", "validation", "test"}
        assert spec["template_set"] in named_templates()
        assert spec["alpha"] == (1.0 if name == "oxford_flowers" else 0.5)
        assert spec["licence"]
        assert len(set(unique_names(spec["class_names"], spec["all_wnids"])[0])) == classes
    assert describe_dataset("imagenet")["learning_rate"] == 2e-4
    assert describe_dataset("oxford_pets")["class_names"][:2] == ["abyssinian", "american_bulldog"]
    assert describe_dataset("eurosat")["class_names"][0] == "Annual Crop Land"


def test_constants_of_datasets_are_those_of_the_recipe() -> None:
    for name in PAPER:
        constants = {key: describe_dataset(name)[key] for key in ("learning_rate",) if key in describe_dataset(name)}
        if describe_dataset(name)["alpha"] != 0.5:
            constants["alpha"] = describe_dataset(name)["alpha"]
        assert published_constants(name) == constants


def test_variants_of_imagenet_are_told_by_wordnet_id() -> None:
    imagenet = describe_dataset("imagenet")["wnids"]
    assert len(set(imagenet)) == 1000
    assert imagenet == sorted(imagenet)
    subsets = {name: describe_dataset(name)["wnids"] for name in ("imagenet_a", "imagenet_r")}
    for wnids in subsets.values():
        assert len(set(wnids)) == 200
        assert set(wnids) <= set(imagenet)
    assert subsets["imagenet_a"] != subsets["imagenet_r"]


def test_two_classes_of_one_name_have_the_same_prompt() -> None:
    spec = describe_dataset("imagenet")
    names, prompts = unique_names(spec["class_names"], spec["wnids"])
    assert sorted(prompts.values()) == ["missile", "missile", "sunglasses", "sunglasses"]
    made = class_prompts(names, "a {}.", prompt_names=prompts)
    assert made.count(["a missile."]) == 2


def _pets(root: Path, small: Any) -> dict[str, Any]:
    names = small["oxford_pets"]["class_names"]
    small["oxford_pets"]["split_sha256"] = None
    small["oxford_pets"]["sizes"] = {"train": 74, "validation": 37, "test": 37}
    content: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for key, count in (("train", 2), ("val", 1), ("test", 1)):
        for label, name in enumerate(names):
            for number in range(count):
                file = f"{name}_{key}{number}.jpg"
                _picture(root / "oxford_pets" / "images" / file, label, len(key) + 40 * number)
                content[key].append([file, label, name])
    random.Random(0).shuffle(content["train"])
    (root / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    return content


def test_published_split_file(tmp_path: Path, small: Any) -> None:
    content = _pets(tmp_path, small)
    for root in (tmp_path, tmp_path / "oxford_pets"):
        data = open_dataset("oxford_pets", root)
        assert {name: len(part) for name, part in data.splits.items()} == small["oxford_pets"]["sizes"]
        assert data.splits["train"].labels == [label for _, label, _ in content["train"]]
        assert data.splits["train"].image(0).size == (12, 12)
        assert data.notes == []


def test_draw_is_coops_from_the_same_split_file(tmp_path: Path, small: Any) -> None:
    """CoOp seeds Python's global generator and samples each class in the order the split file first shows it."""
    content = _pets(tmp_path, small)
    random.seed(2)
    groups: dict[int, list[str]] = {}
    for file, label, _ in content["train"]:
        groups.setdefault(label, []).append(file)
    expected = [file for files in groups.values() for file in random.sample(files, 1)]
    train = open_dataset("oxford_pets", tmp_path).splits["train"]
    rows = few_shot_indices(train.labels, 1, 2)
    assert [Path(train.source(row)["path"]).name for row in rows] == expected


def test_what_is_wrong_is_said_before_hours_are_spent(tmp_path: Path, small: Any) -> None:
    content = _pets(tmp_path, small)
    path = tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json"
    path.write_text(json.dumps({**content, "test": content["test"][:-1]}))
    with pytest.raises(DataError, match="test has 36 pictures, published 37"):
        open_dataset("oxford_pets", tmp_path)
    assert open_dataset("oxford_pets", tmp_path, allow_other_split=True).notes
    path.write_text(json.dumps({**content, "test": [["x.jpg", 0, "beagle"]]}))
    with pytest.raises(DataError, match="label 0 is called 'beagle'"):
        open_dataset("oxford_pets", tmp_path)
    path.write_text(json.dumps({**content, "test": [["missing.jpg", 0, "abyssinian"]]}))
    with pytest.raises(DataError, match=r"not there, the first .*missing\.jpg"):
        open_dataset("oxford_pets", tmp_path)
    with pytest.raises(DataError, match="no folder"):
        open_dataset("oxford_pets", tmp_path / "nowhere")
    with pytest.raises(DataError, match="--root"):
        open_dataset("ucf101")
    with pytest.raises(ConfigurationError, match="oxford_pets"):
        open_dataset("pets")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["a.jpg", "0", "abyssinian"], "has the label '0', a str"),
        (["a.jpg", 0.0, "abyssinian"], "a float"),
        (["a.jpg", True, "american_bulldog"], "a bool"),
        (["a.jpg", None, "abyssinian"], "a NoneType"),
        (["a.jpg", 0], "must be \\[path, label, class name\\]"),
        (["a.jpg", 0, "abyssinian", 1], "must be"),
        ({"path": "a.jpg", "label": 0}, "must be"),
        ("a.jpg", "must be"),
        (7, "must be"),
        ([7, 0, "abyssinian"], "by its path"),
        (["../a.jpg", 0, "abyssinian"], "by its path"),
        (["/etc/passwd", 0, "abyssinian"], "by its path"),
        (["a.jpg", 37, "abyssinian"], "there are 37 classes"),
        (["a.jpg", -1, "abyssinian"], "there are 37 classes"),
        (["a.jpg", 0, "beagle"], "is called 'beagle', not 'abyssinian'"),
    ],
)
def test_a_row_of_a_split_file_that_cannot_be_read_is_named(tmp_path: Path, small: Any, row: Any, says: str) -> None:
    content = _pets(tmp_path, small)
    content["val"][5] = row
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    for accept in (False, True):
        with pytest.raises(DataError, match=rf"split_zhou_OxfordPets\.json: row 5 of 'val' .*{says}"):
            open_dataset("oxford_pets", tmp_path, allow_other_split=accept)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"train": []}', '{"train": {}, "val": [], "test": []}'])
def test_a_split_file_that_is_none(tmp_path: Path, small: Any, text: str) -> None:
    _pets(tmp_path, small)
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(text)
    with pytest.raises(DataError, match="split_zhou_OxfordPets"):
        open_dataset("oxford_pets", tmp_path)


def test_a_test_picture_in_train(
    tmp_path: Path, small: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _pets(tmp_path, small)
    file = tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json"
    moved = next(row for row in content["train"] if row[1] == content["test"][3][1])
    file.write_text(json.dumps({**content, "test": [*content["test"][:3], moved, *content["test"][4:]]}))
    with pytest.raises(DataError, match=rf"1 pictures of test are also in train: row 3 of test \({moved[0]}\)"):
        open_dataset("oxford_pets", tmp_path)
    assert "also in train" in open_dataset("oxford_pets", tmp_path, allow_other_split=True).notes[0]
    file.write_text(json.dumps({**content, "train": [*content["train"][:-1], content["train"][0]]}))
    with pytest.raises(DataError, match="names 1 pictures again"):
        open_dataset("oxford_pets", tmp_path)
    # Under another name: the files' content tells.
    file.write_text(json.dumps(content))
    images = tmp_path / "oxford_pets" / "images"
    (images / content["test"][3][0]).write_bytes((images / content["train"][8][0]).read_bytes())
    lines = overlaps(open_dataset("oxford_pets", tmp_path).splits)
    assert lines == ["1 picture is in train and in test: train row 8 and test row 3"]
    arguments = ("benchmark", "--dataset", "oxford_pets", "--root", tmp_path, "--check")
    code, text, _ = run(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(text)["oxford_pets"]["overlaps"] == lines
    assert lines[0] in run(capsys, *arguments)[1]


def test_sizes_of_the_published_file_and_other_rows(tmp_path: Path, small: Any) -> None:
    _pets(tmp_path, small)
    small["oxford_pets"]["split_sha256"] = "0" * 64
    with pytest.raises(DataError, match=r"rows of split_zhou_OxfordPets\.json are not those of the published"):
        open_dataset("oxford_pets", tmp_path)


def test_sizes_were_counted_in_the_split_files() -> None:
    for name in ("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "dtd", "eurosat", "ucf101"):
        spec = describe_dataset(name)
        assert spec["sizes_are"] == "split file"
        assert len(spec["split_sha256"]) == 64
    assert {spec["sizes_are"] for spec in suite_datasets().values() if "sizes" in spec} == {
        "split file", "official", "derived",
    }  # fmt: skip


def test_a_missing_split_file_is_named(tmp_path: Path, small: Any) -> None:
    _pets(tmp_path, small)
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").unlink()
    for root in (tmp_path, tmp_path / "oxford_pets"):
        with pytest.raises(DataError, match=r"oxford_pets/split_zhou_OxfordPets\.json is not there"):
            open_dataset("oxford_pets", root, allow_other_split=True)
    (tmp_path / "elsewhere" / "dtd").mkdir(parents=True)
    with pytest.raises(DataError, match=r"split_zhou_OxfordPets\.json is not there"):
        open_dataset("oxford_pets", tmp_path / "elsewhere")


def test_a_copy_in_another_form_is_matched_by_name(tmp_path: Path, small: Any) -> None:
    names = small["oxford_pets"]["class_names"]
    for split in ("train", "test"):
        for label, name in enumerate(names):
            _picture(tmp_path / "pets" / split / name.replace("_", " ").title() / f"{label}.png", label)
    with pytest.raises(DataError, match="not the published split"):
        open_dataset("oxford_pets", tmp_path / "pets")
    data = open_dataset("oxford_pets", tmp_path / "pets", allow_other_split=True)
    assert data.splits["test"].class_names == names
    assert [names[label] for label in sorted(data.splits["test"].labels)] == names
    assert "another form" in data.notes[0]


def test_variant_lists(tmp_path: Path, small: Any) -> None:
    spec = small["fgvc_aircraft"]
    spec["sizes"] = {"train": 100, "validation": 100, "test": 100}
    for number, (key) in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(spec["class_names"]):
            lines.append(f"{number}{label:03d} {name}")
            _picture(tmp_path / "fgvc_aircraft" / "images" / f"{number}{label:03d}.jpg")
        (tmp_path / "fgvc_aircraft" / f"images_variant_{key}.txt").write_text("\n".join(lines))
    assert open_dataset("fgvc_aircraft", tmp_path).splits["train"].labels == list(range(100))
    file = tmp_path / "fgvc_aircraft" / "images_variant_val.txt"
    whole = file.read_text()
    for line in ("1000", "1000 Concorde", ""):
        file.write_text(f"{line or 'x'}\n{whole}")
        with pytest.raises(DataError, match=r"images_variant_val\.txt: line 1 must be"):
            open_dataset("fgvc_aircraft", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"images_variant_val\.txt cannot be read"):
        open_dataset("fgvc_aircraft", tmp_path)


def test_numbered_and_wordnet_folders(tmp_path: Path, small: Any) -> None:
    small["imagenetv2"]["sizes"] = {"test": 1000}
    top = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    for label in range(1000):
        _picture(top / str(label) / "0.png", label)
    assert open_dataset("imagenetv2", tmp_path).splits["test"].labels == list(range(1000))
    small["imagenet_r"]["sizes"] = {"test": 200}
    order = {wnid: index for index, wnid in enumerate(small["imagenet"]["wnids"])}
    for wnid in small["imagenet_r"]["wnids"]:
        _picture(tmp_path / "imagenet-rendition" / "imagenet-r" / wnid / "0.png", order[wnid])
    data = open_dataset("imagenet_r", tmp_path)
    assert data.splits["test"].labels == [order[wnid] for wnid in small["imagenet_r"]["wnids"]]
    assert len(data.class_names) == 1000
    (tmp_path / "imagenet-rendition" / "imagenet-r" / ".ipynb_checkpoints").mkdir()
    open_dataset("imagenet_r", tmp_path)
    (tmp_path / "imagenet-rendition" / "imagenet-r" / "n00000000").mkdir()
    with pytest.raises(DataError, match="1 unknown"):
        open_dataset("imagenet_r", tmp_path)


def test_shipped_tasks_are_described_too() -> None:
    data = open_dataset("food")
    assert len(data.splits["test"]) == 149
    assert open_dataset("fxemoji").class_names == open_dataset("all-categories").class_names
