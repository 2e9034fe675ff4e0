"""The page: components and events, each of which calls one method of a `Session` and shows what came of it."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from ..errors import TaskResError
from . import showing
from .registry import Registry
from .session import Guess, Picture, Session

_LEFT_OUT = "— leave out —"
_MISTAKES, _ALL = "Mistakes", "All pictures"
_A_PAGE = 24
_ARCHIVES = [".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz"]
_HIDDEN = {"api_visibility": "private"}  # no event is an interface for programs
_BAR = gr.Progress()
_F = TypeVar("_F", bound=Callable[..., Any])


def make_page(registry: Registry, *, may_push: bool = True, only_try: bool = False) -> gr.Blocks:
    """The page over a registry of sessions.

    Args:
        may_push: offer the upload to the Hub, which uses the login of the machine that the app runs on.
        only_try: nothing but classifying, with the classifier that sessions begin with.
    """
    with gr.Blocks(title="taskres", analytics_enabled=False) as page:
        made = _Page(registry)
        made.head(only_try)
        if not only_try:
            made.classes()
            made.pictures()
            made.training()
            made.labels()
        made.trying(1 if only_try else 5)
        if not only_try:
            made.keeping(may_push)
            made.connect()
        page.unload(made.end)
    return page


def _told(work: _F) -> _F:
    """Around an event: what goes wrong is a message on the page, and a traceback at most in the terminal."""

    @functools.wraps(work)
    def event(*values: Any, **named: Any) -> Any:
        try:
            return work(*values, **named)
        except (TaskResError, OSError) as error:
            text = showing.safe(str(error)[:2000]).replace("\n", "<br>")
        except Exception as error:
            logging.getLogger(__name__).exception("An event of the app failed")
            text = f"This is a fault of the app ({type(error).__name__}); the terminal it runs in says more."
        raise gr.Error(text, duration=None, print_exception=False)

    return event  # type: ignore[return-value]


def _now() -> str:
    """A value that no State had before, so that what depends on it is made anew."""
    return uuid.uuid4().hex


def _report(progress: gr.Progress) -> Callable[[float, str], None]:
    return lambda share, text: progress(share, desc=text)


class _Page:
    """The parts of the page, top to bottom."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.pictures_at = gr.State("")  # when pictures, labels or the classifier changed
        self.list_at = gr.State("")  # when the list of labels is to be made anew, which takes the focus away

    def end(self, request: gr.Request) -> None:
        """The page was closed."""
        self.registry.end(str(request.session_hash))

    def _session(self, request: gr.Request) -> Session:
        return self.registry.session(str(request.session_hash))

    def _sent(self, request: gr.Request, files: Any) -> list[str]:
        """Paths of files that this page sent."""
        listed = files if isinstance(files, list) else [files] if files else []
        return self.registry.uploads(str(request.session_hash), map(str, listed))

    # ------------------------------------------------------------------ the parts

    def head(self, only_try: bool) -> None:
        name = showing.safe(self.registry.backbone.name)
        what = (
            "Classifies pictures."
            if only_try
            else "Teach a classifier with a few pictures of each class. Pictures stay on the machine this runs on."
        )
        gr.HTML(f"<h1>taskres</h1><p class='lead'>{what} Base model: {name}.</p>")

    def classes(self) -> None:
        with gr.Column(elem_classes="step"):
            gr.HTML(showing.step(1, "Name the classes", "At least two, one a line. Change a name to rename its class."))
            self.names = gr.Textbox(label="Classes", lines=4, placeholder="tabby cat\nbeagle", elem_id="classes")
            with gr.Accordion("Wording", open=False):
                self.wording = gr.Textbox(
                    label="A sentence about a picture, with {} for the class",
                    info="The base model compares pictures with it: say what kind of pictures yours are.",
                    placeholder="a photo of a {}.",
                )
            with gr.Row():
                self.use = gr.Button("Use these classes", variant="primary", scale=0, min_width=220)
            self.named = gr.HTML()

    def pictures(self) -> None:
        with gr.Column(elem_classes="step"):
            text = "To each class, or all at once as a folder or a zip with one sub-folder for each class."
            gr.HTML(showing.step(2, "Add pictures", text))
            with gr.Row():
                self.archive = gr.File(
                    label="A zip or tar with one folder for each class",
                    file_types=_ARCHIVES,
                    height=150,
                    interactive=True,
                )
                self.folder = gr.HTML(showing.FOLDER, js_on_load=showing.FOLDER_SCRIPT, elem_id="folder")
            self.added = gr.HTML(elem_id="added")
            self.summary = gr.HTML(elem_id="summary")

            @gr.render(inputs=[self.pictures_at])  # type: ignore[untyped-decorator]
            def cards(_: str, request: gr.Request) -> None:
                session = self._session(request)
                with session.lock:
                    guesses = session.zero_shot() if session.class_names else []
                    names = list(session.class_names)
                with gr.Row(equal_height=False):
                    for name in names:
                        with gr.Column(min_width=300):
                            self._card(name, [guess for guess in guesses if guess.picture.label == name])

    def _card(self, name: str, guesses: list[Guess]) -> None:
        label = f"{name} ({len(guesses)})"
        drop = gr.File(label=label, file_count="multiple", height=150, elem_classes="drop", interactive=True)
        if guesses:
            gr.HTML(showing.strip(guesses))

        @_told
        def add(files: Any, request: gr.Request, progress: gr.Progress = _BAR) -> tuple[str, str, None]:
            session = self._session(request)
            with session.lock:
                result = session.add_files(self._sent(request, files), name, _report(progress))
            return showing.added(result), _now(), None

        drop.upload(add, drop, [self.added, self.pictures_at, drop], **_HIDDEN)

    def training(self) -> None:
        with gr.Column(elem_classes="step"):
            text = "Seconds, on a CPU too: each picture was looked at once already. Nothing to set."
            gr.HTML(showing.step(3, "Train", text))
            with gr.Row():
                self.train = gr.Button("Train", variant="primary", elem_id="train", scale=0, min_width=220)
            self.report = gr.HTML(elem_id="report")

    def labels(self) -> None:
        with gr.Column(elem_classes="step"):
            text = (
                "Mistakes on pictures that training had not seen, the surest first. Some are wrong labels: correct "
                "them and train again."
            )
            gr.HTML(showing.step(4, "Look at mistakes", text))
            with gr.Row():
                self.which = gr.Dropdown([_MISTAKES, _ALL], value=_MISTAKES, label="Show", elem_id="which")
                self.most = gr.State(_A_PAGE)
            self.fixed = gr.HTML(elem_id="fixed")

            @gr.render(inputs=[self.list_at, self.which, self.most])  # type: ignore[untyped-decorator]
            def rows(_: str, which: str, most: int, request: gr.Request) -> None:
                session = self._session(request)
                with session.lock:
                    listed, names = _listed(session, which), list(session.class_names)
                if not listed:
                    gr.HTML(showing.told([_why_none(session, which)]))
                with gr.Row(equal_height=False):
                    for picture, guess in listed[:most]:
                        with gr.Column(min_width=210, scale=0, elem_classes="judged"):
                            self._row(picture, guess, names)
                if len(listed) > most:
                    more = gr.Button(f"Show more ({len(listed) - most} left)")
                    more.click(lambda: most + _A_PAGE, None, self.most, **_HIDDEN)

    def _row(self, picture: Picture, guess: Guess | None, names: list[str]) -> None:
        gr.HTML(showing.judged(picture, guess))
        label = gr.Dropdown(
            [*names, _LEFT_OUT], value=picture.label, label=f"Class of {picture.name}", show_label=False,
            container=False, interactive=True,
        )  # fmt: skip

        @_told
        def fix(chosen: str, request: gr.Request) -> tuple[str, str]:
            session = self._session(request)
            with session.lock:
                if chosen == _LEFT_OUT:
                    session.remove(picture.key)
                    text = f"{picture.name} is left out."
                else:
                    session.relabel(picture.key, chosen)
                    text = f"{picture.name} is {chosen} now."
            return showing.told([f"{text} Train again when you are done."]), _now()

        label.input(fix, label, [self.fixed, self.pictures_at], **_HIDDEN)

    def trying(self, number: int) -> None:
        with gr.Column(elem_classes="step"):
            gr.HTML(showing.step(number, "Try it", "On pictures that it has never seen."))
            with gr.Row():
                drop = gr.File(label="Pictures", file_count="multiple", height=200, elem_id="try", interactive=True)
                camera = gr.Image(
                    sources=["clipboard", "webcam"], type="filepath", image_mode=None, label="Clipboard or camera",
                    height=200, buttons=[], interactive=True,
                )  # fmt: skip
            shown = gr.HTML(elem_id="answers")

            @_told
            def classify(files: Any, request: gr.Request) -> tuple[str, None]:
                session = self._session(request)
                with session.lock:
                    return showing.answers(session.classify(self._sent(request, files))), None

            drop.upload(classify, drop, [shown, drop], **_HIDDEN)
            camera.input(classify, camera, [shown, camera], **_HIDDEN)

    def keeping(self, may_push: bool) -> None:
        with gr.Column(elem_classes="step"):
            text = "A few kilobytes: what was learned, and the name of the base model. Your pictures are not in it."
            gr.HTML(showing.step(6, "Keep it", text))
            with gr.Row():
                self.download = gr.DownloadButton(
                    "Download classifier.zip", interactive=False, elem_id="download", scale=0, min_width=280,
                    variant="primary",
                )  # fmt: skip
            if not may_push:
                return
            with gr.Accordion("Upload it to the Hugging Face Hub", open=False):
                name = gr.Textbox(
                    label="Repository", placeholder="me/pets-taskres",
                    info="Uses the login of this machine; log in once in a terminal: hf auth login",
                )  # fmt: skip
                private = gr.Checkbox(value=True, label="Only I can see it")
                push, where = gr.Button("Upload"), gr.HTML(elem_id="pushed")

            @_told
            def upload(repo_id: str, hidden: bool, request: gr.Request) -> str:
                session = self._session(request)
                with session.lock:
                    place = session.push(repo_id or "", hidden)
                return showing.told([f"Uploaded to {place}"])

            push.click(upload, [name, private], where, **_HIDDEN)

    # ------------------------------------------------------------------ the events that touch several parts

    def connect(self) -> None:
        """The events of the parts that are always there."""

        @_told
        def use(names: str, wording: str, request: gr.Request) -> tuple[str, str, str]:
            session = self._session(request)
            with session.lock:
                notes = session.set_classes(names or "", (wording or "").strip() or None)
                lines = [f"{len(session.class_names)} classes: {', '.join(session.class_names)}", *notes]
            return showing.told(lines), _now(), _now()

        @_told
        def archive(file: Any, request: gr.Request, progress: gr.Progress = _BAR) -> tuple[str, str, str, None]:
            session = self._session(request)
            with session.lock:
                (path,) = self._sent(request, file)
                result = session.add_tree(path, _report(progress))
                return showing.added(result), "\n".join(session.class_names), _now(), None

        @_told
        def folder(event: gr.EventData, request: gr.Request, progress: gr.Progress = _BAR) -> tuple[str, str, str]:
            session, sent = self._session(request), event.files
            with session.lock:
                paths = self._sent(request, [path for path, _ in sent])
                places = [str(place) for _, place in sent]
                result = session.add_folder(zip(paths, places, strict=True), _report(progress))
                return showing.added(result), "\n".join(session.class_names), _now()

        @_told
        def train(request: gr.Request, progress: gr.Progress = _BAR) -> tuple[str, str, str, str]:
            session = self._session(request)
            with session.lock:
                session.train(_report(progress))
                return showing.report(session), "", _now(), _now()

        changed = [self.pictures_at]
        self.use.click(use, [self.names, self.wording], [self.named, *changed, self.list_at], **_HIDDEN)
        self.archive.upload(archive, self.archive, [self.added, self.names, *changed, self.archive], **_HIDDEN)
        self.folder.submit(folder, None, [self.added, self.names, *changed], **_HIDDEN)
        self.train.click(train, None, [self.report, self.fixed, *changed, self.list_at], **_HIDDEN)
        parts = [self.summary, self.report, self.which, self.download]
        self.pictures_at.change(self._refresh, None, parts, show_progress="hidden", **_HIDDEN)
        gr.on(None, self._opened, None, [self.names, self.wording, *parts], show_progress="hidden", **_HIDDEN)

    def _opened(self, request: gr.Request) -> tuple[Any, ...]:
        """What a page shows when it is opened."""
        session = self._session(request)
        if not session.class_names:  # somebody may be typing already
            return (gr.skip(), gr.skip(), *self._refresh(request))
        wording = session.templates[0] if len(session.templates) == 1 else ""
        return ("\n".join(session.class_names), wording, *self._refresh(request))

    def _refresh(self, request: gr.Request) -> tuple[Any, ...]:
        """Summary, report, what can be listed, and the download, as they are now."""
        session = self._session(request)
        with session.lock:
            guesses = session.zero_shot() if session.class_names else []
            choices = gr.Dropdown([_MISTAKES, _ALL, *session.class_names])
            ready = session.outcome is not None and not session.is_stale
            file = str(session.archive) if ready else None
            download = gr.DownloadButton(value=file, interactive=ready)
            return showing.summary(session, guesses), showing.report(session), choices, download


def _listed(session: Session, which: str) -> list[tuple[Picture, Guess | None]]:
    """The pictures of a list, each with the mistake made on it."""
    mistakes = {guess.picture.key: guess for guess in session.mistakes()}
    if which == _MISTAKES:
        return [(guess.picture, guess) for guess in mistakes.values()]
    pictures = [picture for picture in session.pictures.values() if which in (_ALL, picture.label)]
    return [(picture, mistakes.get(picture.key)) for picture in pictures]


def _why_none(session: Session, which: str) -> str:
    if which != _MISTAKES:
        return "No pictures yet."
    return "No mistakes." if session.outcome and session.outcome.metrics else "Train first: mistakes are shown here."
