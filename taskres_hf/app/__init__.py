"""The app in the browser: name classes, drop pictures, train, look at mistakes, try, keep (`taskres app`)."""

from __future__ import annotations

import ipaddress
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigurationError, MissingExtraError

# The page may load nothing from elsewhere and run no script that is not its own.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)
_MOST_UPLOADED = "2gb"


def check_installed() -> None:
    """Raises MissingExtraError without gradio."""
    if find_spec("gradio") is None:
        raise MissingExtraError('The app needs gradio: pip install "taskres_hf[app]".')


class RunningApp:
    """An app that is being served; a context manager, which stops it and removes what it kept.

    Args:
        base_model: Hub id or folder of a dual encoder; with `model`, another place of its base.
        model: folder or Hub id of a trained classifier to begin with.
        host, port: where it listens; None for the first free port from 7860.
        share: let Gradio make a public address that leads here. Uploading to the Hub is not offered then, nor on a
            host that others can reach: it would use the login of this machine.
        only_try: nothing but classifying with `model`.

    Attributes:
        url: the local address. public_url: the shared one, or None. registry: the sessions of open pages.

    Raises:
        MissingExtraError: gradio is not installed. ConfigurationError: the port is taken, nothing to begin with,
            or a classifier of several labels per picture.
        Whatever `from_base` or `from_pretrained` raise.
    """

    def __init__(
        self,
        base_model: str | None = None,
        model: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        share: bool = False,
        only_try: bool = False,
    ) -> None:
        check_installed()
        if base_model is None and model is None:
            raise ConfigurationError("Give base_model, the base to train on, or model, a classifier to begin with.")
        if only_try and model is None:
            raise ConfigurationError("only_try classifies with a trained classifier: give it as model.")
        from .looking import Backbone, Model
        from .registry import Registry

        trained = None
        if model is not None:
            trained = Model.from_pretrained(model, base_model=base_model, text_tower=True)
            trained.classifier.check_one_label("The app")
        first = trained or Model.from_base(str(base_model), ["a", "b"])
        root = Path(tempfile.mkdtemp(prefix="taskres-app-")).resolve()
        self.registry = Registry(Backbone(first), root, trained)
        try:
            self.url, self.public_url = self._serve(host, port, share, only_try)
        except BaseException:
            self.registry.close()
            raise

    def _serve(self, host: str, port: int | None, share: bool, only_try: bool) -> tuple[str, str | None]:
        # Gradio reads these when it is imported and when components are made.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(self.registry.root)
        import gradio as gr
        from starlette.middleware import Middleware

        from .layout import make_page
        from .showing import CSS

        private = _is_loopback(host) and not share
        self._page = make_page(self.registry, may_push=private, only_try=only_try)
        fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts).set(
            button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800"
        )
        try:
            _, url, public = self._page.queue(default_concurrency_limit=4).launch(
                server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, ssr_mode=False,
                pwa=False, enable_monitoring=False, run_history=False, footer_links=[], max_file_size=_MOST_UPLOADED,
                app_kwargs={"middleware": [Middleware(_Guard, hosts=_names(host) if private else None)]},
                theme=theme, css=CSS,
            )  # fmt: skip
        except OSError as error:
            raise ConfigurationError(f"The app cannot be served on {host}: {error} Choose another port.") from error
        return str(url), public

    def wait(self) -> None:
        """Serve until Ctrl-C, which is raised here."""
        while self._page.is_running:
            time.sleep(0.2)

    def close(self) -> None:
        """Stop, and remove uploads and sessions."""
        self._page.close(verbose=False)
        self.registry.close()

    def __enter__(self) -> RunningApp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Guard:
    """ASGI middleware: the page loads nothing from elsewhere; other names for this machine are refused.

    The second keeps a page of another site from reaching the app by a name of its own that leads here.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts is not None and urlsplit(f"//{asked}").hostname not in self.hosts:
            await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Ask for it by the address that taskres app printed."})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                rules = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *rules]}
            await send(message)

        await self.app(scope, receive, guarded)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names(host: str) -> frozenset[str]:
    return frozenset({host, "localhost", "127.0.0.1", "::1"})
