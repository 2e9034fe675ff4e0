"""An export is kept only where it agrees, appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taskres_hf.errors import ArtifactError, ConfigurationError, DataError
from taskres_hf.export import FORMATS, exporting
from taskres_hf.storage import read_sealed

Tiny = Callable[..., Any]
export = exporting.export


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Format `torch` without torch's exporter, which takes seconds: the fused module is run as it is."""

    def write(fused: Any, folder: Path, precision: str) -> Any:
        (folder / "model.pt2").write_bytes(b"program")
        return lambda pixels: fused(pixels)[0]

    monkeypatch.setitem(FORMATS, "torch", write)


def _content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.usefixtures("quick")
def test_facts_lie_beside_it_and_name_no_path_of_this_machine(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    facts = export(model, tmp_path / "new" / "out", "torch")
    folder = tmp_path / "new" / "out"
    assert read_sealed(folder / "export.json") == json.loads(json.dumps(facts))
    assert sorted(facts["files"]) == ["labels.json", "model.pt2", "preprocessor_config.json"]
    assert json.loads((folder / "labels.json").read_text()) == model.class_names
    assert facts["base_model"] == "tiny"
    assert not any(b"/home/somebody" in content for content in _content(folder).values())
    assert facts["check"]["pictures"] == 8
    assert facts["accuracy"] is None


@pytest.mark.usefixtures("quick")
def test_only_an_unchanged_export_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    export(tiny(), folder, "torch")  # an empty folder is free
    export(tiny(names=["a", "b", "c"]), folder, "torch")
    assert json.loads((folder / "labels.json").read_text()) == ["a", "b", "c"]
    assert os.listdir(tmp_path) == ["out"]
    (folder / "labels.json").write_text('["mine"]')
    with pytest.raises(ArtifactError, match=r"labels\.json there was added or changed"):
        export(tiny(), folder, "torch")
    assert (folder / "labels.json").read_text() == '["mine"]'


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["file", "link", "other", "added", "forged", "classifier"])
def test_anything_else_stays(tiny: Tiny, tmp_path: Path, trained: Path, kind: str) -> None:
    folder = tmp_path / "out"
    if kind == "file":
        folder.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind in ("other", "classifier", "forged"):
        folder.mkdir()
        (folder / "config.json").write_bytes((trained / "config.json").read_bytes())
        if kind == "forged":
            (folder / "export.json").write_text('{"kind": "taskres_hf export", "files": {}}')
    else:
        export(tiny(), folder, "torch")
        (folder / "notes.txt").write_text("mine")
    before = _content(tmp_path)
    with pytest.raises(ArtifactError, match="is not replaced"):
        export(tiny(), folder, "torch")
    assert _content(tmp_path) == before


def test_what_does_not_agree_is_not_kept(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = tiny(), tmp_path / "out"

    def write(by: float) -> Any:
        return lambda fused, folder, precision: lambda pixels: fused(pixels)[0] + by

    monkeypatch.setitem(FORMATS, "torch", write(0.0))
    facts = export(model, folder, "torch")
    before = _content(folder)
    for by in (2 * facts["check"]["tolerance"], float("nan")):
        monkeypatch.setitem(FORMATS, "torch", write(by))
        with pytest.raises(ArtifactError, match=r"other logits.*Nothing was kept"):
            export(model, folder, "torch")
    assert _content(folder) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("quick")
def test_a_wrong_fusion_is_noticed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    plain = type(model.classifier).forward
    monkeypatch.setattr(type(model.classifier), "forward", lambda self, embeds: plain(self, embeds) + 1e-2)
    with pytest.raises(ArtifactError, match="cannot be written as one linear layer"):
        export(model, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_or_failed_export_leaves_the_old_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "torch", lambda fused, folder, precision: lambda pixels: fused(pixels)[0])
    folder = tmp_path / "out"
    export(tiny(), folder, "torch")
    before = _content(folder)

    def fails(error: BaseException) -> Any:
        def write(fused: Any, folder: Path, precision: str) -> Any:
            (folder / "half").write_bytes(b"x")
            raise error

        return write

    kinds = ((KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("no such operator"), ConfigurationError))
    for error, expected in kinds:
        monkeypatch.setitem(FORMATS, "torch", fails(error))
        with pytest.raises(expected):
            export(tiny(), folder, "torch")
        assert _content(folder) == before
        assert os.listdir(tmp_path) == ["out"]


def test_a_rename_that_fails_brings_the_old_one_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    folder = tmp_path / "out"
    export(tiny(), folder, "torch")
    before, rename = _content(folder), os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(target) == folder and not str(source).endswith("old"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ArtifactError, match="No space left"):
        export(tiny(names=["a", "b", "c"]), folder, "torch")
    assert _content(folder) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "'tflite'"),
        ({"precision": "int4"}, "'int4'"),
        ({"format": "torch", "precision": "int8"}, "onnx, web, handler"),
        ({"format": "openvino", "precision": "int8"}, "NNCF"),
        ({"format": "onnx", "vendor": True}, "--vendor"),
    ],
)
def test_what_does_not_exist_is_refused_at_once(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        export("there/is/no/such/classifier", tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_accuracy_before_and_after(trained: Path, splits: Any, tmp_path: Path) -> None:
    test = splits["test"].select(range(0, 159, 8))
    facts = export(trained, tmp_path / "out", "torch", dataset=test)
    from taskres_hf import TaskResCLIPForImageClassification

    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    pixels = model.image_processor(images=[row["image"] for row in test], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        right = [int(row.argmax()) == label for row, label in zip(model(pixels).logits, test["label"], strict=True)]
    share = sum(right) / len(right)
    assert facts["accuracy"] == {"pictures": len(test), "classifier": share, "exported": share}
    seen = json.loads((trained / "config.json").read_text())["few_shot"]["indices"]
    with pytest.raises(DataError, match="held out"):  # of the training pictures, none is new
        export(trained, tmp_path / "seen", "torch", dataset=splits["train"].select(seen))
    with pytest.warns(UserWarning, match="left out"):
        facts = export(trained, tmp_path / "part", "torch", dataset=splits["train"].select([*seen[:3], *rest(seen)]))
    assert facts["accuracy"]["pictures"] == 2


def rest(seen: list[int]) -> list[int]:
    """Two rows of the training split that are not among those."""
    return [row for row in range(179) if row not in seen][:2]


_FULL = """
import resource, signal, sys
from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.errors import ArtifactError
from taskres_hf.export import export
model = Model.from_pretrained(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
for format in sys.argv[3:]:
    try:
        export(model, sys.argv[2] + "/" + format, format)
    except ArtifactError as error:
        print(format, error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_an_error_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    """In a process of its own: torch's writer ends the process."""
    formats = ["torch", "linear"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FULL, str(trained), str(tmp_path), *formats],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == formats
    assert not list(tmp_path.iterdir())
