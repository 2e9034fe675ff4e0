"""Pushes to a Hub that is busy, drops connections or says no; and what has arrived is not sent again."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.utils._http as client
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf import hub as taskres_hub
from taskres_hf.errors import HubError
from taskres_hf.hub import upload

ID = "tester/pets"
COMMIT = f"/api/models/{ID}/commit/"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds waited for, which pass at once: the Hub's client's and ours."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, time=time.time, monotonic=lambda: time.monotonic() + sum(slept))
    monkeypatch.setattr(client, "time", clock)
    monkeypatch.setattr(taskres_hub, "time", clock)
    return slept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files, and one that the Hub keeps as a large one."""
    folder = tmp_path / "my classifier"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# Pets\n")
    (folder / "model.safetensors").write_bytes(b"residual" * 100)
    return folder


def _paths(hub: HubServer, method: str, part: str) -> int:
    return sum(one == method and part in path for one, path in hub.requests)


# What the client does not ask again by itself, and what it does.
STEPS = [
    ("POST", "/api/repos/create"), ("GET", "/refs"), ("GET", "/README.md"), ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/lfs/"), ("POST", COMMIT),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The Hub")
@pytest.mark.parametrize("status", [429, 500, 503, 504, "drop"])
@pytest.mark.parametrize(("method", "path"), STEPS)
def test_every_step_is_tried_again(hub: HubServer, folder: Path, method: str, path: str, status: int | str) -> None:
    hub.fail(method, path, status, times=2)
    upload(folder, ID)
    assert hub.files(ID)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.repos[f"models/{ID}"].messages == ["initial commit", "Upload TaskRes classifier"]
    assert len(hub.sent) == 1
    assert not hub.faults[0].times


def test_the_wait_that_the_hub_asks_for_is_kept(hub: HubServer, folder: Path, waits: list[float]) -> None:
    hub.fail("POST", COMMIT, 429, headers={"Retry-After": "17"})
    hub.fail("POST", COMMIT, 503, headers={"Retry-After": email.utils.formatdate(time.time() + 30, usegmt=True)})
    hub.fail("POST", COMMIT, 429, headers={"RateLimit": '"api";r=0;t=44'})
    with pytest.warns(UserWarning, match="answered 429, too many requests. Trying again in 17 s"):
        upload(folder, ID)
    assert waits[0] == 17
    assert 25 <= waits[1] <= 30
    assert waits[2] == 44


def test_a_hub_that_asks_to_wait_for_an_hour_is_not_waited_for(
    hub: HubServer, folder: Path, waits: list[float]
) -> None:
    hub.fail("POST", COMMIT, 429, times=9, headers={"Retry-After": "3600"})
    with pytest.raises(HubError, match="3600 s or more"):
        upload(folder, ID)
    assert not waits


@pytest.mark.filterwarnings("ignore:The Hub")
@pytest.mark.parametrize("status", [429, 500, 503, "drop"])
def test_tries_are_bounded_and_the_folder_is_named(
    hub: HubServer, folder: Path, waits: list[float], status: int | str
) -> None:
    hub.fail("POST", COMMIT, status, times=99)
    with pytest.raises(HubError) as error:
        upload(folder, ID)
    text = str(error.value)
    assert "\n" not in text
    for part in (ID, f"taskres push '{folder}' {ID}"):
        assert part in text
    assert _paths(hub, "POST", COMMIT) == 6
    assert sum(waits) <= 30


@pytest.mark.filterwarnings("ignore:The Hub")
def test_a_hub_that_stays_down_is_not_asked_for_ever(hub: HubServer, folder: Path, waits: list[float]) -> None:
    hub.fail("POST", "/preupload/", 503, times=999)
    with pytest.raises(HubError, match="503"):
        upload(folder, ID)
    assert sum(waits) <= taskres_hub._PATIENCE


@pytest.mark.filterwarnings("ignore:The Hub")
def test_an_answer_that_does_not_come_is_given_up(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskres_hub, "_NO_ANSWER", 0.3)
    before = client.get_session().timeout
    hub.fail("POST", "/api/repos/create", "hang")
    hub.fail("POST", COMMIT, "hang")
    upload(folder, ID)
    assert not hub.waited_out
    assert client.get_session().timeout == before
    assert len(hub.repos[f"models/{ID}"].messages) == 2


@pytest.mark.filterwarnings("ignore:The Hub")
def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", COMMIT, "lost")
    commit = upload(folder, ID)
    repo = hub.repos[f"models/{ID}"]
    assert repo.messages == ["initial commit", "Upload TaskRes classifier"]
    assert commit.oid == repo.refs["main"]
    (folder / "config.json").write_text('{"a": 1}')
    hub.fail("POST", COMMIT, "lost")
    assert upload(folder, ID, parent_commit=commit.oid).oid == repo.refs["main"]
    assert len(repo.messages) == 3


