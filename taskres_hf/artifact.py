"""The saved folder: one residual in safetensors, a config, a processor and a card. Knows tensors and dicts, not models.

    config.json               base model and commit, classes, prompts, alpha, how it was trained, checksums
    model.safetensors         the tensor `residual` [K, D] alone ([1, D] on the image side); `base_shift` [K, D] where
                              the base was enhanced, `class_bias` [K] where there is one; its metadata repeats
                              config.json and preprocessor_config.json, under one checksum of all
    preprocessor_config.json  how pictures are prepared, so that `pipeline` needs nothing else
    README.md                 the model card

`model.safetensors` is the whole artifact in one file: config and processor are read from it, and the two files beside
it, which other readers take, must say the same. So an edit of either is noticed, and replacing the one file is the
commit point of a save: until all are there it also names the files it replaces, by which a save that is under way or
was cut short is told from an edit. A new folder appears whole or not at all. Everything is written beside the old files
first and read back: nothing is saved that does not load.

Checking an artifact imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ArtifactError, ConfigurationError, asking_for, else_cached, warn_if_moved
from .prompts import class_prompts, prompts_digest
from .schema import (
    ALONE_VERSION,
    CLASS_BIAS,
    CONFIG,
    FORMAT_VERSION,
    HEAD_VERSION,
    PLAIN_VERSION,
    PROCESSOR,
    RESIDUAL,
    SHIFT,
    WEIGHTS,
    problem_of_config,
    problem_of_processor,
    problem_of_shapes,
    problem_of_tensors,
    problem_of_version,
    tensors_digest,
)  # fmt: skip
from .storage import (
    SEAL,
    StoredTensor,
    as_json,
    commit_of,
    is_path,
    json_bytes,
    json_digest,
    locked,
    parse_json,
    parse_tensors,
    raw_tensor,
    read_json,
    read_stored,
    settled,
    staging_folder,
    sync_folder,
    umask,
    with_metadata,
    write_bytes,
    write_json,
    write_tensors,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALONE_VERSION", "CLASS_BIAS", "CONFIG", "FORMAT_VERSION", "HEAD_VERSION", "PLAIN_VERSION", "PROCESSOR",
    "RESIDUAL", "SHIFT", "WEIGHTS", "as_json", "check_loads", "commit_of", "find_artifact", "library_versions",
    "read_artifact", "read_checked", "write_artifact",
]  # fmt: skip
_NESTED = "processor_config.json"  # where other libraries look for a processor first


def _stored(tensor: Tensor) -> StoredTensor:
    """A torch tensor as it will lie in the file."""
    kind, shape, content = raw_tensor(tensor.detach().cpu().contiguous())
    return StoredTensor(kind, tuple(shape), bytes(content))


def write_artifact(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, bytes],
) -> None:
    """Write an artifact; after a crash the folder holds the old one or the new one.

    Args:
        folder: created when missing; other files in it are left alone.
        config: the content of config.json; the checksums are filled in.
        tensors: `residual` [K, D], fp32 or fp16; `base_shift` [K, D] and `class_bias` [K] where there are such.
        extra: further files by name.

    Raises:
        ArtifactError: a tensor is not finite, or the folder cannot be written; nothing is changed then.
    """
    folder = Path(os.path.realpath(folder)) if os.path.islink(folder) else Path(folder)
    stored = {name: _stored(tensor) for name, tensor in tensors.items()}
    refuse(folder, problem_of_tensors(stored))
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"Cannot save to {folder}: it is a file. Choose a folder.")
    _refuse_foreign(folder)
    processor = parse_json(extra[PROCESSOR].decode("utf-8"), PROCESSOR) if PROCESSOR in extra else None
    config = with_checksums(as_json(config), stored, processor)

    def write(staging: Path) -> None:
        for name, content in extra.items():
            write_bytes(staging / name, content)
        write_tensors(staging / WEIGHTS, tensors, whole(config, processor, replaced(folder)))
        write_bytes(staging / CONFIG, json_bytes(config, sort_keys=True))

    replace_files(folder, write)


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Write an artifact's files into a folder, so that a reader has the old artifact or the new one.

    Args:
        write: writes them into the folder that it is given; they are read back before anything is replaced.

    Raises:
        ArtifactError: they would not load, or the folder cannot be written.
    """
    try:
        fresh = not folder.exists()
        if fresh:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with staging_folder(folder.parent, folder.name) as staging:
                write(staging)
                check_loads(staging)
                os.chmod(staging, 0o777 & ~umask())
                sync_folder(staging)
                try:
                    os.rename(staging, folder)
                    sync_folder(folder.parent)
                    return
                except OSError:
                    if not folder.is_dir():  # or another process was faster
                        raise
        # There already, perhaps since a moment ago, perhaps as a mount point.
        with staging_folder(folder, folder.name) as staging, locked(folder):
            write(staging)
            check_loads(staging)
            names = {entry.name for entry in staging.iterdir()}
            for name in sorted(names - {WEIGHTS, PROCESSOR, CONFIG}):
                os.replace(staging / name, folder / name)
            for name in (WEIGHTS, PROCESSOR, CONFIG):  # each is there for good before the next
                if name in names:
                    os.replace(staging / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
                sync_folder(folder)
            content = (folder / WEIGHTS).read_bytes()
            metadata = parse_tensors(content, folder / WEIGHTS)[1]
            if metadata.pop("replaces", None) is not None:  # all are there: from now on they are nothing but edits
                write_bytes(folder / WEIGHTS, with_metadata(content, metadata))
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {folder}: {error.strerror or error}. Nothing was changed; choose a folder that can be "
            "written."
        ) from error


