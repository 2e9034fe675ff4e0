"""What cannot be had from the Hub: which repository, why, and what to do; and that no token gets out."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, Repo
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from support import random_residual, run

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.description import describe
from taskres_hf.errors import BaseModelError, HubError
from taskres_hf.hub import push_folder

Model = TaskResCLIPForImageClassification
BASE, ARTIFACT = "tester/tiny-clip", "tester/animals"


@pytest.fixture
def pushed(hub: HubServer, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A classifier and its base on the Hub, and nothing in the cache, whose folder this is."""
    hub.add_folder(BASE, base)
    random_residual(Model.from_base(BASE, ["cat", "dog"])).push_to_hub(ARTIFACT)
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "taskres"))
    return tmp_path / "cache"


def _gone(hub: HubServer, name: str) -> None:
    del hub.repos[f"models/{name}"]


def _private(hub: HubServer, name: str) -> None:
    hub.repos[f"models/{name}"].private = True


def _gated(hub: HubServer, name: str) -> None:
    hub.repos[f"models/{name}"].gated = True


def _disabled(hub: HubServer, name: str) -> None:
    hub.repos[f"models/{name}"].disabled = True


def _down(hub: HubServer, name: str) -> None:
    hub.fail("", f"/{name}/", 503, times=99)


def _busy(hub: HubServer, name: str) -> None:
    hub.fail("", f"/{name}/", 429, times=99)


def _dropping(hub: HubServer, name: str) -> None:
    hub.fail("", f"/{name}/", "drop", times=99)


def _nothing(hub: HubServer, name: str) -> None:
    pass


# What is wrong, the token, and what the message must have.
SITUATIONS = [
    (_gone, True, ["not on the Hub", "mistyped"]),
    (_gone, False, ["not on the Hub", "mistyped"]),
    (_private, False, ["private", "hf auth login"]),
    (_gated, False, ["gated", f"/{BASE}", "hf auth login"]),
    (_disabled, True, ["disabled"]),
    (_down, True, ["503", "connection"]),
    (_busy, True, ["429", "connection"]),
    (_dropping, True, ["connection"]),
    (_nothing, "hf_expired", ["token", "expired", "hf auth login"]),
]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.utils._http as client

    class Clock:
        sleep = staticmethod(lambda seconds: None)

    monkeypatch.setattr(client, "time", Clock)


def _ask(part: str, options: dict[str, Any]) -> None:
    if part == "base":
        Model.from_base(BASE, ["cat", "dog"], **options)
    elif part == "info":
        describe(ARTIFACT, **options)
    else:
        Model.from_pretrained(ARTIFACT, **options)


@pytest.mark.parametrize(("change", "token", "texts"), SITUATIONS)
@pytest.mark.parametrize("part", ["base", "stored base", "artifact", "info"])
def test_the_message_names_what_is_missing_and_what_to_do(
    hub: HubServer, pushed: Path, monkeypatch: pytest.MonkeyPatch, part: str, change: Any, token: Any, texts: list[str]
) -> None:
    name = ARTIFACT if part in ("artifact", "info") else BASE
    if part == "stored base" and token == "hf_expired":
        pytest.skip("the artifact is asked for first")
    change(hub, name)
    options: dict[str, Any] = {"cache_dir": str(pushed)}
    if token is False:
        monkeypatch.delenv("HF_TOKEN")
    elif token is not True:
        options["token"] = token
    with pytest.raises(HubError) as error:
        _ask(part, options)
    text = str(error.value)
    role = {"base": "base model", "stored base": "base model", "artifact": "classifier", "info": "classifier"}[part]
    assert text.startswith(f"The {role} {name}")
    assert "\n" not in text
    for wanted in texts:
        assert wanted.replace(BASE, name) in text
    if part == "base" and change is _gone:
        assert "base_model" in text
    if part == "stored base":
        assert "which the classifier names" in text
        if change is _gone:
            assert "base_model=" in text
    assert isinstance(error.value.__cause__, HTTPError | OSError)
    assert "hf_expired" not in text


@pytest.mark.parametrize("offline", ["environment", "argument"])
@pytest.mark.parametrize("part", ["base", "artifact"])
def test_offline(pushed: Path, monkeypatch: pytest.MonkeyPatch, part: str, offline: str) -> None:
    options: dict[str, Any] = {"cache_dir": str(pushed)}
    if offline == "argument":
        options["local_files_only"] = True
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = BASE if part == "base" else ARTIFACT
    with pytest.raises(HubError, match=rf"{name} is not in the cache.*(HF_HUB_OFFLINE|local_files_only)"):
        _ask(part, options)


