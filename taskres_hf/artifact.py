"""The saved folder: one residual in safetensors, a config, a processor and a card. Knows tensors and dicts, not models.

    config.json               base model and commit, classes, prompts, alpha, how it was trained, checksums
    model.safetensors         the tensor `residual` [K, D] alone ([1, D] on the image side); `base_shift` [K, D] where
                              the base was enhanced, `class_bias` [K] where there is one; its metadata repeats
                              config.json
    preprocessor_config.json  how pictures are prepared, so that `pipeline` needs nothing else
    README.md                 the model card

A new folder appears whole or not at all. In an existing one, replacing `model.safetensors` is the commit point: it
carries the config it belongs to, so a crash between the two files is found by the checksum and healed on reading.
Everything is written beside the old files first and read back: nothing is saved that does not load.

Checking an artifact imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, ConfigurationError, asking_for, else_cached, warn_if_moved
from .prompts import class_prompts, prompts_digest
from .storage import StoredTensor, is_path, read_json, read_stored, umask, write_bytes, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

# The files of an artifact, and the tensors in its weights.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"
_PROCESSORS = (PROCESSOR, "processor_config.json")  # where transformers looks for an image processor
_CODE_FOR = {"AutoConfig", "AutoModelForImageClassification"}  # what `include_code` adds code for
RESIDUAL = "residual"
SHIFT = "base_shift"
CLASS_BIAS = "class_bias"
# Of an artifact: 2 adds the image side to `base_fingerprint`; 3 the class bias and the settings in `AS_PUBLISHED`. What
# uses none of those is written as version 2, which earlier releases read; from the others they must keep their hands.
FORMAT_VERSION, PLAIN_VERSION = 3, 2

_REQUIRED = (
    "base_model_name_or_path",
    "base_fingerprint",
    "projection_dim",
    "id2label",
    "alpha",
    "logit_scale",
)


def tensor_digest(tensor: StoredTensor) -> str:
    """Checksum of a tensor's dtype, shape and bytes; it finds damage, it does not prove who wrote the file."""
    return hashlib.sha256(f"{tensor.torch_name} {list(tensor.shape)} ".encode() + tensor.content).hexdigest()


def tensors_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """Checksum of all tensors of an artifact; of the residual alone where there is no other."""
    digests = [tensor_digest(tensors[name]) for name in (RESIDUAL, SHIFT, CLASS_BIAS) if name in tensors]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _stored(tensor: Tensor) -> StoredTensor:
    """A torch tensor as it will lie in the file."""
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    raw = tensor.detach().cpu().contiguous()
    kind = names.get(raw.dtype, str(raw.dtype).removeprefix("torch."))
    return StoredTensor(kind, tuple(raw.shape), raw.reshape(-1).view(torch.uint8).numpy().tobytes())


