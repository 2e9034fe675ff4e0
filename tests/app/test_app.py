"""What is served, to whom, and what it leaves behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tagger

from taskres_hf import TaskResCLIPForImageClassification, app
from taskres_hf.errors import ConfigurationError, MissingExtraError


@pytest.fixture(scope="module")
def running(trained: Path) -> Iterator[app.RunningApp]:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    with app.RunningApp(model=trained, only_try=True) as made:
        yield made


def test_it_listens_to_this_machine_alone_and_loads_nothing_from_elsewhere(running: app.RunningApp) -> None:
    httpx = pytest.importorskip("httpx")
    assert running.url.startswith("http://127.0.0.1:")
    assert running.public_url is None
    reply = httpx.get(running.url)
    assert reply.status_code == 200
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert httpx.get(running.url, headers={"host": "evil.example:80"}).status_code == 400
    assert httpx.get(running.url, headers={"host": "evil.example"}).status_code == 400
    settings = httpx.get(f"{running.url}config").json()
    assert settings["analytics_enabled"] is False
    assert "127.0.0.1" not in str(settings.get("theme_hash"))


def test_only_try_shows_nothing_else(running: app.RunningApp) -> None:
    httpx = pytest.importorskip("httpx")
    labels = [part["props"].get("label") for part in httpx.get(f"{running.url}config").json()["components"]]
    assert "Pictures" in labels
    assert "Classes" not in labels


def test_a_port_that_is_taken_is_an_error(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    monkeypatch.setattr(app.tempfile, "mkdtemp", lambda prefix: str(_made(tmp_path / "root")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="another port"):
            app.RunningApp(base, port=taken.getsockname()[1])
    assert not (tmp_path / "root").exists()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_it_begins_with_is_needed(base: str) -> None:
    pytest.importorskip("gradio", reason="the app needs gradio")
    with pytest.raises(ConfigurationError, match="base_model"):
        app.RunningApp()
    with pytest.raises(ConfigurationError, match="only_try"):
        app.RunningApp(base, only_try=True)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"taskres_hf\[app\]"):
        app.check_installed()


@pytest.mark.parametrize(
    ("host", "private"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("192.168.1.5", False)],
)
def test_others_can_reach_every_other_host(host: str, private: bool) -> None:
    assert app._is_loopback(host) == private


def test_several_labels_per_picture_are_refused(base: str, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
    tagger(TaskResCLIPForImageClassification.from_base(base, ["cat", "dog"])).save_pretrained(tmp_path / "tagger")
    with pytest.raises(ConfigurationError, match="gives several, or none"):
        app.RunningApp(model=tmp_path / "tagger", only_try=True)
