"""What is published: the source distribution can run its own tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_source_distribution_holds_what_the_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.parquet", "*.safetensors")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    build = "import setuptools.build_meta as backend; backend.build_sdist('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (archive,) = (tmp_path / "source" / "out").iterdir()
    with tarfile.open(archive) as tar:
        names = {"/".join(Path(name).parts[1:]) for name in tar.getnames()}
        metadata = next(member for member in tar.getmembers() if Path(member.name).parts[1:] == ("PKG-INFO",))
        text = tar.extractfile(metadata).read().decode()  # type: ignore[union-attr]
    folders = ("tests", "docs", "examples", "benchmarks", "taskres_hf")
    needed = [path for folder in folders for path in (tmp_path / "source" / folder).rglob("*") if path.is_file()]
    assert not {str(path.relative_to(tmp_path / "source")) for path in needed} - names
    assert {"tests/conftest.py", "Makefile", "setup.cfg", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"} <= names
    assert not any("__pycache__" in name for name in names)
    assert "Project-URL: Paper, https://arxiv.org/abs/2211.10277" in text
