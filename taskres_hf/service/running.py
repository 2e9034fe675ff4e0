"""Running the service: a socket, a server, a log, and an end at which everything accepted is answered."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..tables import json_text, visible

if TYPE_CHECKING:
    from fastapi import FastAPI


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, so that a port that is taken is known before anything is loaded.

    Nobody is let in yet: until the server runs, a client is refused rather than left waiting.

    Raises:
        ConfigurationError: it cannot be had.
    """
    try:
        found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if os.name == "posix":  # elsewhere it would let two programs have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        return found
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"Cannot listen on {visible(host)} port {port}: {reason}. Choose another --port (0: any free one) or "
            "--host (127.0.0.1: this machine alone, 0.0.0.0: every network)."
        ) from error


def address_of(listening: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listening: socket.socket, *, drain_s: float = 30.0, on_ready: Callable[[], Any]) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then take no more, answer what was accepted, and raise the signal again.

    Args:
        listening: of `bind`. drain_s: seconds for what was accepted; what is not answered by then is given up.
        on_ready: called when requests are answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="on", ws="none", backlog=2048,
        http="h11",  # bounds what a client may send as headers
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )  # fmt: skip
    Server(config).run(sockets=[listening])


class _AsJson(logging.Formatter):
    """Access lines as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "taskres", None) or {"message": visible(super().format(record))}
        return json_text({"time": self.formatTime(record), **fields})


def log_to_stderr(as_json: bool = False) -> None:
    """Show the access log, and what uvicorn and warnings say when something is wrong, on the standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_AsJson() if as_json else logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (
        ("taskres_hf.service.access", logging.INFO),
        ("uvicorn.error", logging.WARNING),
        ("py.warnings", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
