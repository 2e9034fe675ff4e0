"""Files that are whole or absent and prove themselves on reading; the cache folder; "path or Hub id".

Every file of the library's own that it reads again holds a checksum of all that is in it: a JSON object under the key
`sha256`, over the rest of it; a safetensors file in its metadata under the same key, over tensors and metadata. It
finds damage and edits; it does not prove who wrote the file.

Imports no torch: what an artifact is can be told without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, deserialize

from .errors import ArtifactError

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?\Z")


def cache_root() -> Path:
    """Folder for embeddings and base classifiers: `$TASKRES_CACHE`, else `taskres` inside `$HF_HOME`."""
    if folder := os.environ.get("TASKRES_CACHE"):
        return Path(folder).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{xdg}/huggingface")).expanduser() / "taskres"


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a place on this machine rather than a repository on the Hub: the one rule for both.

    What exists here is a path, and so is what cannot be a Hub id: absolute, starting with `.` or `~`, with a backslash
    or more than one `/`, or with characters that ids do not have.
    """
    text = os.fspath(name)
    if not isinstance(name, str) or os.path.exists(os.path.expanduser(text)):
        return True
    return os.path.isabs(text) or ".." in text or not _HUB_ID.match(text)


def commit_of(path: str) -> str | None:
    """The commit of a file in the Hub's cache; None for one elsewhere."""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", os.fspath(path))
    return found.group(1) if found else None


# ---------------------------------------------------------------------- writing

SEAL = "sha256"
_STAGED = ".taskres.tmp"  # how the names of unfinished files and folders end
_STALE = 24 * 3600  # seconds after which those are nobody's any more
_SWEPT: set[Path] = set()  # folders that this process has swept
_UNWRITABLE: set[Path] = set()  # folders that have been warned of
_PATIENCE = 20  # attempts to read files that are being replaced
_Read = TypeVar("_Read")


def write_bytes(path: str | os.PathLike[str], *content: bytes | memoryview) -> None:
    """Replace `path` by `content`, part after part, in one step: after a crash it holds the old bytes or the new ones.

    Raises:
        ArtifactError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=_STAGED)
        with os.fdopen(handle, "wb") as stream:
            stream.writelines(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp and safetensors write 0600, unreadable to others
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise ArtifactError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was changed; choose a folder that can be written."
        ) from error
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def sync_folder(folder: Path) -> None:
    """Make names in a folder last through a power cut: what was renamed before this is there before what follows."""
    with suppress(OSError):  # Windows opens no folders, some file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder of this process's own beside what it will become part of; gone afterwards unless it was renamed."""
    sweep(parent)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name[:80]}.", suffix=_STAGED))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder a day or more ago; looks once a process."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not (entry.name.startswith(".") and entry.name.endswith(_STAGED)):
                continue
            with suppress(OSError):  # another process sweeps too
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time replaces several files of a folder, where the system can; a killed one lets go."""
    handle = -1
    with suppress(ImportError, OSError):  # Windows, or a file system without locks
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def check_can_write(folder: str | os.PathLike[str]) -> None:
    """Try to write into a folder, or where it will be made, before hours of work; leaves nothing behind.

    Raises:
        ArtifactError: it cannot be written.
    """
    place = Path(os.path.realpath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"x")
            stream.flush()
    except OSError as error:
        raise ArtifactError(
            f"Cannot write to {folder}: {error.strerror or error}. Choose a folder that can be written."
        ) from error


def warn_not_kept(folder: Path, what: str, error: Exception) -> None:
    """Say once a folder that nothing is kept there; a cache that cannot be written only costs time later."""
    if folder not in _UNWRITABLE:
        _UNWRITABLE.add(folder)
        warnings.warn(f"{what} not kept for the next run. {error}", stacklevel=4)


# ---------------------------------------------------------------------- checksums


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of parts, each after its length, so that no two lists of parts have the same."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d " % memoryview(part).nbytes)
        digest.update(part)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value's content, whatever the order of its keys and its layout.

    Raises:
        ValueError, TypeError, RecursionError: it cannot be JSON.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum under `sha256`; `read_sealed` checks it."""
    plain: dict[str, Any] = json.loads(json.dumps({key: item for key, item in value.items() if key != SEAL}))
    return {**plain, SEAL: json_digest(plain)}


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Whether the checksum in a JSON object is that of the rest of it."""
    try:
        return value.get(SEAL) == json_digest({key: item for key, item in value.items() if key != SEAL})
    except (RecursionError, TypeError, ValueError):
        return False


def tensors_digest(tensors: Mapping[str, tuple[str, Iterable[int], Any]], metadata: Mapping[str, str]) -> str:
    """Checksum of a safetensors file's content.

    Args:
        tensors: by name, the dtype as safetensors writes it, the shape, and the bytes.
        metadata: all of it; what is under `sha256` is left out.
    """
    parts: list[Any] = [json.dumps(sorted((key, text) for key, text in metadata.items() if key != SEAL)).encode()]
    for name, (dtype, shape, content) in sorted(tensors.items()):
        parts += [json.dumps([name, dtype, list(shape)]).encode(), content]
    return digest_of(parts)


def _check_seal(path: Any, found: str | None, digest: Any) -> None:
    """Refuse a file whose checksum is missing or not that of its content."""
    if found is None:
        raise ArtifactError(f"{path} holds no checksum: it is incomplete, or an earlier version wrote it.")
    if found != digest():
        raise ArtifactError(f"{path} is damaged: its checksum is not that of its content.")


# ---------------------------------------------------------------------- JSON and safetensors


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON in one step; see `write_bytes`."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any, sort_keys: bool = False) -> bytes:
    """Indented JSON in UTF-8; a lone surrogate, as of a file name, becomes its JSON escape."""
    return (json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


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


def write_sealed(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, in one step; `read_sealed` reads it."""
    write_json(path, sealed(value))


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors as safetensors with their checksum, in one step; see `write_bytes`. Returns the checksum."""
    from safetensors.torch import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"format": "pt", **(metadata or {})}
    digest = tensors_digest({name: raw_tensor(tensor) for name, tensor in ready.items()}, described)
    write_bytes(path, *_with_header(save(ready), {**described, SEAL: digest}))
    return digest


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `write_tensors` wrote.

    Raises:
        ArtifactError: the file is missing, truncated or not safetensors, or its checksum is not that of its content.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            metadata = dict(stream.metadata() or {})
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: the folder is not complete; save or download it again.") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged or is not a safetensors file ({error}). Save or download it again."
        ) from error
    raw = {name: raw_tensor(tensor) for name, tensor in tensors.items()}
    _check_seal(path, metadata.get(SEAL), lambda: tensors_digest(raw, metadata))
    return tensors, metadata


# How safetensors writes torch's dtypes.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL",
    "uint8": "U8",
}  # fmt: skip
_OF_TORCH = {stored: name for name, stored in _DTYPES.items()}


def raw_tensor(tensor: torch.Tensor) -> tuple[str, list[int], memoryview]:
    """Dtype, shape and bytes of a contiguous tensor on the CPU, as they lie in the file."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    return _DTYPES.get(kind, kind), list(tensor.shape), memoryview(content)  # type: ignore[arg-type]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a safetensors file: dtype such as `"F32"`, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    @property
    def torch_name(self) -> str:
        """Its dtype as torch writes it."""
        return f"torch.{_OF_TORCH.get(self.dtype, self.dtype.lower())}"

    def values(self) -> array[float] | None:
        """Its values in fp32, row after row; None where it does not hold real numbers. Needs no numpy."""
        if self.dtype == "F32":
            return array("f", self.content)
        if self.dtype == "BF16":
            return array("f", array("I", [bits << 16 for bits in memoryview(self.content).cast("H")]).tobytes())
        if self.dtype in ("F16", "F64"):
            kind, size = ("e", 2) if self.dtype == "F16" else ("d", 8)
            return array("f", struct.unpack(f"<{len(self.content) // size}{kind}", self.content))
        return None