@pytest.mark.parametrize("change", [_down, _busy, _dropping])
def test_the_cache_serves_where_the_hub_does_not_answer(hub: HubServer, pushed: Path, change: Any) -> None:
    first = Model.from_pretrained(ARTIFACT, cache_dir=str(pushed))
    for name in (BASE, ARTIFACT):
        change(hub, name)
    again = Model.from_pretrained(ARTIFACT, cache_dir=str(pushed))
    assert torch.equal(again.classifier.residual, first.classifier.residual)
    assert Model.from_base(BASE, ["cat", "dog"]).image_processor is not None  # read before, for the fixture


@pytest.mark.parametrize("change", [_gone, _gated, _private, _disabled])
@pytest.mark.parametrize("text_tower", [False, True])
def test_a_base_that_was_taken_away_lives_on_in_the_cache(
    hub: HubServer, pushed: Path, change: Any, text_tower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model.from_pretrained(ARTIFACT)
    change(hub, BASE)
    monkeypatch.delenv("HF_TOKEN")
    assert Model.from_pretrained(ARTIFACT, text_tower=text_tower).class_names == ["cat", "dog"]


def test_a_push_offline_or_without_rights(
    hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.read_only.add("an-org")
    for token, repo, texts in (
        (None, "an-org/pets", ("no right to write", "an-org", "--create-pr")),
        ("hf_expired", "tester/pets", ("does not take the token", "hf auth login")),
        (False, "tester/pets", ("not logged in", "hf auth login")),
    ):
        with pytest.raises(HubError) as error:
            push_folder(trained, repo, token=token)
        for text in (repo, str(trained), *texts):
            assert text in str(error.value)
        assert "hf_expired" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, text = run(capsys, "push", trained, "tester/pets")
    assert code == 1
    assert "HF_HUB_OFFLINE" in text
    assert f"taskres push {trained} tester/pets" in text


def test_a_pull_request_needs_no_right_to_write(hub: HubServer, trained: Path) -> None:
    hub.repos["models/an-org/pets"] = Repo()
    hub.read_only.add("an-org")
    assert push_folder(trained, "an-org/pets", create_pr=True).pr_revision == "refs/pr/1"


def test_a_base_that_moved_is_followed_and_said(
    hub: HubServer, pushed: Path, pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    expected = Model.from_pretrained(ARTIFACT)(pixel_values).logits
    hub.move(BASE, "others/renamed-clip")
    with pytest.warns(UserWarning, match=f"base model {BASE} has moved to others/renamed-clip"):
        loaded = Model.from_pretrained(ARTIFACT, cache_dir=str(pushed))
    assert torch.equal(loaded(pixel_values).logits, expected)
    with pytest.warns(UserWarning, match=f"base model {BASE} has moved to others/renamed-clip"):
        Model.from_base(BASE, ["cat", "dog"])
    hub.move(ARTIFACT, "others/pets")
    with pytest.warns(UserWarning, match=f"classifier {ARTIFACT} has moved to others/pets"):
        Model.from_pretrained(ARTIFACT, cache_dir=str(tmp_path / "other"))


def test_a_base_whose_commit_is_gone(hub: HubServer, pushed: Path) -> None:
    pinned = json.loads(hub.files(ARTIFACT)["config.json"])["base_model_revision"]
    hub.repos[f"models/{BASE}"].rewrite()
    with pytest.raises(HubError, match=f"{BASE}, which the classifier names, has no commit {pinned}.*base_revision="):
        Model.from_pretrained(ARTIFACT, cache_dir=str(pushed))
    loaded = Model.from_pretrained(ARTIFACT, cache_dir=str(pushed), base_revision="main")
    assert loaded.class_names == ["cat", "dog"]
    assert Model.from_pretrained(ARTIFACT).class_names == ["cat", "dog"]  # in the cache it lives on


def test_a_revision_that_is_not_there(hub: HubServer, pushed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HubError, match=f"classifier {ARTIFACT} has no revision 'v9'"):
        Model.from_pretrained(ARTIFACT, revision="v9")
    with pytest.raises(HubError, match=f"base model {BASE} has no revision 'v9'"):
        Model.from_base(BASE, ["cat", "dog"], revision="v9")
    code, _, text = run(capsys, "info", ARTIFACT, "--revision", "v9")
    assert code == 1
    assert "v9" in text


def test_a_name_that_no_repository_can_have(hub: HubServer, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("me/pets.git", "me/pe--ts"):
        with pytest.raises(HubError, match="base model"):
            Model.from_base(name, ["cat", "dog"])
        with pytest.raises(HubError, match="classifier"):
            Model.from_pretrained(name)
        code, _, text = run(capsys, "push", trained, name)
        assert code == 1
        assert f"'{name}' cannot be a repository" in text
    assert not hub.requests


def test_a_repository_that_holds_something_else(hub: HubServer, pushed: Path) -> None:
    hub.repos[f"models/{BASE}"].commit({"config.json": None}, "main", "edit")
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        Model.from_base(BASE, ["cat", "dog"])


def test_training_ends_well_where_the_upload_does_not(
    hub: HubServer, base: str, tmp_path: Path, splits: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in (0, 1):
        folder = tmp_path / "photos" / f"class {label}"
        folder.mkdir(parents=True)
        rows = [row for row in splits["train"] if row["label"] == label][:6]
        for number, row in enumerate(rows):
            row["image"].convert("RGB").save(folder / f"{number}.png")
    hub.read_only.add("an-org")
    out = tmp_path / "out"
    code, text, _ = run(
        capsys, "train", tmp_path / "photos", "--base-model", base, "-o", out, "--push-to-hub", "an-org/pets", "--json"
    )
    assert code == 1
    result = json.loads(text)
    assert result["output_dir"] == str(out)
    assert f"taskres push {out} an-org/pets" in result["error"]
    assert "accuracy" in result
    assert Model.from_pretrained(out).class_names == ["class 0", "class 1"]


# ---------------------------------------------------------------------- tokens

CANARY = "hf_canaryCanaryCanary"


def test_a_token_is_in_nothing_that_leaves_the_library(
    hub: HubServer, base: str, splits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, recwarn: Any
) -> None:
    monkeypatch.setattr(HubServer, "token", CANARY)
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    hub.add_folder(BASE, base)
    hub.repos[f"models/{BASE}"].private = True
    names = splits["train"].features["label"].names[:2]
    model = Model.from_base(BASE, names, token=CANARY)
    assert model.tokenizer is not None
    assert model.image_processor is not None
    arguments = TaskResTrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=2, save_epochs=1, disable_tqdm=True, hub_token=CANARY,
        push_to_hub=True, hub_model_id=ARTIFACT, hub_private_repo=True, shots=1,
    )  # fmt: skip
    both = splits["train"].filter(lambda row: row["label"] < 2)
    trainer = TaskResTrainer(random_residual(model), arguments, both)
    trainer.train()
    trainer.save_model()
    loaded = Model.from_pretrained(ARTIFACT, token=CANARY, cache_dir=str(tmp_path / "cache"))
    assert loaded.image_processor is not None
    hub.fail("POST", "/commit/", 403, times=9)
    random_residual(model, seed=7)
    errors = []
    for call in (
        lambda: model.push_to_hub(ARTIFACT, token=CANARY),
        lambda: Model.from_pretrained("tester/nowhere", token=CANARY),
        lambda: Model.from_base("tester/nowhere", ["cat", "dog"], token=CANARY),
    ):
        with pytest.raises(HubError) as error:
            call()
        errors += [str(error.value), repr(error.value), repr(error.value.__cause__)]
    said = [*errors, caplog.text, repr(arguments), str(arguments.to_dict()), *(str(item.message) for item in recwarn)]
    for thing in (model, loaded):
        stream = io.BytesIO()
        torch.save(thing, stream)
        said += [stream.getvalue().decode("latin1"), pickle.dumps(thing).decode("latin1"), repr(vars(thing))]
        said += [str(thing.config), repr(vars(copy.deepcopy(thing)))]
    assert not [text[:200] for text in said if CANARY in text]
    kept = [Path(str(errors[0]).split("whole in ")[1].split(";")[0]), tmp_path]
    files = [file for folder in kept for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]
    assert not [name for name, content in hub.files(ARTIFACT).items() if CANARY.encode() in content]
    shutil.rmtree(kept[0])
