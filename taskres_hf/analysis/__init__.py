"""Before and after training: how hard a task is, what was learned, how many pictures, and which to label next."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module, imported when the name is used.
_PUBLIC = {
    "TransferDifficulty": "transfer",
    "transfer_difficulty": "transfer",
    "what_it_learned": "learned",
}

if TYPE_CHECKING:
    from .learned import what_it_learned as what_it_learned
    from .transfer import TransferDifficulty as TransferDifficulty
    from .transfer import transfer_difficulty as transfer_difficulty


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
