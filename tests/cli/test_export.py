"""`taskres export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import run

from taskres_hf.cli.export import ExportPrecision, FormatName
from taskres_hf.export import FORMATS, PRECISIONS


def test_the_choices_are_those_of_the_library() -> None:
    assert [choice.value for choice in FormatName] == list(FORMATS)
    assert [choice.value for choice in ExportPrecision] == list(PRECISIONS)


def test_export_says_what_it_compared(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run(capsys, "export", trained, "--format", "linear")
    assert code == 0
    assert f"Exported to {trained.name}-linear: linear, fp32, " in text
    assert "On 8 pictures its logits differ by " in text
    assert "100.0 % of the answers are the same" in text
    code, text, _ = run(capsys, "export", trained, "--format", "linear", "-o", "plain", "--strength", 0.5, "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["output_dir"] == "plain"
    assert facts["strength"] == 0.5
    assert facts["files"]["classify.py"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{trained.name}-linear", "plain"}


def test_export_refuses_what_is_there(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, text, error = run(capsys, "export", trained, "--format", "linear", "-o", tmp_path)
    assert code == 1
    assert text == ""
    assert "holds 'notes.txt', which is no part of an earlier export" in error
    code, text, _ = run(capsys, "export", trained, "--format", "torch", "--precision", "int8", "-o", "x", "--json")
    assert code == 1
    assert json.loads(text)["type"] == "ConfigurationError"
