"""The saved folder: one residual in safetensors, a config, a processor and a card. Knows tensors and dicts, not models.

    config.json               base model and commit, classes, prompts, alpha, how it was trained, checksums
    model.safetensors         the tensor `residual` [K, D] alone ([1, D] on the image side), and `base_shift` [K, D]
                              where the base was enhanced; its metadata repeats config.json
    preprocessor_config.json  how pictures are prepared, so that `pipeline` needs nothing else
    README.md                 the model card

A new folder appears whole or not at all. In an existing one, replacing `model.safetensors` is the commit point: it
carries the config it belongs to, so a crash between the two files is found by the checksum and healed on reading.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, BaseModelError
from .storage import (
    CONFIG,
    PROCESSOR,
    RESIDUAL,
    SHIFT,
    WEIGHTS,
    read_json,
    read_tensors,
    umask,
    write_bytes,
    write_tensors,
)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_REQUIRED = (
    "base_model_name_or_path",
    "base_fingerprint",
    "projection_dim",
    "id2label",
    "alpha",
    "logit_scale",
)


def residual_digest(residual: Tensor) -> str:
    """Checksum of a residual's dtype, shape and bytes; it finds damage, it does not prove who wrote the file."""
    raw = residual.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{residual.dtype} {list(residual.shape)} ".encode() + raw).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of all tensors of an artifact; of the residual alone where there is no shift."""
    digest = residual_digest(tensors[RESIDUAL])
    if SHIFT not in tensors:
        return digest
    return hashlib.sha256((digest + residual_digest(tensors[SHIFT])).encode()).hexdigest()


def check_residual(residual: Tensor, where: str) -> None:
    """Refuse a residual that is not a finite floating-point matrix.

    Raises:
        ArtifactError: says what it is instead.
    """
    if residual.ndim != 2 or not residual.is_floating_point():
        raise ArtifactError(
            f"{where}: the residual must be a floating-point matrix [K, D]; it is {residual.dtype} "
            f"{list(residual.shape)}."
        )
    if not bool(torch.isfinite(residual).all()):
        bad = int((~torch.isfinite(residual)).any(dim=1).sum())
        raise ArtifactError(
            f"{where}: the residual holds NaN or infinite values in {bad} of {residual.shape[0]} classes. Training "
            "diverged or the file is damaged: train again with a lower learning rate, or download the file again."
        )


def write_artifact(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    residual: Tensor,
    extra: Mapping[str, bytes],
    shift: Tensor | None = None,
) -> None:
    """Write an artifact; after a crash the folder holds the old one or the new one.

    Args:
        folder: created when missing; other files in it are left alone.
        config: the content of config.json; `residual_sha256` is filled in.
        residual: [K, D], fp32 or fp16, finite.
        extra: further files by name.
        shift: what the enhanced base adds to the base [K, D], or None.

    Raises:
        ArtifactError: the residual is not finite, or the folder cannot be written; nothing is changed then.
    """
    folder = Path(folder)
    tensors = {RESIDUAL: residual} if shift is None else {RESIDUAL: residual, SHIFT: shift}
    for tensor in tensors.values():
        check_residual(tensor, str(folder))
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"Cannot save to {folder}: it is a file. Choose a folder.")
    _refuse_foreign(folder)
    config = {**config, "residual_sha256": tensors_digest(tensors)}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    metadata = {
        "contents": "task residual [K, D]",
        "config": json.dumps(config, sort_keys=True, ensure_ascii=False),
    }

    def write_into(target: Path) -> None:
        for name, content in extra.items():
            write_bytes(target / name, content)
        write_tensors(target / WEIGHTS, tensors, metadata)
        write_bytes(target / CONFIG, text.encode("utf-8"))

    if folder.exists() and any(folder.iterdir()):
        write_into(folder)
        return
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        write_into(staging)
        os.chmod(staging, 0o777 & ~umask())
        os.replace(staging, folder)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {folder}: {error.strerror or error}. Nothing was changed; choose a folder that can be "
            "written."
        ) from error
    finally:
        if staging is not None:
            with suppress(OSError):
                shutil.rmtree(staging)


