"""`taskres app`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import run

from taskres_hf import app


def test_it_serves_until_it_is_interrupted_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    httpx = pytest.importorskip("httpx")
    command = [sys.executable, "-m", "taskres_hf", "app", "--base-model", "shipped", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = iter(process.stdout.readline, "")
        text = ""
        for line in lines:
            text += line
            if line.startswith("}") or re.fullmatch(r"\{.*\}\n", line):
                break
        result = json.loads(text)
        assert httpx.get(result["url"]).status_code == 200
        assert result["public_url"] is None
        assert list(tmp_path.glob("taskres-app-*"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "The app is stopped" in process.stderr.read()
    assert not list(tmp_path.glob("taskres-app-*"))


def _environment(folder: Path) -> dict[str, str]:
    import os

    return {**os.environ, "TMPDIR": str(folder)}


def test_the_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    code, _, error = run(capsys, "app", "--base-model", "shipped")
    assert code == 1
    assert "taskres_hf[app]" in error


def test_a_base_that_cannot_be_had_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    code, _, error = run(capsys, "app", "--base-model", "nobody/nothing")
    assert code == 1
    assert "nobody/nothing" in error
    code, _, error = run(capsys, "app", "--model", tmp_path)
    assert code == 1
    assert "Traceback" not in error
