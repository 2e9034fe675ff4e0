"""What a client sees: answers as `pipeline` gives them, limits, and errors that say what to do."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

from starlette.testclient import TestClient
from support import copied, tagger
from support import same_predictions as same
from transformers import pipeline

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding.engines.choose import ImageEngine
from taskres_hf.errors import ArtifactError, ConfigurationError, MissingExtraError
from taskres_hf.pictures import read_image
from taskres_hf.service import create_app
from taskres_hf.service.settings import ServiceSettings

PNG = {"Content-Type": "image/png"}
FORM = "multipart/form-data; boundary=a"
HOSTILE = "\x1b[31m<script>\r\nX-Evil: 1\u202e.png"


def _files(*contents: bytes) -> list[tuple[str, Any]]:
    return [("file", (f"{number}.png", content, "image/png")) for number, content in enumerate(contents)]


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _problem(reply: Any) -> dict[str, str]:
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"code", "message"}
    assert error["message"]
    return dict(error)


# ---------------------------------------------------------------------- answers


def test_several_labels_per_picture_have_a_score_each(base: str, pictures: list[bytes], tmp_path: Any) -> None:
    untrained = TaskResCLIPForImageClassification.from_base(
        base, ["cat", "dog", "bird"], problem_type="multi_label_classification"
    )
    with pytest.raises(ConfigurationError, match="is not trained"):
        create_app({"tags": untrained})
    tagger(untrained).save_pretrained(tmp_path / "tags")
    with TestClient(create_app(tmp_path / "tags")) as client:
        rows = client.post("/v1/models/tags/classify", files=_files(*pictures)).json()["results"]
        told = client.get("/v1/models/tags").json()
    stock = pipeline("image-classification", model=str(tmp_path / "tags"), top_k=3)
    for row, content in zip(rows, pictures, strict=True):
        assert same(row["predictions"], stock(read_image({"bytes": content})))
        assert sum(top["score"] for top in row["predictions"]) > 1.1
    assert (told["several_labels"], told["label_threshold"]) == (True, 0.4)


def test_every_classifier_answers_as_pipeline_does(
    client: Any, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    reply = client.post("/v1/classify", files=_files(*pictures))
    assert reply.status_code == 200
    assert reply.json()["models"] == list(expected)
    for name, wanted in expected.items():
        rows = reply.json()["results"]
        assert [row["index"] for row in rows] == list(range(len(pictures)))
        assert all(row["error"] is None and same(row["predictions"][name], best)
                   for row, best in zip(rows, wanted, strict=True))  # fmt: skip


@pytest.mark.parametrize("way", ["raw", "form", "base64", "data", "url-safe data", "inputs"])
def test_every_way_to_send_a_picture(client: Any, pictures: list[bytes], expected: dict[str, Any], way: str) -> None:
    content, address = pictures[1], "/v1/models/food/classify"
    quoted = "".join(f"%{byte:02x}" for byte in content)
    bodies: dict[str, dict[str, Any]] = {
        "raw": {"content": content, "headers": PNG, "params": {"top_k": 2}},
        "form": {"files": _files(content), "data": {"top_k": "2"}},
        "base64": {"json": {"images": [_text(content).rstrip("=")], "top_k": 2}},
        "data": {"json": {"image": f"data:image/png;base64,{_text(content)}", "top_k": 2}},
        "url-safe data": {"json": {"images": f"data:image/png,{quoted}", "top_k": 2}},
        "inputs": {"json": {"inputs": _text(content), "parameters": {"top_k": 2}}},
    }
    reply = client.post(address, **bodies[way])
    assert reply.json()["model"] == "food"
    (row,) = reply.json()["results"]
    assert same(row["predictions"], expected["food"][1][:2])


def test_classifiers_are_chosen_and_top_k_is_at_most_the_classes(client: Any, pictures: list[bytes]) -> None:
    for choice in ({"params": {"models": "signs,animals"}}, {"params": {"models": ["signs", "animals"]}}):
        reply = client.post("/v1/classify", content=pictures[1], headers=PNG, **choice).json()
        assert reply["models"] == ["signs", "animals"]
    body = {"images": [_text(pictures[1])], "models": ["animals"], "top_k": 1000}
    (row,) = client.post("/v1/classify", json=body).json()["results"]
    assert len(row["predictions"]["animals"]) == 3
    assert sum(each["score"] for each in row["predictions"]["animals"]) == pytest.approx(1.0, abs=1e-5)


def test_a_picture_passes_a_base_once_for_all_classifiers(
    client: Any, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, engine = [], ImageEngine.__call__

    def counted(self: Any, inputs: Any) -> Any:
        passed.append(len(inputs["pixel_values"]))
        return engine(self, inputs)

    monkeypatch.setattr(ImageEngine, "__call__", counted)
    reply = client.post("/v1/classify", files=_files(*pictures[:4])).json()
    assert [len(row["predictions"]) for row in reply["results"]] == [3] * 4
    assert sum(passed) == 4


def test_classifiers_of_several_bases(
    artifacts: dict[str, str], folder_of_other_base: str, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    app = create_app([artifacts["food"], folder_of_other_base, artifacts["signs"]])
    assert len(app.state.service.bases()) == 2
    with TestClient(app) as client:
        row = client.post("/v1/classify", content=pictures[1], headers=PNG).json()["results"][0]["predictions"]
    from transformers import pipeline

    own = pipeline("image-classification", model=folder_of_other_base)(read_image(pictures[1]))
    assert same(row["colours"], own)
    assert same(row["food"], expected["food"][1])
    assert same(row["signs"], expected["signs"][1])


def test_mounted_in_another_app_and_loaded_models(
    artifacts: dict[str, str], pictures: list[bytes], expected: dict[str, Any]
) -> None:
    """An app that is mounted is told of no start: everything begins with the first request, in whatever loop."""
    from fastapi import FastAPI

    model = TaskResCLIPForImageClassification.from_pretrained(artifacts["food"])
    outer, inner = FastAPI(), create_app({"meals": model, "signs": artifacts["signs"]})
    outer.mount("/pictures", inner)
    assert len(inner.state.service.bases()) == 1  # the base of a loaded model is shared too
    for _ in range(2):  # a loop of its own each
        reply = TestClient(outer).post("/pictures/v1/models/meals/classify", content=pictures[3], headers=PNG)
        assert same(reply.json()["results"][0]["predictions"], expected["food"][3])
    page = TestClient(outer).get("/pictures/docs").text
    assert "/pictures/openapi.json" in page
    assert "/pictures/static-offline-docs/swagger-ui-bundle.js" in page


def test_classifiers_come_and_go_while_it_runs(artifacts: dict[str, str], pictures: list[bytes]) -> None:
    app = create_app(artifacts["food"])
    with TestClient(app) as client:
        app.state.service.add("more", artifacts["signs"])
        assert list(client.post("/v1/classify", content=pictures[1], headers=PNG).json()["models"]) == ["food", "more"]
        app.state.service.remove("food")
        assert (
            _problem(client.post("/v1/models/food/classify", content=pictures[1], headers=PNG))["code"]
            == "unknown_model"
        )
        assert len(app.state.service.bases()) == 1


# ---------------------------------------------------------------------- broken and hostile


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
    reply = client.post("/v1/models/signs/classify", files=_files(*contents))
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
        assert _problem(client.post("/v1/classify", data={field: addresses[0]}, files=_files(pictures[1])))
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
        (413, "too_many_pictures", {"files": _files(*[b"x"] * 33)}),
        (413, "too_many_pictures", {"files": _files(*[b"x"] * 3000)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_told_what_is_wrong(client: Any, status: int, code: str, request_: dict[str, Any]) -> None:
    reply = client.post("/v1/classify", **request_)
    assert (reply.status_code, _problem(reply)["code"]) == (status, code)
    assert len(reply.content) < 2000
    assert b"\x1b" not in reply.content


def test_a_form_that_is_cut_off_is_not_answered_in_part(client: Any, pictures: list[bytes]) -> None:
    part = b'--a\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n%s\r\n'
    whole = part % pictures[1] + part % pictures[3] + b"--a--\r\n"
    headers = {"Content-Type": FORM}
    assert len(client.post("/v1/classify", content=whole, headers=headers).json()["results"]) == 2
    for cut in (len(whole) - 8, len(whole) - 200):
        reply = client.post("/v1/classify", content=whole[:cut], headers=headers)
        assert (reply.status_code, _problem(reply)["code"]) == (400, "malformed_form")


def test_more_pictures_than_the_queue_has_room_for(artifacts: dict[str, str], pictures: list[bytes]) -> None:
    """Trying again, as a 503 says, would never help."""
    with TestClient(create_app(artifacts["food"], max_queue=2)) as client:
        for body in ({"files": _files(*pictures[:3])}, {"json": {"images": ["x"] * 3}}):
            reply = client.post("/v1/classify", **body)
            assert (reply.status_code, _problem(reply)["code"]) == (413, "too_many_pictures")
            assert "hold 2 pictures" in reply.text


def test_a_body_that_does_not_say_how_long_it_is_ends_at_the_limit(client: Any) -> None:
    sent = []

    def chunks() -> Iterator[bytes]:
        for number in range(12):
            sent.append(number)
            yield b"x" * 1_000_000

    reply = client.post("/v1/classify", content=chunks(), headers=PNG)
    assert (reply.status_code, _problem(reply)["code"]) == (413, "body_too_large")


def test_errors_of_addresses_are_json_too(client: Any) -> None:
    assert _problem(client.get("/nothing"))["code"] == "not_found"
    assert _problem(client.get("/v1/classify"))["code"] == "method_not_allowed"
    assert _problem(client.get("/v1/models/%1b%5b31m%3Cscript%3E"))["code"] == "unknown_model"
    assert client.request("\x1bBREW".replace("\x1b", "X"), "/v1/models").status_code == 405


def test_a_failure_of_ours_is_told_without_its_insides(
    client: Any, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = client.app.state.service.bases()

    def fails(picture: Any) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(base, "prepare", fails)
    reply = client.post("/v1/classify", content=pictures[1], headers={**PNG, "X-Request-ID": "abc-1"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "abc-1")
    assert "secret" not in reply.text
    assert "abc-1" in _problem(reply)["message"]


def test_a_picture_without_scores_keeps_no_other_from_its_own(
    client: Any, pictures: list[bytes], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = client.app.state.service.bases()
    engine = ImageEngine.__call__

    def spoiled(self: Any, inputs: Any) -> Any:
        embeds = engine(self, inputs)
        embeds[0] = float("nan")
        return embeds

    monkeypatch.setattr(ImageEngine, "__call__", spoiled)
    with client.app.state.service._turn:  # so that both are in one batch
        result: list[Any] = []
        asking = threading.Thread(
            target=lambda: result.append(client.post("/v1/models/food/classify", files=_files(*pictures[:2])))
        )
        asking.start()
        while len(base.batcher) < 2:
            asking.join(0.01)
    asking.join(60)
    rows = sorted(result[0].json()["results"], key=lambda row: row["error"] is None)
    assert "NaN" in rows[0]["error"]
    assert same(rows[1]["predictions"], expected["food"][rows[1]["index"]])


# ---------------------------------------------------------------------- log and numbers


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
        client.post("/v1/classify", files=_files(*pictures[:3], b"broken"))
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


def test_what_is_served_is_told_without_paths(client: Any, base: str, artifacts: dict[str, str]) -> None:
    reply = client.get("/v1/models")
    rows = {row["name"]: row for row in reply.json()["models"]}
    assert {name: row["classes"] for name, row in rows.items()} == {"animals": 3, "food": 4, "signs": 7}
    assert rows["food"]["base_model"] == "tiny-clip"
    one = client.get("/v1/models/signs")
    assert one.json()["class_names"] == client.app.state.service.class_names("signs")
    assert b"\x1b" not in one.content
    assert not any(path in reply.text + one.text for path in (base, artifacts["food"]))
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready", "models": 3}


def test_docs_come_from_no_other_place(client: Any) -> None:
    page = client.get("/docs").text
    assert "http" not in page.replace("http-equiv", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert client.get(f"/static-offline-docs/{asset}").status_code == 200
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/classify", "/v1/models/{name}/classify", "/v1/models", "/v1/models/{name}", "/health", "/ready",
        "/metrics",
    }  # fmt: skip
    kinds = described["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/*"} <= set(kinds)


# ---------------------------------------------------------------------- load


def test_more_than_it_takes_is_refused_at_once_and_told_when_to_come_back(
    artifacts: dict[str, str], pictures: list[bytes]
) -> None:
    app = create_app(artifacts["food"], max_queue=3, timeout_s=60)
    service, done = app.state.service, []
    with TestClient(app) as client:
        with service._turn:  # the tower is busy
            asking = threading.Thread(
                target=lambda: done.append(client.post("/v1/classify", files=_files(*pictures[:3])))
            )
            asking.start()
            while service.occupied < 3:
                asking.join(0.01)
            reply = client.post("/v1/classify", content=pictures[1], headers=PNG)
            assert (reply.status_code, _problem(reply)["code"], reply.headers["retry-after"]) == (503, "busy", "1")
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
        asking.join(60)
        assert done[0].status_code == 200
        assert service.occupied == 0
        assert client.post("/v1/classify", content=pictures[1], headers=PNG).status_code == 200
    assert service.closed
    reply = TestClient(app).post("/v1/classify", content=pictures[1], headers=PNG)
    assert reply.status_code == 503
    assert TestClient(app).get("/ready").status_code == 503


def test_who_waits_too_long_is_told_so_and_leaves_the_queue(artifacts: dict[str, str], pictures: list[bytes]) -> None:
    app = create_app(artifacts["food"], timeout_s=0.3)
    with TestClient(app) as client:
        with app.state.service._turn:
            reply = client.post("/v1/classify", content=pictures[1], headers=PNG)
            assert (reply.status_code, _problem(reply)["code"]) == (504, "timeout")
            assert app.state.service.occupied == 0
        app.state.service.settings.__dict__["timeout_s"] = 60.0
        assert client.post("/v1/classify", content=pictures[1], headers=PNG).status_code == 200
        sizes = [
            line for line in client.get("/metrics").text.splitlines() if line.startswith("taskres_batch_pictures_sum")
        ]
    assert sizes == ["taskres_batch_pictures_sum 1.0"]  # of the second alone


def _asked(app: Any, receive: Any, sent: list[Any]) -> Any:
    """The app's work on a POST whose body `receive` gives."""

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/classify", "raw_path": b"/v1/classify", "query_string": b"",
        "headers": [(b"content-type", b"image/png")], "root_path": "", "scheme": "http", "http_version": "1.1",
        "server": ("x", 80), "client": ("x", 1),
    }  # fmt: skip
    return app(scope, receive, send)


