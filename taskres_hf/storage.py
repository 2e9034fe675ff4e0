"""Files that are either whole or absent: atomic writes, safetensors with the user's permissions, the cache folder.

Imports no torch: what an artifact is can be told without it.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace `path` by `content` in one step: after a crash it holds the old bytes or the new ones.

    Raises:
        ArtifactError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp and safetensors write 0600, unreadable to others
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise ArtifactError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was changed; choose a folder that can be written."
        ) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON in one step; see `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors in one step; see `write_bytes`."""
    from safetensors.torch import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, with_metadata(save(ready), {"format": "pt", **(metadata or {})}))


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with that metadata; the tensors' bytes stay.

    The package writes metadata in an order of its own each time, so that the same tensors would make another file.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    text = json.dumps({"__metadata__": dict(metadata), **header}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ArtifactError: the file is missing, truncated or not safetensors.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}, dict(stream.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: the folder is not complete; save or download it again.") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged or is not a safetensors file ({error}). Save or download it again."
        ) from error


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a safetensors file: dtype such as `"F32"`, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    @property
    def torch_name(self) -> str:
        """Its dtype as torch writes it."""
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
        return f"torch.{names.get(self.dtype, self.dtype.lower())}"

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
    """Tensors and metadata of a safetensors file, without torch.

    Raises:
        ArtifactError: the file is missing, truncated or not safetensors.
    """
    try:
        content = Path(path).read_bytes()
        tensors = {
            name: StoredTensor(str(entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"]))
            for name, entry in deserialize(content)  # type: ignore[no-untyped-call]
        }
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, dict(header.get("__metadata__") or {})
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: the folder is not complete; save or download it again.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged or is not a safetensors file ({error}). Save or download it again."
        ) from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArtifactError: the file is missing, is not JSON or does not hold an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: the folder is not complete; save or download it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}). Save or download it again.") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} must hold a JSON object; it holds a {type(value).__name__}.")
    return value


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
