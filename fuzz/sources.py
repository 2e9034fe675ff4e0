"""The files that users bring: tables of labels, archives, split lists. They carry no checksum of ours.

Damage may give another answer there, since a table with another label is a table. It must be well formed: one label a
picture, files that are there, no member from outside an archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from taskres_hf.data.sources import SourceOptions, read_source
from taskres_hf.data.training_data import load_training_data
from taskres_hf.paper import datasets as paper

from .harness import Target
from .material import CLASSES, png

Files = dict[str, bytes]
_PICTURES = {
    f"{name}/{number}.png": png(3 * place + number) for place, name in enumerate(CLASSES) for number in range(3)
}
_LABELS = [(path, path.split("/")[0]) for path in _PICTURES]


# ---------------------------------------------------------------------- tables


def _tables() -> list[Files]:
    import pyarrow
    import pyarrow.parquet

    splits = ["train", "test", "validation"] * 3
    text = "\n".join(
        ["path,label,split", *(f"{p},{label},{s}" for (p, label), s in zip(_LABELS, splits, strict=True)), ""]
    )
    rows = [{"path": path, "label": label, "n": n} for n, (path, label) in enumerate(_LABELS)]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    tables = {
        "labels.csv": text.encode(), "labels.tsv": text.replace(",", "\t").encode(),
        "labels.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "labels.txt": "".join(f"{path} {label}\n" for path, label in _LABELS).encode(),
        "labels.json": json.dumps(rows).encode(), "labels.parquet": sink.getvalue(),
    }  # fmt: skip
    return [{name: content, **_PICTURES} for name, content in tables.items()]


def _of_reading(reading: Any, folder: Path) -> Any:
    return [
        (split.name, [os.path.relpath(split.cells[row], folder) for row in range(len(split.cells))], list(split.labels))
        for split in reading.splits
    ]


def _read_table(folder: Path) -> Any:
    (table,) = folder.glob("labels.*")
    return _of_reading(read_source(table, SourceOptions()), folder)


def _train_on_table(folder: Path) -> Any:
    (table,) = folder.glob("labels.*")
    data = load_training_data(table)
    train = data.train
    return [
        (
            "train",
            [hashlib.sha256(str(train.digest(row)).encode()).hexdigest() for row in range(len(train))],
            list(train.labels),
        )
    ]


def _paired(answer: Any) -> str:
    return (
        ""
        if all(len(cells) == len(labels) > 0 for _, cells, labels in answer)
        else "pictures and labels differ in number"
    )


def tables() -> Target:
    """Tables of path and label; every 50th is opened as for training."""
    return Target("tables", _tables(), _read_table, check=_paired, thorough=_train_on_table, keep=(".png",))


# ---------------------------------------------------------------------- archives


def _zip(members: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return sink.getvalue()


def _tar(members: Files, mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def _archives() -> list[Files]:
    split = {f"{part}/{name}": data for part in ("train", "test") for name, data in _PICTURES.items()}
    table = {**_PICTURES, "labels.csv": "\n".join(["path,label", *(f"{p},{label}" for p, label in _LABELS)]).encode()}
    shard: Files = {}
    for number, (path, label) in enumerate(_LABELS):
        shard |= {f"{number:04d}.png": _PICTURES[path], f"{number:04d}.cls": label.encode()}
    packs = {
        "a.zip": _zip(_PICTURES), "b.zip": _zip(split, zipfile.ZIP_DEFLATED), "c.zip": _zip(table),
        "a.tar": _tar(split), "b.tar": _tar(shard), "a.tgz": _tar(_PICTURES, "w:gz"),
    }  # fmt: skip
    return [{name: content} for name, content in packs.items()]


def _read_archive(folder: Path) -> Any:
    """Every picture of every split, by name, content and label."""
    (pack,) = folder.iterdir()
    reading = read_source(pack, SourceOptions())
    answer = []
    for split in reading.splits:
        cells = [split.cells[row] for row in range(len(split.cells))]
        digests = [(cell["path"], hashlib.sha256(cell["bytes"]).hexdigest()) for cell in cells]
        answer.append((split.name, digests, list(split.labels)))
    return answer


def _inside(answer: Any) -> str:
    names = [path for _, digests, _ in answer for path, _ in digests]
    outside = [
        name for name in names if name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0][1:2]
    ]
    return f"members from outside: {outside[:3]}" if outside else _paired(answer)


def archives() -> Target:
    """Zip and tar files of class folders, of splits, with a table, and shards; every member is read."""
    return Target("archives", _archives(), _read_archive, check=_inside)


# ---------------------------------------------------------------------- split lists


def _described() -> dict[str, Any]:
    """Descriptions of two datasets of the paper, cut down to the pictures here."""
    known = json.loads(json.dumps(paper.suite_datasets()))
    pets, aircraft = known["oxford_pets"], known["fgvc_aircraft"]
    for spec in (pets, aircraft):
        spec.update(class_names=list(CLASSES), sizes={"train": 3, "validation": 3, "test": 3})
        spec["layout"] = {**spec["layout"], "folder": "d", "images": "images"}
        spec.pop("wnids", None)
    pets["layout"]["split_file"] = "split.json"
    rows = list(_split_rows().values())
    pets["split_sha256"] = hashlib.sha256(
        json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    ).hexdigest()
    return dict(known)


def _split_rows() -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for number, (path, label) in enumerate(_LABELS):
        rows[("train", "val", "test")[number % 3]].append([path, CLASSES.index(label), label])
    return rows


def _split_seed() -> Files:
    return {
        "d/split.json": json.dumps(_split_rows()).encode(),
        **{f"d/images/{n}": data for n, data in _PICTURES.items()},
    }


def _variant_seed() -> Files:
    files, pictures = {}, {}
    for key, rows in _split_rows().items():
        lines = []
        for path, _, label in rows:
            stem = path.replace("/", "-").removesuffix(".png")
            pictures[f"d/images/{stem}.jpg"] = _PICTURES[path]
            lines.append(f"{stem} {label}\n")
        files[f"d/images_variant_{key}.txt"] = "".join(lines).encode()
    return {**files, **pictures}


def _open(name: str, accept: bool) -> Callable[[Path], Any]:
    described = _described()

    def read(folder: Path) -> Any:
        with mock.patch.object(paper, "suite_datasets", return_value=described):
            which = name or ("oxford_pets" if (folder / "d/split.json").exists() else "fgvc_aircraft")
            data = paper.open_dataset(which, folder, allow_other_split=accept)
        answer = []
        for split, images in data.splits.items():
            paths = [images.source(row)["path"] for row in range(len(images))]
            answer.append((split, [os.path.relpath(path, folder) for path in paths], list(images.labels)))
        return answer

    return read


def _below(answer: Any) -> str:
    outside = [path for _, paths, _ in answer for path in paths if not path.startswith("d/images")]
    return f"pictures from outside: {outside[:3]}" if outside else _paired(answer)


def split_file() -> Target:
    """A published split file, known by its digest."""
    return Target("split-file", [_split_seed()], _open("oxford_pets", False), keep=(".png",))


def split_lists() -> Target:
    """Split files and lists whose content is not that of the published ones, which the user accepts."""
    return Target("split-lists", [_split_seed(), _variant_seed()], _open("", True), check=_below, keep=(".png", ".jpg"))


BROUGHT: dict[str, Callable[[], Target]] = {
    "tables": tables, "archives": archives, "split-file": split_file, "split-lists": split_lists,
}  # fmt: skip