def _refuse_foreign(folder: Path) -> None:
    """Never replace the config.json of another model."""
    if not (folder / CONFIG).is_file():
        return
    try:
        kind = read_json(folder / CONFIG).get("model_type")
    except ArtifactError:  # damaged: nothing to lose
        return
    if kind != "taskres":
        raise ArtifactError(
            f"Cannot save to {folder}: its config.json belongs to another model (model_type {kind!r}), which would be "
            "lost. Choose another folder."
        )


def read_artifact(
    config_path: str | os.PathLike[str], weights_path: str | os.PathLike[str]
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Read and verify an artifact's two files.

    Returns:
        The config as a dict, the residual [K, D] ([1, D] on the image side) in fp32, and the base's shift [K, D] or
        None.

    Raises:
        ArtifactError: a file is missing, truncated or altered, the format is newer than this library, a config key is
            missing, there is another tensor than the residual, or its shape is not [classes, projection_dim].
    """
    config = read_json(config_path)
    tensors, metadata = read_tensors(weights_path)
    if set(tensors) not in ({RESIDUAL}, {RESIDUAL, SHIFT}):
        raise ArtifactError(
            f"{weights_path} must hold exactly one tensor named {RESIDUAL!r} (and {SHIFT!r} for an enhanced base); it "
            f"holds {sorted(tensors)[:5]}. It is not a TaskRes artifact."
        )
    for tensor in tensors.values():
        check_residual(tensor, str(weights_path))
    residual, shift = tensors[RESIDUAL], tensors.get(SHIFT)
    digest = tensors_digest(tensors)
    if config.get("residual_sha256") not in (None, digest):
        # A save was cut between the two files: the weights carry the config they were written with.
        carried = json.loads(metadata.get("config", "{}"))
        if carried.get("residual_sha256") != digest:
            raise ArtifactError(
                f"The checksum of {weights_path} is not the one in config.json: the file was altered or damaged. "
                "Download it again, or save the model again."
            )
        config = carried
    check_config(config, str(config_path))
    table = [len(config["id2label"]), config["projection_dim"]]
    expected = [1, table[1]] if config.get("residual_side") == "image" else table
    if list(residual.shape) != expected or (shift is not None and list(shift.shape) != table):
        raise ArtifactError(
            f"The residual in {weights_path} has shape {list(residual.shape)}; config.json speaks of {table[0]} "
            f"classes and projection_dim {table[1]}. The two files do not belong together."
        )
    return config, residual.float(), None if shift is None else shift.float()


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json of a newer format or without a key that loading needs.

    Raises:
        ArtifactError: names the version or the keys.
    """
    version = config.get("format_version", 1)
    if not isinstance(version, int) or version > 1:
        raise ArtifactError(
            f"{where} has format_version {version!r}; this library reads up to 1. It was made by a newer taskres_hf: "
            "upgrade with `pip install -U taskres_hf`."
        )
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ArtifactError(
            f"{where} lacks {', '.join(missing)}: it is not a complete TaskRes artifact. Save it again."
        )


def find_artifact(
    name_or_path: str | os.PathLike[str], revision: str | None = None, subfolder: str = "", **hub_kwargs: Any
) -> tuple[str, str]:
    """Paths of an artifact's config and weights, downloaded into the Hub's cache where needed.

    Raises:
        ArtifactError: a path to a folder that does not exist. OSError: no such repository or file, from the Hub client.
    """
    from transformers.utils.hub import cached_file

    name = os.fspath(name_or_path)
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise ArtifactError(f"There is no folder {name}. Check the path, or give a Hub id such as me/pets-taskres.")
    if subfolder:
        hub_kwargs["subfolder"] = subfolder
    if os.path.isdir(name):
        folder = Path(name, subfolder)
        missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
        if missing:
            raise ArtifactError(f"{folder} is not a TaskRes artifact: it has no {' and no '.join(missing)}.")
        return str(folder / CONFIG), str(folder / WEIGHTS)
    config, weights = (cached_file(name, file, revision=revision, **hub_kwargs) for file in (CONFIG, WEIGHTS))
    # Into the cache as well, so that the next load works without a network.
    cached_file(name, PROCESSOR, revision=revision, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return str(config), str(weights)


def describe(name_or_path: str | os.PathLike[str], revision: str | None = None, **hub_kwargs: Any) -> dict[str, Any]:
    """What an artifact is, from its two files alone: the base is not loaded.

    Args:
        name_or_path: folder or Hub id. revision: branch, tag or commit of it.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only` and so on.

    Raises:
        ArtifactError: it is incomplete or damaged, or there is no such folder. OSError: no such repository.
    """
    from transformers.utils.hub import extract_commit_hash

    name = os.fspath(name_or_path)
    paths = find_artifact(name, revision, **hub_kwargs)
    config, residual, shift = read_artifact(*paths)
    names = {int(index): label for index, label in config["id2label"].items()}
    metrics, few_shot = config.get("metrics") or {}, config.get("few_shot") or {}
    files = [file for file in Path(name).iterdir() if file.is_file()] if os.path.isdir(name) else map(Path, paths)
    return {
        "artifact": name,
        "commit": extract_commit_hash(paths[1], None),
        "base_model": config["base_model_name_or_path"],
        "base_model_revision": config.get("base_model_revision"),
        "base_model_type": config.get("base_model_type"),
        "num_classes": len(names),
        "class_names": [names[index] for index in sorted(names)],
        "templates": config.get("templates"),
        "class_descriptions": len(config["class_descriptions"]) if config.get("class_descriptions") else None,
        "alpha": config["alpha"],
        "residual": {
            "shape": list(residual.shape),
            "side": config.get("residual_side", "text"),
            "mean_length": float(residual.norm(dim=1).mean()),
        },
        "enhanced_base": shift is not None,
        "shots": few_shot.get("shots"),
        "seed": few_shot.get("seed"),
        "train_images": few_shot.get("num_images"),
        "recipe": (config.get("training") or {}).get("recipe"),
        "engine": (config.get("training") or {}).get("engine"),
        "dataset": (config.get("data") or {}).get("name"),
        "data_digest": (config.get("data") or {}).get("train_digest"),
        "accuracy": metrics.get("accuracy"),
        "zero_shot_accuracy": metrics.get("zero_shot_accuracy"),
        "measured_on": {"split": metrics.get("split"), "images": metrics.get("num_images")} if metrics else None,
        "bytes": {file.name: file.stat().st_size for file in sorted(files)},
        "format_version": config.get("format_version", 1),
        "library_versions": config.get("library_versions"),
    }


def trusted_base_name(config: Any, base_model: Any, local: bool) -> str:
    """Where to load the base from; a path is taken from an artifact on this machine only, never from a download."""
    if hasattr(base_model, "config"):
        return str(base_model.config._name_or_path or config.base_model_name_or_path)
    if base_model is not None:
        return str(os.fspath(base_model))
    name = str(config.base_model_name_or_path)
    if local:
        if os.path.isabs(name) and not os.path.isdir(name):
            raise BaseModelError(
                f"The base model's folder {name} is gone. Pass base_model= with where it is now, or its Hub id."
            )
        return name
    if not _HUB_ID.match(name) or ".." in name or os.path.exists(name):
        raise BaseModelError(
            f"The artifact was downloaded and names {name!r} as its base, which is not a plain Hub id; a path from a "
            "download is not followed. Pass base_model= with the base you trust."
        )
    return name


def library_versions() -> dict[str, str]:
    """Versions of the packages that write an artifact, as recorded in it."""
    versions = {}
    for package in ("taskres_hf", "torch", "transformers", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
