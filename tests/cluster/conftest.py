"""The shipped pictures as parquet files, as shards and as files; in each some that cannot be read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BROKEN = {"a.parquet": [5], "b.parquet": [0, 33]}  # rows of the files whose picture is none
ROWS = {"a.parquet": 60, "b.parquet": 50}


def _png(picture: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="session")
def pictures(splits: Any) -> list[dict[str, Any]]:
    """110 pictures as bytes, with labels; those of BROKEN are no pictures."""
    rows = [{"content": _png(row["image"]), "label": row["label"]} for row in splits["test"].select(range(110))]
    for number in (5, 60, 93):
        rows[number]["content"] = b"no picture at all"
    return rows


@pytest.fixture(scope="session")
def tables(pictures: list[dict[str, Any]], spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parquet files as `datasets` writes them, in row groups of ten."""
    from datasets import ClassLabel, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=spec["classes"])})
    folder = tmp_path_factory.mktemp("tables")
    cells = [{"image": {"bytes": row["content"], "path": None}, "label": row["label"]} for row in pictures]
    table = pa.Table.from_pylist(cells, features.arrow_schema)
    pq.write_table(table.slice(0, 60), folder / "a.parquet", row_group_size=10)
    pq.write_table(table.slice(60), folder / "b.parquet", row_group_size=10)
    return folder


@pytest.fixture(scope="session")
def shards(pictures: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two WebDataset shards."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, start in enumerate((0, 60)):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as archive:
            for number, row in enumerate(pictures[start : start + (60 if not shard else 50)]):
                for ending, content in (("png", row["content"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def files(pictures: list[dict[str, Any]], spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as files, in class folders."""
    folder = tmp_path_factory.mktemp("files")
    for number, row in enumerate(pictures):
        place = folder / spec["classes"][row["label"]] / f"{number:03d}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(row["content"])
    return folder
