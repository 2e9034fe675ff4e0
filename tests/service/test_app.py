"""What a client sees: answers as `pipeline` gives them, what is served, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

from http_client import PNG, files, problem, text
from starlette.testclient import TestClient
from support import same_predictions as same
from support import tagger
from transformers import pipeline

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.errors import ConfigurationError
from taskres_hf.pictures import read_image
from taskres_hf.service import create_app


def test_several_labels_per_picture_have_a_score_each(base: str, pictures: list[bytes], tmp_path: Any) -> None:
    untrained = TaskResCLIPForImageClassification.from_base(
        base, ["cat", "dog", "bird"], problem_type="multi_label_classification"
    )
    with pytest.raises(ConfigurationError, match="is not trained"):
        create_app({"tags": untrained})
    tagger(untrained).save_pretrained(tmp_path / "tags")
    with TestClient(create_app(tmp_path / "tags")) as client:
        rows = client.post("/v1/models/tags/classify", files=files(*pictures)).json()["results"]
        told = client.get("/v1/models/tags").json()
    stock = pipeline("image-classification", model=str(tmp_path / "tags"), top_k=3)
    for row, content in zip(rows, pictures, strict=True):
        assert same(row["predictions"], stock(read_image({"bytes": content})))
        assert sum(top["score"] for top in row["predictions"]) > 1.1
    assert (told["several_labels"], told["label_threshold"]) == (True, 0.4)


def test_every_classifier_answers_as_pipeline_does(
    client: Any, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    reply = client.post("/v1/classify", files=files(*pictures))
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
        "form": {"files": files(content), "data": {"top_k": "2"}},
        "base64": {"json": {"images": [text(content).rstrip("=")], "top_k": 2}},
        "data": {"json": {"image": f"data:image/png;base64,{text(content)}", "top_k": 2}},
        "url-safe data": {"json": {"images": f"data:image/png,{quoted}", "top_k": 2}},
        "inputs": {"json": {"inputs": text(content), "parameters": {"top_k": 2}}},
    }
    reply = client.post(address, **bodies[way])
    assert reply.json()["model"] == "food"
    (row,) = reply.json()["results"]
    assert same(row["predictions"], expected["food"][1][:2])


def test_classifiers_are_chosen_and_top_k_is_at_most_the_classes(client: Any, pictures: list[bytes]) -> None:
    for choice in ({"params": {"models": "signs,animals"}}, {"params": {"models": ["signs", "animals"]}}):
        reply = client.post("/v1/classify", content=pictures[1], headers=PNG, **choice).json()
        assert reply["models"] == ["signs", "animals"]
    body = {"images": [text(pictures[1])], "models": ["animals"], "top_k": 1000}
    (row,) = client.post("/v1/classify", json=body).json()["results"]
    assert len(row["predictions"]["animals"]) == 3
    assert sum(each["score"] for each in row["predictions"]["animals"]) == pytest.approx(1.0, abs=1e-5)


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


def test_errors_of_addresses_are_json_too(client: Any) -> None:
    assert problem(client.get("/nothing"))["code"] == "not_found"
    assert problem(client.get("/v1/classify"))["code"] == "method_not_allowed"
    assert problem(client.get("/v1/models/%1b%5b31m%3Cscript%3E"))["code"] == "unknown_model"
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
    assert "abc-1" in problem(reply)["message"]
