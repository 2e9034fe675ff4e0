"""`taskres serve`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from ..service.settings import ServiceSettings
from . import options as opt
from .pack import unpacked
from .screen import emit, quiet_libraries, say, say_loading, warn, when_interrupted
from .values import check_device, resolve_base

LIMITS = "Limits"
_DEFAULT = ServiceSettings()

Classifiers = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR",
        show_default=False,
        help="Folders, Hub ids or packed files of trained classifiers, or NAME=DIR each.",
    ),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="127.0.0.1: only this machine; 0.0.0.0: every network.")]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any free one, which is printed.")]
MaxBatch = Annotated[int, typer.Option(min=1, metavar="N", help="Pictures that pass the tower together, at most.")]
MaxWait = Annotated[
    float, typer.Option("--max-wait-ms", min=0, metavar="MS", help="How long a picture waits for others, at most.")
]
MaxBody = Annotated[
    float, typer.Option("--max-body-mb", min=0.001, metavar="MB", help="Size of a request.", rich_help_panel=LIMITS)
]
MaxPictures = Annotated[int, typer.Option(min=1, metavar="N", help="Pictures a request.", rich_help_panel=LIMITS)]
MaxQueue = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", help="Pictures accepted and not answered; beyond them 503.", rich_help_panel=LIMITS
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.05, metavar="S", help="Seconds to an answer.", rich_help_panel=LIMITS)
]
Drain = Annotated[
    float,
    typer.Option("--drain", min=1, metavar="S", help="Seconds to finish in, when stopped.", rich_help_panel=LIMITS),
]
FastPreprocessing = Annotated[
    bool,
    typer.Option(
        "--fast-preprocessing",
        help="Prepare pictures as 'taskres predict' does, within two grey levels of pipeline; faster.",
        rich_help_panel=opt.SPEED,
    ),
]
LogFileNames = Annotated[
    bool,
    typer.Option("--log-file-names", help="Log the names of uploaded files too.", rich_help_panel=opt.OUTPUT),
]
NoLog = Annotated[bool, typer.Option("--quiet", "-q", help="No line for each request.", rich_help_panel=opt.OUTPUT)]


def serve(
    classifiers: Classifiers,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: MaxBatch = _DEFAULT.max_batch,
    max_wait_ms: MaxWait = _DEFAULT.max_wait_ms,
    top_k: Annotated[int, typer.Option(min=1, metavar="N", help="Classes where a request says none.")] = _DEFAULT.top_k,
    device: opt.Device = None,
    max_body_mb: MaxBody = _DEFAULT.max_body_mb,
    max_pictures: MaxPictures = _DEFAULT.max_pictures,
    max_queue: MaxQueue = _DEFAULT.max_queue,
    timeout: Timeout = _DEFAULT.timeout_s,
    drain: Drain = 30.0,
    strength: opt.Strength = None,
    base_model: opt.BaseModel = None,
    dtype: opt.Dtype = None,
    engine: opt.Engine = opt.EngineName.TORCH,
    precision: opt.Precision = opt.PrecisionName.FP32,
    fast_preprocessing: FastPreprocessing = False,
    log_file_names: LogFileNames = False,
    as_json: opt.Json = False,
    quiet: NoLog = False,
    debug: opt.Debug = False,
) -> None:
    """Serve classifiers over HTTP. Those of one base share it: a picture passes it once, batched with others.

    Ends with SIGTERM or Ctrl-C, after everything that was accepted is answered.

    Example:  taskres serve my-classifier food=other/ --port 8080
    """
    from ..service import check_installed, create_app
    from ..service.running import address_of, bind, log_to_stderr
    from ..service.running import serve as run

    check_installed()
    when_interrupted(lambda: "Nothing was served yet.")
    listening = bind(host, port)
    quiet_libraries(quiet or as_json, collect=as_json)
    say_loading(", ".join(classifiers), quiet or as_json)
    settings: dict[str, Any] = {
        "max_batch": max_batch, "max_wait_ms": max_wait_ms, "top_k": top_k, "max_body_mb": max_body_mb,
        "max_pictures": max_pictures, "max_queue": max_queue, "timeout_s": timeout, "engine": engine.value,
        "precision": precision.value, "exact_preprocessing": not fast_preprocessing, "access_log": not quiet,
        "log_file_names": log_file_names,
    }  # fmt: skip
    with unpacked(classifiers) as sources:
        app = create_app(
            sources, device=check_device(device, False), base_model=base_model and resolve_base(base_model),
            dtype=dtype and dtype.value, strength=strength, **settings,
        )  # fmt: skip
    log_to_stderr(as_json)
    service, address = app.state.service, address_of(listening)

    def how_it_ended() -> str:
        left = service.given_up
        return f"{left} requests got no answer in --drain seconds." if left else "Everything accepted was answered."

    def ready() -> None:
        when_interrupted(how_it_ended)
        rows = [service.describe(name) for name in service]
        emit(as_json, {"address": address, "models": rows}, lambda: _show(address, rows, len(service.bases())))
        logging.captureWarnings(True)  # until now they were said, or kept for the JSON value

    if host not in ("127.0.0.1", "::1", "localhost"):
        warn("Anyone who reaches this machine can send pictures: there is no password. See docs/serve.md.")
    run(app, listening, drain_s=drain, on_ready=ready)


def _show(address: str, rows: list[dict[str, Any]], bases: int) -> None:
    for row in rows:
        say(f"  {row['name']}: {row['classes']} classes, {row['base_model']}")
    many = f"{len(rows)} classifiers over {bases} base{'s' if bases > 1 else ''}" if len(rows) > 1 else "1 classifier"
    say(f"Serving {many} on {address}; {address}/docs tells how to ask. Ctrl-C ends it.")
