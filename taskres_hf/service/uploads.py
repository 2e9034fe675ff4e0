"""What a client sends: its body read within limits, as pictures and wishes. Nothing is fetched or opened for a client.

A body is one picture (`image/...` or `application/octet-stream`), a form with files, or JSON with base64 texts and
`data:` addresses. Texts become bytes in a decoding thread, and bytes are all that the picture reader ever gets.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote_to_bytes

from ..errors import ImageError, TaskResError
from ..tables import visible
from .settings import ServiceSettings

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IMAGES = ("images", "image", "inputs")  # the last as in Hugging Face's inference API
_KEYS = (*_IMAGES, "top_k", "models", "parameters")
_PARAMETERS = ("top_k",)
_LARGEST_FIELD = 64 * 1024  # bytes of a form's text
_MOST_MODELS = 1000


class RequestError(TaskResError):
    """A request that is not answered.

    Attributes:
        status: HTTP status. code: a word for programs. message: for people. headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Upload:
    """A request's content.

    Attributes:
        pictures: each gives the bytes of a picture, or raises an `ImageError`. top_k, models: None where not said.
        file_names: as sent, for a log that wants them.
    """

    pictures: list[Callable[[], bytes]] = field(default_factory=list)
    top_k: int | None = None
    models: list[str] | None = None
    file_names: list[str] = field(default_factory=list)


async def read_upload(request: Any, settings: ServiceSettings, in_thread: Callable[..., Any]) -> Upload:
    """The pictures of a request.

    Args:
        request: of Starlette. in_thread: awaits a function in another thread.

    Raises:
        RequestError: too large, too many, of an unknown kind, or not what it says it is.
    """
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    known = kind.startswith("image/") or kind in ("application/octet-stream", "multipart/form-data", "application/json")
    if not known:
        raise RequestError(
            415, "unsupported_media_type",
            f"A body of the type {visible(kind[:100])!r} is not read. Send a form with files (curl -F file=@cat.jpg), "
            "JSON, or the picture itself with its type (-H 'Content-Type: image/jpeg').",
        )  # fmt: skip
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise RequestError(415, "unsupported_encoding", "Compressed bodies are not read: send the body as it is.")
    body = await _body(request, settings)
    if not body:
        raise RequestError(400, "no_picture", "The request has no body: send a picture.")
    if kind == "application/json":
        upload: Upload = await in_thread(partial(_of_json, body))
    elif kind == "multipart/form-data":
        upload = await _of_form(request, body, settings)
    else:
        upload = Upload([lambda: body])
    if not upload.pictures:
        raise RequestError(400, "no_picture", "The request holds no picture.")
    if len(upload.pictures) > settings.most_pictures:
        raise _too_many(settings)
    return upload


async def _body(request: Any, settings: ServiceSettings) -> bytes:
    from starlette.requests import ClientDisconnect

    large = RequestError(
        413, "body_too_large",
        f"The body is larger than {settings.max_body_mb:g} MB. Send fewer or smaller pictures.", Connection="close",
    )  # fmt: skip
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > settings.max_body):
        raise large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > settings.max_body:
                raise large
    except ClientDisconnect:
        raise RequestError(400, "disconnected", "The client went away before its request was whole.") from None
    return bytes(body)


def _too_many(settings: ServiceSettings) -> RequestError:
    return RequestError(
        413, "too_many_pictures",
        f"A request may hold {settings.most_pictures} pictures. Send the others in requests of their own.",
    )  # fmt: skip


# ---------------------------------------------------------------------- forms


