"""Archives are read in place by the rules for folders; nothing is unpacked, whatever is in them."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from taskres_hf import load_splits, load_training_data
from taskres_hf.data import LabelledImages, listing
from taskres_hf.errors import DataError, ImageError

Pack = Callable[..., Path]
KINDS = ("zip", "tar", "tar.gz", "tar.xz")


@pytest.fixture
def pack(tmp_path: Path, photos: list[bytes]) -> Pack:
    """Make an archive of these members: pictures where None is given."""

    def make(members: Mapping[str, bytes | None], kind: str = "zip", name: str = "data") -> Path:
        path = tmp_path / f"{name}.{kind}"
        contents = {
            member: photos[number % len(photos)] if content is None else content
            for number, (member, content) in enumerate(members.items())
        }
        if kind == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for member, content in contents.items():
                    archive.writestr(member, content)
        else:
            mode = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[kind]
            with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
                for member, content in contents.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return path

    return make


CLASSES = {"d/train/cat/1.png": None, "d/train/dog/2.png": None, "d/test/cat/3.png": None, "d/test/dog/4.png": None}


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_read_as_its_folder_would_be(pack: Pack, photos: list[bytes], kind: str, tmp_path: Path) -> None:
    path = pack({**CLASSES, "d/notes.txt": b"x", "__MACOSX/d/train/cat/._1.png": b"x", "d/more.zip": b"PK"}, kind)
    before = sorted(os.listdir(tmp_path))
    data = load_training_data(path)
    assert data.train.class_names == ["cat", "dog"]
    assert [data.train.source(row) for row in range(2)] == [
        {"bytes": photos[0], "path": "d/train/cat/1.png"}, {"bytes": photos[1], "path": "d/train/dog/2.png"},
    ]  # fmt: skip
    assert data.held_out is not None
    assert data.held_out.image(1).size == data.held_out.image(1).convert("RGB").size
    assert data.train.digest(0) != data.train.digest(1)
    assert {row.reason: row.count for row in data.account.left_out} == {
        "files ending in .txt": 1, "archives inside ending in .zip": 1,
    }  # fmt: skip
    assert data.account.kind.endswith("archive of split folders with class folders")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_table_inside(pack: Pack, kind: str) -> None:
    table = b"file_name,label\n1.png,cat\n./2.png,dog\n"
    data = load_training_data(pack({"x/img/1.png": None, "x/img/2.png": None, "x/img/metadata.csv": table}, kind))
    assert data.train.class_names == ["cat", "dog"]
    table = b"path,label\nimg/1.png,cat\n../../etc/passwd.png,dog\n"
    with pytest.raises(DataError, match=r"etc/passwd.png' \(row 3\)"):
        load_training_data(pack({"img/1.png": None, "labels.csv": table}, kind))


def test_as_datasets(pack: Pack) -> None:
    splits = load_splits(pack(CLASSES))
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert splits["test"][1]["image"].size == LabelledImages(splits["test"]).image(1).size


@pytest.mark.parametrize("kind", KINDS)
def test_shared_by_threads_and_processes(pack: Pack, kind: str) -> None:
    members = {f"{'cat' if number % 2 else 'dog'}/{number}.png": None for number in range(40)}
    train = load_training_data(pack(members, kind)).train
    expected = [train.digest(row) for row in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(train.digest, range(40))) == expected
    copy = pickle.loads(pickle.dumps(train))
    assert [copy.digest(row) for row in range(40)] == expected
    assert copy.select([3, 1]).digest(0) == expected[3]


def _exit_code_of_reading(images: LabelledImages, expected: list[str]) -> None:
    sys.exit(0 if all(_digests(images) == expected for _ in range(20)) else 1)


def _digests(images: LabelledImages) -> list[str]:
    return [images.digest(row) for row in range(len(images))]


def test_after_a_fork(pack: Pack) -> None:
    """Processes do not share the position in an open file."""
    train = load_training_data(pack({f"c{number % 2}/{number}.png": None for number in range(40)})).train
    expected = _digests(train)
    processes = [get_context("fork").Process(target=_exit_code_of_reading, args=(train, expected)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


# ---------------------------------------------------------------------- attacks and damage

GOOD = {"cat/1.png": None, "dog/2.png": None}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_names_that_lead_outside(pack: Pack, kind: str, tmp_path: Path) -> None:
    names = ["../evil/1.png", "/tmp/evil/2.png", "cat/../../evil/3.png", "C:/evil/4.png", "..\\evil\\5.png"]
    data = load_training_data(pack({**GOOD, **dict.fromkeys(names)}, kind))
    assert len(data.train) == 2
    assert [(row.reason, row.count) for row in data.account.left_out] == [
        ("members whose name leads out of the archive", 5)
    ]
    assert not (tmp_path.parent / "evil").exists()


def test_links_inside(tmp_path: Path, pack: Pack) -> None:
    path = pack(GOOD, "tar")
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"cat/{kind!r}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    path = pack(GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    for kind, count in (("tar", 3), ("zip", 1)):
        data = load_training_data(tmp_path / f"data.{kind}")
        assert (len(data.train), data.account.left_out[0].count) == (2, count)


def test_members_packed_beyond_belief(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_training_data(pack({**GOOD, "cat/bomb.png": bytes(30_000_000)}))
    assert [(row.count, row.examples) for row in data.account.left_out] == [(1, ("cat/bomb.png",))]
    monkeypatch.setattr(listing, "LARGEST_UNPACKED", 10_000_000)
    with pytest.raises(DataError, match=r"unpacks to more than.*zip or an uncompressed"):
        load_training_data(pack({**GOOD, "cat/bomb.png": bytes(30_000_000)}, "tar.gz"))


def test_encrypted_members(pack: Pack) -> None:
    path = pack({**GOOD, "cat/3.png": None})
    raw = bytearray(path.read_bytes())
    start = raw.rindex(b"PK\x01\x02")  # the last entry of the directory: its flags
    raw[start + 8] |= 1
    path.write_bytes(raw)
    data = load_training_data(path)
    assert (len(data.train), data.account.left_out[0].reason) == (2, "encrypted members")
    for entry in range(3):
        start = raw.index(b"PK\x01\x02", start + 1 if entry else 0)
        raw[start + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"neither parquet files nor pictures.*3 encrypted members"):
        load_training_data(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_cut_archives(pack: Pack, kind: str, share: float) -> None:
    path = pack({f"c{number % 2}/{number}.png": None for number in range(12)}, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="damaged"):
        load_training_data(path)


@pytest.mark.parametrize("ending", ["7z", "rar"])
def test_other_archives(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"data.{ending}").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it"):
        load_training_data(tmp_path / f"data.{ending}")


def test_a_damaged_member_is_one_bad_picture(pack: Pack) -> None:
    path = pack(GOOD)
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    train = load_training_data(path).train
    with pytest.raises(ImageError, match=r"cat/1.png in data.zip cannot be read"):
        train.digest(0)
    assert train.image(1).width


def test_an_archive_that_goes_away(pack: Pack) -> None:
    path = pack(GOOD, "tar")
    train = load_training_data(path).train
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        train.image(0)


# ---------------------------------------------------------------------- shards


def _samples(labels: Mapping[str, bytes], ending: str) -> dict[str, bytes | None]:
    members: dict[str, bytes | None] = {}
    for key, label in labels.items():
        members |= {f"{key}.jpg": None, f"{key}.{ending}": label}
    return members


@pytest.mark.parametrize(
    ("ending", "labels", "names"),
    [
        ("cls", [b"0", b"1\n", b"0"], ["cat", "dog"]),
        ("cls", [b"cat", b"dog", b"cat"], None),
        ("txt", [b"cat\n", b"dog", b"cat"], None),
        ("json", [b'{"label": "cat"}', b'{"label": "dog", "x": 1}', b'{"label": "cat"}'], None),
    ],
)
def test_shards(pack: Pack, tmp_path: Path, ending: str, labels: list[bytes], names: list[str] | None) -> None:
    members = _samples({"000": labels[0], "dir/001": labels[1]}, ending)
    (tmp_path / "shards").mkdir()
    pack(members, "tar", "shards/train-000000")
    pack(_samples({"002": labels[2]}, ending), "tar", "shards/train-000001")
    pack(_samples({"003": labels[1]}, ending), "tar", "shards/val-000000")
    data = load_training_data(tmp_path / "shards", class_names=names)
    assert data.account.kind == "WebDataset shards"
    assert [data.train.class_names[label] for label in data.train.labels] == ["cat", "dog", "cat"]
    assert data.held_out is not None
    assert (data.held_out.split, data.held_out.labels) == ("validation", [1])
    assert data.train.select([2]).image(0).width
    single = load_training_data(tmp_path / "shards" / "train-000000.tar", class_names=names)
    assert single.train.labels == [0, 1]


def test_a_field_of_the_json_can_be_named(pack: Pack) -> None:
    members = _samples({"0": b'{"label": "x", "kind": "cat"}', "1": b'{"label": "x", "kind": "dog"}'}, "json")
    path = pack(members, "tar")
    assert load_training_data(path, label_column="kind").train.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (_samples({str(n): f"a caption of picture {n}".encode() for n in range(30)}, "txt"), "look like captions"),
        (_samples({"0": b"{", "1": b"{}"}, "json"), r"0.json in data.tar is no label"),
        (_samples({"0": b'{"size": 3}', "1": b"{}"}, "json"), "No training picture has a label"),
        (_samples({"0": b"cat"}, "cls") | _samples({"1": b"dog"}, "txt"), "not in one place"),
    ],
)
def test_shards_that_cannot_be_read(pack: Pack, members: dict[str, bytes | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_training_data(pack(members, "tar"))


def test_a_label_of_several_parts_in_a_shard(pack: Pack) -> None:
    members = _samples({"0": b'{"label": [0, 1]}', "1": b'{"label": [1, 0]}'}, "json")
    with pytest.raises(DataError, match=r"0.json in data.tar: the field 'label' is no label but \[0, 1\]"):
        load_training_data(pack(members, "tar"))


def test_text_beside_pictures_in_class_folders_is_no_label(pack: Pack) -> None:
    """Boxes of YOLO in a tar of class folders."""
    members = _samples({f"{name}/{n}": b"0 0.5 0.5 1 1" for name in ("cat", "dog") for n in (1, 2)}, "txt")
    data = load_training_data(pack(members, "tar"))
    assert data.train.class_names == ["cat", "dog"]
    assert data.account.left_out[0].count == 4
