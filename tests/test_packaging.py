"""What is published: the wheel is the whole library, and the source distribution can run its own tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, for building writes into it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build") / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def _build(source: Path, kind: str) -> Path:
    """The one file that building makes; `kind` is `wheel` or `sdist`."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({f'out-{kind}'!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = (source / f"out-{kind}").iterdir()
    return built


def _files(source: Path, *folders: str) -> set[str]:
    return {
        path.relative_to(source).as_posix() for name in folders for path in (source / name).rglob("*") if path.is_file()
    }


def test_the_wheel_is_the_library_and_no_more(source: Path) -> None:
    library = _files(source, "taskres_hf")
    wheel = _build(source, "wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == library
    assert {"taskres_hf/py.typed", "taskres_hf/remote/modeling_taskres.py"} <= names
    assert wheel.stat().st_size < 26_000_000


def test_the_source_distribution_holds_what_the_tests_need(source: Path) -> None:
    needed = _files(source, "tests", "docs", "examples", "benchmarks", "fuzz", "taskres_hf")
    with tarfile.open(_build(source, "sdist")) as tar:
        names = {"/".join(Path(name).parts[1:]) for name in tar.getnames()}
        metadata = next(member for member in tar.getmembers() if Path(member.name).parts[1:] == ("PKG-INFO",))
        text = tar.extractfile(metadata).read().decode()  # type: ignore[union-attr]
    assert not needed - names
    assert {"tests/conftest.py", "Makefile", "setup.cfg", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"} <= names
    assert not any("__pycache__" in name for name in names)
    assert "Project-URL: Paper, https://arxiv.org/abs/2211.10277" in text
