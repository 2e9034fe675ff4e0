"""`taskres train` and `taskres evaluate` as people use them: an account, an honest number, early refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from support import run

DATA = Path(__file__).parents[2] / "taskres_hf" / "demo_data"


@pytest.fixture
def flat(tmp_path: Path, splits: DatasetDict, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of class folders without splits, with a stray file; the working directory is beside it."""
    folder = tmp_path / "photos"
    for label, name in enumerate(("mammal", "bird", "reptile or frog")):
        (folder / name).mkdir(parents=True)
        rows = [row for row in splits["train"] if row["label"] == label][:8]
        for number, row in enumerate(rows):
            row["image"].convert("RGB").save(folder / name / f"{number}.png")
    (folder / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKRES_BASE_MODEL", "shipped")
    return folder


def _json(capsys: pytest.CaptureFixture[str], *command: object) -> dict[str, Any]:
    code, text, error = run(capsys, *command, "--json")
    assert code == 0, error
    assert error == ""
    value: dict[str, Any] = json.loads(text)
    return value


def test_a_folder_is_enough(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    code, text, _ = run(capsys, "train", "photos/", "--quiet")
    assert code == 0
    assert "24 pictures of 3 classes" in text
    assert "notes.txt" in text
    assert "5-fold cross-validation" in text
    assert "Saved" in text
    assert "photos-taskres" in text
    config = json.loads((flat.parent / "photos-taskres" / "config.json").read_text())
    assert config["metrics"]["method"] == "cross-validation"
    assert config["data"]["account"]["splits"][0]["pictures"] == 24
    card = (flat.parent / "photos-taskres" / "README.md").read_text()
    described = json.loads(run(capsys, "info", "photos-taskres", "--json")[1])["measured_on"]
    for words in (text, card, described):  # nobody may take it for the accuracy on a test split
        assert "the training pictures, 5-fold cross-validation (24 pictures)" in " ".join(words.split())
    code, _, error = run(capsys, "train", "photos", "--quiet")
    assert code == 1
    assert "--overwrite" in error


def test_training_pictures_are_never_the_measure(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    result = _json(capsys, "train", "photos", "--shots", 4)
    assert result["method"] == "cross-validation"
    assert result["num_images"] == 12
    assert result["account"]["left_out"][0]["examples"] == ["notes.txt"]
    rest = _json(capsys, "evaluate", "photos-taskres", "photos")
    assert (rest["split"], rest["num_images"]) == ("train", 12)
    assert rest["account"]["splits"][0]["use"] == "measured"
    assert "12 of 24" in rest["warnings"][0]
    everything = _json(capsys, "evaluate", "photos-taskres", "photos", "--include-train-pictures")
    assert everything["num_images"] == 24
    code, _, error = run(capsys, "evaluate", "photos-taskres", "photos", "--split", "test")
    assert code == 1
    assert "no split 'test'" in error


def test_a_hold_out_on_request(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    result = _json(capsys, "train", "photos", "--holdout", 0.25)
    assert (result["method"], result["num_images"], result["train_images"]) == ("held-out", 6, 18)
    stopped = _json(capsys, "train", "photos", "--holdout", 0.25, "--early-stopping-patience", 3, "--overwrite")
    assert stopped["method"] == "cross-validation"  # the held-out pictures chose the epoch
    assert _json(capsys, "train", "photos", "--folds", 0, "-o", "x")["method"] is None
    assert _json(capsys, "train", "photos", "--folds", 3, "-o", "y")["folds"] == 3


def test_early_stopping_never_looks_at_the_test_split(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    stop = ["--early-stopping-patience", 2, "--shots", 2]
    result = _json(capsys, "train", DATA / "faces", *stop)
    assert (result["split"], result["method"]) == ("test", "held-out")  # chosen on validation
    (flat / "train").mkdir()
    (flat / "test").mkdir()
    for name in ("mammal", "bird"):
        (flat / name).rename(flat / "train" / name)
        (flat / "test" / name).mkdir()
        (flat / "train" / name / "0.png").rename(flat / "test" / name / "0.png")
    (flat / "reptile or frog").rename(flat.parent / "elsewhere")
    code, _, error = run(capsys, "train", "photos", *stop)
    assert code == 1
    assert "--holdout 0.2" in error
    assert run(capsys, "train", "photos", *stop, "--eval-split", "none", "-q")[0] == 1


def test_a_replayed_draw_can_be_replayed(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    for options in (["--shots", 2, "-o", "a"], ["--indices", "a", "-o", "b"], ["--indices", "b", "-o", "c"]):
        _json(capsys, "train", "photos", "--epochs", 2, *options)
    rows = [json.loads((flat.parent / name / "config.json").read_text())["few_shot"]["indices"] for name in "abc"]
    assert rows[0] == rows[1] == rows[2]
    for options, message in ((["--shots", 2], "--shots"), (["--holdout", 0.2], "--holdout")):
        code, _, error = run(capsys, "train", "photos", "--indices", "a", "-o", "d", *options)
        assert code == 1
        assert message in error


def test_what_is_saved_loads_again(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    sentences = {"mammal": "A small mammal.", "bird": "A small bird.", "reptile or frog": ["A frog.", "A snake."]}
    (flat.parent / "d.json").write_text(json.dumps(sentences))
    _json(capsys, "train", "photos", "--descriptions", "d.json", "-o", "out")
    assert run(capsys, "predict", "out", flat / "bird" / "0.png", "--quiet")[0] == 0
    assert _json(capsys, "info", "out")["num_classes"] == 3


def test_class_names_may_rename_folders(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    (flat.parent / "names.json").write_text('{"bird": "small bird", "mammal": "fox", "reptile or frog": "frog"}')
    result = _json(capsys, "train", "photos", "--class-names", "names.json", "-o", "out")
    assert "small bird" in result["per_class"]
    assert result["account"]["class_pairs"]["bird"] == "small bird"


def test_without_the_default_base(
    capsys: pytest.CaptureFixture[str], flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TASKRES_BASE_MODEL")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = run(capsys, "train", "photos", "--quiet", "-o", "out")
    assert code == 1
    for part in ("openai/clip-vit-base-patch16", "hf download", "TASKRES_BASE_MODEL", "--base-model shipped"):
        assert part in error
    assert "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["photos", "--dataset", "other"], 2, "given twice"),
        (["photos", "--report-to", "nothing-such"], 1, "nothing-such"),
        (["photos", "--class-names", "missing.txt"], 1, "no file 'missing.txt'"),
        (["photos", "--prompt-names", "missing.json"], 1, "missing.json"),
        (["photos", "--holdout", "1.5"], 1, "holdout"),
        (["photos", "--output-dir", "photos/notes.txt"], 1, "is a file"),
        (["photos", "--eval-split", "test"], 1, "no split 'test'"),
    ],
)
def test_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], flat: Path, options: list[str], code: int, message: str
) -> None:
    before = sorted(flat.parent.rglob("*"))
    result, _, error = run(capsys, "train", *options)
    assert result == code
    assert message in " ".join(error.replace("│", " ").split())
    assert sorted(flat.parent.rglob("*")) == before


def test_folds_that_are_none(capsys: pytest.CaptureFixture[str], flat: Path) -> None:
    code, _, error = run(capsys, "train", "photos", "--folds", 1)
    assert code == 1
    assert "--folds must be at least 2, or 0" in error
