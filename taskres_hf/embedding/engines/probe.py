"""Whether a faster form of the image tower gives its embeddings, and whether it is faster on this machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import ArtifactError
from ...storage import cache_root, read_json, write_json
from .engine import ImageEngine

# Largest error relative to an embedding's length: it tells another tower from rounding, no more.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.15}
_CENTRED = 0.9  # least cosine between what two pictures' embeddings differ by
_ROUNDS = 2


def probe_pictures() -> list[PIL.Image.Image]:
    """Two pictures that have little in common."""
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (4, 5, 3), dtype=np.uint8), generator.integers(0, 120, (40, 50, 3), np.uint8)]
    return [PIL.Image.fromarray(pixels).resize((320, 256), PIL.Image.Resampling.BICUBIC) for pixels in coarse]


def agrees(embeds: Tensor, expected: Tensor, precision: str) -> bool:
    """Whether embeddings [2, D] of the probe pictures are those of the tower as it is, but for rounding.

    What most embeddings have in common would hide an error, so what the two differ by is compared too, where a tower
    tells them apart at all (one with random weights may not).
    """
    if embeds.shape != expected.shape or not bool(embeds.isfinite().all()):
        return not bool(expected.isfinite().all()) and embeds.shape == expected.shape
    tolerance = _TOLERANCE[precision]
    lengths = expected.norm(dim=1)
    if bool(((embeds - expected).norm(dim=1) > tolerance * lengths).any()):
        return False
    difference, wanted = embeds[0] - embeds[1], expected[0] - expected[1]
    told_apart = bool(wanted.norm() > tolerance * lengths.mean())
    return not told_apart or bool(torch.cosine_similarity(difference, wanted, dim=0) >= _CENTRED)


def remembered_choice(base: PreTrainedModel, engine: ImageEngine) -> bool | None:
    """Whether this engine was measured to be faster than the tower as it is, on this machine; None if never."""
    with suppress(ArtifactError):
        seconds = read_json(_file()).get(_key(base, engine))
        if isinstance(seconds, Mapping) and all(isinstance(seconds.get(key), float) for key in ("engine", "stock")):
            return bool(seconds["engine"] <= seconds["stock"])
    return None


def is_faster(
    base: PreTrainedModel, engine: ImageEngine, run: Callable[[], Any], stock: Callable[[], Any], threads: int
) -> bool:
    """Time both on so many threads, in turn, and remember which was faster; `run` and `stock` embed the same."""
    best = {"engine": float("inf"), "stock": float("inf")}
    cores = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number in range(_ROUNDS + 1):
            for name, work in (("engine", run), ("stock", stock)):
                seconds = _seconds(work)
                if number:  # the first round warms up
                    best[name] = min(best[name], seconds)
    finally:
        torch.set_num_threads(cores)
    with suppress(ArtifactError):  # what cannot be remembered is measured again
        write_json(_file(), {**_remembered(), _key(base, engine): best})
    return best["engine"] <= best["stock"]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _remembered() -> dict[str, Any]:
    try:
        return read_json(_file())
    except ArtifactError:
        return {}


def _file() -> Path:
    return cache_root() / "engines.json"


def _key(base: PreTrainedModel, engine: ImageEngine) -> str:
    """What a speed depends on: the processor, the libraries, the tower's shape and the engine."""
    vision = getattr(base.config, "vision_config", base.config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    shape = [base.config.model_type, *(getattr(vision, name, None) for name in names)]
    return json.dumps([_processor(), os.cpu_count(), torch.__version__, shape, engine.name])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
