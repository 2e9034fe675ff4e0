"""Pictures that somebody hands over, read once: embedding and preview of each, and why others cannot be read."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image
from torch import Tensor

from ..data import LabelledImages
from ..embedding import Embedder
from ..errors import ImageError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..pictures import Remarks, picture_digest, read_image

_PREVIEW = 112  # pixels of the longer side
_AT_ONCE = 32  # pictures between two moves of the progress bar
Model = TaskResCLIPForImageClassification
Progress = Callable[[float, str], None]  # share done from 0 to 1, and what is being done


def silent(share: float, text: str) -> None:
    """Nobody is watching."""


class Backbone:
    """The frozen base that all sessions share; one of them works with it at a time.

    Args:
        model: any classifier over that base, with its text tower.

    Attributes:
        lock: held by whoever computes. name: of the base, for people.
    """

    def __init__(self, model: TaskResCLIPForImageClassification) -> None:
        self.base, self.tokenizer, self.image_processor = model.clip, model.tokenizer, model.image_processor
        self.revision = model.config.base_model_revision
        self.name = Path(str(model.config.base_model_name_or_path)).name
        self.embedder = Embedder(self.base, self.image_processor)
        self.lock = threading.RLock()

    def classifier(self, class_names: Sequence[str], **prompting: Any) -> TaskResCLIPForImageClassification:
        """A zero-shot classifier over the base."""
        return TaskResCLIPForImageClassification.from_base(
            self.base, class_names, tokenizer=self.tokenizer, image_processor=self.image_processor,
            revision=self.revision, **prompting,
        )  # fmt: skip


class Source:
    """A picture as it was handed over.

    Args:
        content: the path of a file, a cell as of `LabelledImages.source`, or the error that it cannot be had.
        name: of its file, for people. label: class name, or "" for none.
    """

    def __init__(self, content: Any, name: str, label: str = "") -> None:
        self.content, self.name, self.label = content, name, label

    @classmethod
    def of_row(cls, images: LabelledImages, row: int, names: Sequence[str]) -> Source:
        """One of labelled pictures, whose class ids have these names."""
        label = names[images.labels[row]]
        try:
            cell = images.source(row)
        except ImageError as error:  # a damaged member of an archive: said when it is read
            return cls(error, f"row {images.indices[row]}", label)
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        return cls(cell, PurePosixPath(str(path)).name, label)

    def cell(self) -> Any:
        """The picture under its own name, not under that of the temporary file it came in.

        Raises:
            ImageError: there is nothing to read.
        """
        content = self.content
        if isinstance(content, ImageError):
            raise content
        if isinstance(content, Mapping) and content.get("bytes") is None:
            content = content.get("path")
        if isinstance(content, Mapping):
            return {**content, "path": self.name}
        if not isinstance(content, str):  # pixels
            return content
        try:
            return {"bytes": Path(content).read_bytes(), "path": self.name}
        except OSError as error:
            raise ImageError(f"{self.name!r} cannot be opened: {error.strerror}.") from error

    def key(self) -> str:
        """SHA-256 of the content; raises as `cell`."""
        return picture_digest(self.cell())


def read_pictures(
    backbone: Backbone, sources: Mapping[str, Source], problems: list[str], progress: Progress = silent
) -> dict[str, tuple[Tensor, str]]:
    """Embedding [D] fp32 and preview of each picture by its key; why others cannot be read is added to `problems`."""
    embedder, remarks = backbone.embedder, Remarks()
    previews: dict[str, str] = {}

    def load(key: str) -> PIL.Image.Image | None:
        source = sources[key]
        try:
            picture = read_image(source.cell(), remarks=remarks)
            embedder.preprocess.check(picture)
        except ImageError as error:
            told = str(error)
            problems.append(told if source.name in told else f"{source.name}: {told}")
            return None
        previews[key] = _preview(picture)
        return picture

    keys, found = list(sources), {}
    size = min(_AT_ONCE, embedder.batch_size)
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    done = 0
    for batch, embeds in embedder.stream(batches, load, augmented=False, pad_to=size):
        rows = iter(embeds if embeds is not None else ())
        found.update({key: (next(rows).clone(), previews[key]) for key in batch if key in previews})
        done += len(batch)
        progress(done / len(keys), f"Looking at pictures: {done} of {len(keys)}")
    remarks.warn()
    unusable = [key for key, (embeds, _) in found.items() if not bool(embeds.isfinite().all())]
    for key in unusable:
        problems.append(f"{sources[key].name}: the base model gives NaN for it.")
        del found[key]
    return found


def _preview(picture: PIL.Image.Image) -> str:
    small, stream = picture.copy(), io.BytesIO()
    small.thumbnail((_PREVIEW, _PREVIEW))
    small.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
