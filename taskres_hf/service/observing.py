"""What operators see: metrics in Prometheus' format, and one line a request."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..tables import visible

Scope = MutableMapping[str, Any]

LOGGER = logging.getLogger("taskres_hf.service.access")
_METHODS = frozenset(("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"))
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
_QUIET = ("/health", "/ready", "/metrics")  # asked for every few seconds by programs
_LONGEST = 200  # characters of a file name in the log
NOTES = "taskres"  # in a request's scope: what its line in the log is to say


class Metrics:
    """Counters of one app, apart from those of others in the process.

    Args:
        in_queue: tells how many pictures were accepted and are not answered yet.
    """

    def __init__(self, in_queue: Callable[[], float]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("taskres_requests", "Requests.", ["method", "route", "code"], **own)
        self.seconds = Histogram(
            "taskres_request_seconds", "Seconds to an answer.", ["method", "route"], buckets=_SECONDS, **own
        )
        self.pictures = Counter("taskres_pictures", "Pictures, by what came of them.", ["outcome"], **own)
        self.batches = Histogram("taskres_batch_pictures", "Pictures of a pass of the tower.", buckets=_BATCH, **own)
        queue = Gauge("taskres_queue_pictures", "Pictures accepted and not answered yet.", **own)
        queue.set_function(in_queue)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Watch:
    """ASGI middleware: an id for every request, its metrics, and its line in the log.

    An id that the client sends in `X-Request-ID` is taken where it is one; whatever else clients send (paths, methods,
    file names) never becomes a label and is logged only on request, with nothing in it that a terminal obeys.
    """

    def __init__(self, app: Any, metrics: Metrics, access_log: bool, log_file_names: bool) -> None:
        self.app, self.metrics = app, metrics
        self.access_log, self.log_file_names = access_log, log_file_names

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Any, send: Callable[..., Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500
        notes: dict[str, Any] = scope.setdefault(NOTES, {})
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        notes["id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", notes["id"].encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self._note(scope, notes, status, time.perf_counter() - begin)

    def _note(self, scope: Scope, notes: dict[str, Any], status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = str(getattr(scope.get("route"), "path", "other"))
        self.metrics.requests.labels(method, route, str(status)).inc()
        self.metrics.seconds.labels(method, route).observe(seconds)
        if not self.access_log:
            return
        fields: dict[str, Any] = {
            "method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1), "id": notes["id"],
            **{key: notes[key] for key in ("pictures", "failed", "models") if key in notes},
        }  # fmt: skip
        if self.log_file_names and notes.get("file_names"):
            fields["files"] = [visible(name[:_LONGEST]) for name in notes["file_names"]]
        words = [f"{key}={'+'.join(value) if isinstance(value, list) else value}" for key, value in fields.items()]
        level = logging.DEBUG if route in _QUIET and status == 200 else logging.INFO
        LOGGER.log(
            level, "%s %s %d %s ms %s", method, route, status, fields["ms"], " ".join(words[4:]), extra={NOTES: fields}
        )
