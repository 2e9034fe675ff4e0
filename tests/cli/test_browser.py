"""`taskres app`."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from support import run

from taskres_hf import app


def test_it_serves_until_it_is_interrupted_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    httpx = pytest.importorskip("httpx")
    seen: list[app.RunningApp] = []

    def wait(self: app.RunningApp) -> None:
        assert httpx.get(self.url).status_code == 200
        assert self.registry.root.is_dir()
        seen.append(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(app.RunningApp, "wait", wait)
    code, output, error = run(capsys, "app", "--base-model", "shipped", "--json")
    assert code == 130
    assert json.loads(output) == {"url": seen[0].url, "public_url": None, "base_model": "tiny-clip"}
    assert "The app is stopped" in error
    assert not seen[0].registry.root.exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(seen[0].url)


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
