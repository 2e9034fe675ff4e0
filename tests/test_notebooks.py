"""The notebooks run from top to bottom in a kernel of their own, on shipped pictures, and show what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
SHOWN = {
    "own_photos": ["not yet: zero-shot", "macro F1", "image/png", "model.safetensors"],
    "researcher": ["tip-adapter", "parameters", "p (Holm)", "image/png", "of t, turned by"],
}


def test_every_notebook_is_run() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat: Any = pytest.importorskip("nbformat", reason="notebooks are run by nbclient and ipykernel")
    nbclient: Any = pytest.importorskip("nbclient", reason="notebooks are run by nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="notebooks are run by nbclient and ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without outputs
    done = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = str([cell.get("outputs") for cell in done.cells])
    assert not [text for text in SHOWN[name] if text not in shown]
