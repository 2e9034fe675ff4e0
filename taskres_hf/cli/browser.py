"""`taskres app`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt
from .screen import emit, quiet_libraries, say, say_loading, when_interrupted
from .values import resolve_base, without_base


class Share(opt.Choice):
    OFF = "off"
    ON = "on"


def app(
    base_model: opt.TrainBase = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Folder or Hub id of a classifier to begin with.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="N", help="Port; the first free one from 7860 by default.")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 lets others on the network in.")
    ] = "127.0.0.1",
    share: Annotated[
        Share, typer.Option(help="A public address by Gradio's tunnel: whoever has it can use the app.")
    ] = Share.OFF,
    only_try: Annotated[bool, typer.Option("--only-try", help="Nothing but classifying with --model.")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a classifier in the browser: name classes, drop pictures, train, look at mistakes, download.

    Example:  taskres app --base-model shipped
    """
    when_interrupted(lambda: "The app is stopped; uploaded pictures and what was not downloaded are removed.")
    from ..app import RunningApp, check_installed

    check_installed()
    quiet_libraries(quiet or as_json, collect=as_json)
    name = base_model or (None if model else opt.default_base_model())
    say_loading(name or model, quiet or as_json)
    try:
        running = RunningApp(
            name and resolve_base(name), model, host=host, port=port, share=share == Share.ON, only_try=only_try
        )
    except OSError as error:
        if name is None or model is not None:
            raise
        raise without_base(name, error) from error
    with running:
        result = {"url": running.url, "public_url": running.public_url, "base_model": running.registry.backbone.name}
        places = " and ".join(filter(None, (running.url, running.public_url)))
        emit(as_json, result, lambda: say(f"Open {places} in a browser. Stop with Ctrl-C."))
        running.wait()
