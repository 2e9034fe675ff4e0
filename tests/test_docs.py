"""Every snippet and command in the documentation runs, and every link leads somewhere."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hub_server import HubServer
from image_towers import save_processor, tiny_classifier
from text_models import tiny_text_model, tiny_tokenizer

import taskres_hf
from benchmarks.timing import Report, markdown
from taskres_hf.cli.app import COMMANDS, main
from taskres_hf.encoders import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages and examples that need more than the library and its light extras.
_EXTRAS = {
    "app.md": "gradio", "serve.md": "fastapi", "export.md": "onnxruntime", "serve_with_fastapi.py": "fastapi",
    "export_and_run.py": "onnxruntime", "ray_serve.py": "ray",  # which tests/test_ray_serve.py runs
}  # fmt: skip
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def world(hub: HubServer, base: str, splits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: `photos`, `cat.jpg`, and their repositories on the Hub."""
    for name in ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"):
        hub.add_folder(name, base)
    for name, labels in (
        ("facebook/dinov2-small", ()),
        ("google/vit-base-patch16-224", ("tabby, tabby cat", "beagle")),
    ):
        folder = tmp_path / name
        tiny_classifier("vit", labels or ("LABEL_0", "LABEL_1")).save_pretrained(folder)
        save_processor(folder)
        hub.add_folder(name, folder)
    encoder = tmp_path / "encoder"
    tiny_text_model("bert").save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    hub.add_folder("sentence-transformers/all-MiniLM-L6-v2", encoder)
    here = tmp_path / "world"
    for split in ("train", "test"):
        for label, name in ((0, "cat"), (1, "dog")):
            folder = here / "photos" / split / name
            folder.mkdir(parents=True)
            rows = [row for row in splits[split] if row["label"] == label][:6]
            for number, row in enumerate(rows, start=1):
                row["image"].convert("RGB").save(folder / f"{number}.jpg")
    (here / "cat.jpg").write_bytes((here / "photos" / "test" / "cat" / "1.jpg").read_bytes())
    pets = tmp_path / "pets"
    pets.mkdir()
    for split in ("train", "test"):
        splits[split].to_parquet(pets / f"{split}.parquet")
    hub.add_folder("timm/oxford-iiit-pet", pets, "datasets")
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def families() -> Iterator[None]:
    """What a page registers is not there for other tests."""
    with mock.patch.dict(FAMILIES):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, world: Path) -> None:
    if page.name in _EXTRAS:
        pytest.importorskip(_EXTRAS[page.name], reason=f"the optional package {_EXTRAS[page.name]} is not installed")
    names: dict[str, Any] = {}
    for language, code in _BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
        elif language == "bash":
            for line in code.splitlines():
                if line.startswith("taskres "):
                    with pytest.raises(SystemExit) as stop:
                        main(shlex.split(line, comments=True)[1:])
                    assert not stop.value.code, line


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_performance_page_shows_what_was_measured() -> None:
    assert markdown(Report.stored()) in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--shots", "2"],
        ["transformers_trainer.py", "--epochs", "1"],
        ["many_classifiers_one_backbone.py"],
        ["compare_and_save.py", "--shots", "2"],
        ["serve_with_fastapi.py"],
        ["export_and_run.py"],
        ["label_next.py", "--labels", "10"],
    ],
    ids=lambda command: command[0],
)
def test_examples_run(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] in _EXTRAS:
        pytest.importorskip(_EXTRAS[command[0]], reason=f"the optional package {_EXTRAS[command[0]]} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "examples" / command[0]), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    assert all(file.name in text for file in (ROOT / "examples").glob("*.py"))


def _messages() -> str:
    """All text of the library, with the parts of its strings joined."""
    parts = []
    for path in sorted((ROOT / "taskres_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_the_errors_explained_are_those_of_the_library() -> None:
    page, messages = (ROOT / "docs" / "troubleshooting.md").read_text(), _messages()
    explained = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(explained) > 30
    assert not [message for message in explained if message not in messages]


def test_the_site_is_whole(tmp_path: Path) -> None:
    """`make docs`: every page has its place, every link and heading exists, all commands and public names are there."""
    pytest.importorskip(
        "mkdocs", reason="the site needs mkdocs-material and mkdocstrings (pip install taskres_hf[docs])"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert not done.returncode, done.stderr
    commands = (tmp_path / "site" / "commands" / "index.html").read_text()
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert all(f'id="taskres-{name}"' in commands for name in COMMANDS)
    assert all(f".{name}" in api for name in taskres_hf.__all__ if name not in ("__version__", "load_splits"))


@pytest.mark.filterwarnings("ignore")
def test_figures_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib (pip install taskres_hf[plots])")
    script = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    rows = script["table"]("Photographs, all methods")
    assert rows["zero-shot"][0] == rows["zero-shot"][4] < rows["taskres"][0] < rows["taskres"][4]
    (file,) = script["draw"](tmp_path, ["accuracy"])
    assert "taskres_hf" in file.read_text()
    said = r"right on ([\d.]+) % of unseen ones where zero-shot is on ([\d.]+) %"
    for page in (ROOT / "docs" / "index.md", ROOT / "README.md"):
        stated = re.search(said, page.read_text())
        assert stated
        assert [float(number) for number in stated.groups()] == [rows["taskres"][2], rows["zero-shot"][2]]
