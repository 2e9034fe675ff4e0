"""`taskres info` and `taskres push`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from safetensors.torch import load, load_file
from support import run


def test_info_and_help_import_nothing_heavy(trained: Path) -> None:
    program = (
        "import sys\n"
        "from taskres_hf.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    for arguments in (["info", str(trained)], ["info", str(trained), "--json"], ["--help"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_info_names_what_it_is_at_80_columns(
    capsys: pytest.CaptureFixture[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run(capsys, "info", trained)
    assert code == 0
    assert "class names" in text
    assert "class names         mammal, bird, reptile or frog, sea creature, insect or bug," in text
    assert all(len(line) <= 80 or len(line.split(maxsplit=2)[-1].split()) == 1 for line in text.splitlines())


def test_push_uploads_the_files_as_they_are(
    capsys: pytest.CaptureFixture[str], trained: Path, hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "pets"
    shutil.copytree(trained, folder)
    (folder / "README.md").write_text("# My own words\n")
    (folder / "run.yaml").write_text("dataset: /home/me/photos\n")
    code, text, error = run(capsys, "push", folder, "tester/cli", "--json")
    assert code == 0, error
    assert json.loads(text)["repo_id"] == "tester/cli"
    uploaded = hub.files("tester/cli")
    assert load(uploaded["model.safetensors"])["residual"].equal(load_file(folder / "model.safetensors")["residual"])
    assert uploaded["preprocessor_config.json"] == (folder / "preprocessor_config.json").read_bytes()
    assert uploaded["README.md"] == b"# My own words\n"
    assert "run.yaml" not in uploaded


def test_push_to_a_branch_a_pull_request_and_on_top_of_a_commit(
    capsys: pytest.CaptureFixture[str], trained: Path, hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "pets"
    shutil.copytree(trained, folder)
    code, text, error = run(capsys, "push", folder, "tester/cli", "--private", "--revision", "next", "--json")
    assert code == 0, error
    first = json.loads(text)["commit"]
    repo = hub.repos["models/tester/cli"]
    assert repo.private
    assert repo.refs["next"] == first
    assert "config.json" not in hub.files("tester/cli")
    (folder / "LICENSE").write_text("MIT")
    code, text, error = run(capsys, "push", folder, "tester/cli", "--create-pr", "-m", "A licence")
    assert code == 0, error
    assert "/discussions/1" in text
    assert repo.messages[-1] == "A licence"
    code, _, error = run(capsys, "push", folder, "tester/cli", "--revision", "next", "--parent-commit", first)
    assert code == 0, error
    (folder / "LICENSE").write_text("Apache")
    code, _, error = run(capsys, "push", folder, "tester/cli", "--revision", "next", "--parent-commit", first)
    assert code == 1
    assert f"no longer at {first}" in error
    assert f"taskres push {folder} tester/cli" in error


def test_a_busy_hub_is_said_and_waited_for(
    capsys: pytest.CaptureFixture[str], trained: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskres_hf.hub._WAITS", (0.0, 0.0))
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "0"})
    code, text, error = run(capsys, "push", trained, "tester/cli", "--json")
    assert code == 0, error
    assert any("answered 429" in warning for warning in json.loads(text)["warnings"])
    hub.fail("POST", "/repos/create", 503, times=9)
    code, _, error = run(capsys, "push", trained, "tester/cli")
    assert code == 1
    assert "Warning: The Hub: it answered 503" in error
    assert "Traceback" not in error