def read_stored(path: str | os.PathLike[str]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, without torch; its checksum is compared where it has one.

    Raises:
        ArtifactError: the file is missing, truncated or not safetensors, or its checksum is not that of its content.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: the folder is not complete; save or download it again.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}). Save or download it again.") from error
    return parse_tensors(content, path)


def parse_tensors(content: bytes, where: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file's bytes; see `read_stored`."""
    try:
        tensors = {
            name: StoredTensor(str(entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"]))
            for name, entry in deserialize(content)  # type: ignore[no-untyped-call]
        }
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = dict(header.get("__metadata__") or {})
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{where} is damaged or is not a safetensors file ({error}). Save or download it again."
        ) from error
    if SEAL in metadata:
        raw = {name: (tensor.dtype, tensor.shape, tensor.content) for name, tensor in tensors.items()}
        _check_seal(where, metadata[SEAL], lambda: tensors_digest(raw, metadata))
    return tensors, metadata


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with other metadata and its checksum; the tensors' bytes stay. Needs no torch."""
    described = {"format": "pt", **metadata}
    raw = {
        name: (str(entry["dtype"]), entry["shape"], entry["data"])
        for name, entry in deserialize(content)  # type: ignore[no-untyped-call]
    }
    return b"".join(_with_header(content, {**described, SEAL: tensors_digest(raw, described)}))


def _with_header(content: bytes, metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """A safetensors file in two parts, with that metadata.

    The package writes metadata in an order of its own each time, so that the same tensors would make another file.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    text = json.dumps({"__metadata__": dict(metadata), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    return len(text).to_bytes(8, "little") + text, memoryview(content)[8 + size :]


def read_json(path: str | os.PathLike[str], *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        unique: refuse an object with the same key twice, which readers take differently.

    Raises:
        ArtifactError: the file is missing, is not JSON or does not hold an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: the folder is not complete; save or download it again.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}). Save or download it again.") from error
    return parse_json(text, path, unique=unique)


def parse_json(text: str, where: Any, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from text; see `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats if unique else None)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} cannot be read as JSON ({error}). Save or download it again.") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} must hold a JSON object; it holds a {type(value).__name__}.")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.60} is there twice")
    return value


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object that `write_sealed` wrote, without its checksum.

    Raises:
        ArtifactError: the file is missing or no JSON object, or its checksum is not that of its content.
    """
    value = read_json(path, unique=True)
    found = value.pop(SEAL, None)
    try:
        _check_seal(path, found, lambda: json_digest(value))
    except RecursionError:
        raise ArtifactError(f"{path} is damaged: it is nested too deeply.") from None
    return value


def settled(files: Sequence[Path], read: Callable[[], _Read]) -> _Read:
    """What `read` returns; again where it fails while another process replaces these files."""
    for _ in range(_PATIENCE):
        before = [_identity(file) for file in files]
        try:
            return read()
        except ArtifactError:
            if [_identity(file) for file in files] == before:
                raise
            time.sleep(0.02)
    return read()


def _identity(file: Path) -> tuple[int, ...]:
    with suppress(OSError):
        status = file.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return ()


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
