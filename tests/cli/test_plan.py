"""`taskres plan` as people use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import DatasetDict
from support import run

from taskres_hf.analysis import planning


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, splits: DatasetDict) -> Path:
    """Three classes with five pictures each to learn from and eight to test on."""
    folder = tmp_path_factory.mktemp("plan") / "photos"
    for split, most in (("train", 5), ("test", 8)):
        for label, name in enumerate(("mammal", "bird", "reptile or frog")):
            (folder / split / name).mkdir(parents=True)
            rows = [row for row in splits[split] if row["label"] == label][:most]
            for number, row in enumerate(rows):
                row["image"].convert("RGB").save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKRES_BASE_MODEL", "shipped")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_a_folder_is_enough(capsys: pytest.CaptureFixture[str], photos: Path, here: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    code, text, error = run(capsys, "plan", photos, "--target", 0.6, "--figure", "curve.png", "-q")
    assert code == 0, error
    assert "Measured on 24 held-out pictures; zero-shot" in text
    for word in ("pictures a class", "80 % interval", "reptile or frog", "60.0 % accuracy", "Wrote curve.png"):
        assert word in text
    assert sorted(path.name for path in here.iterdir()) == ["curve.csv", "curve.png"]


def test_json_is_one_value(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    code, text, error = run(capsys, "plan", photos, "--target", 0.6, "--metric", "balanced", "--json")
    assert code == 0, error
    found = json.loads(text)
    assert found["metric"] == "balanced"
    assert found["method"] == "held-out"
    assert found["pictures"] == 15
    assert found["status"] in ("reached", "reachable", "beyond", "level", "unknown")
    assert {row["name"] for row in found["classes"]} == {"mammal", "bird", "reptile or frog"}
    assert found["sentence"]
    assert found["shots"] == 5  # the geometric mean of 5, 5 and 5, without what rounding leaves
    assert [shots for shots, _ in found["measured"]] == [round(shots, 6) for shots, _ in found["measured"]]


def test_few_pictures_and_no_test_split_say_that_they_are_too_few(
    capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    code, text, _ = run(capsys, "plan", photos, "--eval-split", "none", "-q")
    assert code == 0
    said = " ".join(text.split())
    assert "Cannot tell yet how many pictures 90.0 % accuracy takes" in said
    assert "more a class first, and ask again" in said
    assert "Measured on 15 pictures left out" in said
    assert "If they come in series" in said


def test_a_classifier_brings_its_prompts_and_base(capsys: pytest.CaptureFixture[str], photos: Path, here: Path) -> None:
    assert run(capsys, "train", photos, "-o", "trained", "-q", "--json")[0] == 0
    asked = ("plan", photos, "--target", 0.6, "--json")
    first, second = (json.loads(run(capsys, *asked, *more)[1]) for more in ((), ("--from", "trained")))
    assert first["measured"] == second["measured"]
    code, _, error = run(capsys, "plan", photos, "--from", "trained", "--template", "a {}")
    assert code == 1
    assert "leave out templates" in error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--target", "90"], 1, "between 0 and 1"),
        (["--figure", "curve.pdf"], 1, ".png or .svg"),
        (["--figure", "."], 1, ".png or .svg"),
        (["--figure", f"{__file__}/curve.png"], 1, "Cannot write"),
        (["--metric", "f1"], 2, "accuracy"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    capsys: pytest.CaptureFixture[str], photos: Path, here: Path, arguments: list[str], code: int, words: str
) -> None:
    found, _, error = run(capsys, "plan", photos, *arguments)
    assert found == code
    assert words in error
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", ["plan", "difficulty", "suggest"])
def test_several_labels_are_refused_without_an_option_that_is_not_there(
    capsys: pytest.CaptureFixture[str], photos: Path, here: Path, command: str
) -> None:
    folder = photos / "train" / "bird"
    (here / "tags.csv").write_text(
        f"file,label\n{folder}/0.png,cat|dog\n{folder}/1.png,dog\n{folder}/2.png,cat\n", encoding="utf-8"
    )
    data = ["--class-names", "cat,dog", folder, "--labelled", "tags.csv"] if command == "suggest" else ["tags.csv"]
    code, _, error = run(capsys, command, *data, "--base-model", "shipped")
    assert code == 1
    assert "several labels" in " ".join(error.split())
    assert "(--multi-label of taskres train; other commands take one label per picture)" in " ".join(error.split())


def test_without_matplotlib_the_figure_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    code, _, error = run(capsys, "plan", photos, "--figure", "curve.png")
    assert code == 1
    assert 'pip install "taskres_hf[plots]"' in error
