"""Data sets in blocks, by one process: each row once, the answers of the model, and going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import close_folder, run

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.cluster import Cluster, embed, predict, read_manifest, running, stored_features
from taskres_hf.cluster.inputs import find_inputs
from taskres_hf.cluster.workers import Worker
from taskres_hf.errors import ArtifactError, ConfigurationError, DataError
from taskres_hf.predicting import classify_files

BLOCK = 20


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of all parts, in the order of their ids."""
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: (row["source"], row["row"]))


@pytest.fixture(scope="module")
def embedded(tables: Path, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the parquet files; do not change them."""
    folder = tmp_path_factory.mktemp("out") / "embedded"
    written = embed(tables, base, folder, keep=["label"], rows_per_block=BLOCK, progress=False)
    assert (written.rows, written.pictures, written.blocks, written.resumed, written.errors) == (110, 110, 6, 0, 3)
    return folder


def test_each_row_is_there_once_with_its_embedding_or_an_error(
    embedded: Path, base: str, pictures: list[dict[str, Any]]
) -> None:
    rows = rows_of(embedded)
    wanted = [("a.parquet", number) for number in range(60)] + [("b.parquet", number) for number in range(50)]
    assert [(row["source"], row["row"]) for row in rows] == wanted
    assert [row["label"] for row in rows] == [row["label"] for row in pictures]
    broken = [(row["source"], row["row"]) for row in rows if row["error"]]
    assert broken == [("a.parquet", 5), ("b.parquet", 0), ("b.parquet", 33)]
    assert [row["embedding"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert "'b.parquet' row 33" in rows[93]["error"]
    good = [row for row in range(110) if row not in (5, 60, 93)]
    expected = ClassifierPool(base).embed([pictures[row]["content"] for row in good])
    found = torch.tensor([rows[row]["embedding"] for row in good])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_manifest_says_what_was_made_of_what(embedded: Path, tables: Path) -> None:
    manifest = read_manifest(embedded)
    assert (manifest["rows"], manifest["errors"]) == (110, 3)
    assert [one["source"] for one in manifest["inputs"]] == ["a.parquet", "b.parquet"]
    assert manifest["inputs"][0]["bytes"] == (tables / "a.parquet").stat().st_size
    assert len(manifest["inputs"][0]["ends_sha256"]) == len(manifest["run"]["model"]) == 64
    assert [part["first"] for part in manifest["parts"]] == [0, 20, 40, 0, 20, 40]


def test_shards_and_files_give_the_same_embeddings(
    embedded: Path, shards: Path, files: Path, base: str, tmp_path: Path
) -> None:
    wanted = {tuple(row["embedding"]) for row in rows_of(embedded) if row["embedding"]}
    embed(shards, base, tmp_path / "shards", keep=["cls"], progress=False)
    rows = rows_of(tmp_path / "shards")
    assert [row["picture"] for row in rows[:2]] == ["00000.png", "00001.png"]
    assert {tuple(row["embedding"]) for row in rows if row["embedding"]} == wanted
    assert [int(row["cls"]) for row in rows] == [row["label"] for row in rows_of(embedded)]
    assert "'train-0000.tar/00005.png'" in rows[5]["error"]
    written = embed(files, base, tmp_path / "files", rows_per_block=50, progress=False)
    assert (written.blocks, written.errors) == (3, 3)
    assert {tuple(row["embedding"]) for row in rows_of(tmp_path / "files") if row["embedding"]} == wanted


def test_a_second_run_does_only_what_is_missing(
    embedded: Path, tables: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(embedded, tmp_path / "again")
    before = {part.name: part.stat().st_mtime_ns for part in folder.glob("part-*")}
    (folder / "part-000004.parquet").unlink()
    (folder / "part-000001.parquet").write_bytes((folder / "part-000001.parquet").read_bytes()[:-9])  # cut short
    (folder / ".part-000004.parquet.x.taskres.tmp").write_bytes(b"left by a killed worker")
    done: list[int] = []
    do = Worker._do
    monkeypatch.setattr(Worker, "_do", lambda self, block: (done.append(block.number), do(self, block))[1])
    written = embed(tables, base, folder, keep=["label"], rows_per_block=BLOCK, progress=False)
    assert (sorted(done), written.resumed, written.rows, written.errors) == ([1, 4], 4, 110, 3)
    assert rows_of(folder) == rows_of(embedded)
    after = {part.name: part.stat().st_mtime_ns for part in folder.glob("part-*")}
    assert {name for name in after if after[name] != before[name]} == {"part-000001.parquet", "part-000004.parquet"}
    assert not list(folder.glob(".part-*"))


def test_a_folder_of_another_run_is_refused(
    embedded: Path, tables: Path, shards: Path, base: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"other numbers: numbers fp32 then, fp16 now"):
        embed(tables, base, embedded, keep=["label"], rows_per_block=BLOCK, numbers="fp16", progress=False)
    with pytest.raises(ConfigurationError, match=r"other .*data"):
        embed(shards, base, embedded, progress=False)
    with pytest.raises(ConfigurationError, match=r"other what, model"):
        predict(trained, tables, embedded, keep=["label"], rows_per_block=BLOCK, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"holds other files \(notes\.txt\)"):
        embed(tables, base, tmp_path, progress=False)


def test_changed_data_is_noticed(tables: Path, base: str, tmp_path: Path) -> None:
    data = shutil.copytree(tables, tmp_path / "data")
    embed(data, base, tmp_path / "out", rows_per_block=BLOCK, progress=False)
    table = pq.read_table(data / "b.parquet")
    pq.write_table(table.take(list(range(49, -1, -1))), data / "b.parquet", row_group_size=10)
    with pytest.raises(ConfigurationError, match="other data"):
        embed(data, base, tmp_path / "out", rows_per_block=BLOCK, progress=False)


def test_a_changed_picture_of_the_same_size_is_noticed(files: Path, base: str, tmp_path: Path) -> None:
    data = shutil.copytree(files, tmp_path / "data")
    embed(data, base, tmp_path / "out", progress=False)
    assert embed(data, base, tmp_path / "out", progress=False).resumed == 1
    picture = next(data.rglob("*.png"))
    picture.write_bytes(bytes(reversed(picture.read_bytes())))
    with pytest.raises(ConfigurationError, match="other data"):
        embed(data, base, tmp_path / "out", progress=False)


def test_links_to_a_folder_that_they_lie_in_are_not_followed(shards: Path, tmp_path: Path) -> None:
    """Two of them would give two ways on at each of forty steps."""
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "up").symlink_to("..")
        (tmp_path / "data" / name / f"{name}.tar").symlink_to(shards / "train-0000.tar")
    (tmp_path / "data" / "three").symlink_to("two")
    found = find_inputs(tmp_path / "data")
    assert [one["source"] for one in found.files] == ["one/one.tar", "three/two.tar", "two/two.tar"]


def test_a_folder_that_cannot_be_looked_into_is_no_missing_shard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data / "a")
    shutil.copytree(shards, data / "closed")
    close_folder(monkeypatch, "closed")
    with pytest.raises(DataError, match=r"Files may be missing: .*closed .*Permission denied"):
        find_inputs(data)
    assert find_inputs(data / "a").files


@pytest.mark.parametrize("name", ["x.png", "x.tar"])
def test_up_from_a_link_is_up_from_where_it_leads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other" / "inside").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "other"):
        (place / name).write_bytes(str(place).encode())
    (tmp_path / "link").symlink_to("other/inside")
    monkeypatch.chdir(tmp_path)
    found = find_inputs(f"link/../{name}")
    assert os.path.samefile(found.blocks[0].path, tmp_path / "other" / name)


def test_a_damaged_file_leaves_the_others_finished(tables: Path, base: str, tmp_path: Path) -> None:
    data = shutil.copytree(tables, tmp_path / "data")
    content = bytearray((data / "a.parquet").read_bytes())
    content[4:200] = b"\xff" * 196  # the first page's header
    (data / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"1 of 6 blocks cannot be read: .*a\.parquet.* run again"):
        embed(data, base, tmp_path / "out", keep=["label"], rows_per_block=BLOCK, progress=False)
    assert len(list((tmp_path / "out").glob("part-*"))) == 5
    with pytest.raises(ArtifactError, match="not finished"):
        read_manifest(tmp_path / "out")


def test_a_block_that_ends_its_worker_again_and_again_is_given_up(tables: Path, base: str, tmp_path: Path) -> None:
    from taskres_hf.cluster.outputs import may_try, no_longer_tried

    assert [may_try(tmp_path, 3) for _ in range(7)] == [True] * 5 + [False] * 2  # killed each time: never told done
    no_longer_tried(tmp_path, 3)
    assert may_try(tmp_path, 3)


def test_training_on_what_was_embedded(embedded: Path, base: str, spec: dict[str, Any], tmp_path: Path) -> None:
    data = stored_features(embedded, tmp_path / "embeds.npy")
    good = [row for row in rows_of(embedded) if row["embedding"]]
    assert data.class_names == spec["classes"]  # as the parquet file says
    assert data.labels.tolist() == [row["label"] for row in good]
    assert np.array_equal(np.load(tmp_path / "embeds.npy"), np.asarray([r["embedding"] for r in good], np.float32))
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True), data)
    trainer.train()
    right = model.classifier(torch.tensor([row["embedding"] for row in good])).argmax(1) == data.labels
    assert right.double().mean() > 0.8
    with pytest.raises(DataError, match="no column 'species'"):
        stored_features(embedded, tmp_path / "other.npy", "species")


def test_predictions_are_those_of_predict(
    files: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(
        capsys, "predict", trained, files, "--output-dir", tmp_path / "out", "--top-k", 3, "--rows-per-block", 30,
        "--json",
    )  # fmt: skip
    assert (code, json.loads(out)["skipped"], "005.png" in error) == (3, 3, True)
    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    names = sorted(path for path in files.rglob("*.png"))
    wanted = list(classify_files(model, names, top_k=3))
    rows = {row["source"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == 110
    for path, one in zip(names, wanted, strict=True):
        row = rows[str(path.relative_to(files))]
        assert row["labels"] == [top["label"] for top in one["predictions"]]
        assert row["scores"] == pytest.approx([top["score"] for top in one["predictions"]], abs=2e-5)
        assert (row["error"] is None) == (one["error"] is None)


def test_several_classifiers_give_a_row_each(tables: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "one")
    shutil.copytree(trained, tmp_path / "two")
    written = predict([tmp_path / "one", tmp_path / "two"], tables, tmp_path / "out", progress=False)
    assert (written.rows, written.pictures, written.errors) == (220, 110, 3)
    rows = rows_of(tmp_path / "out")
    assert {(row["source"], row["row"], row["classifier"]) for row in rows} == {
        (row["source"], row["row"], name) for row in rows for name in ("one", "two")
    }
    with pytest.raises(ConfigurationError, match="for one classifier"):
        predict([tmp_path / "one"], tables, tmp_path / "no", reject=True, progress=False)


def test_what_cannot_be_read_is_said_before_anything_is_written(
    tables: Path, files: Path, base: str, tmp_path: Path
) -> None:
    both = shutil.copytree(tables, tmp_path / "both")
    shutil.copytree(files, both / "pictures")
    for data, keep, message in (
        (both, (), "parquet and pictures|pictures and parquet"),
        (tables, ("species",), "no column 'species'"),
        (tables, ("error",), "columns of its own"),
        (tmp_path / "nowhere", (), "no file or folder"),
    ):
        with pytest.raises((DataError, ConfigurationError), match=message):
            embed(data, base, tmp_path / "out", keep=keep, progress=False)
        assert not (tmp_path / "out").exists()


def test_a_table_of_paths_fetches_no_address(files: Path, base: str, tmp_path: Path) -> None:
    import pyarrow as pa

    name = next(files.rglob("000.png"))
    table = pa.table({"path": [str(name), "http://127.0.0.1:1/x.png", "gone.png", None, "\x1b[31m<script>.png"]})
    pq.write_table(table, tmp_path / "data.parquet")
    embed(tmp_path / "data.parquet", base, tmp_path / "out", progress=False)
    errors = [row["error"] for row in rows_of(tmp_path / "out")]
    assert errors[0] is None
    assert "not fetched for a table" in errors[1]
    assert "no file of that name" in errors[2]
    assert "neither bytes nor a path" in errors[3]
    assert "\x1b" not in errors[4]


def test_the_command_without_ray_says_what_to_install(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
    options = ("--base-model", "shipped", "-o", tmp_path / "out")
    code, _, error = run(capsys, "embed", tables, *options, "--engine-cluster", "ray")
    assert (code, 'pip install "taskres_hf[ray]"' in error) == (1, True)
    assert run(capsys, "embed", tables, *options, "--workers", 2)[0] == 2
    assert run(capsys, "predict", "x", tables, "--engine-cluster", "ray")[0] == 2


def test_no_cluster_is_started_that_all_the_network_could_reach(
    tables: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray reads its settings when it is imported, so what was imported before listens on all addresses."""
    ray = ModuleType("ray")
    ray.__spec__, ray.is_initialized = ModuleSpec("ray", None), lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    with pytest.raises(ConfigurationError, match="RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0") as caught:
        embed(tables, base, tmp_path / "out", cluster="ray", progress=False)
    assert all(word in str(caught.value) for word in ("all addresses", "ray start --head", "address='auto'"))
    assert not (tmp_path / "out").exists()
    own = [Cluster("ray"), Cluster("ray", address="auto")]
    with pytest.raises(ConfigurationError):
        running._close_to_others(own[0])
    running._close_to_others(own[1])
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    running._close_to_others(own[0])  # a cluster that is there already, whoever made it
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    running._close_to_others(own[0])
