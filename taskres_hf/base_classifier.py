"""From prompts to the base classifier `t` [K, D], and the fingerprint that tells whether it is still the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .encoders import encode_texts
from .errors import ArtifactError, BaseMismatchError, ConfigurationError
from .storage import cache_root, read_tensors, write_tensors

_SKETCHES = 8
_TOLERANCE = 2e-3  # relative to the norm of t: above rounding of fp16 weights, far below another checkpoint
# Of an image side's sketch, by the coarser dtype of the two it was made from.
_IMAGE_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def base_embeddings(
    base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[str]], average: str = "raw"
) -> Tensor:
    """The base classifier: one raw text embedding per class, averaged over its prompts.

    Args:
        prompts: K lists of prompts, from `prompts.class_prompts`.
        average: `"raw"` averages the embeddings as they come (published TaskRes); `"normalized"` gives every prompt
            unit length first, as CLIP's own ensembles do, and the mean the average raw length, so that `alpha` and
            the learning rate keep their meaning.

    Returns:
        `t` [K, D] fp32 on the CPU, not normalised.

    Raises:
        ConfigurationError: unknown `average`.
    """
    if average not in ("raw", "normalized"):
        raise ConfigurationError(f"`prompt_average` must be 'raw' or 'normalized'; got {average!r}.")
    flat = [prompt for group in prompts for prompt in group]
    embeddings = encode_texts(base, tokenizer, flat)
    rows = []
    for group in embeddings.split([len(group) for group in prompts]):
        if average == "raw":
            rows.append(group.mean(dim=0))
        else:
            direction = F.normalize(F.normalize(group, dim=-1).mean(dim=0), dim=-1)
            rows.append(direction * group.norm(dim=-1).mean())
    return torch.stack(rows)


def fingerprint(base: Tensor, prompts: Sequence[Sequence[str]], average: str) -> dict[str, Any]:
    """What `t` was made from, small enough for a config.

    Holds a digest of the prompts in class order and a few random projections of `t`. A digest of `t` itself would
    change with the batch size and the number of threads; the projections are compared with a tolerance.
    """
    return {
        "prompts_sha256": prompts_digest(prompts, average),
        "shape": list(base.shape),
        "norm": round(float(base.norm()), 4),
        "sketch": [round(value, 5) for value in _sketch(base)],
    }


def prompts_digest(prompts: Sequence[Sequence[str]], average: str) -> str:
    """Digest of the prompts in class order and of how they are averaged."""
    text = json.dumps([average, [list(group) for group in prompts]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cached_table_path(
    name_or_path: str, commit: str | None, prompts: Sequence[Sequence[str]], average: str
) -> Path | None:
    """Where `t` for these prompts and this base is kept; None when the base's version cannot be told without loading.

    A Hub base is told by its commit, a folder by the sizes and times of its files. What is read from there is still
    held against the artifact's fingerprint.
    """
    if commit is not None:
        version: list[Any] = [name_or_path, commit]
    elif os.path.isdir(name_or_path):
        files = sorted(Path(name_or_path).glob("*.json")) + sorted(Path(name_or_path).glob("*.safetensors"))
        version = [os.path.realpath(name_or_path)]
        version += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        return None
    digest = hashlib.sha256(json.dumps([version, prompts_digest(prompts, average)]).encode()).hexdigest()
    return cache_root() / "base_classifiers" / f"{digest[:32]}.safetensors"


def read_table(path: Path | None) -> Tensor | None:
    """A kept `t` [K, D], or None."""
    if path is None or not path.is_file():
        return None
    with suppress(ArtifactError, KeyError):
        return read_tensors(path)[0]["base"]
    return None


def write_table(path: Path | None, table: Tensor) -> None:
    """Keep `t`; a cache folder that cannot be written only costs time later."""
    if path is not None:
        with suppress(ArtifactError):
            write_tensors(path, {"base": table})


def check_fingerprint(
    base: Tensor, prompts: Sequence[Sequence[str]], average: str, stored: Mapping[str, Any], name: str
) -> None:
    """Compare a freshly made `t` with the one the residual was trained on.

    Raises:
        BaseMismatchError: says whether the shape, the prompts (class order, names, templates) or the base's weights
            or tokenizer differ.
    """
    accept = "Pass accept_base_mismatch=True to from_pretrained if you want the residual on this base all the same."
    if list(base.shape) != list(stored.get("shape", [])):
        raise BaseMismatchError(
            f"The base {name!r} gives a base classifier of shape {list(base.shape)}; the residual was trained on "
            f"{stored.get('shape')}. Load it on the base model it was made for (base_model=, base_revision=)."
        )
    if prompts_digest(prompts, average) != stored.get("prompts_sha256"):
        raise BaseMismatchError(
            "The class names, their order or the templates in config.json are not those the residual was trained "
            f"with, so its rows would meet other classes. Restore config.json. {accept}"
        )
    gap = max(
        (abs(now - then) for now, then in zip(_sketch(base), stored.get("sketch", []), strict=False)),
        default=math.inf,
    )
    gap = max(gap, abs(float(base.norm()) / max(float(stored.get("norm", 0.0)), 1e-12) - 1.0))
    if gap > _TOLERANCE:
        raise BaseMismatchError(
            f"The base {name!r} no longer gives the text embeddings the residual was trained on (relative "
            f"difference {gap:.2g}, allowed {_TOLERANCE:g}): it is another revision, or its weights or tokenizer "
            f"changed. Pin the right one with base_revision= or base_model=. {accept}"
        )


def same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints (`config.base_fingerprint`) speak of one base under the same prompts.

    Rounding is tolerated. The image sides are compared where both fingerprints have one.
    """
    if any(first.get(key) != second.get(key) for key in ("prompts_sha256", "shape")):
        return False
    return _gap(first, second) <= _TOLERANCE and not image_sides_differ(first.get("image"), second.get("image"))


def _gap(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Largest relative difference of two text sides: sketches and norms."""
    sketches, norms = (first.get("sketch") or [], second.get("sketch") or []), (first.get("norm"), second.get("norm"))
    if len(sketches[0]) != len(sketches[1]) or not sketches[0] or not all(norms):
        return math.inf
    gap = max(abs(one - other) for one, other in zip(*sketches, strict=True))
    return max(gap, abs(float(norms[0]) / float(norms[1]) - 1.0))  # type: ignore[arg-type]


def image_sides_differ(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether two sketches of image towers are of different weights; False where one is unknown."""
    if not first or not second:
        return False
    if first["parameters"] != second["parameters"]:
        return True
    tolerance = max(_IMAGE_TOLERANCE.get(str(side.get("dtype")), 0.05) for side in (first, second))
    return max(abs(one - other) for one, other in zip(first["sketch"], second["sketch"], strict=True)) > tolerance


def _sketch(base: Tensor) -> list[float]:
    """`u_i . t . v_i / |t|` for fixed random unit-variance u and v: moves when any row moves or rows swap."""
    generator = torch.Generator().manual_seed(20221121)
    rows, dim = base.shape
    left = torch.randn(_SKETCHES, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(_SKETCHES, dim, generator=generator, dtype=torch.float64)
    table = base.double() / base.double().norm().clamp_min(1e-12)
    return [float(value) for value in torch.einsum("sk,kd,sd->s", left, table, right)]
