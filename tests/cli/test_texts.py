"""`taskres train`, `evaluate`, `predict`, `info` and `verify` on texts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import run
from text_models import CLASSES, TEXTS
from text_models import text_base as text_base

from taskres_hf import TaskResForSequenceClassification

ROWS = [(text, name) for name, texts in TEXTS.items() for text in texts]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("table") / "texts.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *ROWS])
    return path


@pytest.fixture(scope="module")
def saved(text_base: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier; do not change it."""
    folder: Path = tmp_path_factory.mktemp("cli") / "saved"
    TaskResForSequenceClassification.from_base(text_base(), CLASSES).save_pretrained(folder)
    return folder


def test_train_evaluate_info_and_verify(
    text_base: Callable[..., str], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, error = run(capsys, "train", table, "--base-model", text_base(), "--holdout", 0.3, "-o", out)
    assert code == 0, error
    assert "texts" in text
    assert "picture" not in text
    assert run(capsys, "verify", out, "--dataset", table, "--holdout", 0.3)[0] == 0
    code, text, _ = run(capsys, "evaluate", out, table)
    assert code == 0
    assert "picture" not in text
    code, text, _ = run(capsys, "info", out, "--json")
    assert json.loads(text)["text_encoding"]["pooling"] == "mean"
    code, _, error = run(capsys, "train", "--config", out / "run.yaml", "-o", tmp_path / "again", "--json")
    assert code == 0, error
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == (out / "model.safetensors").stat().st_size
    code, _, error = run(capsys, "train", table, "--from", out, "-o", tmp_path / "more", "--json")
    assert code == 0, error


def test_predict_sentences_tables_and_lines(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, _ = run(capsys, "predict", saved, "the goal", "salt the soup", "--json")
    assert code == 0
    assert [row["text"] for row in json.loads(text)] == ["the goal", "salt the soup"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the goal\n\na vote\n"))
    code, text, error = run(capsys, "predict", saved, "-")
    assert code == 3
    assert text.count("\n") == 2
    assert "row 2: the text is empty" in error
    with (tmp_path / "new.csv").open("w") as stream:
        csv.writer(stream).writerows([("id", "text"), (1, "=cmd() goal"), (2, ""), (3, "<script>\x1b[31m")])
    code, _, _ = run(capsys, "predict", saved, tmp_path / "new.csv", "-o", tmp_path / "labels.csv", "--allow-skipped")
    assert code == 0
    with (tmp_path / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["text"] for row in rows] == ["'=cmd() goal", "", "<script>\\x1b[31m"]
    assert rows[1]["error"]
    code, text, _ = run(capsys, "predict", saved, "a \x1b[31mgoal")
    assert "\x1b" not in text
    code, _, error = run(capsys, "predict", saved, "no-such-file.csv")
    assert code == 1
    assert "no-such-file.csv" in error


@pytest.mark.parametrize(
    "options",
    [["--multi-label"], ["--views", 2], ["--enhanced-base"], ["--residual-side", "image"], ["--report", "r.html"],
     ["--include-code"], ["--image-column", "text"], ["--prompt-average", "normalized"]],
)  # fmt: skip
def test_options_for_pictures_are_refused(
    options: list[object], text_base: Callable[..., str], table: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, _, error = run(capsys, "train", table, "--base-model", text_base(), "-o", tmp_path / "out", *options)
    assert code == 1
    assert str(options[0]) in " ".join(error.split())
    assert not (tmp_path / "out").exists()


def test_options_for_texts_are_refused_for_pictures(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "train", table, "--base-model", "shipped", "-o", tmp_path / "out", "--pooling", "cls")
    assert code == 1
    assert "--pooling" in error


@pytest.mark.parametrize("command", ["report", "export", "serve", "pack", "merge"])
def test_commands_for_pictures_say_so(
    command: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, list[object]] = {
        "report": ["-o", tmp_path / "r.html"], "export": ["-o", tmp_path / "x"],
        "pack": ["-o", tmp_path / "p.safetensors"],
        "merge": [saved, "-o", tmp_path / "m"], "serve": [],
    }  # fmt: skip
    if command == "serve":
        pytest.importorskip("fastapi", reason="needs the serve extra")
    code, _, error = run(capsys, command, saved, *given[command])
    assert code == 1
    assert "of texts" in " ".join(error.split())