async def _of_form(request: Any, body: bytes, settings: ServiceSettings) -> Upload:
    from python_multipart.multipart import parse_options_header
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    most = settings.most_pictures
    parser = MultiPartParser(
        request.headers, stream(), max_files=most, max_fields=_MOST_MODELS, max_part_size=_LARGEST_FIELD
    )
    parser.spool_max_size = len(body) + 1  # no picture of a client is written to a disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if parser._current_files > most:
            raise _too_many(settings) from None
        raise RequestError(400, "malformed_form", f"The form cannot be read: {visible(error.message)[:200]}") from None
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
    if b"--" + boundary + b"--" not in body:  # the parser passes over a part that is cut off
        raise RequestError(400, "malformed_form", "The form is cut short: its closing boundary is missing.")
    upload = Upload()
    for name, value in form.multi_items():
        if not isinstance(value, str):
            content = value.file.read()
            value.file.close()
            upload.pictures.append(partial(bytes, content))
            upload.file_names.append(value.filename or "")
        elif name == "top_k":
            upload.top_k = checked_top_k(value)
        elif name == "models":
            upload.models = [*(upload.models or []), *value.split(",")]
        else:
            raise RequestError(
                422, "unknown_field",
                f"The field {visible(name[:100])!r} holds text; only 'top_k' and 'models' do. Send pictures as files, "
                "as in curl -F file=@cat.jpg. Addresses are not fetched.",
            )  # fmt: skip
    return upload


# ---------------------------------------------------------------------- JSON


def _of_json(body: bytes) -> Upload:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        message = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, "malformed_json", f"The body is not JSON: {visible(message)[:200]}") from None
    if not isinstance(value, dict):
        raise RequestError(422, "malformed_json", f"Expected a JSON object with 'images'; got {_kind(value)}.")
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise RequestError(
            422, "unknown_field", f"There is no {visible(unknown[0][:100])!r}; there are {', '.join(_KEYS)}."
        )
    given = [key for key in _IMAGES if key in value]
    if len(given) != 1:
        raise RequestError(422, "no_picture", "Give the pictures in 'images', a list of base64 texts or data: URLs.")
    images = value[given[0]]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        wrong = next((image for image in images if not isinstance(image, str)), None) if isinstance(images, list) else 0
        what = _kind(images) if not isinstance(images, list) else f"a list with {_kind(wrong)}"
        raise RequestError(422, "malformed_json", f"'{given[0]}' must be base64 texts or data: URLs; got {what}.")
    upload = Upload([partial(_bytes_of, image) for image in images])
    parameters = value.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(422, "malformed_json", f"'parameters' must be an object; got {_kind(parameters)}.")
    other = [key for key in parameters or {} if key not in _PARAMETERS]
    if other:  # an answer without what was asked for would look like one with it
        raise RequestError(
            422, "unknown_field", f"'parameters' may hold {', '.join(_PARAMETERS)}; got {visible(other[0][:100])!r}."
        )
    top_k = value.get("top_k", (parameters or {}).get("top_k"))
    if top_k is not None:
        upload.top_k = checked_top_k(top_k)
    models = value.get("models")
    if models is not None:
        models = [models] if isinstance(models, str) else models
        if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
            raise RequestError(422, "malformed_json", "'models' must be names of classifiers.")
        upload.models = models
    return upload


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def checked_top_k(value: Any) -> int:
    """How many classes a client wants.

    Raises:
        RequestError: no whole number from 1.
    """
    text = isinstance(value, str) and len(value) <= 10 and value.isascii() and value.isdecimal()
    number = int(value) if text else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 1_000_000_000:
        raise RequestError(
            422, "malformed_top_k", f"'top_k' must be a whole number from 1; got {visible(repr(value)[:50])}."
        )
    return number


def checked_models(models: Sequence[str]) -> list[str]:
    """Names of classifiers, each once, in the order given.

    Raises:
        RequestError: far too many.
    """
    names = list(dict.fromkeys(name.strip() for name in models))
    if len(names) > _MOST_MODELS:
        raise RequestError(413, "too_many_models", f"A request may name {_MOST_MODELS} classifiers.")
    return names


def _bytes_of(text: str) -> bytes:
    """The bytes of a base64 text or a `data:` address.

    Raises:
        ImageError: it is neither; an address of another kind is never followed.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma:
            raise ImageError("the picture is a data: URL without a comma, so without data.")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(text)
    elif _ADDRESS.match(text):
        raise ImageError("the picture is an address, which this service does not fetch. Send the picture itself.")
    packed = "".join(text.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the picture is neither base64 nor a data: URL. Send the picture itself.") from None
