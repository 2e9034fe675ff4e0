"""The HTTP interface: addresses, answers and errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .._version import __version__
from ..errors import ImageError
from ..tables import json_text, visible
from .classifiers import BusyError, Classifiers, UnknownModelError
from .observing import NOTES, Metrics, Watch
from .uploads import RequestError, Upload, checked_models, checked_top_k, read_upload

ALL_MODELS = "/v1/classify"
ONE_MODEL = "/v1/models/{name}/classify"
_CODES = {404: "not_found", 405: "method_not_allowed"}


class Prediction(BaseModel):
    label: str
    score: float


class Row(BaseModel):
    index: int
    predictions: list[Prediction]
    error: str | None


class Answer(BaseModel):
    model: str
    results: list[Row]


class RowOfAll(BaseModel):
    index: int
    predictions: dict[str, list[Prediction]]
    error: str | None


class AnswerOfAll(BaseModel):
    models: list[str]
    results: list[RowOfAll]


class Problem(BaseModel):
    code: str
    message: str


class Failure(BaseModel):
    error: Problem


_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_TEXTS = {"type": "array", "items": {"type": "string"}, "description": "base64 texts or data: URLs"}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": _FILES, "top_k": {"type": "integer"}}}
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": _TEXTS, "top_k": {"type": "integer", "minimum": 1}},
                }
            },
            "image/*": _PICTURE,
            "application/octet-stream": _PICTURE,
        },
    }
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure, "description": text}
    for code, text in {
        400: "The body cannot be read.", 404: "There is no such classifier.", 408: "The body came too slowly.",
        413: "Too large, or too many pictures.", 415: "A body of an unknown kind.",
        422: "A wrong option, or none of the pictures can be read (then with `results`).",
        503: "Busy: try again after the seconds in Retry-After.", 504: "No answer in time.",
    }.items()
}  # fmt: skip
TopK = Annotated[str | None, Query(description="Classes per picture and classifier.")]
Names = Annotated[list[str] | None, Query(description="Classifiers, repeated or with commas; all by default.")]


def make_app(service: Classifiers, metrics: Metrics) -> FastAPI:
    """The app over some classifiers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.in_thread(service.warm_up)
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPIOffline(
        title="taskres_hf", version=__version__, description="Few-shot image classifiers over shared backbones.",
        lifespan=lifespan, redoc_url=None,
    )  # fmt: skip
    app.state.service, app.state.metrics = service, metrics
    app.add_middleware(
        Watch, metrics=metrics, access_log=service.settings.access_log, log_file_names=service.settings.log_file_names
    )
    app.include_router(_classifying(service, metrics))
    app.include_router(_looking(service, metrics))
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _not_there)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _broken)
    return app


def _classifying(service: Classifiers, metrics: Metrics) -> APIRouter:
    router, kept = APIRouter(tags=["classify"]), service.settings

    async def classify(request: Request, names: Sequence[str] | None, top_k: str | None) -> tuple[list[str], list[Any]]:
        """Names of the classifiers that answered, and a row a picture: its predictions by name, or an error."""
        end, notes = time.monotonic() + kept.timeout_s, request.scope.setdefault(NOTES, {})
        try:
            with service.seats() as seats:
                upload = await _in_time(read_upload(request, kept, service.in_thread), end, 408)
                names = _wanted(service, names, upload)
                count = upload.top_k or (checked_top_k(top_k) if top_k is not None else kept.top_k)
                notes.update(pictures=len(upload.pictures), models=names, file_names=upload.file_names)
                seats.grow(len(upload.pictures))
                jobs = [service.start(read, names, count) for read in upload.pictures]
                rows = await _in_time(asyncio.gather(*map(_row, jobs)), end, 504)
        except BusyError as error:
            raise RequestError(503, "busy", str(error), Retry_After="1") from None
        except UnknownModelError as error:
            raise RequestError(404, "unknown_model", str(error)) from None
        failed = sum(isinstance(row, str) for row in rows)
        notes["failed"] = failed
        metrics.pictures.labels("classified").inc(len(rows) - failed)
        metrics.pictures.labels("unreadable").inc(failed)
        return list(names), rows

    @router.post(ALL_MODELS, response_model=AnswerOfAll, responses=_FAILURES, openapi_extra=_BODY)
    async def classify_by_all(request: Request, top_k: TopK = None, models: Names = None) -> Response:
        """Classify pictures by several classifiers, by default all. Each picture passes each backbone once."""
        asked = None if models is None else [name for text in models for name in text.split(",")]
        names, rows = await classify(request, asked, top_k)
        return _answer({"models": names}, [({}, row) if isinstance(row, str) else (row, None) for row in rows])

    @router.post(ONE_MODEL, response_model=Answer, responses=_FAILURES, openapi_extra=_BODY)
    async def classify_by_one(request: Request, name: str, top_k: TopK = None) -> Response:
        """Classify pictures by one classifier."""
        _, rows = await classify(request, [name], top_k)
        return _answer({"model": name}, [([], row) if isinstance(row, str) else (row[name], None) for row in rows])

    return router


