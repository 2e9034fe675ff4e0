"""`--reject` of the commands, as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from support import run

from taskres_hf.demo import demo_dataset


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with 20 pictures each to train on and 10 to test, three pictures of noise, and a broken one."""
    here, splits = tmp_path_factory.mktemp("world"), demo_dataset("digits")
    for split, most in (("train", 20), ("test", 10)):
        for label, name in ((0, "zero"), (7, "seven")):
            folder = here / "photos" / split / name
            folder.mkdir(parents=True)
            rows = [row for row in splits[split] if row["label"] == label][:most]
            for number, row in enumerate(rows):
                row["image"].convert("RGB").save(folder / f"{number}.png")
    (here / "noise").mkdir()
    draw = np.random.default_rng(0)
    for number in range(3):
        pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(here / "noise" / f"{number}.png")
    (here / "noise" / "broken.png").write_bytes(b"no picture")
    return here


@pytest.fixture(scope="module")
def classifier(world: Path) -> Path:
    from taskres_hf.cli import main

    command = [
        "train",
        str(world / "photos"),
        "--base-model",
        "shipped",
        "--reject",
        "0.1",
        "-q",
        "-o",
        str(world / "c"),
    ]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    return world / "c"


def test_a_threshold_is_trained_shown_and_used(
    classifier: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "reject: 0.1" in (classifier / "run.yaml").read_text()
    code, out, _ = run(capsys, "info", classifier, "--json")
    stored = json.loads(out)["rejection"]
    assert (code, stored["rate"]) == (0, 0.1)
    assert stored["pictures"] == len(list((world / "photos" / "train").rglob("*.png")))
    code, out, _ = run(capsys, "evaluate", classifier, world / "photos")
    assert "reject at most 10.0 % of pictures of the classes; here it rejects" in " ".join(out.split())
    code, out, _ = run(capsys, "evaluate", classifier, world / "photos", "--json")
    found = json.loads(out)
    assert 0.0 <= found["rejected"] < 0.5 <= found["accuracy_of_kept"] <= 1.0


def test_predict_says_unknown_in_every_format(
    classifier: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = world / "noise"
    code, out, _ = run(capsys, "predict", classifier, noise, "--reject", "-q")
    assert code == 3  # one is broken
    assert out.count(": unknown") == 3
    code, out, _ = run(capsys, "predict", classifier, noise, "--reject", "--json", "--top-k", "2")
    rows = {Path(row["file"]).name: row for row in json.loads(out)}
    assert rows["0.png"]["rejected"] is True
    assert rows["0.png"]["predictions"][0] == {"label": "unknown", "score": None}
    assert rows["0.png"]["predictions"][1]["label"] in ("zero", "seven")
    assert rows["broken.png"]["rejected"] is None
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        command = ["predict", classifier, noise, "--reject", "--unknown-label", "=none()", "-o", tmp_path / name, "-q"]
        assert run(capsys, *command)[0] == 3
    lines = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [(line["label"], line["score"], line["rejected"]) for line in lines] == [
        *[("'=none()", "", "true")] * 3, ("", "", "")
    ]  # fmt: skip
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["rejected"] for row in table] == [True, True, True, None]
    assert table[0]["labels"] == ["=none()"]
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["rejected"] is True


def test_without_the_option_nothing_is_rejected(
    classifier: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "predict", classifier, world / "noise", "-o", tmp_path / "a.csv", "-q")
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "file,label,score,error"
    _, out, _ = run(capsys, "predict", classifier, world / "noise", "--json")
    assert all("rejected" not in row for row in json.loads(out))


def test_what_cannot_be_is_said(
    classifier: Path, world: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "predict", classifier, world / "noise", "--reject", "--unknown-label", "seven")
    assert code == 1
    assert "no class of the classifier" in " ".join(err.split())
    code, _, err = run(capsys, "predict", classifier, world / "noise", "--unknown-label", "none")
    assert code == 2
    code, _, err = run(capsys, "predict", trained, world / "noise", "--reject")
    assert code == 1
    assert "has no threshold" in err
    command = ["train", world / "photos", "--base-model", "shipped", "-o", world / "d", "--reject"]
    code, _, err = run(capsys, *command, "0.001")
    assert code == 1
    assert "needs 999 training pictures" in " ".join(err.split())
    assert not (world / "d" / "config.json").exists()
    code, _, err = run(capsys, *command, "5")
    assert code == 1
    assert "above 0 and below 1" in " ".join(err.split())
