"""Which session belongs to which page, and which uploaded files go when a page is closed."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from .looking import Backbone, Model
from .session import Session


class Registry:
    """One `Session` for each open page.

    Args:
        backbone: shared by all. root: a folder of its own, in which uploads arrive too; removed by `close`.
        model: a trained classifier that every session begins with.
    """

    def __init__(self, backbone: Backbone, root: Path, model: Model | None = None) -> None:
        self.backbone, self.root, self._model = backbone, root.resolve(), model
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._uploads: dict[Path, set[str]] = defaultdict(set)  # file to the pages that sent it: equal files are one

    def __len__(self) -> int:
        return len(self._sessions)

    def session(self, page: str) -> Session:
        """The session of a page, made when first asked for."""
        with self._lock:
            if page not in self._sessions:
                folder = self.root / f"session-{secrets.token_hex(8)}"
                self._sessions[page] = Session(self.backbone, folder, self._model)
            return self._sessions[page]

    def uploads(self, page: str, files: Iterable[str]) -> list[str]:
        """Files that a page sent, which go when it is closed.

        Raises:
            DataError: a path that is not one of an upload.
        """
        paths = []
        for file in files:
            path = Path(file).resolve()
            inside = path.is_relative_to(self.root) and path.is_file()
            if not inside or path.relative_to(self.root).parts[0].startswith("session-"):
                raise DataError(f"{Path(file).name!r} was not uploaded here.")
            paths.append(path)
        with self._lock:
            for path in paths:
                self._uploads[path].add(page)
        return [str(path) for path in paths]

    def end(self, page: str) -> None:
        """Forget a page: its session, its folder, and what no other page has sent too."""
        with self._lock:
            session = self._sessions.pop(page, None)
            for path in [path for path, pages in self._uploads.items() if page in pages]:
                self._uploads[path].discard(page)
                if not self._uploads[path]:
                    del self._uploads[path]
                    path.unlink(missing_ok=True)
                    with suppress(OSError):  # another upload lies there
                        path.parent.rmdir()
        if session is not None:
            with session.lock:
                session.close()

    def close(self) -> None:
        """Forget every page and remove the folder."""
        for page in list(self._sessions):
            self.end(page)
        shutil.rmtree(self.root, ignore_errors=True)