def check_tensors(tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Refuse a residual or shift that is not a finite floating-point matrix, a class bias that is no such vector.

    Raises:
        ArtifactError: says what it is instead.
    """
    for name, tensor in tensors.items():
        if name != CLASS_BIAS:
            _check_matrix(tensor, where)
            continue
        values = tensor.values()
        if values is None or len(tensor.shape) != 1 or not all(map(math.isfinite, values)):
            raise ArtifactError(
                f"{where}: {CLASS_BIAS} must be K finite floating-point numbers; it is {tensor.torch_name} "
                f"{list(tensor.shape)}, or holds NaN or infinite values. Save the model again, or download it again."
            )


def _check_matrix(residual: StoredTensor, where: str) -> None:
    values = residual.values()
    if values is None or len(residual.shape) != 2:
        raise ArtifactError(
            f"{where}: the residual must be a floating-point matrix [K, D]; it is {residual.torch_name} "
            f"{list(residual.shape)}."
        )
    if not all(map(math.isfinite, values)):
        classes, dim = residual.shape
        bad = sum(not all(map(math.isfinite, values[row * dim : (row + 1) * dim])) for row in range(classes))
        raise ArtifactError(
            f"{where}: the residual holds NaN or infinite values in {bad} of {classes} classes. Training "
            "diverged or the file is damaged: train again with a lower learning rate, or download the file again."
        )


def write_artifact(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, bytes],
) -> None:
    """Write an artifact; after a crash the folder holds the old one or the new one.

    Args:
        folder: created when missing; other files in it are left alone.
        config: the content of config.json; `residual_sha256` is filled in.
        tensors: `residual` [K, D], fp32 or fp16; `base_shift` [K, D] and `class_bias` [K] where there are such.
        extra: further files by name.

    Raises:
        ArtifactError: a tensor is not finite, or the folder cannot be written; nothing is changed then.
    """
    folder = Path(folder)
    stored = {name: _stored(tensor) for name, tensor in tensors.items()}
    check_tensors(stored, str(folder))
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"Cannot save to {folder}: it is a file. Choose a folder.")
    _refuse_foreign(folder)
    config = {**config, "residual_sha256": tensors_digest(stored)}
    config = as_json(config)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    encoded = text.encode("utf-8", "backslashreplace")  # a lone surrogate, as of a file name, becomes its JSON escape
    metadata = {
        "contents": "task residual [K, D]",
        "config": json.dumps(config, sort_keys=True, ensure_ascii=False),
    }
    fresh = not folder.exists() or not any(folder.iterdir())
    staging = None
    try:
        (folder.parent if fresh else folder).mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent if fresh else folder, prefix=".taskres.", suffix=".tmp"))
        for name, content in extra.items():
            write_bytes(staging / name, content)
        write_tensors(staging / WEIGHTS, tensors, metadata)
        write_bytes(staging / CONFIG, encoded)
        check_loads(staging)
        if fresh:
            os.chmod(staging, 0o777 & ~umask())
            os.replace(staging, folder)
            return
        for name in (*extra, WEIGHTS, CONFIG):  # the weights carry the config: replacing them is the commit point
            os.replace(staging / name, folder / name)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {folder}: {error.strerror or error}. Nothing was changed; choose a folder that can be "
            "written."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON will hold them: numbers and arrays of numpy and torch as numbers and lists.

    Raises:
        ArtifactError: something else has no place in JSON.
    """

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} {value!r:.40}")

    try:
        ready: dict[str, Any] = json.loads(json.dumps(values, default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The config holds what JSON cannot: {error}. Nothing was changed.") from error
    return ready


def check_loads(folder: str | os.PathLike[str]) -> None:
    """Read an artifact back: whole, its prompts those that `t` was made from, its processor readable.

    Raises:
        ArtifactError: it would not load.
    """
    config, _ = read_checked(Path(folder, CONFIG), Path(folder, WEIGHTS))
    digest = config["base_fingerprint"].get("prompts_sha256")
    if digest is not None and prompts_digest(prompts_of(config), config.get("prompt_average", "raw")) != digest:
        raise ArtifactError(
            "The classes, templates or descriptions in the config are not those the base classifier was made from: the "
            "classifier would not load again. Do not change model.config; make a new model with from_base. Nothing was "
            "changed."
        )
    if Path(folder, PROCESSOR).is_file():
        read_json(Path(folder, PROCESSOR))


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


def read_artifact(
    config_path: str | os.PathLike[str], weights_path: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify an artifact's two files.

    Returns:
        The config as a dict, and by name the tensors in fp32: `residual` [K, D] ([1, D] on the image side), and
        `base_shift` [K, D] and `class_bias` [K] where there are such.

    Raises:
        ArtifactError: see `read_checked`.
    """
    import torch

    config, tensors = read_checked(config_path, weights_path)
    return config, {
        name: torch.frombuffer(tensor.values(), dtype=torch.float32).reshape(tensor.shape).clone()
        for name, tensor in tensors.items()
    }


def read_checked(
    config_path: str | os.PathLike[str], weights_path: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read and verify an artifact's two files, without torch.

    Returns:
        The config, and the tensors by name.

    Raises:
        ArtifactError: a file is missing, truncated or altered, the format is newer than this library, a config key is
            missing or wrong, there is another tensor than the residual, or its shape is not [classes, projection_dim].
    """
    config = read_json(config_path)
    _check_version(config, str(config_path))  # first of all: a newer one may well hold other tensors
    tensors, metadata = read_stored(weights_path)
    if RESIDUAL not in tensors or not set(tensors) <= {RESIDUAL, SHIFT, CLASS_BIAS}:
        raise ArtifactError(
            f"{weights_path} must hold exactly one tensor named {RESIDUAL!r} (and {SHIFT!r} for an enhanced base, "
            f"{CLASS_BIAS!r} for a bias); it holds {sorted(tensors)[:5]}. It is not a TaskRes artifact."
        )
    check_tensors(tensors, str(weights_path))
    digest = tensors_digest(tensors)
    if config.get("residual_sha256") not in (None, digest):
        # A save was cut between the two files: the weights carry the config they were written with.
        carried = _carried(metadata)
        if carried.get("residual_sha256") != digest:
            raise ArtifactError(
                f"The checksum of {weights_path} is not the one in config.json: the file was altered or damaged. "
                "Download it again, or save the model again."
            )
        config = carried
    biased = CLASS_BIAS in tensors
    check_config(config, str(config_path), biased)
    table = [len(config["id2label"]), config["projection_dim"]]
    expected = [1, table[1]] if config.get("residual_side") == "image" else table
    shapes = [list(tensors[name].shape) for name in (RESIDUAL, SHIFT) if name in tensors]
    bias = list(tensors[CLASS_BIAS].shape) if biased else table[:1]
    if shapes[0] != expected or shapes[1:] not in ([], [table]) or bias != table[:1]:
        raise ArtifactError(
            f"The residual in {weights_path} has shape {shapes[0]}{f', the class bias {bias}' if biased else ''}; "
            f"config.json speaks of {table[0]} classes and projection_dim {table[1]}. The two files do not belong "
            "together."
        )
    return config, tensors


def _carried(metadata: Mapping[str, str]) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        carried = json.loads(metadata.get("config", "{}"))
        if isinstance(carried, dict):
            return carried
    return {}


_INSIDE = re.compile(r"(?!.*\.\.)\w[\w.+ -]*(/\w[\w.+ -]*)*")  # a revision or folder of a repository
_OBJECT, _LIST, _TEXT, _NUMBER = (dict,), (list,), (str,), (int, float)
# What each key of config.json must be, where it is there and not null.
_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": _TEXT, "base_model_revision": _TEXT, "base_model_type": _TEXT,
    "base_model_subfolder": _TEXT,
    "base_fingerprint": _OBJECT, "projection_dim": (int,), "id2label": _OBJECT, "templates": _LIST,
    "class_descriptions": _OBJECT, "prompt_names": _OBJECT, "underscores": _TEXT, "prompt_average": _TEXT,
    "alpha": _NUMBER, "residual_side": _TEXT, "enhanced_base": _OBJECT, "logit_scale": _NUMBER, "logit_bias": _NUMBER,
    "few_shot": _OBJECT, "training": _OBJECT, "metrics": _OBJECT, "data": _OBJECT, "library_versions": _OBJECT,
    "residual_sha256": _TEXT, "dtype": _TEXT,
}  # fmt: skip


def _check_version(config: Mapping[str, Any], where: str) -> None:
    version = config.get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format_version {version!r}; this library reads up to {FORMAT_VERSION}. It was made by a "
            "newer taskres_hf: upgrade with `pip install -U taskres_hf`."
        )


# What version 3 adds, with its range; 1 is as published.
_SETTINGS: dict[str, tuple[float, float]] = {
    "strength": (0, 1), "logit_scale_factor": (1e-6, 1e6), "normalize_weight": (False, True),
}  # fmt: skip


def check_config(config: Mapping[str, Any], where: str, biased: bool = False) -> None:
    """Refuse a config.json of a newer format, without a key that loading needs, or with a value of another type.

    Raises:
        ArtifactError: names the version or the keys.
    """
    _check_version(config, where)
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ArtifactError(
            f"{where} lacks {', '.join(missing)}: it is not a complete TaskRes artifact. Save it again."
        )
    for key, types in _TYPES.items():
        value = config.get(key)
        number = not isinstance(value, float) or math.isfinite(value)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool) or not number):
            raise ArtifactError(f"{where}: {key} has the wrong type or value ({value!r:.60}). Save the artifact again.")
    for key in ("base_model_revision", "base_model_subfolder"):
        if config.get(key) and not _INSIDE.fullmatch(config[key]):
            raise ArtifactError(f"{where}: {key} leads out of the repository ({config[key]!r:.60}).")
    _check_settings(config, where, biased)
    stored = config["base_fingerprint"]
    image = stored.get("image") if isinstance(stored.get("image"), dict) else {}
    numbers = [stored.get("sketch"), stored.get("score"), image.get("sketch"), [stored.get("norm") or 0]]
    numbers.append(stored.get("shape"))
    if not all(_numbers(values or []) for values in numbers) or stored.get("image") not in (None, image):
        raise ArtifactError(f"{where}: base_fingerprint is damaged. Save the artifact again.")
    code = config.get("auto_map") or {}
    if not isinstance(code, dict) or not set(code) <= _CODE_FOR:
        raise ArtifactError(f"{where}: auto_map names code for {str(code)!r:.60}, which no artifact has.")
    names = config["id2label"]
    if set(names) != {str(index) for index in range(len(names))} or not all(isinstance(n, str) for n in names.values()):
        raise ArtifactError(f"{where}: id2label must name the classes 0 to K-1. Save the artifact again.")