def _looking(service: Classifiers, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["look"])

    @router.get("/v1/models")
    async def models() -> Response:
        """The classifiers that are served."""
        return _json({"models": [service.describe(name) for name in service]})

    @router.get("/v1/models/{name}", responses={404: _FAILURES[404]})
    async def model(name: str) -> Response:
        """One classifier, with its classes in label order."""
        try:
            return _json({**service.describe(name), "class_names": service.class_names(name)})
        except UnknownModelError as error:
            raise RequestError(404, "unknown_model", str(error)) from None

    @router.get("/health")
    async def health() -> Response:
        """Live: the process answers."""
        return _json({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Ready: classifiers are loaded and pictures are taken; 503 while it shuts down."""
        if service.closed:
            raise RequestError(503, "shutting_down", "The service is shutting down.")
        return _json({"status": "ready", "models": len(service)})

    @router.get("/metrics")
    async def numbers() -> Response:
        """Requests, seconds, pictures, sizes of batches and the queue, for Prometheus."""
        content, kind = metrics.text()
        return Response(content, headers={"Content-Type": kind})

    return router


def _wanted(service: Classifiers, asked: Sequence[str] | None, upload: Upload) -> list[str]:
    """Classifiers that a request means: of its address, else of its body, else all."""
    if asked and upload.models and checked_models(asked) != checked_models(upload.models):
        raise RequestError(422, "contradiction", "The address and the body name different classifiers: leave one out.")
    names = checked_models(asked or upload.models or list(service))
    for name in names:
        service.find(name)  # raises where there is none
    return names


async def _in_time(work: Any, end: float, status: int) -> Any:
    try:
        return await asyncio.wait_for(work, max(end - time.monotonic(), 0.001))
    except asyncio.TimeoutError:
        slow = "The request was not whole in time." if status == 408 else "There is no answer in time: try again."
        raise RequestError(status, "timeout", slow, Connection="close") from None


async def _row(futures: Sequence[Any]) -> dict[str, Any] | str:
    """Predictions of one picture by name, or why there are none."""
    found: dict[str, Any] = {}
    try:
        for part in await asyncio.gather(*map(asyncio.wrap_future, futures)):
            found.update(part)
    except ImageError as error:
        return str(error)
    return found


def _answer(head: dict[str, Any], rows: Sequence[tuple[Any, str | None]]) -> Response:
    results = [{"index": place, "predictions": found, "error": error} for place, (found, error) in enumerate(rows)]
    if all(error is not None for _, error in rows):
        count = "The picture cannot" if len(rows) == 1 else f"None of the {len(rows)} pictures can"
        message = f"{count} be classified: {rows[0][1]}"
        return _json({"error": {"code": "no_readable_picture", "message": message}, **head, "results": results}, 422)
    return _json({**head, "results": results})


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json_text(value).encode()
    return Response(text, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def _problem(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": {"code": code, "message": message}}, status, headers)


async def _refused(request: Request, error: Any) -> Response:
    return _problem(error.status, error.code, error.message, error.headers)


async def _not_there(request: Request, error: Any) -> Response:
    status = error.status_code
    hint = "There is no such address; /docs lists them." if status == 404 else str(error.detail)
    return _problem(status, _CODES.get(status, "http_error"), visible(hint)[:300], dict(error.headers or {}))


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(map(str, first.get("loc", ())))
    return _problem(422, "invalid", visible(f"{where}: {first.get('msg', 'not valid')}")[:300])


async def _broken(request: Request, error: Exception) -> Response:
    name = request.scope.get(NOTES, {}).get("id", "")
    message = f"The service failed; its log has the reason, under the id {name}."
    return _problem(500, "internal", message, {"X-Request-ID": name})  # this answer does not pass `Watch`
