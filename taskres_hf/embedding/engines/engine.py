"""What an engine is: a way to run the frozen image tower."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...encoders import encode_images, image_weights_digest
from ...storage import cache_root, umask
from .rewriting import rewritten

_FORMAT = 5  # of converted towers kept on disk
_SHEET = "sha256.json"  # the checksums of a converted tower's files


@dataclass(frozen=True)
class ImageEngine:
    """A way to run the tower: call it with pixel values [B, 3, H, W] to get embeddings [B, D] fp32 on the CPU.

    Attributes:
        engine, precision: what was chosen. batch_size: pictures a pass at which it is fastest.
        prepare: converts the tower and returns what runs it; called when the first pictures come.
        takes_bytes: whether the pixel values it takes are bytes, uint8, not yet normalised.
        is_stock: whether it is the tower as it is, so that there is nothing to compare it with.
    """

    engine: str
    precision: str
    batch_size: int
    prepare: Callable[[], Callable[[Mapping[str, Tensor]], Tensor]]
    takes_bytes: bool = False
    is_stock: bool = False

    def get_ready(self) -> None:
        """Convert the tower now rather than when the first pictures come."""
        _ = self._run

    @cached_property
    def _run(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return self.prepare()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.takes_bytes and inputs["pixel_values"].dtype != torch.uint8:
            raise TypeError(f"This engine takes pictures as bytes; got {inputs['pixel_values'].dtype}.")
        return self._run(inputs)

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"


class Tower(nn.Module):
    """Pixel values to embeddings, as one module to convert."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = rewritten(base)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return encode_images(self.base, {"pixel_values": pixel_values})


def picture_size(base: PreTrainedModel) -> tuple[int, int]:
    size = base.config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def converted_tower(engine: str, name: str, base: PreTrainedModel, convert: Callable[[Path], None]) -> Path:
    """A file of a converted tower, kept in the cache folder for the next time.

    Args:
        engine: folder to keep it in. name: of the file that opens it. convert: writes this file, given its path, and
            what belongs to it into the same folder.

    A folder of files that is damaged is made again; one that cannot be kept lasts as long as the process.
    """
    folder = cache_root() / engine / f"{image_weights_digest(base)[:24]}-{_FORMAT}"
    if folder.is_dir():
        if _is_whole(folder):
            return folder / name
        warnings.warn(f"The converted tower in {folder} is damaged and is made again.", stacklevel=2)
        shutil.rmtree(folder, ignore_errors=True)
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        convert(staging / name)
        sums = {file.name: _sha256(file) for file in staging.iterdir()}
        (staging / _SHEET).write_text(json.dumps(sums), encoding="utf-8")
        staging.chmod(0o777 & ~umask())
        os.rename(staging, folder)
    except OSError as error:
        if not folder.is_dir():  # or another process was faster
            warnings.warn(f"The converted tower is not kept for the next run: {error}.", stacklevel=2)
            folder = Path(tempfile.mkdtemp(prefix="taskres-"))
            weakref.finalize(base, shutil.rmtree, folder, ignore_errors=True)
            convert(folder / name)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folder / name


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _SHEET).read_text(encoding="utf-8"))
        return bool(sums) and all(_sha256(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