def _check_settings(config: Mapping[str, Any], where: str, biased: bool) -> None:
    for key, (low, high) in _SETTINGS.items():
        value = config.get(key, type(high)(1))
        kind = isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(high, bool)
        if not kind or not low <= value <= high:
            raise ArtifactError(
                f"{where}: {key} must be {'true or false' if high is True else f'from {low:g} to {high:g}'}; it is "
                f"{value!r:.60}. Save the artifact again."
            )
    used = [key for key in _SETTINGS if config.get(key, 1) != 1] + [CLASS_BIAS] * biased
    if used and config.get("format_version", 1) <= PLAIN_VERSION:
        raise ArtifactError(
            f"{where} has {', '.join(used)}, and a format_version of before there were such: earlier versions of the "
            "library would overlook them. Set them on the model and save it."
        )


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def find_artifact(
    name_or_path: str | os.PathLike[str], revision: str | None = None, subfolder: str = "", **hub_kwargs: Any
) -> tuple[str, str]:
    """Paths of an artifact's config and weights, downloaded into the Hub's cache where needed.

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
        _refuse_code([str(folder / file) for file in _PROCESSORS if (folder / file).is_file()])
        return str(folder / CONFIG), str(folder / WEIGHTS)
    from huggingface_hub import try_to_load_from_cache

    known: Any = None
    with suppress(ValueError):  # no name of a repository, as the download says
        known = try_to_load_from_cache(name, CONFIG, cache_dir=hub_kwargs.get("cache_dir"), revision=revision)
    config, weights = (_download(name, file, revision, subfolder, hub_kwargs) for file in (CONFIG, WEIGHTS))
    if not isinstance(known, str):
        warn_if_moved("classifier", name, revision, {**hub_kwargs, "subfolder": subfolder})
    found = []
    for file in _PROCESSORS:  # into the cache as well, so that the next load works without a network
        with suppress(ArtifactError, OSError):
            found.append(_download(name, file, revision, subfolder, hub_kwargs))
    _refuse_code(found)
    return config, weights


def _refuse_code(processors: Iterable[str]) -> None:
    """Refuse an image processor with code of its own, which transformers would ask about at the terminal.

    `pipeline` reads these files by itself, after the model, so that here is the place.

    Raises:
        ArtifactError: names the file.
    """
    for path in processors:
        if '"auto_map": ' in json.dumps(read_json(path)):
            raise ArtifactError(
                f"{path} names code of its own to prepare pictures with (auto_map). No artifact of this library does, "
                "and it is not run. If you know where it comes from, delete auto_map from the file."
            )


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


def commit_of(path: str) -> str | None:
    """The commit of a file in the Hub's cache; None for one elsewhere."""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", os.fspath(path))
    return found.group(1) if found else None


def library_versions() -> dict[str, str]:
    """Versions of the packages that write an artifact, as recorded in it."""
    versions = {}
    for package in ("taskres_hf", "torch", "transformers", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
