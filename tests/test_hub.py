"""Upload, download and the card, through the real client against a local server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from support import random_residual, run
from transformers import AutoModelForImageClassification, pipeline

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.errors import ArtifactError, ConfigurationError, HubError
from taskres_hf.hub import is_hub_id, push_folder

Model = TaskResCLIPForImageClassification


@pytest.fixture
def online(hub: HubServer, base: str, spec: dict[str, Any]) -> Model:
    """A classifier whose base lives on the Hub."""
    hub.add_folder("tester/tiny-clip", base)
    return random_residual(Model.from_base("tester/tiny-clip", spec["classes"], spec["template"]))


def test_push_and_load_by_every_loader(online: Model, hub: HubServer, pixel_values: torch.Tensor) -> None:
    commit = online.push_to_hub("tester/animals", commit_message="First", tags=["emoji"])
    assert commit.oid in hub.repos["models/tester/animals"].commits
    assert set(hub.files("tester/animals")) == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    assert sum(len(content) for content in hub.files("tester/animals").values()) < 20_000
    expected = online(pixel_values=pixel_values).logits
    for loader in (Model, AutoModelForImageClassification):
        assert torch.equal(loader.from_pretrained("tester/animals")(pixel_values=pixel_values).logits, expected)
    assert len(pipeline("image-classification", model="tester/animals").model.class_names) == 8


def test_base_is_pinned_to_its_commit(online: Model, hub: HubServer, base: str, tmp_path: Path) -> None:
    online.push_to_hub("tester/animals")
    pinned = json.loads(hub.files("tester/animals")["config.json"])["base_model_revision"]
    assert pinned == hub.repos["models/tester/tiny-clip"].refs["main"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")  # the base's main moves on to something useless
    hub.add_folder("tester/tiny-clip", tmp_path / "other")
    assert torch.equal(Model.from_pretrained("tester/animals").classifier.residual, online.classifier.residual)


def test_revision_is_the_artifacts_not_the_bases(online: Model) -> None:
    online.push_to_hub("tester/animals")
    with torch.no_grad():
        online.classifier.residual.zero_()
    online.push_to_hub("tester/animals", revision="zeros")
    assert Model.from_pretrained("tester/animals").classifier.residual.any()
    assert not Model.from_pretrained("tester/animals", revision="zeros").classifier.residual.any()


def test_private_repositories_and_tokens(online: Model, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    online.push_to_hub("tester/secret", private=True)
    assert hub.repos["models/tester/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="tester/secret") as error:
        Model.from_pretrained("tester/secret")
    assert isinstance(error.value.__cause__, RepositoryNotFoundError)
    assert Model.from_pretrained("tester/secret", token=hub.token).class_names == online.class_names
    for content in hub.files("tester/secret").values():
        assert hub.token.encode() not in content


def test_gated_base_says_so(online: Model, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.push_to_hub("tester/animals")
    hub.repos["models/tester/tiny-clip"].gated = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="gated") as error:
        Model.from_pretrained("tester/animals", cache_dir=str(tmp_path))
    assert isinstance(error.value.__cause__, GatedRepoError)


def test_cached_copy_serves_when_the_hub_is_down(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    Model.from_pretrained("tester/animals")
    hub.down = True
    loaded = Model.from_pretrained("tester/animals", local_files_only=True)
    assert torch.equal(loaded.classifier.residual, online.classifier.residual)
    assert loaded.image_processor is not None


def test_local_base_is_not_published_as_a_path(model: Model, hub: HubServer, base: str) -> None:
    with pytest.warns(UserWarning, match="base_model="):
        model.push_to_hub("tester/local")
    for name, content in hub.files("tester/local").items():
        assert base.encode() not in content, name
    assert model.config.base_model_name_or_path == str(Path(base).resolve())
    assert Model.from_pretrained("tester/local", base_model=base).class_names == model.class_names


def test_a_card_written_on_the_hub_is_kept(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    hub.repos["models/tester/animals"].commit({"README.md": b"Our own words."}, "main", "edit")
    online.push_to_hub("tester/animals")
    assert hub.files("tester/animals")["README.md"] == b"Our own words."


def test_the_card_of_the_branch_that_is_pushed_to_decides(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    online.push_to_hub("tester/animals", revision="tidy")
    hub.repos["models/tester/animals"].commit({"README.md": b"Words on the branch."}, "tidy", "edit")
    hub.repos["models/tester/animals"].commit({"README.md": b"Words on main."}, "main", "edit")
    online.push_to_hub("tester/animals", revision="tidy")
    assert hub.files("tester/animals", "tidy")["README.md"] == b"Words on the branch."
    online.push_to_hub("tester/animals", revision="fresh")
    assert hub.files("tester/animals", "fresh")["README.md"] == b"Words on main."


def test_saving_with_push_uploads_the_code_too(online: Model, hub: HubServer, tmp_path: Path) -> None:
    online.save_pretrained(tmp_path / "a", push_to_hub=True, repo_id="tester/animals", include_code=True)
    assert "modeling_taskres.py" in hub.files("tester/animals")
    assert "auto_map" in json.loads(hub.files("tester/animals")["config.json"])


# ---------------------------------------------------------------------- a folder, as it is


def test_a_folder_is_uploaded_as_it_is(
    online: Model, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    online.save_pretrained(folder, residual_dtype=torch.float16)
    (folder / "README.md").write_text("My own words.")
    for name in ("run.yaml", ".hidden", "notes.txt", "embeddings.safetensors", "x.tmp"):
        (folder / name).write_text("x")
    for name in ("checkpoint-3", ".taskres.x.tmp"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("x")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    monkeypatch.setattr(Model, "from_pretrained", lambda *args, **options: pytest.fail("the base was loaded"))
    commit = push_folder(folder, "tester/folder", commit_message="As it is", private=True)
    assert commit.oid in hub.repos["models/tester/folder"].commits
    assert hub.repos["models/tester/folder"].private
    files = hub.files("tester/folder")
    assert set(files) == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert all(files[name] == before[name] for name in files)
    (folder / "README.md").write_text("My own words.\nAnd more.")
    assert push_folder(folder, "tester/folder", create_pr=True).pr_url


def test_a_folder_with_a_local_base_names_its_last_part(
    model: Model, hub: HubServer, base: str, tmp_path: Path
) -> None:
    random_residual(model).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match="base_model="):
        push_folder(tmp_path, "tester/local-folder", include_code=True)
    files = hub.files("tester/local-folder")
    assert not [name for name, content in files.items() if str(Path(base).parent).encode() in content]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert "modeling_taskres.py" in files
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "tiny-clip"
    loaded = Model.from_pretrained("tester/local-folder", base_model=base)
    assert torch.equal(loaded.classifier.residual, model.classifier.residual)
    assert loaded.image_processor.to_dict() == model.image_processor.to_dict()
    repo = hub.repos["models/tester/local-folder"]
    for name, key in (("config.json", "alpha"), ("preprocessor_config.json", "image_mean")):  # signed anew as a whole
        edited = json.dumps({**json.loads(files[name]), key: 0.25}).encode()
        repo.commit({name: edited}, "main", "edit")
        with pytest.raises(ArtifactError, match=f"{name} was changed .* in {key}"):
            Model.from_pretrained("tester/local-folder", base_model=base)
        repo.commit({name: files[name]}, "main", "restore")
    Model.from_pretrained("tester/local-folder", base_model=base)
    with pytest.warns(UserWarning, match="base_model="):
        push_folder(tmp_path, "tester/local-folder", revision="plain")
    assert (
        Model.from_pretrained("tester/local-folder", revision="plain", base_model=base).class_names == model.class_names
    )


def test_a_folder_that_is_no_artifact_is_not_uploaded(online: Model, hub: HubServer, tmp_path: Path) -> None:
    online.save_pretrained(tmp_path / "a")
    content = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "a" / "model.safetensors").write_bytes(content)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a", tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(ArtifactError):
            push_folder(folder, "tester/broken")
    assert "models/tester/broken" not in hub.repos


def test_ids_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("me/pets", "gpt2"):
        assert is_hub_id(name)
    for name in ("here", "./pets", "a/b/c", "..", "", "~/pets", "/pets", None, "a b", "me/pets.git", "C:\\pets"):
        assert not is_hub_id(name), name


def test_trainer_pushes(online: Model, hub: HubServer, splits: Any) -> None:
    arguments = TaskResTrainingArguments(
        shots=1, num_train_epochs=2, disable_tqdm=True, push_to_hub=True, hub_model_id="tester/trained"
    )
    TaskResTrainer(online, arguments, splits["train"], splits["test"]).train()
    assert "model.safetensors" in hub.files("tester/trained")


def test_pull_requests_are_opened_and_pushed_to(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    before = hub.files("tester/animals")
    random_residual(online, seed=1)
    opened = online.push_to_hub("tester/animals", create_pr=True, commit_message="Better", commit_description="Why")
    assert opened.pr_revision == "refs/pr/1"
    assert hub.files("tester/animals") == before
    random_residual(online, seed=2)
    online.push_to_hub("tester/animals", revision="refs/pr/1")
    loaded = Model.from_pretrained("tester/animals", revision="refs/pr/1")
    assert torch.equal(loaded.classifier.residual, online.classifier.residual)
    assert hub.files("tester/animals") == before
    with pytest.raises(ConfigurationError, match="refs/pr/7"):
        online.push_to_hub("tester/animals", revision="refs/pr/7")
    with pytest.raises(ConfigurationError, match="create_pr"):
        online.push_to_hub("tester/animals", revision="other", create_pr=True)


def test_tags_are_read_and_never_pushed_to(online: Model, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    first = online.push_to_hub("tester/animals")
    HfApi().create_tag("tester/animals", tag="v1")
    random_residual(online, seed=1)
    online.push_to_hub("tester/animals")
    old, new = (Model.from_pretrained("tester/animals", revision=name) for name in ("v1", "main"))
    assert not torch.equal(old.classifier.residual, new.classifier.residual)
    code, text, _ = run(capsys, "info", "tester/animals", "--revision", "v1", "--json")
    assert code == 0
    assert json.loads(text)["commit"] == first.oid
    with pytest.raises(ConfigurationError, match="tag"):
        online.push_to_hub("tester/animals", revision="v1")


def test_a_moved_branch_is_refused_where_the_parent_is_named(online: Model, hub: HubServer) -> None:
    first = online.push_to_hub("tester/animals").oid
    random_residual(online, seed=1)
    second = online.push_to_hub("tester/animals", parent_commit=first).oid
    random_residual(online, seed=2)
    with pytest.raises(HubError, match=f"no longer at {first}"):
        online.push_to_hub("tester/animals", parent_commit=first)
    assert hub.repos["models/tester/animals"].refs["main"] == second


def test_private_is_not_promised_for_a_public_repository(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    with pytest.raises(ConfigurationError, match="is public"):
        online.push_to_hub("tester/animals", private=True)
    first = online.push_to_hub("tester/secret", private=True)
    assert hub.repos["models/tester/secret"].private
    assert online.push_to_hub("tester/secret", private=True).oid == first.oid


def test_a_classifier_with_a_bias_is_pushed_and_loaded(online: Model, hub: HubServer, tmp_path: Path) -> None:
    online.classifier.set_weight(
        torch.randn(online.classifier.base.shape), class_bias=torch.ones(len(online.class_names))
    )
    online.strength = 0.75
    images = torch.randn(4, 192)
    expected = online(image_embeds=images).logits
    online.push_to_hub("tester/whole")
    online.save_pretrained(tmp_path / "a")
    push_folder(tmp_path / "a", "tester/as-it-is")
    for name in ("tester/whole", "tester/as-it-is"):
        assert torch.equal(Model.from_pretrained(name)(image_embeds=images).logits, expected)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_base_inside_its_repository_is_loaded_again(
    hub: HubServer, base: str, tmp_path: Path, pixel_values: torch.Tensor, place: str
) -> None:
    shutil.copytree(base, tmp_path / "base" / "clip")
    hub.add_folder("tester/nested", tmp_path / "base")
    name = str(tmp_path / "base") if place == "folder" else "tester/nested"
    model = random_residual(TaskResCLIPForImageClassification.from_base(name, ["cat", "dog"], subfolder="clip"))
    model.save_pretrained(tmp_path / "artifact")
    loaded = TaskResCLIPForImageClassification.from_pretrained(tmp_path / "artifact")
    assert torch.equal(loaded(pixel_values).logits, model.eval()(pixel_values).logits)
    assert loaded.config.base_model_subfolder == (None if place == "folder" else "clip")
