"""`examples/space` runs as it is, on a classifier in a folder."""

from __future__ import annotations

import re
import runpy
import socket
from pathlib import Path

import pytest
import yaml

SPACE = Path(__file__).parents[2] / "examples" / "space"


def _free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


@pytest.mark.parametrize("whole", [False, True], ids=["classifier", "whole app"])
def test_the_space_serves(trained: Path, base: str, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("TASKRES_MODEL", "" if whole else str(trained))
    monkeypatch.setenv("TASKRES_BASE_MODEL", base)
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", _free_port())
    with runpy.run_path(str(SPACE / "app.py"))["start"]() as app:
        reply = httpx.get(app.url, headers={"host": "me-space.hf.space"})
        assert reply.status_code == 200
        labels = [part["props"].get("label") for part in httpx.get(f"{app.url}config").json()["components"]]
        assert "Pictures" in labels
        assert ("Classes" in labels) is whole
        assert "Repository" not in labels  # nobody uploads with the login of the Space


def test_the_metadata_is_that_of_a_space() -> None:
    text = (SPACE / "README.md").read_text()
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    facts = yaml.safe_load(found.group(1))
    assert facts["sdk"] == "gradio"
    assert (SPACE / facts["app_file"]).is_file()
    assert "taskres_hf[app]" in (SPACE / "requirements.txt").read_text()
