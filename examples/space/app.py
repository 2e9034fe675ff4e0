"""A Hugging Face Space: classify pictures with a classifier of yours, or run the whole app.

Set `TASKRES_MODEL` (a repository such as me/pets-taskres) among the Space's variables, or write it below. Without one
the whole app runs, on the base in `TASKRES_BASE_MODEL`; what visitors train is theirs to download and is then removed.
"""

from __future__ import annotations

import os

from taskres_hf.app import RunningApp

MODEL = os.environ.get("TASKRES_MODEL", "")
BASE_MODEL = os.environ.get("TASKRES_BASE_MODEL", "openai/clip-vit-base-patch16")


def start() -> RunningApp:
    """The app, being served where Spaces expect it."""
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    if MODEL:
        return RunningApp(model=MODEL, host=host, port=port, only_try=True)
    return RunningApp(BASE_MODEL, host=host, port=port)


if __name__ == "__main__":
    with start() as app:
        app.wait()