@pytest.mark.filterwarnings("ignore:The Hub")
def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub: HubServer, folder: Path) -> None:
    upload(folder, ID)
    upload(folder, ID, revision="other")
    (folder / "config.json").write_text('{"a": 1}')
    hub.fail("POST", COMMIT, "lost")
    commit = upload(folder, ID, create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert [name for name in hub.repos[f"models/{ID}"].refs if "/pr/" in name] == ["refs/pr/1"]


@pytest.mark.filterwarnings("ignore:The Hub")
def test_somebody_elses_commit_in_between(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the card was looked at, before ours: it is looked at again, and their card is kept."""
    upload(folder, ID)
    repo = hub.repos[f"models/{ID}"]
    (folder / "config.json").write_text('{"a": 1}')
    ours = HfApi.create_commit

    def first_theirs(*args: Any, **options: Any) -> Any:
        if len(repo.messages) == 2:
            repo.commit({"README.md": b"# Pets\nTheirs.\n"}, "main", "edit")
        return ours(*args, **options)

    monkeypatch.setattr(HfApi, "create_commit", first_theirs)
    upload(folder, ID)
    assert hub.files(ID)["README.md"] == b"# Pets\nTheirs.\n"
    assert hub.files(ID)["config.json"] == b'{"a": 1}'


def test_a_push_without_news_makes_no_commit(hub: HubServer, folder: Path) -> None:
    first = upload(folder, ID)
    with pytest.warns(UserWarning, match="no commit was made"):
        assert upload(folder, ID).oid == first.oid
    assert len(hub.repos[f"models/{ID}"].messages) == 2
    assert len(hub.sent) == 1


# ---------------------------------------------------------------------- large files


@pytest.mark.filterwarnings("ignore:The Hub", "ignore::DeprecationWarning")
@pytest.mark.parametrize("part_size", [0, 5_000_000])
def test_a_large_file_that_arrived_is_not_sent_again(hub: HubServer, folder: Path, part_size: int) -> None:
    """Cut after the first of two large files, and again before the commit."""
    hub.part_size = part_size
    (folder / "notes.bin").write_bytes(b"0123456789" * 1_200_000)
    hub.fail("POST", COMMIT, "drop", times=99)
    with pytest.raises(HubError):
        upload(folder, ID)
    parts = 3 if part_size else 1
    assert len(hub.sent) == 1 + parts
    assert len(hub.repos[f"models/{ID}"].messages) == 1
    hub.faults.clear()
    upload(folder, ID)
    assert len(hub.sent) == 1 + parts
    assert hub.files(ID)["notes.bin"] == (folder / "notes.bin").read_bytes()


@pytest.mark.filterwarnings("ignore:The Hub", "ignore::DeprecationWarning")
def test_only_the_large_file_that_was_cut_is_sent_again(hub: HubServer, folder: Path) -> None:
    import hashlib

    (folder / "a.safetensors").write_bytes(b"a" * 1000)
    (folder / "b.safetensors").write_bytes(b"b" * 1000)
    cut = hashlib.sha256(b"b" * 1000).hexdigest()
    hub.fail("PUT", f"/lfs/{cut}", 403, times=1)
    with pytest.raises(HubError, match=r"b\.safetensors|403"):
        upload(folder, ID)
    hub.over.wait(0.1)
    before = list(hub.sent)
    assert cut not in before
    upload(folder, ID)
    assert len(hub.sent) == 3
    assert len(set(hub.sent)) == 3


@pytest.mark.skipif(
    all(kind.__name__ != "RemoteProtocolError" for kind in client._DEFAULT_RETRY_ON_EXCEPTIONS),
    reason="this huggingface_hub does not go on after a cut; the library then says that the Hub cannot be reached",
)
@pytest.mark.parametrize("size", [3000, 12_000_000])
def test_a_download_that_is_cut_goes_on(hub: HubServer, folder: Path, size: int) -> None:
    content = bytes(range(250)) * (size // 250)
    (folder / "notes.bin").write_bytes(content)
    upload(folder, ID)
    hub.fail("GET", "/notes.bin", "cut", times=2)
    assert Path(hf_hub_download(ID, "notes.bin")).read_bytes() == content


# ---------------------------------------------------------------------- through the model


@pytest.mark.filterwarnings("ignore:The Hub")
def test_what_the_model_could_not_upload_is_kept(hub: HubServer, base: str, tmp_path: Path) -> None:
    hub.add_folder("tester/tiny-clip", base)
    model = TaskResCLIPForImageClassification.from_base("tester/tiny-clip", ["cat", "dog"])
    hub.fail("POST", COMMIT, 500, times=99)
    with pytest.raises(HubError, match="taskres push") as error:
        model.push_to_hub(ID)
    kept = Path(str(error.value).split("whole in ")[1].split(";")[0])
    assert (kept / "model.safetensors").is_file()
    hub.faults.clear()
    assert TaskResCLIPForImageClassification.from_pretrained(kept).class_names == ["cat", "dog"]
    before: Any = set(kept.parent.glob("taskres-*"))
    model.push_to_hub(ID)
    assert set(kept.parent.glob("taskres-*")) == before
    with pytest.warns(UserWarning, match="no commit"):  # the very same bytes each time
        model.push_to_hub(ID)
