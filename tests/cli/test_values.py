"""Option values that are files, lists or names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support import run

from taskres_hf.cli import values
from taskres_hf.errors import ClassNamesError, ConfigurationError

TEN = [f"class {number}" for number in range(11)]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        ({"0": "cat", "1": "dog"}, ["cat", "dog"]),
        ({"1": "dog", "0": "cat"}, ["cat", "dog"]),
        ({"dog": 1, "cat": 0}, ["cat", "dog"]),
        ({str(number): TEN[number] for number in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)}, TEN),  # 10 after 2
        ({"n02": "cat", "n01": "dog"}, {"n02": "cat", "n01": "dog"}),  # the data's label to class name
        ({"1": "bird", "2": "flower", "10": "mammal"}, {"1": "bird", "2": "flower", "10": "mammal"}),
    ],
)
def test_class_names_in_json(tmp_path: Path, content: Any, names: Any) -> None:
    (tmp_path / "labels.JSON").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert values.read_class_names(str(tmp_path / "labels.JSON")) == names
    assert values.read_class_names(content) == names


def test_class_names_in_text_and_in_line(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufefftabby cat\n\n beagle \r\n", encoding="utf-8")
    assert values.read_class_names(str(tmp_path / "names.txt")) == ["tabby cat", "beagle"]
    (tmp_path / "names").write_text("cat, black\ndog\n")
    assert values.read_class_names(str(tmp_path / "names")) == ["cat, black", "dog"]
    assert values.read_class_names("tabby cat, beagle,St. Bernard") == ["tabby cat", "beagle", "St. Bernard"]
    assert values.read_class_names("jpg/png,raw") == ["jpg/png", "raw"]
    assert values.read_class_names(None) is None


@pytest.mark.parametrize("name", ["missing.txt", "missing.json", "missing", "some/where", "nmaes.txt"])
def test_a_mistyped_file_name_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigurationError, match=name.split(".")[0]) as caught:
        values.read_class_names(name)
    assert ("did you mean 'names.txt'" in str(caught.value)) == (name == "nmaes.txt")


def test_a_mistyped_path_with_a_comma(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no file"):
        values.read_class_names(f"{tmp_path}/cats,dogs.txt")


@pytest.mark.parametrize(
    "content", ["{", '{"0": "cat", "0": "dog"}', "[1, 2]", '["cat", "cat"]', '"cat"', "{}", '{"0": 1.5}']
)
def test_json_that_holds_no_class_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigurationError):
        values.read_class_names(str(tmp_path / "labels.json"))
    assert issubclass(ClassNamesError, ConfigurationError)


def test_a_description_may_be_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"cat": "A cat.", "dog": ["A dog.", "Barks."]}))
    assert values.read_descriptions(tmp_path / "d.json") == {"cat": ["A cat."], "dog": ["A dog.", "Barks."]}
    (tmp_path / "d.json").write_text('["A cat."]')
    with pytest.raises(ConfigurationError, match="must hold a JSON object"):
        values.read_descriptions(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0, 9]", "row 9; the split has 9"), ("[-1]", "row -1"), ("[1, 1]", "twice"), ("[]", "no list of rows"),
        ("[true]", "no list of rows"), ("[1.0]", "no list of rows"),
        ('{"few_shot": {"shots": null}}', "trained on all pictures"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_replayed(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        values.read_indices(tmp_path / "rows.json", 9)


def test_the_output_folder_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my photos").mkdir()
    (tmp_path / "labels.csv").write_text("path,label\n")
    monkeypatch.chdir(tmp_path / "my photos")
    names = [".", "../my photos/", "../labels.csv", "timm/oxford-iiit-pet"]
    folders = [values.default_output(name).name for name in names]
    assert folders == ["my photos-taskres", "my photos-taskres", "labels-taskres", "oxford-iiit-pet-taskres"]


def test_devices() -> None:
    assert values.check_device(None) is None
    assert values.check_device("auto") is None
    assert values.check_device("cpu") == values.check_device(None, cpu=True) == "cpu"
    for name in ("gpu", "cuda:x", "", "cpu:3", *(["cuda", "cuda:1"] if not torch.cuda.is_available() else ["cuda:99"])):
        with pytest.raises(ConfigurationError, match="--device"):
            values.check_device(name)
    with pytest.raises(ConfigurationError, match="contradict"):
        values.check_device("mps", cpu=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "command", [["train", "/no/data"], ["evaluate", "/no", "/no/data"], ["predict", "/no", "/no.png"]]
)
def test_a_missing_device_is_found_before_any_work(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, _, error = run(capsys, *command, "--device", "cuda")
    assert code == 1
    assert "finds no cuda device" in error


def test_numbers() -> None:
    assert values.read_numbers("1,2,16", "--shots") == [1, 2, 16]
    with pytest.raises(typer.BadParameter):
        values.read_numbers("1,a", "--shots")
