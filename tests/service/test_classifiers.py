"""Which classifiers are served over which base, and limits: how much is taken, and how long a picture waits."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

from http_client import PNG, files, problem
from image_towers import save_processor, tiny_classifier
from starlette.testclient import TestClient
from support import copied, random_residual
from support import same_predictions as same
from transformers import pipeline

from taskres_hf import TaskResCLIPForImageClassification, TaskResForImageClassification
from taskres_hf.embedding.engines.choose import ImageEngine
from taskres_hf.errors import ArtifactError, ConfigurationError
from taskres_hf.pictures import read_image
from taskres_hf.service import create_app


def test_a_picture_passes_a_base_once_for_all_classifiers(
    client: Any, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, engine = [], ImageEngine.__call__

    def counted(self: Any, inputs: Any) -> Any:
        passed.append(len(inputs["pixel_values"]))
        return engine(self, inputs)

    monkeypatch.setattr(ImageEngine, "__call__", counted)
    reply = client.post("/v1/classify", files=files(*pictures[:4])).json()
    assert [len(row["predictions"]) for row in reply["results"]] == [3] * 4
    assert sum(passed) == 4


def test_classifiers_of_several_bases(
    artifacts: dict[str, str], folder_of_other_base: str, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    app = create_app([artifacts["food"], folder_of_other_base, artifacts["signs"]])
    assert len(app.state.service.bases()) == 2
    with TestClient(app) as client:
        row = client.post("/v1/classify", content=pictures[1], headers=PNG).json()["results"][0]["predictions"]

    own = pipeline("image-classification", model=folder_of_other_base)(read_image(pictures[1]))
    assert same(row["colours"], own)
    assert same(row["food"], expected["food"][1])
    assert same(row["signs"], expected["signs"][1])


def test_one_base_is_loaded_whatever_the_number_of_classifiers(
    artifacts: dict[str, str], folder_of_other_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], TaskResCLIPForImageClassification.from_pretrained.__func__

    def counted(cls: Any, source: Any, **options: Any) -> Any:
        loaded.append(source)
        return load(cls, source, **options)

    monkeypatch.setattr(TaskResCLIPForImageClassification, "from_pretrained", classmethod(counted))
    app = create_app([*artifacts.values(), folder_of_other_base])
    assert loaded == [artifacts["animals"], folder_of_other_base]
    kept = [base.pool.view().names for base in app.state.service.bases()]
    assert kept == [["animals", "food", "signs"], ["colours"]]


def test_a_name_may_go_to_a_classifier_of_another_base(
    artifacts: dict[str, str], folder_of_other_base: str, pictures: list[bytes]
) -> None:
    service = create_app([artifacts["food"], f"it={artifacts['signs']}"]).state.service
    before = service.start(lambda: pictures[1], ["it"], 1)
    service.add("it", folder_of_other_base)
    assert [base.pool.view().names for base in service.bases()] == [["food"], ["it"]]
    assert service.class_names("it") == ["red", "green", "blue"]
    (job,) = service.start(lambda: pictures[1], ["it"], 5)
    assert {top["label"] for top in job.result(60)["it"]} == {"red", "green", "blue"}
    (answer,) = before  # what was accepted is answered by what was there
    assert answer.result(60)["it"][0]["label"] not in ("red", "green", "blue")
    service.close()


def test_other_pictures_or_another_precision_make_a_pool_of_their_own(artifacts: dict[str, str], tmp_path: Any) -> None:
    grey = TaskResCLIPForImageClassification.from_pretrained(artifacts["food"])
    grey.image_processor.image_mean = [0.0, 0.0, 0.0]
    grey.save_pretrained(tmp_path / "grey")
    half = TaskResCLIPForImageClassification.from_pretrained(artifacts["food"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    service = create_app([artifacts["food"], tmp_path / "grey", tmp_path / "half"]).state.service
    plain, shifted, rounded = (base.pool for base in service.bases())
    assert shifted.clip is plain.clip  # the base is there once all the same
    assert [pool.image_processor.image_mean[0] == 0.0 for pool in (plain, shifted, rounded)] == [False, True, False]
    assert [pool.clip.dtype for pool in (plain, rounded)] == [torch.float32, torch.bfloat16]


def test_image_models_alone_are_served_beside_pools(
    artifacts: dict[str, str], pictures: list[bytes], expected: dict[str, Any], tmp_path: Any
) -> None:
    for name, labels in {"one": ["cat", "dog", "food"], "two": ["red", "green"]}.items():
        tower = tiny_classifier("vit", ["cat", "dog", "food"])
        tower.save_pretrained(tmp_path / "vit")
        save_processor(tmp_path / "vit")
        model = TaskResForImageClassification.from_base(str(tmp_path / "vit"), labels)
        random_residual(model).save_pretrained(tmp_path / name)
    app = create_app([tmp_path / "one", artifacts["food"], tmp_path / "two"])
    assert len(app.state.service.bases()) == 2
    with TestClient(app) as client:
        row = client.post("/v1/classify", content=pictures[1], headers=PNG).json()["results"][0]["predictions"]
        app.state.service.remove("one")
        assert problem(client.get("/v1/models/one"))["code"] == "unknown_model"
        assert client.get("/v1/models/two").json()["classes"] == 2
    for name in ("one", "two"):
        assert same(row[name], pipeline("image-classification", model=str(tmp_path / name))(read_image(pictures[1])))
    assert same(row["food"], expected["food"][1])


def test_a_loaded_model_counts_as_it_was_and_folders_at_the_strength_asked_for(artifacts: dict[str, str]) -> None:
    model = TaskResCLIPForImageClassification.from_pretrained(artifacts["signs"])
    service = create_app({"food": artifacts["food"], "signs": model}, strength=0.25).state.service
    service.add("animals", artifacts["animals"])
    model.strength = 0.5
    assert [service.describe(name)["strength"] for name in service] == [0.25, 1.0, 0.25]
    service.add("signs", model)
    assert service.describe("signs")["strength"] == 0.5


def test_classifiers_come_and_go_while_it_runs(artifacts: dict[str, str], pictures: list[bytes]) -> None:
    app = create_app(artifacts["food"])
    with TestClient(app) as client:
        app.state.service.add("more", artifacts["signs"])
        assert list(client.post("/v1/classify", content=pictures[1], headers=PNG).json()["models"]) == ["food", "more"]
        app.state.service.remove("food")
        assert (
            problem(client.post("/v1/models/food/classify", content=pictures[1], headers=PNG))["code"]
            == "unknown_model"
        )
        assert len(app.state.service.bases()) == 1


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
            target=lambda: result.append(client.post("/v1/models/food/classify", files=files(*pictures[:2])))
        )
        asking.start()
        while len(base.batcher) < 2:
            asking.join(0.01)
    asking.join(60)
    rows = sorted(result[0].json()["results"], key=lambda row: row["error"] is None)
    assert "NaN" in rows[0]["error"]
    assert same(rows[1]["predictions"], expected["food"][rows[1]["index"]])


def test_more_pictures_than_the_queue_has_room_for(artifacts: dict[str, str], pictures: list[bytes]) -> None:
    """Trying again, as a 503 says, would never help."""
    with TestClient(create_app(artifacts["food"], max_queue=2)) as client:
        for body in ({"files": files(*pictures[:3])}, {"json": {"images": ["x"] * 3}}):
            reply = client.post("/v1/classify", **body)
            assert (reply.status_code, problem(reply)["code"]) == (413, "too_many_pictures")
            assert "hold 2 pictures" in reply.text


def test_more_than_it_takes_is_refused_at_once_and_told_when_to_come_back(
    artifacts: dict[str, str], pictures: list[bytes]
) -> None:
    app = create_app(artifacts["food"], max_queue=3, timeout_s=60)
    service, done = app.state.service, []
    with TestClient(app) as client:
        with service._turn:  # the tower is busy
            asking = threading.Thread(
                target=lambda: done.append(client.post("/v1/classify", files=files(*pictures[:3])))
            )
            asking.start()
            while service.occupied < 3:
                asking.join(0.01)
            reply = client.post("/v1/classify", content=pictures[1], headers=PNG)
            assert (reply.status_code, problem(reply)["code"], reply.headers["retry-after"]) == (503, "busy", "1")
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
            assert (reply.status_code, problem(reply)["code"]) == (504, "timeout")
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
