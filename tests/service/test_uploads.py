"""Requests that are refused, broken or hostile: each is told what is wrong, and its neighbours are answered."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

from http_client import FORM, HOSTILE, PNG, files, problem
from support import same_predictions as same

from taskres_hf.pictures import read_image


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n" + chunk


def test_a_broken_picture_has_the_librarys_message_and_its_neighbours_their_answers(
    client: Any, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    broken = {1: b"not a picture", 2: pictures[1][:200], 4: b"", 5: _bomb()}
    contents = [broken.get(number, pictures[number]) for number in range(7)]
    reply = client.post("/v1/models/signs/classify", files=files(*contents))
    assert reply.status_code == 200
    for number, row in enumerate(reply.json()["results"]):
        if number in broken:
            with pytest.raises(ValueError) as reason:  # noqa: PT011 (whatever the library says)
                read_image(broken[number])
            assert row == {"index": number, "predictions": [], "error": str(reason.value)}
        else:
            assert row["error"] is None
            assert same(row["predictions"], expected["signs"][number])
    alone = client.post("/v1/models/signs/classify", content=b"not a picture", headers=PNG)
    assert alone.status_code == 422
    assert alone.json()["results"][0]["error"] in alone.json()["error"]["message"]


@pytest.fixture
def trap() -> Iterator[tuple[str, list[str]]]:
    """A server of this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_nothing_is_fetched_or_opened_for_a_client(
    client: Any, trap: tuple[str, list[str]], artifacts: dict[str, str], pictures: list[bytes], tmp_path: Any
) -> None:
    picture = tmp_path / "secret.png"
    picture.write_bytes(pictures[1])
    addresses = [
        f"{trap[0]}/secret.png", f" {trap[0]}/secret.png", f"data:{trap[0]}/x.png,", picture.as_uri(), str(picture),
        f"data:,{picture}", "http:/secret.png", "FILE:///secret.png",
    ]  # fmt: skip
    reply = client.post("/v1/classify", json={"images": addresses})
    assert reply.status_code == 422
    assert [row["predictions"] for row in reply.json()["results"]] == [{}] * len(addresses)
    assert "does not fetch" in reply.json()["results"][0]["error"]
    for field in ("file", "url", "image"):
        assert problem(client.post("/v1/classify", data={field: addresses[0]}, files=files(pictures[1])))
    assert trap[1] == []


@pytest.mark.parametrize(
    ("status", "code", "request_"),
    [
        (400, "no_picture", {"content": b"", "headers": PNG}),
        (400, "no_picture", {"json": {"images": []}}),
        (400, "malformed_json", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
        (400, "malformed_json", {"content": b"[" * 200_000, "headers": {"Content-Type": "application/json"}}),
        (
            400,
            "malformed_json",
            {"content": b"\xff\xfe\x00", "headers": {"Content-Type": "application/json"}},
        ),
        (422, "malformed_json", {"json": ["x"]}),
        (422, "malformed_json", {"json": {"images": [1]}}),
        (422, "malformed_json", {"json": {"images": {"a": 1}}}),
        (422, "malformed_json", {"json": {"images": ["x"], "models": [[]]}}),
        (422, "malformed_json", {"json": {"images": ["x"], "parameters": 3}}),
        (422, "no_picture", {"json": {}}),
        (422, "unknown_field", {"json": {"images": ["x"], "topk": 3}}),
        (422, "unknown_field", {"data": {"file": "cat.jpg"}, "files": [("file", ("a", b"x"))]}),
        (422, "malformed_top_k", {"json": {"images": ["x"], "top_k": 0}}),
        (422, "malformed_top_k", {"json": {"images": ["x"], "top_k": True}}),
        (422, "malformed_top_k", {"json": {"images": ["x"], "top_k": 1e9}}),
        (422, "malformed_top_k", {"content": b"x", "headers": PNG, "params": {"top_k": "9" * 5000}}),
        (422, "malformed_top_k", {"content": b"x", "headers": PNG, "params": {"top_k": "-1"}}),
        (422, "unknown_field", {"json": {"inputs": "x", "parameters": {"function_to_apply": "none"}}}),
        (422, "contradiction", {"json": {"image": "x", "models": ["food"]}, "params": {"models": "signs"}}),
        (404, "unknown_model", {"content": b"x", "headers": PNG, "params": {"models": "cats"}}),
        (404, "unknown_model", {"content": b"x", "headers": PNG, "params": {"models": HOSTILE}}),
        (415, "unsupported_media_type", {"content": b"x", "headers": {"Content-Type": "text/html"}}),
        (415, "unsupported_media_type", {"data": {"a": "b"}}),
        (415, "unsupported_encoding", {"content": b"x", "headers": {**PNG, "Content-Encoding": "gzip"}}),
        (400, "malformed_form", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
        (
            400,
            "malformed_form",
            {"content": b"--a\r\nx\r\n", "headers": {"Content-Type": FORM}},
        ),
        (413, "body_too_large", {"content": b"x" * 10_000_001, "headers": PNG}),
        (413, "too_many_pictures", {"json": {"images": ["x"] * 33}}),
        (413, "too_many_pictures", {"files": files(*[b"x"] * 33)}),
        (413, "too_many_pictures", {"files": files(*[b"x"] * 3000)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_told_what_is_wrong(client: Any, status: int, code: str, request_: dict[str, Any]) -> None:
    reply = client.post("/v1/classify", **request_)
    assert (reply.status_code, problem(reply)["code"]) == (status, code)
    assert len(reply.content) < 2000
    assert b"\x1b" not in reply.content


def test_a_form_that_is_cut_off_is_not_answered_in_part(client: Any, pictures: list[bytes]) -> None:
    part = b'--a\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n%s\r\n'
    whole = part % pictures[1] + part % pictures[3] + b"--a--\r\n"
    headers = {"Content-Type": FORM}
    assert len(client.post("/v1/classify", content=whole, headers=headers).json()["results"]) == 2
    for cut in (len(whole) - 8, len(whole) - 200):
        reply = client.post("/v1/classify", content=whole[:cut], headers=headers)
        assert (reply.status_code, problem(reply)["code"]) == (400, "malformed_form")


def test_a_body_that_does_not_say_how_long_it_is_ends_at_the_limit(client: Any) -> None:
    sent = []

    def chunks() -> Iterator[bytes]:
        for number in range(12):
            sent.append(number)
            yield b"x" * 1_000_000

    reply = client.post("/v1/classify", content=chunks(), headers=PNG)
    assert (reply.status_code, problem(reply)["code"]) == (413, "body_too_large")
