"""Pictures and texts to frozen embeddings, computed once and kept."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module, imported when the name is used: classifying files needs no `datasets`.
_PUBLIC = {
    "Embedder": "embedder",
    "ImageFeatures": "features",
    "StoredFeatures": "stored",
    "TextEmbedder": "texts",
    "augment": "preprocessing",
    "crop_size": "preprocessing",
    "embed_images": "features",
    "use_engine": "embedder",
}

if TYPE_CHECKING:
    from .embedder import Embedder as Embedder
    from .embedder import use_engine as use_engine
    from .features import ImageFeatures as ImageFeatures
    from .features import embed_images as embed_images
    from .preprocessing import augment as augment
    from .preprocessing import crop_size as crop_size
    from .stored import StoredFeatures as StoredFeatures
    from .texts import TextEmbedder as TextEmbedder


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
