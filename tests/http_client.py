"""What tests send to the service, and how they read what it refuses."""

from __future__ import annotations

import base64
from typing import Any

PNG = {"Content-Type": "image/png"}
FORM = "multipart/form-data; boundary=a"
HOSTILE = "\x1b[31m<script>\r\nX-Evil: 1\u202e.png"


def files(*contents: bytes) -> list[tuple[str, Any]]:
    return [("file", (f"{number}.png", content, "image/png")) for number, content in enumerate(contents)]


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def problem(reply: Any) -> dict[str, str]:
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"code", "message"}
    assert error["message"]
    return dict(error)