def rewrite(
    folder: Path,
    weights: bytes,
    config: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    replaces: Mapping[str, str | None] | None = None,
) -> None:
    """Write an artifact's files with the tensors of a weights file and another config or processor."""
    config = with_checksums(config, parse_tensors(weights, WEIGHTS)[0], processor)
    write_bytes(folder / WEIGHTS, with_metadata(weights, whole(config, processor, replaces or {})))
    write_bytes(folder / CONFIG, json_bytes(config, sort_keys=True))
    if processor is not None:
        write_json(folder / PROCESSOR, processor)
    else:
        (folder / PROCESSOR).unlink(missing_ok=True)


def with_checksums(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], processor: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A config with the checksums of the tensors and of the processor filled in."""
    digest = None if processor is None else json_digest(processor)
    return {**config, "residual_sha256": tensors_digest(tensors), "processor_sha256": digest}


def whole(
    config: Mapping[str, Any], processor: Mapping[str, Any] | None, replaces: Mapping[str, str | None]
) -> dict[str, str]:
    """The metadata of an artifact's weights.

    Args:
        config, processor: what they repeat. replaces: digests of the files that the new ones take the place of.
    """
    metadata = {"contents": "task residual [K, D]", "config": json.dumps(config, sort_keys=True)}
    if processor is not None:
        metadata["processor"] = json.dumps(processor, sort_keys=True)
    return metadata | ({"replaces": json.dumps(replaces, sort_keys=True)} if replaces else {})


def replaced(folder: Path) -> dict[str, str | None]:
    """Digests of the config and the processor that lie in a folder; empty where no artifact does."""
    if not (folder / WEIGHTS).is_file():
        return {}
    return {name: _file_digest(folder / name) for name in (CONFIG, PROCESSOR)}


def _file_digest(path: Path) -> str | None:
    """Digest of a JSON file's content; None where there is no such file or it holds none."""
    with suppress(ArtifactError, RecursionError):
        return json_digest(read_json(path))
    return None


def check_loads(folder: str | os.PathLike[str]) -> None:
    """Read an artifact back: whole, its prompts those that `t` was made from, its processor readable.

    Raises:
        ArtifactError: it would not load.
    """
    config = read_checked(Path(folder, CONFIG), Path(folder, WEIGHTS)).config
    digest = config["base_fingerprint"].get("prompts_sha256")
    if digest is not None and prompts_digest(prompts_of(config), config.get("prompt_average", "raw")) != digest:
        raise ArtifactError(
            "The classes, templates or descriptions in the config are not those the base classifier was made from: the "
            "classifier would not load again. Do not change model.config; make a new model with from_base. Nothing was "
            "changed."
        )


def prompts_of(config: Mapping[str, Any]) -> list[list[str]]:
    """The prompts of each class of a config.json, K lists.

    Raises:
        ArtifactError: they cannot be made from it.
    """
    names = {int(index): name for index, name in config["id2label"].items()}
    templates = config.get("templates")
    try:
        return class_prompts(
            [names[index] for index in range(len(names))],
            None if templates == [] else templates,
            underscores=config.get("underscores", "replace"),
            descriptions=config.get("class_descriptions"),
            prompt_names=config.get("prompt_names"),
        )
    except ConfigurationError as error:
        raise ArtifactError(f"The config's prompts cannot be made: {error}") from error


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


class Checked(NamedTuple):
    """An artifact that was read and verified: config, tensors by name, and its image processor's values or None."""

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    processor: dict[str, Any] | None