def test_a_body_that_never_ends_is_given_up(artifacts: dict[str, str]) -> None:
    app, sent = create_app(artifacts["food"], timeout_s=0.1), []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    asyncio.run(_asked(app, receive, sent))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "timeout"
    assert app.state.service.occupied == 0


def test_a_request_that_is_cut_off_by_the_end_is_counted_and_leaves(
    artifacts: dict[str, str], pictures: list[bytes]
) -> None:
    """As uvicorn does where what was accepted takes longer than it may."""
    app = create_app(artifacts["food"])
    service = app.state.service

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pictures[1], "more_body": False}

    async def cut_off() -> None:
        work = asyncio.ensure_future(_asked(app, receive, []))
        while len(service.bases()[0].batcher) < 1:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    with service._turn:
        asyncio.run(cut_off())
    assert (service.given_up, service.occupied) == (1, 0)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_batch": 0}, "`max_batch` must be a whole number from 1"),
        ({"max_batch": 2.5}, "whole number"),
        ({"max_wait_ms": float("nan")}, "`max_wait_ms`"),
        ({"timeout_s": True}, "`timeout_s`"),
        ({"max_bach": 3}, "did you mean 'max_batch'"),
    ],
)
def test_wrong_settings_are_refused(artifacts: dict[str, str], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        create_app(artifacts["food"], **settings)


def test_names_come_from_folders_or_from_you(artifacts: dict[str, str], tmp_path: Any) -> None:
    spaced = copied(artifacts["food"], tmp_path / "my food")  # type: ignore[arg-type]
    app = create_app([spaced, f"signs={artifacts['food']}"])
    assert list(app.state.service) == ["my-food", "signs"]
    with pytest.raises(ConfigurationError, match="Two classifiers would be called 'food'"):
        create_app([artifacts["food"], artifacts["food"]])
    for name in ("a/b", 7):
        with pytest.raises(ConfigurationError, match="cannot be called"):
            create_app({name: artifacts["food"]})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="no classifier to serve"):
        create_app([])
    with pytest.raises(ArtifactError, match="no folder"):
        create_app("./missing")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fastapi_offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"taskres_hf\[serve\]\""):
        create_app("anything")


def test_settings_need_nothing_of_the_extra() -> None:
    assert ServiceSettings().max_body == 10_000_000
