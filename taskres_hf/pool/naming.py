"""Names of classifiers in a pool and in a packed file: such as a folder, an address and a terminal can hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..tables import visible

LONGEST_NAME = 100


def as_name(text: str) -> str:
    """Text as a name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:LONGEST_NAME].rstrip("-.")


def checked_name(name: Any) -> str:
    """A name that is one.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(name, str) or not name or name != as_name(name):
        raise ConfigurationError(
            f"A classifier cannot be called {visible(str(name)[:LONGEST_NAME])!r}: a name has letters, digits, '.', "
            f"'_' and '-', begins and ends with neither '.' nor '-', and has at most {LONGEST_NAME} characters."
        )
    return name


def _told(source: Any) -> str:
    return "a loaded model" if hasattr(source, "classifier") else visible(os.fspath(source))


def named(sources: Mapping[str, Any] | Sequence[Any] | Any) -> dict[str, Any]:
    """Folders, Hub ids and loaded models by name; those without one are named after their folder or repository.

    Args:
        sources: by name, or a list in which text may also be NAME=FOLDER.

    Raises:
        ConfigurationError: a name that is none, or two of one name.
    """
    if isinstance(sources, Mapping):
        return {checked_name(name): source for name, source in sources.items()}
    alone = isinstance(sources, (str, os.PathLike)) or hasattr(sources, "classifier")
    found: dict[str, Any] = {}
    several: list[Any] = [sources] if alone else list(sources)
    for source in several:
        model: Any = source if hasattr(source, "classifier") else None
        where = str(os.fspath(source)) if model is None else str(model.config._name_or_path or "classifier")
        name, sign, rest = where.partition("=")
        if sign and not os.path.exists(where) and isinstance(source, str):
            source, where = rest, name
        name = as_name((Path(where).resolve() if os.path.isdir(where) else Path(where)).name)
        if not name:
            raise ConfigurationError(f"{visible(where)!r} gives no name: say NAME={visible(where)}.")
        if name in found:
            raise ConfigurationError(
                f"Two classifiers would be called {name!r}: {_told(found[name])} and {_told(source)}. Name them, as in "
                f"{{{name!r}: ..., '{name}-2': ...}} or {name}-2=FOLDER."
            )
        found[name] = source
    return found
