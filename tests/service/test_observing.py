"""What operators see: the log and the numbers."""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

from http_client import HOSTILE, PNG, files
from starlette.testclient import TestClient

from taskres_hf.service import create_app


def test_the_log_names_no_files_unless_asked_and_nothing_hostile_ever(
    client: Any, artifacts: dict[str, str], pictures: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "taskres_hf.service.access")
    hostile = {"X-Request-ID": "\x1b[31mevil", "User-Agent": "\x1b]0;x\x07", "Referer": "\x1b"}
    files = [("file", (HOSTILE, pictures[1], "image/png"))]
    reply = client.post("/v1/classify?secret=%1b", files=files, headers=hostile)
    assert reply.status_code == 200
    assert reply.headers["x-request-id"].isalnum()
    client.get("/%1b[31m/secret")
    assert len(caplog.messages) == 2
    assert "pictures=1 failed=0 models=animals+food+signs" in caplog.messages[0]
    text = "".join(caplog.messages)
    assert not any(word in text for word in ("script", "secret", "evil", "\x1b", "\n"))
    caplog.clear()
    with TestClient(create_app(artifacts["food"], log_file_names=True)) as other:
        other.post("/v1/classify", files=files)
    assert "script" in caplog.messages[0]
    assert not set(caplog.messages[0]) & {"\x1b", "\n", "\r", "\u202e"}


def test_metrics_count_requests_pictures_and_batches(artifacts: dict[str, str], pictures: list[bytes]) -> None:
    with TestClient(create_app(artifacts["food"])) as client:
        client.post("/v1/classify", files=files(*pictures[:3], b"broken"))
        client.post("/v1/classify", content=b"", headers=PNG)
        client.request("BREW", "/<script>")
        reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in reply.text.splitlines() if not line.startswith("#"))
    assert lines['taskres_requests_total{code="200",method="POST",route="/v1/classify"}'] == "1.0"
    assert lines['taskres_requests_total{code="400",method="POST",route="/v1/classify"}'] == "1.0"
    assert lines['taskres_requests_total{code="404",method="other",route="other"}'] == "1.0"
    assert lines['taskres_request_seconds_count{method="POST",route="/v1/classify"}'] == "2.0"
    assert lines['taskres_pictures_total{outcome="classified"}'] == "3.0"
    assert lines['taskres_pictures_total{outcome="unreadable"}'] == "1.0"
    assert lines["taskres_batch_pictures_sum"] == "3.0"
    assert lines["taskres_queue_pictures"] == "0.0"
