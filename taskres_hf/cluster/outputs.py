"""What a run writes: a parquet file for each block, whole or absent, and a manifest that says what they are.

    OUT/_manifest.json         inputs, model, settings; at the end rows, errors and every part; under a checksum
    OUT/part-000012.parquet    one block, named by a rename; its footer says of which run and which block it is

So no process needs to know of another: a part that is there is finished, whoever wrote it, and a block that two workers
did is the same file twice.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..embedding.stored import StoredFeatures
from ..errors import ArtifactError, ConfigurationError, DataError
from ..storage import check_can_write, is_sealed, json_digest, read_sealed, sealed, write_bytes, write_sealed
from ..tables import visible
from .inputs import Block, Inputs

MANIFEST = "_manifest.json"  # readers of parquet folders pass over names that begin so
_FORMAT = 1
_FOOTER = b"taskres"
_LOCK, _TRYING = ".lock", ".trying-"
_TRIES = 5  # of a block, of which each ended its worker
_STAGED = ".taskres.tmp"
RESERVED = ("source", "row", "picture", "embedding", "classifier", "labels", "scores", "rejected", "error")


def part_name(number: int) -> str:
    """File name of a block's part."""
    return f"part-{number:06d}.parquet"


# ---------------------------------------------------------------------- one part


def write_part(
    folder: str | os.PathLike[str], block: Block, run: str, columns: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a block's rows in one step; returns what its footer says.

    Args:
        run: digest of the run. columns: arrays of pyarrow. facts: what else to say of the block.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = {"run": run, "block": block.digest, "number": block.number, "source": block.source, **facts}
    table = pa.table(dict(columns)).replace_schema_metadata({_FOOTER: json.dumps(sealed(said)).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=4096, write_page_checksum=True)
    write_bytes(Path(folder, part_name(block.number)), sink.getbuffer())
    return said


def read_part(folder: str | os.PathLike[str], number: int) -> dict[str, Any] | None:
    """What the footer of a part says; None where there is no such part, or none that is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(Path(folder, part_name(number)))
        said = json.loads((found.metadata or {})[_FOOTER])
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    if not is_sealed(said) or said.get("rows") != found.num_rows:
        return None
    return {key: value for key, value in said.items() if key != "sha256"}


def may_try(folder: str | os.PathLike[str], number: int) -> bool:
    """Count one more try of a block; False where it has ended its worker too often, as a crafted picture might."""
    path = Path(folder, f"{_TRYING}{number:06d}")
    with suppress(OSError):
        with path.open("ab") as stream:
            stream.write(b"x")
        return path.stat().st_size <= _TRIES
    return True


def no_longer_tried(folder: str | os.PathLike[str], number: int) -> None:
    """The block is done, or was refused."""
    Path(folder, f"{_TRYING}{number:06d}").unlink(missing_ok=True)


# ---------------------------------------------------------------------- the folder


class OutputFolder:
    """The folder of one run; hold it with `opened`.

    Args:
        path: the folder, which may be there. run: what rows depend on, by name. inputs: what is read.

    Attributes:
        digest: of the run.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any], inputs: Inputs) -> None:
        self.path, self.inputs = Path(path), inputs
        self.run = {**json.loads(json.dumps(run)), "data": inputs.digest}
        self.digest = json_digest(self.run)

    @contextmanager
    def opened(self) -> Iterator[OutputFolder]:
        """Be the only one who writes, and say what will be written.

        Raises:
            ConfigurationError: another run's folder, other files in it, or another process is at it.
            ArtifactError: it cannot be written.
        """
        check_can_write(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, self.path)
            self._begin()
            yield self
        finally:
            os.close(handle)

    def _begin(self) -> None:
        if (self.path / MANIFEST).exists():
            begun = read_sealed(self.path / MANIFEST).get("run", {})
            other = [name for name in {**self.run, **begun} if self.run.get(name) != begun.get(name)]
            if other:
                raise ConfigurationError(
                    f"{self.path} was made with other {', '.join(other)}: {_difference(begun, self.run, other)}. "
                    "Repeat the call that began it, or choose another output folder."
                )
        else:
            there = [name for name in os.listdir(self.path) if name != _LOCK and not name.endswith(_STAGED)]
            if there:
                raise ConfigurationError(
                    f"{self.path} holds other files ({visible(sorted(there)[0])}): give an empty or a new folder."
                )
            self._write(False, {})
        for name in os.listdir(self.path):  # what a killed worker left, since nobody else is at it
            if name.startswith(_TRYING) or (name.startswith(".part-") and name.endswith(_STAGED)):
                with suppress(OSError):
                    os.unlink(self.path / name)

    def finished(self) -> dict[int, dict[str, Any]]:
        """Parts that are there, by the number of their block."""
        parts = {block.number: read_part(self.path, block.number) for block in self.inputs.blocks}
        wanted = {block.number: block.digest for block in self.inputs.blocks}
        return {
            number: said
            for number, said in parts.items()
            if said is not None and said["run"] == self.digest and said["block"] == wanted[number]
        }

    def finish(self, parts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Say that all is there; returns the manifest."""
        return self._write(True, parts)

    def _write(self, complete: bool, parts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        rows = [
            {
                "file": part_name(number),
                "bytes": os.path.getsize(self.path / part_name(number)),
                **{key: value for key, value in parts[number].items() if key not in ("run", "block", "number")},
            }
            for number in sorted(parts)
        ]
        manifest = {
            "format_version": _FORMAT, "taskres_hf": __version__, "run": self.run, "inputs": self.inputs.files,
            "class_names": self.inputs.class_names, "blocks": len(self.inputs.blocks), "complete": complete,
            "rows": sum(row["rows"] for row in rows), "errors": sum(row["errors"] for row in rows), "parts": rows,
        }  # fmt: skip
        write_sealed(self.path / MANIFEST, manifest)
        return manifest


def _difference(begun: Mapping[str, Any], run: Mapping[str, Any], names: Sequence[str]) -> str:
    told = (f"{name} {_short(begun.get(name))} then, {_short(run.get(name))} now" for name in names)
    return "; ".join(told)


def _short(value: Any) -> str:
    text = visible(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lock(handle: int, path: Path) -> None:
    """Keep other processes away until this one ends, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigurationError(
            f"Another process is writing into {path}. Wait for it, or choose another output folder."
        ) from None
    except OSError:  # a file system without locks
        return


# ---------------------------------------------------------------------- reading what was written


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder that `embed` or `predict` finished.

    Raises:
        ArtifactError: there is none, it is damaged, a part is missing or not its own, or the run is not finished.
    """
    manifest = read_sealed(Path(folder, MANIFEST))
    if not manifest.get("complete"):
        raise ArtifactError(f"{folder} is not finished: repeat the command that began it, which goes on from there.")
    for number, part in enumerate(manifest["parts"]):
        said = read_part(folder, number)
        if part["file"] != part_name(number) or said is None or said["rows"] != part["rows"]:
            raise ArtifactError(f"{part['file']} of {folder} is missing or damaged: repeat the command that made it.")
    return manifest


def stored_features(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    label: str = "label",
    class_names: Sequence[str] | None = None,
) -> StoredFeatures:
    """Embeddings of a finished run as one `.npy` file to train on; pictures without an embedding are left out.

    Args:
        folder: what `embed` wrote. path: the `.npy` file to write, of the same number type.
        label: a column that was kept, of class ids or of names; or `folder`, the folder that a picture file lies in.
        class_names: K names in label order; by default those that the data says, else the names there are, sorted.

    Raises:
        ArtifactError: the folder is not finished or not whole. DataError: no such column, or labels that are none.
    """
    import pyarrow.parquet as pq

    manifest = read_manifest(folder)
    parts = [Path(folder, part["file"]) for part in manifest["parts"]]
    schema = pq.read_schema(parts[0])
    if "embedding" not in schema.names:
        raise DataError(f"{folder} holds no embeddings: `embed` writes them.")
    column = "source" if label == "folder" and label not in schema.names else label
    if column not in schema.names:
        raise DataError(f"{folder} has no column {visible(label)!r}: keep it with keep=[{label!r}] (--keep).")
    labels: list[Any] = []
    for part in parts:
        table = pq.read_table(part, columns=[column, "error"])
        for value, error in zip(table[column].to_pylist(), table["error"].to_pylist(), strict=True):
            value = os.path.basename(os.path.dirname(value)) if column == "source" else value
            labels.append(None if error is not None else value)
    known = class_names or manifest["class_names"].get(label)
    names = list(known or sorted({str(value) for value in labels if value is not None}))
    ids = _ids(labels, names, known is None)
    kept = np.asarray([number is not None for number in ids])
    _write_table(Path(path), parts, kept)
    return StoredFeatures(path, [number for number in ids if number is not None], names)


def _ids(labels: Sequence[Any], names: Sequence[str], by_name: bool) -> list[int | None]:
    """Class ids of labels that are ids or names; None of what has no label."""
    place = {name: number for number, name in enumerate(names)}
    ids: list[int | None] = []
    for value in labels:
        if isinstance(value, int) and not by_name:
            found = value if 0 <= value < len(names) else None
        else:
            found = None if value is None else place.get(str(value))
        if found is None and value is not None:
            raise DataError(f"The label {visible(str(value))!r} is none of the {len(names)} classes.")
        ids.append(found)
    if not any(number is not None for number in ids):
        raise DataError("No row has both a label and an embedding.")
    return ids


def _write_table(path: Path, parts: Sequence[Path], kept: Any) -> None:
    """Rows of parts that are kept, at least one, one part at a time in memory, put in place by a rename."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    staged = path.with_name(f".{path.name}{_STAGED}")
    table: Any = None
    try:
        read = written = 0
        for part in parts:
            column = pq.read_table(part, columns=["embedding"])["embedding"].combine_chunks()
            chosen = np.flatnonzero(kept[read : read + len(column)])
            read += len(column)
            if not len(chosen):
                continue
            numbers = column.take(pa.array(chosen)).flatten().to_numpy(zero_copy_only=False)
            rows = numbers.reshape(len(chosen), -1)
            if table is None:
                shape = (int(kept.sum()), rows.shape[1])
                table = np.lib.format.open_memmap(staged, mode="w+", dtype=rows.dtype, shape=shape)
            table[written : written + len(chosen)] = rows
            written += len(chosen)
        table.flush()
        os.replace(staged, path)
    except OSError as error:
        raise ArtifactError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        staged.unlink(missing_ok=True)
