"""The command line as a user meets it: output, JSON, exit codes, messages."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict
from support import run

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.demo import check_task
from taskres_hf.errors import ConfigurationError
from taskres_hf.predicting import PredictionWriter, classify_files

DATA = Path(__file__).parents[2] / "taskres_hf" / "demo_data"


@pytest.fixture
def pictures(tmp_path: Path, splits: DatasetDict) -> Path:
    """A folder of four pictures, one of them broken."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for number in range(3):
        splits["test"][number]["image"].convert("RGB").save(folder / "deep" / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def test_train_evaluate_predict_info(
    capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path, pictures: Path
) -> None:
    out = tmp_path / "out"
    train = ["train", "--base-model", base, "--dataset", DATA / "animals-plants", "--shots", 4, "-o", out, "--quiet"]
    code, text, _ = run(capsys, *train, "--template", "a drawing of a {}.")
    assert code == 0
    assert "zero-shot" in text
    assert "41.5 %" in text
    code, text, error = run(capsys, *train)
    assert code == 1
    assert "--overwrite" in error
    assert run(capsys, *train, "--overwrite", "--fp16-residual")[0] == 0

    code, text, _ = run(capsys, "evaluate", out, "--dataset", DATA / "animals-plants", "--json")
    metrics = json.loads(text)
    assert code == 0
    assert metrics["split"] == "test"
    assert metrics["num_images"] == 159
    code, text, _ = run(capsys, "evaluate", out, "--dataset", DATA / "animals-plants", "--quiet")
    assert "reptile or frog" in text
    assert f"{100 * metrics['accuracy']:.1f} %" in text

    code, text, error = run(capsys, "predict", out, pictures, "--top-k", 2, "--json")
    rows = json.loads(text)
    assert code == 3
    assert [row["error"] is None for row in rows] == [False, True, True, True]
    assert len(rows[1]["predictions"]) == 2
    assert "broken.jpg" in error
    assert run(capsys, "predict", out, pictures, "--allow-skipped")[0] == 0

    code, text, _ = run(capsys, "info", out)
    assert code == 0
    for fact in ("base model", "a photo of a {}.", "shots", "zero shot accuracy", "residual", "torch"):
        assert fact in text
    assert json.loads(run(capsys, "info", out, "--json")[1])["shots"] == 4


def test_json_is_the_whole_standard_output(base: str, tmp_path: Path) -> None:
    """In a process of its own, so that nothing any library prints can hide."""
    command = [
        sys.executable, "-m", "taskres_hf.cli", "train", "--base-model", base, "--dataset", str(DATA / "food"),
        "--shots", "1", "--epochs", "2", "-o", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert result["train_images"] == 7
    assert [split["name"] for split in result["account"]["splits"] if split["use"] == "train"] == ["train"]
    assert 0 < result["accuracy"] < 1
    assert done.stderr == ""


def test_predict_files(capsys: pytest.CaptureFixture[str], trained: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("r.csv", "r.jsonl", "r.parquet"):
        code, text, _ = run(capsys, "predict", trained, pictures, "--top-k", 2, "-o", tmp_path / name, "--quiet")
        assert code == 3
        assert "3 pictures classified" in text
    with (tmp_path / "r.csv").open() as stream:
        table = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    parquet = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert list(table[0]) == ["file", "label", "score", "label_2", "score_2", "error"]
    for row, line, cells in zip(table, lines, parquet, strict=True):
        assert row["file"] == line["file"] == cells["file"]
        assert bool(row["error"]) == bool(line["error"]) == bool(cells["error"])
        if not row["error"]:
            assert row["label"] == line["predictions"][0]["label"] == cells["labels"][0]
            assert float(row["score_2"]) == pytest.approx(cells["scores"][1], abs=1e-5)


def test_strength(capsys: pytest.CaptureFixture[str], trained: Path, pictures: Path) -> None:
    data = ["--dataset", DATA / "animals-plants"]
    metrics = json.loads(run(capsys, "evaluate", trained, *data, "--strength", 0, "--json")[1])
    assert metrics["accuracy"] == metrics["zero_shot_accuracy"]
    assert metrics["strength"] == 0.0
    assert "strength" not in json.loads(run(capsys, "evaluate", trained, *data, "--json")[1])
    assert "at strength 0.5" in run(capsys, "evaluate", trained, *data, "--strength", 0.5, "--quiet")[1]
    scores = []
    for strength in (None, 1, 0.5, 0):
        words = [] if strength is None else ["--strength", strength]
        code, text, _ = run(capsys, "predict", trained, pictures / "deep", "--top-k", 8, "--json", *words)
        assert code == 0
        scores.append({top["label"]: top["score"] for top in json.loads(text)[0]["predictions"]})
    assert scores[0] == scores[1]
    assert scores[1] != scores[2] != scores[3]
    for wrong in (2, -0.5, "much"):
        assert run(capsys, "predict", trained, pictures / "deep", "--strength", wrong)[0] == 2
    assert run(capsys, "predict", trained, pictures / "deep", "--strength", "nan")[0] in (1, 2)


def test_predictions_are_those_of_pipeline(trained: Path, pictures: Path) -> None:
    from transformers import pipeline

    files = [str(file) for file in sorted((pictures / "deep").iterdir())]
    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    found = list(classify_files(model, files, top_k=3, batch_size=2))
    expected = pipeline("image-classification", model=str(trained))(files, top_k=3)
    for ours, theirs in zip(found, expected, strict=True):
        assert [top["label"] for top in ours["predictions"]] == [top["label"] for top in theirs]
        scores = [top["score"] for top in theirs]
        assert [top["score"] for top in ours["predictions"]] == pytest.approx(scores, abs=1e-5)


def test_spreadsheet_formulas_are_defused(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"")
    here = os.getcwd()
    os.chdir(folder)
    try:
        PIL.Image.new("RGB", (8, 8)).save("=1+1.png")
        run(capsys, "predict", trained, "=1+1.png", "-o", tmp_path / "r.csv", "--quiet")
    finally:
        os.chdir(here)
    assert "\n'=1+1.png," in (tmp_path / "r.csv").read_text()


def test_an_interrupted_prediction_goes_on(
    capsys: pytest.CaptureFixture[str], trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "r.csv", PredictionWriter.write
    command = ["predict", trained, pictures / "deep", "-o", output, "--json", "--batch-size", 1]

    def write_one(self: PredictionWriter, row: dict[str, object]) -> None:
        write(self, row)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "write", write_one)
        code, text, error = run(capsys, *command)
    assert (code, text) == (130, "")
    assert error.startswith("Interrupted. The rows so far are kept in")
    assert "--resume" in error
    assert not output.exists()
    code, text, _ = run(capsys, *command, "--resume")
    assert code == 0
    assert json.loads(text) == {"output": str(output), "classified": 3, "skipped": 0, "resumed": 1}
    assert run(capsys, "predict", trained, pictures, "--resume")[0] == 2


def test_replaying_a_draw(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    common = ["--base-model", base, "--dataset", DATA / "faces", "--epochs", 3, "--json"]
    run(capsys, "train", *common, "--shots", 3, "--seed", 5, "-o", tmp_path / "a")
    (tmp_path / "rows.json").write_text(
        json.dumps(json.loads((tmp_path / "a" / "config.json").read_text())["few_shot"])
    )
    for source in (tmp_path / "a", tmp_path / "rows.json"):
        run(capsys, "train", *common, "--seed", 5, "--indices", source, "-o", tmp_path / f"b-{source.name}")
        weights = [(folder / "model.safetensors") for folder in (tmp_path / "a", tmp_path / f"b-{source.name}")]
        assert weights[0].read_bytes()[-6912:] == weights[1].read_bytes()[-6912:]  # 9 x 192 fp32
    (tmp_path / "bad.json").write_text("[0, 999999]")
    code, _, error = run(capsys, "train", *common, "--indices", tmp_path / "bad.json", "-o", tmp_path / "c")
    assert code == 1
    assert "another dataset" in error


def test_checkpoints_and_resume(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    common = ["train", "--base-model", base, "--dataset", DATA / "faces", "--shots", 2, "--epochs", 4, "--json"]
    run(capsys, *common, "-o", tmp_path / "a", "--save-epochs", 2)
    assert (tmp_path / "a" / "checkpoint-2" / "model.safetensors").exists()
    first = (tmp_path / "a" / "model.safetensors").read_bytes()[-6912:]
    code, _, _ = run(capsys, *common, "-o", tmp_path / "a", "--save-epochs", 2, "--resume")
    assert code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes()[-6912:] == first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "Missing argument"),
        (["train", "--base-model", "x", "--dataset", "/no/where", "-o", "OUT"], 1, "no dataset at /no/where"),
        (["train", "--base-model", "x", "--dataset", "DATA", "-o", "OUT", "--recipe", "best"], 2, "'auto', 'auto-v1'"),
        (["train", "--base-model", "x", "--dataset", "DATA", "-o", "OUT", "--shots", "0"], 2, "shots"),
        (["train", "--base-model", "BASE", "--dataset", "DATA", "-o", "OUT", "--template", "no place"], 1, "{}"),
        (
            ["train", "--base-model", "x", "--dataset", "DATA", "-o", "OUT", "--train-split", "nope"],
            1,
            "no split 'nope'",
        ),
        (["evaluate", "/no/model", "--dataset", "DATA"], 1, "/no/model"),
        (["predict", "ART", "/no/picture.png"], 3, "no file"),
        (["predict", "ART", "EMPTY"], 1, "no pictures in"),
        (["predict", "ART", "EMPTY", "-o", "x.xlsx"], 1, ".csv, .jsonl, .parquet"),
        (["info", "EMPTY"], 1, "config.json"),
        (["demo", "--shots", "a"], 2, "whole numbers"),
        (["demo", "--task", "nope"], 1, "animals-plants"),
    ],
)
def test_messages_and_exit_codes(
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    base: str,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"DATA": DATA / "food", "OUT": tmp_path / "out", "ART": trained, "EMPTY": tmp_path / "empty", "BASE": base}
    found, _, error = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert found == code
    assert message in " ".join(re.sub(r"[│\n]", " ", error).split())
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_errors_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "info", "/no/model", "--json")
    assert code == 1
    assert json.loads(text)["type"] == "ArtifactError"


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "info", "push", "demo"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, text, _ = run(capsys, command, "--help")
    assert code == 0
    assert len(text) > 500


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1].startswith("taskres_hf 0.")


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["demo", "--task", "food", "--shots", "1,16", "--seeds", "1", "-o", tmp_path / "demo", "--quiet"]
    code, text, _ = run(capsys, *arguments)
    assert code == 0
    assert "40.3" in text
    assert text.count(" %)") == 6
    code, text, _ = run(capsys, *arguments[:-1], "--json")
    result = json.loads(text)
    assert result["tasks"]["food"]["trained"]["16"][0] > result["tasks"]["food"]["zero_shot"]
    with pytest.raises(ConfigurationError, match="food"):
        check_task("nope")


def test_demo_replaces_no_other_classifier(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "taskres", "data": {"name": "my pictures"}}')
    code, _, error = run(capsys, "demo", "--task", "food", "-o", tmp_path, "--quiet")
    assert code == 1
    assert "--overwrite" in error
    assert "my pictures" in config.read_text()


def test_demo_of_all_tasks_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "demo", "--all", "--shots", "1", "--seeds", "1", "--markdown", "--quiet")
    assert code == 0
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 1 + 7 + 1
