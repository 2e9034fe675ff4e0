"""Accepting a config or an image processor that was edited by hand: the artifact's checksums are made anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..artifact import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    carried_by,
    differing,
    is_replaced,
    refuse,
    replace_files,
    replaced,
    rewrite,
)
from ..configuration_taskres import TaskResConfig
from ..encoders import BaseSource, load_image_processor
from ..errors import ArtifactError
from ..schema import problem_of_config, problem_of_tensors, tensors_digest
from ..storage import parse_tensors, read_json

_OURS = ("residual_sha256", "processor_sha256")  # checksums, filled in anew


def sign(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Accept what was edited in config.json and preprocessor_config.json, after checking that it loads.

    The tensors must be those that were saved: damage to them is never accepted. Nor are other classes or templates
    than those the base classifier was made from. An artifact of before there were such checksums gets them. A save that
    was cut short is completed.

    Args:
        folder: of the artifact, on this machine.

    Returns:
        What changed: `{"file", "key", "before", "after"}` each; empty where nothing was edited.

    Raises:
        ArtifactError: no artifact, damaged tensors, or an edit that would not load or not prepare a picture; nothing
            is changed then.
    """
    folder = Path(os.path.realpath(folder))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is not a TaskRes artifact: it has no {name}.")
    weights = (folder / WEIGHTS).read_bytes()
    tensors, metadata = parse_tensors(weights, folder / WEIGHTS)
    refuse(folder / WEIGHTS, problem_of_tensors(tensors))
    config = read_json(folder / CONFIG, unique=True)
    processor = read_json(folder / PROCESSOR, unique=True) if (folder / PROCESSOR).is_file() else None
    before, processor_before = carried_by(metadata, folder / WEIGHTS)
    if is_replaced(metadata, CONFIG, config):
        config = before
    if is_replaced(metadata, PROCESSOR, processor):
        processor = processor_before
    digest = tensors_digest(tensors)
    if (before or config).get("residual_sha256") != digest or config.get("residual_sha256", digest) != digest:
        raise ArtifactError(
            f"The tensors in {folder / WEIGHTS} are not those that were saved, or {CONFIG} is of other tensors, which "
            "no signature mends. Save or download the classifier again."
        )
    changes = _changes(CONFIG, before or config, config)
    if processor_before is not None or "processor_sha256" in before:
        changes += _changes(PROCESSOR, processor_before or {}, processor or {})
    refuse(folder / CONFIG, problem_of_config(config, "class_bias" in tensors))
    _check_meaning(config, processor)
    replace_files(folder, lambda staging: rewrite(staging, weights, config, processor, replaced(folder)))
    return changes


def _changes(file: str, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    keys = [key for key in differing(before, after) if key not in _OURS]
    return [{"file": file, "key": key, "before": before.get(key), "after": after.get(key)} for key in keys]


def _check_meaning(config: dict[str, Any], processor: dict[str, Any] | None) -> None:
    """Make a config and a processor of them, and prepare a picture."""
    import PIL.Image
    import torch

    TaskResConfig.from_dict(config)
    if processor is None:
        return
    prepare = load_image_processor(BaseSource(""), processor)
    try:
        pixels = prepare(images=PIL.Image.new("RGB", (48, 32), "orange"), return_tensors="pt")["pixel_values"]
        usable = bool(torch.isfinite(torch.as_tensor(pixels)).all())
    except Exception as error:  # whatever transformers makes of values that are not as they must be
        raise ArtifactError(
            f"{PROCESSOR} prepares no picture ({type(error).__name__}: {error}). Nothing was changed."
        ) from error
    if not usable:
        raise ArtifactError(f"{PROCESSOR} makes NaN or infinite values of a picture. Nothing was changed.")