def read_artifact(
    config_path: str | os.PathLike[str], weights_path: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Read and verify an artifact.

    Returns:
        The config as a dict; by name the tensors in fp32, `residual` [K, D] ([1, D] on the image side), and
        `base_shift` [K, D] and `class_bias` [K] where there are such; the image processor's values, or None.

    Raises:
        ArtifactError: see `read_checked`.
    """
    import torch

    config, tensors, processor = read_checked(config_path, weights_path)
    as_torch = {
        name: torch.frombuffer(tensor.values(), dtype=torch.float32).reshape(tensor.shape).clone()
        for name, tensor in tensors.items()
    }
    return config, as_torch, processor


def read_checked(config_path: str | os.PathLike[str], weights_path: str | os.PathLike[str]) -> Checked:
    """Read and verify an artifact's files, without torch: whole, also while another process replaces them.

    The image processor's file is the one beside config.json.

    Raises:
        ArtifactError: a file is missing, truncated, damaged or edited, the format is newer than this library, a config
            key is missing or wrong, there is another tensor than the residual, or its shape is not
            [classes, projection_dim].
    """
    config, weights = Path(config_path), Path(weights_path)
    return settled((config, weights, config.with_name(PROCESSOR)), lambda: _read_once(config, weights))


def _read_once(config_path: Path, weights_path: Path) -> Checked:
    config = read_json(config_path, unique=True)
    refuse(config_path, problem_of_version(config))  # first of all: a newer one may well hold other tensors
    tensors, metadata = read_stored(weights_path)
    refuse(weights_path, problem_of_tensors(tensors))
    for beside in map(config_path.with_name, (PROCESSOR, _NESTED)):  # `pipeline` reads them by itself, after the model
        refuse(beside, problem_of_processor(read_json(beside)) if beside.is_file() else None)
    if SEAL in metadata:
        config, processor = _one_unit(config, config_path, metadata, weights_path)
    elif "processor_sha256" in config:
        raise ArtifactError(
            f"{weights_path} has lost its checksum: the file was altered or damaged. Download it again, or save the "
            "model again."
        )
    else:
        config, processor = _as_once_written(config, config_path, tensors, metadata, weights_path)
    if config.get("residual_sha256") != tensors_digest(tensors):
        raise ArtifactError(
            f"The checksum of {weights_path} is not the one in config.json: the file was altered or damaged. "
            "Download it again, or save the model again."
        )
    refuse(config_path, problem_of_config(config, CLASS_BIAS in tensors))
    refuse(weights_path, problem_of_shapes(config, tensors))
    return Checked(config, tensors, processor)


def refuse(path: Path, problem: str | None) -> None:
    """Raise what is wrong with a file, if anything is."""
    if problem:
        raise ArtifactError(f"{path}: {problem}")


def _one_unit(
    config: dict[str, Any], config_path: Path, metadata: Mapping[str, str], weights_path: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Config and processor that the weights carry, where the files beside them say the same or were being replaced."""
    carried, processor = carried_by(metadata, weights_path)
    if (changed := differing(carried, config)) and not is_replaced(metadata, CONFIG, config):
        raise _edited(config_path, changed)
    beside = config_path.with_name(PROCESSOR)
    found = read_json(beside, unique=True) if beside.is_file() else None
    if (processor is None) != (found is None) or differing(processor or {}, found or {}):
        if is_replaced(metadata, PROCESSOR, found):
            warnings.warn(
                f"A save into {beside.parent} is under way or was cut short: {PROCESSOR} is the earlier one still, "
                f"which transformers.pipeline takes. If it was cut short, complete it: taskres sign {beside.parent}",
                stacklevel=2,
            )
        elif found is None:
            raise ArtifactError(f"{beside} is missing, which belongs to the classifier. Save or download it again.")
        else:
            raise _edited(beside, differing(processor or {}, found))
    nested = config_path.with_name(_NESTED)
    if nested.is_file() and differing(processor or {}, read_json(nested).get("image_processor", processor or {})):
        refuse(nested, "it holds another image processor than the classifier's own, which others take. Remove it.")
    return carried, processor


def is_replaced(metadata: Mapping[str, str], name: str, found: Mapping[str, Any] | None) -> bool:
    """Whether a file's content, or None, is what a save takes the place of that is under way or was cut short."""
    replaces = parse_json(metadata.get("replaces", "{}"), WEIGHTS)
    return name in replaces and replaces[name] == (None if found is None else json_digest(found))


def carried_by(metadata: Mapping[str, str], where: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Config and processor that a weights file carries; an empty one and None where it carries none."""
    config, processor = metadata.get("config"), metadata.get("processor")
    return parse_json(config or "{}", where), None if processor is None else parse_json(processor, where)


def _as_once_written(
    config: dict[str, Any],
    config_path: Path,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    weights_path: Path,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Config and processor of an artifact of before the weights had a checksum; they only repeat config.json."""
    carried, _ = carried_by(metadata, weights_path)
    digest, stored = tensors_digest(tensors), config.get("residual_sha256")
    if carried.get("residual_sha256") == digest:
        if stored in (None, digest) and (changed := differing(carried, config)):
            raise _edited(config_path, changed)
        config = carried  # where a save was cut between the two files, the weights carry the config they belong to
    beside = config_path.with_name(PROCESSOR)
    return config, read_json(beside) if beside.is_file() else None


def differing(first: Any, second: Any) -> list[str]:
    """Keys under which two JSON objects differ.

    Raises:
        ArtifactError: they are nested too deeply to tell, or no objects.
    """
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        raise ArtifactError("The config or the image processor holds something else than an object.")
    missing = object()

    def same(key: str) -> bool:
        values = [side.get(key, missing) for side in (first, second)]
        return missing not in values and json_digest(values[0]) == json_digest(values[1])

    try:
        return sorted(key for key in {**first, **second} if not same(key))
    except (RecursionError, ValueError) as error:
        raise ArtifactError(f"The config or the image processor cannot be compared ({error}).") from error


def _edited(path: Path, keys: list[str]) -> ArtifactError:
    shown = ", ".join(repr(key)[1:41].removesuffix("'") for key in keys[:6]) + (" and more" if len(keys) > 6 else "")
    return ArtifactError(
        f"{path} was changed after the classifier was saved, in {shown}: {WEIGHTS} carries other values. Restore it, "
        f"or save or download the classifier again. If the change is meant, accept it with: taskres sign {path.parent}"
    )


def find_artifact(
    name_or_path: str | os.PathLike[str], revision: str | None = None, subfolder: str = "", **hub_kwargs: Any
) -> tuple[str, str]:
    """Paths of an artifact's config and weights, of one commit, downloaded into the Hub's cache where needed.

    Raises:
        ArtifactError: no such folder, or it holds no artifact. HubError: no such repository or revision, no access, or
            no way to the Hub; its cause is the Hub client's error.
    """
    name = os.fspath(name_or_path)
    if is_path(name_or_path):
        folder = Path(name, subfolder)
        if not folder.is_dir():
            what = f"{folder} is a file, not a folder" if folder.is_file() else f"There is no folder {folder}"
            raise ArtifactError(f"{what}. Check the path, or give a Hub id such as me/pets-taskres.")
        missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
        if missing:
            raise ArtifactError(f"{folder} is not a TaskRes artifact: it has no {' and no '.join(missing)}.")
        return str(folder / CONFIG), str(folder / WEIGHTS)
    from huggingface_hub import try_to_load_from_cache

    known: Any = None
    with suppress(ValueError):  # no name of a repository, as the download says
        known = try_to_load_from_cache(name, CONFIG, cache_dir=hub_kwargs.get("cache_dir"), revision=revision)
    config = _download(name, CONFIG, revision, subfolder, hub_kwargs)
    pinned = commit_of(config) or revision  # the branch may move meanwhile
    weights = _download(name, WEIGHTS, pinned, subfolder, hub_kwargs)
    if not isinstance(known, str):
        warn_if_moved("classifier", name, revision, {**hub_kwargs, "subfolder": subfolder})
    for file in (PROCESSOR, _NESTED):  # into the cache as well, so that the next load works without a network
        needed = file == PROCESSOR and read_json(config).get("processor_sha256") is not None
        with suppress(ArtifactError, *([] if needed else [OSError])):  # it may have none
            _download(name, file, pinned, subfolder, hub_kwargs)
    return config, weights


def _download(name: str, file: str, revision: str | None, subfolder: str, hub_kwargs: Mapping[str, Any]) -> str:
    """Path of one file of a repository, in the Hub's cache."""
    from huggingface_hub import errors, hf_hub_download

    options = {key: value for key, value in hub_kwargs.items() if key != "proxies"}
    advice = "A folder of this machine can be given instead of a Hub id."
    try:
        with asking_for(f"The classifier {name}", name, revision, advice):
            at = {"repo_id": name, "filename": file, "revision": revision, "subfolder": subfolder or None}
            return str(else_cached(hf_hub_download, **at, **options))
    except errors.EntryNotFoundError as error:
        raise ArtifactError(f"The repository {name} holds no TaskRes classifier: it has no {file}.") from error


def library_versions() -> dict[str, str]:
    """Versions of the packages that write an artifact, as recorded in it."""
    versions = {}
    for package in ("taskres_hf", "torch", "transformers", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
